"""Processes: ranks and their group, data workers, pools with results in order, and folders that belong to one job."""

import contextlib
import ctypes
import inspect
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from util.errors import InputError
from util.files import read_json, write_json
from util.precision import pick_threads

CHUNK = 64  # items a worker takes at a time
_patient = None  # the group of `wait_for_main`
_shared: object = None


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
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(pick_threads())
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise InputError(f"--device {name}: choose auto, cuda or cpu; CUDA_VISIBLE_DEVICES picks the GPU")
    local_rank, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= there:
        cure = "lower torchrun's --nproc_per_node" if there else "use --device cpu, or check the driver (nvidia-smi)"
        raise InputError(f"process {local_rank} of this machine has no GPU, torch sees {there}: {cure}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def init_distributed(device: torch.device, timeout_s: float) -> None:
    """Join torchrun's group if there is one: NCCL for CUDA, gloo for CPU; InputError where not every rank comes within
    `timeout_s`: a missing one ends in a report rather than a hang."""
    global _patient
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    on_cuda, timeout, started = device.type == "cuda", timedelta(seconds=timeout_s), time.monotonic()
    backend, bound = ("cpu:gloo,cuda:nccl", device) if on_cuda else ("gloo", None)
    try:
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # a restart would find the keys of dead ranks
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world, device_id=bound)
        _patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        dist.monitored_barrier(group=_patient, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        rank, world, host, port = (os.environ.get(n, "?") for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        waited = f"waited {time.monotonic() - started:.0f} s at {host}:{port} and not every rank came"
        cure = "run the command on every node with the same --nnodes and --rdzv settings, or raise --dist_timeout"
        reason = str(error).strip().splitlines()[0][:300]
        raise InputError(f"rank {rank} of {world} ({device}) {waited} ({reason}): {cure}") from error


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
    if get_world_size() > 1:
        dist.barrier(_patient)


def all_ranks_equal(value: object) -> bool:
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
    """DDP that exchanges gradients only: buffers never change or change alike on all ranks (they see the gathered
    batch). The graph is static where each update has `one_backward`, not where some run under `no_sync`."""
    has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.14
    how = {"forward_sync_buffers" if has_new_name else "broadcast_buffers": False, "static_graph": one_backward}
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(bare, device_ids=ids, gradient_as_bucket_view=True, **how)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad.split(ctx.rows)[get_rank()] * get_world_size()


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """[n, ...] of each rank -> [world * n, ...] in the order of the ranks, on every rank. A loss computed from it alike
    on all ranks has, after DDP's averaging, the gradient of one process on the whole batch."""
    return _GatherRows.apply(x) if get_world_size() > 1 else x


def init_worker(worker_id: int = 0) -> None:
    """Start a data worker: Ctrl-C and SIGHUP are the main process's business, SIGTERM ends it as usual; one thread."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    torch.set_num_threads(1)


def end_with_parent() -> None:
    """Linux: get SIGTERM when the process that started this one dies, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # 1: PR_SET_PDEATHSIG


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """On rank 0 one run at a time in a folder; the lock ends with the process, however it ends."""
    if not is_main_process():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=45)
    except OSError as error:
        is_taken = isinstance(error, (Timeout, FileNotFoundError))  # the latter: it ended and cleared up just now
        reason = "another run is writing to it" if is_taken else error.strerror
        raise InputError(f"the folder {folder} cannot be written to ({reason}): choose another") from error
    with lock:
        for left in folder.glob(".checkpoint-*.pth.*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        yield


def launch(device: str, folder: str | Path | None, job: Callable, timeout_s: float = 600.0) -> dict:
    """Run `job(device)` with torchrun's group joined, if there is one, and `folder`, if any, locked on rank 0."""
    bound = pick_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # no orphan trains on beside the run that replaces it
        end_with_parent()
    init_distributed(bound, timeout_s)
    try:
        with run_lock(Path(folder)) if folder else contextlib.nullcontext():
            return job(bound)
    except torch.OutOfMemoryError as error:
        cure = "--micro_batch (pre-training) or --grad_checkpoint, which change no result, or a smaller --batch_size"
        raise InputError(f"a batch does not fit into the memory of {bound}: use {cure}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def worker_pool(workers: int, for_all: object = None) -> ProcessPoolExecutor:
    """Processes that leave Ctrl-C to their parent and end with it, also when it is killed; `for_all` reaches each once,
    as `shared()`, where what goes with a chunk is pickled every time."""
    return ProcessPoolExecutor(workers, initializer=_init_pool_worker, initargs=(for_all,))


def shared() -> object:
    """In a worker: what `worker_pool` was given for all."""
    return _shared


def _init_pool_worker(for_all: object) -> None:
    global _shared
    _shared = for_all
    init_worker()


def map_in_order(pool: ProcessPoolExecutor, function: Callable[[list], list], items: Iterable, workers) -> Iterator:
    """`pool.map` of `function`, which turns a list of items into a list of results; reads only a few chunks ahead."""
    items, pending = iter(items), deque()
    while chunk := list(islice(items, CHUNK)):
        pending.append(pool.submit(function, chunk))
        if len(pending) > 2 * workers:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


def claim(file: Path, header: dict, what: str) -> bool:
    """Write `header` to `file` (rank 0), or make sure that the one there is the same -> whether the folder is new;
    InputError where it holds something else than `what` (the content in words), or a damaged header."""
    if not file.is_file():
        if is_main_process():
            write_json(file, header)
        return True
    old = read_json(file, f"remove {file.parent} and start again")
    if different := ", ".join(key for key in header if old.get(key) != header[key]):
        cure = "remove it, or take another --output"
        raise InputError(f"{file.parent} holds another {what} (its {different} differ): {cure}")
    return False


class Parts:
    """The parts of `total` items, `size` items each, in files with this `ending` in a folder of their own; a folder
    with parts of another `job` (what they depend on) is refused, `what` names its content in that message."""

    def __init__(self, folder: Path, job: dict, what: str, total: int, size: int, ending: str):
        self.folder, self.total, self.size, self.ending = folder, total, size, ending
        claim(folder / "job.json", job, what)
        self.starts = range(0, total, size)
        # shared out before looking what is there: ranks that look at different moments must not disagree
        self.todo = [s for s in self.starts[get_rank() :: get_world_size()] if not self.file(s).is_file()]
        barrier()  # rank 0 may remove the folder only after all have looked

    def file(self, start: int) -> Path:
        return self.folder / f"part_{start:010d}{self.ending}"

    def stop(self, start: int) -> int:
        return min(start + self.size, self.total)

    def items_to_do(self) -> int:
        return sum(self.stop(start) - start for start in self.todo)

    def complete(self) -> bool:
        """Wait until every rank has done its parts; True on rank 0, which then puts them together."""
        wait_for_main()
        return is_main_process()

    def remove(self) -> None:
        """All files, also what a killed write left; job.json last: no other job can adopt the rest."""
        for file in self.folder.iterdir():
            if file.name != "job.json":
                file.unlink()
        (self.folder / "job.json").unlink()
        self.folder.rmdir()
