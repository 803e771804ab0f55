"""Drawn vehicles as StanfordCars, devkit files included, to run fine-grained classes without the real set.

    python -m demo.cars --output demo_cars --layout transfg

Layouts: transfg (`car/`), torchvision (`stanford_cars/`) and annos (`cars_annos.mat` beside `car_ims/`), with
the fields, their order and their number types as published. A class is a make on a body: the makes of a body
differ in grille, headlamps and rims alone; colours, marks, places and views do not belong to the class, and
every picture shows another vehicle. The first training picture is wide (its box needs uint16), the second
grey. One seed gives the same pictures in every layout.
"""

import argparse
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from datasets.fgvc import ANNOS_FIELDS, BOX, DEVKIT_FIELDS, TEST, TRAIN, UNLABELLED
from datasets.seg import BACKGROUND_ID
from demo import draw as demo
from demo.folder import demo_parser, holds_set, run_demo, write_folder
from demo.matfile import write_mat
from demo.render import render_parts
from demo.vehicle import BODIES, CAMERAS, MAKES, VIEWS, demo_rng, vehicle
from util.errors import InputError

VERSION = 1  # raise when the files change, so that an older folder is not taken for this one
FOLDERS = {"transfg": "car/", "torchvision": "stanford_cars/", "annos": ""}
# a rear view shows neither grille nor rims
SHOWN = ("front three-quarter", "front", "left side", "front three-quarter", "right side", "rear three-quarter")
WIDTHS = (1.0, 0.75, 1.25)  # of the pictures / size; their heights are three quarters
WIDE = 320  # px, of the first training picture at least
BOXES = "boxes"  # folder of what `finish` needs to know of the pictures; it is removed


def class_names(count: int) -> dict[tuple[str, str], str]:
    """{(make, body): name} of the first `count` classes, in the order of their names, which begin with the
    make and end with the body and a year as StanfordCars' do; four makes of every body before the others."""
    makes = list(MAKES)
    halves = (itertools.product(BODIES, half) for half in (makes[:4], makes[4:]))
    pairs = itertools.islice(((make, body) for half in halves for body, make in half), count)
    words = {(make, body): f"{make} {'SUV' if body == 'suv' else body.title()} 2012" for make, body in pairs}
    return dict(sorted(words.items(), key=lambda item: item[1]))


def plan(layout: str, classes: int, train: int, test: int, size: int, seed: int) -> list[dict]:
    """One row a picture, training ones first: path, fname (as the annotations name it), split, class from 1,
    size (width, height) in px, is_grey, and what `render_parts` needs."""
    names = class_names(classes)
    wanted = {pair: train + test for pair in names}
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for pid in itertools.count():
        if not any(wanted.values()):
            break
        if list(BODIES)[pid % len(BODIES)] not in {body for (_, body), left in wanted.items() if left}:
            continue
        attrs = vehicle(seed, pid)
        pair = attrs["make"], attrs["body"]
        if wanted.get(pair):
            wanted[pair] -= 1
            split = "train" if wanted[pair] >= test else "test"
            camid = int(demo_rng(seed, "cars", pid).integers(len(CAMERAS)))
            viewid = VIEWS.index(SHOWN[wanted[pair] % len(SHOWN)])
            number = list(names).index(pair) + 1
            rows[split].append({"pid": pid, "camid": camid, "viewid": viewid, "class": number, "split": split})
    listed = []
    for split, part in rows.items():
        order = demo_rng(seed, "cars order", split).permutation(len(part)).tolist()
        for place, index in enumerate(order, 1):
            width = round(size * WIDTHS[place % len(WIDTHS)])
            width = max(width, WIDE) if (split, place) == ("train", 1) else width
            row = part[index] | {"size": (width, round(width * 3 / 4))}
            row["is_grey"] = (split, place) == ("train", 2)
            folder = "car_ims/" if layout == "annos" else f"cars_{split}/"
            row["fname"] = f"{len(listed) + 1:06}.jpg" if layout == "annos" else f"{place:05}.jpg"
            listed.append(row | {"path": f"{FOLDERS[layout]}{folder}{row['fname']}"})
    return listed


