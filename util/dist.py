"""Processes: start and end of the group, ranks, and what only rank 0 says."""

import contextlib
import inspect
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from util.errors import InputError
from util.precision import pick_threads
from util.stop import end_with_parent, run_lock

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
    """`auto`, `cuda` or `cpu` -> the device of this process, CUDA bound to LOCAL_RANK, threads chosen for the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        torch.set_num_threads(pick_threads())
        return torch.device("cpu")
    if name != "cuda":
        raise InputError(f"--device {name}: choose auto, cuda or cpu; CUDA_VISIBLE_DEVICES picks the GPU")
    local_rank, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= there:
        cure = "lower torchrun's --nproc_per_node" if there else "use --device cpu, or check the driver (nvidia-smi)"
        raise InputError(f"process {local_rank} of this machine has no GPU, torch sees {there}: {cure}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def init_distributed(device: torch.device, timeout_s: float) -> None:
    """Join torchrun's group if there is one: NCCL for CUDA, gloo for CPU; the device is bound before the group exists.

    Raises:
        InputError: not every rank arrived within `timeout_s`: a missing one ends in a report rather than a hang.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    on_cuda, timeout, started = device.type == "cuda", timedelta(seconds=timeout_s), time.monotonic()
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    try:
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # a restart finds the dead ranks there
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        bound = device if on_cuda else None
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world, device_id=bound)
        dist.monitored_barrier(group=dist.new_group(backend="gloo") if on_cuda else None, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        waited = time.monotonic() - started
        rank, world, host, port = (os.environ.get(n, "?") for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        raise InputError(
            f"rank {rank} of {world} on {os.uname().nodename} ({device}, {backend}) waited {waited:.0f} s at "
            f"{host}:{port} and not every rank came: {str(error).strip().splitlines()[0][:300]}. Check that the "
            "command runs on every node with the same --nnodes and --rdzv settings, or raise --dist_timeout"
        ) from error


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
    """Where the others wait while rank 0 works alone, however long: the group's timeout is for missing ranks."""
    global _patient
    if get_world_size() > 1:
        _patient = _patient or dist.new_group(backend="gloo", timeout=timedelta(days=30))
        dist.barrier(_patient)


def all_ranks_equal(value: object) -> bool:
    """Whether all ranks have an equal value; the same answer on all of them."""
    values = [value] * get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


def broadcast(value):
    """Rank 0's value on all ranks."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def wrap_ddp(bare: torch.nn.Module, device: torch.device, one_backward: bool) -> DistributedDataParallel:
    """DDP that exchanges gradients only: buffers never change (pixel statistics, text bank) or change alike on all
    ranks (BNNecks and centres see the gathered batch).

    The graph is declared static where each update has `one_backward`; DDP refuses it where the first of several runs
    under `no_sync`.
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

    A loss computed from it alike on all ranks has, after DDP's averaging, the gradient that one process has on the
    whole batch: each rank passes back the part of its own rows, `world` times.
    """
    return _GatherRows.apply(x) if get_world_size() > 1 else x


def launch(device: str, folder: str | Path | None, job: Callable, timeout_s: float = 600.0) -> dict:
    """Run `job(device)` with torchrun's group joined, if there is one, and `folder`, if any, locked on rank 0."""
    bound = pick_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # no orphan trains on beside the run that replaces it
        end_with_parent()
    init_distributed(bound, timeout_s)
    try:
        with run_lock(Path(folder)) if folder and is_main_process() else contextlib.nullcontext():
            return job(bound)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"a batch does not fit into the memory of {bound}: use --micro_batch (pre-training) or --grad_checkpoint, "
            "which change no result, or a smaller --batch_size or --input_size"
        ) from error
    finally:
        end_distributed()
