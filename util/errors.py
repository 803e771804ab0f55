"""The one exception for input a user can cure; `main_*` and tools print it without a traceback."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Wrong path, value or file: the message names it and says what to do."""


def run_or_explain(main: Callable[[], object]) -> None:
    """Run a command-line entry; an InputError becomes one line on stderr and exit status 2,
    Ctrl-C exit status 130."""
    try:
        main()
    except InputError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
