"""Images with a mask of parts, everything looked at before training.

SET/images/{train,val,test}/NAME.jpg         any image ending, sub-folders allowed
SET/annotations/{train,val,test}/NAME.png    one byte a pixel (mode L or P): the value of its class
SET/classes.json                             {"classes": ["background", "door", ...], "ignore": 255}, names of the
                                             values 0, 1, ...; or {"40": "background", "24": "Car Body", ...}
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.images import Unreadable, is_turned, open_image, open_rgb, to_rgb
from datasets.items import TrainItems
from datasets.path_list import PathList, list_folder
from datasets.tables import split_folder
from datasets.transforms import IGNORE, PartsAugment, to_tensor
from util.dist import print_main
from util.errors import InputError

BACKGROUND_ID = 40  # in the masks of PartImageNet's release "_Seg"
PARTS = {  # of PartImageNet (He et al., ECCV 2022, arXiv 2112.00933), as published: "Tier" is its spelling of tyre
    "Car": {24: "Car Body", 25: "Car Tier", 26: "Car Side Mirror"},
    "Bicycle": {27: "Bicycle Body", 28: "Bicycle Head", 29: "Bicycle Seat", 30: "Bicycle Tier"},
    "Boat": {31: "Boat Body", 32: "Boat Sail"},
    "Aeroplane": {
        33: "Aeroplane Head", 34: "Aeroplane Body", 35: "Aeroplane Engine", 36: "Aeroplane Wing", 37: "Aeroplane Tail",
    },
}  # fmt: skip
# label spaces: whose parts they hold; everything else is background
KINDS = {"car_parts": ("Car",), "car_bicycle": ("Car", "Bicycle"), "vehicle_parts": tuple(PARTS)}
SPLITS = ("train", "val", "test")
UNKNOWN = 254  # target of values that classes.json does not name
SIZES = "the image is {} x {} px, its mask {} x {}"


def part_names(space: str) -> tuple[str, ...]:
    """Names of the classes of a label space, in the order of their ids; the background comes before them."""
    return tuple(name for kind in KINDS[space] for name in PARTS[kind].values())


@dataclass(frozen=True)
class LabelSpace:
    """name: own, or of `KINDS`. names: of the classes; target t is names[t]. background: whether class 0 is that.
    table: [256] uint8, value of a mask's pixel -> target."""

    name: str
    names: tuple[str, ...]
    background: bool
    table: np.ndarray


@dataclass(frozen=True)
class PartsSplit:
    """images, masks: files, pair by pair. table: of the label space. counts: [n, K + 1] int64 pixels of each class,
    then of none; zeros where the pair cannot be read."""

    images: PathList
    masks: PathList
    table: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def open(self, row: int) -> tuple[Image.Image, np.ndarray]:
        """RGB picture and its targets, [H, W] uint8; raises `Unreadable`."""
        picture, mask = open_pair(self.images[row], self.masks[row])
        return picture, self.table[mask]


@dataclass(frozen=True)
class PartsData:
    """name: of the label space. train: of the splits, if it was asked for. notes: what a user should know."""

    name: str
    space: LabelSpace
    train: PartsSplit | None
    splits: dict[str, PartsSplit]
    notes: list[str]

    def sha256(self) -> str:
        """Identity of what is trained on: file names and how many pixels have which label."""
        files = self.train.images.sha256() + self.train.masks.sha256() + json.dumps(self.space.names)
        return hashlib.sha256(files.encode() + self.train.counts.tobytes()).hexdigest()


def read_parts(data_path: str | Path, splits: tuple[str, ...]) -> PartsData:
    """Read the `splits` of a set; every mask is looked at: its size must be its image's, its values in classes.json."""
    root = Path(data_path)
    if not root.is_dir():
        raise InputError(f"--data_path {root} is no folder: give one with images/, annotations/, classes.json")
    space, found, notes = read_label_space(root / "classes.json"), {}, []
    for split in splits:
        found[split] = _scan(*list_pairs(root, split, notes), space, split)
        notes += _count_notes(found[split].counts, space, split)
    return PartsData(space.name, space, found.get("train"), found, notes)


