"""Images with attributes: VeRi-776's colours and types from its XML, or any table whose header names them."""

import codecs
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.images import boxed
from datasets.items import Labelled
from datasets.path_list import PathList, check_first_exist, printable
from datasets.tables import SEEN, cell, iterate_table, known, published_note, split_name
from util.errors import InputError

UNKNOWN = -1
NOT_ATTRIBUTES = ("path", "split")
YES_NO = {"0": 0, "1": 1, "false": 0, "true": 1, "": UNKNOWN}
MOST_VALUES = 1000  # of a column of words: each becomes an attribute


class Attribute(NamedTuple):
    """A value of a column of words, as ("colour", "red"), or a column of 0 and 1, as ("taxi", "")."""

    column: str
    value: str = ""

    @property
    def name(self) -> str:
        return f"{self.column}: {self.value}" if self.value else self.column


VERI_COLOURS = ("yellow", "orange", "green", "grey", "red", "blue", "white", "gold", "brown", "black")
VERI_TYPES = ("sedan", "SUV", "van", "hatchback", "MPV", "pickup truck", "bus", "truck", "station wagon")
VERI = tuple(Attribute("colour", name) for name in VERI_COLOURS) + tuple(Attribute("type", name) for name in VERI_TYPES)
Rows = list[tuple]  # of images: path (or `Cut`), cells of some columns


@dataclass(frozen=True)
class AttributeImages(Labelled):
    """labels: [n, A] int8, 1 true, 0 not, -1 unknown."""

    labels: np.ndarray

    def rates(self) -> np.ndarray:
        """[A] float64 share of true images among the known; 0 where none is known."""
        return (self.labels == 1).sum(axis=0) / np.maximum((self.labels >= 0).sum(axis=0), 1)


@dataclass(frozen=True)
class AttributeData:
    """name: veri776 or table. notes: what was found, one sentence each, for the run's header."""

    name: str
    attributes: tuple[Attribute, ...]
    train: AttributeImages
    test: AttributeImages
    notes: list[str] = field(default_factory=list)

    def sha256(self) -> str:
        """Identity of what is trained on: paths, order, attributes and labels."""
        return self.train.sha256(*(attribute.name for attribute in self.attributes))


def read_attribute_set(
    path: str | Path, format: str = "auto", *, binary: list[str] | None = None, categorical: list[str] | None = None,
    test_split: str = "test", known: tuple[Attribute, ...] | None = None, need_train: bool = True,
) -> AttributeData:  # fmt: skip
    """Read a set and check it: the folder of VeRi-776, or a table (.csv .tsv .jsonl).

    Args:
        format: veri776, table, or auto: a folder is VeRi-776. test_split: value of the column split that is tested on.
        binary: columns of 0 and 1 of a table; None: all but path, split, those of `SEEN`, the `categorical` ones.
        categorical: columns of words of a table; each value becomes an attribute, in sorted order.
        known: the attributes of a trained model; then only these, in their order.
        need_train: False: the part to train on may be missing.
    """
    path = Path(path)
    if format == "veri776" or (format == "auto" and path.is_dir()):
        if binary or categorical:
            raise InputError(f"{path} is VeRi-776; --attr_columns and --attr_categories name columns of a table")
        if known not in (None, VERI):
            some = ", ".join(a.name for a in known[:4])
            raise InputError(f"the model knows {some} ..., not VeRi-776's colours and types, as in {path}")
        data = _read_veri(path, need_train)
    else:
        if known is not None:
            categorical = list(dict.fromkeys(a.column for a in known if a.value))
            binary = [a.column for a in known if not a.value]
        data = _read_table(path, binary, categorical or [], test_split, known, need_train)
    for images in filter(len, (data.train, data.test)):
        check_first_exist(images.paths, path)
        if (images.labels < 0).all():
            what = f"not one label of {len(images)} listed images is known"
            raise InputError(f"{path}: {what}, e.g. of {images.paths.relative(0)}: fill in its attributes")
    return replace(data, notes=[*data.notes, *_describe(data)])


def _read_veri(root: Path, need_train: bool) -> AttributeData:
    notes, parts = [], []
    for split in ("train", "test"):
        file, folder = root / f"{split}_label.xml", root / f"image_{split}"
        if not file.is_file() and (split == "test" or need_train):
            raise InputError(f"{file} is missing: give the folder of VeRi-776, or a table")
        items = list(veri_items(file)) if file.is_file() else []
        for key, place in (("colorID", 1), ("typeID", 2)):
            if unknown := sum(not item[place] for item in items):
                notes.append(f"{unknown:,} items of {file.name} have no {key} that is known (0, -1 or none)")
        rows = [(f"{folder.name}/{name}", *words) for name, *words in items]
        parts.append(_images(file, rows, ["colour", "type"], VERI))
        here = set(os.listdir(folder)) if folder.is_dir() else set()
        if missing := [name for name, *_ in items if name not in here]:
            what = f"{len(missing):,} of the {len(items):,} images of {file}"
            notes.append(f"{what} are not in {folder}, e.g. {missing[0]}")
    counts = {split: len(images) for split, images in zip(("train", "test"), parts) if len(images)}
    return AttributeData("veri776", VERI, *parts, [*notes, published_note(counts, "veri776")])


