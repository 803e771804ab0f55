"""Stopping without losing work: Ctrl-C, SIGTERM and crashes leave a resumable checkpoint."""

import atexit
import ctypes
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from util.errors import InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FINISHED = 0  # written into the pipe when the guard is left without a signal


@contextmanager
def deaths_unheard():
    """Main thread only. torch raises in whatever line the main thread is at when a data worker dies; in here
    it does not, and the loader finds out by itself within seconds."""
    heard = signal.getsignal(signal.SIGCHLD)
    if not callable(heard):  # no loader has started workers yet
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, heard)


def hear_no_deaths_at_exit() -> None:
    """Python ends the data workers that are left when a program is done, and torch would report them as
    killed, with a traceback."""
    atexit.register(signal.signal, signal.SIGCHLD, signal.SIG_DFL)


class NoGuard:
    """In place of a `StopGuard` where nothing is worth saving."""

    @contextmanager
    def committing(self):
        yield


class StopGuard:
    """Saves the state of the last update at once when the process is told to stop.

    Weights change only inside `committing()`; between two updates they are a consistent state, even
    while a long forward or backward pass runs. So a second thread waits for the signal, takes the
    lock, saves and ends the process: nobody waits for the update in flight, which on a slow machine
    can take longer than the launcher's patience (30 s under torchrun).

    Args:
        save: writes the checkpoint; called by one thread at a time, never inside `committing()`.
        is_main: whether this rank saves.
    """

    def __init__(self, save: Callable[[], None], is_main: bool):
        self._save = save
        self._is_main = is_main
        self._lock = threading.Lock()
        self._torn = False  # an exception left an update half done
        self._stopping = threading.Event()

    @contextmanager
    def committing(self):
        """Around the optimiser step and the counters that belong to it."""
        with deaths_unheard(), self._lock:
            self._torn = True
            yield
            self._torn = False

    def __enter__(self):
        # Python's own handlers wait for the main thread to leave C code; the wake-up pipe does not
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old_handlers = {s: signal.signal(s, lambda *_: None) for s in SIGNALS}
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        with deaths_unheard():  # a signal to the whole group ends the workers while the state is saved
            if self._stopping.is_set():
                self._thread.join()  # it ends the process; errors of dying peers do not matter now
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            os.write(self._write_end, bytes([FINISHED]))
            self._thread.join()
            os.close(self._read_end)
            os.close(self._write_end)
            if error is not None and self._is_main and not self._torn:
                self._save()
        return False

    def _wait(self):
        received = None
        while received not in (FINISHED, *SIGNALS):  # children's deaths arrive here too
            received = os.read(self._read_end, 1)[0]
        if received == FINISHED:
            return
        self._stopping.set()
        if self._is_main:
            with self._lock:
                if not self._torn:
                    name = signal.Signals(received).name
                    print(f"\n{name}: saving the state of the last update", flush=True)
                    self._save()
        else:
            time.sleep(2)  # rank 0 should see its own signal before it sees a peer vanish
        os._exit(128 + received)


def init_worker(worker_id: int) -> None:
    """Data workers: Ctrl-C is the main process's business; SIGTERM ends a worker as usual; and one
    thread each, since there is one worker a core."""
    import torch

    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)  # the pipe belongs to the parent's StopGuard
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def end_with_launcher() -> None:
    """Under torchrun: get SIGTERM when the launcher dies, even by kill -9, instead of training on as
    an orphan beside the run that replaces it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Linux: get SIGTERM when the process that started this one dies."""
    if os.uname().sysname == "Linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, int(signal.SIGTERM))


@contextmanager
def run_lock(folder: Path, wait_s: float = 45.0):
    """One run at a time in a folder; the lock ends with the process, however it ends.

    Raises:
        InputError: another process held it for all of `wait_s`, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")
    except OSError as error:
        raise InputError(
            f"the output folder {folder} cannot be written to ({error.strerror}): choose another"
        ) from error
    with lock as opened:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    opened.seek(0)
                    holder = opened.read().strip() or "unknown"
                    raise InputError(
                        f"another run (process {holder}) is writing to {folder}: stop it, or choose "
                        "another output folder"
                    ) from None
                time.sleep(0.5)
        opened.truncate(0)
        opened.write(f"{os.getpid()} on {os.uname().nodename}")
        opened.flush()
        for left in folder.glob(".checkpoint-*.pth.*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        yield
