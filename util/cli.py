"""Command lines: parsers that answer a typo with one line, values that several read alike, the numbers as JSON.

Free of torch. A program parses first and imports torch below, so that --help and a mistyped flag are answered at once:

    if __name__ == "__main__":
        ARGS = get_args_parser().parse_args()

    import torch
    ...
    if __name__ == "__main__":
        run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
"""

import argparse
import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path

from util.errors import InputError, run_or_explain
from util.files import write_json


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are one line with the nearest name."""

    def __init__(self, prog: str, description: str, parents=()):
        super().__init__(
            prog,
            description=description,
            parents=list(parents),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        """Exit with status 2 and one sentence on stderr."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            message = f"{unknown[1]} is unknown{_nearest(unknown[1].split('=')[0], flags)} (--help lists all)"
        elif wrong := re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            choices = [name.strip(" '") for name in wrong[3].split(",")]
            message = f"{wrong[1]} {wrong[2]}: choose from {', '.join(choices)}{_nearest(wrong[2], choices)}"
        elif bad := re.match(r"argument (\S+): invalid (\w+) value: '(.*)'", message):
            kind = {"int": "whole number", "float": "number"}.get(bad[2], bad[2])
            message = f"{bad[1]} {bad[3]}: give a {kind}"
        self.exit(2, f"error: {message}\n")


def _nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def parse_input_size(text: str) -> tuple[int, int]:
    """ "224" -> (224, 224); "256,128" -> (256, 128) = (H, W) in pixels.

    Raises:
        InputError: anything else.
    """
    sides = text.split(",")
    if len(sides) > 2 or not all(re.fullmatch(r"\s*[0-9]+\s*", side) for side in sides):
        raise InputError(f"--input_size {text}: give one side or H,W in pixels, for example 224")
    return int(sides[0]), int(sides[-1])


def run_tool(main: Callable[[argparse.Namespace], dict], args: argparse.Namespace, metrics_file: Path | None) -> None:
    """Run `main(args)`, write its numbers to `metrics_file`, if there is one, and print them as the last line.

    `main` returns an empty dict on ranks other than 0: they write and print nothing.
    """

    def entry() -> None:
        if result := main(args):
            if metrics_file is not None:
                write_json(metrics_file, result)
            print(json.dumps(result), flush=True)

    run_or_explain(entry)
