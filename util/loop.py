"""What every training loop shares: the state of a run, updates of its weights, the watch over it, its end by a signal.
A batch is what the loader gives on each rank; an update follows `accum_iter` of them."""

import contextlib
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from util.cli import Progress
from util.dist import all_reduce_mean, get_world_size, is_main_process
from util.errors import AWAY, InputError
from util.precision import LEAST_SCALE
from util.run_files import RunFiles

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Raised in the main thread by the first of `SIGNALS`, as Python does with Ctrl-C."""


class StopGuard:
    """Saves the state of the last complete update on rank 0 (`is_main`) when the process is told to stop or fails;
    `save` writes it and says what it has written. A signal raises `Stopped` in whatever line the main thread is at, so
    that the update in flight is thrown away: it can take longer than the launcher's patience (30 s under torchrun).
    Only `committing` is never cut."""

    def __init__(self, save: Callable[[], str], is_main: bool):
        self._save, self._is_main, self._received = save, is_main, 0
        self._busy = self._torn = False  # inside `committing`; an exception left an update half done

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Around the optimiser step and the counters that belong to it."""
        ignore_worker_deaths()
        self._busy = self._torn = True
        yield
        self._busy = self._torn = False
        if self._received:
            raise Stopped

    def _hear(self, number: int, _frame) -> None:
        first, self._received = not self._received, self._received or number
        if first and not self._busy:
            raise Stopped

    def __enter__(self):
        wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stays
        self._old = {number: signal.signal(number, self._hear) for number in wanted}
        return self

    def __exit__(self, kind, error, trace) -> bool:
        ignore_worker_deaths()  # a signal to the whole group ends the workers while the state is saved
        self._busy = True  # from here on a signal is noted only
        if error is not None and self._is_main and not self._torn:
            said = self._save()
            more = "" if "--resume" in sys.argv else " --resume auto"
            print(f"\nsaved {said}; go on with: {shlex.join(sys.argv)}{more}", flush=True)
        if self._received:
            if not self._is_main:
                time.sleep(2)  # rank 0 should see its own signal before it sees a peer vanish
            os._exit(128 + self._received)  # errors of dying peers do not matter now
        for number, handler in self._old.items():
            signal.signal(number, handler)
        return False


