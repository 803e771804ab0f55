"""MAE's linear probe (He et al., 2022, Appendix A.1): one linear layer on frozen features, trained by LARS.

All heads (read-outs x label columns) are trained side by side, so that each image passes the encoder once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Sampler

from datasets.path_list import PathList
from datasets.pretrain import EpochBatches, PretrainDataset, build_loader
from models_probe import ReadOuts
from util.errors import InputError
from util.optim import LARS, cosine_lr, set_lr
from util.progress import Progress
from util.stop import init_worker


@dataclass(frozen=True)
class Recipe:
    """MAE's, Table 9: lr = blr x batch / 256, linear warm-up, a cosine to 0; no weight decay, momentum 0.9.

    batch: images an update; where there are fewer, all of them.
    """

    blr: float = 0.1
    batch: int = 16384
    epochs: int = 90
    warmup_epochs: float = 10.0
    seed: int = 0


class StoredBatches:
    """Batches of features that were extracted once.

    Args:
        features: {read-out: [n, D] float32 on the device}. rows: [m] int64, those to train on.
    """

    def __init__(self, features: dict[str, torch.Tensor], rows: np.ndarray, recipe: Recipe):
        self.features, self.rows = features, rows
        self.order = EpochBatches(len(rows), min(recipe.batch, len(rows)), 0, 1, recipe.seed)

    def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yields (rows [B], {read-out: [B, D]}), an update each."""
        for step in range(self.order.batches_per_epoch):
            rows = self.rows[self.order.global_batch(epoch, step)]
            at = torch.from_numpy(rows).to(next(iter(self.features.values())).device)
            yield rows, {name: values[at] for name, values in self.features.items()}


class _Chunks(Sampler):
    """An epoch of `order` in parts that the encoder can take at once: lists of (epoch, index)."""

    def __init__(self, order: EpochBatches, size: int):
        self.order, self.size, self.number = order, size, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.order.batches_per_epoch):
            rows = self.order.global_batch(self.number, step).tolist()
            for start in range(0, len(rows), self.size):
                yield [(self.number, row) for row in rows[start : start + self.size]]


class CropBatches:
    """Batches of features of random resized crops, mirrored by chance: each epoch through the frozen encoder.

    A crop is a function of (seed, epoch, place of the image among `rows`).

    Args:
        paths: all images. rows: [m] int64, those to train on; they could be read before.
        crop_min: smallest crop as a share of the image's area.
        batch_size: images that the encoder takes at once; it does not change the result.
    """

    def __init__(
        self,
        read_outs: ReadOuts,
        paths: PathList,
        rows: np.ndarray,
        recipe: Recipe,
        *,
        crop_min: float,
        batch_size: int,
        num_workers: int,
        amp_dtype: torch.dtype | None,
    ):
        self.read_outs, self.rows, self.amp_dtype = read_outs, rows, amp_dtype
        self.device = read_outs.pos_embed.device
        self.order = EpochBatches(len(rows), min(recipe.batch, len(rows)), 0, 1, recipe.seed)
        self.chunks = _Chunks(self.order, batch_size)
        chosen = PathList(paths.root, (paths.relative(row) for row in rows.tolist()))
        images = PretrainDataset(chosen, read_outs.img_size, 0, seed=recipe.seed, min_area=crop_min)
        self.loader = build_loader(images, self.chunks, num_workers, self.device.type == "cuda", init_worker)

    def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yields (rows [B], {read-out: [B, D]}), an update each.

        Raises:
            InputError: an image that could be read before cannot be read now.
        """
        self.chunks.number, step, parts = epoch, 0, []
        for batch in self.loader:
            problem = next((problem for problem in batch["problem"] if problem), "")
            if problem:
                raise InputError(f"an image was readable and is no longer: {problem}")
            parts.append(self._encode(batch["imgs"]))
            if sum(len(next(iter(part.values()))) for part in parts) == self.order.batch_size:
                rows = self.rows[self.order.global_batch(epoch, step)]
                yield rows, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                step, parts = step + 1, []

    @torch.no_grad()
    def _encode(self, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            found = self.read_outs.encode(imgs.to(self.device, non_blocking=True))
        # contiguous: a class token is a view that would keep the tokens of all patches in memory
        return {name: values.float().contiguous() for name, values in found.items()}


def build_head(width: int, num_classes: int, seed: int) -> nn.Sequential:
    """BatchNorm without scale and shift, and a linear layer: weights normal with deviation 0.01, biases 0; a
    function of the sizes and the seed.

    The statistics for testing are the plain mean over all updates: the features do not change, and a moving
    average as in MAE would still hold its initial value where there are few updates.
    """
    linear = nn.Linear(width, num_classes)
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, momentum=None, affine=False), linear)


def train_heads(
    batches: StoredBatches | CropBatches,
    widths: dict[str, int],
    labels: dict[str, tuple[torch.Tensor, int]],
    recipe: Recipe,
    device: torch.device,
) -> dict[tuple[str, str], nn.Sequential]:
    """Train one head for every (read-out, label column), in float32.

    Args:
        widths: {read-out: D}. labels: {column: ([n] int64 on the CPU, -1 for images to leave out, classes)}.
    Returns:
        The heads, in eval mode.
    Raises:
        InputError: a loss that is not finite.
    """
    heads = {
        (name, column): build_head(width, count, recipe.seed).to(device)
        for name, width in widths.items()
        for column, (_, count) in labels.items()
    }
    optimizer = LARS([weight for head in heads.values() for weight in head.parameters()])
    lr = recipe.blr * batches.order.batch_size / 256
    progress = Progress("linear probe, epochs", recipe.epochs)
    for epoch in range(recipe.epochs):
        for step, (rows, features) in enumerate(batches.epoch(epoch)):
            now = epoch + step / batches.order.batches_per_epoch
            set_lr(optimizer, cosine_lr(now, lr, 0.0, recipe.warmup_epochs, recipe.epochs))
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for (name, column), head in heads.items():
                target = labels[column][0][rows]
                known = target >= 0
                if known.sum() > 1:  # what BatchNorm needs
                    logits = head(features[name][known.to(device)])
                    loss = F.cross_entropy(logits, target[known].to(device))
                    loss.backward()  # head by head: only one of them is held for it
                    total += loss.detach()
            optimizer.step()
        mean = (total / len(heads)).item()
        if not np.isfinite(mean):
            raise InputError(f"the probe's loss is {mean} in epoch {epoch}: lower --blr {recipe.blr:g}")
        progress.update(epoch + 1, f"loss {mean:.4f}" if (epoch + 1) % 10 == 0 else "")
    progress.close()
    return {key: head.eval() for key, head in heads.items()}
