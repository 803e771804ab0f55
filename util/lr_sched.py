"""Learning rate and loss-weight schedules: pure functions of the (fractional) epoch."""

import math


def cosine_lr(epoch: float, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """MAE's schedule: linear warm-up from 0, then half a cosine down to min_lr.

    Args:
        epoch: epochs done, fractional; 0 at the start.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def transreid_lr(epoch: float, lr: float, warmup_lr: float, min_lr: float, warmup: float, epochs: float):
    """TransReID's schedule: linear from `warmup_lr`, then half a cosine that counts from epoch 0.

    Args:
        epoch: the number of the epoch, from 1; it is constant within one.
    """
    if epoch < warmup:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1)))


def poly_lr(epoch: float, lr: float, warmup_lr: float, min_lr: float, warmup: float, epochs: float) -> float:
    """SETR's schedule: (1 - progress)^0.9 from lr down to min_lr; before it, where there is a warm-up, linear
    from `warmup_lr`.

    Args:
        epoch: epochs done, fractional; 0 at the start.
    """
    if epoch < warmup:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup
    left = 1 - min((epoch - warmup) / max(epochs - warmup, 1e-12), 1)
    return min_lr + (lr - min_lr) * left**0.9


def ramp(epoch: float, warmup_epochs: float) -> float:
    """0 -> 1 linearly over the warm-up, then 1; scales the distillation weights."""
    return min(1.0, epoch / warmup_epochs) if warmup_epochs > 0 else 1.0


def set_lr(optimizer, lr: float) -> None:
    """Write lr into every parameter group, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
