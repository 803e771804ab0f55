"""Images with attributes: VeRi-776's colours and types from its XML, or any table whose header names them."""

import hashlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.items import TrainItems
from datasets.manifest import check_first_exist
from datasets.path_list import PathList, printable
from datasets.tables import cell, iterate_table, published_note
from datasets.transforms import PadCropErase
from util.errors import InputError

UNKNOWN = -1
VERI_FILES = {"train": ("train_label.xml", "image_train"), "test": ("test_label.xml", "image_test")}
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
VERI = (
    *(Attribute("colour", name) for name in VERI_COLOURS), *(Attribute("type", name) for name in VERI_TYPES),
)  # fmt: skip


@dataclass(frozen=True)
class AttributeImages:
    """paths; labels: [n, A] int8, 1 true, 0 not, -1 unknown."""

    paths: PathList
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def rates(self) -> np.ndarray:
        """[A] float64 share of true images among the known; 0 where none is known."""
        return (self.labels == 1).sum(axis=0) / np.maximum((self.labels >= 0).sum(axis=0), 1)


@dataclass(frozen=True)
class AttributeData:
    """One set. name: veri776 or table. notes: what was found, one sentence each, for the run's header."""

    name: str
    attributes: tuple[Attribute, ...]
    train: AttributeImages
    test: AttributeImages
    notes: list[str] = field(default_factory=list)

    def sha256(self) -> str:
        """Identity of what is trained on: paths, order, attributes and labels."""
        digest = hashlib.sha256(self.train.paths.sha256().encode())
        digest.update("\n".join(attribute.name for attribute in self.attributes).encode())
        digest.update(np.ascontiguousarray(self.train.labels).tobytes())
        return digest.hexdigest()


class AttributeTrainImages(TrainItems):
    """Item (epoch, index) -> imgs [3, H, W] uint8, labels [A] int64, problem."""

    def __init__(self, images: AttributeImages, augment: PadCropErase, seed: int):
        super().__init__(images.paths, augment.size, seed)
        self.images, self.augment = images, augment

    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        labels = torch.from_numpy(self.images.labels[index].astype(np.int64))
        return {"imgs": self.augment(content, rng)["imgs"], "labels": labels}


