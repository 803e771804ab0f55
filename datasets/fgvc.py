"""Images with a class: StanfordCars from its devkit, a tree of folders, or a table; what MATLAB files hold."""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datasets.images import boxed, read_bytes
from datasets.items import Labelled
from datasets.path_list import PathList, check_boxes, list_folder
from datasets.tables import PUBLISHED, cell, iterate_table, published_note, split_folder
from util.errors import InputError

TRAIN, TEST, ANNOS = "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat", "cars_annos.mat"
MAX_BYTES = 64 * 2**20  # of a MATLAB file, unpacked


@dataclass(frozen=True)
class FgvcImages(Labelled):
    """labels: [n] int64 classes."""

    labels: np.ndarray


@dataclass(frozen=True)
class FgvcData:
    """name: which kind of set. train: empty where it was not asked for. classes: by label. notes: for the header."""

    name: str
    train: FgvcImages
    test: FgvcImages
    classes: list[str]
    notes: list[str]

    def sha256(self) -> str:
        """Identity of the training images, of all labels and of their names."""
        return self.train.sha256(*self.classes)


def read_fgvc(data_path: str | Path, label_column: str = "label", need_train: bool = True) -> FgvcData:
    """StanfordCars (a folder, or its `car/` or `stanford_cars/`, with `devkit/cars_train_annos.mat` and
    `cars_test_annos_withlabels.mat`, or with `cars_annos.mat`); any other folder with `train/CLASS/...`, and
    `test/CLASS/...` or `val/CLASS/...`; a table (.csv, .tsv, .jsonl) with `path`, `split` and `label_column`."""
    data_path = Path(data_path)
    for folder in (data_path, data_path / "car", data_path / "stanford_cars"):
        if any((folder / name).is_file() for name in (TRAIN, TEST, ANNOS)):
            return _with_notes(_read_cars(folder, need_train))
    found = list_labelled(data_path, label_column, ("test", "val"), need_train)
    test = "test" if "test" in found.splits else "val"
    notes = [] if test == "test" else ["there is no split test: scores are of split val"]
    if found.unlabelled:
        notes.append(f"{found.unlabelled} rows have no '{label_column}' and are left out")
    if unused := len(found.labels) - sum(map(len, found.splits.values())) - found.unlabelled:
        notes.append(f"{unused} rows of other splits than train and {test} are not used")
    every, name = FgvcImages(found.paths, found.labels), "folder" if data_path.is_dir() else "table"
    train, test = every.take(found.splits["train"][: None if need_train else 0]), every.take(found.splits[test])
    return _with_notes(FgvcData(name, train, test, found.classes, notes))


def _with_notes(data: FgvcData) -> FgvcData:
    """Counts, beside the published ones where there are any, and classes that a split lacks."""
    counts = {"training images": len(data.train), "test images": len(data.test), "classes": len(data.classes)}
    notes = [", ".join(f"{count:,} {what}" for what, count in counts.items()), *data.notes]
    if data.name in PUBLISHED:
        notes[0] += "; " + published_note({what: count for what, count in counts.items() if count}, data.name)
    for what, part in (("training", data.train), ("test", data.test)):
        absent = [data.classes[i] for i in np.setdiff1d(np.arange(len(data.classes)), part.labels)]
        if absent and len(part):
            first = ", ".join(absent[:3]) + " ..." * (len(absent) > 3)
            notes.append(f"{len(absent)} classes have no {what} image: {first}")
    return replace(data, notes=notes)


def renumber_classes(data: FgvcData, classes: list[str], file: str | Path) -> FgvcData:
    """The set with its labels numbered as a trained model has learned them; InputError where it lacks one."""
    number = {name: i for i, name in enumerate(classes)}
    new = np.array([number.get(name, -1) for name in data.classes])
    if len(unknown := data.test.labels[new[data.test.labels] < 0]):
        what = f"{len(classes)} classes ({', '.join(classes)[:60]} ...), not '{data.classes[unknown[0]]}'"
        raise InputError(f"{file} knows {what} of {len(unknown)} test images: score it on a set with its own classes")
    train, test = (replace(part, labels=new[part.labels]) for part in (data.train, data.test))
    return replace(data, train=train, test=test, classes=classes)


