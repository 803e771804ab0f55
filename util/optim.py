"""Optimisers of pre-training and fine-tuning."""

import torch
from torch import nn


def adamw_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """MAE's two groups in MAE's order: [0] no decay (1-D or bias), [1] decay (the rest).

    Always two groups, also at weight_decay 0, so that optimiser states stay exchangeable.
    cls_token and mask_token are 3-D and therefore decayed, as in MAE.
    """
    no_decay, decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim <= 1 or name.endswith(".bias")
            (no_decay if is_plain else decay).append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def build_adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95) and eps 1e-8 (MAE, Table 8), fused: one launch a step, and it
    skips the update on the device when its `found_inf` is set."""
    groups = adamw_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def layer_number(name: str, depth: int) -> int:
    """Which layer of a ViT a tensor belongs to: 0 the embeddings, i + 1 block i, depth the branches of JPM
    (copies of the last block), depth + 1 the heads (the numbering of BEiT, Bao et al., 2021)."""
    name = name.removeprefix("base.")
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    if name.startswith(("patch_embed.", "cls_token", "pos_embed", "norm_pre.", "sie_embed")):
        return 0
    return depth if name.startswith(("b1.", "b2.", "norm.")) else depth + 1


def build_finetune_optimizer(
    model: nn.Module,
    depth: int,
    opt: str,
    lr: float,
    weight_decay: float,
    *,
    layer_decay: float = 1.0,
    bias_lr_factor: float = 1.0,
    head_lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 (decay on everything, as in TransReID), or AdamW (betas 0.9, 0.999; no decay on
    1-D tensors, class token and position table). Fused: skips the update where `found_inf` is set.

    Args:
        depth: blocks of the encoder. opt: sgd or adamw.
        layer_decay: learning rates shrink by this factor from each layer to the one below it.
        bias_lr_factor, head_lr_factor: of the learning rate of biases, and of what is not the encoder's (not
            under `base.`).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (depth + 1 - layer_number(name, depth))
            scale *= bias_lr_factor if name.endswith(".bias") else 1.0
            scale *= 1.0 if name.startswith("base.") else head_lr_factor
            plain = parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed"))
            decay = 0.0 if opt == "adamw" and plain else weight_decay
            groups.setdefault((scale, decay), []).append(parameter)
    listed = [{"params": p, "lr_scale": scale, "weight_decay": d} for (scale, d), p in groups.items()]
    if opt == "adamw":
        return torch.optim.AdamW(listed, lr=lr, betas=(0.9, 0.999), fused=True)
    optimizer = torch.optim.SGD(listed, lr=lr, momentum=0.9, fused=True)
    for parameter in (p for group in listed for p in group["params"]):
        # fused SGD leaves a fresh buffer unset where `found_inf` skips the very first update
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
