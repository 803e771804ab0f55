"""MAE's linear probe (He et al., 2022, Appendix A.1): one linear layer on frozen features, trained by LARS.

All heads (read-outs x label columns) are trained side by side, so that each image passes the encoder once.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.items import PretrainDataset, build_loader
from datasets.samplers import EpochBatches
from models_probe import ReadOuts
from util.errors import InputError
from util.optim import LARS, cosine_lr, set_lr
from util.progress import Progress
from util.stop import init_worker

Batches = Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]  # (numbers of the images [B], {read-out: [B, D]})


def stored_batches(epoch: int, order: EpochBatches, rows: np.ndarray, features: dict[str, torch.Tensor]) -> Batches:
    """The updates of an epoch on images `rows` [m] int64, of features [n, D] that were extracted once."""
    for step in range(order.batches_per_epoch):
        chosen = rows[order.global_batch(epoch, step)]
        at = torch.from_numpy(chosen).to(next(iter(features.values())).device)
        yield chosen, {name: values[at] for name, values in features.items()}


@torch.no_grad()
def crop_batches(
    epoch: int, order: EpochBatches, rows: np.ndarray, images: PretrainDataset, read_outs: ReadOuts,
    *, batch_size: int, num_workers: int,
) -> Batches:  # fmt: skip
    """The updates of an epoch, of random resized crops that pass the frozen encoder, `batch_size` at a time. A crop is
    a function of (seed, epoch, place among `rows` [m] int64); `images` holds these alone."""
    device = next(read_outs.parameters()).device
    steps = [order.global_batch(epoch, step) for step in range(order.batches_per_epoch)]
    cuts = [np.split(places, range(batch_size, len(places), batch_size)) for places in steps]
    pieces = [[(epoch, place) for place in part.tolist()] for parts in cuts for part in parts]
    loader = iter(build_loader(images, pieces, num_workers, device.type == "cuda", init_worker))
    for places, parts in zip(steps, cuts):
        found = []
        for batch in islice(loader, len(parts)):
            if problem := next(filter(None, batch["problem"]), ""):
                raise InputError(f"an image was readable and is no longer: {problem}")
            features = read_outs.encode(batch["imgs"].to(device, non_blocking=True))
            # contiguous: a class token is a view that would keep the tokens of all patches in memory
            found.append({name: values.float().contiguous() for name, values in features.items()})
        yield rows[places], {name: torch.cat([part[name] for part in found]) for name in found[0]}


def build_head(width: int, num_classes: int, seed: int) -> nn.Sequential:
    """BatchNorm without scale and shift, and a linear layer: weights normal with deviation 0.01, biases 0. Statistics
    for testing are the plain mean over all updates: a moving average as in MAE needs many."""
    linear = nn.Linear(width, num_classes)
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, momentum=None, affine=False), linear)


def train_heads(
    batches: Callable[[int], Batches], order: EpochBatches, widths: dict[str, int],
    labels: dict[str, tuple[torch.Tensor, int]], args, device: torch.device,
) -> dict[tuple[str, str], nn.Sequential]:  # fmt: skip
    """Train one head for every (read-out, label column), in float32; they come back in eval mode.

    MAE's recipe, Table 9: lr = blr x batch / 256, linear warm-up, a cosine to 0; no weight decay, momentum 0.9.

    Args:
        batches: epoch -> its updates, in the order of `order`.
        widths: {read-out: D}. labels: {column: ([n] int64 on the CPU, -1 for images to leave out, classes)}.
        args: blr, epochs, warmup_epochs, seed.
    """
    heads = {}
    for name, width in widths.items():
        heads |= {
            (name, column): build_head(width, count, args.seed).to(device) for column, (_, count) in labels.items()
        }
    optimizer = LARS([weight for head in heads.values() for weight in head.parameters()])
    lr = args.blr * order.batch_size / 256
    progress = Progress("linear probe, epochs", args.epochs)
    for epoch in range(args.epochs):
        for step, (rows, features) in enumerate(batches(epoch)):
            now = epoch + step / order.batches_per_epoch
            set_lr(optimizer, cosine_lr(now, lr, 0.0, args.warmup_epochs, args.epochs))
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for (name, column), head in heads.items():
                target = labels[column][0][rows]
                known = target >= 0
                if known.sum() > 1:  # what BatchNorm needs
                    loss = F.cross_entropy(head(features[name][known.to(device)]), target[known].to(device))
                    loss.backward()  # head by head: only one graph is held
                    total += loss.detach()
            optimizer.step()
        mean = (total / len(heads)).item()
        if not np.isfinite(mean):
            raise InputError(f"the probe's loss is {mean} in epoch {epoch}: lower --blr {args.blr:g}")
        progress.update(epoch + 1, f"loss {mean:.4f}" if (epoch + 1) % 10 == 0 else "")
    progress.close()
    return {key: head.eval() for key, head in heads.items()}