def ignore_worker_deaths() -> None:
    """Take back torch's handler, which raises in any line when a data worker dies; the loader finds it in seconds."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class Meter:
    """Sums over updates of named terms (scalars and vectors) on the device, float64, without skipped updates."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}  # "count": of updates

    def update(self, terms: dict[str, torch.Tensor], ok: torch.Tensor) -> None:
        """Add one update's terms, nothing where `ok` (a bool scalar on the device) is False."""
        for name, value in {**terms, "count": ok}.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(ok, value.double(), 0.0)

    def read(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(updates counted, sums by name on the CPU)."""
        sums = {name: total.cpu() for name, total in self.sums.items()}
        return int(sums.pop("count", 0)), sums


@dataclass
class Run:
    """What one run holds. bare: the model, as it is saved. model: what the loop calls, bare or bare in DDP. scaler: for
    fp16 only. amp_dtype: None for float32. epoch, batches_done (of it): which updates are in the weights.
    saved_buffers: what the forward pass changes (BatchNorm's statistics, centres) as of the last update, where a
    skipped one returns to."""

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
        self.output_dir, names = self.files.output_dir, self.bare.state_dict().keys()
        self.buffers = {name: buffer for name, buffer in self.bare.named_buffers() if name in names}
        self.take_buffers()

    def take_buffers(self) -> None:
        self.saved_buffers = {name: buffer.detach().clone() for name, buffer in self.buffers.items()}

    def commit_buffers(self, ok: torch.Tensor) -> None:
        for name, buffer in self.buffers.items():
            self.saved_buffers[name] = torch.where(ok, buffer, self.saved_buffers[name])
            buffer.copy_(self.saved_buffers[name])

    def committing(self):
        return self.guard.committing() if self.guard else contextlib.nullcontext()

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()


def to_device(batch: dict, device: torch.device, host: tuple[str, ...] = ("problem",)) -> dict:
    """Tensors of a batch on the device; entries named in `host` stay."""
    return {k: v if k in host else v.to(device, non_blocking=True) for k, v in batch.items()}


def apply_update(run: Run, args, update_terms: list[dict], problems: list[str], watch: "StepWatch", lr: float) -> None:
    """Average over batches and ranks, then step; an update that is not finite, or for which too many images could
    not be read, is skipped: decided on the device from numbers that all ranks share, so nobody waits for the host."""
    terms = {k: torch.stack([t[k] for t in update_terms]).mean(dim=0) for k in update_terms[0]}
    if run.scaler:
        run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    bad_images = math.inf if any(AWAY in problem for problem in problems) else float(len(problems))
    terms |= {"grad_norm": grad_norm.float(), "bad_images": torch.full((), bad_images, device=run.device)}
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
        run.commit_buffers(ok)
    watch.look()


class StepWatch:
    """What the host looks at between updates: log lines, bad images, bad steps, saving. shown: means of terms -> what a
    log line says beside the loss. steadier: what to do about non-finite updates."""

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
        self.at_look, self.seen_at_look, self.has_looked = dict(run.seconds), run.batches_done + 1, False

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
        """At the first and last update of an epoch, and every `print_freq` of them."""
        if self.has_looked and self.seen < self.bar.total and len(self.pending) < self.args.print_freq:
            return
        if self.problems:
            self.bar.print(f"unreadable, another image stands in: {self.problems[0]}")
        lr, good = self.pending[-1][1], self._settle()
        if good:
            values = {name: sum(terms[name] for terms in good) / len(good) for name in good[0]}
            total, data = (self.run.seconds[name] - self.at_look[name] for name in ("total", "data"))
            images = (self.seen - self.seen_at_look) * self.batches.size
            # the time of the first batch is not known yet
            speed = [f"{images / total:.3g} img/s", f"data wait {data / total:.0%}"] if total else []
            parts = [f"lr {lr:.3g}", f"loss {values['loss']:.4f}", *self.shown(values), *speed]
            self.bar.update(self.seen, "  ".join(parts))
        self.problems, self.at_look, self.seen_at_look, self.has_looked = [], dict(self.run.seconds), self.seen, True
        files = self.run.files
        if is_main_process() and time.monotonic() - files.saved_at >= 60 * self.args.save_minutes:
            files.save(self.run)

    def _settle(self) -> list[dict[str, float]]:
        """Read what the device has decided -> the terms of the updates that were made; InputError where too many images
        could not be read (`batches_done` is then that of the last update) or too many updates were not finite."""
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
                words = (
                    f"are skipped and listed in {run.output_dir / 'bad_steps.jsonl'}: {self.steadier}; --resume auto"
                )
                raise InputError(f"{run.bad_steps_in_row} updates in a row with a non-finite loss or gradient {words}")
        if run.scaler and run.scaler.get_scale() < LEAST_SCALE:
            raise InputError(f"fp16 finds no loss scale with finite gradients: {self.steadier}, then --resume auto")
        return good

    def _why_images(self, bad: float) -> str:
        listed = f"they are listed in {self.run.output_dir / 'bad_images.txt'}, the update is not in the weights"
        if math.isinf(bad):
            return f"images could not be read because {AWAY} ({listed}): make it answer, then --resume auto"
        share = f"{bad:.0f} of {self.batches.num_images} images could not be read (limit {self.args.max_bad_ratio:.2%}"
        return f"{share}; {listed}): repair or remove them, or raise --max_bad_ratio; --resume auto"

    def _report_bad_step(self, first: int, seen: int, lr: float, terms: dict[str, float]) -> None:
        name_of, epoch = self.run.loader.dataset.paths.relative, self.run.epoch
        files = [name_of(int(i)) for step in range(first, seen) for i in self.batches.global_batch(epoch, step)]
        record = {"epoch": epoch, "batches": [first, seen], "lr": lr, "files": files}
        record["terms"] = {name: repr(value) for name, value in terms.items()}
        with open(self.run.output_dir / "bad_steps.jsonl", "a") as opened:
            opened.write(json.dumps(record) + "\n")
        bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
        self.bar.print(f"update {seen} skipped: {bad} not finite")

    def __enter__(self) -> "StepWatch":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(InputError):  # what is saved must not count updates that were not made
            self._settle()
        self.bar.close()


def epoch_record(run: Run, args) -> dict[str, float]:
    """The numbers of the epoch that has ended, for log.txt: means of the terms, speed, what was skipped."""
    count, sums = run.meter.read()
    values = {name: (total / count).item() for name, total in sums.items() if count and total.numel() == 1}
    bad_images = round(values.pop("bad_images", 0) * count * get_world_size())
    group, seconds = run.optimizer.param_groups[0], max(run.seconds["total"], 1e-9)
    images = run.batches_done * run.loader.batch_sampler.size
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # resident memory of the process: macOS gives bytes, Linux kB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    record = {"train_lr": group["lr"] / group.get("lr_scale", 1.0), "train_loss": values.pop("loss", math.nan)}
    record |= {f"train_{name}": value for name, value in values.items()}
    record |= {"images_per_s": images / seconds, "data_wait": run.seconds["data"] / seconds, "bad_images": bad_images}
    skipped = -(-run.batches_done // args.accum_iter) - count
    return record | {"skipped_updates": skipped, "peak_gigabytes": peak / 1e9, "epoch": run.epoch}


def end_epoch(run: Run, record: dict[str, float], names: list[str], writer, scale: int = 1) -> None:
    """Log the epoch, count on and save. names: of the means that its line shows, each beside what a constant answer
    reaches. writer: TensorBoard's on rank 0, where epoch e is drawn at `scale` (e + 1)."""
    run.files.log(record)  # before the epoch counts as done: a resumed run drops lines of epochs it repeats
    with run.committing():
        run.epoch, run.batches_done = run.epoch + 1, 0
        run.meter, run.seconds = Meter(), {"total": 0.0, "data": 0.0}
    if not is_main_process():
        return
    for name, value in record.items():
        writer.add_scalar(name, value, run.epoch * scale)
    run.files.save_epoch(run)
    parts = []
    for name in dict.fromkeys(names):
        value, trivial = record.get(f"train_loss_{name}", record.get(f"train_{name}")), f"train_{name}_baseline"
        if value is not None:
            parts.append(f"{name} {value:.4f}" + (f" (constant {record[trivial]:.4f})" if trivial in record else ""))
    parts.append(f"{record['images_per_s']:.3g} img/s")
    parts += [f"{record[name]} {name.replace('_', ' ')}" for name in ("bad_images", "skipped_updates") if record[name]]
    print(f"epoch {record['epoch']} done: {', '.join(parts)}", flush=True)
