"""Stopping without losing work: Ctrl-C, SIGTERM and crashes leave a resumable checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

SIGNALS = {signal.SIGINT, signal.SIGTERM}
FINISH = signal.SIGUSR1


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
        with self._lock:
            self._torn = True
            yield
            self._torn = False

    def __enter__(self):
        self._old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {FINISH})
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        if self._stopping.is_set():
            self._thread.join()  # it ends the process; errors of dying peers do not matter now
        signal.pthread_kill(self._thread.ident, FINISH)
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)
        if error is not None and self._is_main and not self._torn:
            self._save()
        return False

    def _wait(self):
        received = signal.sigwait(SIGNALS | {FINISH})
        if received == FINISH:
            return
        self._stopping.set()
        name = signal.Signals(received).name
        if self._is_main:
            with self._lock:
                if not self._torn:
                    print(f"\n{name}: saving the state of the last update", flush=True)
                    self._save()
        else:
            time.sleep(2)  # rank 0 should see its own signal before it sees a peer vanish
        os._exit(128 + received)


def init_worker(worker_id: int) -> None:
    """Data workers: Ctrl-C is the main process's business; SIGTERM ends a worker as usual; and one
    thread each, since there is one worker a core."""
    import torch

    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS | {FINISH})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
