"""The files of a training run: saving, finding and continuing it, exporting its weights."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from util.checkpoint import encoder_state, load_weights, not_finite, read_checkpoint, write_safetensors, write_torch
from util.dist import all_ranks_equal, barrier, is_main_process
from util.errors import InputError
from util.files import write_atomic, write_json
from util.precision import LEAST_SCALE

LAST = "checkpoint-last.pth"
MACHINE = ("precision", "threads")  # other bits where they change


class RunFiles:
    """The files of one run in `args.output_dir`.

    facts: resolved settings as plain values, kept in every checkpoint. config: what builds the model again.
    fixed: names in `facts` that a continuation must share. init_flag: starts a new run from weights alone.
    """

    def __init__(self, args, facts: dict, config: dict, fixed: list[str], init_flag: str):
        self.output_dir = Path(args.output_dir)
        self.args, self.config, self.fixed, self.init_flag = facts, config, fixed, init_flag
        self.save_seconds, self.keep = 60 * args.save_minutes, args.keep_checkpoints
        self.saved_at = time.monotonic()

    def start(self, epoch: int) -> None:
        """Rank 0, before training: args.json, env.json, and log.txt without the epochs that come again."""
        write_json(self.output_dir / "args.json", self.args)
        write_json(self.output_dir / "env.json", environment())
        lines = self._log_lines()
        if lines and max(map(_epoch_of, lines)) >= epoch:
            kept = "".join(f"{line}\n" for line in lines if _epoch_of(line) < epoch)
            write_atomic(self.output_dir / "log.txt", lambda opened: opened.write(kept.encode()))

    def log(self, record: dict) -> None:
        """Append a line to log.txt on rank 0."""
        if is_main_process():
            with open(self.output_dir / "log.txt", "a") as opened:
                opened.write(json.dumps(record) + "\n")

    def save(self, run, name: str = LAST) -> str:
        """Write the state of the last update, whole or not at all; returns what it is, in words.

        `epoch` is the last finished epoch, as in MAE; `batches_done` counts global micro-batches of the next one.
        Nothing random is kept: order, crops and masks follow from (seed, epoch, index).
        """
        content = {
            "model": run.bare.state_dict() | run.buffers.saved,
            "optimizer": run.optimizer.state_dict(),
            "epoch": run.epoch - 1,
            "scaler": run.scaler.state_dict() if run.scaler else {},
            "args": self.args,
            "config": self.config,
            "batches_done": run.batches_done,
            "meter": run.meter.sums,
            "seconds": dict(run.seconds),
        }
        _refuse_not_finite(content["model"], self.output_dir / name)
        write_torch(self.output_dir / name, content)
        self.saved_at = time.monotonic()
        return f"{self.output_dir / name} (epoch {run.epoch}, batch {run.batches_done}: the last update)"

    def save_if_due(self, run) -> None:
        if is_main_process() and time.monotonic() - self.saved_at >= self.save_seconds:
            self.save(run)

    def save_epoch(self, run) -> None:
        """`checkpoint-<finished epoch>.pth`; of those up to it, the oldest beyond `keep` go."""
        self.save(run, f"checkpoint-{run.epoch - 1}.pth")
        epochs = [file for file in _checkpoints(self.output_dir) if file.name != LAST]
        for file in [file for file in epochs if _epoch_number(file) < run.epoch][self.keep :]:
            file.unlink()

    def resume(self, run, wanted: str, allow_change: list[str]) -> str:
        """Continue from a file, or with "auto" from the newest readable one in `output_dir`; says what was decided."""
        barrier()  # rank 0 holds the folder now: nobody else writes to what is read here
        decision = self._decide(run, wanted, allow_change)
        if not all_ranks_equal((run.epoch, run.batches_done)):
            raise InputError(f"the ranks do not see the same files in --output_dir {self.output_dir}: {decision}")
        return decision

    def _decide(self, run, wanted: str, allow_change: list[str]) -> str:
        if not wanted:
            return "fresh start (no --resume)"
        skipped = []
        for file in _checkpoints(self.output_dir) if wanted == "auto" else [Path(wanted)]:
            try:
                content = read_checkpoint(file)
            except InputError as error:
                skipped.append(f"skipped: {error}")
                continue
            return "; ".join([*skipped, self._restore(run, file, content, allow_change)])
        if skipped:
            raise InputError("; ".join(skipped) + ": no readable checkpoint is left; remove --resume to start anew")
        return f"fresh start (--resume auto found no checkpoint in {self.output_dir})"

    def _restore(self, run, file: Path, content: dict, allow_change: list[str]) -> str:
        if missing := [key for key in ("optimizer", "epoch", "args", "batches_done", "meter") if key not in content]:
            raise InputError(
                f"{file} holds weights without {', '.join(missing)}, so a run cannot continue from it: use "
                f"{self.init_flag} {file} to start a new run from these weights"
            )
        old, new = content["args"], self.args
        if unknown := sorted(set(allow_change) - set(self.fixed)):
            raise InputError(f"--allow_change {' '.join(unknown)}: choose among {', '.join(self.fixed)}")
        changed = [k for k in self.fixed if k in old and k not in allow_change and old[k] != new.get(k)]
        if changed:
            differences = ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in changed)
            raise InputError(
                f"{file} belongs to a run with other settings ({differences}): set them back, or pass "
                f"--allow_change {' '.join(changed)}"
            )
        load_weights(run.bare, content["model"], file, needed="all")
        run.buffers.take()
        self._restore_optimizer(run.optimizer, content, file)
        # a scale that stopped the run would stop it again: the cure starts with a new one
        if run.scaler and content["scaler"].get("scale", 0) >= LEAST_SCALE:
            run.scaler.load_state_dict(content["scaler"])
        run.epoch, run.seconds = content["epoch"] + 1, dict(content["seconds"])
        # a changed batch or list of images moves the batch borders: then the epoch starts again
        same_batches = all(old.get(k) == new.get(k) for k in ("global_batch", "images_sha"))
        run.batches_done = content["batches_done"] if same_batches else 0
        if same_batches:
            run.meter.sums = {name: total.to(run.device) for name, total in content["meter"].items()}
        notes = [f"; {k} was {old[k]} and is {new.get(k)}" for k in MACHINE if old.get(k) not in (None, new.get(k))]
        return f"resuming {file} at epoch {run.epoch}, batch {run.batches_done}{''.join(notes)}"

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, content: dict, file: Path) -> None:
        """Its state; the settings of its groups are this run's, not the file's."""
        groups, saved = optimizer.param_groups, content["optimizer"]["param_groups"]
        settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        own, theirs = ([len(group["params"]) for group in some] for some in (groups, saved))
        if own != theirs or content["args"].get("opt") != self.args.get("opt"):
            raise InputError(
                f"the optimiser in {file} is another one or has its tensors in other groups: set the flags back that "
                f"choose and group them (see args.json), or start anew with {self.init_flag} {file}"
            )
        optimizer.load_state_dict(content["optimizer"])
        for group, kept in zip(optimizer.param_groups, settings):
            group.update(kept)

    def last_record(self) -> dict:
        """The last line of log.txt, {} without one."""
        lines = self._log_lines()
        return json.loads(lines[-1]) if lines and _epoch_of(lines[-1]) < float("inf") else {}

    def _log_lines(self) -> list[str]:
        log = self.output_dir / "log.txt"
        return log.read_text(errors="replace").splitlines() if log.is_file() else []

    def export_encoder(self, bare: torch.nn.Module) -> None:
        """`encoder.pth` ({"model": encoder tensors}, what peers load) and `encoder.safetensors` with its config."""
        state = {k: v.detach().float().cpu().contiguous() for k, v in encoder_state(bare.state_dict()).items()}
        self._export("encoder", {"model": state}, state)

    def export_model(self, bare: torch.nn.Module) -> None:
        """`model.pth` ({"model", "config"}) and `model.safetensors`: to score and search with."""
        state = {k: v.detach().cpu().contiguous() for k, v in bare.state_dict().items()}
        self._export("model", {"model": state, "config": self.config}, state)

    def _export(self, name: str, content: dict, state: dict) -> None:
        _refuse_not_finite(state, self.output_dir / f"{name}.pth")
        write_torch(self.output_dir / f"{name}.pth", content)
        header = {"format": "pt", "config": json.dumps(self.config)}
        write_safetensors(self.output_dir / f"{name}.safetensors", state, header)


def _refuse_not_finite(state: dict, file: Path) -> None:
    if names := not_finite(state):
        raise InputError(
            f"{file} is not written: {len(names)} tensors of the model are not finite, first {names[0]}; go on from an "
            "earlier checkpoint with a lower learning rate, --clip_grad 1 or --amp none"
        )


def previous_settings(args) -> dict:
    """args.json of the run that `--resume` goes on with ({} without), whose number of threads is taken again: another
    would change last bits."""
    output_dir, resume = args.output_dir, args.resume
    folder = Path(output_dir if resume in ("", "auto") else Path(resume).parent)
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads((folder / "args.json").read_text()) if resume else {}
        if found.get("threads") in range(1, 1024) and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(found["threads"])
        return found
    return {}


def initialise_from(bare: torch.nn.Module, file: str) -> str:
    """`--init`: weights of ours or facebook's MAE, full or encoder only; returns what matched."""
    return load_weights(bare, read_checkpoint(file)["model"], file, needed="encoder")


