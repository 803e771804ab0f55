"""Images with attributes: VeRi-776's colours and types from its XML, or any table whose header names them."""

import hashlib
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.manifest import cell, check_first_exist, iterate_manifest
from datasets.path_list import PathList, printable
from datasets.train_items import TrainItems
from datasets.transforms import PadCropErase
from util.errors import InputError

UNKNOWN = -1
PUBLISHED = {"train": 37_778, "test": 11_579}  # images of VeRi-776
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
    path: str | Path,
    format: str = "auto",
    *,
    binary: list[str] | None = None,
    categorical: list[str] | None = None,
    test_split: str = "test",
    known: tuple[Attribute, ...] | None = None,
    need_train: bool = True,
) -> AttributeData:
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
        InputError: nothing there, a list that is missing or damaged, a label that is none, images that are
            listed but not there, other attributes than `known`.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"--data_path {path} does not exist: give the folder of VeRi-776, or a table")
    if format == "auto":
        format = "veri776" if path.is_dir() else "table"
    if format == "veri776":
        if binary or categorical:
            raise InputError(
                f"--attr_columns and --attr_categories name columns of a table, and {path} is read as "
                "VeRi-776: drop them"
            )
        data = _read_veri(path, need_train)
        if known is not None and known != VERI:
            some = ", ".join(a.name for a in known[:4]) + (" ..." if len(known) > 4 else "")
            raise InputError(f"the model knows {some}, not VeRi-776's colours and types, as in {path}")
    else:
        data = _read_table(path, binary, categorical, test_split, known, need_train)
    for images in (data.train, data.test):
        if len(images):
            check_first_exist(images.paths, path)
            if (images.labels < 0).all():
                raise InputError(
                    f"{path}: not one label of {len(images)} listed images is known, e.g. of "
                    f"{images.paths.relative(0)}: colorID and typeID of VeRi-776's XML, or columns of the "
                    "table, are missing or empty"
                )
    return replace(data, notes=[*data.notes, *_describe(data)])


def _read_veri(root: Path, need_train: bool) -> AttributeData:
    parts, vehicles, notes = {}, {}, []
    for split, (name, folder) in VERI_FILES.items():
        file = root / name
        if split == "train" and not need_train and not file.is_file():
            parts[split] = AttributeImages(PathList(root, []), np.zeros((0, len(VERI)), np.int8))
            continue
        if not file.is_file():
            raise InputError(f"{file} is missing: give the folder of VeRi-776, or a table")
        parts[split], vehicles[split], found = _read_veri_xml(file, folder)
        notes += found
    both = set.intersection(*vehicles.values()) if len(vehicles) == 2 else ()
    if both:
        notes.append(f"{len(both)} vehicles are in both splits, e.g. {min(both)}")
    counts = {split: len(images) for split, images in parts.items() if len(images)}
    other = [f"{k} {n:,} instead of {PUBLISHED[k]:,}" for k, n in counts.items() if n != PUBLISHED[k]]
    notes.append(f"other counts than published: {', '.join(other)}" if other else "all counts as published")
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
    notes, declared = [], next((items.get("number") for items in root.iter("Items")), None)
    if declared is not None and declared.strip() != str(len(rows)):
        notes.append(f"{file} holds {len(rows):,} items and says {declared}")
    place = file.parent / folder
    here = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
    missing = [name for name in rows if name not in here]
    if missing:
        notes.append(f"{len(missing):,} of the {len(rows):,} images of {file} are not in {place}, e.g. {missing[0]}")
    unlisted = sum(name.lower().endswith(".jpg") and name not in rows for name in here)
    if unlisted:
        notes.append(f"{unlisted:,} images of {place} have no item in {file.name} and are not used")
    labels = np.array(list(rows.values()), dtype=np.int8)
    paths = PathList(file.parent, (f"{folder}/{name}" for name in rows))
    return AttributeImages(paths, labels), vehicles - {None}, notes


def veri_xml(file: Path) -> ET.Element:
    """The root of one of VeRi-776's label files. They declare gb2312, which ElementTree refuses, so they are decoded
    first."""
    try:
        return ET.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", file.read_text(encoding="gb18030")))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not GB18030 text (byte {error.start}): copy it again") from error
    except ET.ParseError as error:
        line = error.position[0]
        raise InputError(f"{file}, line {line} is not well-formed XML ({error}): copy it again") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def veri_code(file: Path, item: ET.Element, key: str, known: Collection[int]) -> int | None:
    """colorID or typeID of an item, None where it has none; InputError where it is not among the known."""
    code = item.get(key)
    if code is None:
        return None
    if not code.strip().isdecimal() or int(code) not in known:
        raise InputError(f"{file}: {item.get('imageName')} has {key} '{code}', known are {min(known)} to {max(known)}")
    return int(code)


