"""One epoch of fine-tuning, the same loop for every task."""

from dataclasses import dataclass

import numpy as np
import torch

from finetune.task import Task
from util.loop import Run, StepWatch, apply_update, to_device
from util.optim import set_lr

STEADIER = "lower --lr or set --clip_grad 1 (name them after --allow_change), or use --amp none"


@dataclass
class FinetuneRun(Run):
    """task: what is learned."""

    task: Task | None = None


def train_one_epoch(run: FinetuneRun, args) -> None:
    """Train the rest of `run.epoch`, one update a batch.

    Args:
        run: changed in place, always from one complete update to the next.
        args: reads seed, clip_grad, epochs, print_freq, max_bad_steps, max_bad_ratio.
    Raises:
        InputError: too many unreadable images, or too many non-finite updates in a row.
    """
    batches = run.loader.batch_sampler
    batches.set_epoch(run.epoch, run.batches_done)
    steps = batches.batches_per_epoch
    watch = StepWatch(run, args, run.task.shown, "", STEADIER)
    run.model.train()
    for step, batch in enumerate(watch.batches_of(run.loader), run.batches_done):
        lr = run.task.lr(run.epoch + step / steps)
        set_lr(run.optimizer, lr)
        torch.manual_seed(seed_of_step(args.seed, run.epoch, step))
        problems = [problem for problem in batch["problem"] if problem]
        batch = to_device(batch, run.device, host=("problem", "erase"))  # read there: no need to wait for the device
        with run.autocast():
            terms = run.task.loss(run.model, batch)
        run.backward(terms["loss"])
        terms = {name: value.detach().float() for name, value in terms.items()}
        apply_update(run, args, [terms], problems, watch, lr)
    watch.close()


def seed_of_step(seed: int, epoch: int, step: int) -> int:
    """What is random inside a model (stochastic depth, dropout) is a function of these three."""
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint64)[0] >> 1)
