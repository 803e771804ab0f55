"""Precision and attention by device; on the CPU by a measurement of a few milliseconds."""

import contextlib
import time
from collections.abc import Iterator

import torch

from util.dist import from_main
from util.errors import InputError

LEAST_SCALE = 1e-3  # of fp16's losses; healthy runs stay far above 1


def matmul_gflops(
    dtype: torch.dtype, size: int = 384, seconds: float = 0.05, device: torch.device | str = "cpu"
) -> float:
    """Rate of a square matrix product, in GFLOP/s."""
    device = torch.device(device)
    size = size * 4 if device.type == "cuda" else size  # small products do not fill a GPU
    a = torch.ones(size, size, dtype=dtype, device=device)
    b, repeats = torch.ones_like(a), 1 if device.type == "cpu" else 20

    def multiply() -> None:
        for _ in range(repeats):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    multiply()  # the first call sets up kernels
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        multiply()
        done += repeats
    return 2e-9 * size**3 * done / (time.perf_counter() - started)


def pick_amp_dtype(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """`--amp` -> (autocast dtype or None for float32, the reason in words).

    auto: bf16 on GPUs that have it, else fp16; on a CPU bf16 only where its matrix product is
    measured to be 1.3 times as fast as float32 (without hardware support it is hundreds of times
    slower). Under torchrun rank 0's measurement counts for all.
    """
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
    ratio = from_main(matmul_gflops(torch.bfloat16) / matmul_gflops(torch.float32))
    if ratio > 1.3:
        return torch.bfloat16, f"bf16 ({ratio:.1f} x the speed of fp32 on this CPU)"
    return None, f"fp32 (bf16 runs at {ratio:.2g} x its speed on this CPU)"


def pick_fused_attention(device: torch.device, amp_dtype: torch.dtype | None) -> bool:
    """scaled_dot_product_attention on CUDA and for float32 on the CPU, explicit products for half
    precision on the CPU, where the fused kernel was seen to be slower (docs/PERFORMANCE.md)."""
    return device.type == "cuda" or amp_dtype is None


@contextlib.contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and float32 products and convolutions that are not rounded to TF32; both are as before
    afterwards."""
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
