"""Drawn vehicles with masks of their parts: body, tyres and side mirrors, as datasets/seg.py reads them.

    python -m demo.seg --output demo_parts

Sizes are odd, some upright; a vehicle is in one split only; some views show no mirrors.
"""

import json
from pathlib import Path

from PIL import Image

from demo.draw import BACKGROUND, CAR_BODY, CAR_MIRROR, CAR_TYRE, render_parts
from demo.folder import DrawnSet
from demo.vehicle import CAMERAS, VIEWS, demo_rng
from util.cli import Parser, run_tool

SHAPES = ((1.25, 1.0), (1.0, 1.0), (1.0, 1.2), (1.37, 0.93), (0.93, 1.11))  # width and height / size
SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2  # of ten vehicles
CLASSES = {BACKGROUND: "background", CAR_BODY: "Car Body", CAR_TYRE: "Car Tier", CAR_MIRROR: "Car Side Mirror"}


def plan(num_images: int, seed: int) -> list[dict]:
    """One row a picture: pid, camid, viewid, shot, split, path, shape (width and height in units of the size)."""
    rows = []
    for number in range(num_images):
        (pid, shot), rng = divmod(number, 3), demo_rng(seed, "parts", number)
        row = {"pid": pid, "shot": shot, "split": SPLITS[(pid + pid // len(SPLITS)) % len(SPLITS)]}
        row |= {"camid": int(rng.integers(len(CAMERAS))), "viewid": int(rng.permutation(len(VIEWS))[shot])}
        path = f"images/{row['split']}/{number + 1:05}.jpg"
        rows.append(row | {"path": path, "shape": SHAPES[number % len(SHAPES)]})
    return rows


def _write_pair(row: dict, folder: Path, seed: int, size: int) -> None:
    sides = tuple(max(16, round(side * size)) for side in row["shape"])
    picture, mask = render_parts(seed, row["pid"], row["camid"], row["viewid"], row["shot"], sides)
    picture.save(folder / row["path"], quality=90)
    file = (folder / row["path"].replace("images", "annotations")).with_suffix(".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(file)


def _write_classes(folder: Path, rows: list[dict]) -> None:
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES, "ignore": 255}, indent=1) + "\n")


SETTINGS, LEAST = {"num_images": 600, "size": 128, "seed": 0}, {"num_images": 30, "size": 32}
PARTS = DrawnSet("demo_parts.json", SETTINGS, LEAST, plan, _write_pair, _write_classes)


def get_args_parser() -> Parser:
    return PARTS.parser("demo.seg", __doc__)


if __name__ == "__main__":
    run_tool(lambda args: PARTS.write(**vars(args)), get_args_parser().parse_args(), None)
