"""The pre-training data set: what a data worker returns for one image."""

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datasets.images import open_reduced
from datasets.items import REPLACEMENT_TRIES, read_or_next
from datasets.path_list import PathList
from datasets.transforms import (
    CROP_STREAM,
    crop_resize,
    jpeg_reduction,
    mask_noise,
    random_crop_box,
    sample_rng,
    whole_image,
)


class PretrainDataset(Dataset):
    """Items are asked for as (epoch, index), so that nothing depends on workers or history.

    Args:
        input_size: (H, W) of the crop in pixels. num_patches: L, length of the mask noise.
        seed: of crops and masks. min_area: smallest crop as a fraction of the image area.
        clip_crops: the `clip` of `random_crop_box`.
        teacher_size: (H, W) in pixels of an extra whole-image view for the teacher, or None.
        teacher_cache: stored teacher embeddings, or None.
    """

    def __init__(
        self, paths: PathList, input_size: tuple[int, int], num_patches: int, *, seed: int, min_area: float,
        teacher_size: tuple[int, int] | None = None, teacher_cache=None, clip_crops: bool = False,
    ):  # fmt: skip
        self.paths, self.input_size, self.num_patches = paths, input_size, num_patches
        self.seed, self.crop_rule, self.teacher_cache = seed, (min_area, clip_crops), teacher_cache
        self.teacher_size = teacher_size if teacher_cache is None else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        """(epoch, index) -> dict: `imgs` [3, H, W] uint8, `noise` [L] float32, `problem` str ('' if the file was
        readable; else what was wrong, and the next readable image stands in), and `teacher_imgs` [3, H, W] uint8 or
        `teacher_embed` [D_t] float16 where asked for."""
        epoch, index = item
        view = self.teacher_cache.view_of(epoch) if self.teacher_cache else epoch
        others = (i % len(self.paths) for i in range(index + 1, index + REPLACEMENT_TRIES))
        found, _, problem = read_or_next(self.paths, lambda i: self._open(epoch, view, i), index, others)
        if found is None:
            blank = Image.new("RGB", self.input_size[::-1], "grey")
            embed = torch.zeros(self.teacher_cache.identity.embed_dim).half() if self.teacher_cache else None
            found = blank, blank.size, (0, 0, *blank.size), False, embed
        image, full_size, box, flip, embed = found
        sample = {
            "imgs": crop_resize(image, box, self.input_size, flip, full_size),
            "noise": torch.from_numpy(mask_noise(self.seed, epoch, index, self.num_patches)),
            "problem": problem,
        }
        if self.teacher_size is not None:
            sample["teacher_imgs"] = whole_image(image, self.teacher_size)
        if self.teacher_cache is not None:
            sample["teacher_embed"] = embed
        return sample

    def _open(
        self, epoch: int, view: int, index: int
    ) -> tuple[Image.Image, tuple[int, int], tuple, bool, torch.Tensor]:
        """(image, perhaps decoded smaller; its full (width, height); the view's crop box of that; whether to flip; its
        stored embedding)."""
        box, flip = None, False

        def reduction(*full_size: int) -> int:
            nonlocal box, flip
            box, flip = random_crop_box(sample_rng(self.seed, view, index, CROP_STREAM), *full_size, *self.crop_rule)
            factor = jpeg_reduction(box, self.input_size)
            if self.teacher_size is not None:
                factor = min(factor, jpeg_reduction((0, 0, *full_size), self.teacher_size))
            return factor

        image, full_size = open_reduced(self.paths[index], reduction)
        return image, full_size, box, flip, self.teacher_cache.read(epoch, index) if self.teacher_cache else None


def build_loader(dataset: Dataset, batches, num_workers: int, pin_memory: bool, init) -> DataLoader:
    """Loader over (epoch, index) batches; `init` runs first in every worker."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory,
        persistent_workers=num_workers > 0, worker_init_fn=init,
    )  # fmt: skip
