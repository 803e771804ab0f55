"""Attribute files of datasets -> raw rows: one dict of values by slot a row.

Formats: a table (.csv .tsv .jsonl, any columns), VeRi-776, VehicleID, CompCars, StanfordCars class
names and DVM-CAR. Every reader raises InputError naming file and, where there is one, the line.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets.attr import veri_code, veri_xml
from description.canonical import TABLE
from description.matfile import read_cell_strings
from description.tables import iterate_table, read_text
from util.errors import InputError

Rows = Iterator[dict[str, str]]


def read_attributes(
    path: str | Path, format: str = "auto", columns: dict[str, str] | None = None, split: str | None = None,
    extra: tuple[str, ...] = (),
) -> Rows:  # fmt: skip
    """Rows of one attribute source.

    Args:
        path: a file, or the folder of a dataset.
        format: a key of `READERS`, or "auto": by the files that are there.
        columns: slot -> column, where a table's column has a name of its own (tables only).
        split: keep the table rows whose column `split` has this value (tables only).
        extra: further columns to carry along (tables only).
    Raises:
        InputError: nothing there, unknown content, damage.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"--attributes {path} does not exist: give a table or the folder of a dataset")
    format = detect(path) if format == "auto" else format
    if format in ("table", "dvm"):
        return READERS[format](path, columns or {}, split, extra)
    return READERS[format](path)


def detect(path: Path) -> str:
    """The format of a file or folder, by names. Raises InputError if there is no sign of any."""
    if path.is_file():
        by_ending = {".xml": "veri", ".mat": "stanford", ".txt": "stanford"}
        return by_ending.get(path.suffix.lower(), "table")
    signs = {
        "train_label.xml": "veri",
        "attribute/color_attr.txt": "vehicleid",
        "color_attr.txt": "vehicleid",
        "misc/attributes.txt": "compcars",
        "attributes.txt": "compcars",
        "devkit/cars_meta.mat": "stanford",
        "cars_meta.mat": "stanford",
        "Ad_table.csv": "dvm",
        "tables/Ad_table.csv": "dvm",
    }
    for sign, format in signs.items():
        if (path / sign).is_file():
            return format
    raise InputError(f"--attributes {path}: none of {', '.join(signs)} is in this folder; give the file itself")


def read_table(path: Path, columns: dict[str, str], split: str | None, extra: tuple[str, ...] = ()) -> Rows:
    return iterate_table(path, columns, split, extra)


def read_veri(path: Path) -> Rows:
    """VeRi-776: items of `train_label.xml` with colorID and typeID (1-based)."""
    file = path / "train_label.xml" if path.is_dir() else path
    names = {
        slot: _list_names(file.parent / f"list_{name}.txt") or dict(enumerate(TABLE["veri"][slot], 1))
        for slot, name in (("colour", "color"), ("body", "type"))
    }
    for item in veri_xml(file).iter("Item"):
        row = {}
        for slot, key in (("colour", "colorID"), ("body", "typeID")):
            code = veri_code(file, item, key, names[slot])
            if code is not None:
                row[slot] = names[slot][code]
        yield row


def read_vehicleid(path: Path) -> Rows:
    """VehicleID: "<vehicle> <id>" in `color_attr.txt` and `model_attr.txt`, names in `color_names.txt` and
    `model_names.txt` (name and id in either order), one row a vehicle."""
    folder = path / "attribute" if (path / "attribute").is_dir() else path if path.is_dir() else path.parent
    vehicles: dict[str, dict[str, str]] = {}
    for slot, name in (("colour", "color"), ("model", "model")):
        file = folder / f"{name}_attr.txt"
        if not file.is_file():
            continue
        names = _list_names(folder / f"{name}_names.txt")
        if not names:
            raise InputError(
                f"{file} holds numbers only: write their names to {folder / f'{name}_names.txt'}, '<name> <id>' a line"
            )
        for number, line in enumerate(read_text(file).splitlines(), 1):
            words = line.split()
            if not words:
                continue
            if len(words) != 2 or not words[1].isdigit():
                raise InputError(f"{file}, line {number} is not '<vehicle> <id>': {line[:60]}")
            if int(words[1]) not in names:
                raise InputError(f"{file}, line {number}: id {words[1]} is not in {name}_names.txt")
            vehicles.setdefault(words[0], {})[slot] = names[int(words[1])].replace("_", " ")
    yield from vehicles.values()


