"""Training images of a task: one item, and what stands in for a broken one."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.images import UNREADABLE, open_reduced, why_unreadable
from datasets.path_list import PathList
from datasets.pretrain import REPLACEMENT_TRIES
from datasets.transforms import AUGMENT_STREAM, jpeg_reduction, sample_rng


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
        """Image `index`, decoded; raises one of `UNREADABLE`."""
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
        problem = ""
        for used in itertools.chain([index], self.stand_ins(index)):
            try:
                content = self.read(used)
            except UNREADABLE as error:
                problem = problem or f"{self.paths.relative(index)}\t{why_unreadable(error)}"
                continue
            return self.sample(content, used, rng) | {"problem": problem}
        # a run this full of bad files is stopped by --max_bad_ratio; until then it gets grey
        return self.sample(self.blank(), index, rng) | {"problem": problem}
