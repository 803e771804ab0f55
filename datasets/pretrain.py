"""The training stream: which images make up step s of epoch e, and what a worker returns of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.device_decode import collate_encoded, encoded_or_pixels
from datasets.images import UNREADABLE, open_reduced, why_unreadable
from datasets.path_list import PathList
from datasets.transforms import (
    CROP_STREAM,
    crop_resize,
    jpeg_reduction,
    mask_noise,
    random_crop_box,
    thread_rng,
    whole_image,
)

REPLACEMENT_TRIES = 20


class PretrainDataset(Dataset):
    """Items are asked for as (epoch, index), so that nothing depends on workers or history.

    Args:
        paths: the images.
        input_size: (H, W) of the crop in pixels.
        num_patches: L, length of the mask noise.
        seed: seed of crops and masks.
        min_area: smallest crop as a fraction of the image area.
        teacher_size: (H, W) in pixels of an extra whole-image view for the teacher, or None.
        teacher_cache: stored teacher embeddings, or None.
        decode: "cpu", or "gpu": items hold the encoded file (`data`, `size`, `is_jpeg`) and its `box` and
            `flip` in place of pixels, for `datasets.device_decode`.
    """

    def __init__(
        self,
        paths: PathList,
        input_size: tuple[int, int],
        num_patches: int,
        *,
        seed: int,
        min_area: float,
        teacher_size: tuple[int, int] | None = None,
        teacher_cache=None,
        decode: str = "cpu",
    ):
        self.paths = paths
        self.input_size = input_size
        self.num_patches = num_patches
        self.seed = seed
        self.min_area = min_area
        self.teacher_size = teacher_size
        self.teacher_cache = teacher_cache
        self.decode = decode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        """(epoch, index) -> dict: `imgs` [3, H, W] uint8, `noise` [L] float32, `problem` str ('' if
        the file was readable; else what was wrong, and the next readable image stands in), and
        `teacher_imgs` [3, H, W] uint8 or `teacher_embed` [D_t] float16 where asked for."""
        epoch, index = item
        view = self.teacher_cache.view_of(epoch) if self.teacher_cache else epoch
        picture, problem = self._open(view, index)
        sample = {"noise": torch.from_numpy(mask_noise(self.seed, epoch, index, self.num_patches)), "problem": problem}
        if self.decode == "gpu":
            sample |= {"data": picture.data, "size": picture.full_size, "is_jpeg": picture.is_jpeg}
            sample |= {"box": picture.box, "flip": picture.flip}
        else:
            sample["imgs"] = crop_resize(picture.image, picture.box, self.input_size, picture.flip, picture.full_size)
            if self.teacher_cache is None and self.teacher_size is not None:
                sample["teacher_imgs"] = whole_image(picture.image, self.teacher_size)
        if self.teacher_cache is not None:
            sample["teacher_embed"] = self.teacher_cache.read(epoch, picture.index)
        return sample

    def _open(self, view: int, index: int) -> tuple["Picture", str]:
        """The picture of (view, index), or the next readable one and what is wrong with the first."""
        problem = ""
        for used in range(index, index + REPLACEMENT_TRIES):
            used %= len(self.paths)
            picture = Picture(used)
            try:
                if self.decode == "gpu":
                    file = self.paths[used]
                    data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
                    picture.data, picture.full_size, picture.is_jpeg = encoded_or_pixels(data)
                    self._draw_crop(picture, view, picture.full_size)
                else:
                    picture.image, picture.full_size = open_reduced(
                        self.paths[used], lambda *size, chosen=picture: self._draw_crop(chosen, view, size)
                    )
                return picture, problem
            except UNREADABLE as error:
                reason = why_unreadable(error)
                problem = problem or f"{self.paths.relative(index)}\t{reason}"
        # a run this full of bad files is stopped by --max_bad_ratio; until then it gets grey
        grey = Image.new("RGB", self.input_size[::-1], "grey")
        data = torch.full((3 * grey.width * grey.height,), 128, dtype=torch.uint8)
        return Picture(index, grey, data, False, grey.size, (0, 0, *grey.size)), problem

    def _draw_crop(self, picture: "Picture", view: int, full_size: tuple[int, int]) -> int:
        """Draw the crop of a picture of this (width, height); returns the reduction it allows."""
        rng = thread_rng.at(self.seed, view, picture.index, CROP_STREAM)
        picture.box, picture.flip = random_crop_box(rng, *full_size, self.min_area)
        factor = jpeg_reduction(picture.box, self.input_size)
        if self.teacher_size is not None and self.teacher_cache is None:
            factor = min(factor, jpeg_reduction((0, 0, *full_size), self.teacher_size))
        return factor


@dataclass
class Picture:
    """A decoded image (perhaps smaller than its `full_size`, (width, height)) or the file it comes in, and
    the crop to take of it."""

    index: int
    image: Image.Image | None = None
    data: torch.Tensor | None = None
    is_jpeg: bool = False
    full_size: tuple[int, int] = (0, 0)
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: bool = False


class EpochBatches(Sampler):
    """Batches of (epoch, index) for one rank: a pure function of (seed, epoch).

    All ranks share one permutation an epoch; global batch s is its slice [s * G, (s + 1) * G) with
    G = batch_size * world, and rank r takes the r-th part. What does not fill a batch is left out
    that epoch, as in MAE; each epoch leaves out others.

    Args:
        num_images, batch_size, rank, world, seed: batch_size is per rank.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world: int, seed: int):
        self.num_images = num_images
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.seed = seed
        self.epoch = 0
        self.start = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.num_images // (self.batch_size * self.world)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Next iteration: this epoch, from global batch `start` on."""
        self.epoch, self.start = epoch, start

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """[G] int64: the images of global batch `step`, all ranks in rank order."""
        size = self.batch_size * self.world
        return self.permutation(epoch)[step * size : (step + 1) * size]

    def permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return rng.permutation(self.num_images)

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = self.epoch, self.permutation(self.epoch)
        for step in range(self.start, self.batches_per_epoch):
            first = (step * self.world + self.rank) * self.batch_size
            yield [(epoch, int(i)) for i in permutation[first : first + self.batch_size]]


def build_loader(dataset: PretrainDataset, batches, num_workers: int, pin_memory: bool, init) -> DataLoader:
    """Loader over (epoch, index) batches; `init` runs first in every worker."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=init,
        collate_fn=collate_encoded if dataset.decode == "gpu" else None,
    )
