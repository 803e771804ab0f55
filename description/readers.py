"""Attribute files (tables of any columns, VeRi-776, CompCars, StanfordCars) -> rows of values by slot."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets.attr import veri_items
from datasets.fgvc import read_cell_strings
from datasets.tables import cell, iterate_table, split_name
from description.texts import INVISIBLE, SLOTS, TABLE, Templates, canonical_row, column_key, read_text, slot_of
from util.errors import InputError

Rows = Iterator[dict[str, str]]
SIGNS = {"train_label.xml": "veri"} | dict.fromkeys(("misc/attributes.txt", "attributes.txt"), "compcars")
SIGNS |= dict.fromkeys(("devkit/cars_meta.mat", "cars_meta.mat"), "stanford")  # files by which a folder is known


def read_rows(args, columns: dict[str, str], templates: Templates, facts: dict) -> Counter:
    """Read --attributes into canonical rows with their counts: {sorted tuple of (slot, value): rows}."""
    wanted = templates.slots()
    extra = tuple(wanted - {*SLOTS, *INVISIBLE, "decade"})
    rows, unknown, seen = Counter(), Counter(), set()
    for path in args.attributes:
        for raw in read_attributes(path, args.format, columns=columns, split=args.split, extra=extra):
            seen |= set(raw)
            row = canonical_row(raw, unknown)
            rows[tuple(sorted((k, v) for k, v in row.items() if k in wanted or k in SLOTS))] += 1
    rows.pop((), None)
    if missing := sorted(set(extra) - seen - set(templates.words)):
        words = f"known are {', '.join(SLOTS)}, decade and the columns of the table"
        raise InputError(f"--templates {args.templates}: unknown placeholder {{{missing[0]}}}; {words}")
    if not rows:
        raise InputError("--attributes: no row has a usable value; check --split and the columns, or use --column")
    facts |= {"rows": rows.total(), "combinations": len(rows), "unknown_values": len(unknown)}
    facts["attributes"] = sorted({slot for row in rows for slot, _ in row})
    facts["invisible_columns"] = sorted(seen & set(INVISIBLE))
    for (slot, value), count in unknown.most_common(8):
        print(f"unknown {slot} '{value}' in {count} rows")
    return rows


def read_attributes(path: str | Path, format: str = "auto", **table) -> Rows:
    """Read a file or the folder of a dataset. format: a key of `READERS`, or "auto": by the files that are there.
    table: columns, split, extra of `read_table`, for tables only."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"--attributes {path} does not exist: give a table or the folder of a dataset")
    if format == "auto" and path.is_file():
        format = {".xml": "veri", ".mat": "stanford", ".txt": "stanford"}.get(path.suffix.lower(), "table")
    elif format == "auto":
        format = next((name for sign, name in SIGNS.items() if (path / sign).is_file()), "")
        if not format:
            raise InputError(f"--attributes {path}: none of {', '.join(SIGNS)} is in this folder; give the file itself")
    return READERS[format](path, **(table if format == "table" else {}))


def read_table(file: Path, columns: dict[str, str] | None = None, split: str | None = None, extra=()) -> Rows:
    """Read a table with whatever columns exist; empty values are left out.

    Args:
        columns: slot -> name of its column, where the built-in names do not find it.
        split: keep the rows whose column `split` has this value, if there is such a column.
        extra: keys of further columns to carry along under their own key.
    """
    columns, named = columns or {}, {}  # keys of a .jsonl change from row to row
    for raw in iterate_table(file, key=""):
        row = {name.strip(): cell(raw, name) for name in raw}
        header = tuple(row)
        if header not in named:
            named[header] = _name_columns(file, header, columns, extra)
        if split is None or row.get("split", split_name(split)) == split_name(split):
            yield {slot: row[name] for name, slot in named[header].items() if row[name]}
    seen = {name for header in named for name in header}
    words = ", ".join(sorted(seen))
    for slot, name in columns.items():
        if name not in seen:
            raise InputError(f"--column {slot}={name}: {file} has {words}")
    if not any(named.values()):
        raise InputError(f"{file} has no usable column among {words}: name them with --column make=NAME body=NAME")


