"""Images of fine-grained classes: StanfordCars from its devkit, an ImageFolder tree, or a table."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.items import TrainItems
from datasets.labelled import list_labelled
from datasets.manifest import published_note
from datasets.matfile import read_cell_strings, read_struct_array
from datasets.path_list import PathList
from datasets.transforms import CropFlipAugment
from util.errors import InputError

BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
DEVKIT_FIELDS = (*BOX, "class", "fname")
ANNOS_FIELDS = ("relative_im_path", *BOX, "class", "test")
PUBLISHED = {"training images": 8144, "test images": 8041, "classes": 196}
TRAIN, TEST = "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"


@dataclass(frozen=True)
class FgvcImages:
    """Images and their classes: labels [n] int64."""

    paths: PathList
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "FgvcImages":
        """Some of the images, in the order of `rows`."""
        return FgvcImages(self.paths.take(rows), self.labels[rows])


@dataclass(frozen=True)
class FgvcData:
    """name: which kind of set. train is empty where it was not asked for. classes: names by label. notes:
    what to print about it."""

    name: str
    train: FgvcImages
    test: FgvcImages
    classes: list[str]
    notes: list[str]

    def sha256(self) -> str:
        """Identity of the training images, of all labels and of their names."""
        digest = hashlib.sha256((self.train.paths.sha256() + "\0".join(self.classes)).encode())
        digest.update(self.train.labels.tobytes())
        return digest.hexdigest()


def read_fgvc(data_path: str | Path, label_column: str = "label", need_train: bool = True) -> FgvcData:
    """A set by what lies at `data_path`:

    - a folder, or its `car/` or `stanford_cars/`, with `devkit/cars_train_annos.mat` and
      `cars_test_annos_withlabels.mat`, or with `cars_annos.mat`: StanfordCars;
    - any other folder: `train/CLASS/...` and `test/CLASS/...` or `val/CLASS/...`;
    - a table (.csv, .tsv, .jsonl) with `path`, `split` (train, and test or val) and `label_column`.

    Args:
        need_train: whether the training split must be there.
    Raises:
        InputError: one sentence on what is missing or wrong, with file and row.
    """
    data_path = Path(data_path)
    for folder in (data_path, data_path / "car", data_path / "stanford_cars"):
        if (folder / TRAIN).is_file() or (folder / TEST).is_file():
            return _with_notes(_read_devkit(folder, need_train), is_cars=True)
        if (folder / "cars_annos.mat").is_file():
            return _with_notes(_read_annos(folder), is_cars=True)
    found = list_labelled(data_path, label_column, ("test", "val"), need_train)
    test = "test" if "test" in found.splits else "val"
    notes = [] if test == "test" else ["there is no split test: scores are of split val"]
    if found.unlabelled:
        notes.append(f"{found.unlabelled} rows have no '{label_column}' and are left out")
    if unused := len(found.labels) - sum(map(len, found.splits.values())) - found.unlabelled:
        notes.append(f"{unused} rows of other splits than train and {test} are not used")
    every = FgvcImages(found.paths, found.labels)
    train = every.take(found.splits["train"] if need_train else np.zeros(0, np.int64))
    name = "folder" if data_path.is_dir() else "table"
    return _with_notes(FgvcData(name, train, every.take(found.splits[test]), found.classes, notes), is_cars=False)


def renumber_classes(data: FgvcData, classes: list[str], file: str | Path) -> FgvcData:
    """The set with its labels numbered as a trained model has learned them.

    Raises:
        InputError: test images of a class that the model does not know.
    """
    if data.classes == classes:
        return data
    number = {name: i for i, name in enumerate(classes)}
    new = np.array([number.get(name, -1) for name in data.classes])
    unknown = data.test.labels[new[data.test.labels] < 0]
    if len(unknown):
        name = data.classes[unknown[0]]
        raise InputError(
            f"{file} knows {len(classes)} classes ({', '.join(classes)[:60]} ...), not '{name}' of "
            f"{len(unknown)} test images: score it on a set with its own classes"
        )
    train, test = (replace(part, labels=new[part.labels]) for part in (data.train, data.test))
    return replace(data, train=train, test=test, classes=classes)


def _read_devkit(folder: Path, need_train: bool) -> FgvcData:
    """StanfordCars as TransFG (`car/`) and torchvision (`stanford_cars/`) want it."""
    test_file = next((file for file in (folder / TEST, folder / "devkit" / TEST) if file.is_file()), None)
    if test_file is None:
        raise InputError(
            f"{folder} lacks {TEST}; devkit/cars_test_annos.mat holds no classes: get the file with labels"
        )
    notes: list[str] = []
    files = {"train": folder / TRAIN, "test": test_file}
    names, labels = {"train": [], "test": []}, {"train": [], "test": []}
    for split, file in files.items():
        if split == "train" and not need_train:
            continue
        rows = _rows(file, DEVKIT_FIELDS)
        names[split] = [f"cars_{split}/{name}" for name in _column(file, rows, "fname", str)]
        labels[split] = _column(file, rows, "class", int)
        _check_files(folder, names[split], file)
    meta = folder / "devkit" / "cars_meta.mat"
    classes = read_cell_strings(meta, "class_names") if meta.is_file() else None
    classes = _check_classes(classes, meta, [(files[split], labels[split]) for split in files], notes)
    parts = [_images(folder, names[split], labels[split]) for split in files]
    return FgvcData("StanfordCars", *parts, classes, notes)


def _read_annos(folder: Path) -> FgvcData:
    """StanfordCars as one `cars_annos.mat` beside `car_ims/`."""
    file, notes = folder / "cars_annos.mat", []
    rows = _rows(file, ANNOS_FIELDS)
    names, labels = _column(file, rows, "relative_im_path", str), _column(file, rows, "class", int)
    is_test = np.array(_column(file, rows, "test", int))
    if not np.isin(is_test, (0, 1)).all() or is_test.all() or not is_test.any():
        raise InputError(f"{file}: field 'test' must be 0 (train) or 1 (test), both of them present")
    _check_files(folder, names, file)
    classes = _check_classes(read_cell_strings(file, "class_names"), file, [(file, labels)], notes)
    parts = []
    for value in (0, 1):
        rows = np.flatnonzero(is_test == value).tolist()
        parts.append(_images(folder, [names[i] for i in rows], [labels[i] for i in rows]))
    return FgvcData("StanfordCars", *parts, classes, notes)


def _images(folder: Path, names: list[str], labels: list[int]) -> FgvcImages:
    """labels: from 1, as published."""
    return FgvcImages(PathList(folder, names), np.array(labels, dtype=np.int64) - 1)


def _rows(file: Path, fields: tuple[str, ...]) -> list[dict]:
    """The struct array `annotations`, read by the names of its fields."""
    found, values = read_struct_array(file, "annotations")
    missing = [name for name in fields if name not in found]
    if missing:
        raise InputError(
            f"{file} has no field '{missing[0]}': its fields are {', '.join(found)}, expected {', '.join(fields)}"
        )
    if not values:
        raise InputError(f"{file} lists no image: copy it again")
    return [dict(zip(found, row)) for row in values]


def _column(file: Path, rows: list[dict], field: str, kind: type) -> list:
    """A field of all annotations, as str or int (a Python int: 0 - 1 would be 255 in the file's own uint8)."""
    found = []
    for number, row in enumerate(rows, 1):
        value = row[field]
        if not isinstance(value, str if kind is str else int | float) or kind(value) != value:
            what = "a file name" if kind is str else "one whole number"
            raise InputError(f"{file}, annotation {number}: '{field}' is {value!r}, expected {what}")
        found.append(kind(value))
    return found


def _check_files(folder: Path, names: list[str], file: Path) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(names)} images of {file} do not exist, first {folder / missing[0]}: "
            "copies with other file names do not go with these annotations"
        )


