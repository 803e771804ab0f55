"""Augmentation of fine-tuning, a pure function of the random numbers it is given.

Resize, flip, pad, crop in the worker on 8-bit pixels; erasing on the device after normalisation, since its
noise is normal there (Zhong et al., 2020, arXiv 1708.04896, with a random value for each pixel).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from datasets.transforms import whole_image

AUGMENT_STREAM = 2  # beside those of datasets.transforms
ERASE_TRIES = 10


@dataclass(frozen=True)
class PadCropErase:
    """The recipe of re-identification (Luo et al., 2019, Sec. 2).

    size: (H, W) in px. flip: chance of mirroring. pad: black border in px, some of which a random crop cuts
    off again. erase: chance of losing a rectangle.
    """

    size: tuple[int, int]
    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5

    def __call__(self, image, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """An RGB picture -> `imgs` [3, H, W] uint8 and `erase` [5] int64 for `erase_boxes`."""
        height, width = self.size
        imgs = whole_image(image, self.size)
        if rng.random() < self.flip:
            imgs = imgs.flip(2)
        top, left = rng.integers(0, 2 * self.pad + 1, 2).tolist()
        imgs = F.pad(imgs, (self.pad,) * 4)[:, top : top + height, left : left + width].contiguous()
        erase = erase_box(rng, self.size) if rng.random() < self.erase else (0, 0, 0, 0)
        return {"imgs": imgs, "erase": torch.tensor([*erase, int(rng.integers(1 << 62))])}


def erase_box(
    rng: np.random.Generator, size: tuple[int, int], area: tuple[float, float] = (0.02, 1 / 3), aspect: float = 0.3
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in px: area uniform in its range as a fraction of the image, height / width
    log-uniform in [aspect, 1 / aspect], ten tries; height 0: none fitted."""
    height, width = size
    for _ in range(ERASE_TRIES):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect), -math.log(aspect)))
        h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, 0, 0


def erase_boxes(imgs: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Normal noise in one rectangle of each image, in place.

    Args:
        imgs: [N, 3, H, W] float, normalised, on any device.
        boxes: [N, 5] int64 on the CPU: top, left, height, width in px, seed of the noise.
    """
    for image, (top, left, height, width, seed) in zip(imgs, boxes.tolist()):
        if height:
            generator = torch.Generator(imgs.device).manual_seed(seed)
            image[:, top : top + height, left : left + width].normal_(generator=generator)
    return imgs