def read_label_space(file: Path) -> LabelSpace:
    """The targets of the classes of classes.json; target 0 is the background, if any."""
    example = '{"classes": ["background", "door"], "ignore": 255}'
    if not file.is_file():
        raise InputError(f"{file} is missing: write which class a value is, e.g. {example}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        classes, ignore = content["classes"], content.get("ignore", IGNORE)
        pairs = enumerate(classes) if isinstance(classes, list) else classes.items()
        values = {int(value): str(text) for value, text in pairs}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{file} cannot be understood ({error}): write for example {example}") from error
    if not isinstance(ignore, int) or not 0 <= ignore <= 255 or ignore in values:
        raise InputError(f'{file}: "ignore" is {ignore!r}, and must be a value from 0 to 255 that no class has')
    if not 2 <= len(values) <= 250 or len(set(values.values())) < len(values) or not set(values) <= set(range(256)):
        what = f"values 0 to 255, not {', '.join(values.values())[:160] or 'none'}"
        raise InputError(f'{file}: "classes" must name two classes or more, at most 250, each once, with {what}')
    order = sorted(values, key=lambda value: (values[value].lower() != "background", value))
    names = tuple(values[value] for value in order)
    is_known = {part_names(kind): kind for kind in KINDS}
    table = np.full(256, UNKNOWN, dtype=np.uint8)
    table[order] = range(len(order))
    table[ignore] = IGNORE
    return LabelSpace(is_known.get(names[1:], "own"), names, names[0].lower() == "background", table)


def list_pairs(root: Path, split: str, notes: list[str]) -> tuple[PathList, PathList]:
    """Images of a split and their masks; each image must have one, and for itself alone."""
    image_root, mask_root = (split_folder(root / kind, split) for kind in ("images", "annotations"))
    for folder in (image_root, mask_root):
        if not folder.is_dir():
            found = ", ".join(name for name in SPLITS if split_folder(root / "images", name).is_dir()) or "none"
            raise InputError(f"{folder} is missing: give images/SPLIT and annotations/SPLIT (splits found: {found})")
    listed = list_folder(image_root)
    images: dict[str, str] = {}
    for relative in map(listed.relative, range(len(listed))):
        key = str(Path(relative).with_suffix(""))
        if images.setdefault(key, relative) != relative:
            raise InputError(f"{image_root}: one mask cannot serve two images: rename {images[key]} or {relative}")
    masks = {str(f.relative_to(mask_root).with_suffix("")) for f in mask_root.rglob("*.png")}
    if lacking := [key for key in images if key not in masks]:
        what = f"{len(lacking)} of {len(images)} images under {image_root} have no mask"
        raise InputError(f"{what}: first {mask_root / lacking[0]}.png is gone")
    if without := len(masks - set(images)):
        notes.append(f"{split}: {without} masks have no image and are not used")
    return listed, PathList(mask_root, (f"{key}.png" for key in images))


def open_mask(file: str | Path) -> np.ndarray:
    """[H, W] uint8: the values of a mask; palettes are not looked at. Raises `Unreadable`, also for colours."""
    image = open_image(file)
    if image.mode not in ("L", "P", "1"):
        raise Unreadable(f"its mode is {image.mode}: a mask holds one class a pixel, mode L or P")
    return np.array(image, dtype=np.uint8)


def open_pair(image_file: Path, mask_file: Path) -> tuple[Image.Image, np.ndarray]:
    """RGB picture and [H, W] uint8 values of its mask, of one size. A photo that EXIF turns is taken as the mask was
    drawn: upright, or as it is stored. Raises `Unreadable`, also where their sizes differ."""
    mask, picture = open_mask(mask_file), open_rgb(image_file)
    if picture.size != mask.shape[::-1]:
        stored = open_image(image_file)
        if stored.size != mask.shape[::-1]:
            raise Unreadable(SIZES.format(*picture.size, *mask.shape[::-1]))
        picture = to_rgb(stored)
    return picture, mask


def _count_pixels(image_file: Path, mask_file: Path, space: LabelSpace) -> np.ndarray:
    """[K + 1] pixels of each class and of none; the image's own pixels are not decoded. Raises `Unreadable`, and
    InputError where sizes differ or a value has no name."""
    mask, image = open_mask(mask_file), open_image(image_file, decode=False)
    sizes = {image.size, image.size[::-1]} if is_turned(image) else {image.size}
    if mask.shape[::-1] not in sizes:
        raise InputError(f"{image_file} and {mask_file} differ: {SIZES.format(*image.size, *mask.shape[::-1])}")
    values = np.bincount(mask.ravel(), minlength=256)
    if len(strange := np.flatnonzero((values > 0) & (space.table == UNKNOWN))):
        what = f"{values[strange[0]]} pixels of value {strange[0]}, which classes.json does not name"
        raise InputError(f'{mask_file} has {what}: name it there, or make it the value of "ignore"')
    pixels = np.bincount(space.table, weights=values, minlength=256).astype(np.int64)
    return pixels[[*range(len(space.names)), IGNORE]]


def _scan(images: PathList, masks: PathList, space: LabelSpace, split: str) -> PartsSplit:
    counts, problem = np.zeros((len(images), len(space.names) + 1), np.int64), ""
    print_main(f"looking at {len(images):,} masks of {split}")
    for row in range(len(images)):
        try:
            counts[row] = _count_pixels(images[row], masks[row], space)
        except Unreadable as error:
            problem = problem or f"{masks[row]}: {error}"
    if not counts.any():
        raise InputError(f"none of the {len(images)} pairs of {split} can be read, first {problem}")
    pixels = counts.sum(axis=0)
    absent = [name for name, count in zip(space.names, pixels.tolist()) if not count]
    if absent and (split == "train" or len(absent) >= len(space.names) - space.background):
        ignored = int(np.flatnonzero(space.table == IGNORE)[0])
        seen = f", while {pixels[-1]:,} pixels hold {ignored}, which is ignored" if pixels[-1] else ""
        cure = "write the number of the class (of one class: 1), or drop it from classes.json"
        raise InputError(f"{masks.root}: class '{absent[0]}' has no pixel in {split}{seen}: {cure}")
    return PartsSplit(images, masks, space.table, counts)


def _count_notes(counts: np.ndarray, space: LabelSpace, split: str) -> list[str]:
    """How many pixels and images a split has of each class."""
    pixels, shown, unreadable = counts.sum(axis=0), (counts > 0).sum(axis=0), (~counts.any(axis=1)).sum()
    lines = [f"{split}: {len(counts)} images; of their pixels, and in how many images:"]
    names = (*space.names, "without a label (not counted)") if pixels[-1] else space.names
    for name, count, images in zip(names, pixels.tolist(), shown.tolist()):
        share = f"{count / pixels.sum():8.3%}" if count else "  absent"
        lines.append(f"  {share} {images:6d}  {name}")
    return lines + [f"  {unreadable} pairs cannot be read"] * bool(unreadable)


def at_size(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """An RGB picture at (width, height), as in training but whole -> [3, height, width] uint8."""
    return to_tensor(image.resize(size, Image.Resampling.BILINEAR))


class PartsTrainItems(TrainItems):
    """Training images with their masks; an item has `imgs` [3, H, W] and `masks` [H, W] uint8."""

    def __init__(self, part: PartsSplit, augment: PartsAugment, seed: int):
        super().__init__(part.images, augment.size, seed)
        self.read, self.augment = part.open, augment

    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return self.augment(*content, rng)

    def blank(self) -> tuple[Image.Image, np.ndarray]:
        return super().blank(), np.full(self.size, IGNORE, dtype=np.uint8)  # nothing in it has a label


class PartsTestItems(Dataset):
    """Item i -> (row, imgs [3, h, w] uint8, masks [H, W] uint8 at the original size, problem: '' or why the two are
    empty). rows: of the split, those of this rank. resized: (width, height) of an image -> what the model is shown."""

    def __init__(self, part: PartsSplit, rows: list[int], resized):
        self.part, self.rows, self.resized = part, rows, resized

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[int, torch.Tensor, torch.Tensor, str]:
        row = self.rows[item]
        try:
            image, mask = self.part.open(row)
        except Unreadable as error:
            return row, torch.zeros(0), torch.zeros(0), str(error)
        return row, at_size(image, self.resized(image.size)), torch.from_numpy(mask), ""
