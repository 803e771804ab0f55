"""A drawn pool with every fault of a crawl, and the truth about each file, to try curation on.

    python -m demo.pool --output pool --num_images 4000

writes

    photos/          the pool: vehicles with a long tail over (body, colour), copies, tracks, rubbish
    truth.csv        path, kind, of, body, colour, make, pid, camid, how; `of` is the original
    labels.csv       the columns of the demo set, for good vehicle pictures and their copies
    captions.csv     path, split and captions of the same and of the pictures without a vehicle
    prompts.json     their short captions as prompts for --vehicle_prompts, vehicles and others apart
    benchmark/       the test split of another set, with labels.csv: some of it has leaked into photos/
    pool.json        the settings and the number of files of each kind

Kinds are listed in `demo_plan.SHARES`; names do not tell them apart, but for tracks, each a folder of
its own. The vehicles of benchmark/ have no other pictures, and their leaked copies are in neither
labels.csv nor captions.csv: a CLIP trained on these has not seen them. Every file depends on its row of
the plan alone.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path

from demo.draw import COLUMNS
from demo.flaws import file_bytes
from demo.folder import demo_parser, holds_set, run_demo, write_folder, write_table
from demo.plan import GOOD, plan
from demo.sheet import pool_sheet
from util.errors import InputError

VERSION = 2  # raise when the files change, so that an older folder is not taken for this one
TRUTH = ("path", "kind", "of", "body", "colour", "make", "pid", "camid", "how")
CAPTIONS = ("path", "split", "caption", "short_caption")


def truth_row(row: dict) -> dict:
    """The columns of truth.csv; what shows no vehicle has no attributes."""
    blank = dict.fromkeys(TRUTH, "")
    known = TRUTH if row["kind"] not in ("corrupt", "non_vehicle") else ("path", "kind", "how")
    return blank | {key: row[key] for key in known}


def _write_file(row: dict, folder: Path, seed: int, size: int) -> None:
    (folder / row["path"]).write_bytes(file_bytes(row, seed, size))


def write_pool(
    output: Path, num_images: int = 4000, size: int = 96, seed: int = 0, processes: int | None = None
) -> dict:
    """Write the pool into a new folder; one that already holds this very pool is left as it is.

    Args:
        num_images: files in photos/, 100 or more, readable or not; benchmark/ has 3.75% more.
        size: short side of a good picture in px, 32 or more.
        processes: number of workers, None: one per core. They change the speed only.
    Returns:
        images, benchmark, identities (in photos/), counts (files by kind) and written.
    Raises:
        InputError: a number out of range, or an `output` that holds something else.
    """
    output = Path(output).absolute()
    if num_images < 100 or size < 32:
        raise InputError(f"num_images must be 100 or more and size 32 or more, got {num_images} and {size}")
    rows, test = plan(num_images, seed)
    counts = {
        "images": len(rows),
        "benchmark": len(test),
        "identities": len({row["pid"] for row in rows if row["kind"] in GOOD}),
        "counts": dict(Counter(row["kind"] for row in rows)),
    }
    about = json.dumps({"size": size, "seed": seed, "version": VERSION, **counts}, indent=1) + "\n"
    if holds_set(output, "pool.json", about, "pool"):
        return {**counts, "written": False}

    def finish(folder: Path) -> None:
        good = [row for row in rows if row["kind"] in GOOD]
        others = [row for row in rows if row["kind"] == "non_vehicle"]
        write_table(folder / "truth.csv", TRUTH, map(truth_row, rows))
        write_table(folder / "labels.csv", COLUMNS, good)
        write_table(folder / "captions.csv", CAPTIONS, good + others)
        prompts = {
            "vehicle": sorted({row["short_caption"] for row in good}),
            "other": sorted({row["short_caption"] for row in others}),
        }
        (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
        inside = ({**row, "path": row["path"].removeprefix("benchmark/")} for row in test)
        write_table(folder / "benchmark" / "labels.csv", COLUMNS, inside)
        (folder / "pool.json").write_text(about, encoding="utf-8")

    write_folder(output, rows + test, partial(_write_file, seed=seed, size=size), processes, finish)
    return {**counts, "written": True}


def main():
    parser = demo_parser(
        "demo_pool",
        "Write a drawn pool of vehicle pictures with known faults.",
        96,
        "short side of a good picture in pixels",
    )
    add = parser.add_argument
    add("--num_images", type=int, default=4000, help="number of files in photos/")
    run_demo(parser, write_pool, lambda args: pool_sheet(args.output, args.size))


if __name__ == "__main__":
    main()
