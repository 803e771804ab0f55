"""Tables (.csv .tsv .jsonl .txt), one reader for all; names of splits, unknown values, the counts of published sets."""

import contextlib
import csv
import datetime
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from util.errors import InputError

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".txt")
COLUMNS = ("path", "pid", "split", "camid", "viewid", "label")
SIDES = ("x", "y", "w", "h")  # left, upper, width, height of a box
SEEN = ("box", "track", "time", "frame")  # what a table may say of where and when a vehicle was seen
PUBLISHED = {  # images, identities and classes as published; another count is said, not refused
    "veri776": {"train": 37_778, "train identities": 575, "query": 1678, "gallery": 11_579, "test": 11_579},
    "vehicleid": {"train": 113346, "train identities": 13164, "test_800": 6493, "test_1600": 13377, "test_2400": 19777},
    "veriwild": {
        "train": 277_797, "train identities": 30_671, "query_3000": 3000, "gallery_3000": 38_861,
        "query_5000": 5000, "gallery_5000": 64_389, "query_10000": 10_000, "gallery_10000": 128_517,
    },
    "StanfordCars": {"training images": 8144, "test images": 8041, "classes": 196},
}  # fmt: skip


def iterate_table(file: str | Path, needed: tuple[str, ...] = (), advice: str = "", key: str = "path") -> Iterator:
    """The rows of a table as dicts, one at a time: a million rows are never in memory together. All have a `key` ("":
    none). Names of columns and of splits are taken as they are meant, see `_names` and `split_name`. needed: columns
    that must be there too. advice: what to say where one is not. Of pictures, `box` is (left, upper, right, lower) in
    px or not there, from a column of this name or from x, y, w, h, unless `needed` has them."""
    file, count, seen, names = Path(file), 0, None, []
    if not file.exists():
        raise InputError(f"{file} does not exist: give a folder, or a table that is there")
    if file.suffix.lower() not in TABLE_ENDINGS or not file.is_file():
        raise InputError(f"{file} is neither a folder nor a manifest: manifests end in {', '.join(TABLE_ENDINGS)}")
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            for count, (line, row) in enumerate(_rows(file, opened), 1):
                if tuple(row) != seen:  # keys of a .jsonl change from row to row
                    seen, names = tuple(row), _names(file, row, (key, *needed))
                    missing = [name for name in (key, *needed) if name and name not in names and count == 1]
                    if missing:
                        raise InputError(f"{file} has no column '{missing[0]}': it has {', '.join(names)}{advice}")
                row = dict(zip(names, row.values()))
                _check_texts(file, line, row, key)
                if key == "path" and not {"box", *SIDES} & set(needed):
                    _read_box(file, line, row)
                if isinstance(row.get("split"), str):
                    row["split"] = split_name(row["split"])
                yield row
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    if not count:
        raise InputError(f"{file} lists nothing: it has no row")


def _rows(file: Path, opened) -> Iterator[tuple[int, dict]]:
    """(line, row by the names of its columns) of what is no empty line."""
    ending = file.suffix.lower()
    if ending in (".txt", ".jsonl"):
        for number, line in enumerate(opened, 1):
            if text := line.strip():
                yield number, {"path": text} if ending == ".txt" else _json_row(file, number, text)
        return
    between = "\t" if ending == ".tsv" else ","
    layout = {"delimiter": between, "skipinitialspace": True}
    reader = csv.reader(opened, strict=True, **layout)
    try:
        header = next(csv.reader([opened.readline()], **layout), [])
        for cells in filter(None, reader):
            what = "" if len(cells) == len(header) else "another number of fields than the first line"
            if any("\n" in text and between in text for text in cells):
                what = f"a field over several lines with '{between}' in it"
            if what:
                raise InputError(f"{file}, line {1 + reader.line_num} has {what}: look for a lost quote or separator")
            yield 1 + reader.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise InputError(f"{file}, line {1 + reader.line_num}: {error}: look for a lost quote") from error


