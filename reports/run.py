"""Of a pre-training run: the page of its curves, reconstructions and kNN; numbers of a probe of its features as a
table of text."""

from pathlib import Path

import numpy as np
from PIL import Image

from datasets.path_list import printable
from reports.page import Page, facts_table, image, new_axes

SHOWN = ("balanced", "mA", "mAP", "top1", "R1")  # of the metrics, in the table
TRIVIAL = ("majority", "random")
COLUMNS_SHOWN, ATTRIBUTES = 6, "attributes"
CURVES = {  # title: (what is learned, what it is called, its trivial answer, what that is)
    "Masked pixels": ("train_loss_pixel", "pixel loss", "train_pixel_baseline", "every patch = its mean"),
    "Cosine to the teacher": ("train_cos", "student to teacher", "train_cos_baseline", "always the mean answer"),
}
Scores = dict[tuple[str, str, str, str], float]  # (protocol, read-out, label column or test, metric): shares of [0, 1]


def write_run_report(file: Path, log: list[dict], settings: dict, knn: dict[str, dict[str, float]]) -> None:
    """Write the page of a finished run; log: a row an epoch; settings: of args.json; knn: top-1 accuracy of "chance",
    "before" and "after", each by label column."""
    page = Page(f"CGD-MAE: {settings['model']} after {len(log)} epochs")
    page.section("Curves", "Dashed: a trivial answer. A model has learned something where it is better than that.")
    for title, (learned, name, trivial, trivial_name) in CURVES.items():
        if all(learned in row and trivial in row for row in log):
            axes, epochs = new_axes("epoch", ""), range(1, len(log) + 1)
            axes.plot(epochs, [row[learned] for row in log], marker="o", label=name)
            axes.plot(epochs, [row[trivial] for row in log], "--", color="grey", label=trivial_name)
            page.figure(title, axes)
    axes, places = new_axes("", "%"), np.arange(len(knn["after"]))
    for offset, name in enumerate(("chance", "before", "after"), -1):
        bars = axes.bar(places + 0.27 * offset, [100 * x for x in knn[name].values()], 0.25, label=name)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(places, list(map(printable, knn["after"])))
    page.figure("kNN top-1 on unseen identities", axes)
    if panels := sorted((file.parent / "panels").glob("epoch_*.png")):
        page.section("Reconstructions")
        panel = Image.open(panels[-1]).convert("RGB")
        page.add(image(panel, "input, masked, reconstruction", max(panel.size)))
    page.section("Numbers and settings")
    numbers = {f"kNN {column} {name}": value for name, values in knn.items() for column, value in values.items()}
    page.add(facts_table(numbers | settings))
    page.write(file)


def block_of(read_out: str) -> tuple[str, int]:
    """ "cls_block3" -> ("cls", 3); others: ("", 0)."""
    token, _, number = read_out.partition("_block")
    return (token, int(number)) if number else ("", 0)


def mean_attribute_accuracy(scores: Scores) -> Scores:
    """mA, the mean of the balanced accuracy over all 0/1 columns, where there are two and more; for any
    constant answer it is 0.5."""
    groups: dict[tuple[str, str], list[float]] = {}
    for (*group, _, metric), value in scores.items():
        if metric == "balanced":
            groups.setdefault(tuple(group), []).append(value)
    groups = {group: values for group, values in groups.items() if len(values) > 1}
    means = {(*group, ATTRIBUTES, "mA"): float(np.mean(values)) for group, values in groups.items()}
    return means | {(*group, ATTRIBUTES, "columns"): float(len(values)) for group, values in groups.items()}


def shown_columns(scores: Scores) -> tuple[list[str], str]:
    """The first few label columns and the mean over the attributes; words about the others."""
    columns = list(dict.fromkeys(key[2] for key in scores))
    shown = [name for i, name in enumerate(columns) if i < COLUMNS_SHOWN or name == ATTRIBUTES]
    left_out = len(columns) - len(shown)
    return shown, f"{left_out} further columns are in metrics.json" if left_out else ""


def score_table(scores: Scores) -> str:
    """A table in percent for each label column, a line for each read-out, trivial answers beside them."""
    shown, rest = shown_columns(scores)
    parts = []
    for column in shown:
        cells: dict[str, dict[str, str]] = {}  # {head: {read-out: text}}
        for (protocol, read_out, of, metric), value in scores.items():
            if of == column and (metric in SHOWN or protocol in TRIVIAL and not metric):
                spread = scores.get((protocol, read_out, of, f"{metric}_std"))
                text = f"{100 * value:.1f}" + (f" +- {100 * spread:.1f}" if spread is not None else "")
                cells.setdefault(f"{protocol} {metric}".strip(), {})[read_out] = text
        read_outs = sorted({name: 0 for found in cells.values() for name in found}, key=block_of)
        lines = [[f"{column or 'test'}, %", *cells]]
        lines += [[name, *(found.get(name, "") for found in cells.values())] for name in read_outs]
        widths = [max(map(len, texts)) for texts in zip(*lines)]
        rows = ("  ".join(text.ljust(width) for text, width in zip(line, widths)) for line in lines)
        parts.append("\n".join(row.rstrip() for row in rows))
    return "\n\n".join(filter(None, [*parts, rest]))
