"""Augmentation as a pure function of (seed, epoch, index): no global random state anywhere."""

import math
import threading

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CROP_STREAM, MASK_STREAM = 0, 1  # independent random streams of one (seed, epoch, index)
CROP_TRIES = 10


def sample_rng(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one image in one epoch (a counter-based generator, Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, index]))


class ThreadRng(threading.local):
    """`sample_rng` without making a generator for each image, a sixth of the time: one generator of each
    thread is set to the place asked for. For numbers drawn at once; the next call moves it on."""

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
    draws = rng.random((CROP_TRIES, 4))
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
    image: Image.Image,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    flip: bool,
    full_size: tuple[int, int] | None = None,
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
