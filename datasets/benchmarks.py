"""Test splits of known vehicle benchmarks, recognised by name: none of them may enter a pool.

    python -m datasets.benchmarks --name VehicleID --root VehicleID_V1.0 --split train --output train.txt

turns the lists of a benchmark whose splits share one folder into a manifest of paths (--split test for --exclude,
--split train for --pool). Copies under other names need a comparison of contents. The facts and their doubts stand in
benchmarks.json: name -> folders, lists, image, test_images (None: unknown), licence, note.
"""

import argparse
import json
import os
import re
from functools import cache
from pathlib import Path

from util.cli import Parser, run_tool
from util.errors import InputError
from util.files import write_atomic


@cache
def load_benchmarks() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("benchmarks.json").read_text(encoding="utf-8"))


@cache
def _pattern() -> tuple[re.Pattern[bytes], list[str]]:
    """One alternation for lower-case paths, and the benchmark of each of its groups; `*`: anything but a slash."""
    folders = {name: facts["folders"] for name, facts in load_benchmarks().items() if facts["folders"]}
    groups = ("|".join(re.escape(folder.lower()) for folder in names) for names in folders.values())
    pattern = "|".join(f"({group})" for group in groups).replace(r"\*", "[^/]*")
    return re.compile(f"/(?:{pattern})".encode()), list(folders)


def benchmark_of(path: str | Path) -> str | None:
    """The benchmark whose test, query, gallery or validation split a path lies in, or None. Whole folder names decide,
    upper and lower case alike; either slash parts them."""
    pattern, names = _pattern()
    found = pattern.search(b"/" + os.fsencode(path).replace(b"\\", b"/").lower())
    return names[found.lastindex - 1] if found else None


def read_split(name: str, root: Path, split: str = "test") -> list[str]:
    """Image paths relative to `root` that the lists of a benchmark name, each once, in their order: lists anywhere
    below `root`, whose first column names the image. split: "test" (query, gallery and test together) or "train"."""
    facts = load_benchmarks()[name]
    if split not in facts["image"]:
        raise InputError(f"{name} has no {split} list")
    files = [file for wanted in facts["lists"][split] for file in sorted(root.rglob(wanted))]
    if not files:
        raise InputError(f"no {split} list of {name} below {root}: looked for {', '.join(facts['lists'][split])}")
    image, ending = facts["image"][split], Path(facts["image"][split]).suffix
    seen: dict[str, None] = {}
    for file in files:
        names = [line.split()[0] for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not names:
            raise InputError(f"{file} is empty: unpack the benchmark again")
        seen |= dict.fromkeys(image.format(name.removesuffix(ending)) for name in names)
    return list(seen)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("datasets.benchmarks", __doc__)
    add = parser.add_argument
    add("--name", required=True, choices=load_benchmarks(), help="benchmark whose lists become a manifest")
    add("--root", required=True, type=Path, help="folder of that benchmark")
    add("--split", choices=("test", "train"), default="test", help="which lists (default test)")
    add("--output", required=True, type=Path, help="manifest .txt to write, absolute paths")
    return parser


def main(args: argparse.Namespace) -> dict:
    lines = [f"{args.root.absolute() / path}\n" for path in read_split(args.name, args.root.absolute(), args.split)]
    write_atomic(args.output, lambda opened: opened.write("".join(lines).encode()))
    return {"name": args.name, "split": args.split, "images": len(lines)}


if __name__ == "__main__":
    run_tool(main, get_args_parser().parse_args(), None)
