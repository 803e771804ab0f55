"""Runs of main_finetune.py beside published numbers: re-identification; attributes, classes and parts.

    python -m tools.results_table runs/ --output results.md --name 3fa4b2c1="CGD-MAE, 400 epochs"

Writes OUTPUT (Markdown). Runs that differ in their seed only become one row,
mean +- sample deviation. A run without its config, seed, commit or the hash of its starting weights gives no
row, and is listed with the reason. Numbers of sets with other counts than published have tables of their own.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.results_table", __doc__)
    add = parser.add_argument
    # fmt: off
    add("runs", nargs="+", metavar="RUN_OR_FOLDER",
        help="output folders of main_finetune.py, or folders of them")
    add("--output", required=True, help="Markdown file to write")
    add("--name", nargs="+", default=[], metavar="HASH=TEXT",
        help="what to call the weights whose SHA-256 begins so; random=TEXT for none (default: their file)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tools.finished_runs import METRICS, LeftOut, Run, TestNumbers, numbers_of, read_run
from util.errors import InputError
from util.files import write_atomic

PUBLISHED = Path(__file__).with_name("published_results.json")
NAMES = {
    "accuracy": "Acc", "constant_mA": "mA of a constant", "top1": "top-1", "mean_class_accuracy": "mean per class",
    "majority": "largest class", "parts_mIoU": "mIoU of parts", "parts_mAcc": "mAcc of parts",
}  # fmt: skip
DIGITS = {"reid": 1, "attr": 2, "fgvc": 1, "seg": 2}
PARTS = "seg PartImageNet vehicles"
TABLES = {  # heading: {test: (title, metrics)}
    "Re-identification": {"reid veri776": ("VeRi-776", ("mAP", "R1"))}
    | {f"reid vehicleid/{size}": (f"VehicleID {size}", ("R1", "R5")) for size in (800, 1600, 2400)}
    | {f"reid veriwild/{size}": (f"VERI-Wild {size}", ("mAP", "R1")) for size in (3000, 5000, 10000)},
    "Attributes, classes, parts": {
        "attr veri776": ("VeRi-776 attributes", ("mA", "accuracy", "F1")),
        "fgvc StanfordCars": ("StanfordCars", ("top1",)),
        PARTS: ("PartImageNet vehicles", ("mIoU", "mAcc")),
    },
}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, on one test.

    number: of the group of runs, from 1. name: of the weights they started from.
    """

    number: int
    name: str
    test: TestNumbers
    runs: list[Run] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def cell(self, metric: str) -> str:
        """Mean, sample deviation, number of seeds; one seed alone as such."""
        values, digits = self.values.get(metric, []), DIGITS[self.runs[0].task]
        if len(values) < 2:
            return f"{values[0]:.{digits}f} (1 seed)" if values else ""
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f} ({len(values)} seeds)"


def main(args) -> dict:
    """Returns counts: runs, rows, left_out; and the file."""
    for path in args.runs:
        if not Path(path).is_dir():
            raise InputError(f"{path} is no folder: give output folders of main_finetune.py, or folders of them")
    output = Path(args.output)
    if output.suffix != ".md":
        raise InputError(f"--output {output}: the table is Markdown, so name a file that ends in .md")
    files = (file for path in args.runs for name in ("args.json", "metrics.json") for file in Path(path).rglob(name))
    folders = sorted({file.parent for file in files})
    if not folders:
        raise InputError(f"no args.json and no metrics.json in or below {', '.join(args.runs)}")
    runs, left_out = read_runs(folders)
    groups = group_runs(runs, weight_names([run for run, _ in runs], args.name))
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    text = markdown(groups, left_out, published)
    write_atomic(output, lambda opened: opened.write(text.encode()))
    for folder, reason in left_out:
        print(f"left out: {folder}: {reason}")
    print(output)
    return {"runs": len(runs), "rows": len(groups), "left_out": len(left_out), "output": str(output)}


def read_runs(folders: list[Path]) -> tuple[list[tuple[Run, list[TestNumbers]]], list[tuple[str, str]]]:
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


def weight_names(runs: list[Run], given: list[str]) -> dict[str, str]:
    """{weights: what they are called}, different for different weights.

    Raises:
        InputError: a --name that is no HASH=TEXT, or whose hash is that of no weights or of several.
    """
    names = {}
    for run in runs:
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


