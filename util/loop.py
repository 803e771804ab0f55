"""What every training loop shares: the update of the weights, and the watch over a run between updates."""

import json
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from util.dist import all_reduce_mean, get_world_size, is_main_process
from util.errors import InputError
from util.meter import means
from util.precision import LEAST_SCALE
from util.progress import Progress
from util.step_profile import part

QUIET_SECONDS = 30
DATA_WAIT_ADVICE = 0.2


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
    terms["bad_images"] = torch.full((), float(len(problems)), device=run.device)  # without a copy
    flat = all_reduce_mean(torch.cat([v.reshape(-1) for v in terms.values()]))
    terms = dict(zip(terms, flat.split([v.numel() for v in terms.values()])))
    loss_ok = torch.isfinite(terms["loss"]).all()
    ok = loss_ok & torch.isfinite(terms["grad_norm"]).all()
    if args.clip_grad:
        nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, grad_norm)

    # with fp16 an infinite gradient alone is the scaler finding its scale
    watch.add(batches_done, lr, terms, loss_ok if run.scaler else ok, problems)
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
        if run.buffers:
            run.buffers.commit(ok)


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


class StepWatch:
    """Everything the host looks at between updates: log lines, bad images, bad steps, saving.

    Args:
        run: a PretrainRun or FinetuneRun. args: reads accum_iter, print_freq, max_bad_steps, max_bad_ratio.
        num_batches: of this epoch.
        shown: means of an update's terms -> what a log line says of them beside the loss.
        faster_data, steadier: what to do about waiting for images, and about non-finite updates.
    """

    def __init__(
        self,
        run,
        args,
        num_batches: int,
        shown: Callable[[dict[str, float]], list[str]],
        faster_data: str,
        steadier: str,
    ):
        self.run, self.args, self.shown = run, args, shown
        self.faster_data, self.steadier = faster_data, steadier
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
        if problems:  # at once: a stop would lose what waits
            with open(self.run.output_dir / "bad_images.txt", "a") as opened:
                opened.write("".join(f"{self.run.epoch}\t{p}\n" for p in problems))
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
        parts = [f"lr {lr:.3g}", f"loss {values['loss']:.4f}", *self.shown(values)]
        return "  ".join([*parts, self._speed()])

    def _speed(self) -> str:
        total = max(self.seconds["total"], 1e-9)
        share = self.seconds["data"] / total
        if share > DATA_WAIT_ADVICE and self.steady and not self.advised:
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
            if self.run.bad_steps_in_row >= self.args.max_bad_steps:  # also where good ones have followed
                raise InputError(
                    f"{self.run.bad_steps_in_row} updates in a row had a non-finite loss or gradient and "
                    f"were skipped (epoch {self.run.epoch}); none of them is in the weights, files and loss "
                    f"terms are in {self.run.output_dir / 'bad_steps.jsonl'}: {self.steadier}, then "
                    "--resume auto"
                )
        scale = self.run.scaler.get_scale() if self.run.scaler else 1.0
        if scale < LEAST_SCALE:
            raise InputError(
                f"fp16 finds no loss scale at which the gradients are finite (epoch {self.run.epoch}, now "
                f"{scale:.1g}), so nothing is learned any more: {self.steadier}, then --resume auto"
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
