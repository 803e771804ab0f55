"""What a downstream task hands to the training loop."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler


@dataclass
class Task:
    """One task, built from flags and data; engine_finetune.py runs it without knowing which it is.

    model: what is trained and saved, on the device.
    optimizer: fused, its groups with `lr_scale`.
    dataset, batches: an item of `batches` is a list of what `dataset` takes; both as in pre-training.
    loss: (the model or its DDP wrapper, a batch on the device) -> terms, scalars; "loss" is descended.
    shown: means of terms -> what a log line says of them.
    lr: fractional epoch, 0 at the start -> learning rate.
    evaluate: on every rank, with whether training is over; numbers by name on rank 0, empty elsewhere.
    config: what builds the model again. facts: what a continued run must share.
    header: lines about data and model to print before the start.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    batches: Sampler
    loss: Callable[[nn.Module, dict], dict[str, torch.Tensor]]
    shown: Callable[[dict[str, float]], list[str]]
    lr: Callable[[float], float]
    evaluate: Callable[[bool], dict]
    config: dict
    facts: dict
    header: list[str] = field(default_factory=list)
