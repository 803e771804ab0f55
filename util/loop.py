"""What every training loop shares: the state of a run, the update of its weights, and the watch over it."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from util.dist import all_reduce_mean, get_world_size, is_main_process
from util.errors import AWAY, InputError
from util.precision import LEAST_SCALE
from util.progress import Progress
from util.run_files import RunFiles
from util.stop import StopGuard


class Meter:
    """Sums over updates of named terms (scalars and vectors) on the device, float64, without skipped updates."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}  # "count": of updates

    def update(self, terms: dict[str, torch.Tensor], ok: torch.Tensor) -> None:
        """Add one update's terms; `ok` is a bool scalar on the device, False adds nothing."""
        for name, value in {**terms, "count": ok}.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(ok, value.double(), 0.0)

    def read(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(updates counted, sums by name on the CPU)."""
        sums = {name: total.cpu() for name, total in self.sums.items()}
        return int(sums.pop("count", 0)), sums


def peak_gigabytes(device: torch.device) -> float:
    """Peak memory of this process so far: of the device on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class CommittedBuffers:
    """Buffers that change in the forward pass (BatchNorm's statistics, centres) as of the last update: what a
    checkpoint holds beside weights of that update, and where a skipped update returns to."""

    def __init__(self, model: nn.Module):
        names = model.state_dict().keys() - {name for name, _ in model.named_parameters()}
        self.live = {name: buffer for name, buffer in model.named_buffers() if name in names}
        self.take()

    def take(self) -> None:
        """What the buffers are now is the last update's: after loading."""
        self.saved = {name: buffer.detach().clone() for name, buffer in self.live.items()}

    @torch.no_grad()
    def commit(self, ok: torch.Tensor) -> None:
        """`ok` is a bool scalar on the device: keep what the forward pass has made of them, or go back."""
        for name, buffer in self.live.items():
            self.saved[name] = torch.where(ok, buffer, self.saved[name])
            buffer.copy_(self.saved[name])


@dataclass
class Run:
    """What one run holds; `epoch` and `batches_done` say which updates are in the weights.

    bare: the model, as it is saved. model: what the loop calls, bare or bare in DDP. scaler: for fp16 only.
    amp_dtype: None for float32. batches_done: global micro-batches of `epoch` that are in the weights.
    """

    bare: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    loader: torch.utils.data.DataLoader
    device: torch.device
    amp_dtype: torch.dtype | None
    files: RunFiles
    guard: StopGuard | None = None
    epoch: int = 0
    batches_done: int = 0
    meter: Meter = field(default_factory=Meter)
    bad_steps_in_row: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"total": 0.0, "data": 0.0})

    def __post_init__(self):
        self.buffers = CommittedBuffers(self.bare)
        self.output_dir = self.files.output_dir

    def committing(self):
        """Around a change of weights and counters, which no signal may cut."""
        return self.guard.committing() if self.guard else contextlib.nullcontext()

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()


def to_device(batch: dict, device: torch.device, host: tuple[str, ...] = ("problem",)) -> dict:
    """Tensors of a batch on the device; entries named in `host` stay."""
    return {k: v if k in host else v.to(device, non_blocking=True) for k, v in batch.items()}


def apply_update(run: Run, args, update_terms: list[dict], problems: list[str], watch: "StepWatch", lr: float) -> None:
    """Average over micro-batches and ranks, then step; an update that is not finite, or for which too many images of
    the epoch could not be read, is skipped: decided on the device from numbers that all ranks share, so nobody waits
    for the host and no rank can decide otherwise."""
    terms = {k: torch.stack([t[k] for t in update_terms]).mean(dim=0) for k in update_terms[0]}
    if run.scaler:
        run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    terms["grad_norm"] = grad_norm.float()
    bad_images = math.inf if any(AWAY in problem for problem in problems) else float(len(problems))
    terms["bad_images"] = torch.full((), bad_images, device=run.device)  # without a copy
    flat = all_reduce_mean(torch.cat([v.reshape(-1) for v in terms.values()]))
    terms = dict(zip(terms, flat.split([v.numel() for v in terms.values()])))
    watch.bad_images += terms["bad_images"] * get_world_size()
    loss_ok = torch.isfinite(terms["loss"]).all() & (watch.bad_images <= watch.bad_limit).all()
    ok = loss_ok & torch.isfinite(terms["grad_norm"]).all()
    if args.clip_grad:
        nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, grad_norm)

    # with fp16 an infinite gradient alone is the scaler finding its scale
    watch.add(lr, terms, loss_ok if run.scaler else ok, problems)
    with run.committing():
        # a fused optimiser leaves weights and state alone where found_inf is 1
        run.optimizer.grad_scale, run.optimizer.found_inf = None, (~ok).float()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if run.scaler:
            run.scaler.update()
        run.meter.update(terms, ok)
        run.batches_done = watch.seen
        run.buffers.commit(ok)
    watch.look()


