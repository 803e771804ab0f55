"""Training images of re-identification: which come together, and what becomes of each."""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from datasets.augment import AUGMENT_STREAM, PadCropErase
from datasets.images import UNREADABLE, open_reduced, why_unreadable
from datasets.pk_batches import pk_batches
from datasets.reid import ReidImages
from datasets.transforms import jpeg_reduction, sample_rng
from util.errors import InputError


class ReidTrainImages(Dataset):
    """Item (epoch, slot, index) -> image `index` as place `slot` of the epoch shows it: a function of (seed,
    epoch, slot), so that a vehicle's image that fills two places of a batch is not twice the same."""

    def __init__(self, images: ReidImages, augment: PadCropErase, seed: int):
        self.images, self.augment, self.seed = images, augment, seed
        self.paths = images.paths

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int, int]) -> dict:
        """-> imgs [3, H, W] uint8, erase [5] int64, pids, camids, viewids int64 scalars, problem str ('' or
        what was wrong with the file; then another image of the vehicle stands in)."""
        epoch, slot, index = item
        image, used, problem = self._open(index)
        sample = self.augment(image, sample_rng(self.seed, epoch, slot, AUGMENT_STREAM))
        ids = {name: torch.tensor(getattr(self.images, name)[used]) for name in ("pids", "camids", "viewids")}
        return sample | ids | {"problem": problem}

    def _open(self, index: int) -> tuple[Image.Image, int, str]:
        """(picture, the image it is, '' or what was wrong with the first choice)."""
        try:
            return self._read(index), index, ""
        except UNREADABLE as error:
            problem = f"{self.paths.relative(index)}\t{why_unreadable(error)}"
        for other in np.flatnonzero(self.images.pids == self.images.pids[index]).tolist():
            try:
                return self._read(other), other, problem
            except UNREADABLE:
                continue
        # a vehicle without one readable image: grey, and counted against --max_bad_ratio
        return Image.new("RGB", self.augment.size[::-1], "grey"), index, problem

    def _read(self, index: int) -> Image.Image:
        def reduction(width: int, height: int) -> int:
            return jpeg_reduction((0, 0, width, height), self.augment.size)

        return open_reduced(self.paths[index], reduction)[0]


class PKBatches(Sampler):
    """This rank's part of the batches of P vehicles x K images (`pk_batches`), as (epoch, slot, index).

    Args:
        pids: [n] int64. batch_size: images a rank. num_instances: K.
    Raises:
        InputError: all ranks' batch is no multiple of K, or fewer than P vehicles.
    """

    def __init__(self, pids: np.ndarray, batch_size: int, num_instances: int, rank: int, world: int, seed: int):
        if batch_size * world % num_instances:
            raise InputError(
                f"--batch_size {batch_size} x {world} processes is no multiple of --num_instances "
                f"{num_instances}: a batch holds whole vehicles"
            )
        self.pids, self.batch_size, self.num_instances = pids, batch_size, num_instances
        self.rank, self.world, self.seed = rank, world, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Next iteration: this epoch, from global batch `start` on."""
        size = self.batch_size * self.world
        self.epoch, self.start = epoch, start
        self.rows = pk_batches(self.pids, size // self.num_instances, self.num_instances, self.seed, epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Of the epoch that is set; others may have one more or less."""
        return len(self.rows)

    @property
    def num_images(self) -> int:
        return self.rows.size

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """[G] int64: the images of global batch `step` of the epoch that is set."""
        if epoch != self.epoch:
            raise ValueError(f"epoch {epoch} is not set, {self.epoch} is")
        return self.rows[step]

    def __len__(self) -> int:
        return len(self.rows) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, rows, first = self.epoch, self.rows, self.rank * self.batch_size
        for step in range(self.start, len(rows)):
            slots = range(first, first + self.batch_size)
            yield [(epoch, step * rows.shape[1] + slot, int(rows[step, slot])) for slot in slots]
