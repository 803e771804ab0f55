"""Work on many files in several processes, with bounded memory and results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

from util.stop import end_with_parent, init_worker

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
    init_worker(0)
    end_with_parent()


def map_in_order(
    pool: ProcessPoolExecutor, function: Callable[[list], list], items: Iterable, workers: int
) -> Iterator:
    """`pool.map` of `function`, which turns a list of items into a list of results; its input is read only a
    few chunks ahead, so that memory stays bounded."""
    items = iter(items)
    pending: deque = deque()
    while chunk := list(islice(items, CHUNK)):
        pending.append(pool.submit(function, chunk))
        if len(pending) > 2 * workers:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()