class StepWatch:
    """Everything the host looks at between updates: log lines, bad images, bad steps, saving.

    shown: means of terms -> what a log line says beside the loss. steadier: what to do about non-finite updates.
    """

    def __init__(self, run: Run, args, shown: Callable[[dict[str, float]], list[str]], steadier: str):
        self.run, self.args, self.shown, self.steadier = run, args, shown, steadier
        self.batches = run.loader.batch_sampler
        total, later = self.batches.batches_per_epoch, args.epochs - run.epoch - 1
        self.bar = Progress(f"epoch {run.epoch}", total, run.batches_done, is_main_process(), total * later)
        self.seen = run.batches_done  # batches that the loop has taken
        self.pending: list[tuple] = []  # (batches, lr, names, row of ok, bad images so far, terms) not looked at
        self.bad_images = torch.zeros(1, device=run.device)  # of this epoch, by this process, on all ranks
        self.bad_limit = args.max_bad_ratio * self.batches.num_images
        self.problems: list[str] = []
        self.at_look, self.seen_at_look = dict(run.seconds), run.batches_done + 1
        self.looks = 0

    def batches_of(self, loader) -> Iterator[dict]:
        """The loader's batches, the time they take counted."""
        seconds, clock = self.run.seconds, time.perf_counter()
        for batch in loader:
            taken = time.perf_counter()
            self.seen += 1
            yield batch
            now = time.perf_counter()
            seconds["data"] += taken - clock
            seconds["total"] += now - clock
            clock = now

    def add(self, lr: float, terms: dict, ok: torch.Tensor, problems: list[str]) -> None:
        scalars = {name: value for name, value in terms.items() if value.numel() == 1}
        row = torch.cat([ok.reshape(1), self.bad_images, *scalars.values()])
        self.pending.append((self.seen, lr, list(scalars), row))
        if problems:  # at once: a stop would lose what waits
            with open(self.run.output_dir / "bad_images.txt", "a", errors="backslashreplace") as opened:
                opened.write("".join(f"{self.run.epoch}\t{p}\n" for p in problems))
        self.problems += problems

    def look(self) -> None:
        """Look every `print_freq` updates, and at the first and last of an epoch."""
        if self.looks and self.seen < self.bar.total and len(self.pending) < self.args.print_freq:
            return
        if self.problems:
            first, self.problems = self.problems[0], []
            self.bar.print(f"unreadable, another image stands in: {first}")
        lr, good = self.pending[-1][1], self._settle()
        if good:
            values = {name: sum(terms[name] for terms in good) / len(good) for name in good[0]}
            total, data = (self.run.seconds[name] - self.at_look[name] for name in ("total", "data"))
            images = (self.seen - self.seen_at_look) * self.batches.batch_size * get_world_size()
            # of the first batch the time is still being counted
            speed = [f"{images / total:.3g} img/s", f"data wait {data / total:.0%}"] if total else []
            parts = [f"lr {lr:.3g}", f"loss {values['loss']:.4f}", *self.shown(values), *speed]
            self.bar.update(self.seen, "  ".join(parts))
        self.at_look, self.seen_at_look = dict(self.run.seconds), self.seen
        self.looks += 1
        self.run.files.save_if_due(self.run)

    def _settle(self) -> list[dict[str, float]]:
        """Read what the device has decided -> the terms of the updates that were made; InputError where too many images
        could not be read (`batches_done` is then where the last update ended) or too many updates were not finite."""
        run, (pending, self.pending), good = self.run, (self.pending, []), []
        rows = torch.stack([row for *_, row in pending]).tolist() if pending else []
        for (seen, lr, names, _), (ok, bad_images, *values) in zip(pending, rows):
            first, terms = seen - 1 - (seen - 1) % self.args.accum_iter, dict(zip(names, values))
            if bad_images > self.bad_limit:
                run.batches_done = first
                raise InputError(self._why_images(bad_images))
            run.bad_steps_in_row = 0 if ok else run.bad_steps_in_row + 1
            if ok:
                good.append(terms)
            elif is_main_process():
                self._report_bad_step(first, seen, lr, terms)
            if run.bad_steps_in_row >= self.args.max_bad_steps:
                raise InputError(
                    f"{run.bad_steps_in_row} updates in a row had a non-finite loss or gradient and were skipped; they "
                    f"are in {run.output_dir / 'bad_steps.jsonl'}, not in the weights: {self.steadier}; --resume auto"
                )
        if run.scaler and run.scaler.get_scale() < LEAST_SCALE:
            raise InputError(f"fp16 finds no loss scale with finite gradients: {self.steadier}, then --resume auto")
        return good

    def _why_images(self, bad: float) -> str:
        listed = f"they are listed in {self.run.output_dir / 'bad_images.txt'}, the update is not in the weights"
        if math.isinf(bad):
            return f"images could not be read because {AWAY} ({listed}): make it answer, then --resume auto"
        return (
            f"{bad:.0f} of {self.batches.num_images} images could not be read in this epoch (limit "
            f"{self.args.max_bad_ratio:.2%}; {listed}): repair or remove them, or raise --max_bad_ratio; --resume auto"
        )

    def _report_bad_step(self, first: int, seen: int, lr: float, terms: dict[str, float]) -> None:
        name_of, epoch = self.run.loader.dataset.paths.relative, self.run.epoch
        files = [name_of(int(i)) for step in range(first, seen) for i in self.batches.global_batch(epoch, step)]
        record = {"epoch": epoch, "batches": [first, seen], "lr": lr, "files": files}
        record["terms"] = {name: repr(value) for name, value in terms.items()}
        with open(self.run.output_dir / "bad_steps.jsonl", "a") as opened:
            opened.write(json.dumps(record) + "\n")
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        self.bar.print(f"update {seen} skipped: {', '.join(bad)} not finite")

    def __enter__(self) -> "StepWatch":
        return self

    def __exit__(self, *_) -> None:
        """Also after an error or a signal: what is saved must not count updates that were not made."""
        with contextlib.suppress(InputError):
            self._settle()
        self.bar.close()


