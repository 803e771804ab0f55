"""What the drawn sets share: they appear whole or not at all, and an equal one is not drawn again."""

import csv
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from util.cli import Parser
from util.errors import InputError

VERSION = 2  # raise when the pictures change, so that an older folder is not taken for a new one
HELP = {
    "processes": "number of workers (default: one per core)",
    "num_images": "number of pictures", "size": "side of a picture, about the short one where they differ, in px",
    "seed": "seed of every random choice", "val_ratio": "share of the identities held out",
    "train_ids": "vehicles to train on", "test_ids": "other vehicles to test on",
    "images_per_id": "pictures of a vehicle", "mixed": "all bodies and colours in turns, not groups of one look",
}  # fmt: skip


class DrawnSet(NamedTuple):
    """A program that draws a folder of pictures. Settings are the arguments of `plan`; `size` is that of `draw`."""

    stamp: str  # the file that holds the settings
    settings: dict  # with their defaults
    least: dict  # smallest values that make sense
    plan: Callable  # (**settings but size) -> rows, each with `path` and a `split` or `kind` to be counted
    draw: Callable  # (row, folder, seed, size) writes the file of one row
    finish: Callable  # (folder, rows) writes tables after the last file

    def parser(self, name: str, manual: str) -> Parser:
        parser = Parser(name, manual)
        add = parser.add_argument
        add("--output", type=Path, required=True, help="folder to write; one that holds this very set is left as it is")
        add("--processes", type=int, default=None, help=HELP["processes"])
        for flag, default in self.settings.items():
            kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
            add(f"--{flag}", help=f"{HELP[flag]} (default {default})", **kind)
        return parser

    def write(self, output: Path, processes: int | None = None, **given) -> dict:
        """-> output, images, counts (files by split or kind) and written: False where `output` holds this very set."""
        settings = self.settings | given
        for flag, least in self.least.items():
            if settings[flag] < least:
                raise InputError(f"--{flag} {settings[flag]}: must be {least} or more")
        size, seed = settings["size"], settings["seed"]
        rows = self.plan(**{name: value for name, value in settings.items() if name != "size"})
        counts = {"images": len(rows), "counts": dict(Counter(row.get("kind", row["split"]) for row in rows))}
        draw, finish = partial(self.draw, seed=seed, size=size), partial(self.finish, rows=rows)
        written = write_set(output, self.stamp, settings | counts, rows, draw, finish, processes)
        return {"output": str(output), **counts, "written": written}


def write_set(output, stamp: str, settings: dict, rows: Sequence[dict], draw, finish, processes: int | None) -> bool:
    """Draw every row under a temporary name, then rename: `output` appears complete or not at all.

    `draw(row, folder)` writes the file of one row at its `path`, in `processes` workers (None: one per core), and can
    be pickled; `finish(folder)` comes last. -> False where `output` holds this very set, as the file `stamp` says.
    """
    output, about = Path(output).absolute(), json.dumps({**settings, "version": VERSION}, indent=1) + "\n"
    if (output / stamp).is_file() and (output / stamp).read_text(encoding="utf-8") == about:
        return False
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output} exists and does not hold this set: name another output folder or remove it first.")
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        part.chmod(0o755)  # mkdtemp keeps others out; a data folder need not
        for folder in {(part / row["path"]).parent for row in rows}:
            folder.mkdir(parents=True, exist_ok=True)
        jobs, processes = [(row, part) for row in rows], min(processes or os.cpu_count() or 1, len(rows))
        if processes > 1:  # spawned, not forked: the caller may have torch threads running
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                pool.starmap(draw, jobs, chunksize=16)
        else:
            for job in jobs:
                draw(*job)
        finish(part)
        (part / stamp).write_text(about, encoding="utf-8")
        part.rename(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return True


def write_table(file: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """A CSV table of these columns; other keys of the rows are left out."""
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
