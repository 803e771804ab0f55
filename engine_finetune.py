"""What every downstream task shares: one epoch of training, and answers for all test images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Subset

from datasets.items import WholeImages
from engine_extract import extract_features
from util.cli import Progress
from util.dist import get_rank, get_world_size, is_main_process
from util.errors import InputError
from util.loop import Run, StepWatch, apply_update, to_device

# said of updates that are not finite: what makes training steadier
STEADIER = "lower --lr or set --clip_grad 1 (name them after --allow_change), or use --amp none"


@dataclass
class FinetuneRun(Run):
    """task: what is learned, a `finetune.task.Task`."""

    task: object = None


def train_one_epoch(run: FinetuneRun, args) -> None:
    """Train the rest of `run.epoch`, one update a batch.

    `run` is changed in place, always from one complete update to the next. Raises InputError: too many unreadable
    images, or too many non-finite updates in a row.
    """
    task, batches = run.task, run.loader.batch_sampler
    batches.set_epoch(run.epoch, run.batches_done)
    steps = batches.batches_per_epoch
    run.model.train()

    def shown(values: dict[str, float]) -> list[str]:
        return [f"{name} {values[name]:.4f}" for name in task.shown if name in values]

    with StepWatch(run, args, shown, STEADIER) as watch:
        for step, batch in enumerate(watch.batches_of(run.loader), run.batches_done):
            lr = task.lr(run.epoch + step / steps)
            for group in run.optimizer.param_groups:
                group["lr"] = group["lr_scale"] * task.lr(run.epoch + step / steps, group["peak_scale"])
            torch.manual_seed(seed_of_step(args.seed, run.epoch, step))
            problems = [problem for problem in batch["problem"] if problem]
            batch = to_device(batch, run.device, host=("problem", "erase"))  # read there: no wait for the device
            with run.autocast():
                terms = task.loss(run.model, batch)
            run.backward(terms["loss"])
            terms = {name: value.detach().float() for name, value in terms.items()}
            apply_update(run, args, [terms], problems, watch, lr)


def seed_of_step(seed: int, epoch: int, step: int) -> int:
    """What is random inside a model (stochastic depth, dropout) is a function of these three."""
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Predictions:
    """Of the images that could be read: their rows [n] int64 in the list and the answers [n, D] float32 on the CPU.
    unreadable: `path<tab>reason` of the others."""

    rows: np.ndarray
    values: torch.Tensor
    unreadable: list[str]


def predict(
    encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], images: WholeImages, device: torch.device, title: str,
    **loading,
) -> Predictions | None:  # fmt: skip
    """Answers for all images of a list on rank 0; None elsewhere.

    The ranks share out whole batches of one fixed cut of the list, without padding or repeating: every image is
    computed once and in the same company on any number of ranks, so the numbers are equal to the last bit.

    Args:
        encode: ([n, 3, H, W] uint8 on the device, [n] int64 numbers in the list) -> [n, D].
        images: all of the list, in its order. title: of the progress line and of messages.
        loading: batch_size and num_workers.
    Raises:
        InputError: not one image can be read, or the model answers with numbers that are not finite.
    """
    total, paths = len(images), images.paths
    owner = np.arange(total) // loading["batch_size"] % get_world_size()
    mine = np.flatnonzero(owner == get_rank())
    progress = Progress(title, len(mine), shown=is_main_process())
    values, problems = torch.zeros(0, 1), {}
    if len(mine):
        part = Subset(images, mine.tolist())
        features, problems = extract_features(lambda *batch: {"": encode(*batch)}, part, device, progress, **loading)
        values = torch.from_numpy(features[""])
    progress.close()
    problems, values = merged(problems), _on_main(values, owner)
    if values is None:
        return None
    if len(problems) == total:
        raise InputError(f"{title}: none of the {total} images could be read, e.g. {paths[0]}")
    rows = np.setdiff1d(np.arange(total), list(problems))
    values = values[rows] if problems else values
    diverged = rows[~torch.isfinite(values).all(dim=1).numpy()]
    if len(diverged):
        raise InputError(
            f"{title}: the answers for {len(diverged)} images, e.g. {paths.relative(int(diverged[0]))}, are not "
            "finite: the model has diverged, or needs --amp none"
        )
    return Predictions(rows, values, [f"{paths.relative(i)}\t{why}" for i, why in sorted(problems.items())])


def merged(found: dict) -> dict:
    """The entries of all ranks, on every rank."""
    if get_world_size() == 1:
        return found
    parts: list = [None] * get_world_size()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def _on_main(values: torch.Tensor, owner: np.ndarray) -> torch.Tensor | None:
    """Rows of all ranks in order on rank 0; they travel one rank at a time. owner: [total], the rank of each row."""
    if not is_main_process():
        if len(values):
            dist.send(values.contiguous(), dst=0)
        return None
    if get_world_size() == 1:
        return values
    whole = torch.empty(len(owner), values.shape[1])
    whole[owner == 0] = values
    for rank in range(1, get_world_size()):
        if (owner == rank).any():
            part = torch.empty(int((owner == rank).sum()), values.shape[1])
            dist.recv(part, src=rank)
            whole[owner == rank] = part
    return whole
