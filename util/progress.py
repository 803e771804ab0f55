"""A progress bar on a terminal, plain lines with an ETA elsewhere."""

import datetime
import sys
import time

from tqdm import tqdm

QUIET_SECONDS = 5  # between plain lines that only count


class Progress:
    """Progress of `total` steps, `done` of which were done before; `later` steps follow, for the ETA.

    title: what is counted. shown: False prints nothing (ranks other than 0).
    """

    def __init__(self, title: str, total: int, done: int = 0, shown: bool = True, later: int = 0):
        self.title, self.total, self.shown, self.later = title, total, shown, later
        self.first = self.done = done
        self.started, self.said, self.bar = time.perf_counter(), 0.0, None  # the first call prints
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=title, dynamic_ncols=True)

    def update(self, done: int, message: str = "") -> None:
        """`done` steps are finished; `message` holds the current numbers."""
        previous, self.done = self.done, done
        if self.bar is not None:
            self.bar.set_postfix_str(f"{message}  {self._eta()}", refresh=False)
            self.bar.update(done - previous)
        elif self.shown and (message or done >= self.total or time.perf_counter() - self.said > QUIET_SECONDS):
            self.said = time.perf_counter()
            print(f"{self.title}  {done}/{self.total}  {self._eta()}  {message}".rstrip(), flush=True)

    def _eta(self) -> str:
        """Of all that is left, these steps and the later ones."""
        per_step = (time.perf_counter() - self.started) / max(self.done - self.first, 1)
        seconds = per_step * (self.total - self.done + self.later)
        return f"eta {datetime.timedelta(seconds=int(seconds))}" if seconds >= 1 else ""

    def print(self, message: str) -> None:
        """A line of its own that does not tear the bar."""
        if self.bar is not None:
            self.bar.write(message)
        elif self.shown:
            print(message, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
