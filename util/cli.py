"""Command lines: parsers that answer a typo with one line, flags that several share, progress, the numbers as JSON.

Free of torch, which programs import below `ARGS = get_args_parser().parse_args()`: --help and a mistyped flag are
answered at once.
"""

import argparse
import contextlib
import datetime
import difflib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from util.errors import InputError
from util.files import write_json

# what would fill the memory or the process table before anything else could say no
AT_MOST = {"num_workers": 256, "batch_size": 100_000, "micro_batch": 100_000, "distill_hidden": 100_000}
QUIET_SECONDS = 5  # between plain lines that only count


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are one line with the nearest name."""

    def __init__(self, prog: str, description: str):
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=shape)
        self.register("type", int, whole_number)
        self.register("type", float, finite_number)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]):
        if action.option_strings and arg_strings == ["--"]:  # argparse would make an empty list of it
            raise argparse.ArgumentError(action, "-- is no value")
        return super()._get_values(action, arg_strings)

    def error(self, message: str):
        """Exit with status 2 and one sentence on stderr."""
        flags, message = [flag for action in self._actions for flag in action.option_strings], " ".join(message.split())
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            message = f"{unknown[1]} is unknown{_nearest(unknown[1].split('=')[0], flags)} (--help lists all)"
        elif wrong := re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            choices = [name.strip(" '") for name in wrong[3].split(",")]
            message = f"{wrong[1]} {wrong[2]}: choose from {', '.join(choices)}{_nearest(wrong[2], choices)}"
        elif bad := re.match(r"argument (\S+): invalid (\w+) value: '(.*)'", message):
            kind = {"int": "whole number of at most nine digits", "float": "number"}.get(bad[2], bad[2])
            message = f"{bad[1]} {bad[3][:40]}: give a {kind}"
        self.exit(2, f"error: {message}\n")


def whole_number(text: str) -> int:
    """At most nine plain digits; int() also takes 1_0 and digits of any script."""
    if not re.fullmatch("[+-]?[0-9]{1,9}", text):
        raise ValueError
    return int(text)


def finite_number(text: str) -> float:
    """No nan, no inf, no digits of other scripts."""
    if not re.fullmatch(r"[-+.0-9eE]+", text) or not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def _nearest(word: str, known: list[str]) -> str:
    return "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(word, known, 1))


def parse_input_size(text: str) -> tuple[int, int]:
    """ "224" -> (224, 224); "256,128" -> (256, 128) = (H, W) in pixels; InputError for anything else."""
    sides = text.split(",")
    if len(sides) > 2 or not all(re.fullmatch(r"\s*[0-9]{1,4}\s*", side) for side in sides):
        raise InputError(f"--input_size {text[:40]}: give one side or H,W in pixels, for example 224, at most 9999")
    return int(sides[0]), int(sides[-1])


class Progress:
    """A bar on a terminal, plain lines with an ETA elsewhere, nothing where not `shown` (ranks other than 0): `done` of
    `total` steps, `later` more follow these."""

    def __init__(self, title: str, total: int, done: int = 0, shown: bool = True, later: int = 0):
        self.title, self.total, self.shown, self.later, self.first, self.done = title, total, shown, later, done, done
        self.started, self.said = time.perf_counter(), 0.0  # the first call prints
        disable = None if shown else True  # None: where no terminal is
        self.bar = tqdm(total=total, initial=done, desc=title, dynamic_ncols=True, disable=disable)

    def update(self, done: int, message: str = "") -> None:
        """`done` steps are finished; `message` holds the current numbers."""
        now = time.perf_counter()
        seconds = (now - self.started) / max(done - self.first, 1) * (self.total - done + self.later)
        eta = f"eta {datetime.timedelta(seconds=int(seconds))}" if seconds >= 1 else ""
        self.bar.set_postfix_str(f"{message}  {eta}", refresh=False)
        self.bar.update(done - self.done)
        self.done = done
        if self.shown and self.bar.disable and (message or done >= self.total or now - self.said > QUIET_SECONDS):
            self.said = now
            print(f"{self.title}  {done}/{self.total}  {eta}  {message}".rstrip(), flush=True)

    def print(self, message: str) -> None:
        if self.shown:
            tqdm.write(message)  # does not tear the bar
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


class Output:
    """A standard stream whose own trouble (nobody reads the pipe, a full disk, a name it cannot show) fails no run."""

    def __init__(self, stream):
        self._stream = stream
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def run_tool(main: Callable[[argparse.Namespace], dict], args: argparse.Namespace, metrics_file: Path | None) -> None:
    """Run `main(args)`, write its numbers to `metrics_file` and print them as the last line; ranks other than 0
    return {}, which is neither written nor printed. An InputError becomes one line on stderr and exit status 2,
    Ctrl-C exit status 130."""
    sys.stdout, sys.stderr = (s if isinstance(s, Output) else Output(s) for s in (sys.stdout, sys.stderr))
    try:
        if result := main(args):
            if metrics_file is not None:
                write_json(metrics_file, result)
            print(json.dumps(result), flush=True)
    except InputError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)


def check_numbers(args: argparse.Namespace, *, at_least_one="", positive="", not_negative="") -> None:
    """Refuse numbers that make no sense; each argument names flags, apart by blanks; None (not given) passes."""
    if hasattr(args, "save_minutes"):
        at_least_one += " print_freq save_freq max_bad_steps"
        not_negative += " seed num_workers keep_checkpoints save_minutes dist_timeout"
    rules = [(at_least_one, 1, "at least 1"), (positive, math.ulp(0), "positive"), (not_negative, 0, "not negative")]
    for names, least, words in rules:
        for name in names.split():
            value, most = getattr(args, name), AT_MOST.get(name, math.inf)
            if value is not None and not least <= value <= most:
                raise InputError(f"--{name} {value}: must be {words}" + f" and at most {most:,}" * (name in AT_MOST))


def add_teacher_flags(add: Callable) -> None:
    """Which CLIP, and its weights; `add`: add_argument of a parser or group."""
    # fmt: off
    add("--clip_model", default="ViT-L-14",
        help="open_clip name, [hf-hub:]ORG/NAME, folder with open_clip_config.json, or JSON config (default ViT-L-14)")
    add("--clip_pretrained", default="openai",
        help="open_clip tag, or file .pt .bin .safetensors (default openai; a folder's and a hub's own weights)")
    add("--clip_mean", type=float, nargs=3, metavar="M", help="mean of its pixels in [0, 1] (default: its config's)")
    add("--clip_std", type=float, nargs=3, metavar="S", help="their deviation (default likewise)")
    add("--clip_resize", choices=("shortest", "longest", "squash"),
        help="a whole picture for it: the middle, padded, or squeezed (default: as its own preprocessing does)")
    # fmt: on


def add_run_flags(parser: argparse.ArgumentParser, output_dir: str | None, output_help: str = "") -> None:
    """The flags that pre-training and fine-tuning share: where, how fast, how often saved, how to go on."""
    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=output_dir, help=output_help or f"folder of the run (default {output_dir})")
    add("--log_dir", default=None, help="folder for TensorBoard (default: the output folder)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"), help="precision (default auto: by device)")
    add("--compile", action="store_true", help="torch.compile the transformer blocks (default off)")
    add("--grad_checkpoint", action="store_true", help="compute activations twice: less memory, slower (default off)")
    add("--num_workers", default=None, type=int, help="data processes per rank (default: its cores, at most 10)")
    add("--pin_mem", action="store_true", default=True, help="pinned host memory for CUDA (default on)")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="switches it off (default on)")
    add("--seed", default=0, type=int, help="seed of weights, order, augmentation and masks (default 0)")
    add("--print_freq", default=20, type=int, help="updates between log lines (default 20)")
    add("--max_bad_steps", default=10, type=int, help="stop after this many non-finite updates in a row (default 10)")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--resume", default="", help="checkpoint to continue exactly, or auto (default: fresh start)")
    add("--allow_change", nargs="+", default=[], metavar="NAME", help="settings that may differ then (default none)")
    add("--save_freq", default=20, type=int, help="epochs between checkpoint-<epoch>.pth (default 20)")
    add("--save_minutes", default=15.0, type=float, help="minutes between saves of checkpoint-last.pth (default 15)")
    add("--keep_checkpoints", default=3, type=int, help="how many checkpoint-<epoch>.pth stay (default 3)")

    add = parser.add_argument_group("launch (torchrun sets these; accepted and unused)").add_argument
    for name in ("--local_rank", "--local-rank", "--world_size", "--dist_url"):
        add(name, help=argparse.SUPPRESS)
    add("--dist_on_itp", action="store_true", help=argparse.SUPPRESS)
    add("--dist_timeout", default=600.0, type=float, help="seconds to wait for missing or stuck ranks (default 600)")
    # fmt: on
