"""Of a pre-training run: the page of its curves, reconstructions and kNN; numbers of a probe of its features as a
table of text and as curves over the blocks of the encoder."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from reports.page import Page, facts_table, image, new_axes, png_bytes

SHOWN = ("top1", "balanced", "mA", "mAP", "R1")  # of the metrics, in the table
TRIVIAL = ("majority", "random")
DRAWN = ("balanced", "mA", "mAP", "top1")  # over the blocks; the first that there is
COLUMNS_SHOWN, ATTRIBUTES = 6, "attributes"
CURVES = {  # title: (what is learned, what it is called, its trivial answer, what that is)
    "Masked pixels": ("train_loss_pixel", "pixel loss", "train_pixel_baseline", "every patch = its mean"),
    "Cosine to the teacher": ("train_cos", "student to teacher", "train_cos_baseline", "always the mean answer"),
}


def write_run_report(file: Path, log: list[dict], settings: dict, knn: dict[str, dict[str, float]]) -> None:
    """Write the page of a finished run.

    Args:
        log: a row an epoch. settings: of args.json.
        knn: top-1 accuracy of "chance", "before" and "after", each by label column.
    """
    page = Page(f"CGD-MAE: {settings['model']} after {len(log)} epochs")
    page.note(
        "Dashed lines are trivial answers: a patch predicted by its own mean, and one embedding for all images. A "
        "model has learned something where it is better than they are."
    )
    page.section("Curves")
    epochs = [row["epoch"] + 1 for row in log]
    for title, (learned, name, trivial, trivial_name) in CURVES.items():
        if learned in log[0]:
            axes = new_axes("epoch", "")
            axes.plot(epochs, [row[learned] for row in log], marker="o", label=name)
            axes.plot(epochs, [row[trivial] for row in log], "--", color="grey", label=trivial_name)
            page.figure(title, axes)
    axes = new_axes("", "%")
    places = np.arange(len(knn["after"]))
    for offset, (name, colour) in enumerate((("chance", "silver"), ("before", "tab:grey"), ("after", "tab:blue")), -1):
        bars = axes.bar(places + 0.27 * offset, [100 * x for x in knn[name].values()], 0.25, label=name, color=colour)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(places, list(knn["after"]))
    axes.set_ylim(0, 105)
    page.figure("kNN top-1 on unseen identities", axes)
    if panels := sorted((file.parent / "panels").glob("epoch_*.png")):
        page.section("Reconstructions")
        panel = Image.open(panels[-1]).convert("RGB")
        page.add(image(panel, "input, masked, reconstruction", max(panel.size)))
    page.section("Numbers and settings")
    numbers = {f"knn {column} {name}": value for name, values in knn.items() for column, value in values.items()}
    page.add(facts_table(numbers | settings))
    page.write(file)


@dataclass(frozen=True)
class Score:
    """One number, in [0, 1] where it is a share, of `read_out` for a label column or, of re-identification, a
    test of the set."""

    protocol: str
    read_out: str
    column: str
    metric: str
    value: float

    @property
    def name(self) -> str:
        """In metrics.json: knn_cls_make_top1, majority_cls_make, reid_cls_800_mAP."""
        return "_".join(part for part in (self.protocol, self.read_out, self.column, self.metric) if part)

    @property
    def block(self) -> tuple[str, int]:
        """("cls", 3) of the read-out cls_block3; others: ("", 0)."""
        found = re.fullmatch(r"(cls|mean)_block(\d+)", self.read_out)
        return (found[1], int(found[2])) if found else ("", 0)


def mean_attribute_accuracy(scores: list[Score]) -> list[Score]:
    """mA, the mean of the balanced accuracy over all 0/1 columns, where there are two and more; for any
    constant answer it is 0.5."""
    groups: dict[tuple[str, str], list[float]] = {}
    for score in scores:
        if score.metric == "balanced":
            groups.setdefault((score.protocol, score.read_out), []).append(score.value)
    return [
        Score(protocol, read_out, ATTRIBUTES, metric, value)
        for (protocol, read_out), values in groups.items()
        if len(values) > 1
        for metric, value in (("mA", float(np.mean(values))), ("columns", float(len(values))))
    ]


def score_table(scores: list[Score]) -> str:
    """A table in percent for each label column, a line for each read-out, trivial answers beside them."""
    columns = list(dict.fromkeys(score.column for score in scores))
    shown, parts = _shown(columns), []
    for column in shown:
        own = {score.name: score for score in scores if score.column == column}
        cells: dict[str, dict[str, str]] = {}
        for score in own.values():
            if score.metric in SHOWN or score.protocol in TRIVIAL and not score.metric:
                spread = own.get(f"{score.name}_std")
                text = f"{100 * score.value:.1f}" + (f" +- {100 * spread.value:.1f}" if spread else "")
                cells.setdefault(f"{score.protocol} {score.metric}".strip(), {})[score.read_out] = text
        ordered = sorted(own.values(), key=lambda score: score.block)  # stable: those of no block stay in front
        lines = [[f"{column or 'test'}, %", *cells]]
        lines += [
            [name, *(found.get(name, "") for found in cells.values())]
            for name in dict.fromkeys(score.read_out for score in ordered)
        ]
        widths = [max(map(len, texts)) for texts in zip(*lines)]
        rows = ("  ".join(text.ljust(width) for text, width in zip(line, widths)) for line in lines)
        parts.append("\n".join(row.rstrip() for row in rows))
    if len(shown) < len(columns):
        parts.append(f"{len(columns) - len(shown)} further columns are in metrics.json")
    return "\n\n".join(parts)


def draw_layers(scores: list[Score], title: str) -> bytes:
    """A PNG: for each label column and protocol, class token and patch mean over the blocks; dotted, what the
    trivial answer has; dashed, the context, where it was read out. Needs the read-out `layers`."""
    columns = list(dict.fromkeys(score.column for score in scores if score.block[0]))
    rows = _shown(columns)
    kinds = list(dict.fromkeys(score.protocol for score in scores if score.protocol not in TRIVIAL))
    figure = Figure((3.4 * len(kinds), 2.6 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), len(kinds), squeeze=False, sharex=True)
    for row, column in zip(axes, rows):
        for axis, kind in zip(row, kinds):
            _draw_protocol(axis, [score for score in scores if score.column == column], kind)
            axis.set_title(f"{column} {axis.get_title()}".strip(), fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("block")
    axes[0][0].legend(fontsize="small")
    left_out = len(columns) - len(rows)
    figure.suptitle(title + (f" ({left_out} further columns in metrics.json)" if left_out else ""))
    return png_bytes(figure)


def _draw_protocol(axis, own: list[Score], kind: str) -> None:
    """One protocol's curves of one label column, by the metric that says most about it."""
    metrics = {score.metric for score in own if score.protocol == kind}
    metric = next(name for name in DRAWN if name in metrics)
    trivial = [s.value for s in own if s.protocol in TRIVIAL and s.metric in ("", metric)][:1]
    shown = [score for score in own if score.protocol == kind and score.metric == metric]
    for token, style in (("cls", "o-"), ("mean", "s-")):
        curve = {score.block[1]: 100 * score.value for score in shown if score.block[0] == token}
        axis.plot(list(curve), list(curve.values()), style, markersize=4, label=token)
    for score in shown:
        if score.read_out == "context":
            axis.axhline(100 * score.value, color="tab:green", linestyle="--", label="context")
    constant = 50.0 if metric in ("balanced", "mA") else 100 * trivial[0]
    axis.axhline(constant, color="grey", linestyle=":", label="trivial answer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(title=f"{kind} {metric}", ylabel="%")


def _shown(columns: list[str]) -> list[str]:
    """The first few, and the mean over the attributes."""
    return [name for i, name in enumerate(columns) if i < COLUMNS_SHOWN or name == ATTRIBUTES]
