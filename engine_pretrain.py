"""One epoch of pre-training: batches in, weights and meters changed."""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from datasets.device_decode import decode_batch
from util.dist import all_reduce_mean, get_world_size, is_main_process
from util.errors import InputError
from util.lr_sched import cosine_lr, ramp, set_lr
from util.memory import largest_that_fits
from util.meter import Meter, means
from util.progress import Progress
from util.step_profile import StepProfile, part
from util.stop import NoGuard, StopGuard

QUIET_SECONDS = 30
DATA_WAIT_ADVICE = 0.2


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
    watch = StepWatch(run, args, num_batches)
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


def to_device(run: PretrainRun, batch: dict) -> dict:
    """Tensors of a batch on the device, decoded there where the workers sent files."""
    dataset = run.loader.dataset
    if "data" in batch:
        return decode_batch(batch, dataset.input_size, dataset.teacher_size, run.device)
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


def apply_update(run, args, update_terms, problems, watch, lr: float, batches_done: int) -> None:
    """Average over micro-batches and ranks, then step; a non-finite update is skipped everywhere.

    The decision is made on the device from numbers that all ranks share, so nobody waits for the
    host and no rank can decide otherwise.
    """
    terms = {k: torch.stack([t[k] for t in update_terms]).mean(dim=0) for k in update_terms[0]}
    if run.scaler:
        run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    terms["grad_norm"] = grad_norm.float()
    terms["bad_images"] = torch.tensor(float(len(problems)), device=run.device)
    flat = all_reduce_mean(torch.cat([v.reshape(-1) for v in terms.values()]))
    terms = dict(zip(terms, flat.split([v.numel() for v in terms.values()])))
    loss_ok = torch.isfinite(terms["loss"]).all()
    ok = loss_ok & torch.isfinite(terms["grad_norm"]).all()
    if args.clip_grad:
        nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, grad_norm)

    with part("optimiser"), run.guard.committing():
        # a fused optimiser leaves weights and state alone where found_inf is 1
        run.optimizer.grad_scale = None
        run.optimizer.found_inf = (~ok).float()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if run.scaler:
            run.scaler.update()
        run.meter.update(terms, ok)
        run.batches_done = batches_done
    # with fp16 an infinite gradient alone is the scaler finding its scale
    watch.add(batches_done, lr, terms, loss_ok if run.scaler else ok, problems)


