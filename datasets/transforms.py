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
Rng = np.random.Generator


def sample_rng(seed: int, epoch: int, index: int, stream: int) -> Rng:
    """The random numbers of one image in one epoch (a counter-based generator, Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, index]))


def mask_noise(seed: int, epoch: int, index: int, num_patches: int) -> np.ndarray:
    """[L] float32 in [0, 1): the noise by which MAE orders the patches of one image."""
    return sample_rng(seed, epoch, index, MASK_STREAM).random(num_patches, dtype=np.float32)


def random_crop_box(rng: Rng, width: int, height: int, min_area: float, clip: bool = False) -> tuple[tuple, bool]:
    """Box (left, upper, right, lower) in px, and whether to flip: area uniform in [min_area, 1] of the image, aspect
    log-uniform in [3/4, 4/3], ten tries, then the largest central crop of allowed aspect (MAE's, torchvision's
    RandomResizedCrop). clip: MAE's rule for its probe, the first try with its sides clipped."""
    draws, flip, low, high = rng.random((TRIES, 4)), bool(rng.random() < 0.5), math.log(3 / 4), math.log(4 / 3)
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
    """By how much (1, 2, 4 or 8) a JPEG decoder may shrink the picture so that `box` has `oversampling` times the
    pixels of (H, W) a side. At 1.5 a crop is within 2/255 (mean) of the full decode's (tests/test_data.py)."""
    room = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / oversampling
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))


