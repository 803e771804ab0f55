"""Precision and attention, decided by what the device is."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.layers import set_fused_attn

from util.errors import InputError

LEAST_SCALE = 1e-3  # of fp16's losses; healthy runs stay far above 1
CPU_BF16 = ("amx_bf16", "avx512_bf16")  # instructions; without them bf16 is emulated, hundreds of times slower


def pick_precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """`--amp` -> (autocast dtype or None for float32, the decision in words); call it before models are built.

    auto: bf16 on GPUs that have it, else fp16; on a CPU bf16 where it has the instructions. Models built afterwards use
    fused attention, but for half precision on the CPU, where explicit products are faster (docs/PERFORMANCE.md).
    """
    torch.set_float32_matmul_precision("high")
    dtype, words = _pick_dtype(amp, device)
    fused = device.type == "cuda" or dtype is None
    set_fused_attn(fused)
    return dtype, f"{words}; attention: {'fused' if fused else 'explicit'}"


def _pick_dtype(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    if amp == "none":
        return None, "fp32 (asked for)"
    if amp in ("bf16", "fp16"):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp], f"{amp} (asked for)"
    if amp != "auto":
        raise InputError(f"--amp {amp}: choose auto, bf16, fp16 or none")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16 (this GPU has it)"
        return torch.float16, "fp16 with loss scaling (this GPU has no bf16)"
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file() and set(CPU_BF16) & set(cpu.read_text().split()):
        return torch.bfloat16, "bf16 (this CPU has it)"
    return None, "fp32 (this CPU has no bf16 instructions)"


@contextlib.contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and float32 products and convolutions not rounded to TF32; afterwards all is as before."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    training = model.training
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
