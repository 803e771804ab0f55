"""What the drawn sets share: they appear whole or not at all, and an equal one is not drawn again."""

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from util.cli import Parser
from util.errors import InputError

VERSION = 2  # raise when the pictures change, so that an older folder is not taken for a new one


def write_set(
    output: Path,
    stamp: str,
    settings: dict,
    rows: Sequence[dict],
    draw: Callable[[dict, Path], None],
    finish: Callable[[Path], None],
    processes: int | None,
) -> bool:
    """Draw every row under a temporary name, then rename: `output` appears complete or not at all.

    Args:
        stamp: name of the file that holds the settings.
        draw: (row, folder) writes the file of one row, at its `path`; it can be pickled.
        finish: (folder) writes tables after the last file.
        processes: number of workers, None: one per core. They change the speed only.
    Returns:
        False where `output` already holds this very set.
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
        if processes > 1:
            # spawned, not forked: the caller may have torch threads running
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


def demo_parser(name: str, manual: str, size: int, size_help: str) -> argparse.ArgumentParser:
    """Parser of `python -m demo.NAME` with the flags of every drawn set: arguments of the function that writes it."""
    parser = Parser(f"demo.{name}", manual)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write; one that holds this very set is left as it is")
    add("--size", type=int, default=size, help=f"{size_help} in px (default {size})")
    add("--seed", type=int, default=0, help="seed of every random choice (default 0)")
    add("--processes", type=int, default=None, help="number of workers (default: one per core)")
    return parser