def _check_classes(
    classes: list[str | None] | None, meta: Path, labels: list[tuple[Path, list[int]]], notes: list[str]
) -> list[str]:
    """Names of the classes; those that have none, or one that is there already, get their number."""
    count = len(classes) if classes else max(max(found, default=1) for _, found in labels)
    if not classes:
        notes.append(f"{meta} is not there: classes are called by their numbers")
    for file, found in labels:
        for index, label in enumerate(found):
            if not 1 <= label <= count:
                raise InputError(
                    f"{file}, annotation {index + 1}: class {label} is outside 1..{count}, the classes that "
                    f"{meta.name} names"
                )
    names = [name or f"class {i}" for i, name in enumerate(classes or [None] * count, 1)]
    twice = {name for name, times in Counter(names).items() if times > 1}
    return [f"{name} ({i})" if name in twice else name for i, name in enumerate(names, 1)]


def _with_notes(data: FgvcData, is_cars: bool) -> FgvcData:
    """Counts, beside the published ones where there are any, and classes that a split lacks."""
    counts = {"training images": len(data.train), "test images": len(data.test), "classes": len(data.classes)}
    line = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    if is_cars:
        line += "; " + published_note({what: count for what, count in counts.items() if count}, PUBLISHED)
    notes = [line, *data.notes]
    for what, part in (("training", data.train), ("test", data.test)):
        absent = np.setdiff1d(np.arange(len(data.classes)), part.labels)
        if len(absent) and len(part):
            first = ", ".join(data.classes[i] for i in absent[:3]) + (" ..." if len(absent) > 3 else "")
            notes.append(f"{len(absent)} classes have no {what} image: {first}")
    if len(data.train):
        found = np.bincount(data.train.labels, minlength=len(data.classes))
        notes.append(f"training images of a class: {found.min()} to {found.max()}")
    return replace(data, notes=notes)


class FgvcTrainImages(TrainItems):
    """Training images: `imgs` [3, H, W] uint8, `labels` int64 scalar."""

    def __init__(self, images: FgvcImages, augment: CropFlipAugment, seed: int):
        super().__init__(images.paths, augment.resize, seed)
        self.images, self.augment = images, augment

    def sample(self, content: Image.Image, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"imgs": self.augment(content, rng), "labels": torch.tensor(self.images.labels[index])}
