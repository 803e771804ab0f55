"""Drawn vehicles with masks of their parts: body, tyres and side mirrors, as datasets/seg.py reads them.

    python -m demo.seg --output demo_parts

Sizes are odd, some upright; a vehicle is in one split only; some views show no mirrors.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from PIL import Image

from demo.draw import BACKGROUND, CAR_BODY, CAR_MIRROR, CAR_TYRE, render_parts
from demo.folder import demo_parser, write_set
from demo.vehicle import CAMERAS, VIEWS, demo_rng
from util.cli import run_tool
from util.errors import InputError

SHAPES = ((1.25, 1.0), (1.0, 1.0), (1.0, 1.2), (1.37, 0.93), (0.93, 1.11))  # width and height / size
SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2  # of ten vehicles
CLASSES = {BACKGROUND: "background", CAR_BODY: "Car Body", CAR_TYRE: "Car Tier", CAR_MIRROR: "Car Side Mirror"}


def plan(num_images: int, size: int, seed: int) -> list[dict]:
    """One row a picture: pid, camid, viewid, shot, split, name, path, size (width, height) in px."""
    rows = []
    for number in range(num_images):
        pid, shot = divmod(number, 3)
        rng = demo_rng(seed, "parts", number)
        split = SPLITS[(pid + pid // len(SPLITS)) % len(SPLITS)]
        sides = tuple(max(16, round(side * size)) for side in SHAPES[number % len(SHAPES)])
        row = {"pid": pid, "shot": shot, "split": split, "size": sides, "name": f"{number + 1:05}"}
        row |= {"camid": int(rng.integers(len(CAMERAS))), "viewid": int(rng.permutation(len(VIEWS))[shot])}
        rows.append(row | {"path": f"images/{split}/{row['name']}.jpg"})
    return rows


def _write_pair(row: dict, folder: Path, seed: int) -> None:
    picture, mask = render_parts(seed, row["pid"], row["camid"], row["viewid"], row["shot"], row["size"])
    picture.save(folder / row["path"], quality=90)
    file = folder / "annotations" / row["split"] / f"{row['name']}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(file)


def write_demo_parts(
    output: Path, num_images: int = 600, size: int = 128, seed: int = 0, processes: int | None = None
) -> dict:
    """Write images/, annotations/ and classes.json. -> train, val and test (numbers of images), and written."""
    if num_images < 30 or size < 32:
        raise InputError(f"num_images must be 30 or more and size 32 or more, got {num_images} and {size}")
    rows = plan(num_images, size, seed)
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "test")}
    settings = {"num_images": num_images, "size": size, "seed": seed}

    def finish(folder: Path) -> None:
        (folder / "classes.json").write_text(json.dumps({"classes": CLASSES, "ignore": 255}, indent=1) + "\n")

    draw = partial(_write_pair, seed=seed)
    return {**counts, "written": write_set(output, "demo_parts.json", settings, rows, draw, finish, processes)}


def get_args_parser() -> argparse.ArgumentParser:
    parser = demo_parser("seg", __doc__, 128, "side of a picture, about,")
    parser.add_argument("--num_images", type=int, default=600, help="number of pictures (default 600)")
    return parser


def main(args: argparse.Namespace) -> dict:
    return {"output": str(args.output), **write_demo_parts(**vars(args))}


if __name__ == "__main__":
    run_tool(main, get_args_parser().parse_args(), None)
