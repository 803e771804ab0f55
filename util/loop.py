"""What every training loop shares: the state of a run, the update of its weights, and the watch over it."""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.profiler import record_function

from util.dist import all_reduce_mean, get_world_size, is_main_process
from util.errors import InputError
from util.precision import LEAST_SCALE
from util.progress import Progress
from util.run_files import RunFiles
from util.stop import StopGuard

QUIET_SECONDS = 30
DATA_WAIT_ADVICE = 0.2


class Meter:
    """Mean over updates of named terms (scalars and vectors) on the device, float64, skipping bad updates; reading it
    is the only synchronisation."""

    def __init__(self):
        self._sizes: dict[str, int] = {}
        self._total: torch.Tensor | None = None  # [sum of sizes + 1], last entry counts updates

    def update(self, terms: dict[str, torch.Tensor], ok: torch.Tensor) -> None:
        """Add one update's terms; `ok` is a bool scalar on the device, False adds nothing."""
        values = torch.cat([v.reshape(-1) for v in terms.values()] + [ok.reshape(1)]).double()
        if self._total is None:
            self._sizes = {k: v.numel() for k, v in terms.items()}
            self._total = torch.zeros_like(values)
        self._total += torch.where(ok, values, 0.0)

    def read(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(updates counted, sums by name on the CPU, float64)."""
        if self._total is None:
            return 0, {}
        *sums, count = self._total.to("cpu", copy=True).split([*self._sizes.values(), 1])
        return int(count), dict(zip(self._sizes, sums))

    def state_dict(self) -> dict:
        total = None if self._total is None else self._total.to("cpu", copy=True)
        return {"sizes": dict(self._sizes), "total": total}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self._sizes = dict(state["sizes"])
        self._total = None if state["total"] is None else state["total"].to(device)


def means(count: int, sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Averages of the scalar terms as plain numbers."""
    return {k: (v / count).item() for k, v in sums.items() if v.numel() == 1} if count else {}


def peak_gigabytes(device: torch.device) -> float:
    """Peak memory of this process so far: of the device on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


class CommittedBuffers:
    """Buffers that change in the forward pass (BatchNorm's statistics, centres) as of the last update: what a
    checkpoint must hold beside weights of that update, and where a skipped update returns to."""

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
    profiler: torch.profiler.profile | None = None

    def __post_init__(self):
        self.buffers = CommittedBuffers(self.bare)

    @property
    def output_dir(self) -> Path:
        return self.files.output_dir

    def committing(self):
        """Around a change of weights and counters, which no signal may cut."""
        return self.guard.committing() if self.guard else contextlib.nullcontext()

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        with record_function("backward"):
            (self.scaler.scale(loss) if self.scaler else loss).backward()


def to_device(batch: dict, device: torch.device, host: tuple[str, ...] = ("problem",)) -> dict:
    """Tensors of a batch on the device; entries named in `host` stay."""
    return {k: v if k in host else v.to(device, non_blocking=True) for k, v in batch.items()}


def apply_update(run: Run, args, update_terms: list[dict], problems: list[str], watch: "StepWatch", lr: float) -> None:
    """Average over micro-batches and ranks, then step; a non-finite update is skipped everywhere.

    The decision is made on the device from numbers that all ranks share, so nobody waits for the host and no rank can
    decide otherwise.
    """
    terms = {k: torch.stack([t[k] for t in update_terms]).mean(dim=0) for k in update_terms[0]}
    if run.scaler:
        run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    terms["grad_norm"] = grad_norm.float()
    terms["bad_images"] = torch.full((), float(len(problems)), device=run.device)  # without a copy
    flat = all_reduce_mean(torch.cat([v.reshape(-1) for v in terms.values()]))
    terms = dict(zip(terms, flat.split([v.numel() for v in terms.values()])))
    loss_ok = torch.isfinite(terms["loss"]).all()
    ok = loss_ok & torch.isfinite(terms["grad_norm"]).all()
    if args.clip_grad:
        nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, grad_norm)

    # with fp16 an infinite gradient alone is the scaler finding its scale
    watch.add(lr, terms, loss_ok if run.scaler else ok, problems)
    with record_function("optimiser"), run.committing():
        # a fused optimiser leaves weights and state alone where found_inf is 1
        run.optimizer.grad_scale = None
        run.optimizer.found_inf = (~ok).float()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if run.scaler:
            run.scaler.update()
        run.meter.update(terms, ok)
        run.batches_done = watch.seen
        run.buffers.commit(ok)
    watch.look()
    if run.profiler:
        run.profiler.step()


class StepWatch:
    """Everything the host looks at between updates: log lines, bad images, bad steps, saving.

    Args:
        args: reads epochs, accum_iter, print_freq, max_bad_steps, max_bad_ratio.
        shown: means of an update's terms -> what a log line says of them beside the loss.
        faster_data, steadier: what to do about waiting for images, and about non-finite updates.
    """

    def __init__(self, run: Run, args, shown: Callable[[dict[str, float]], list[str]], faster_data="", steadier=""):
        self.run, self.args, self.shown = run, args, shown
        self.faster_data, self.steadier = faster_data, steadier
        self.batches = run.loader.batch_sampler
        total = self.batches.batches_per_epoch
        later = total * (args.epochs - run.epoch - 1)
        self.bar = Progress(f"epoch {run.epoch}", total, run.batches_done, is_main_process(), later)
        self.seen = run.batches_done  # batches that the loop has taken
        self.pending: list[tuple] = []  # (batches, lr, terms, ok) not looked at yet
        self.problems: list[str] = []
        self.seconds = {"total": 0.0, "data": 0.0}
        self.images = 0
        self.last_count, self.last_sums = run.meter.read()
        self.looks = 0
        self.advised = False
        self.said = time.perf_counter()  # when the last line was printed

    def batches_of(self, loader) -> Iterator[dict]:
        """The loader's batches, the time they take counted."""
        clock = time.perf_counter()
        for batch in loader:
            taken = time.perf_counter()
            self.seen += 1
            yield batch
            now = time.perf_counter()
            for seconds in (self.seconds, self.run.seconds):
                seconds["data"] += taken - clock
                seconds["total"] += now - clock
            self.images += self.batches.batch_size * get_world_size()
            clock = now

    def alive(self, images: int, total: int) -> None:
        """In a long batch: say that it moves."""
        if time.perf_counter() - self.said > QUIET_SECONDS:
            self.said = time.perf_counter()
            self.bar.print(f"  batch {self.seen} in progress: {images} of {total} images on this rank")

    def add(self, lr: float, terms: dict, ok: torch.Tensor, problems: list[str]) -> None:
        scalars = {k: v for k, v in terms.items() if v.numel() == 1}
        self.pending.append((self.seen, lr, scalars, ok))
        if problems:  # at once: a stop would lose what waits
            with open(self.run.output_dir / "bad_images.txt", "a") as opened:
                opened.write("".join(f"{self.run.epoch}\t{p}\n" for p in problems))
        self.problems += problems

    def look(self) -> None:
        """Look every `print_freq` updates, and at the first and last of an epoch."""
        if self.looks and self.seen < self.bar.total and len(self.pending) < self.args.print_freq:
            return
        lr = self.pending[-1][1]
        self._check_steps()
        self._check_images()
        count, sums = self.run.meter.read()
        if count > self.last_count:
            values = means(count - self.last_count, {k: v - self.last_sums.get(k, 0) for k, v in sums.items()})
            self.last_count, self.last_sums = count, sums
            parts = [f"lr {lr:.3g}", f"loss {values['loss']:.4f}", *self.shown(values)]
            self.bar.update(self.seen, "  ".join([*parts, self._speed()]))
        self.seconds, self.images = {"total": 0.0, "data": 0.0}, 0
        self.said = time.perf_counter()
        self.looks += 1
        self.run.files.save_if_due(self.run)

    def _speed(self) -> str:
        total = self.seconds["total"]
        if not total:  # the first batch is still being counted
            return ""
        share = self.seconds["data"] / total
        if (
            share > DATA_WAIT_ADVICE and self.looks and not self.advised
        ):  # the first look holds the start of the workers
            self.advised = True
            self.bar.print(
                f"  {share:.0%} of the time is spent waiting for images: raise --num_workers (now "
                f"{self.run.loader.num_workers} a rank){self.faster_data}"
            )
        return f"{self.images / total:.3g} img/s  data wait {share:.0%}"

    def _check_images(self) -> None:
        """Name an unreadable file; stop where they are too many of this epoch's images."""
        if self.problems:
            first, self.problems = self.problems[0], []
            self.bar.print(f"unreadable, another image stands in: {first}")
        count, sums = self.run.meter.read()
        bad = round(sums["bad_images"].item() * get_world_size()) if count else 0
        if bad > self.args.max_bad_ratio * self.batches.num_images:
            raise InputError(
                f"{bad} of {self.batches.num_images} images could not be read in this epoch (limit "
                f"{self.args.max_bad_ratio:.2%}); they are listed in {self.run.output_dir / 'bad_images.txt'}: repair "
                "or remove them, or raise --max_bad_ratio"
            )

    def _check_steps(self) -> None:
        """Report updates that were skipped for a non-finite value; stop after too many in a row."""
        pending, self.pending = self.pending, []
        oks = torch.stack([ok for *_, ok in pending]).tolist()
        for (seen, lr, terms, _), ok in zip(pending, oks):
            self.run.bad_steps_in_row = 0 if ok else self.run.bad_steps_in_row + 1
            if not ok and is_main_process():
                self._report_bad_step(seen, lr, terms)
            if self.run.bad_steps_in_row >= self.args.max_bad_steps:  # also where good ones have followed
                raise InputError(
                    f"{self.run.bad_steps_in_row} updates in a row had a non-finite loss or gradient and were skipped "
                    f"(epoch {self.run.epoch}); none of them is in the weights, files and loss terms are in "
                    f"{self.run.output_dir / 'bad_steps.jsonl'}: {self.steadier}, then --resume auto"
                )
        scale = self.run.scaler.get_scale() if self.run.scaler else 1.0
        if scale < LEAST_SCALE:
            raise InputError(
                f"fp16 finds no loss scale at which the gradients are finite (epoch {self.run.epoch}, now "
                f"{scale:.1g}), so nothing is learned any more: {self.steadier}, then --resume auto"
            )

    def _report_bad_step(self, seen: int, lr: float, terms: dict) -> None:
        first = (seen - 1) // self.args.accum_iter * self.args.accum_iter
        paths, epoch = self.run.loader.dataset.paths, self.run.epoch
        record = {
            "epoch": epoch,
            "batches": [first, seen],
            "lr": lr,
            "terms": {k: repr(v.item()) for k, v in terms.items()},
            "files": [
                paths.relative(int(i)) for step in range(first, seen) for i in self.batches.global_batch(epoch, step)
            ],
        }
        with open(self.run.output_dir / "bad_steps.jsonl", "a") as opened:
            opened.write(json.dumps(record) + "\n")
        bad = [k for k, v in record["terms"].items() if v in ("nan", "inf", "-inf")]
        self.bar.print(f"update {seen} skipped: {', '.join(bad)} not finite")

    def close(self) -> None:
        self.bar.close()


def epoch_record(run: Run, global_batch: int, updates: int) -> dict[str, float]:
    """The numbers of the epoch that has ended, for log.txt: means of the terms, speed, what was skipped."""
    count, sums = run.meter.read()
    values, seconds = means(count, sums), max(run.seconds["total"], 1e-9)
    bad_images = round(values.pop("bad_images", 0) * count * get_world_size())
    group = run.optimizer.param_groups[0]
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


def next_epoch(run: Run) -> None:
    """The epoch is done: count on."""
    with run.committing():
        run.epoch, run.batches_done = run.epoch + 1, 0
        run.meter = Meter()
        run.seconds = {"total": 0.0, "data": 0.0}


def start_profiler(run: Run, updates: int) -> None:
    """`--profile N`: torch's profiler over `updates` updates after two of warm-up."""
    on_cuda = [torch.profiler.ProfilerActivity.CUDA] if run.device.type == "cuda" else []
    run.profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, *on_cuda],
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=updates),
        on_trace_ready=lambda profile: _write_trace(profile, run.output_dir / "profile"),
    )
    run.profiler.start()


def _write_trace(profile: torch.profiler.profile, folder: Path) -> None:
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / "trace.json"))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
        print(f"{folder / 'trace.json'}: open it in https://ui.perfetto.dev", flush=True)