def _read_cars(folder: Path, need_train: bool) -> FgvcData:
    """StanfordCars as TransFG (`car/`) and torchvision (`stanford_cars/`) want it, or as one `cars_annos.mat`."""
    is_devkit = (folder / TRAIN).is_file() or (folder / TEST).is_file()
    meta = folder / ("devkit/cars_meta.mat" if is_devkit else ANNOS)
    classes = [name or f"class {i}" for i, name in enumerate(read_cell_strings(meta, "class_names"), 1)]
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    if is_devkit:
        test = next((file for file in (folder / TEST, folder / "devkit" / TEST) if file.is_file()), None)
        if test is None:
            raise InputError(f"{folder} lacks {TEST}: cars_test_annos.mat holds no classes, get the one with labels")
        for split, file in {"train": folder / TRAIN, "test": test}.items() if need_train else [("test", test)]:
            found = _annotations(file, {"fname": str, "class": int}, folder / f"cars_{split}", len(classes))
            rows[split] = [(f"cars_{split}/{name}", label) for name, label in found]
    else:
        found = _annotations(meta, {"relative_im_path": str, "class": int, "test": int}, folder, len(classes))
        if {is_test for *_, is_test in found} != {0, 1}:
            raise InputError(f"{meta}: field 'test' must be 0 (train) or 1 (test), both of them present")
        for name, label, is_test in found:
            rows["test" if is_test else "train"].append((name, label))
    parts = []
    for part in rows.values():
        names, labels = zip(*part) if part else ((), ())
        parts.append(FgvcImages(PathList(folder, names), np.array(labels, np.int64) - 1))
    return FgvcData("StanfordCars", *parts, classes, [])


def _annotations(file: Path, fields: dict[str, type], folder: Path, count: int) -> list[tuple]:
    """The struct array `annotations`, read by the names of its fields, as str or int (a Python int: 0 - 1 would be 255
    in the file's own uint8). Images, the first field, must lie in `folder`, classes be 1..count."""
    found, rows = read_struct_array(file, "annotations"), []
    if not found:
        raise InputError(f"{file} lists no image: copy it again")
    if missing := [name for name in fields if name not in found[0]]:
        has = f"its fields are {', '.join(found[0])}, expected {', '.join(fields)}"
        raise InputError(f"{file} has no field '{missing[0]}': {has}")
    for number, row in enumerate(found, 1):
        for field, kind in fields.items():
            value = row[field]
            if not isinstance(value, str if kind is str else int | float) or kind(value) != value:
                what = "a file name" if kind is str else "one whole number"
                raise InputError(f"{file}, annotation {number}: '{field}' is {value!r}, expected {what}")
        if not 1 <= row["class"] <= count:
            raise InputError(f"{file}, annotation {number}: class {row['class']} is outside 1..{count}")
        rows.append(tuple(kind(row[field]) for field, kind in fields.items()))
    if missing := [name for name, *_ in rows if not (folder / name).is_file()]:
        what = f"{len(missing)} of the {len(rows)} images of {file} do not exist, first {folder / missing[0]}"
        raise InputError(f"{what}: copies with other file names do not go with these annotations")
    return rows


@dataclass(frozen=True)
class LabelledImages:
    """labels: [n] int64 numbers of `classes`; -1: none. splits: rows of each that have a class; unlabelled: how many
    have none and are left out."""

    paths: PathList
    labels: np.ndarray
    classes: list[str]
    splits: dict[str, np.ndarray]
    unlabelled: int = 0


def list_labelled(
    data_path: str | Path, label_column: str = "label", held_out: tuple[str, ...] = ("val",), need_train: bool = True
) -> LabelledImages:
    """A table (.csv, .tsv, .jsonl with `path`, `split` and `label_column`) or a folder with `train/CLASS/...` and
    `val/CLASS/...`. held_out: names of the split to test on; the first that is there is read."""
    data_path = Path(data_path)
    if data_path.is_dir():
        rows, root = list(_folder_rows(data_path, held_out, need_train)), data_path
    else:
        needed, advice = ("split", label_column), "; --label_column chooses the labels"
        listed, root = iterate_table(data_path, needed, advice), data_path.parent
        rows = [(boxed(r["path"], r.get("box")), cell(r, "split"), cell(r, label_column)) for r in listed]
    files, split, named = zip(*rows)
    check_boxes(paths := PathList(root, files), data_path)
    classes, split = sorted(set(named) - {""}), np.array(split)
    if len(classes) < 2:
        raise InputError(f"{data_path}: all rows have the same '{label_column}', nothing to tell apart")
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(name, -1) for name in named], dtype=np.int64)
    test = next((name for name in held_out if name in split), held_out[0])
    splits = {name: np.flatnonzero((split == name) & (labels >= 0)) for name in ("train", test)}
    for name, found in splits.items():
        if not len(found) and (need_train or name == test):
            has = ", ".join(sorted(set(split)))
            raise InputError(f"{data_path} has no row with split '{name}' and a '{label_column}': it has {has}")
    unlabelled = int((np.isin(split, list(splits)) & (labels < 0)).sum())
    return LabelledImages(paths, labels, classes, splits, unlabelled)


