"""The paper's two tables as Markdown and as a picture: published rows, and means over seeds of our runs."""

import io
from dataclasses import dataclass

import matplotlib
import numpy as np

from tools.finished_runs import METRICS, Run, TestNumbers

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first

NAMES = {
    "mAP": "mAP", "R1": "R1", "R5": "R5", "mA": "mA", "accuracy": "Acc", "F1": "F1",
    "constant_mA": "mA of a constant", "top1": "top-1", "mean_class_accuracy": "mean per class",
    "majority": "largest class", "mIoU": "mIoU", "mAcc": "mAcc", "aAcc": "aAcc",
    "parts_mIoU": "mIoU of parts", "parts_mAcc": "mAcc of parts",
}  # fmt: skip
DIGITS = {"reid": 1, "attr": 2, "fgvc": 1, "seg": 2}
PARTS = "seg PartImageNet vehicles"
TABLES = {  # heading: {test: (title, metrics)}
    "Re-identification": {
        "reid veri776": ("VeRi-776", ("mAP", "R1")),
        "reid vehicleid/800": ("VehicleID 800", ("R1", "R5")),
        "reid vehicleid/1600": ("VehicleID 1600", ("R1", "R5")),
        "reid vehicleid/2400": ("VehicleID 2400", ("R1", "R5")),
        "reid veriwild/3000": ("VERI-Wild 3000", ("mAP", "R1")),
        "reid veriwild/5000": ("VERI-Wild 5000", ("mAP", "R1")),
        "reid veriwild/10000": ("VERI-Wild 10000", ("mAP", "R1")),
    },
    "Attributes, classes, parts": {
        "attr veri776": ("VeRi-776 attributes", ("mA", "accuracy", "F1")),
        "fgvc StanfordCars": ("StanfordCars", ("top1",)),
        PARTS: ("PartImageNet vehicles", ("mIoU", "mAcc")),
    },
}
DRAWN = ("reid veri776", "reid vehicleid/800", "reid veriwild/3000", "attr veri776", "fgvc StanfordCars", PARTS)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, on one test.

    number: of the group of runs, from 1. name: of the weights they started from.
    """

    number: int
    name: str
    test: TestNumbers
    runs: list[Run]
    values: dict[str, list[float]]

    def cell(self, metric: str, digits: int) -> str:
        """Mean, sample deviation, number of seeds; one seed alone as such."""
        values = self.values.get(metric, [])
        if not values:
            return ""
        if len(values) == 1:
            return f"{values[0]:.{digits}f} (1 seed)"
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f} ({len(values)} seeds)"


def markdown(groups: list[Group], left_out: list[tuple[str, str]], published: dict, picture: str) -> str:
    """The page: both tables, a table for each other set, the runs behind our rows, and what was left out."""
    ours = [group for group in groups if group.test.is_published]
    parts = ["# Results", f"![Our runs beside published numbers]({picture})" if picture else ""]
    for heading, columns in TABLES.items():
        parts += [f"## {heading}", _table(*_published_table(columns, ours, published))]
        if PARTS in columns:
            parts.append(
                "It is not published which vehicles and parts of PartImageNet the numbers in its columns are "
                "of, nor with which decoder: no run of ours stands there."
            )
    parts.append(
        "In percent. Bold: ours, mean ± sample deviation over seeds; [n]: the runs below. The others are "
        "published numbers, and their recipes differ:"
    )
    used = dict.fromkeys(row["source"] for row in published["rows"])
    parts.append("\n".join(f"- {key}: {published['sources'][key]}" for key in used))
    others = {group.test.key: group.test for group in groups if not group.test.is_published}
    if others:
        parts.append("## Other sets\n\nNot the published ones: compare within a table only.")
    for key, test in others.items():
        parts += [f"### {test.title}", _table(*_own_table([g for g in groups if g.test.key == key]))]
    if groups:
        parts += ["## Runs behind our rows", _table(*_runs_table(groups))]
    if left_out:
        parts += ["## Left out", _table(["folder", "reason"], [[f"`{f}`", reason] for f, reason in left_out])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _published_table(columns: dict, ours: list[Group], published: dict) -> tuple[list[str], list[list[str]]]:
    cells = [(key, metric, title) for key, (title, metrics) in columns.items() for metric in metrics]
    head = ["pre-training", *(f"{title} {NAMES[metric]}" for _, metric, title in cells), "from"]
    rows = []
    for row in published["rows"]:
        found = [row["numbers"].get(key, {}).get(metric) for key, metric, _ in cells]
        if any(value is not None for value in found):
            digits = [DIGITS[key.split()[0]] for key, *_ in cells]
            texts = ["" if v is None else f"{v:.{d}f}" for v, d in zip(found, digits)]
            rows.append([row["name"], *texts, row["source"]])
    for name in dict.fromkeys(group.name for group in ours if group.test.key in columns):
        of_test = {k: [g for g in ours if g.name == name and g.test.key == k] for k in columns}
        for i in range(max(map(len, of_test.values()))):  # a row for each recipe
            row = {key: groups[i] for key, groups in of_test.items() if i < len(groups)}
            texts = [row[k].cell(m, DIGITS[k.split()[0]]) if k in row else "" for k, m, _ in cells]
            numbers = dict.fromkeys(f"[{group.number}]" for group in row.values())
            rows.append([f"**{name}**", *(f"**{t}**" if t else "" for t in texts), " ".join(numbers)])
    return head, rows


def _own_table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    task = groups[0].runs[0].task
    metrics = [m for m in METRICS[task] if any(m in group.values for group in groups)]
    head = ["pre-training", "recipe", *(NAMES[m] for m in metrics), "runs"]
    rows = [
        [group.name, group.runs[0].words(), *(group.cell(m, DIGITS[task]) for m in metrics), f"[{group.number}]"]
        for group in groups
    ]
    return head, rows


def _runs_table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for group in {group.number: group for group in groups}.values():
        runs = group.runs
        commits = dict.fromkeys(run.commit[:12] + run.commit[40:] for run in runs)
        weights = runs[0].weights if runs[0].weights == "random" else runs[0].weights[:16]
        rows.append([
            f"[{group.number}]", runs[0].task, group.name, runs[0].words(), f"`{runs[0].config}`",
            ", ".join(str(run.seed) for run in runs), ", ".join(commits), f"`{weights}`",
            " ".join(f"`{run.folder}`" for run in runs),
        ])  # fmt: skip
    head = ["runs", "task", "pre-training", "recipe", "config", "seeds", "commit", "weights, SHA-256", "folders"]
    return head, rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(groups: list[Group], published: dict) -> bytes:
    """A PNG: a panel for the main metric of each published test, and of each other set of ours; published in
    grey, ours in blue with the deviation over seeds."""
    panels = []
    for key in DRAWN:
        title, metrics = next(columns[key] for columns in TABLES.values() if key in columns)
        bars = [(r["name"], r["numbers"][key][metrics[0]], 0.0, "silver") for r in published["rows"]
                if metrics[0] in r["numbers"].get(key, {})]  # fmt: skip
        bars += _bars(groups, key, metrics[0])
        if bars:
            panels.append((f"{title}, {NAMES[metrics[0]]}", bars))
    for key, test in {g.test.key: g.test for g in groups if not g.test.is_published}.items():
        metric = METRICS[key.split()[0]][0]
        first, _, rest = test.title.partition(": ")
        panels.append((f"{first}\n{rest}\n{NAMES[metric]}", _bars(groups, key, metric)))
    columns = min(3, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [0.9 + 0.24 * max(len(bars) for _, bars in line) for line in lines]
    figure, axes = plt.subplots(
        len(lines), columns, figsize=(5.6 * columns, sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for row, line in zip(axes, lines):
        for axis, (title, bars) in zip(row, line):
            _panel(axis, title, bars)
            axis.set_ylim(max(len(bars) for _, bars in line) - 0.5, -0.5)  # from the top, bars of one height
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, dpi=110)
    plt.close(figure)
    return data.getvalue()


def _bars(groups: list[Group], key: str, metric: str) -> list[tuple[str, float, float, str]]:
    chosen = [group for group in groups if group.test.key == key and group.values.get(metric)]
    return [
        (f"{g.name} [{g.number}]", float(np.mean(g.values[metric])),
         float(np.std(g.values[metric], ddof=1)) if len(g.values[metric]) > 1 else 0.0, "tab:blue")
        for g in chosen
    ]  # fmt: skip


def _panel(axis, title: str, bars: list[tuple[str, float, float, str]]) -> None:
    names, values, spreads, colours = zip(*bars)
    axis.set_visible(True)
    places = range(len(bars))
    axis.barh(places, values, xerr=[s or np.nan for s in spreads], color=colours, capsize=2)
    axis.set_yticks(places, names, fontsize="small")
    right = max(value + spread for value, spread in zip(values, spreads))
    for place, (value, spread) in enumerate(zip(values, spreads)):
        axis.text(value + spread + 0.01 * right, place, f"{value:.1f}", va="center", fontsize="small")
    axis.set_xlim(0, 1.12 * right or 1)
    axis.set_title(f"{title}, %", fontsize="medium")
    axis.spines[["top", "right"]].set_visible(False)