class StepWatch:
    """Everything the host looks at between updates: log lines, bad images, bad steps, saving."""

    def __init__(self, run: PretrainRun, args, num_batches: int):
        self.run, self.args = run, args
        self.batches = run.loader.batch_sampler
        self.bar = Progress(f"epoch {run.epoch}", num_batches, run.batches_done, is_main_process())
        self.pending: list[tuple] = []  # (batches done, lr, terms, ok) not looked at yet
        self.problems: list[str] = []
        self.seconds = {"total": 0.0, "data": 0.0}
        self.images = 0
        self.last_count, self.last_sums = run.meter.read()
        self.last_look = 0.0
        self.steady = self.advised = False  # the first line of an epoch holds the start of the workers
        self.said = time.perf_counter()  # when the last line was printed

    def count_batch(self, batches_done: int, data_seconds: float, total_seconds: float) -> None:
        self.seconds["data"] += data_seconds
        self.seconds["total"] += total_seconds
        self.run.seconds["data"] += data_seconds
        self.run.seconds["total"] += total_seconds
        self.images += self.batches.batch_size * get_world_size()
        if time.perf_counter() - self.said > QUIET_SECONDS:
            self.said = time.perf_counter()
            self.bar.update(batches_done, f"update in progress  {self._speed()}")

    def batches_of(self, loader):
        """The loader's batches; says so when the first is long in coming."""
        first = threading.Timer(
            QUIET_SECONDS,
            self.bar.print,
            [f"  still waiting for the first batch ({loader.num_workers} workers are reading it)"],
        )
        first.daemon = True
        first.start()
        try:
            for batch in loader:
                first.cancel()
                yield batch
        finally:
            first.cancel()

    def piece(self, images: int, total: int) -> None:
        """A long batch: say that it moves."""
        if time.perf_counter() - self.said > QUIET_SECONDS:
            self.said = time.perf_counter()
            self.bar.print(f"  batch in progress: {images} of {total} images on this rank")

    def add(self, batches_done: int, lr: float, terms: dict, ok: torch.Tensor, problems) -> None:
        scalars = {k: v for k, v in terms.items() if v.numel() == 1}
        self.pending.append((batches_done, lr, scalars, ok))
        self.problems += problems

    def after_update(self, batches_done: int, lr: float) -> None:
        """Look every `print_freq` updates, and at the first and last of an epoch."""
        is_first = self.last_look == 0
        is_last = batches_done == self.bar.total
        if not (is_first or is_last or len(self.pending) >= self.args.print_freq):
            return
        self.last_look = time.perf_counter()
        self._check_steps()
        self._check_images()
        count, sums = self.run.meter.read()
        if count > self.last_count:
            window = {k: v - self.last_sums.get(k, 0) for k, v in sums.items()}
            values = means(count - self.last_count, window)
            self.last_count, self.last_sums = count, sums
            self.bar.update(batches_done, self._line(values, lr))
        self.seconds = {"total": 0.0, "data": 0.0}
        self.said = time.perf_counter()
        self.images = 0
        self.steady = True
        self.run.save_if_due(self.run)

    def _line(self, values: dict[str, float], lr: float) -> str:
        parts = [f"lr {lr:.3g}", f"loss {values['loss']:.4f}", f"pixel {values['pixel']:.4f}"]
        if "sim" in values:
            parts += [f"cos {1 - values['sim']:.3f}", f"kl {values['kl']:.3f}"]
        return "  ".join([*parts, self._speed()])

    def _speed(self) -> str:
        total = max(self.seconds["total"], 1e-9)
        share = self.seconds["data"] / total
        if share > DATA_WAIT_ADVICE and self.steady and not self.advised:
            self.advised = True
            self.bar.print(
                f"  {share:.0%} of the time is spent waiting for images: raise --num_workers (now "
                f"{self.run.loader.num_workers} a rank), train from a packed set (python -m tools.pack), or "
                "on CUDA try --decode gpu"
            )
        return f"{self.images / total:.3g} img/s  data wait {share:.0%}"

    def _check_images(self) -> None:
        """Write down unreadable files; stop where they are too many of this epoch's images."""
        if self.problems:
            with open(self.run.output_dir / "bad_images.txt", "a") as opened:
                opened.write("".join(f"{self.run.epoch}\t{p}\n" for p in self.problems))
            first, self.problems = self.problems[0], []
            if is_main_process():
                self.bar.print(f"unreadable, another image stands in: {first}")
        count, sums = self.run.meter.read()
        bad = round(sums["bad_images"].item() * get_world_size()) if count else 0
        limit = self.args.max_bad_ratio * self.batches.num_images
        if bad > limit:
            raise InputError(
                f"{bad} of {self.batches.num_images} images could not be read in this epoch (limit "
                f"{self.args.max_bad_ratio:.2%}); they are listed in "
                f"{self.run.output_dir / 'bad_images.txt'}: repair or remove them, or raise "
                "--max_bad_ratio"
            )

    def _check_steps(self) -> None:
        """Report updates that were skipped for a non-finite value; stop after too many in a row."""
        pending, self.pending = self.pending, []
        oks = torch.stack([ok for *_, ok in pending]).tolist()
        for (batches_done, lr, terms, _), ok in zip(pending, oks):
            self.run.bad_steps_in_row = 0 if ok else self.run.bad_steps_in_row + 1
            if not ok and is_main_process():
                self._report_bad_step(batches_done, lr, terms)
        if self.run.bad_steps_in_row >= self.args.max_bad_steps:
            raise InputError(
                f"{self.run.bad_steps_in_row} updates in a row had a non-finite loss or gradient and "
                f"were skipped (epoch {self.run.epoch}); the weights are those of the last good "
                f"update, files and loss terms are in {self.run.output_dir / 'bad_steps.jsonl'}: "
                "lower --blr, set --clip_grad 1 or use --amp none, then --resume auto"
            )

    def _report_bad_step(self, batches_done: int, lr: float, terms: dict) -> None:
        accum = self.args.accum_iter
        first = (batches_done - 1) // accum * accum
        paths = self.run.loader.dataset.paths
        record = {
            "epoch": self.run.epoch,
            "batches": [first, batches_done],
            "lr": lr,
            "terms": {k: repr(v.item()) for k, v in terms.items()},
            "files": [
                paths.relative(int(i))
                for step in range(first, batches_done)
                for i in self.batches.global_batch(self.run.epoch, step)
            ],
        }
        with open(self.run.output_dir / "bad_steps.jsonl", "a") as opened:
            opened.write(json.dumps(record) + "\n")
        bad = [k for k, v in record["terms"].items() if v in ("nan", "inf", "-inf")]
        self.bar.print(f"update {batches_done} skipped: {', '.join(bad)} not finite")

    def close(self) -> None:
        self.bar.close()