def veri_items(file: Path) -> Iterator[tuple[str, str, str]]:
    """(image, colour, type) of the items of one of VeRi-776's label files, '' where the set does not know. Decoded by
    mark, declaration, or as GB18030, whose subset gb2312 ElementTree refuses."""
    try:
        data = file.read_bytes()
        try:
            root = ET.fromstring(data)  # by mark or declaration
        except (ET.ParseError, ValueError, LookupError):
            text = data.decode("utf-8-sig" if data.startswith(codecs.BOM_UTF8) else "gb18030")
            root = ET.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
    except (ValueError, LookupError, ET.ParseError, OSError) as error:
        raise InputError(f"{file} cannot be read as XML ({error}): copy it again") from error
    names: set[str] = set()
    for number, item in enumerate(root.iter("Item"), 1):
        name, found = (item.get("imageName") or "").strip(), []
        if not name or name in names:
            what = "a repeated" if name else "no"
            raise InputError(f"{file}: item {number} has {what} imageName {name}: copy it again")
        names.add(name)
        for key, words in (("colorID", VERI_COLOURS), ("typeID", VERI_TYPES)):
            code = known(item.get(key)).lstrip("0")  # VeRi-776 1.0 has types 0: unknown
            if code and (not re.fullmatch("[0-9]{1,3}", code) or int(code) > len(words)):
                raise InputError(f"{file}: {name} has {key} '{code[:40]}', known are 1 to {len(words)}")
            found.append(words[int(code) - 1] if code else "")
        yield name, *found
    if not names:
        raise InputError(f"{file} holds no <Item>: copy it again")


def _read_table(
    file: Path, binary: list[str] | None, categorical: list[str], test_split: str,
    known: tuple[Attribute, ...] | None, need_train: bool,
) -> AttributeData:  # fmt: skip
    if (test_split := split_name(test_split)) == "train":
        raise InputError("--attr_split train would test on what is trained on: name another split")
    rows: dict[str, Rows] = {}
    columns = [*(binary or ()), *categorical]
    for number, row in enumerate(iterate_table(file, ("split", *columns)), 1):
        if number == 1:
            if not columns:
                columns = binary = [name for name in row if name and name not in (*NOT_ATTRIBUTES, *SEEN)]
            for name in columns:
                if columns.count(name) > 1 or name in NOT_ATTRIBUTES:
                    raise InputError(f"column '{name}' of {file} is no attribute here, or twice: name it once")
        picture = boxed(row["path"], row.get("box"))
        rows.setdefault(cell(row, "split"), []).append((picture, *(cell(row, name) for name in columns)))
    for name in ("train", test_split) if need_train else (test_split,):
        if name not in rows:
            has = ", ".join(f"'{split}'" for split in rows) + "; choose one with --attr_split" * (name != "train")
            raise InputError(f"{file} has no row with split '{name}': it has {has}")
    train, test, notes = rows.pop("train", []), rows.pop(test_split), []
    if unused := ", ".join(f"{len(part):,} of split '{split}'" for split, part in rows.items()):
        notes.append(f"rows that are not used: {unused}")
    if both := {path for path, *_ in train} & {path for path, *_ in test}:
        notes.append(f"{len(both):,} images are in train and in {test_split}, e.g. {printable(min(map(str, both)))}")
    attributes = known or [Attribute(name) for name in binary or ()]
    for column in () if known else categorical:  # a word that training never shows counts as missed
        words = sorted({row[1 + columns.index(column)] for row in (*train, *test)} - {""})
        if not 2 <= len(words) <= MOST_VALUES:
            what = f"{len(words):,} different words, not 2 to {MOST_VALUES:,}"
            raise InputError(f"column '{column}' of {file} holds {what}: leave it out of --attr_categories")
        attributes += [Attribute(column, word) for word in words]
    if not attributes:
        raise InputError(f"{file} names no attribute: give --attr_columns or --attr_categories")
    parts = (_images(file, part, columns, attributes) for part in (train, test))
    return AttributeData("table", tuple(attributes), *parts, notes)


def _images(file: Path, rows: Rows, columns: list[str], attributes: Sequence[Attribute]) -> AttributeImages:
    """Images beside `file` with their labels; an empty cell is unknown."""
    labels = np.full((len(rows), len(attributes)), UNKNOWN, dtype=np.int8)
    for place, column in enumerate(columns, 1):
        words = {a.value: i for i, a in enumerate(attributes) if a.column == column}
        for number, row in enumerate(rows):
            text, path = row[place], row[0]
            if "" in words and text.lower() in YES_NO:
                labels[number, words[""]] = YES_NO[text.lower()]
            elif text and text in words:
                labels[number, [*words.values()]] = 0
                labels[number, words[text]] = 1
            elif text:
                hint = "not 0, 1 or nothing: --attr_columns names columns of 0 and 1, --attr_categories of words"
                if "" not in words:
                    hint = f"and the model knows {', '.join([*words][:8])}: correct it, or drop the row"
                raise InputError(f"{file}: {printable(str(path))} has {column} '{text[:40]}', {hint}")
    return AttributeImages(PathList(file.parent, (path for path, *_ in rows)), labels)


def _describe(data: AttributeData) -> Iterator[str]:
    """Counts, and attributes that a split never shows."""
    parts = {"train": data.train, "test": data.test}
    true = {split: (images.labels == 1).sum(axis=0).tolist() for split, images in parts.items()}
    yield f"images: train {len(data.train):,}, test {len(data.test):,}"
    each = [f"{a.name} {n:,} | {m:,}" for a, n, m in zip(data.attributes, *true.values())]
    more = f", and {len(each) - 40} more" if len(each) > 40 else ""
    yield f"{len(each)} attributes, true images train | test: {', '.join(each[:40])}{more}"
    for split, images in parts.items():
        absent = [a.name for a, n in zip(data.attributes, true[split]) if not n and len(images)]
        if absent:
            yield f"{len(absent)} attributes are never true in {split}: {', '.join(absent[:10])}"
        if unknown := int((images.labels < 0).sum()):
            yield f"{unknown:,} labels of {split} are unknown: no loss, not scored"
