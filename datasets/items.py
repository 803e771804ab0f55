"""Items of a data set: a training image with its targets, or a picture as an evaluation shows it."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.images import Unreadable, open_reduced, open_rgb
from datasets.path_list import PathList
from datasets.transforms import AUGMENT_STREAM, jpeg_reduction, sample_rng, whole_image

REPLACEMENT_TRIES = 20


def read_or_next(paths: PathList, read: Callable, index: int, others: Iterable[int]) -> tuple[object, int, str]:
    """(what `read` makes of the first readable one of `index` and `others`, its number, what is wrong with `index` or
    ''); (None, index, problem) where none is readable: a run this full of bad files is stopped by --max_bad_ratio,
    until then it gets grey."""
    problem = ""
    for used in itertools.chain([index], others):
        try:
            return read(used), used, problem
        except Unreadable as error:
            problem = problem or f"{paths.relative(index)}\t{error}"
    return None, index, problem


class TrainItems(Dataset, ABC):
    """Item (epoch, index) -> image `index` as the epoch shows it, with its targets; (epoch, slot, index) where an
    image may fill several slots of an epoch. A function of (seed, epoch, slot or index).

    Args:
        size: (H, W) in px that the augmentation starts from. seed: of the augmentation.
    """

    def __init__(self, paths: PathList, size: tuple[int, int], seed: int):
        self.paths, self.size, self.seed = paths, size, seed

    @abstractmethod
    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """What was read of image `index` -> `imgs` [3, H, W] uint8 and the targets."""

    def read(self, index: int):
        """Image `index`, decoded; raises `Unreadable`."""
        return open_reduced(self.paths[index], lambda *full: jpeg_reduction((0, 0, *full), self.size))[0]

    def blank(self):
        """What stands in where no image can be read."""
        return Image.new("RGB", self.size[::-1], "grey")

    def stand_ins(self, index: int) -> Iterable[int]:
        """Images that may be shown in place of a broken one, with their own targets."""
        return (i % len(self.paths) for i in range(index + 1, index + REPLACEMENT_TRIES))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, ...]) -> dict:
        """-> `sample`, and `problem`: '' or what was wrong with the file, in place of which another stands."""
        epoch, place, index = item[0], item[1], item[-1]
        rng = sample_rng(self.seed, epoch, place, AUGMENT_STREAM)
        content, used, problem = read_or_next(self.paths, self.read, index, self.stand_ins(index))
        return self.sample(self.blank() if content is None else content, used, rng) | {"problem": problem}


class WholeImages(Dataset):
    """Item i -> ([3, H, W] uint8 of the whole picture, index, problem: '' or why it is black).

    Args:
        paths: image files by number: a PathList, PackedImages, or anything like them.
        boxes: [len(paths), 4] int32 (left, upper, right, lower) in px to cut out; an empty box is the whole picture.
    """

    def __init__(self, paths, indices: np.ndarray, size: tuple[int, int], boxes: np.ndarray | None = None):
        self.paths, self.indices, self.size, self.boxes = paths, indices, size, boxes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int, str]:
        index = int(self.indices[item])
        try:
            image = open_rgb(self.paths[index])
        except Unreadable as error:
            return torch.zeros(3, *self.size, dtype=torch.uint8), index, str(error)
        if self.boxes is not None and self.boxes[index, 2] > 0:
            image = image.crop(tuple(self.boxes[index].tolist()))
        return whole_image(image, self.size), index, ""


class CenterCrops(WholeImages):
    """All images of a list: the whole picture to `resize`, its centre of `size`, both (H, W) in px."""

    def __init__(self, paths, size: tuple[int, int], resize: tuple[int, int]):
        super().__init__(paths, np.arange(len(paths)), resize)
        self.crop = size

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int, str]:
        imgs, index, problem = super().__getitem__(item)
        (height, width), (rows, columns) = self.crop, self.size
        top, left = (rows - height) // 2, (columns - width) // 2
        return imgs[:, top : top + height, left : left + width].contiguous(), index, problem
