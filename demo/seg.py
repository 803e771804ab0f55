"""Drawn vehicles with masks of their parts: body, tyres and side mirrors, as datasets/seg.py reads them.

    python -m demo.seg --output demo_parts

Sizes are odd, some upright; a vehicle is in one split only; some views show no mirrors.
"""

import json
from pathlib import Path

from PIL import Image

from demo.draw import BACKGROUND, CAR_BODY, CAR_MIRROR, CAR_TYRE, draw_vehicle
from demo.pool import SEED, SIZE, DrawnSet
from demo.scene import CAMERAS, VIEWS, demo_rng
from util.cli import Parser, run_tool

SHAPES = ((1.25, 1.0), (1.0, 1.0), (1.0, 1.2), (1.37, 0.93), (0.93, 1.11))  # width and height / size
SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2  # of ten vehicles
CLASSES = {BACKGROUND: "background", CAR_BODY: "Car Body", CAR_TYRE: "Car Tier", CAR_MIRROR: "Car Side Mirror"}


def plan(num_images: int, seed: int) -> list[dict]:
    """One row a picture; shape: width and height in units of the size."""
    rows = []
    for number in range(num_images):
        (pid, shot), rng = divmod(number, 3), demo_rng(seed, "parts", number)
        camid, viewid = int(rng.integers(len(CAMERAS))), int(rng.permutation(len(VIEWS))[shot])
        row = {"pid": pid, "camid": camid, "viewid": viewid, "shot": shot, "shape": SHAPES[number % len(SHAPES)]}
        split = SPLITS[(pid + pid // len(SPLITS)) % len(SPLITS)]
        rows.append(row | {"split": split, "path": f"images/{split}/{number + 1:05}.jpg"})
    return rows


def _write_pair(row: dict, folder: Path, seed: int, size: int) -> None:
    sides, ids = (max(16, round(side * size)) for side in row["shape"]), ("pid", "camid", "viewid", "shot")
    p = draw_vehicle(seed, *(row[key] for key in ids), tuple(sides), with_mask=True)
    p.record().save(folder / row["path"], quality=90)
    file = (folder / row["path"].replace("images", "annotations")).with_suffix(".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(p.part_ids()).save(file)


FLAGS = {"num_images": (600, 30, "number of pictures"), "size": (128, 32, SIZE), "seed": (0, 0, SEED)}
CONTENT = json.dumps({"classes": CLASSES, "ignore": 255}, indent=1) + "\n"
PARTS = DrawnSet("demo_parts.json", FLAGS, plan, _write_pair, lambda at, _: (at / "classes.json").write_text(CONTENT))


def get_args_parser() -> Parser:
    return PARTS.parser("demo.seg", __doc__)


if __name__ == "__main__":
    run_tool(lambda args: PARTS.write(**vars(args)), get_args_parser().parse_args(), None)