def _read_table(
    file: Path, binary: list[str] | None, categorical: list[str] | None, test_split: str,
    known: tuple[Attribute, ...] | None, need_train: bool,
) -> AttributeData:  # fmt: skip
    if known is not None:
        categorical = list(dict.fromkeys(a.column for a in known if a.value))
        binary = [a.column for a in known if not a.value]
    splits: Counter[str] = Counter()
    rows: dict[str, list[tuple[str, list[str]]]] = {"train": [], "test": []}
    columns: list[str] = []
    for number, row in enumerate(iterate_manifest(file), 1):
        if number == 1:
            binary, categorical = _columns_of(file, list(row), binary, categorical)
            columns = [*binary, *categorical]
        if None in row or (None in row.values() and file.suffix.lower() != ".jsonl"):
            raise InputError(f"{file}, row {number} has another number of fields than the first line")
        split = cell(row, "split")
        splits[split] += 1
        if split in ("train", test_split):
            where = "train" if split == "train" else "test"
            rows[where].append((row["path"], [cell(row, name) for name in columns]))
    _check_splits(file, splits, test_split, need_train)
    attributes = known or (*map(Attribute, binary), *_values(file, rows, categorical, len(binary)))
    if not attributes:
        raise InputError(f"{file} names no attribute: give --attr_columns or --attr_categories")
    parts = {
        split: AttributeImages(
            PathList(file.parent, (path for path, _ in listed)),
            np.array(list(_labels(file, listed, columns, attributes)), np.int8).reshape(-1, len(attributes)),
        )
        for split, listed in rows.items()
    }
    notes = []
    others = {split: n for split, n in splits.items() if split not in ("train", test_split)}
    if others:
        told = ", ".join(f"{n:,} of split '{split}'" for split, n in others.items())
        notes.append(f"rows that are not used: {told}")
    both = {path for path, _ in rows["train"]} & {path for path, _ in rows["test"]}
    if both:
        notes.append(f"{len(both):,} images are in train and in {test_split}, e.g. {printable(min(both))}")
    return AttributeData("table", tuple(attributes), parts["train"], parts["test"], notes)


def _columns_of(
    file: Path, header: list[str], binary: list[str] | None, categorical: list[str] | None
) -> tuple[list[str], list[str]]:
    """The columns of 0 and 1, and those of words; InputError where the header lacks one."""
    categorical = categorical or []
    if binary is None:
        binary = [] if categorical else [name for name in header if name and name not in NOT_ATTRIBUTES]
    for name in ("split", *binary, *categorical):
        if name not in header:
            raise InputError(f"{file} has no column '{name}': it has {', '.join(map(str, header))}")
    named = [*binary, *categorical]
    twice = next((name for name in named if named.count(name) > 1 or name in NOT_ATTRIBUTES), None)
    if twice is not None:
        raise InputError(f"column '{twice}' of {file} cannot be an attribute here, or not twice: name it once")
    return binary, categorical


def _check_splits(file: Path, splits: Counter, test_split: str, need_train: bool) -> None:
    for name in ("train", test_split) if need_train else (test_split,):
        if not splits[name]:
            found = ", ".join(f"'{split}'" for split in splits if splits[split])
            flag = "" if name == "train" else "; choose one with --attr_split"
            raise InputError(f"{file} has no row with split '{name}': it has {found}{flag}")
    if test_split == "train":
        raise InputError("--attr_split train would test on what is trained on: name another split")


def _values(file: Path, rows: dict, categorical: list[str], first: int) -> Iterator[Attribute]:
    """The values of the columns of words, in both splits: one that training never shows counts as missed."""
    for place, column in enumerate(categorical, first):
        values = sorted({texts[place] for listed in rows.values() for _, texts in listed} - {""})
        if not 2 <= len(values) <= MOST_VALUES:
            raise InputError(
                f"column '{column}' of {file} holds {len(values):,} different words, where 2 to "
                f"{MOST_VALUES:,} can be told apart: leave it out of --attr_categories"
            )
        yield from (Attribute(column, value) for value in values)


def _labels(
    file: Path, listed: list[tuple[str, list[str]]], columns: list[str], attributes: tuple[Attribute, ...]
) -> Iterator[list[int]]:
    """Labels row by row; an empty cell is unknown."""
    place = {name: i for i, name in enumerate(columns)}
    values = {a.column: {b.value for b in attributes if b.column == a.column} for a in attributes if a.value}
    for path, texts in listed:
        row = []
        for column, value in attributes:
            text = texts[place[column]]
            if value:
                if text and text not in values[column]:
                    raise InputError(
                        f"{file}: {printable(path)} has {column} '{text}', and the model knows "
                        f"{', '.join(sorted(values[column])[:8])}: correct it, or drop the row"
                    )
                row.append(int(text == value) if text else UNKNOWN)
            elif text.lower() in YES_NO:
                row.append(YES_NO[text.lower()])
            else:
                raise InputError(
                    f"{file}: {printable(path)} has {column} '{text[:40]}', not 0, 1 or nothing: name the "
                    f"columns of 0 and 1 with --attr_columns, or this one of words with --attr_categories"
                )
        if max(row) == min(row) == UNKNOWN:
            raise InputError(f"{file}: of {printable(path)} no attribute is known: fill one in, or drop the row")
        yield row


def _describe(data: AttributeData) -> list[str]:
    """Counts, and attributes that a split never shows."""
    parts = {"train": data.train, "test": data.test}
    notes = [f"images: {', '.join(f'{split} {len(images):,}' for split, images in parts.items())}"]
    positives = [(images.labels == 1).sum(axis=0).tolist() for images in parts.values()]
    each = [f"{a.name} {n:,} | {m:,}" for a, n, m in zip(data.attributes, *positives)]
    more = f", and {len(each) - 40} more" if len(each) > 40 else ""
    notes.append(f"{len(each)} attributes, true images train | test: {', '.join(each[:40])}{more}")
    for split, images in parts.items():
        if not len(images):
            continue
        absent = [a.name for a, n in zip(data.attributes, (images.labels == 1).sum(axis=0)) if not n]
        if absent:
            notes.append(f"{len(absent)} attributes are never true in {split}: {', '.join(absent[:10])}")
        unknown = int((images.labels < 0).sum())
        if unknown:
            notes.append(f"{unknown:,} labels of {split} are unknown: no loss, not scored")
        without = int(((images.labels == 1).sum(axis=1) == 0).sum())
        if without:
            said = "their accuracy and F1 are 0, as in the published code"
            notes.append(f"{without:,} images of {split} have no true attribute: {said}")
    return notes