def _json_row(file: Path, number: int, text: str) -> dict:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # of more than 4,300 digits, nested too deep
        raise InputError(f"{file}, line {number} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(row, dict):
        raise InputError(f"{file}, line {number} is not a JSON object: write one a line")
    return row


def _names(file: Path, header: Iterable[str], needed: tuple[str, ...]) -> list[str]:
    """The columns without spaces and quotes around their names; those that are asked for whatever their capitals."""
    meant = {name.lower(): name for name in (*COLUMNS, *SEEN, *SIDES, *needed)}
    names = [name.strip(" \t\r\n\ufeff\"'") for name in header]
    names = [name if name in needed else meant.get(name.lower(), name) for name in names]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise InputError(f"{file} has the column '{twice[0]}' twice: rename one")
    return names


def _check_texts(file: Path, line: int, row: dict, key: str) -> None:
    """InputError where the key is no text, or a text cannot be the name of a file, or be written as UTF-8."""
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    if key and not texts.get(key, "").strip():
        raise InputError(f"{file}, line {line} has no text in the column '{key}'")
    path = texts.pop("path", "")
    try:
        os.fsencode(path), "".join(texts.values()).encode()
        is_damaged = "\0" in path or ("\n" in path and not os.path.lexists(file.parent / path))
    except UnicodeEncodeError:
        is_damaged = True
    if is_damaged:
        raise InputError(f"{file}, line {line} is damaged: it holds characters that are none, or a quote is lost")


def _read_box(file: Path, line: int, row: dict) -> None:
    """Turn the cells of a box into whole px, in place; without any text it is the whole picture."""
    cells = [row.pop(side) for side in SIDES] if all(side in row for side in SIDES) else []
    if cells and "box" in row:
        raise InputError(f"{file} has a column 'box' and x, y, w, h too: drop the one or the others")
    given = cells or row.pop("box", None)
    if not (any(map(known, cells)) if cells else isinstance(given, list) or known(given)):
        return
    parts, why = given if isinstance(given, list) else re.sub(r"[\[\](),;]", " ", str(given)).split(), ""
    try:
        left, upper, right, lower = (float(str(part)) for part in parts)
        right, lower = (left + right, upper + lower) if cells else (right, lower)
        box = [min(max(round(edge), -(1 << 31)), (1 << 31) - 1) for edge in (left, upper, right, lower)]
        if box[0] >= box[2] or box[1] >= box[3]:
            why = "is empty, or its corners are swapped"
        elif min(box[2:]) <= 0:
            why = "lies outside of any picture"
    except (ValueError, OverflowError):
        why = "is not four finite numbers"
    if why:
        shown, cure = ", ".join(map(str, parts))[:60], "x y w h" if cells else "left upper right lower"
        what = f"{file}, line {line}: the box {shown} of {str(row.get('path'))[-60:]} {why}"
        raise InputError(f"{what}: give {cure} in px of the picture, or nothing for the whole")
    row["box"] = tuple(box)


def split_name(text: str) -> str:
    """train, val and test under other spellings: Train, validation, valid ..."""
    name = text.strip().lower()
    return {"training": "train", "valid": "val", "validation": "val", "testing": "test"}.get(name, name)


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split, however it is spelled; `root/split` where there is none."""
    names = [path.name for path in root.iterdir() if split_name(path.name) == split] if root.is_dir() else []
    return root / (split if split in names or not names else names[0])


def cell(row: dict, column: str) -> str:
    """A value of a table as text, see `known`."""
    return known(row.get(column))


def known(value) -> str:
    """A value as text; '' where it says that nothing is known: no value, NaN, or -1, by which sets mark junk. pandas
    writes 1 as 1.0 where other cells of the column are empty."""
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", "" if value is None else str(value).strip(), flags=re.ASCII)
    return "" if text.lower() in ("-1", "nan", "null", "<na>") else text


def moment(text: str) -> float | None:
    """A number, or an ISO time in seconds since 1970 (UTC where it names no zone; a time of day: of that day), to sort
    and compare by; None: neither."""
    with contextlib.suppress(ValueError):
        return float(text) if math.isfinite(float(text)) else None
    for day in ("", "1970-01-01T"):
        with contextlib.suppress(ValueError):
            when = datetime.datetime.fromisoformat(day + text)
            return (when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)).timestamp()
    return None


def published_note(counts: dict[str, int], name: str) -> str:
    """How counts differ from those of PUBLISHED[name]; what is not there does not count as different."""
    published = PUBLISHED[name].items()
    if all(counts.get(what, 0) < n / 2 for what, n in published if what in counts):
        return "smaller than the published set"
    other = [f"{what} {counts[what]:,} instead of {n:,}" for what, n in published if counts.get(what, n) != n]
    return f"other counts than published: {', '.join(other)}" if other else "all counts as published"
