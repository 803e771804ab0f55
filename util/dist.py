"""Processes: start and end of the group, ranks, and what only rank 0 says."""

import contextlib
import datetime
import inspect
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.errors import InputError
from util.stop import end_with_launcher, run_lock

_patient = None  # the group of `wait_for_main`


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def print_main(*lines: object) -> None:
    """Print on rank 0 only, one below the other, at once."""
    if is_main_process():
        print(*lines, sep="\n", flush=True)


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` -> the device of this process, CUDA bound to LOCAL_RANK."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise InputError(f"--device {name}: choose auto, cuda or cpu; CUDA_VISIBLE_DEVICES picks the GPU")
    if not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or check the driver with nvidia-smi"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU: torch sees "
            f"{torch.cuda.device_count()}; lower torchrun's --nproc_per_node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def init_distributed(device: torch.device, timeout_s: float) -> None:
    """Join torchrun's group if there is one: NCCL for CUDA, gloo for CPU.

    The device is bound before the group exists, and the first collective is waited for with
    `timeout_s`, so that a missing rank ends in a report rather than a hang.

    Raises:
        InputError: not every rank arrived in time.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        dist.init_process_group(
            backend, timeout=datetime.timedelta(seconds=timeout_s), device_id=device if device.type == "cuda" else None
        )
        dist.monitored_barrier(group=_gloo_group(device), timeout=datetime.timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise InputError(
            f"rank {rank} of {world} on {os.uname().nodename} ({device}, {backend}) waited "
            f"{timeout_s:.0f} s at {where} and not every rank came: {reason}. Check that the command "
            "runs on every node with the same --nnodes and --rdzv settings, or raise --dist_timeout"
        ) from error


def _gloo_group(device: torch.device):
    return dist.new_group(backend="gloo") if device.type == "cuda" else None


def end_distributed() -> None:
    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean of x over ranks, in place; x is float on the group's device."""
    if get_world_size() > 1:
        dist.all_reduce(x)
        x /= get_world_size()
    return x


def barrier() -> None:
    if get_world_size() > 1:
        dist.barrier()


def wait_for_main() -> None:
    """Where the others wait while rank 0 works alone, for as long as that takes: the group's timeout is for
    missing ranks and does not end it."""
    global _patient
    if get_world_size() > 1:
        if _patient is None:
            _patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        dist.barrier(_patient)


def all_ranks_equal(value: object) -> bool:
    """Whether all ranks have an equal value; the same answer on all of them."""
    if get_world_size() == 1:
        return True
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


def broadcast(value):
    """Rank 0's value on all ranks."""
    if get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def wrap_ddp(bare: torch.nn.Module, device: torch.device, one_backward: bool) -> DistributedDataParallel:
    """DDP that exchanges gradients only: the buffers never change (pixel statistics, text bank) or change
    alike on all ranks (BNNecks and centres see the gathered batch).

    The graph is declared static where each update has `one_backward`; DDP refuses it where the first of
    several runs under `no_sync`.
    """
    has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    never = {"forward_sync_buffers" if has_new_name else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        bare, device_ids=ids, gradient_as_bucket_view=True, static_graph=one_backward, **never
    )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        first = get_rank() * ctx.rows
        return grad[first : first + ctx.rows] * get_world_size()


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """[n, ...] of each rank -> [world * n, ...] in the order of the ranks, on every rank.

    A loss computed from it alike on all ranks has, after DDP's averaging, the gradient that one process has
    on the whole batch: each rank passes back the part of its own rows, `world` times.
    """
    return _GatherRows.apply(x) if get_world_size() > 1 else x


def launch(device: str, folder: str | Path, job: Callable[[torch.device], dict], timeout_s: float = 600.0) -> dict:
    """Run `job(device)` with torchrun's group joined, if there is one, and `folder` locked on rank 0.

    Raises:
        InputError: no such device, a rank that did not come within `timeout_s`, or another run in the folder.
    """
    bound = pick_device(device)
    end_with_launcher()
    init_distributed(bound, timeout_s)
    try:
        with run_lock(Path(folder)) if is_main_process() else contextlib.nullcontext():
            return job(bound)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"a batch does not fit into the memory of {bound}: use --micro_batch of main_pretrain.py or "
            "--grad_checkpoint (the result stays the same), a smaller --batch_size, or a smaller --input_size"
        ) from error
    finally:
        end_distributed()
