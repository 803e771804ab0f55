"""Work that processes share: pools with results in order, jobs cut into parts, folders that belong to one job."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from util.dist import barrier, get_rank, get_world_size, is_main_process, wait_for_main
from util.errors import InputError
from util.files import read_json, write_json
from util.precision import usable_cores
from util.stop import init_worker

CHUNK = 64  # items a worker takes at a time
_shared: object = None


def worker_pool(workers: int, for_all: object = None) -> ProcessPoolExecutor:
    """Processes that leave Ctrl-C to their parent and end with it, also when it is killed.

    `for_all` reaches every worker once, as `shared()`; what goes with a chunk is pickled every time.
    """
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
    """Write `header` to `file` (rank 0), or make sure that the one there is the same -> whether the folder is new.

    Raises:
        InputError: it holds something else than `what` (the content in words), or a damaged header.
    """
    if not file.is_file():
        if is_main_process():
            write_json(file, header)
        return True
    old = read_json(file, f"remove {file.parent} and start again")
    if different := ", ".join(key for key in header if old.get(key) != header[key]):
        words = f"holds another {what} (its {different} differ)"
        raise InputError(f"{file.parent} {words}: remove it, or take another --output")
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
        """Items of this rank that are still to do."""
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


def default_workers() -> int:
    """Data processes of a rank: one for each of its cores, at most 10."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(10, max(1, int(usable_cores()) // local))