def epoch_record(run: Run, global_batch: int, updates: int) -> dict[str, float]:
    """The numbers of the epoch that has ended, for log.txt: means of the terms, speed, what was skipped."""
    count, sums = run.meter.read()
    values = {name: (total / count).item() for name, total in sums.items() if count and total.numel() == 1}
    bad_images = round(values.pop("bad_images", 0) * count * get_world_size())
    group, seconds = run.optimizer.param_groups[0], max(run.seconds["total"], 1e-9)
    return {
        "train_lr": group["lr"] / group.get("lr_scale", 1.0),
        "train_loss": values.pop("loss", float("nan")),
        **{f"train_{name}": value for name, value in values.items()},
        "images_per_s": global_batch * run.batches_done / seconds,
        "data_wait": run.seconds["data"] / seconds,
        "bad_images": bad_images,
        "skipped_updates": updates - count,
        "peak_gigabytes": peak_gigabytes(run.device),
        "epoch": run.epoch,
    }


def epoch_line(record: dict[str, float], names: list[str]) -> str:
    """An epoch in a line: the named means, each beside what a constant answer reaches, and what went wrong."""
    parts = []
    for name in dict.fromkeys(names):
        value, trivial = (
            record.get(f"train_loss_{name}", record.get(f"train_{name}")),
            record.get(f"train_{name}_baseline"),
        )
        if value is not None:
            parts.append(f"{name} {value:.4f}" + (f" (constant {trivial:.4f})" if trivial is not None else ""))
    parts.append(f"{record['images_per_s']:.3g} img/s")
    for name, words in (("bad_images", "images unreadable"), ("skipped_updates", "updates skipped")):
        parts += [f"{record[name]} {words}"] if record[name] else []
    return f"epoch {record['epoch']} done: {', '.join(parts)}"


def next_epoch(run: Run) -> None:
    """The epoch is done: count on."""
    with run.committing():
        run.epoch, run.batches_done = run.epoch + 1, 0
        run.meter = Meter()
        run.seconds = {"total": 0.0, "data": 0.0}
