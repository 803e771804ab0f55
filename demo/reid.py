"""Drawn vehicles as a re-identification set that lies on disk as VeRi-776 does.

    python -m demo.reid --output VeRi

Vehicles come in groups of four that share body and colour and differ in make, marks and the shade of the paint: colour
alone finds the group, not the vehicle. --mixed takes all bodies and colours in turns instead. The test set does not
change with the number of training identities.
"""

import argparse
import itertools
import shutil
from collections.abc import Iterable
from functools import partial
from operator import itemgetter
from pathlib import Path

from demo.draw import write_picture
from demo.folder import demo_parser, write_set
from demo.vehicle import BODIES, COLOURS, VIEWS, demo_rng, label_row, vehicle
from util.cli import run_tool
from util.errors import InputError

GROUP = 4  # vehicles of one body and colour
MOST = 1200  # identities: whole groups of the 1500 that differ in their marks
CAMERA_NUMBERS = (1, 3, 4, 8, 11, 14, 17, 20)  # VeRi's, with gaps, of the eight demo cameras
VERI_VIEWS = {  # VeRi's view seen from the left and from the right; 0 front, 1 rear, 2 left, 5 right
    "left side": (2, 2), "right side": (5, 5), "front": (0, 0), "rear": (1, 1),
    "front three-quarter": (3, 6), "rear three-quarter": (4, 7),
}  # fmt: skip


def _identities(count: int, seed: int) -> list[int]:
    """The first `count` vehicles in the order of their groups."""
    size = GROUP * len(BODIES) * len(COLOURS)
    pids: list[int] = []
    for start in range(0, count, size):
        groups: dict[tuple, list[int]] = {}
        for pid in range(start, start + size):
            attrs = vehicle(seed, pid)
            groups.setdefault((attrs["body"], attrs["colour"]), []).append(pid)
        pids += itertools.chain(*groups.values())
    return pids[:count]


def plan(train_ids: int, test_ids: int, images_per_id: int, seed: int, mixed: bool = False) -> list[dict]:
    """One row a picture, in the order of the paths.

    Columns: those of `label_row`; path; split (train, query or gallery: of every camera that sees a test vehicle twice,
    one picture is a query); number, the identity as published, none divisible by seven; camera, its number as
    published; view, 0..7 as in VeRi.
    """
    rows: list[dict] = []
    vehicles = train_ids + test_ids
    for place, pid in enumerate(range(vehicles) if mixed else _identities(vehicles, seed)):
        for shot in range(images_per_id):
            row = label_row(seed, pid, shot)
            ids = itemgetter("pid", "camid", "viewid", "shot")(row)
            # the scene opens its stream with the side from which a three-quarter view is taken
            is_right = demo_rng(seed, "shot", *ids).choice((-1, 1)) > 0
            view = VERI_VIEWS[VIEWS[row["viewid"]]][int(is_right)]
            number, camera, index = place + 1 + place // 6, CAMERA_NUMBERS[row["camid"]], shot // 5
            is_query = shot >= max(5, images_per_id - 5)  # cameras come back every five shots
            split = "train" if place >= test_ids else "query" if is_query else "gallery"
            time = int(demo_rng(seed, "clock", pid, row["camid"]).integers(86_400)) + 5 * index
            path = f"image_{'train' if split == 'train' else 'test'}/{number:04}_c{camera:03}_{time:08}_{index}.jpg"
            rows.append({**row, "path": path, "split": split, "number": number, "camera": camera, "view": view})
    return sorted(rows, key=itemgetter("path"))


def write_lines(file: Path, lines: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _write_veri(folder: Path, rows: list[dict]) -> None:
    """image_query/ with copies out of the gallery, which holds its queries, and the views in keypoint_*.txt."""
    (folder / "image_query").mkdir()
    for row in rows:
        if row["split"] == "query":
            shutil.copy(folder / row["path"], folder / "image_query")
    for part in ("train", "test"):
        listed = [row for row in rows if row["path"].startswith(f"image_{part}/")]
        points = (f"VeRi/{row['path']} {'-1 ' * 40}{row['view']}" for row in listed)
        # the last training image has no line, as some have none in the published list
        write_lines(folder / f"keypoint_{part}.txt", itertools.islice(points, len(listed) - (part == "train")))


def write_demo_reid(
    output: Path,
    train_ids: int = 60,
    test_ids: int = 20,
    images_per_id: int = 16,
    size: int = 128,
    seed: int = 0,
    mixed: bool = False,
    processes: int | None = None,
) -> dict:
    """Write the set into a new folder; with six pictures of a vehicle or more, one of its five cameras comes back.

    -> train, query and gallery (numbers of images; VeRi's gallery holds the queries besides), and written.
    """
    if min(train_ids, test_ids) < 5 or train_ids + test_ids > MOST or images_per_id < 6 or size < 16:
        raise InputError(
            f"train_ids and test_ids must be 5 or more each and {MOST} or less together, images_per_id 6 or more and "
            f"size 16 or more, got {train_ids}, {test_ids}, {images_per_id} and {size}"
        )
    rows = plan(train_ids, test_ids, images_per_id, seed, mixed)
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "query", "gallery")}
    settings = {"images_per_id": images_per_id, "size": size, "seed": seed, "mixed": mixed}
    draw, finish = partial(write_picture, seed=seed, size=size), partial(_write_veri, rows=rows)
    written = write_set(output, "demo_reid.json", settings | counts, rows, draw, finish, processes)
    return {**counts, "written": written}


def get_args_parser() -> argparse.ArgumentParser:
    parser = demo_parser("reid", __doc__, 128, "side of a picture")
    add = parser.add_argument
    add("--layout", choices=["veri776"], help="how the set lies on disk (only and default: veri776)")
    add("--train_ids", type=int, default=60, help="vehicles to train on (default 60)")
    add("--test_ids", type=int, default=20, help="other vehicles to test on (default 20)")
    add("--images_per_id", type=int, default=16, help="pictures of a vehicle (default 16)")
    add("--mixed", action="store_true", help="all bodies and colours in turns (default: groups of one look)")
    return parser


def main(args: argparse.Namespace) -> dict:
    flags = {name: value for name, value in vars(args).items() if name != "layout"}
    return {"output": str(args.output), **write_demo_reid(**flags)}


if __name__ == "__main__":
    run_tool(main, get_args_parser().parse_args(), None)
