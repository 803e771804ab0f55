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
MACHINE = ("precision", "threads")  # another one changes the last bits of results


class RunFiles:
    """The files of one run in `args.output_dir`. facts: resolved settings as plain values, kept in every checkpoint.
    config: what builds the model again. fixed: names in `facts` that a continuation must share. init_flag: starts a new
    run from weights alone."""

    def __init__(self, args, facts: dict, config: dict, fixed: list[str], init_flag: str):
        self.output_dir, self.saved_at = Path(args.output_dir), time.monotonic()
        self.args, self.config, self.fixed, self.init_flag = facts, config, fixed, init_flag

    def start(self, epoch: int) -> None:
        """Rank 0, before training: args.json, env.json, and log.txt without the epochs that come again."""
        write_json(self.output_dir / "args.json", self.args)
        packages = {"torch": "torch", "timm": "timm", "open_clip": "open_clip_torch", "numpy": "numpy"}
        about = {name: importlib.metadata.version(package) for name, package in packages.items()}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
        about["machine"] = f"{platform.node()}, {os.cpu_count()} cores, {device}"
        write_json(self.output_dir / "env.json", about | {"python": platform.python_version(), "commit": code_commit()})
        kept = "".join(json.dumps(record) + "\n" for record in self._records() if record["epoch"] < epoch)
        write_atomic(self.output_dir / "log.txt", lambda opened: opened.write(kept.encode()))

    def log(self, record: dict) -> None:
        if is_main_process():
            with open(self.output_dir / "log.txt", "a") as opened:
                opened.write(json.dumps(record) + "\n")

    def save(self, run, name: str = LAST) -> str:
        """Write the state of the last update; returns what it is, in words. `epoch` is the last finished one, as in
        MAE, `batches_done` of the next; order, crops and masks follow from (seed, epoch, index)."""
        content = {
            "model": run.bare.state_dict() | run.saved_buffers, "optimizer": run.optimizer.state_dict(),
            "epoch": run.epoch - 1, "scaler": run.scaler.state_dict() if run.scaler else {}, "args": self.args,
            "config": self.config, "batches_done": run.batches_done, "meter": run.meter.sums,
            "seconds": dict(run.seconds),
        }  # fmt: skip
        _refuse_not_finite(content["model"], self.output_dir / name)
        write_torch(self.output_dir / name, content)
        self.saved_at = time.monotonic()
        return f"{self.output_dir / name} (epoch {run.epoch}, batch {run.batches_done}: the last update)"

    def save_epoch(self, run) -> None:
        """Save the epoch that is done: as `LAST`, and as `checkpoint-<epoch>.pth` where it is the last or `save_freq`
        divides it (MAE's rule); of the numbered ones up to it the newest `keep_checkpoints` stay."""
        done = run.epoch - 1
        if done % self.args["save_freq"] == 0 or run.epoch == self.args["epochs"]:
            self.save(run, f"checkpoint-{done}.pth")
            for old in [e for e in _epochs(self.output_dir) if e <= done][self.args["keep_checkpoints"] :]:
                (self.output_dir / f"checkpoint-{old}.pth").unlink()
        self.save(run)

    def resume(self, run, wanted: str, allow_change: list[str]) -> str:
        """Continue from a file, or with "auto" from the newest readable one in `output_dir`; says what was decided."""
        barrier()  # rank 0 holds the folder now: nobody else writes to what is read here
        said, content = [], None
        for file in _checkpoints(self.output_dir) if wanted == "auto" else [Path(wanted)] * bool(wanted):
            try:
                content = read_checkpoint(file)
            except InputError as error:
                said.append(f"skipped: {error}")
                continue
            said.append(self._restore(run, file, content, allow_change))
            break
        if said and content is None:
            raise InputError("; ".join(said) + ": no readable checkpoint is left; remove --resume to start anew")
        fresh = f"no checkpoint in {self.output_dir}" if wanted else "no --resume"
        decision = "; ".join(said) or f"fresh start ({fresh})"
        if not all_ranks_equal((run.epoch, run.batches_done)):
            raise InputError(f"the ranks do not see the same files in --output_dir {self.output_dir}: {decision}")
        return decision

    def _restore(self, run, file: Path, content: dict, allow_change: list[str]) -> str:
        if missing := [key for key in ("optimizer", "epoch", "args", "batches_done", "meter") if key not in content]:
            cure = f"{self.init_flag} {file} starts a new run from these weights"
            raise InputError(f"{file} holds weights without {', '.join(missing)}, so no run can go on from it: {cure}")
        old, new = content["args"], self.args
        if unknown := sorted(set(allow_change) - set(self.fixed)):
            raise InputError(f"--allow_change {' '.join(unknown)}: choose among {', '.join(self.fixed)}")
        changed = [k for k in self.fixed if k in old and k not in allow_change and old[k] != new.get(k)]
        if changed:
            differences = ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in changed)
            cure = f"set them back, or pass --allow_change {' '.join(changed)}"
            raise InputError(f"{file} belongs to a run with other settings ({differences}): {cure}")
        # the optimiser's state is the file's, the settings of its groups are this run's
        groups, saved = run.optimizer.param_groups, content["optimizer"]["param_groups"]
        settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        sizes, theirs = ([len(group["params"]) for group in some] for some in (groups, saved))
        if sizes != theirs or old.get("opt", "adamw") != new.get("opt", "adamw"):
            cure = f"set its flags back (see args.json), or start anew with {self.init_flag} {file}"
            raise InputError(f"the optimiser in {file} is another one or groups its tensors otherwise: {cure}")
        load_weights(run.bare, content["model"], file, needed="all")
        run.take_buffers()
        run.optimizer.load_state_dict(content["optimizer"])
        for group, kept in zip(run.optimizer.param_groups, settings):
            group.update(kept)
        # a scale that stopped the run would stop it again: the cure starts with a new one
        if run.scaler and content["scaler"].get("scale", 0) >= LEAST_SCALE:
            run.scaler.load_state_dict(content["scaler"])
        run.epoch, run.seconds = content["epoch"] + 1, dict(content["seconds"])
        # another batch size or list of images moves the borders of batches: then the epoch starts again
        if all(old.get(k) == new.get(k) for k in ("global_batch", "images_sha")):
            run.batches_done = content["batches_done"]
            run.meter.sums = {name: total.to(run.device) for name, total in content["meter"].items()}
        notes = [f"; {k} was {old[k]} and is {new.get(k)}" for k in MACHINE if old.get(k) not in (None, new.get(k))]
        return f"resuming {file} at epoch {run.epoch}, batch {run.batches_done}{''.join(notes)}"

    def last_record(self) -> dict:
        """The last line of log.txt, {} without one."""
        return next(reversed(self._records()), {})

    def _records(self) -> list[dict]:
        """The records of log.txt, without lines that a full disk or a kill has cut."""
        log, records = self.output_dir / "log.txt", []
        for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                records += [record] if float((record := json.loads(line))["epoch"]) >= 0 else []
        return records

    def export(self, name: str, bare: torch.nn.Module) -> None:
        """`encoder.pth` ({"model": encoder tensors}, for peers) or `model.pth` ({"model", "config"}, to score with)
        and the same tensors with the config in NAME.safetensors."""
        state, content = bare.state_dict(), {"config": self.config}
        if name == "encoder":
            state, content = {k: v.float() for k, v in encoder_state(state).items()}, {}
        state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        _refuse_not_finite(state, self.output_dir / f"{name}.pth")
        write_torch(self.output_dir / f"{name}.pth", {"model": state} | content)
        header = {"format": "pt", "config": json.dumps(self.config)}
        write_safetensors(self.output_dir / f"{name}.safetensors", state, header)


