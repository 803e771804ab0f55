"""Drawn vehicles as a re-identification set in a published layout, to run re-ID without gated data.

    python -m demo.reid --output VeRi --layout veri776

Layouts: veri776, vehicleid, veriwild (lists in three styles) and table, each with the quirks of the published
set that a reader trips over; `datasets.reid` reads all of them. One seed gives the same vehicles, numbers and
pictures in every layout. Vehicles come in groups of four that share body and colour and differ in make, marks
and the shade of the paint: colour alone finds the group, not the vehicle. --mixed takes all bodies and
colours in turns instead, which is what attributes need. The test set does not change with the number of
training identities.
"""

import argparse
import itertools
import json
import shutil
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path

from demo import draw as demo
from demo.folder import demo_parser, holds_set, run_demo, write_folder, write_table
from demo.render import render
from demo.vehicle import BODIES, CAMERAS, COLOURS, MAKES, VIEWS, demo_rng, vehicle
from util.errors import InputError

VERSION = 1  # raise when the files change, so that an older folder is not taken for this one
STYLES = ("old", "old_headless", "new")
GROUP = 4  # vehicles of one body and colour
MOST = 1200  # identities: whole groups of the 1500 that differ in their marks
CAMERA_NUMBERS = {  # of the eight demo cameras; published ones have gaps and end at 20 and 174
    "veri776": (1, 3, 4, 8, 11, 14, 17, 20),
    "veriwild": (2, 9, 23, 45, 61, 99, 120, 174),
}
VERI_VIEWS = {  # VeRi's view seen from the left and from the right; 0 front, 1 rear, 2 left, 5 right
    "left side": (2, 2), "right side": (5, 5), "front": (0, 0), "rear": (1, 1),
    "front three-quarter": (3, 6), "rear three-quarter": (4, 7),
}  # fmt: skip
VERI_COLOURS = ("yellow", "orange", "green", "gray", "red", "blue", "white", "golden", "brown", "black")
VERI_TYPES = ("sedan", "suv", "van", "hatchback", "mpv", "pickup", "bus", "truck", "estate")
# our word -> VeRi's where they differ; VeRi files silver under gray, and nothing drawn is golden
VERI_WORDS = {"grey": "gray", "silver": "gray", "coupe": "sedan", "wagon": "estate", "minivan": "mpv"}
VEHICLEID_COLOURS = ("black", "blue", "grey", "red", "silver", "white", "yellow")
MODELS = [f"{make}_{body}" for make, body in itertools.product(MAKES, BODIES)]


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


def _veri_view(seed: int, row: dict) -> int:
    # `render` opens the stream of a picture with the side from which a three-quarter view is taken
    side = demo_rng(seed, "shot", *itemgetter("pid", "camid", "viewid", "shot")(row)).choice((-1, 1))
    return VERI_VIEWS[VIEWS[row["viewid"]]][int(side > 0)]


def _path(layout: str, row: dict, count: int) -> str:
    """Where the picture lies; `count` numbers the pictures of the set from 1."""
    number, index = row["number"], row["index"]
    if layout == "veri776":
        seen = f"c{row['camera']:03}_{row['second'] + 5 * index:08}_{index}"
        return f"image_{row['split']}/{number:04}_{seen}.jpg"
    if layout == "vehicleid":
        return f"image/{count:07}.jpg"
    if layout == "veriwild":
        return f"images/{number:05}/{count:06}.jpg"
    return f"images/{number:04}_{row['shot']:02}.jpg"


