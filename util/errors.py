"""The one exception for input a user can cure; `main_*` and tools print it without a traceback."""

import contextlib
import os
import sys
from collections.abc import Callable

AWAY = "the file system is away"  # of a picture that could not be read for that reason


class InputError(ValueError):
    """Wrong path, value or file: the message names it and says what to do."""


class Output:
    """A standard stream whose own trouble (nobody reads the pipe, a full disk, a name it cannot show) fails no run."""

    def __init__(self, stream):
        self._stream = stream
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:  # for good: what is left must not trouble the interpreter at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except (OSError, ValueError):
            pass


def run_or_explain(main: Callable[[], object]) -> None:
    """Run a command-line entry; an InputError becomes one line on stderr and exit status 2, Ctrl-C exit status 130."""
    sys.stdout, sys.stderr = (s if isinstance(s, Output) else Output(s) for s in (sys.stdout, sys.stderr))
    try:
        main()
    except InputError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
