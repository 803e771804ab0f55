"""What a data worker returns for one image: of pre-training, of training a task, of an evaluation."""

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datasets import transforms
from datasets.images import Unreadable, decode_rgb, open_rgb, open_upright
from datasets.path_list import PathList

REPLACEMENT_TRIES = 20


def read_or_next(paths: PathList, read: Callable, index: int, others: Iterable[int]) -> tuple[object, int, str]:
    """(what `read` makes of the first readable one of `index` and `others`, its number, what is wrong with `index` or
    ''); (None, index, problem) where none is readable: the caller shows grey until --max_bad_ratio stops the
    run."""
    problem = ""
    for used in itertools.chain([index], others):
        used %= len(paths)
        try:
            return read(used), used, problem
        except Unreadable as error:
            problem = problem or f"{paths.relative(index)}\t{error}"
    return None, index, problem


class PretrainDataset(Dataset):
    """Items are asked for as (epoch, index), so that nothing depends on workers or history. input_size: (H, W) of the
    crop in px. num_patches: L, length of the mask noise. min_area, clip_crops: of `random_crop_box`. teacher_cache:
    stored embeddings, or None."""

    def __init__(
        self, paths: PathList, input_size: tuple[int, int], num_patches: int, *, seed: int, min_area: float,
        teacher_cache=None, clip_crops: bool = False,
    ):  # fmt: skip
        self.paths, self.input_size, self.num_patches = paths, input_size, num_patches
        self.seed, self.crop_rule, self.teacher_cache = seed, (min_area, clip_crops), teacher_cache

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        """(epoch, index) -> dict: `imgs` [3, H, W] uint8, `noise` [L] float32, `problem` ('', or what was wrong with
        the file: then the next readable image stands in), `teacher_embed` [D_t] float16 where there is
        a cache."""
        (epoch, index), stand_ins = item, range(item[1] + 1, item[1] + REPLACEMENT_TRIES)
        shown, _, problem = read_or_next(self.paths, partial(self._view, epoch), index, stand_ins)
        noise = torch.from_numpy(transforms.mask_noise(self.seed, epoch, index, self.num_patches))
        return (shown or self._blank()) | {"noise": noise, "problem": problem}

    def _view(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        """What an epoch shows of an image: a crop, drawn before its pixels are decoded, no larger than it needs."""
        image = open_upright(self.paths[index])
        full_size, view = image.size, self.teacher_cache.view_of(epoch) if self.teacher_cache else epoch
        rng = transforms.sample_rng(self.seed, view, index, transforms.CROP_STREAM)
        box, flip = transforms.random_crop_box(rng, *full_size, *self.crop_rule)
        factor = transforms.jpeg_reduction(box, self.input_size)
        image = decode_rgb(image, factor)
        shown = {"imgs": transforms.crop_resize(image, box, self.input_size, flip, full_size)}
        if self.teacher_cache:
            shown["teacher_embed"] = self.teacher_cache.read(epoch, index)
        return shown

    def _blank(self) -> dict[str, torch.Tensor]:
        """Grey, where no image can be read."""
        blank = {"imgs": torch.full((3, *self.input_size), 128, dtype=torch.uint8)}
        if self.teacher_cache:
            blank["teacher_embed"] = torch.zeros(self.teacher_cache.identity.embed_dim).half()
        return blank


def build_loader(dataset: Dataset, batches, num_workers: int, pin_memory: bool, init) -> DataLoader:
    """Loader over (epoch, index) batches; `init` runs first in every worker."""
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0, "worker_init_fn": init}
    return DataLoader(dataset, batch_sampler=batches, pin_memory=pin_memory, **workers)


class TrainItems(Dataset, ABC):
    """Item (epoch, index) -> image `index` as the epoch shows it, with its targets; (epoch, slot, index) where an image
    may fill several slots. A function of (seed, epoch, slot or index). size: (H, W) in px before augmentation."""

    def __init__(self, paths: PathList, size: tuple[int, int], seed: int):
        self.paths, self.size, self.seed = paths, size, seed

    @abstractmethod
    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """What was read of image `index` -> `imgs` [3, H, W] uint8 and the targets."""

    def read(self, index: int):
        image = open_upright(self.paths[index])
        return decode_rgb(image, transforms.jpeg_reduction((0, 0, *image.size), self.size))

    def blank(self):
        """What stands in where no image can be read."""
        return Image.new("RGB", self.size[::-1], "grey")

    def stand_ins(self, index: int) -> Iterable[int]:
        """Images that may be shown in place of a broken one, with their own targets."""
        return range(index + 1, index + REPLACEMENT_TRIES)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, ...]) -> dict:
        """-> `sample`, and `problem`: '' or what was wrong with the file, in place of which another stands."""
        epoch, place, index = item[0], item[1], item[-1]
        rng = transforms.sample_rng(self.seed, epoch, place, transforms.AUGMENT_STREAM)
        content, used, problem = read_or_next(self.paths, self.read, index, self.stand_ins(index))
        return self.sample(self.blank() if content is None else content, used, rng) | {"problem": problem}


@dataclass(frozen=True)
class Labelled:
    """Images, and what is known of each: the other fields, arrays [n, ...] or None; -1: unknown."""

    paths: PathList

    def __len__(self) -> int:
        return len(self.paths)

    def arrays(self) -> dict[str, np.ndarray]:
        found = ((field.name, getattr(self, field.name)) for field in fields(self)[1:])
        return {name: values for name, values in found if values is not None}

    def take(self, rows: np.ndarray):
        """Some of the images, in the order of `rows`."""
        return replace(self, paths=self.paths.take(rows), **{name: v[rows] for name, v in self.arrays().items()})

    def sha256(self, *names: str) -> str:
        """Identity of paths, order and labels, and of the names of the labels."""
        digest = hashlib.sha256((self.paths.sha256() + "\0".join(names)).encode())
        for values in self.arrays().values():
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


class LabelledItems(TrainItems):
    """Item (epoch, index) -> what `augment` makes of an image, `imgs` [3, H, W] uint8 and more; its labels as int64, by
    name, and the problem, if any."""

    def __init__(self, images: Labelled, augment, seed: int):
        super().__init__(images.paths, getattr(augment, "resize", augment.size), seed)
        self.images, self.augment = images, augment

    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        labels = {k: torch.as_tensor(v[index], dtype=torch.int64) for k, v in self.images.arrays().items()}
        return self.augment(content, rng) | labels


class WholeImages(Dataset):
    """Item i -> ([3, H, W] uint8 of the whole picture or box, index, problem: '' or why it is black). paths:
    a PathList, or anything else whose items `open_rgb` opens."""

    def __init__(self, paths, indices: np.ndarray, size: tuple[int, int]):
        self.paths, self.indices, self.size = paths, indices, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int, str]:
        index = int(self.indices[item])
        try:
            image = open_rgb(self.paths[index])
        except Unreadable as error:
            return torch.zeros(3, *self.size, dtype=torch.uint8), index, str(error)
        return transforms.whole_image(image, self.size), index, ""


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