def plan(layout: str, train_ids: int, test_ids: int, images_per_id: int, seed: int, mixed: bool = False) -> list[dict]:
    """One row a picture, in the order of the paths.

    Columns: those of `demo.label_row`; path, its last part name, split (train or test) and is_query; number,
    the identity as published, none divisible by seven; camera, its number as published; view, 0..7 as in
    VeRi; second, when the vehicle comes to the camera, and index, which of its pictures there this is.
    Every fifth training identity of VERI-Wild has one picture, every fourth test identity of VehicleID two.
    """
    rows: list[dict] = []
    cameras = CAMERA_NUMBERS.get(layout, range(len(CAMERAS)))
    vehicles = train_ids + test_ids
    for place, pid in enumerate(range(vehicles) if mixed else _identities(vehicles, seed)):
        split, count = "test" if place < test_ids else "train", images_per_id
        if (layout, split) == ("veriwild", "train") and place % 5 == 4:
            count = 1
        elif (layout, split) == ("vehicleid", "test") and place % 4 == 3:
            count = 2
        for shot in range(count):
            row = demo.label_row(seed, pid, shot)
            row |= {"split": split, "number": place + 1 + place // 6, "camera": cameras[row["camid"]]}
            row |= {"view": _veri_view(seed, row), "index": shot // 5}
            row["second"] = int(demo_rng(seed, "clock", pid, row["camid"]).integers(86_400))
            # one of every camera that has two, as cameras come back every five shots; VERI-Wild: one at all
            last = max(5, images_per_id - (1 if layout == "veriwild" else 5))
            path = _path(layout, row, len(rows) + 1)
            row |= {"path": path, "name": path.rsplit("/", 1)[-1]}
            rows.append({**row, "is_query": split == "test" and shot >= last})
    return sorted(rows, key=itemgetter("path"))


def split_rows(layout: str, rows: list[dict]) -> dict[str, list[dict]]:
    """The lists of a set by name: train, then query and gallery or test, with the published size after them.

    VeRi's gallery holds its queries. VERI-Wild's tests are nested; of VehicleID's none holds another.
    """
    test = [row for row in rows if row["split"] == "test"]
    numbers = sorted({row["number"] for row in test})
    half, most = len(numbers) // 2, 3 * len(numbers) // 4

    def seen(chosen: list[int]) -> list[dict]:
        return [row for row in test if row["number"] in chosen]

    lists = {"train": [row for row in rows if row["split"] == "train"]}
    if layout == "vehicleid":
        small, medium, large = [numbers[-1], *numbers[: half - 1]], numbers[-most:], numbers[:-1]
        return lists | {"test_800": seen(small), "test_1600": seen(medium), "test_2400": seen(large)}
    tests = {"": test}
    if layout == "veriwild":
        tests = {"_3000": seen(numbers[:half]), "_5000": seen(numbers[:most]), "_10000": test}
    for size, part in tests.items():
        lists[f"query{size}"] = [row for row in part if row["is_query"]]
        lists[f"gallery{size}"] = [row for row in part if layout == "veri776" or not row["is_query"]]
    return lists


def _write_lines(file: Path, lines: Iterable[str], encoding: str = "utf-8") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding=encoding, newline="\n")


def _write_veri(folder: Path, rows: list[dict], lists: dict[str, list[dict]]) -> None:
    query, gallery = lists["query"], lists["gallery"]
    for part, listed in (("train", lists["train"]), ("test", gallery)):
        _write_lines(folder / f"name_{part}.txt", (row["name"] for row in listed))
        _write_lines(folder / f"{part}_label.xml", _label_lines(part, listed), "gb2312")
        # TransReID drops images that have no line here: the last of train; queries are found by name
        points = (f"VeRi/{row['path']} {'-1 ' * 40}{row['view']}" for row in listed)
        last = len(listed) - 1 if part == "train" else None
        _write_lines(folder / f"keypoint_{part}.txt", itertools.islice(points, last))
    _write_lines(folder / "name_query.txt", (row["name"] for row in query))
    (folder / "image_query").mkdir()
    for row in query:
        shutil.copyfile(folder / row["path"], folder / "image_query" / row["name"])
    _write_indices(folder, query, gallery)
    for kind, words in (("color", VERI_COLOURS), ("type", VERI_TYPES)):
        _write_lines(folder / f"list_{kind}.txt", (f"{i} {word}" for i, word in enumerate(words, 1)))
    tracks: dict[tuple, list[str]] = {}
    for row in gallery:
        tracks.setdefault((row["number"], row["camera"]), []).append(row["name"])
    # a track bears the name of its first image
    _write_lines(folder / "test_track.txt", (" ".join([track[0], *track]) for track in tracks.values()))


def _label_lines(part: str, rows: list[dict]) -> list[str]:
    root = {"train": "TrainingImages", "test": "TestingImages"}[part]
    lines = ['<?xml version="1.0" encoding="gb2312"?>', f'<{root} Version="1.0">']
    lines.append(f'<Items number="{len(rows)}">')
    for row in rows:
        colour, body = (VERI_WORDS.get(row[key], row[key]) for key in ("colour", "body"))
        lines.append(
            f'<Item imageName="{row["name"]}" vehicleID="{row["number"]:04}" cameraID="c{row["camera"]:03}" '
            f'colorID="{VERI_COLOURS.index(colour) + 1}" typeID="{VERI_TYPES.index(body) + 1}"/>'
        )
    return [*lines, "</Items>", f"</{root}>"]


def _write_indices(folder: Path, query: list[dict], gallery: list[dict]) -> None:
    """Line i: places in name_test.txt, from 1, of what counts for query i (seen by another camera) and of
    what is junk (by its own, the query itself among it)."""
    seen: dict[int, list[tuple[int, int]]] = {}
    for place, row in enumerate(gallery, 1):
        seen.setdefault(row["number"], []).append((place, row["camera"]))
    for name, is_junk in (("gt_index.txt", False), ("jk_index.txt", True)):
        lines = []
        for row in query:
            chosen = (at for at, cam in seen[row["number"]] if (cam == row["camera"]) == is_junk)
            lines.append(" ".join(map(str, chosen)))
        _write_lines(folder / name, lines)


def _write_vehicleid(folder: Path, rows: list[dict], lists: dict[str, list[dict]]) -> None:
    """The lists, and attributes of those vehicles whose colour is one of VehicleID's seven: in the published
    set, too, only some have any. Ids of colours and models begin with 0."""
    attribute = folder / "attribute"
    files = {attribute / "img2vid.txt": rows}
    for name, part in lists.items():
        kind, line, size = name.partition("_")
        files[folder / "train_test_split" / f"{kind}_list{line}{size}.txt"] = part
    for file, part in files.items():
        _write_lines(file, (f"{row['name'].removesuffix('.jpg')} {row['number']}" for row in part))
    known = {row["number"]: row for row in rows if row["colour"] in VEHICLEID_COLOURS}
    models = {vid: MODELS.index(f"{row['make']}_{row['body']}") for vid, row in known.items()}
    colours = {vid: VEHICLEID_COLOURS.index(row["colour"]) for vid, row in known.items()}
    for kind, names, ids in (("model", MODELS, models), ("color", VEHICLEID_COLOURS, colours)):
        _write_lines(attribute / f"{kind}_names.txt", (f"{name} {i}" for i, name in enumerate(names)))
        _write_lines(attribute / f"{kind}_attr.txt", (f"{vid} {i}" for vid, i in ids.items()))


def _write_wild(folder: Path, rows: list[dict], lists: dict[str, list[dict]], style: str) -> None:
    """Old: cameras in vehicle_info.txt alone, whose header may be missing. New: also in the lists, where
    training identities count from 0, and test lists hold their queries as well."""
    split, new = folder / "train_test_split", style == "new"
    classes = {number: i for i, number in enumerate(sorted({row["number"] for row in lists["train"]}))}

    def image(row: dict) -> str:
        return row["path"].removeprefix("images/").removesuffix(".jpg")

    def info(row: dict) -> str:
        when = datetime(2018, 3, 1) + timedelta(seconds=30 * row["second"] + row["index"])
        return f"{image(row)};{row['camera']};{when};{row['make']};{row['body']};{row['colour']}"

    def entry(row: dict) -> str:
        pid = classes.get(row["number"], row["number"])
        return image(row) + (f".jpg {pid} {row['camera']}" if new else "")

    header = [] if style == "old_headless" else ["id/image;Camera ID;Time;Model;Type;Color"]
    _write_lines(split / "vehicle_info.txt", [*header, *map(info, rows)])
    _write_lines(split / f"train_list{'_start0' if new else ''}.txt", map(entry, lists["train"]))
    for size in ("3000", "5000", "10000"):
        name = f"test_{size}_id" if new else f"test_{size}"
        query, gallery = lists[f"query_{size}"], lists[f"gallery_{size}"]
        listed = sorted(query + gallery, key=itemgetter("path")) if new else gallery
        _write_lines(split / f"{name}_query.txt", map(entry, query))
        _write_lines(split / f"{name}.txt", map(entry, listed))


def _write_own(folder: Path, rows: list[dict], lists: dict[str, list[dict]]) -> None:
    ours = {"path": "path", "pid": "number", "camid": "camera", "viewid": "view"}
    labels = [
        {**{name: row[key] for name, key in ours.items()}, "split": split}
        for split, part in lists.items()
        for row in part
    ]
    write_table(folder / "labels.csv", (*ours, "split"), labels)


WRITERS = {
    "veri776": _write_veri, "vehicleid": _write_vehicleid, "veriwild": _write_wild, "table": _write_own
}  # fmt: skip


def _write_picture(row: dict, folder: Path, seed: int, size: int) -> None:
    picture = render(seed, row["pid"], row["camid"], row["viewid"], row["shot"], size)
    picture.save(folder / row["path"], quality=CAMERAS[row["camid"]].quality)


def _check(layout: str, style: str | None, train_ids: int, test_ids: int, images_per_id: int, size: int):
    if layout not in WRITERS:
        raise InputError(f"layout '{layout}' is unknown: choose one of {', '.join(WRITERS)}")
    if style is not None and (layout != "veriwild" or style not in STYLES):
        raise InputError(f"layout {layout} has no style '{style}': veriwild has {', '.join(STYLES)}, the others none")
    if min(train_ids, test_ids) < 5 or train_ids + test_ids > MOST or images_per_id < 6 or size < 16:
        raise InputError(
            f"train_ids and test_ids must be 5 or more each and {MOST} or less together, images_per_id 6 or "
            f"more (so that one of five cameras comes back) and size 16 or more, "
            f"got {train_ids}, {test_ids}, {images_per_id} and {size}"
        )


def write_demo_reid(
    output: Path,
    layout: str,
    train_ids: int = 60,
    test_ids: int = 20,
    images_per_id: int = 16,
    size: int = 128,
    seed: int = 0,
    style: str | None = None,
    processes: int | None = None,
    mixed: bool = False,
) -> dict:
    """Write the set into a new folder; one that already holds this very set is left as it is.

    Args:
        layout: veri776, vehicleid, veriwild or table.
        train_ids, test_ids: vehicles, 5 or more of each; none is in both.
        images_per_id: pictures of a vehicle, 6 or more: five cameras and six views take turns.
        size: side of a picture in px.
        style: of VERI-Wild's lists: old (None: this one), old_headless or new.
        processes: number of workers, None: one per core. They change the speed only.
        mixed: vehicles of all bodies and colours in turns, not four of each.
    Returns:
        images (those that VeRi keeps twice count once), train_ids, test_ids, cameras (0 in VehicleID), the
        length of each list of `split_rows`, and written.
    Raises:
        InputError: a setting that is unknown or out of range, or an `output` that holds something else.
    """
    output = Path(output).absolute()
    _check(layout, style, train_ids, test_ids, images_per_id, size)
    styled = {"style": style or "old"} if layout == "veriwild" else {}
    rows = plan(layout, train_ids, test_ids, images_per_id, seed, mixed)
    lists = split_rows(layout, rows)
    counts = {"images": len(rows), "train_ids": train_ids, "test_ids": test_ids}
    counts["cameras"] = len({row["camid"] for row in rows}) if layout != "vehicleid" else 0
    counts |= {name: len(part) for name, part in lists.items()}
    settings = {"layout": layout, **styled, "images_per_id": images_per_id, "size": size, "seed": seed}
    settings |= {"mixed": True} if mixed else {}
    about = json.dumps({**settings, "version": [VERSION, demo.VERSION], **counts}) + "\n"
    if holds_set(output, "demo_reid.json", about, "re-identification set"):
        return {**counts, "written": False}

    def finish(folder: Path) -> None:
        WRITERS[layout](folder, rows, lists, **styled)
        (folder / "demo_reid.json").write_text(about, encoding="utf-8")

    write_folder(output, rows, partial(_write_picture, seed=seed, size=size), processes, finish)
    return {**counts, "written": True}


def main():
    parser = demo_parser(
        "demo_reid",
        "Write drawn vehicles as a re-identification set in a published layout.",
        128,
        "side of a picture in pixels",
    )
    add = parser.add_argument
    add("--layout", choices=WRITERS, required=True, default=argparse.SUPPRESS, help="layout; no default")
    add("--train_ids", type=int, default=60, help="vehicles to train on")
    add("--test_ids", type=int, default=20, help="other vehicles to test on")
    add("--images_per_id", type=int, default=16, help="pictures of a vehicle")
    add("--style", choices=STYLES, default=None, help="of the lists of veriwild, None: old")
    add("--mixed", action="store_true", help="all bodies and colours in turns, for attributes")
    run_demo(parser, write_demo_reid)


if __name__ == "__main__":
    main()
