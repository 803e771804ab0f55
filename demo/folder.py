"""What the drawn sets share: they appear whole or not at all, and an equal one is not drawn again."""

import csv
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from util.cli import Parser
from util.errors import InputError

VERSION = 3  # raise when the pictures change, so that an older folder is not taken for a new one
HELP = {
    "processes": "number of workers (default: one per core)",
    "num_images": "number of pictures", "size": "side of a picture, about the short one where they differ, in px",
    "seed": "seed of every random choice",
    "train_ids": "vehicles to train on", "test_ids": "other vehicles to test on",
    "images_per_id": "pictures of a vehicle",
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
            add(f"--{flag}", type=int, default=default, help=f"{HELP[flag]} (default {default})")
        return parser

    def write(self, output: Path, processes: int | None = None, **given) -> dict:
        """Draw every row under a temporary name, then rename: `output` appears complete or not at all.

        -> output, images, counts (files by split or kind) and written: False where `output` holds this very set.
        """
        settings, output = self.settings | given, Path(output).absolute()
        for flag, least in self.least.items():
            if settings[flag] < least:
                raise InputError(f"--{flag} {settings[flag]}: must be {least} or more")
        rows = self.plan(**{name: value for name, value in settings.items() if name != "size"})
        result = {"images": len(rows), "counts": dict(Counter(row.get("kind", row["split"]) for row in rows))}
        about = json.dumps(settings | result | {"version": VERSION}, indent=1) + "\n"
        result = {"output": str(output), **result, "written": True}
        if (output / self.stamp).is_file() and (output / self.stamp).read_text(encoding="utf-8") == about:
            return result | {"written": False}
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise InputError(f"{output} exists and does not hold this set: name another --output or remove it first")
        output.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            part.chmod(0o755)  # mkdtemp keeps others out; a data folder need not
            for folder in {(part / row["path"]).parent for row in rows}:
                folder.mkdir(parents=True, exist_ok=True)
            jobs = [(row, part, settings["seed"], settings["size"]) for row in rows]
            if (processes := min(processes or os.cpu_count() or 1, len(rows))) > 1:
                # spawned, not forked: the caller may have torch threads running
                with multiprocessing.get_context("spawn").Pool(processes) as pool:
                    pool.starmap(self.draw, jobs, chunksize=16)
            else:
                for job in jobs:
                    self.draw(*job)
            self.finish(part, rows)
            (part / self.stamp).write_text(about, encoding="utf-8")
            part.rename(output)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return result


def write_table(file: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """A CSV table of these columns; other keys of the rows are left out."""
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
