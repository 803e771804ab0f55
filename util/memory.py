"""Memory: how much a run takes, and the largest batch that fits when one does not."""

import contextlib
import gc
import resource
import sys
from collections.abc import Callable

import torch


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