def _write_picture(row: dict, folder: Path, seed: int) -> None:
    ids = (row[name] for name in ("pid", "camid", "viewid"))
    picture, mask = render_parts(seed, *ids, 0, row["size"])
    picture = picture.convert("L") if row["is_grey"] else picture
    picture.save(folder / row["path"], quality=CAMERAS[row["camid"]].quality)
    (folder / BOXES).mkdir(exist_ok=True)
    y, x = np.nonzero(mask != BACKGROUND_ID)
    box = [int(x.min()) + 1, int(y.min()) + 1, int(x.max()) + 1, int(y.max()) + 1]  # MATLAB counts from 1
    (folder / BOXES / row["path"].replace("/", "_")).write_text(json.dumps(box))


def _write_annotations(folder: Path, rows: list[dict], layout: str, names: list[str]) -> None:
    """The .mat files of a layout."""
    listed: dict[str, list[dict]] = {"train": [], "test": []}
    for row in rows:
        box = json.loads((folder / BOXES / row["path"].replace("/", "_")).read_text())
        about = dict(zip(BOX, box)) | {"class": row["class"], "fname": row["fname"]}
        about |= {"relative_im_path": row["path"], "test": int(row["split"] == "test")}
        listed[row["split"]].append(about)
    shutil.rmtree(folder / BOXES)

    def fields(part: list[dict], wanted) -> list[dict]:
        return [{name: row[name] for name in wanted} for row in part]

    if layout == "annos":
        both = fields(listed["train"] + listed["test"], ANNOS_FIELDS)
        write_mat(folder / "cars_annos.mat", {"annotations": both, "class_names": names})
        return
    base = folder / FOLDERS[layout]
    (base / "devkit").mkdir()
    write_mat(base / TRAIN, {"annotations": fields(listed["train"], DEVKIT_FIELDS)})
    write_mat(base / TEST, {"annotations": fields(listed["test"], DEVKIT_FIELDS)})
    write_mat(base / UNLABELLED, {"annotations": fields(listed["test"], (*BOX, "fname"))})
    write_mat(base / "devkit" / "cars_meta.mat", {"class_names": names})


def write_demo_cars(
    output: Path,
    layout: str,
    classes: int = 24,
    train: int = 20,
    test: int = 10,
    size: int = 160,
    seed: int = 0,
    processes: int | None = None,
) -> dict:
    """Write the set into a new folder; one that already holds this very set is left as it is.

    Args:
        layout: a key of `FOLDERS`.
        classes: 2 to 80, up to 40 four makes a body. train, test: pictures of each class, 1 or more.
        size: mean width of the pictures in px.
        processes: number of workers, None: one per core. They change the speed only.
    Returns:
        classes, train, test: numbers of them; and written.
    Raises:
        InputError: a setting that is unknown or out of range, or an `output` that holds something else.
    """
    output, most = Path(output).absolute(), len(BODIES) * len(MAKES)
    if layout not in FOLDERS:
        raise InputError(f"layout '{layout}' is unknown: choose one of {', '.join(FOLDERS)}")
    if not 2 <= classes <= most or min(train, test) < 1 or size < 32:
        raise InputError(
            f"classes must be 2 to {most}, train and test 1 or more and size 32 or more, got {classes}, "
            f"{train}, {test} and {size}"
        )
    settings = {"layout": layout, "classes": classes, "train": train, "test": test, "size": size, "seed": seed}
    about = json.dumps(settings | {"version": [VERSION, demo.VERSION]}) + "\n"
    counts = {"classes": classes, "train": classes * train, "test": classes * test}
    if holds_set(output, "demo_cars.json", about, "set of fine-grained classes"):
        return {**counts, "written": False}
    rows = plan(layout, classes, train, test, size, seed)

    def finish(folder: Path) -> None:
        _write_annotations(folder, rows, layout, list(class_names(classes).values()))
        (folder / "demo_cars.json").write_text(about, encoding="utf-8")

    write_folder(output, rows, partial(_write_picture, seed=seed), processes, finish)
    return {**counts, "written": True}


def main():
    parser = demo_parser(
        "demo_cars",
        "Write drawn vehicles as StanfordCars with its devkit files.",
        160,
        "mean width of the pictures in pixels",
    )
    add = parser.add_argument
    add("--layout", choices=FOLDERS, required=True, default=argparse.SUPPRESS, help="layout; no default")
    add("--classes", type=int, default=24, help="classes, up to 40 four makes a body")
    add("--train", type=int, default=20, help="training pictures of a class")
    add("--test", type=int, default=10, help="test pictures of a class")
    run_demo(parser, write_demo_cars)


if __name__ == "__main__":
    main()
