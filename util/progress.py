"""A progress bar on a terminal, plain lines with an ETA elsewhere."""

import sys
import time

from tqdm import tqdm

QUIET_SECONDS = 5  # between plain lines that only count


class Progress:
    """Progress of `total` steps, `done` of which were done before.

    Args:
        title: what is counted.
        shown: False prints nothing (ranks other than 0).
    """

    def __init__(self, title: str, total: int, done: int = 0, shown: bool = True):
        self.title, self.total, self.shown = title, total, shown
        self.first, self.done = done, done
        self.started = time.perf_counter()
        self.said = 0.0  # so that the first call prints
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=title, dynamic_ncols=True)

    def update(self, done: int, message: str = "") -> None:
        """`done` steps are finished; `message` holds the current numbers."""
        previous, self.done = self.done, done
        if self.bar is not None:
            self.bar.set_postfix_str(message, refresh=False)
            self.bar.update(done - previous)
        elif self.shown and (message or done >= self.total or self._quiet_for() > QUIET_SECONDS):
            self.said = time.perf_counter()
            per_step = (time.perf_counter() - self.started) / max(done - self.first, 1)
            eta = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.total - done)))
            print(f"{self.title}  {done}/{self.total}  eta {eta}  {message}", flush=True)

    def _quiet_for(self) -> float:
        return time.perf_counter() - self.said

    def print(self, message: str) -> None:
        """A line of its own that does not tear the bar."""
        if self.bar is not None:
            self.bar.write(message)
        elif self.shown:
            print(message, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
