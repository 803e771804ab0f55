"""What becomes of an image and its mask in training and in tests: SETR's augmentation, a pure function of the
random numbers it is given."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.images import UNREADABLE, why_unreadable
from datasets.seg import LabelSpace, PartsSplit, open_pair
from datasets.train_items import TrainItems
from metrics.seg import IGNORE

CROP_TRIES = 10
LONG = 4  # SETR's 2048 x 512: the long side is at most this many times the crop


@dataclass(frozen=True)
class PartsAugment:
    """SETR's: resize, crop, mirror, distort colours, pad.

    size: (H, W) of the crop in px. fill: RGB of the padding, whose pixels have no label. ratio: range of the
    random factor of the size. most: a crop of which one class has more than this share of the labelled
    pixels is drawn again. flip: chance of mirroring. distort: whether colours change.
    """

    size: tuple[int, int]
    fill: tuple[int, int, int]
    ratio: tuple[float, float] = (0.5, 2.0)
    most: float = 0.75
    flip: float = 0.5
    distort: bool = True

    def __call__(self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """An RGB picture and its mask, [h, w] uint8 of targets -> `imgs` [3, H, W], `masks` [H, W] uint8."""
        short, long = sorted(image.size)
        side = min(self.size)
        factor = min(LONG * side / long, side / short) * rng.uniform(*self.ratio)
        width, height = (max(1, round(factor * length)) for length in image.size)
        mask = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        top, left, mask = self.crop(mask, rng)
        box = (left, top, left + mask.shape[1], top + mask.shape[0])  # only this part of the image is resized
        scale = image.size[0] / width, image.size[1] / height
        box = [min(edge * scale[i % 2], image.size[i % 2]) for i, edge in enumerate(box)]
        image = image.resize(mask.shape[::-1], Image.Resampling.BILINEAR, box=box)
        if rng.random() < self.flip:
            image, mask = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask[:, ::-1]
        pixels = distort_colours(image, rng) if self.distort else np.asarray(image)
        return {"imgs": padded(pixels, self.size, self.fill), "masks": padded(mask, self.size, IGNORE)}

    def crop(self, mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int, np.ndarray]:
        """(top, left, part of the mask), at most of the crop's size: of ten draws the first in which no class
        has more than `most`, else the last."""
        high, wide = (min(side, length) for side, length in zip(self.size, mask.shape))
        for _ in range(CROP_TRIES):
            top = int(rng.integers(mask.shape[0] - high + 1))
            left = int(rng.integers(mask.shape[1] - wide + 1))
            part = mask[top : top + high, left : left + wide]
            pixels = np.bincount(part.ravel(), minlength=256)[:IGNORE]
            if self.most * pixels.sum() > pixels.max():
                break
        return top, left, part


def padded(pixels: np.ndarray, size: tuple[int, int], fill) -> torch.Tensor:
    """[h, w] or [h, w, 3] uint8, filled up below and to the right -> [H, W] or [3, H, W]."""
    whole = np.empty((*size, *pixels.shape[2:]), dtype=np.uint8)
    whole[:] = fill
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return torch.from_numpy(np.ascontiguousarray(whole.transpose(2, 0, 1) if whole.ndim == 3 else whole))


def distort_colours(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion (Liu et al., 2016, "SSD", Sec. 3.6 of its code): each with a chance of one half,
    brightness + [-32, 32], contrast x [0.5, 1.5] (before or after the colours), saturation x [0.5, 1.5], hue
    + [-36, 36] degrees.

    Args:
        image: RGB.
    Returns:
        [h, w, 3] uint8.
    """
    chosen = rng.random(5) < 0.5
    brightness, contrast = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), rng.uniform(-36, 36)
    pixels = np.asarray(image)

    def linear(pixels: np.ndarray, factor: float, shift: float) -> np.ndarray:
        return (pixels * np.float32(factor) + np.float32(shift)).clip(0, 255).astype(np.uint8)

    if chosen[0]:
        pixels = linear(pixels, 1, brightness)
    if chosen[1] and chosen[4]:
        pixels = linear(pixels, contrast, 0)
    if chosen[2] or chosen[3]:
        hsv = np.array(Image.fromarray(pixels).convert("HSV"))
        if chosen[2]:
            hsv[..., 1] = linear(hsv[..., 1], saturation, 0)
        if chosen[3]:
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(hue * 256 / 360)) % 256
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    if chosen[1] and not chosen[4]:
        pixels = linear(pixels, contrast, 0)
    return pixels


def shown_to_model(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """An RGB picture at (width, height), as in training but whole -> [3, height, width] uint8."""
    pixels = np.array(image.resize(size, Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class PartsTrainItems(TrainItems):
    """Training images with the masks of a label space; an item has `imgs` [3, H, W] and `masks` [H, W]
    uint8."""

    def __init__(self, part: PartsSplit, space: LabelSpace, augment: PartsAugment, seed: int):
        super().__init__(len(part), seed)
        self.part, self.space, self.augment = part, space, augment
        self.paths = part.images

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, mask = open_pair(self.part.images[index], self.part.masks[index])
        return image, self.space.table[mask]

    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return self.augment(*content, rng)

    def relative(self, index: int) -> str:
        return self.part.images.relative(index)

    def blank(self) -> tuple[Image.Image, np.ndarray]:
        """Grey, and nothing in it has a label."""
        height, width = self.augment.size
        return Image.new("RGB", (width, height), "grey"), np.full((height, width), IGNORE, dtype=np.uint8)


class PartsTestItems(Dataset):
    """Item i -> (row, imgs [3, h, w] uint8, masks [H, W] uint8 at the original size, problem: '' or why the
    two are empty).

    Args:
        rows: of the split, those that this rank scores.
        resized: (width, height) of an image -> (width, height) that the model is shown.
    """

    def __init__(self, part: PartsSplit, space: LabelSpace, rows: list[int], resized):
        self.part, self.space, self.rows, self.resized = part, space, rows, resized

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[int, torch.Tensor, torch.Tensor, str]:
        row = self.rows[item]
        try:
            image, mask = open_pair(self.part.images[row], self.part.masks[row])
        except UNREADABLE as error:
            return row, torch.zeros(0), torch.zeros(0), why_unreadable(error)
        imgs = shown_to_model(image, self.resized(image.size))
        return row, imgs, torch.from_numpy(self.space.table[mask]), ""
