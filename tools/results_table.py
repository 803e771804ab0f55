"""Runs of main_finetune.py beside published numbers: re-identification; attributes, classes and parts.

    python -m tools.results_table runs/ --output results.md --name 3fa4b2c1="CGD-MAE, 400 epochs"

Writes OUTPUT (Markdown) and a picture of the same name. Runs that differ in their seed only become one row,
mean +- sample deviation. A run without its config, seed, commit or the hash of its starting weights gives no
row, and is listed with the reason. Numbers of sets with other counts than published have tables of their own.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from tools.finished_runs import LeftOut, Run, find_folders, numbers_of, read_run
from tools.results_pages import Group, draw, markdown
from util.cli import Parser, run_tool
from util.errors import InputError
from util.files import write_atomic

PUBLISHED = Path(__file__).with_name("published_results.json")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.results_table", __doc__)
    add = parser.add_argument
    # fmt: off
    add("runs", nargs="+", metavar="RUN_OR_FOLDER",
        help="output folders of main_finetune.py, or folders of them")
    add("--output", required=True, help="Markdown file to write; the picture goes beside it as .png")
    add("--name", nargs="+", default=[], metavar="HASH=TEXT",
        help="what to call the weights whose SHA-256 begins so; random=TEXT for none (default: their file)")
    # fmt: on
    return parser


def main(args) -> dict:
    """Returns counts: runs, rows, left_out; and the files."""
    for path in args.runs:
        if not Path(path).is_dir():
            raise InputError(f"{path} is no folder: give output folders of main_finetune.py, or folders of them")
    output = Path(args.output)
    if output.suffix != ".md":
        raise InputError(f"--output {output}: the table is Markdown, so name a file that ends in .md")
    folders = find_folders(args.runs)
    if not folders:
        raise InputError(f"no args.json and no metrics.json in or below {', '.join(args.runs)}")
    runs, left_out = read_runs(folders)
    groups = group_runs(runs, weight_names(runs, args.name))
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    picture = draw(groups, published)
    write_atomic(output.with_suffix(".png"), lambda opened: opened.write(picture))
    text = markdown(groups, left_out, published, output.with_suffix(".png").name)
    write_atomic(output, lambda opened: opened.write(text.encode()))
    for folder, reason in left_out:
        print(f"left out: {folder}: {reason}")
    print(f"{output}, {output.with_suffix('.png')}")
    return {"runs": len(runs), "rows": len(groups), "left_out": len(left_out), "output": str(output)}


def read_runs(folders: list[Path]) -> tuple[list[tuple[Run, list]], list[tuple[str, str]]]:
    """([(run, its numbers)], [(folder, why it is left out)])."""
    runs, left_out = [], []
    seen: dict[tuple, Path] = {}
    for folder in folders:
        try:
            run = read_run(folder)
            numbers = numbers_of(run)
            first = seen.setdefault((run.config, run.weights, run.seed), folder)
            if first != folder:
                raise LeftOut(f"the same config, weights and seed as {first}: it would count twice")
        except LeftOut as reason:
            left_out.append((str(folder), str(reason)))
        else:
            runs.append((run, numbers))
    return runs, left_out


def weight_names(runs: list[tuple[Run, list]], given: list[str]) -> dict[str, str]:
    """{weights: what they are called}, different for different weights.

    Raises:
        InputError: a --name that is no HASH=TEXT, or whose hash is that of no weights or of several.
    """
    names = {}
    for run, _ in runs:
        file = Path(run.args.get("finetune") or "")
        told = "random weights" if run.weights == "random" else f"{file.parent.name}/{file.name}".lstrip("/")
        names.setdefault(run.weights, told)
    for text in given:
        prefix, _, name = text.partition("=")
        found = [weights for weights in names if weights.startswith(prefix)]
        if not prefix or not name or len(found) != 1:
            raise InputError(
                f"--name {text}: {len(found)} of the weights begin with '{prefix}'; they are "
                f"{', '.join(weights[:16] for weights in names) or 'none'}, write HASH=TEXT"
            )
        names[found[0]] = name
    twice = Counter(names.values())
    return {w: name if twice[name] == 1 else f"{name} {w[:8]}" for w, name in names.items()}


def group_runs(runs: list[tuple[Run, list]], names: dict[str, str]) -> list[Group]:
    """Runs of one config on one test, ordered by the name of their weights."""
    numbers: dict[tuple[str, str], int] = {}
    groups: dict[tuple[str, str, str], Group] = {}
    for run, tests in sorted(runs, key=lambda pair: (names[pair[0].weights], pair[0].task, pair[0].seed)):
        number = numbers.setdefault((run.config, run.weights), len(numbers) + 1)
        for test in tests:
            group = groups.setdefault(
                (run.config, run.weights, test.key), Group(number, names[run.weights], test, [], {})
            )
            group.runs.append(run)
            for metric, value in test.numbers.items():
                group.values.setdefault(metric, []).append(value)
    return list(groups.values())


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output).with_suffix(".metrics.json"))
