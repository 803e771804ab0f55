"""Scoring a segmentation model: every test image at its own size, by windows or whole."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from datasets.seg import LabelSpace, PartsSplit, PartsTestItems, open_pair, shown_to_model
from metrics.seg import confusion_matrix
from models_setr import SETR
from util.dist import get_rank, get_world_size, is_main_process
from util.errors import InputError
from util.progress import Progress
from util.stop import init_worker

MODES = ("slide", "whole")


@dataclass(frozen=True)
class PartsResult:
    """confusion: [K, K] int64 of the whole split. rows: [n] int64 of the images that could be read;
    each: [n, K, K] int64, theirs. unreadable: `path<tab>reason` of the others."""

    confusion: np.ndarray
    rows: np.ndarray
    each: np.ndarray
    unreadable: list[str]


def model_size(size: tuple[int, int], crop: tuple[int, int], mode: str) -> tuple[int, int]:
    """(width, height) at which an image is shown to the model. slide: its sides keep their ratio, and the
    smaller one reaches the crop, so that both hold a window; whole: the crop's.

    Args:
        size: (width, height) of the image. crop: (H, W).
    """
    if mode == "whole":
        return crop[1], crop[0]
    factor = max(crop[1] / size[0], crop[0] / size[1])
    return max(crop[1], round(factor * size[0])), max(crop[0], round(factor * size[1]))


def window_starts(length: int, crop: int) -> list[int]:
    """Where windows of `crop` px begin: every 2/3 of a window (341 of 512), the last at the very end."""
    stride = max(1, 2 * crop // 3)
    return [min(i * stride, length - crop) for i in range(math.ceil((length - crop) / stride) + 1)]


def sliding_logits(model: SETR, imgs: torch.Tensor, batch_size: int) -> torch.Tensor:
    """[3, h, w] uint8 on the device, h and w no smaller than the crop -> [K, h, w] float32: means of the
    logits of all windows over each pixel."""
    crop, (high, wide) = model.base.img_size, imgs.shape[1:]
    corners = [(y, x) for y in window_starts(high, crop[0]) for x in window_starts(wide, crop[1])]
    total = torch.zeros(model.config.num_classes, high, wide, device=imgs.device)
    seen = torch.zeros(high, wide, device=imgs.device)
    for first in range(0, len(corners), batch_size):
        part = corners[first : first + batch_size]
        windows = torch.stack([imgs[:, y : y + crop[0], x : x + crop[1]] for y, x in part])
        for (y, x), logits in zip(part, model.predict(windows).float()):
            total[:, y : y + crop[0], x : x + crop[1]] += logits
            seen[y : y + crop[0], x : x + crop[1]] += 1
    return total / seen


def predict_mask(
    model: SETR, imgs: torch.Tensor, size: tuple[int, int], batch_size: int, amp_dtype=None
) -> torch.Tensor:
    """[3, h, w] uint8 on the device, of `model_size` -> [H, W] int64 classes at `size`: logits are enlarged
    or shrunk, and the largest wins.

    Raises:
        FloatingPointError: logits that are not finite.
    """
    with torch.autocast(imgs.device.type, amp_dtype, enabled=amp_dtype is not None):
        logits = sliding_logits(model, imgs, batch_size)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("logits that are not finite")
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].argmax(dim=0)


@torch.inference_mode()
def evaluate_parts(
    model: SETR,
    part: PartsSplit,
    space: LabelSpace,
    mode: str,
    *,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None = None,
) -> PartsResult:
    """One confusion matrix of a split at the images' own sizes, the same on every rank.

    The ranks share out the images; each is computed once and alone, so that nothing is padded and the numbers
    are equal on any number of ranks.

    Raises:
        InputError: not one pair can be read, or the model answers with numbers that are not finite.
    """
    rows = list(range(get_rank(), len(part), get_world_size()))
    device = model.base.pos_embed.device
    resized = partial(model_size, crop=model.base.img_size, mode=mode)
    loader = DataLoader(
        PartsTestItems(part, space, rows, resized), batch_size=None, num_workers=num_workers, worker_init_fn=init_worker
    )
    progress = Progress(f"{mode}: test images", len(rows), shown=is_main_process())
    found: dict[int, torch.Tensor | str] = {}
    for done, (row, imgs, masks, problem) in enumerate(loader, 1):
        row = int(row)
        if problem:
            found[row] = f"{part.images.relative(row)}\t{problem}"
        else:
            masks = masks.to(device)
            try:
                predicted = predict_mask(model, imgs.to(device), masks.shape, batch_size, amp_dtype)
                found[row] = confusion_matrix(masks, predicted, len(space.names)).cpu()
            except FloatingPointError:
                found[row] = "!"  # all ranks must hear of it
        progress.update(done)
    progress.close()
    return _gathered(found, part)


@torch.inference_mode()
def look_at(model: SETR, part: PartsSplit, space: LabelSpace, mode: str, amp_dtype, row: int) -> tuple:
    """An image of the split, its truth and the model's answer, [h, w] uint8 classes at its size."""
    picture, mask = open_pair(part.images[row], part.masks[row])
    truth, crop = space.table[mask], model.base.img_size
    imgs = shown_to_model(picture, model_size(picture.size, crop, mode)).to(model.base.pos_embed.device)
    answer = predict_mask(model, imgs, truth.shape, 16, amp_dtype)
    return picture, truth, answer.cpu().numpy().astype(np.uint8)


def _gathered(found: dict[int, torch.Tensor | str], part: PartsSplit) -> PartsResult:
    if get_world_size() > 1:
        parts = [None] * get_world_size()
        dist.all_gather_object(parts, found)
        found = {row: value for each in parts for row, value in each.items()}
    diverged = [row for row, value in found.items() if isinstance(value, str) and value == "!"]
    if diverged:
        raise InputError(
            f"the answers for {len(diverged)} test images, e.g. {part.images.relative(min(diverged))}, are "
            "not finite: the model has diverged, or needs --amp none"
        )
    unreadable = [value for _, value in sorted(found.items()) if isinstance(value, str)]
    rows = [row for row, value in sorted(found.items()) if not isinstance(value, str)]
    if not rows:
        raise InputError(f"none of the {len(part)} test pairs can be read, e.g. {unreadable[0]}")
    each = np.stack([found[row].numpy() for row in rows])
    return PartsResult(each.sum(axis=0), np.array(rows), each, unreadable)