def group_runs(runs: list[tuple[Run, list[TestNumbers]]], names: dict[str, str]) -> list[Group]:
    """Runs of one config on one test, ordered by the name of their weights."""
    numbers: dict[tuple[str, str], int] = {}
    groups: dict[tuple[str, str, str], Group] = {}
    for run, tests in sorted(runs, key=lambda pair: (names[pair[0].weights], pair[0].task, pair[0].seed)):
        recipe = (run.config, run.weights)
        number = numbers.setdefault(recipe, len(numbers) + 1)
        for test in tests:
            group = groups.setdefault((*recipe, test.key), Group(number, names[run.weights], test))
            group.runs.append(run)
            for metric, value in test.numbers.items():
                group.values.setdefault(metric, []).append(value)
    return list(groups.values())


def markdown(groups: list[Group], left_out: list[tuple[str, str]], published: dict) -> str:
    """The page: both tables, a table for each other set, the runs behind our rows, and what was left out."""
    parts = ["# Results"]
    for heading, columns in TABLES.items():
        parts += [f"## {heading}", published_table(columns, groups, published)]
    parts.append(
        "It is not published which vehicles and parts of PartImageNet the numbers in its columns are of, nor with "
        "which decoder: no run of ours stands there."
    )
    parts.append(
        "In percent. Bold: ours, mean ± sample deviation over seeds; [n]: the runs below. The others are "
        "published numbers, and their recipes differ:"
    )
    used = dict.fromkeys(row["source"] for row in published["rows"])
    parts.append("\n".join(f"- {key}: {published['sources'][key]}" for key in used))
    others = {group.test.key: group.test.title for group in groups if not group.test.is_published}
    if others:
        parts.append("## Other sets\n\nNot the published ones: compare within a table only.")
    for key, title in others.items():
        parts += [f"### {title}", own_table([group for group in groups if group.test.key == key])]
    if groups:
        parts += ["## Runs behind our rows", runs_table(groups)]
    if left_out:
        parts += ["## Left out", table(["folder", "reason"], [[f"`{f}`", reason] for f, reason in left_out])]
    return "\n\n".join(parts) + "\n"


def published_table(columns: dict, groups: list[Group], published: dict) -> str:
    """Published rows, then ours in bold: of the same weights a row for each recipe."""
    cells = [(key, metric, title) for key, (title, metrics) in columns.items() for metric in metrics]
    head = ["pre-training", *(f"{title} {NAMES.get(metric, metric)}" for _, metric, title in cells), "from"]
    rows = []
    for row in published["rows"]:
        found = [row["numbers"].get(key, {}).get(metric) for key, metric, _ in cells]
        texts = ["" if v is None else f"{v:.{DIGITS[key.split()[0]]}f}" for v, (key, *_) in zip(found, cells)]
        if any(texts):
            rows.append([row["name"], *texts, row["source"]])
    ours = [group for group in groups if group.test.is_published and group.test.key in columns]
    for name in dict.fromkeys(group.name for group in ours):
        of_test = {key: [g for g in ours if g.name == name and g.test.key == key] for key in columns}
        for i in range(max(map(len, of_test.values()))):
            row = {key: found[i] for key, found in of_test.items() if i < len(found)}
            texts = [row[key].cell(metric) if key in row else "" for key, metric, _ in cells]
            numbers = dict.fromkeys(f"[{group.number}]" for group in row.values())
            rows.append([f"**{name}**", *(f"**{t}**" if t else "" for t in texts), " ".join(numbers)])
    return table(head, rows)


def own_table(groups: list[Group]) -> str:
    metrics = [m for m in METRICS[groups[0].runs[0].task] if any(m in group.values for group in groups)]
    head = ["pre-training", "recipe", *(NAMES.get(m, m) for m in metrics), "runs"]
    return table(head, [[g.name, g.runs[0].words(), *(g.cell(m) for m in metrics), f"[{g.number}]"] for g in groups])


def runs_table(groups: list[Group]) -> str:
    rows = []
    for group in {group.number: group for group in groups}.values():
        run = group.runs[0]
        commits = dict.fromkeys(run.commit[:12] + run.commit[40:] for run in group.runs)
        rows.append([
            f"[{group.number}]", run.task, group.name, run.words(), f"`{run.config}`",
            ", ".join(str(run.seed) for run in group.runs), ", ".join(commits),
            f"`{run.weights[:16]}`", " ".join(f"`{run.folder}`" for run in group.runs),
        ])  # fmt: skip
    head = ["runs", "task", "pre-training", "recipe", "config", "seeds", "commit", "weights, SHA-256", "folders"]
    return table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output).with_suffix(".metrics.json"))
