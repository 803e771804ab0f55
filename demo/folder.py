"""What the drawn sets share: they appear whole or not at all, and an equal one is not drawn again."""

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from util.errors import InputError


def holds_set(output: Path, stamp: str, about: str, what: str) -> bool:
    """Whether `output` already holds this very set: its file `stamp` reads `about`.

    Raises:
        InputError: it holds anything else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if (output / stamp).is_file() and (output / stamp).read_text(encoding="utf-8") == about:
        return True
    raise InputError(f"{output} exists and does not hold this {what}: name another output folder or remove it first.")


def write_folder(
    output: Path,
    rows: Sequence[dict],
    draw: Callable[[dict, Path], None],
    processes: int | None,
    finish: Callable[[Path], None],
) -> None:
    """Draw every row under a temporary name, then rename: `output` appears complete or not at all.

    Args:
        rows: each has a `path` relative to the folder.
        draw: (row, folder) writes the file of one row; it can be pickled.
        processes: number of workers, None: one per core. They change the speed only.
        finish: (folder) writes tables and the stamp after the last file.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        part.chmod(0o755)  # mkdtemp keeps others out; a data folder need not
        for folder in {(part / row["path"]).parent for row in rows}:
            folder.mkdir(parents=True, exist_ok=True)
        jobs = [(draw, row, part) for row in rows]
        processes = min(processes or os.cpu_count() or 1, len(rows))
        if processes > 1:
            # spawned, not forked: the caller may have torch threads running
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                for _ in pool.imap_unordered(_call, jobs, chunksize=16):
                    pass
        else:
            for job in jobs:
                _call(job)
        finish(part)
        part.rename(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _call(job: tuple) -> None:
    draw, row, folder = job
    draw(row, folder)


def write_table(file: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """A CSV table of these columns; other keys of the rows are left out."""
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def demo_parser(name: str, description: str, size: int, size_help: str) -> argparse.ArgumentParser:
    """Parser of `python -m datasets.NAME` with the flags that every drawn set has; they are arguments of the
    function that writes it."""
    parser = argparse.ArgumentParser(
        prog=f"python -m datasets.{name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, default=argparse.SUPPRESS, help="folder to write; no default")
    add("--size", type=int, default=size, help=size_help)
    add("--seed", type=int, default=0, help="seed of every random choice")
    add("--processes", type=int, default=None, help="number of workers, None: one per core")
    return parser


def run_demo(
    parser: argparse.ArgumentParser,
    write: Callable[..., dict],
    draw_sheet: Callable[[argparse.Namespace], Image.Image] | None = None,
) -> None:
    """Parse, call `write` with the flags, print what it counted as one JSON line.

    Args:
        write: returns counts with `written`, False where the folder holds this very set.
        draw_sheet: adds `--sheet`, a contact sheet of what was written.
    """
    if draw_sheet:
        parser.add_argument("--sheet", type=Path, default=None, help="PNG file for a contact sheet, None: no sheet")
    args, start = parser.parse_args(), time.perf_counter()
    try:
        counts = write(**{name: value for name, value in vars(args).items() if name != "sheet"})
    except ValueError as error:
        parser.error(str(error))
    if not counts["written"]:
        print(f"{args.output} already holds this set: left as it is", file=sys.stderr)
    if draw_sheet and args.sheet:
        draw_sheet(args).save(args.sheet)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"output": str(args.output), **counts, "seconds": seconds}))
