"""Averages over an epoch, kept on the device: reading them is the only synchronisation."""

import contextlib
import gc
import resource
import sys
from collections.abc import Callable

import torch


class Meter:
    """Mean over updates of named terms (scalars and vectors), float64, skipping bad updates."""

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
    if not count:
        return {}
    return {k: (v / count).item() for k, v in sums.items() if v.numel() == 1}


def trivial_distillation(count: int, sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """What a student reaches that answers the same for every image.

    `cos_baseline`: mean cosine to the mean teacher embedding, which is the length of that mean;
    `kl_baseline`: mean KL(p_i || marginal) = entropy of the marginal - mean entropy of p_i, in nats.
    """
    if not count or "teacher_embed_mean" not in sums:
        return {}
    marginal = (sums["teacher_marginal"] / count).clamp_min(1e-300)
    entropy = -(marginal * marginal.log()).sum().item()
    return {
        "cos_baseline": (sums["teacher_embed_mean"] / count).norm().item(),
        "kl_baseline": entropy - (sums["teacher_entropy"] / count).item(),
    }


def peak_gigabytes(device: torch.device) -> float:
    """Peak memory of this process so far: of the device on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


def largest_that_fits(attempt: Callable[[int], None], too_many: int, device: torch.device) -> int:
    """The largest number of images, to within 1/16 of it, for which `attempt(n)` has enough memory.

    Args:
        attempt: runs one step on n images; raises torch.OutOfMemoryError where they do not fit.
        too_many: a number that did not fit.
    Returns:
        0 where not even one image fits.
    """
    low, high = 0, too_many
    while high - low > max(low // 16, 1):
        middle = (low + high) // 2
        if _fits(attempt, middle, device):
            low = middle
        else:
            high = middle
    return low


def _fits(attempt: Callable[[int], None], count: int, device: torch.device) -> bool:
    done = False
    with contextlib.suppress(torch.OutOfMemoryError):
        attempt(count)
        done = True
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return done
