"""JPEG decoding and cropping on the device: workers only read files and draw boxes (`--decode gpu`)."""

import io

import numpy as np
import torch
from PIL import Image

from datasets.images import is_turned, open_rgb

CANVAS_PIXELS = 2**26  # pictures are padded to one size in groups of at most this many pixels


def encoded_or_pixels(data: bytes) -> tuple[torch.Tensor, tuple[int, int], bool]:
    """What a worker hands on: an upright JPEG as it is, anything else decoded.

    Returns:
        (uint8 [n]: the file, or its pixels [3, h, w] flattened; (width, height) in px; is it a JPEG?)
    Raises:
        `datasets.images.UNREADABLE`: no image, or a JPEG without its end mark.
    """
    with Image.open(io.BytesIO(data)) as image:
        size = image.size
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not is_turned(image)
    if plain and data.rstrip(b"\0").endswith(b"\xff\xd9"):
        return torch.frombuffer(bytearray(data), dtype=torch.uint8), size, True
    picture = open_rgb(io.BytesIO(data))  # raises where the file is cut
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).reshape(-1)
    return pixels, picture.size, False


def collate_encoded(samples: list[dict]) -> dict:
    """Samples of `PretrainDataset(decode="gpu")` -> one batch; all files in one buffer, which costs one
    shared-memory segment a batch instead of one an image."""
    batch = {
        "data": torch.cat([sample["data"] for sample in samples]),
        "lengths": torch.tensor([len(sample["data"]) for sample in samples]),
        "sizes": torch.tensor([sample["size"] for sample in samples]),  # [N, 2] width, height
        "is_jpeg": torch.tensor([sample["is_jpeg"] for sample in samples]),
        "boxes": torch.tensor([sample["box"] for sample in samples]),  # [N, 4]
        "flips": torch.tensor([sample["flip"] for sample in samples]),
        "noise": torch.stack([sample["noise"] for sample in samples]),
        "problem": [sample["problem"] for sample in samples],
    }
    if "teacher_embed" in samples[0]:
        batch["teacher_embed"] = torch.stack([sample["teacher_embed"] for sample in samples])
    return batch


def decode_batch(batch: dict, size: tuple[int, int], teacher_size, device: torch.device) -> dict:
    """A collated batch -> the same with `imgs` [N, 3, H, W] uint8 on `device` (and `teacher_imgs`, the
    whole pictures at `teacher_size`, unless that is None) in place of the files."""
    pictures, failed = decode_pictures(batch, device)
    flips = batch["flips"].to(device)
    result = {
        "imgs": crop_batch(pictures, batch["boxes"], flips, size),
        "noise": batch["noise"].to(device, non_blocking=True),
        "problem": [old or new for old, new in zip(batch["problem"], failed)],
    }
    if "teacher_embed" in batch:
        result["teacher_embed"] = batch["teacher_embed"].to(device, non_blocking=True)
    elif teacher_size is not None:
        whole = torch.cat([torch.zeros_like(batch["sizes"]), batch["sizes"]], dim=1)
        result["teacher_imgs"] = crop_batch(pictures, whole, torch.zeros_like(flips), teacher_size)
    return result


def decode_pictures(batch: dict, device: torch.device) -> tuple[list[torch.Tensor], list[str]]:
    """-> ([3, h, w] uint8 a picture on `device`, what was wrong with each or ''); damaged ones are grey."""
    # here and not above: torchvision has announced that it will drop its decoders some day
    from torchvision.io import ImageReadMode, decode_jpeg

    pieces = list(batch["data"].cpu().split(batch["lengths"].tolist()))
    is_jpeg, sizes = batch["is_jpeg"].tolist(), batch["sizes"].tolist()
    problems = [""] * len(pieces)
    decoded: dict[int, torch.Tensor] = {}
    jpegs = [i for i, jpeg in enumerate(is_jpeg) if jpeg]
    if jpegs:
        try:
            files = [pieces[i] for i in jpegs]
            decoded = dict(zip(jpegs, decode_jpeg(files, mode=ImageReadMode.RGB, device=device)))
        except RuntimeError:  # one damaged file spoils the call: find it
            for i in jpegs:
                try:
                    decoded[i] = decode_jpeg(pieces[i], mode=ImageReadMode.RGB, device=device)
                except RuntimeError as error:
                    problems[i] = " ".join(f"jpeg decoder: {error}".split())
    for i, (width, height) in enumerate(sizes):
        if problems[i]:
            decoded[i] = torch.full((3, height, width), 128, dtype=torch.uint8, device=device)
        elif not is_jpeg[i]:
            decoded[i] = pieces[i].view(3, height, width).to(device, non_blocking=True)
    return [decoded[i] for i in range(len(pieces))], problems


def crop_batch(
    pictures: list[torch.Tensor], boxes: torch.Tensor, flips: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Crop, bicubic resize with antialiasing and flip -> [N, 3, H, W] uint8, as `crop_resize` does.

    The resize is two batched matrix products, out = W_y P W_x^T, with Pillow's filter weights.

    Args:
        pictures: N of [3, h, w] uint8.
        boxes: [N, 4] int, (left, upper, right, lower) in px.
        flips: [N] bool on the pictures' device.
        size: (H, W) in px.
    """
    device, result = pictures[0].device, []
    corners = boxes.tolist()
    widest = max(right - left for left, _, right, _ in corners)
    tallest = max(lower - upper for _, upper, _, lower in corners)
    group = max(CANVAS_PIXELS // (widest * tallest), 1)
    for first in range(0, len(pictures), group):
        part = range(first, min(first + group, len(pictures)))
        wide = max(corners[i][2] - corners[i][0] for i in part)
        tall = max(corners[i][3] - corners[i][1] for i in part)
        canvas = torch.zeros(len(part), 3, tall, wide, device=device)
        for row, i in enumerate(part):
            left, upper, right, lower = corners[i]
            canvas[row, :, : lower - upper, : right - left] = pictures[i][:, upper:lower, left:right]
        extent = torch.tensor([corners[i] for i in part], device=device)
        weight_y = filter_weights(extent[:, 3] - extent[:, 1], tall, size[0])
        weight_x = filter_weights(extent[:, 2] - extent[:, 0], wide, size[1])
        out = weight_y[:, None] @ canvas @ weight_x[:, None].transpose(2, 3)  # [n, 3, H, W]
        result.append(out.round_().clamp_(0, 255).to(torch.uint8))
    imgs = torch.cat(result)
    return torch.where(flips[:, None, None, None], imgs.flip(3), imgs)


def filter_weights(lengths: torch.Tensor, padded: int, out: int) -> torch.Tensor:
    """Resampling matrices of N signals of `lengths` [N] px, zero-padded to `padded`, -> [N, out, padded].

    The cubic convolution kernel with a = -0.5, widened where the signal shrinks (Pillow's BICUBIC).
    """
    scale = (lengths / out)[:, None, None]  # [N, 1, 1]
    stretch = scale.clamp_min(1)
    centre = (torch.arange(out, device=lengths.device) + 0.5)[None, :, None] * scale
    position = torch.arange(padded, device=lengths.device)[None, None, :] + 0.5
    x = ((position - centre) / stretch).abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))
    weight = weight * (position < lengths[:, None, None])
    return weight / weight.sum(dim=2, keepdim=True)