def _refuse_not_finite(state: dict, file: Path) -> None:
    if names := not_finite(state):
        cure = "go on from an earlier checkpoint with a lower learning rate, --clip_grad 1 or --amp none"
        words = f"{len(names)} tensors of the model are not finite, first {names[0]}"
        raise InputError(f"{file} is not written: {words}; {cure}")


def previous_settings(args) -> dict:
    """args.json of the run that `--resume` goes on with ({} without), whose threads are taken again, for equal bits."""
    folder = Path(args.output_dir if args.resume in ("", "auto") else Path(args.resume).parent)
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads((folder / "args.json").read_text()) if args.resume else {}
        if found.get("threads") in range(1, 1024) and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(found["threads"])
        return found
    return {}


def refuse_used_folder(output_dir: str | Path) -> None:
    """Before a run that starts anew: InputError where there are checkpoints, which it would replace."""
    if found := _checkpoints(Path(output_dir)):
        cure = "--resume auto goes on with it, another --output_dir starts a new one"
        raise InputError(f"{output_dir} holds a run ({found[0].name}): {cure}")


def _epochs(folder: Path) -> list[int]:
    """Of checkpoint-<epoch>.pth in the folder, newest first."""
    names = (re.fullmatch("checkpoint-([0-9]+)[.]pth", file.name) for file in folder.glob("checkpoint-*.pth"))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    """checkpoint-last.pth and checkpoint-<epoch>.pth in the folder, newest first."""
    files = [folder / LAST, *(folder / f"checkpoint-{epoch}.pth" for epoch in _epochs(folder))]
    return [file for file in files if file.is_file()]


def code_commit(folder: Path | None = None) -> str:
    """The git commit of the code in `folder` (default: this code), " + changes" where tracked files differ; in an
    archive made by git, the commit that it is of; else "unknown"."""
    folder = folder or Path(__file__).resolve().parent.parent
    words = ["git", "-C", folder, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty= + changes"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        if (folder / ".git").exists() and done.returncode == 0:
            return done.stdout.strip()
        written = (folder / "util" / "commit.txt").read_text().strip()  # filled in by git archive
        return written if len(written) == 40 else "unknown"
    return "unknown"
