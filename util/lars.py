"""LARS, the optimiser of MAE's linear probe."""

from collections.abc import Iterable

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., 2017, arXiv 1708.03888, eq. 5 to 6), with momentum:

        u = g + weight_decay w;   v <- momentum v + eta |w| / |u| u;   w <- w - lr v

    Tensors of one dimension (biases) get v <- momentum v + g: no weight decay, no adaptation. The ratio is 1
    where |w| or |u| is 0. As in MAE's and MoCo v3's probes `lr` scales all of v; in the paper it enters v,
    which is the same while it does not change.

    Args:
        params: tensors or groups. lr: learning rate. weight_decay: of tensors with two dimensions and more.
        momentum: of v. trust_coefficient: eta.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.0,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every tensor that has a gradient."""
        for group in self.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                update = weight.grad
                if weight.ndim > 1:
                    update = update.add(weight, alpha=group["weight_decay"])
                    sizes = weight.norm(), update.norm()
                    ratio = group["trust_coefficient"] * sizes[0] / sizes[1]
                    usable = (sizes[0] > 0) & (sizes[1] > 0)
                    update = update * torch.where(usable, ratio, torch.ones_like(ratio))
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.mul_(group["momentum"]).add_(update)
                weight.sub_(group["lr"] * velocity)