def crop_resize(image: Image.Image, box: tuple, size: tuple[int, int], flip: bool, full_size=None) -> torch.Tensor:
    """Box of an RGB image, bicubic with antialiasing to (H, W) -> [3, H, W] uint8; `box` (left, upper, right, lower)
    in px of the picture of `full_size`, (width, height), from which `image` was perhaps decoded smaller."""
    if full_size in (None, image.size):  # torch's uint8 kernel rounds like Pillow's and takes a third of its time
        pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    else:
        box = tuple(edge * image.size[i % 2] / full_size[i % 2] for i, edge in enumerate(box))
        image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
        pixels = to_tensor(image)
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
    corner = tuple(gap // 2 if gap > 0 else -round(-gap / 2) for gap in (width - w, height - h))
    canvas.paste(image.resize((w, h), getattr(Image.Resampling, size.interpolation.upper())), corner)
    return to_tensor(canvas)


def to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    """An RGB picture, [H, W, 3] uint8, as [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def random_place(rng: Rng, whole: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a part of (h, w): (H, W) px, or as many as there are; all places alike."""
    starts = [int(rng.integers(max(length - side, 0) + 1)) for length, side in zip(whole, size)]
    return tuple(slice(start, min(start + side, length)) for start, side, length in zip(starts, size, whole))


@dataclass(frozen=True)
class PadCropErase:
    """Resize to `size` (H, W), mirror with chance `flip`, pad by `pad` black px and crop (Luo et al., 2019, Sec. 2).
    Erasing, with chance `erase`, follows on the device, after normalisation, since its noise is normal there (Zhong et
    al., 2020, arXiv 1708.04896)."""

    size: tuple[int, int]
    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5

    def __call__(self, image: Image.Image, rng: Rng) -> dict[str, torch.Tensor]:
        """An RGB picture -> `imgs` [3, H, W] uint8 and `erase` [5] int64 for `erase_boxes`."""
        imgs = F.pad(whole_image(image, self.size), (self.pad,) * 4)
        imgs = imgs.flip(2) if rng.random() < self.flip else imgs
        rows, columns = random_place(rng, imgs.shape[1:], self.size)
        erase = erase_box(rng, self.size) if rng.random() < self.erase else (0, 0, 0, 0)
        seed = int(rng.integers(1 << 62))
        return {"imgs": imgs[:, rows, columns].contiguous(), "erase": torch.tensor([*erase, seed])}


def erase_box(rng: Rng, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) in px: area uniform in [0.02, 1/3] of the image, height / width log-uniform in
    [0.3, 1 / 0.3], ten tries; height 0: none fitted."""
    for _ in range(TRIES):
        pixels = rng.uniform(0.02, 1 / 3) * size[0] * size[1]
        ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < h < size[0] and 0 < w < size[1]:
            return int(rng.integers(size[0] - h + 1)), int(rng.integers(size[1] - w + 1)), h, w
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

    def __call__(self, image: Image.Image, rng: Rng) -> dict[str, torch.Tensor]:
        """An RGB picture -> `imgs` [3, H, W] uint8."""
        rows, columns = random_place(rng, self.resize, self.size)
        imgs = whole_image(image, self.resize)[:, rows, columns]
        imgs = imgs.flip(2) if rng.random() < 0.5 else imgs
        if not self.auto_augment:
            return {"imgs": imgs.contiguous()}
        from torchvision.transforms import AutoAugment  # here and not above: it takes a second to import

        picture = Image.fromarray(imgs.permute(1, 2, 0).numpy())
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator: it is put back
            torch.manual_seed(int(rng.integers(1 << 62)))
            return {"imgs": to_tensor(AutoAugment(fill=[128, 128, 128])(picture))}  # grey, as the authors have it


@dataclass(frozen=True)
class PartsAugment:
    """SETR's: resize by a random factor of `ratio`, crop to `size` (H, W), mirror every other one, distort colours, pad
    with the RGB `fill`, whose pixels have no label."""

    size: tuple[int, int]
    fill: tuple[int, int, int]
    ratio: tuple[float, float] = (0.5, 2.0)
    distort: bool = True

    def __call__(self, image: Image.Image, mask: np.ndarray, rng: Rng) -> dict[str, torch.Tensor]:
        """An RGB picture and its mask, [h, w] uint8 of targets -> `imgs` [3, H, W], `masks` [H, W] uint8."""
        (short, long), side = sorted(image.size), min(self.size)
        factor = min(4 * side / long, side / short)  # SETR's 2048 x 512: the long side is at most 4 times the crop
        factor *= rng.uniform(*self.ratio)
        width, height = (max(1, round(factor * length)) for length in image.size)
        mask = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        rows, columns = self.place(mask, rng)
        mask, scale = mask[rows, columns], (image.size[0] / width, image.size[1] / height) * 2
        box = (columns.start, rows.start, columns.stop, rows.stop)  # only this part of the image is resized
        box = [min(edge * scale[i], image.size[i % 2]) for i, edge in enumerate(box)]
        image = image.resize(mask.shape[::-1], Image.Resampling.BILINEAR, box=box)
        if rng.random() < 0.5:
            image, mask = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask[:, ::-1]
        pixels = distort_colours(image, rng) if self.distort else np.asarray(image)
        imgs, masks = np.full((*self.size, 3), self.fill, np.uint8), np.full(self.size, IGNORE, np.uint8)
        imgs[: mask.shape[0], : mask.shape[1]], masks[: mask.shape[0], : mask.shape[1]] = pixels, mask
        return {"imgs": to_tensor(imgs), "masks": torch.from_numpy(masks)}

    def place(self, mask: np.ndarray, rng: Rng) -> tuple[slice, slice]:
        """Of ten draws the first in which no class has more than 75% of the labelled pixels, else the last."""
        for _ in range(TRIES):
            place = random_place(rng, mask.shape, self.size)
            pixels = np.bincount(mask[place].ravel(), minlength=256)[:IGNORE]
            if 0.75 * pixels.sum() > pixels.max():
                break
        return place


def distort_colours(image: Image.Image, rng: Rng) -> np.ndarray:
    """Photometric distortion of an RGB picture -> [h, w, 3] uint8 (Liu et al., 2016, "SSD", Sec. 3.6 of its code): each
    with a chance of one half, brightness + [-32, 32], contrast x [0.5, 1.5] (before or after the colours), saturation
    x [0.5, 1.5], hue + [-36, 36] degrees."""
    brightens, has_contrast, saturates, turns_hue, contrast_first = rng.random(5) < 0.5
    brightness, contrast = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), rng.uniform(-36, 36)

    def linear(pixels: np.ndarray, factor: float, shift: float = 0) -> np.ndarray:
        return (pixels * np.float32(factor) + np.float32(shift)).clip(0, 255).astype(np.uint8)

    pixels = linear(np.asarray(image), 1, brightness if brightens else 0)
    if has_contrast and contrast_first:
        pixels = linear(pixels, contrast)
    if saturates or turns_hue:
        hsv = np.array(Image.fromarray(pixels).convert("HSV"))
        hsv[..., 1] = linear(hsv[..., 1], saturation if saturates else 1)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + (round(hue * 256 / 360) if turns_hue else 0)) % 256
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return linear(pixels, contrast) if has_contrast and not contrast_first else pixels
