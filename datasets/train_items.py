"""Training images of a task whose batches are drawn evenly: one item, and what stands in for a broken one."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.augment import AUGMENT_STREAM
from datasets.images import UNREADABLE, why_unreadable
from datasets.pretrain import REPLACEMENT_TRIES, EpochBatches
from datasets.transforms import sample_rng
from util.dist import get_rank, get_world_size
from util.errors import InputError


class TrainItems(Dataset, ABC):
    """Item (epoch, index) -> image `index` as the epoch shows it, with its targets: a function of (seed,
    epoch, index). A subclass says how one is read and what is made of it.

    Args:
        count: images. seed: of the augmentation.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    @abstractmethod
    def read(self, index: int):
        """Image `index`, decoded; raises one of `UNREADABLE`."""

    @abstractmethod
    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """What was read of image `index` -> `imgs` [3, H, W] uint8 and the targets."""

    @abstractmethod
    def relative(self, index: int) -> str:
        """The name of image `index` in messages."""

    @abstractmethod
    def blank(self):
        """What stands in where no image can be read."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: tuple[int, int]) -> dict:
        """-> `sample`, and `problem`: '' or what was wrong with the file; then the next readable image stands
        in, with its own targets."""
        epoch, index = item
        problem = ""
        rng = sample_rng(self.seed, epoch, index, AUGMENT_STREAM)
        for used in range(index, index + min(REPLACEMENT_TRIES, self.count)):
            used %= self.count
            try:
                content = self.read(used)
            except UNREADABLE as error:
                problem = problem or f"{self.relative(index)}\t{why_unreadable(error)}"
                continue
            return self.sample(content, used, rng) | {"problem": problem}
        # a run this full of bad files is stopped by --max_bad_ratio; until then it gets grey
        return self.sample(self.blank(), index, rng) | {"problem": problem}


def epoch_batches(num_images: int, batch_size: int, seed: int) -> EpochBatches:
    """This rank's batches of (epoch, index).

    Raises:
        InputError: the images do not fill one batch of all ranks.
    """
    world = get_world_size()
    if num_images < batch_size * world:
        raise InputError(
            f"{num_images} training images do not fill one batch of {batch_size * world} (--batch_size "
            f"{batch_size} x {world} processes): lower --batch_size to at most {max(num_images // world, 1)}"
        )
    return EpochBatches(num_images, batch_size, get_rank(), world, seed)
