"""Precision, attention and threads, decided by what the device is and what is free of it."""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.layers import set_fused_attn

LEAST_SCALE = 1e-3  # of fp16's losses; healthy runs stay far above 1
CPU_BF16 = {"amx_bf16", "avx512_bf16"}  # instructions; without them bf16 is emulated, hundreds of times slower
DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(amp: str, device: torch.device, before: str = "") -> tuple[torch.dtype | None, str]:
    """`--amp` -> (autocast dtype or None for float32, the decision in words); call it before models are built.

    auto: the precision `before` of the run that goes on; bf16 on GPUs that have it, else fp16; on a CPU bf16 where it
    has the instructions. Models built afterwards use fused attention, but for half precision on the CPU, where explicit
    products are faster (docs/PERFORMANCE.md).
    """
    torch.set_float32_matmul_precision("high")
    why, cpu = "asked for", Path("/proc/cpuinfo")
    kept = {"float32": "none", "bfloat16": "bf16", "float16": "fp16"}.get(before)
    if amp == "auto" and kept:
        amp, why = kept, "the run's"
    elif amp == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        amp, why = ("bf16", "this GPU has it") if has_bf16 else ("fp16", "with loss scaling: this GPU has no bf16")
    elif amp == "auto":
        has_bf16 = cpu.is_file() and CPU_BF16 & set(cpu.read_text().split())
        amp, why = ("bf16", "this CPU has it") if has_bf16 else ("none", "this CPU has no bf16 instructions")
    fused = device.type == "cuda" or amp == "none"
    set_fused_attn(fused)
    words = f"{'fp32' if amp == 'none' else amp} ({why}); attention: {'fused' if fused else 'explicit'}"
    return DTYPES[amp], words


def machine_facts(dtype: torch.dtype | None) -> dict:
    """What of a run follows from the machine, and is taken again where it goes on: another would change last bits."""
    return {"precision": str(dtype or torch.float32).removeprefix("torch."), "threads": torch.get_num_threads()}


def usable_cores() -> float:
    """Cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's share: "150000 100000" is one and a half
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def free_cores() -> float:
    """Those of them that nobody uses now: threads that run or wait, not the averages, which remember what has ended."""
    busy = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for _ in range(7):
            time.sleep(0.03)
            busy.append(max(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1, 0))
    return usable_cores() - statistics.median_low(busy or [0])


@functools.cache
def pick_threads() -> int:
    """Threads of a rank that computes on the CPU; OMP_NUM_THREADS wins. More than there are free cores wait for each
    other and take many times longer than one; of more than two a core is left to what feeds them."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    share = int(free_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return max(1, share - (share > 2))


def default_workers() -> int:
    """Data processes of a rank: one for each of its cores, at most 10."""
    return min(10, max(1, int(usable_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@contextlib.contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and float32 products and convolutions not rounded to TF32; afterwards all is as before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, model.training
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    model.eval()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        model.train(before[2])