def read_attribute_set(
    path: str | Path, format: str = "auto", *, binary: list[str] | None = None, categorical: list[str] | None = None,
    test_split: str = "test", known: tuple[Attribute, ...] | None = None, need_train: bool = True,
) -> AttributeData:  # fmt: skip
    """Read a set and check it.

    Args:
        path: folder of VeRi-776, or a table (.csv .tsv .jsonl).
        format: veri776, table, or auto: a folder is VeRi-776.
        binary: columns of 0 and 1 of a table; None: all but path, split and the `categorical` ones.
        categorical: columns of words of a table; each value becomes an attribute, in sorted order.
        test_split: value of the column split that is tested on.
        known: the attributes of a trained model; then only these, in their order.
        need_train: False: the part to train on may be missing.
    Raises:
        InputError: nothing there, a list that is missing or damaged, a label that is none, images that are listed but
            not there, other attributes than `known`.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"--data_path {path} does not exist: give the folder of VeRi-776, or a table")
    if format == "veri776" or (format == "auto" and path.is_dir()):
        if binary or categorical:
            raise InputError(
                f"--attr_columns and --attr_categories name columns of a table, {path} is read as VeRi-776: drop them"
            )
        if known not in (None, VERI):
            some = ", ".join(a.name for a in known[:4]) + (" ..." if len(known) > 4 else "")
            raise InputError(f"the model knows {some}, not VeRi-776's colours and types, as in {path}")
        data = _read_veri(path, need_train)
    else:
        if known is not None:
            categorical = list(dict.fromkeys(a.column for a in known if a.value))
            binary = [a.column for a in known if not a.value]
        data = _read_table(path, binary, categorical or [], test_split, known, need_train)
    for images in (data.train, data.test):
        if len(images):
            check_first_exist(images.paths, path)
            if (images.labels < 0).all():
                raise InputError(
                    f"{path}: not one label of {len(images)} listed images is known, e.g. of "
                    f"{images.paths.relative(0)}: colorID and typeID of VeRi-776's XML, or columns of the table, are "
                    "missing or empty"
                )
    return replace(data, notes=[*data.notes, *_describe(data)])


def _read_veri(root: Path, need_train: bool) -> AttributeData:
    parts, vehicles, notes = {}, [], []
    for split, (name, folder) in VERI_FILES.items():
        file = root / name
        if file.is_file():
            parts[split], found, said = _read_veri_xml(file, folder)
            vehicles.append(found)
            notes += said
        elif split == "train" and not need_train:
            parts[split] = AttributeImages(PathList(root, []), np.zeros((0, len(VERI)), np.int8))
        else:
            raise InputError(f"{file} is missing: give the folder of VeRi-776, or a table")
    both = set.intersection(*vehicles) if len(vehicles) == 2 else ()
    if both:
        notes.append(f"{len(both)} vehicles are in both splits, e.g. {min(both)}")
    counts = {split: len(images) for split, images in parts.items() if len(images)}
    notes.append(published_note(counts, "veri776"))
    return AttributeData("veri776", VERI, parts["train"], parts["test"], notes)


def _read_veri_xml(file: Path, folder: str) -> tuple[AttributeImages, set[str], list[str]]:
    """(images, vehicles, notes) of one of the two label files; the images lie in `folder` beside it."""
    root = veri_xml(file)
    codes = {"colorID": range(1, len(VERI_COLOURS) + 1), "typeID": range(1, len(VERI_TYPES) + 1)}
    rows: dict[str, list[int]] = {}
    vehicles = set()
    for item in root.iter("Item"):
        name = (item.get("imageName") or "").strip()
        if not name or name in rows:
            what = "a repeated" if name else "no"
            raise InputError(f"{file}: item {len(rows) + 1} has {what} imageName {name}: copy it again")
        rows[name] = []
        for key, known in codes.items():
            code = veri_code(file, item, key, known)
            rows[name] += [UNKNOWN if code is None else int(code == k) for k in known]
        vehicles.add(item.get("vehicleID"))
    if not rows:
        raise InputError(f"{file} holds no <Item>: copy it again")
    notes = []
    place = file.parent / folder
    here = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
    missing = [name for name in rows if name not in here]
    if missing:
        notes.append(f"{len(missing):,} of the {len(rows):,} images of {file} are not in {place}, e.g. {missing[0]}")
    unlisted = sum(name.lower().endswith(".jpg") and name not in rows for name in here)
    if unlisted:
        notes.append(f"{unlisted:,} images of {place} have no item in {file.name} and are not used")
    paths = PathList(file.parent, (f"{folder}/{name}" for name in rows))
    return AttributeImages(paths, np.array(list(rows.values()), dtype=np.int8)), vehicles - {None}, notes


def veri_xml(file: Path) -> ET.Element:
    """The root of one of VeRi-776's label files. They declare gb2312, which ElementTree refuses, so they are decoded
    first."""
    try:
        return ET.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", file.read_text(encoding="gb18030")))
    except (UnicodeDecodeError, ET.ParseError, OSError) as error:
        raise InputError(f"{file} cannot be read as XML ({error}): copy it again") from error


def veri_code(file: Path, item: ET.Element, key: str, known: Collection[int]) -> int | None:
    """colorID or typeID of an item, None where it has none; InputError where it is not among the known."""
    code = item.get(key)
    if code is None:
        return None
    if not code.strip().isdecimal() or int(code) not in known:
        raise InputError(f"{file}: {item.get('imageName')} has {key} '{code}', known are {min(known)} to {max(known)}")
    return int(code)


def _read_table(
    file: Path, binary: list[str] | None, categorical: list[str], test_split: str,
    known: tuple[Attribute, ...] | None, need_train: bool,
) -> AttributeData:  # fmt: skip
    rows: dict[str, list[tuple[str, list[str]]]] = {}  # split -> (path, cells of the columns)
    for number, row in enumerate(iterate_table(file), 1):
        if number == 1:
            binary = _check_columns(file, list(row), binary, categorical)
        cells = [cell(row, name) for name in (*binary, *categorical)]
        rows.setdefault(cell(row, "split"), []).append((row["path"], cells))
    for name in ("train", test_split) if need_train else (test_split,):
        if name not in rows:
            found = ", ".join(f"'{split}'" for split in rows)
            flag = "" if name == "train" else "; choose one with --attr_split"
            raise InputError(f"{file} has no row with split '{name}': it has {found}{flag}")
    if test_split == "train":
        raise InputError("--attr_split train would test on what is trained on: name another split")
    train, test = rows.pop("train", []), rows.pop(test_split)
    notes = []
    if rows:
        told = ", ".join(f"{len(part):,} of split '{split}'" for split, part in rows.items())
        notes.append(f"rows that are not used: {told}")
    both = {path for path, _ in train} & {path for path, _ in test}
    if both:
        notes.append(f"{len(both):,} images are in train and in {test_split}, e.g. {printable(min(both))}")
    attributes = known or (*map(Attribute, binary), *_values(file, [*train, *test], categorical, len(binary)))
    if not attributes:
        raise InputError(f"{file} names no attribute: give --attr_columns or --attr_categories")
    parts = (_images(file, part, [*binary, *categorical], attributes) for part in (train, test))
    return AttributeData("table", tuple(attributes), *parts, notes)


def _check_columns(file: Path, header: list[str], binary: list[str] | None, categorical: list[str]) -> list[str]:
    """The columns of 0 and 1; InputError where the header lacks one."""
    if binary is None:
        binary = [] if categorical else [name for name in header if name and name not in NOT_ATTRIBUTES]
    named = [*binary, *categorical]
    for name in ("split", *named):
        if name not in header:
            raise InputError(f"{file} has no column '{name}': it has {', '.join(map(str, header))}")
        if named.count(name) > 1 or (name in named and name in NOT_ATTRIBUTES):
            raise InputError(f"column '{name}' of {file} cannot be an attribute here, or not twice: name it once")
    return binary


def _values(file: Path, rows: list[tuple[str, list[str]]], categorical: list[str], first: int) -> Iterator[Attribute]:
    """The values of the columns of words, in both splits: one that training never shows counts as missed."""
    for place, column in enumerate(categorical, first):
        values = sorted({cells[place] for _, cells in rows} - {""})
        if not 2 <= len(values) <= MOST_VALUES:
            raise InputError(
                f"column '{column}' of {file} holds {len(values):,} different words, where 2 to {MOST_VALUES:,} can be "
                "told apart: leave it out of --attr_categories"
            )
        yield from (Attribute(column, value) for value in values)


def _images(
    file: Path, rows: list[tuple[str, list[str]]], columns: list[str], attributes: tuple[Attribute, ...]
) -> AttributeImages:
    """Labels of the rows; an empty cell is unknown."""
    labels = np.full((len(rows), len(attributes)), UNKNOWN, dtype=np.int8)
    for place, column in enumerate(columns):
        mine = [i for i, a in enumerate(attributes) if a.column == column]
        words = [attributes[i].value for i in mine]
        for row, (path, cells) in enumerate(rows):
            text = cells[place]
            if words == [""] and text.lower() in YES_NO:
                labels[row, mine] = YES_NO[text.lower()]
            elif words == [""]:
                raise InputError(
                    f"{file}: {printable(path)} has {column} '{text[:40]}', not 0, 1 or nothing: name the columns of 0 "
                    "and 1 with --attr_columns, or this one of words with --attr_categories"
                )
            elif text in words:
                labels[row, mine] = [text == word for word in words]
            elif text:
                raise InputError(
                    f"{file}: {printable(path)} has {column} '{text}', and the model knows {', '.join(words[:8])}: "
                    "correct it, or drop the row"
                )
    empty = np.flatnonzero((labels == UNKNOWN).all(axis=1))
    if len(empty):
        path = printable(rows[empty[0]][0])
        raise InputError(f"{file}: of {path} no attribute is known: fill one in, or drop the row")
    return AttributeImages(PathList(file.parent, (path for path, _ in rows)), labels)


def _describe(data: AttributeData) -> list[str]:
    """Counts, and attributes that a split never shows."""
    parts = {"train": data.train, "test": data.test}
    notes = [f"images: {', '.join(f'{split} {len(images):,}' for split, images in parts.items())}"]
    positives = {split: (images.labels == 1).sum(axis=0).tolist() for split, images in parts.items()}
    each = [f"{a.name} {n:,} | {m:,}" for a, n, m in zip(data.attributes, *positives.values())]
    more = f", and {len(each) - 40} more" if len(each) > 40 else ""
    notes.append(f"{len(each)} attributes, true images train | test: {', '.join(each[:40])}{more}")
    for split, images in parts.items():
        if not len(images):
            continue
        if absent := [a.name for a, n in zip(data.attributes, positives[split]) if not n]:
            notes.append(f"{len(absent)} attributes are never true in {split}: {', '.join(absent[:10])}")
        if unknown := int((images.labels < 0).sum()):
            notes.append(f"{unknown:,} labels of {split} are unknown: no loss, not scored")
        if without := int((~(images.labels == 1).any(axis=1)).sum()):
            said = "their accuracy and F1 are 0, as in the published code"
            notes.append(f"{without:,} images of {split} have no true attribute: {said}")
    return notes
