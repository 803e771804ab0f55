"""Augmentation as a pure function of (seed, epoch, index): no global random state anywhere."""

import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CROP_STREAM, MASK_STREAM, AUGMENT_STREAM = 0, 1, 2  # independent random streams of one (seed, epoch, index)
TRIES = 10


def sample_rng(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one image in one epoch (a counter-based generator, Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, index]))


class ThreadRng(threading.local):
    """`sample_rng` in a sixth of its time: each thread has one generator, set to the place asked for. Draw at once:
    the next call moves it."""

    def __init__(self):
        self.philox = np.random.Philox(0)
        self.generator = np.random.Generator(self.philox)
        self.place = self.philox.state

    def at(self, seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
        self.place["state"]["key"][:] = seed, epoch
        self.place["state"]["counter"][:] = 0, 0, stream, index
        self.philox.state = self.place  # its buffer is marked as used up, its half word as absent
        return self.generator


thread_rng = ThreadRng()


def mask_noise(seed: int, epoch: int, index: int, num_patches: int) -> np.ndarray:
    """[L] float32 in [0, 1): the noise by which MAE orders the patches of one image."""
    return thread_rng.at(seed, epoch, index, MASK_STREAM).random(num_patches, dtype=np.float32)


def random_crop_box(
    rng: np.random.Generator, width: int, height: int, min_area: float
) -> tuple[tuple[int, int, int, int], bool]:
    """MAE's random-resized-crop box (left, upper, right, lower) in px, and whether to flip.

    Area uniform in [min_area, 1] of the image, aspect log-uniform in [3/4, 4/3], ten tries, then
    the largest central crop of allowed aspect (torchvision's RandomResizedCrop rule).
    """
    draws = rng.random((TRIES, 4))
    flip = bool(rng.random() < 0.5)
    low, high = math.log(3 / 4), math.log(4 / 3)
    for area_draw, aspect_draw, x_draw, y_draw in draws.tolist():
        area = width * height * (min_area + (1 - min_area) * area_draw)
        aspect = math.exp(low + (high - low) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1))
            return (left, upper, left + w, upper + h), flip
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, upper = (width - w) // 2, (height - h) // 2
    return (left, upper, left + w, upper + h), flip


def jpeg_reduction(box: tuple[int, int, int, int], size: tuple[int, int], oversampling: float = 1.5) -> int:
    """By how much (1, 2, 4 or 8) a JPEG decoder may shrink the picture so that `box` still has
    `oversampling` times the pixels of (H, W) on each side. At 1.5 the crop stays within 2/255 mean
    absolute difference of the crop of the full decode (tests/test_data.py)."""
    height, width = size
    room = min((box[2] - box[0]) / width, (box[3] - box[1]) / height) / oversampling
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))


def crop_resize(
    image: Image.Image, box: tuple, size: tuple[int, int], flip: bool, full_size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Box of an RGB image, bicubic with antialiasing to (H, W) -> [3, H, W] uint8.

    Args:
        box: (left, upper, right, lower) in px of the undecimated picture.
        full_size: (width, height) of that picture in px, where `image` was decoded smaller.
    """
    if full_size is None or full_size == image.size:
        # torch's uint8 kernel rounds like Pillow's and takes a third of its time
        pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    else:
        scale_x, scale_y = image.size[0] / full_size[0], image.size[1] / full_size[1]
        box = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)
        image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.flip(2) if flip else pixels.contiguous()


def whole_image(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """The evaluation view: the whole picture, bicubic to (H, W), no crop -> [3, H, W] uint8."""
    return crop_resize(image, (0, 0, *image.size), size, flip=False)


@dataclass(frozen=True)
class PadCropErase:
    """Resize, flip, pad and crop: the recipe of re-identification (Luo et al., 2019, Sec. 2). Erasing follows on the
    device, after normalisation, since its noise is normal there (Zhong et al., 2020, arXiv 1708.04896).

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
    for _ in range(TRIES):
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