def _name_columns(file: Path, header: tuple[str, ...], columns: dict[str, str], extra: tuple[str, ...]):
    """{column: slot} of a header."""
    chosen = {name: slot for slot, name in columns.items() if name in header}
    for name in header:
        slot, key = slot_of(name), column_key(name)
        if name not in chosen and slot and slot not in columns:
            if other := next((other for other, its in chosen.items() if its == slot), None):
                words = f"the columns '{other}' and '{name}' both hold the {slot}"
                raise InputError(f"{file}: {words}; choose with --column {slot}=NAME")
            chosen[name] = slot
        elif name not in chosen and key in extra:
            chosen[name] = key
    if {"make", "model"} & set(chosen.values()):  # the class name only repeats them
        chosen = {name: slot for name, slot in chosen.items() if slot != "class_name"}
    return chosen


def read_veri(path: Path) -> Rows:
    """VeRi-776: items of `train_label.xml` with colorID and typeID (1-based)."""
    for _, colour, body in veri_items(path / "train_label.xml" if path.is_dir() else path):
        yield {slot: word for slot, word in (("colour", colour), ("body", body)) if word}


def read_compcars(path: Path) -> Rows:
    """CompCars: `misc/attributes.txt` (model id, speed, displacement, doors, seats, type), names in
    `make_model_name.mat` and `car_type.mat`; makes, years and views from `label/<make>/<model>/<year>/`."""
    misc = path if (path / "attributes.txt").is_file() else path / "misc"
    makes = read_cell_strings(misc / "make_model_name.mat", "make_names")
    models = read_cell_strings(misc / "make_model_name.mat", "model_names")
    types = read_cell_strings(misc / "car_type.mat", "types")

    def name(names: list[str | None], number: str) -> str | None:  # MATLAB counts from 1; 0 means unavailable
        return names[int(number) - 1] if 0 < int(number) <= len(names) else None

    kept: dict[str, dict[str, str]] = {}
    for number, line in enumerate(read_text(misc / "attributes.txt").split("\n"), 1):
        fields = line.split()
        if re.fullmatch(r"\d+( \S+){4} \d+", " ".join(fields)):
            row = dict(zip(("maximum_speed", "displacement", "doors", "seats"), fields[1:5]))
            kept[fields[0]] = {"model": name(models, fields[0]), "body": name(types, fields[5])} | row
        elif fields and number > 1:  # the first line may name the columns
            raise InputError(f"{misc}/attributes.txt, line {number} does not hold six numbers: {line[:60]}")
    labels = sorted((misc.parent / "label").glob("[0-9]*/[0-9]*/*/*.txt"))
    for label in labels:
        make, model, year = label.parts[-4:-1]
        view = TABLE["compcars_view"].get((read_text(label).split() or [""])[0])
        row = kept.get(model, {"model": name(models, model)})
        yield row | {"make": name(makes, make), "year": year, "view": view}
    if not labels:  # without the label tree no make is known: model names mostly begin with it
        yield from kept.values()


def read_stanford(path: Path) -> Rows:
    """StanfordCars: `cars_meta.mat` (class_names) or a .txt of "Make Model Body Year" lines."""
    if path.is_dir():
        path = next((p for p in (path / "devkit/cars_meta.mat", path / "cars_meta.mat") if p.is_file()), path)
    is_mat = path.suffix.lower() == ".mat"
    names = read_cell_strings(path, "class_names") if is_mat else read_text(path).splitlines()
    yield from ({"class_name": name.strip()} for name in names if name and name.strip())


READERS = dict(table=read_table, veri=read_veri, compcars=read_compcars, stanford=read_stanford)
