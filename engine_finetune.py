"""One epoch of fine-tuning, the same loop for every task."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from finetune.task import Task
from util.errors import InputError
from util.loop import CommittedBuffers, StepWatch, apply_update
from util.meter import Meter
from util.optim import set_lr
from util.stop import NoGuard, StopGuard

STEADIER = "lower --lr or set --clip_grad 1 (name them after --allow_change), or use --amp none"
STAYS_ON_HOST = ("problem", "erase")  # read there: no need to wait for the device


@dataclass
class FinetuneRun:
    """What one run holds; `epoch` and `batches_done` say which updates are in the weights."""

    task: Task
    bare: nn.Module  # the task's model: what is saved
    model: nn.Module  # what the loss calls: bare, or bare wrapped in DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16 only
    loader: torch.utils.data.DataLoader
    device: torch.device
    amp_dtype: torch.dtype | None  # None: float32
    output_dir: Path
    save_if_due: Callable[["FinetuneRun"], None]
    guard: StopGuard | NoGuard = field(default_factory=NoGuard)
    epoch: int = 0
    batches_done: int = 0
    meter: Meter = field(default_factory=Meter)
    bad_steps_in_row: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"total": 0.0, "data": 0.0})

    def __post_init__(self):
        self.buffers = CommittedBuffers(self.bare)


def train_one_epoch(run: FinetuneRun, args) -> None:
    """Train the rest of `run.epoch`, one update a batch.

    Args:
        run: changed in place, always from one complete update to the next.
        args: reads seed, clip_grad, print_freq, max_bad_steps, max_bad_ratio.
    Raises:
        InputError: too many unreadable images, `max_bad_steps` non-finite updates in a row, or a batch that
            does not fit into memory.
    """
    batches = run.loader.batch_sampler
    batches.set_epoch(run.epoch, run.batches_done)
    num_batches = batches.batches_per_epoch
    watch = StepWatch(run, args, num_batches, run.task.shown, "", STEADIER)
    run.model.train()
    clock = time.perf_counter()
    for step, batch in enumerate(watch.batches_of(run.loader), run.batches_done):
        data_seconds = time.perf_counter() - clock
        lr = run.task.lr(run.epoch + step / num_batches)
        set_lr(run.optimizer, lr)
        torch.manual_seed(seed_of_step(args.seed, run.epoch, step))
        terms = forward_backward(run, batch)
        problems = [problem for problem in batch["problem"] if problem]
        apply_update(run, args, [terms], problems, watch, lr, step + 1)
        watch.count_batch(step + 1, data_seconds, time.perf_counter() - clock)
        watch.after_update(step + 1, lr)
        clock = time.perf_counter()
    watch.close()


def seed_of_step(seed: int, epoch: int, step: int) -> int:
    """What is random inside a model (stochastic depth, dropout) is a function of these three."""
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint64)[0] >> 1)


def forward_backward(run: FinetuneRun, batch: dict) -> dict[str, torch.Tensor]:
    """One batch through the model and back: the loss's terms, detached float32.

    Raises:
        InputError: it does not fit into memory.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        batch = {k: v if k in STAYS_ON_HOST else v.to(run.device, non_blocking=True) for k, v in batch.items()}
        with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
            terms = run.task.loss(run.model, batch)
        loss = terms["loss"]
        (run.scaler.scale(loss) if run.scaler else loss).backward()
        return {name: value.detach().float() for name, value in terms.items()}
    raise InputError(
        f"a batch of {len(batch['imgs'])} images does not fit into the memory of {run.device}: use "
        "--grad_checkpoint (the result stays the same), more processes with a smaller --batch_size each, or "
        "a smaller --input_size"
    )
