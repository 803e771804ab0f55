"""Optimisers and learning rate schedules of pre-training, fine-tuning and probes."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def adamw_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """MAE's two groups in MAE's order: [0] no decay (1-D or bias), [1] decay (the rest; also cls_token and mask_token),
    also at weight_decay 0, so that optimiser states stay exchangeable."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = {name for name, parameter in named.items() if parameter.ndim <= 1 or name.endswith(".bias")}
    decayed = {"params": [p for name, p in named.items() if name not in plain], "weight_decay": weight_decay}
    return [{"params": [p for name, p in named.items() if name in plain], "weight_decay": 0.0}, decayed]


def build_adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95) and eps 1e-8 (MAE, Table 8); fused: it skips the update where `found_inf` is set."""
    return torch.optim.AdamW(adamw_groups(model, weight_decay), lr=lr, betas=(0.9, 0.95), fused=True)


class MuonAdamW:
    """Muon (Jordan et al., 2024) for the matrices of the transformer blocks, AdamW as above for all else: embeddings,
    tokens, biases, norms, first and last layer. Updates of a matrix [A, B] are scaled by 0.2 sqrt(max(A, B)), so that
    they are as large as AdamW's and its learning rate and weight decay carry over (Liu et al., 2025, arXiv 2502.16982).
    Like an optimiser; unlike the fused ones it asks the device whether an update is to be skipped."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if "blocks." in name and p.ndim == 2]
        chosen, (plain, decayed) = set(map(id, matrices)), adamw_groups(model, weight_decay)
        decayed["params"] = [p for p in decayed["params"] if id(p) not in chosen]
        own = {"weight_decay": weight_decay, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        muon = torch.optim.Muon(matrices, lr=lr, **own)
        self.parts = [torch.optim.AdamW([plain, decayed], lr=lr, betas=(0.9, 0.95), fused=True), muon]
        self.grad_scale = self.found_inf = None

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        if self.found_inf is None or not self.found_inf.item():
            for part in self.parts:
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        states = [part.state_dict() for part in self.parts]
        return {"parts": states, "param_groups": [group for state in states for group in state["param_groups"]]}

    def load_state_dict(self, content: dict) -> None:
        for part, state in zip(self.parts, content["parts"], strict=True):
            part.load_state_dict(state)


def layer_number(name: str, depth: int) -> int:
    """The layer of a ViT that a tensor belongs to: 0 the embeddings, i + 1 block i, depth the branches of JPM (copies
    of the last block), depth + 1 the heads (the numbering of BEiT, Bao et al., 2021)."""
    name = name.removeprefix("base.")
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    if name.startswith(("patch_embed.", "cls_token", "pos_embed", "norm_pre.", "sie_embed")):
        return 0
    return depth if name.startswith(("b1.", "b2.", "norm.")) else depth + 1


def build_finetune_optimizer(
    model: nn.Module, depth: int, opt: str, lr: float, weight_decay: float, *, layer_decay: float = 1.0,
    bias_lr_factor: float = 1.0, head_lr_factor: float = 1.0,
) -> torch.optim.Optimizer:  # fmt: skip
    """sgd with momentum 0.9 (decay on everything, as in TransReID), or adamw (betas 0.9, 0.999; no decay on 1-D
    tensors, class token and position table). Fused: skips the update where `found_inf` is set.

    Args:
        layer_decay: learning rates shrink by this factor from each of `depth` layers to the one below it: `lr_scale`.
        bias_lr_factor, head_lr_factor: of the peak rates of biases, and of what is not the encoder's (`model.backbone`,
            default `base.`): `peak_scale`. As in TransReID and SETR, first and last rate are those of all.
    """
    backbone = getattr(model, "backbone", "base.")
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (depth + 1 - layer_number(name, depth))
            peak = bias_lr_factor if name.endswith(".bias") else 1.0
            peak *= 1.0 if name.startswith(backbone) else head_lr_factor
            plain = parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed"))
            decay = 0.0 if opt == "adamw" and plain else weight_decay
            groups.setdefault((scale, peak, decay), []).append(parameter)
    names = ("lr_scale", "peak_scale", "weight_decay")
    listed = [{"params": params, **dict(zip(names, key))} for key, params in groups.items()]
    if opt == "adamw":
        return torch.optim.AdamW(listed, lr=lr, betas=(0.9, 0.999), fused=True)
    optimizer = torch.optim.SGD(listed, lr=lr, momentum=0.9, fused=True)
    for parameter in (p for group in listed for p in group["params"]):
        # fused SGD leaves a fresh buffer unset where `found_inf` skips the very first update
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., 2017, arXiv 1708.03888, eq. 5 to 6), with momentum:

        u = g + weight_decay w;   v <- momentum v + eta |w| / |u| u;   w <- w - lr v

    Tensors of one dimension get v <- momentum v + g: no weight decay, no adaptation. The ratio is 1 where |w| or |u| is
    0. As in MAE's and MoCo v3's probes `lr` scales all of v; in the paper it enters v, the same while it is constant.
    """

    def __init__(self, params: Iterable, lr=0.0, *, weight_decay=0.0, momentum=0.9, trust_coefficient=0.001):
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": trust_coefficient}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                update = weight.grad
                if weight.ndim > 1:
                    update = update.add(weight, alpha=group["weight_decay"])
                    sizes = weight.norm(), update.norm()
                    usable = (sizes[0] > 0) & (sizes[1] > 0)
                    update = update * torch.where(usable, group["eta"] * sizes[0] / sizes[1], 1.0)
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.mul_(group["momentum"]).add_(update)
                weight.sub_(group["lr"] * velocity)


def cosine_lr(epoch: float, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """MAE's schedule at `epoch` (fractional, 0 at the start): linear warm-up from 0, half a cosine down to min_lr."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def transreid_lr(epoch: float, lr: float, warmup_lr: float, min_lr: float, warmup: float, epochs: float) -> float:
    """TransReID's schedule: linear from `warmup_lr`, then half a cosine that counts from epoch 0; constant within an
    epoch, which counts from 1 (`epoch`: fractional, 0 at the start)."""
    epoch = math.floor(epoch) + 1
    if epoch < warmup:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1)))


def poly_lr(epoch: float, lr: float, warmup_lr: float, min_lr: float, warmup: float, epochs: float) -> float:
    """SETR's schedule at `epoch` (fractional): linear from `warmup_lr`, then (1 - progress)^0.9 down to min_lr."""
    if epoch < warmup:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup
    left = 1 - min((epoch - warmup) / max(epochs - warmup, 1e-12), 1)
    return min_lr + (lr - min_lr) * left**0.9


def set_lr(optimizer, lr: float) -> None:
    """Write lr into every parameter group, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
