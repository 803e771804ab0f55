"""What every `python -m tools.NAME` shares: its parser, and the final numbers as JSON."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from util.checkpoint import write_json
from util.errors import run_or_explain


def tool_parser(name: str, description: str, parents=()) -> argparse.ArgumentParser:
    """Flags are never abbreviated; the module's docstring is the manual; `parents` lend their flags."""
    return argparse.ArgumentParser(
        name,
        parents=list(parents),
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_tool(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], dict],
    metrics_file: Callable[[argparse.Namespace], Path | None],
) -> None:
    """Parse, run, write the numbers to `metrics_file(args)` and print them as one JSON line.

    `main` returns an empty dict on ranks other than 0: they write and print nothing. No file is written where
    `metrics_file` returns None.
    """

    def entry() -> None:
        args = parser.parse_args()
        result = main(args)
        if result:
            if (file := metrics_file(args)) is not None:
                write_json(file, result)
            print(json.dumps(result), flush=True)

    run_or_explain(entry)
