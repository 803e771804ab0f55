"""Drawn vehicles as a re-identification set that lies on disk as VeRi-776 does; its test set does not change with the
number of training identities: python -m demo.reid --output VeRi
"""

import shutil
from pathlib import Path

from demo.draw import label_row, render
from demo.pool import SEED, SIZE, DrawnSet
from demo.scene import CAMERAS, demo_rng
from util.cli import Parser, run_tool
from util.errors import InputError

CAMERA_NUMBERS = (1, 3, 4, 8, 11, 14, 17, 20)  # VeRi's, with gaps, of the eight demo cameras


def plan(train_ids: int, test_ids: int, images_per_id: int, seed: int) -> list[dict]:
    """One row a picture, in the order of the paths: `label_row`, path, split (of every camera that sees a test vehicle
    twice, one picture is a query), number and camera as published; no number is divisible by seven."""
    if train_ids + test_ids > 1500:  # so many differ in their marks
        raise InputError(f"--train_ids {train_ids} and --test_ids {test_ids}: must be 1500 or less together")
    rows = []
    for pid, shot in (divmod(k, images_per_id) for k in range((train_ids + test_ids) * images_per_id)):
        row = label_row(seed, pid, shot)
        row["number"], row["camera"] = pid + 1 + pid // 6, CAMERA_NUMBERS[row["camid"]]
        is_query = shot >= max(5, images_per_id - 5)  # cameras come back every five shots
        row["split"] = "train" if pid >= test_ids else "query" if is_query else "gallery"
        time = int(demo_rng(seed, "clock", pid, row["camid"]).integers(86_400)) + 5 * (shot // 5)
        folder = "image_train" if row["split"] == "train" else "image_test"
        row["path"] = f"{folder}/{row['number']:04}_c{row['camera']:03}_{time:08}_{shot // 5}.jpg"
        rows.append(row)
    return sorted(rows, key=lambda row: row["path"])


def _write_picture(row: dict, folder: Path, seed: int, size: int) -> None:
    picture = render(seed, row["pid"], row["camid"], row["viewid"], row["shot"], size)
    picture.save(folder / row["path"], quality=CAMERAS[row["camid"]].quality)


def _copy_queries(folder: Path, rows: list[dict]) -> None:
    """image_query/ has copies out of the gallery, which holds its queries, as the published one does."""
    (folder / "image_query").mkdir()
    for row in rows:
        if row["split"] == "query":
            shutil.copy(folder / row["path"], folder / "image_query")


FLAGS = {"train_ids": (60, 5, "vehicles to train on"), "test_ids": (20, 5, "other vehicles to test on")}
FLAGS |= {"images_per_id": (16, 6, "pictures of a vehicle")}  # with six, one of its five cameras comes back
FLAGS |= {"size": (128, 16, SIZE), "seed": (0, 0, SEED)}
VERI = DrawnSet("demo_reid.json", FLAGS, plan, _write_picture, _copy_queries)


def get_args_parser() -> Parser:
    return VERI.parser("demo.reid", __doc__)


if __name__ == "__main__":
    run_tool(lambda args: VERI.write(**vars(args)), get_args_parser().parse_args(), None)