def refuse_used_folder(output_dir: str | Path) -> None:
    """Before a run that starts anew: InputError where there are checkpoints, which it would replace."""
    if found := _checkpoints(Path(output_dir)):
        raise InputError(
            f"{output_dir} holds a run ({found[0].name}): --resume auto goes on with it, another --output_dir starts a "
            "new one"
        )


def _checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-last.pth and checkpoint-<epoch>.pth in the folder, newest first."""
    numbered = [f for f in output_dir.glob("checkpoint-*.pth") if re.fullmatch("checkpoint-[0-9]+[.]pth", f.name)]
    last = [file for file in [output_dir / LAST] if file.is_file()]
    return last + sorted(numbered, key=_epoch_number, reverse=True)


def _epoch_number(file: Path) -> int:
    """Of checkpoint-<epoch>.pth."""
    return int(file.stem.split("-")[1])


def _epoch_of(line: str) -> float:
    """Of a line of log.txt; infinity where the line was cut by a full disk or a kill, or is not ours."""
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


def environment() -> dict[str, str]:
    """Versions, machine and commit, kept beside the log."""
    packages = {"torch": "torch", "timm": "timm", "open_clip": "open_clip_torch", "numpy": "numpy"}
    versions = {name: importlib.metadata.version(package) for name, package in packages.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    machine = f"{platform.node()}, {os.cpu_count()} cores, {device}"
    return {"python": platform.python_version(), **versions, "machine": machine, "commit": code_commit()}


def code_commit(folder: Path | None = None) -> str:
    """The git commit of the code in `folder` (default: this code), " + changes" where tracked files differ; in an
    archive made by git, the commit that it is of; else "unknown"."""
    folder = folder or Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if (folder / ".git").exists() and (commit := git("rev-parse", "HEAD")):
            return commit + (" + changes" if git("status", "--porcelain", "--untracked-files=no") else "")
        written = (folder / "util" / "commit.txt").read_text().strip()  # filled in by git archive
        return written if len(written) == 40 else "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
