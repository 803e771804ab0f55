"""Where the time of a training step goes: a table by part, and a trace for a browser."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from util.dist import is_main_process

PARTS = ("data wait", "copy", "teacher", "encoder", "decoder", "distill head", "backward", "optimiser")
WARMUP_UPDATES = 2
_active: list["StepProfile"] = []  # at most one: the profile that is recording


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Marks a part of the step; does nothing unless a profile is recording."""
    if not _active:
        yield
        return
    recording = _active[0]
    with record_function(name):
        started = recording.mark()
        yield
        recording.spans.append((name, started, recording.mark()))


class StepProfile:
    """Profiles `updates` updates after `WARMUP_UPDATES`; `step` says when they are done.

    Parts are timed by events in the stream on CUDA (nothing waits for the host) and by the clock on
    the CPU.

    Args:
        updates: how many.
        folder: gets `trace.json` (open it in https://ui.perfetto.dev).
    """

    def __init__(self, updates: int, folder: Path, device: torch.device):
        self.updates, self.folder, self.device = updates, folder, device
        self.seen, self.data_wait, self.started, self.seconds = 0, 0.0, 0.0, 0.0
        self.spans: list[tuple] = []
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])

    def mark(self):
        """A point in time: a CUDA event, or seconds."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, seconds: float) -> None:
        """Time the loop waited for a batch."""
        self.data_wait += seconds

    def step(self) -> bool:
        """After every update; True when enough were seen."""
        self.seen += 1
        if self.seen == WARMUP_UPDATES:
            self._synchronize()
            self._profile.start()
            _active.append(self)
            self.data_wait, self.started = 0.0, time.perf_counter()
        if self.seen < WARMUP_UPDATES + self.updates:
            return False
        self._synchronize()
        self.seconds = time.perf_counter() - self.started
        _active.clear()
        self._profile.stop()
        return True

    def report(self, images_per_update: int) -> dict:
        """{"images_per_s", "update_ms", "parts_ms": {part: ms an update}}; rank 0 writes the trace."""
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.folder / "trace.json"))
        spent = dict.fromkeys(PARTS, 0.0) | {"data wait": self.data_wait * 1e3}
        for name, started, ended in self.spans:
            spent[name] += (ended - started) * 1e3 if isinstance(started, float) else started.elapsed_time(ended)
        update_ms = self.seconds / self.updates * 1e3
        parts = {name: value / self.updates for name, value in spent.items()}
        return {
            "images_per_s": images_per_update / update_ms * 1e3,
            "update_ms": update_ms,
            "parts_ms": parts | {"other": update_ms - sum(parts.values())},
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def profile_table(result: dict) -> str:
    """Lines of text, one a part."""
    lines = [f"{'part':14s} {'ms an update':>13s}  share"]
    for name, value in result["parts_ms"].items():
        lines.append(f"{name:14s} {value:13.1f}  {value / result['update_ms']:.1%}")
    lines.append(f"{'all':14s} {result['update_ms']:13.1f}  {result['images_per_s']:.4g} images/s")
    return "\n".join(lines)


def compile_counts() -> dict[str, int]:
    """What torch.compile did so far in this process: graphs, graph breaks, recompilations."""
    # torch has no public name for these
    from torch._dynamo.utils import counters, get_compilation_metrics

    # a compile id is frame/attempt: an attempt after the first means that a guard had failed
    ids = [str(metrics.compile_id).split("/") for metrics in get_compilation_metrics()]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompiles": sum(len(parts) == 2 and parts[1].split("_")[0] != "0" for parts in ids),
    }