def _folder_rows(folder: Path, held_out: tuple[str, ...], need_train: bool) -> Iterator[tuple[str, str, str]]:
    """(path, split, class) of the images of a tree."""
    test = next((name for name in held_out if split_folder(folder, name).is_dir()), held_out[0])
    for split in ("train", test):
        place = split_folder(folder, split)
        if place.is_dir():
            paths = list_folder(place)
            for relative in (Path(paths.relative(index)) for index in range(len(paths))):
                if len(relative.parts) < 2:
                    raise InputError(f"{place / relative} lies in no class folder")
                yield f"{place.name}/{relative}", split, relative.parts[0]
        elif split == test or need_train:
            raise InputError(f"{folder} has no folder {split}/: an ImageFolder needs train/ and {test}/")


def read_cell_strings(file: str | Path, variable: str) -> list[str | None]:
    """A cell array of a MATLAB file in column-major order, None for what is no text; an only one whatever its name."""
    arrays = _load_mat(file)
    cells = [name for name, value in arrays.items() if value.dtype == object and value.dtype.names is None]
    if variable not in cells and len(cells) != 1:
        raise InputError(f"{file} has no cell array '{variable}': it holds {', '.join(arrays) or 'nothing'}")
    values = map(_value, arrays[variable if variable in cells else cells[0]].ravel(order="F"))
    return [value if isinstance(value, str) else None for value in values]


def read_struct_array(file: str | Path, variable: str) -> list[dict]:
    """The fields of each element of a MATLAB file's struct array: a text, a number, or None (matrices, empty)."""
    found = _load_mat(file).get(variable)
    if found is None or found.dtype.names is None:
        raise InputError(f"{file} has no struct array '{variable}'")
    return [dict(zip(found.dtype.names, map(_value, row))) for row in found.ravel(order="F").tolist()]


def _load_mat(file: str | Path) -> dict[str, np.ndarray]:
    """The variables of a file of version 5 to 7.2."""
    from scipy.io import loadmat, whosmat  # here and not above: most sets need no scipy

    try:
        data = read_bytes(file)
        if max(len(data), _unpacked_size(data)) > MAX_BYTES or any(math.prod(x[1]) > MAX_BYTES for x in whosmat(file)):
            raise InputError(f"larger than {MAX_BYTES:,} bytes, as no file of annotations is")
        return {name: value for name, value in loadmat(io.BytesIO(data)).items() if not name.startswith("__")}
    except Exception as error:  # scipy lets errors of many kinds pass
        cure = "copy it again; version 7.3 is another format: save it with -v7, or write its names to a .txt"
        raise InputError(f"{file} cannot be read ({error}): {cure}") from error


def _unpacked_size(data: bytes) -> int:
    """Bytes of the compressed variables of a file of version 5, as far as MAX_BYTES."""
    order, position, size = "<" if data[126:128] == b"IM" else ">", 128, 0
    while position + 8 <= len(data) and size <= MAX_BYTES:
        kind, length = struct.unpack_from(f"{order}II", data, position)
        if kind == 15:  # miCOMPRESSED
            body = data[position + 8 : position + 8 + length]
            size += len(zlib.decompressobj().decompress(body, MAX_BYTES + 1))
        position += 8 + length
    return size


def _value(array: np.ndarray) -> str | int | float | None:
    """A text or a single number; None for all else."""
    if array.dtype.kind == "U":
        return (array[0].strip() or None) if array.shape == (1,) else None
    return array.item() if array.size == 1 and array.dtype.kind in "biuf" else None
