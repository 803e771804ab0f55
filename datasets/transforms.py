"""Augmentation as a pure function of (seed, epoch, index): no global random state anywhere."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CROP_STREAM, MASK_STREAM, AUGMENT_STREAM = 0, 1, 2  # independent random streams of one (seed, epoch, index)
TRIES = 10
IGNORE = 255  # target of pixels without a label


def sample_rng(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one image in one epoch (a counter-based generator, Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, index]))


def mask_noise(seed: int, epoch: int, index: int, num_patches: int) -> np.ndarray:
    """[L] float32 in [0, 1): the noise by which MAE orders the patches of one image."""
    return sample_rng(seed, epoch, index, MASK_STREAM).random(num_patches, dtype=np.float32)


def random_crop_box(
    rng: np.random.Generator, width: int, height: int, min_area: float, clip: bool = False
) -> tuple[tuple, bool]:
    """MAE's random-resized-crop box (left, upper, right, lower) in px, and whether to flip: area uniform in
    [min_area, 1] of the image, aspect log-uniform in [3/4, 4/3], ten tries, then the largest central crop of allowed
    aspect (torchvision's RandomResizedCrop rule). clip: MAE's rule for its probe, the first try with its sides clipped.
    """
    draws = rng.random((TRIES, 4))
    flip = bool(rng.random() < 0.5)
    low, high = math.log(3 / 4), math.log(4 / 3)
    for area_draw, aspect_draw, x_draw, y_draw in draws.tolist():
        area = width * height * (min_area + (1 - min_area) * area_draw)
        aspect = math.exp(low + (high - low) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if clip:
            w, h = min(max(w, 1), width), min(max(h, 1), height)
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1))
            return (left, upper, left + w, upper + h), flip
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
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
    """Box of an RGB image, bicubic with antialiasing to (H, W) -> [3, H, W] uint8; `box` (left, upper, right, lower)
    in px of the picture of `full_size`, (width, height), from which `image` was perhaps decoded smaller."""
    if full_size in (None, image.size):  # torch's uint8 kernel rounds like Pillow's and takes a third of its time
        pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    else:
        box = tuple(edge * image.size[i % 2] / full_size[i % 2] for i, edge in enumerate(box))
        image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.flip(2) if flip else pixels.contiguous()


class WholeView(tuple):
    """(H, W) in px, and how a CLIP's own preprocessing makes them of a whole picture: `resize_mode` (squash; shortest:
    the middle is cut out; longest: padded with `fill`) and `interpolation` (bicubic or bilinear), as in open_clip."""

    def __new__(cls, size, resize_mode: str = "squash", interpolation: str = "bicubic", fill: int = 0):
        view = super().__new__(cls, size)
        view.resize_mode, view.interpolation, view.fill = resize_mode, interpolation, fill
        return view


def whole_image(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """The evaluation view, [3, H, W] uint8: the whole picture, bicubic to (H, W), no crop; or as a `WholeView` says."""
    if not isinstance(size, WholeView):
        return crop_resize(image, (0, 0, *image.size), size, flip=False)
    (height, width), (w, h) = size, image.size
    if size.resize_mode == "squash":
        w, h = width, height
    elif size.resize_mode == "shortest" and height == width:
        w, h = (height, int(height * h / w)) if w <= h else (int(height * w / h), height)
    else:
        ratio = (min if size.resize_mode == "shortest" else max)(h / height, w / width)
        w, h = round(w / ratio), round(h / ratio)
    canvas = Image.new("RGB", (width, height), (size.fill,) * 3)
    corner = (
        (side - full) // 2 if side > full else -round((full - side) / 2) for side, full in ((width, w), (height, h))
    )
    canvas.paste(image.resize((w, h), getattr(Image.Resampling, size.interpolation.upper())), tuple(corner))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class PadCropErase:
    """Resize to `size` (H, W), mirror with chance `flip`, pad by `pad` black px and crop: the recipe of
    re-identification (Luo et al., 2019, Sec. 2). Erasing, with chance `erase`, follows on the device, after
    normalisation, since its noise is normal there (Zhong et al., 2020, arXiv 1708.04896)."""

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


def erase_box(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) in px: area uniform in [0.02, 1/3] of the image, height / width log-uniform in
    [0.3, 1 / 0.3], ten tries; height 0: none fitted."""
    height, width = size
    for _ in range(TRIES):
        pixels = rng.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, 0, 0


