"""Optimiser of pre-training."""

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
    return [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    ]


def build_adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95) and eps 1e-8 (MAE, Table 8), fused: one launch a step, and it
    skips the update on the device when its `found_inf` is set."""
    groups = adamw_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
