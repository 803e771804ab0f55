"""One epoch of pre-training: batches in, weights and meters changed."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from util.errors import InputError
from util.loop import StepWatch, apply_update
from util.meter import Meter, largest_that_fits
from util.optim import cosine_lr, ramp, set_lr
from util.step_profile import StepProfile, part
from util.stop import NoGuard, StopGuard

FASTER_DATA = " or train from a packed set (python -m tools.pack)"
STEADIER = "lower --blr or set --clip_grad 1 (name lr or clip_grad after --allow_change), or use --amp none"


@dataclass
class PretrainRun:
    """What one run holds; `epoch` and `batches_done` say which updates are in the weights."""

    bare: nn.Module  # the MAE itself: what is saved
    model: nn.Module  # what the loop calls: bare, or bare wrapped in DDP
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16 only
    loader: torch.utils.data.DataLoader
    device: torch.device
    amp_dtype: torch.dtype | None  # None: float32
    guard: StopGuard | NoGuard
    output_dir: Path
    save_if_due: Callable[["PretrainRun"], None]
    epoch: int = 0
    batches_done: int = 0  # global micro-batches of `epoch` that are in the weights
    meter: Meter = field(default_factory=Meter)
    bad_steps_in_row: int = 0
    profile: StepProfile | None = None
    buffers: None = None  # none change in training
    text_bank: tuple | None = None  # (embeddings, texts, the teacher's identity), kept beside the checkpoints
    seconds: dict[str, float] = field(default_factory=lambda: {"total": 0.0, "data": 0.0})


def train_one_epoch(run: PretrainRun, args) -> None:
    """Train the rest of `run.epoch` (MAE, Sec. 3 and A.1; the loss is L_pixel + w_s L_sim + w_k L_kl).

    Args:
        run: changed in place, always from one complete update to the next.
        args: reads accum_iter, mask_ratio, lr, min_lr, warmup_epochs, epochs, weights,
            clip_grad, micro_batch, print_freq, max_bad_steps, max_bad_ratio.
    Raises:
        InputError: too many unreadable images, `max_bad_steps` non-finite updates in a row, or a batch
            that does not fit into memory.
    """
    batches = run.loader.batch_sampler
    num_batches = batches.batches_per_epoch
    batches.set_epoch(run.epoch, run.batches_done)
    watch = StepWatch(run, args, num_batches, shown_terms, FASTER_DATA, STEADIER)
    model = run.model
    model.train()
    update_terms, problems = [], []
    clock = time.perf_counter()
    for step, batch in enumerate(watch.batches_of(run.loader), run.batches_done):
        data_seconds = time.perf_counter() - clock
        if run.profile:
            run.profile.wait(data_seconds)
        group_start = step - step % args.accum_iter
        group_size = min(args.accum_iter, num_batches - group_start)
        is_last = step == group_start + group_size - 1
        epoch = run.epoch + group_start / num_batches
        if step == group_start:
            lr = cosine_lr(epoch, args.lr, args.min_lr, args.warmup_epochs, args.epochs)
            set_lr(run.optimizer, lr)
            weights = {name: w * ramp(epoch, args.warmup_epochs) for name, w in args.weights.items()}

        with part("copy"):
            batch = to_device(run, batch)
        terms = forward_backward(run, batch, args, is_last, weights, 1 / group_size, watch)
        update_terms.append(terms)
        problems += [problem for problem in batch["problem"] if problem]

        if is_last:
            apply_update(run, args, update_terms, problems, watch, lr, step + 1)
            update_terms, problems = [], []
        watch.count_batch(step + 1, data_seconds, time.perf_counter() - clock)
        if is_last:
            watch.after_update(step + 1, lr)
            if run.profile and run.profile.step():
                break
        clock = time.perf_counter()
    watch.close()


def shown_terms(values: dict[str, float]) -> list[str]:
    """What a log line says of an update."""
    parts = [f"pixel {values['pixel']:.4f}"]
    if "sim" in values:
        parts += [f"cos {1 - values['sim']:.3f}", f"kl {values['kl']:.3f}"]
    return parts


def to_device(run: PretrainRun, batch: dict) -> dict:
    """Tensors of a batch on the device."""
    return {k: v.to(run.device, non_blocking=True) if k != "problem" else v for k, v in batch.items()}


def forward_backward(run, batch: dict, args, is_last: bool, weights: dict, share: float, watch):
    """One batch through teacher and student and back, in pieces of at most `args.micro_batch` images.

    Gradients and terms are those of the whole batch: every term is a mean over images. They are
    exchanged between ranks with the last piece of an update.

    Returns:
        The batch's terms and their weighted sum `loss`, detached float32.
    Raises:
        InputError: a piece does not fit into memory; says how many images do.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        return _forward_backward(run, batch, args, is_last, weights, share, watch)
    # out here the exception is gone, and with it the activations that its frames held
    raise InputError(explain_out_of_memory(run, batch, args))


def _forward_backward(run, batch: dict, args, is_last: bool, weights: dict, share: float, watch):
    total = len(batch["imgs"])
    batch = {k: v for k, v in batch.items() if k != "problem"}
    collected: dict[str, torch.Tensor] = {}
    for start in range(0, total, args.micro_batch):
        piece = {k: v[start : start + args.micro_batch] for k, v in batch.items()}
        sync = is_last and start + args.micro_batch >= total
        with contextlib.nullcontext() if sync or run.model is run.bare else run.model.no_sync():
            terms = forward_piece(run, piece, args.mask_ratio)
            loss = terms["pixel"]
            for name, weight in weights.items():
                loss = loss + weight * terms[name]
            fraction = len(piece["imgs"]) / total
            scaled = loss * (share * fraction)
            with part("backward"):
                (run.scaler.scale(scaled) if run.scaler else scaled).backward()
        for name, value in ({"loss": loss} | terms).items():
            value = value.detach().float() * fraction
            collected[name] = collected[name] + value if start else value
        watch.piece(start + len(piece["imgs"]), total)
    return collected


def forward_piece(run: PretrainRun, piece: dict, mask_ratio: float) -> dict[str, torch.Tensor]:
    """imgs [N, 3, H, W] uint8 and noise [N, L] on the device -> the student's terms."""
    imgs, teacher_embed = piece["imgs"], piece.get("teacher_embed")
    if teacher_embed is None and run.teacher is not None:
        with part("teacher"):
            teacher_embed = run.teacher(piece.get("teacher_imgs", imgs))  # [N, D_t]
    with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
        return run.model(imgs, mask_ratio, piece["noise"], teacher_embed)


def explain_out_of_memory(run: PretrainRun, batch: dict, args) -> str:
    """Find the largest piece that does fit, on this very batch, and say how to use it."""
    tried = min(args.micro_batch, len(batch["imgs"]))
    weights = dict.fromkeys(args.weights, 1.0)

    def attempt(count: int) -> None:
        run.optimizer.zero_grad(set_to_none=True)
        piece = {k: v[:count] for k, v in batch.items() if k != "problem"}
        bare = dataclasses.replace(run, model=run.bare)  # the other ranks do not take part
        terms = forward_piece(bare, piece, args.mask_ratio)
        (terms["pixel"] + sum(weight * terms[name] for name, weight in weights.items())).backward()

    fits = largest_that_fits(attempt, tried, run.device)
    if not fits:
        return (
            f"not even one image fits into the memory of {run.device} beside the model: take a smaller "
            "--model or --input_size, or --grad_checkpoint"
        )
    return (
        f"{tried} images at a time do not fit into the memory of {run.device}, about {fits} do: use "
        f"--micro_batch {fits} (the result stays the same), or --grad_checkpoint for more"
    )