def erase_boxes(imgs: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Normal noise in one rectangle of each image, in place: imgs [N, 3, H, W] float, normalised; boxes [N, 5] int64 on
    the CPU: top, left, height, width in px, seed of the noise."""
    for image, (top, left, height, width, seed) in zip(imgs, boxes.tolist()):
        if height:
            generator = torch.Generator(imgs.device).manual_seed(seed)
            image[:, top : top + height, left : left + width].normal_(generator=generator)
    return imgs


@dataclass(frozen=True)
class CropFlipAugment:
    """The whole picture to `resize`, a random crop of `size`, both (H, W) in px, every other one mirrored; then
    AutoAugment's policy of ImageNet (Cubuk et al., 2019, arXiv 1805.09501)."""

    size: tuple[int, int]
    resize: tuple[int, int]
    auto_augment: bool = True

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """An RGB picture -> [3, H, W] uint8."""
        imgs = whole_image(image, self.resize)
        (height, width), (rows, columns) = self.size, self.resize
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        imgs = imgs[:, top : top + height, left : left + width]
        if rng.random() < 0.5:
            imgs = imgs.flip(2)
        return auto_augment(imgs, rng) if self.auto_augment else imgs.contiguous()


def auto_augment(imgs: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """One of AutoAugment's 25 sub-policies for ImageNet on [3, H, W] uint8, chosen by `rng`: torchvision
    draws from torch's global generator, which is set for this image and put back."""
    from torchvision.transforms import AutoAugment  # here and not above: it takes a second to import

    picture = Image.fromarray(imgs.permute(1, 2, 0).numpy())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(1 << 62)))
        picture = AutoAugment(fill=[128, 128, 128])(picture)  # grey, as the policy's authors have it
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class PartsAugment:
    """SETR's: resize by a random factor of `ratio`, crop to `size` (H, W), mirror every other one, distort colours, pad
    with the RGB `fill`, whose pixels have no label."""

    size: tuple[int, int]
    fill: tuple[int, int, int]
    ratio: tuple[float, float] = (0.5, 2.0)
    distort: bool = True

    def __call__(self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """An RGB picture and its mask, [h, w] uint8 of targets -> `imgs` [3, H, W], `masks` [H, W] uint8."""
        short, long = sorted(image.size)
        side = min(self.size)
        factor = min(4 * side / long, side / short)  # SETR's 2048 x 512: the long side is at most 4 times the crop
        factor *= rng.uniform(*self.ratio)
        width, height = (max(1, round(factor * length)) for length in image.size)
        mask = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        top, left, mask = self.crop(mask, rng)
        scale = (image.size[0] / width, image.size[1] / height) * 2
        box = (left, top, left + mask.shape[1], top + mask.shape[0])  # only this part of the image is resized
        box = [min(edge * scale[i], image.size[i % 2]) for i, edge in enumerate(box)]
        image = image.resize(mask.shape[::-1], Image.Resampling.BILINEAR, box=box)
        if rng.random() < 0.5:
            image, mask = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask[:, ::-1]
        pixels = distort_colours(image, rng) if self.distort else np.asarray(image)
        return {"imgs": padded(pixels, self.size, self.fill), "masks": padded(mask, self.size, IGNORE)}

    def crop(self, mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int, np.ndarray]:
        """(top, left, part of the mask), at most of the crop's size: of ten draws the first in which no class has more
        than 75% of the labelled pixels, else the last."""
        high, wide = (min(side, length) for side, length in zip(self.size, mask.shape))
        for _ in range(TRIES):
            top = int(rng.integers(mask.shape[0] - high + 1))
            left = int(rng.integers(mask.shape[1] - wide + 1))
            part = mask[top : top + high, left : left + wide]
            pixels = np.bincount(part.ravel(), minlength=256)[:IGNORE]
            if 0.75 * pixels.sum() > pixels.max():
                break
        return top, left, part


def padded(pixels: np.ndarray, size: tuple[int, int], fill) -> torch.Tensor:
    """[h, w] or [h, w, 3] uint8, filled up below and to the right -> [H, W] or [3, H, W]."""
    whole = np.empty((*size, *pixels.shape[2:]), dtype=np.uint8)
    whole[:] = fill
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return torch.from_numpy(np.moveaxis(whole, -1, 0).copy() if whole.ndim == 3 else whole)


def distort_colours(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion of an RGB picture -> [h, w, 3] uint8 (Liu et al., 2016, "SSD", Sec. 3.6 of its code): each
    with a chance of one half, brightness + [-32, 32], contrast x [0.5, 1.5] (before or after the colours), saturation
    x [0.5, 1.5], hue + [-36, 36] degrees."""
    chosen = rng.random(5) < 0.5
    brightness, contrast = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), rng.uniform(-36, 36)

    def linear(pixels: np.ndarray, factor: float, shift: float) -> np.ndarray:
        return (pixels * np.float32(factor) + np.float32(shift)).clip(0, 255).astype(np.uint8)

    pixels = linear(np.asarray(image), 1, brightness if chosen[0] else 0)
    if chosen[1] and chosen[4]:
        pixels = linear(pixels, contrast, 0)
    if chosen[2] or chosen[3]:
        hsv = np.array(Image.fromarray(pixels).convert("HSV"))
        hsv[..., 1] = linear(hsv[..., 1], saturation if chosen[2] else 1, 0)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + (round(hue * 256 / 360) if chosen[3] else 0)) % 256
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return linear(pixels, contrast, 0) if chosen[1] and not chosen[4] else pixels