def read_compcars(path: Path) -> Rows:
    """CompCars: `misc/attributes.txt` (model id, speed, displacement, doors, seats, type), names in
    `make_model_name.mat` and `car_type.mat`; makes, years and views from `label/<make>/<model>/<year>/`."""
    misc = path if (path / "attributes.txt").is_file() else path / "misc"
    file = misc / "attributes.txt"
    makes = read_cell_strings(misc / "make_model_name.mat", "make_names")
    models = read_cell_strings(misc / "make_model_name.mat", "model_names")
    types = read_cell_strings(misc / "car_type.mat", "types")
    kept: dict[int, dict[str, str]] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        fields = line.split()
        if not fields or (number == 1 and not fields[0].isdigit()):
            continue
        if len(fields) != 6 or not (fields[0].isdigit() and fields[5].isdigit()):
            raise InputError(f"{file}, line {number} does not hold six numbers: {line[:60]}")
        model, kind = int(fields[0]), int(fields[5])
        row = {"model": _at(models, model), "body": _at(types, kind), "displacement": fields[2]}
        kept[model] = row | {"maximum_speed": fields[1], "doors": fields[3], "seats": fields[4]}
    seen: Counter[tuple] = Counter()
    for label in sorted((misc.parent / "label").glob("*/*/*/*.txt")):
        make, model, year = label.relative_to(misc.parent / "label").parts[:3]
        view = (read_text(label).split() or [""])[0]
        if not (make.isdigit() and model.isdigit()):
            raise InputError(f"{label}: CompCars names its folders by make and model numbers")
        seen[int(make), int(model), year, TABLE["compcars_view"].get(view)] += 1
    for (make, model, year, view), count in seen.items():
        row = kept.get(model, {"model": _at(models, model)})
        row = row | {"make": _at(makes, make), "year": year, "view": view}
        for _ in range(count):
            yield row
    if not seen:  # without the label tree no make is known: model names mostly begin with it
        yield from kept.values()


def read_stanford(path: Path) -> Rows:
    """StanfordCars: `cars_meta.mat` (class_names) or a .txt of "Make Model Body Year" lines."""
    if path.is_dir():
        places = (path / "devkit" / "cars_meta.mat", path / "cars_meta.mat")
        if not any(place.is_file() for place in places):
            raise InputError(f"--attributes {path} holds no cars_meta.mat (nor devkit/cars_meta.mat): name the file")
        path = next(place for place in places if place.is_file())
    if path.suffix.lower() == ".mat":
        names = read_cell_strings(path, "class_names")
    else:
        names = read_text(path).splitlines()
    yield from ({"class_name": name.strip()} for name in names if name and name.strip())


def read_dvm(path: Path, columns: dict[str, str], split: str | None, extra: tuple[str, ...] = ()) -> Rows:
    """DVM-CAR: `Ad_table.csv`; with `Image_table.csv` beside it one row an image, with its viewpoint.
    An image's id is the advertisement's and a running number."""
    folder = path if path.is_dir() else path.parent
    folder = folder / "tables" if (folder / "tables").is_dir() else folder
    images = folder / "Image_table.csv"
    ads = iterate_table(folder / "Ad_table.csv", columns, split, (*extra, "adv_id"))
    if not images.is_file():
        yield from ads
        return
    views: dict[str, list[str]] = {}
    for row in iterate_table(images, {}, None, ("image_id",)):
        if "view" in row:
            views.setdefault(row.get("image_id", "").rpartition("$$")[0], []).append(row["view"])
    for row in ads:
        for view in views.get(row.get("adv_id", ""), [None]):
            yield row | ({"view": view} if view is not None else {})


READERS: dict[str, Callable[..., Rows]] = {
    "table": read_table,
    "veri": read_veri,
    "vehicleid": read_vehicleid,
    "compcars": read_compcars,
    "stanford": read_stanford,
    "dvm": read_dvm,
}


def _list_names(file: Path) -> dict[int, str]:
    """ "<id> <name>" or "<name> <id>" a line -> names by id; empty where there is no such file."""
    if not file.is_file():
        return {}
    names = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\d+)\s+(.+)", line.strip()) or re.fullmatch(r"(.+)\s+(\d+)", line.strip())
        if not match:
            raise InputError(f"{file}, line {number} is not '<name> <id>': {line[:60]}")
        a, b = match.groups()
        names[int(a if a.isdigit() else b)] = b if a.isdigit() else a
    return names


def _at(names: list[str | None], number: int) -> str | None:
    """MATLAB counts from 1; 0 means unavailable."""
    return names[number - 1] if 0 < number <= len(names) else None
