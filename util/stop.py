"""Stopping without losing work: Ctrl-C, SIGTERM, SIGHUP and crashes leave a resumable checkpoint."""

import contextlib
import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from util.errors import InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Raised in the main thread by the first of `SIGNALS`, as Python does with Ctrl-C."""


class StopGuard:
    """Saves the state of the last update when the process is told to stop, or when it fails.

    A signal raises `Stopped` in whatever line the main thread is at, so that the update in flight is thrown away: on a
    slow machine it can take longer than the launcher's patience (30 s under torchrun). Only `committing` is never cut.

    Args:
        save: writes the checkpoint and says what it holds. is_main: whether this rank saves.
    """

    def __init__(self, save: Callable[[], str], is_main: bool):
        self._save, self._is_main = save, is_main
        self._received = 0
        self._busy = self._torn = False  # inside `committing`; an exception left an update half done

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Around the optimiser step and the counters that belong to it."""
        ignore_worker_deaths()
        self._busy = self._torn = True
        yield
        self._busy = self._torn = False
        if self._received:
            raise Stopped

    def _hear(self, number: int, _frame) -> None:
        first, self._received = not self._received, self._received or number
        if first and not self._busy:
            raise Stopped

    def __enter__(self):
        wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup stays so
        self._old = {number: signal.signal(number, self._hear) for number in wanted}
        return self

    def __exit__(self, kind, error, trace) -> bool:
        ignore_worker_deaths()  # a signal to the whole group ends the workers while the state is saved
        self._busy = True  # from here on a signal is noted only
        if error is not None and self._is_main and not self._torn:
            said = self._save()
            more = "" if "--resume" in sys.argv else " --resume auto"
            print(f"\nsaved {said}; go on with: {shlex.join(sys.argv)}{more}", flush=True)
        if self._received:
            if not self._is_main:
                time.sleep(2)  # rank 0 should see its own signal before it sees a peer vanish
            os._exit(128 + self._received)  # errors of dying peers do not matter now
        for number, handler in self._old.items():
            signal.signal(number, handler)
        return False


def ignore_worker_deaths() -> None:
    """Take back torch's SIGCHLD handler, which raises in any line of the main thread when a data worker dies; the
    loader finds a dead worker by itself within seconds."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def init_worker(worker_id: int = 0) -> None:
    """Start a data worker: Ctrl-C and SIGHUP are the main process's business, SIGTERM ends it as usual; one thread."""
    import torch

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
def run_lock(folder: Path, wait_s: float = 45.0) -> Iterator[None]:
    """One run at a time in a folder; the lock ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=wait_s)
    except Timeout as error:
        raise InputError(f"another run is writing to {folder}: stop it, or choose another folder") from error
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be written to ({error.strerror}): choose another") from error
    with lock:
        for left in folder.glob(".checkpoint-*.pth.*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        yield
