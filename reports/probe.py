"""Numbers of a probe as a table of text and as curves over the blocks of the encoder."""

import io
import re
from dataclasses import dataclass

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first
from matplotlib.ticker import MaxNLocator  # noqa: E402

SHOWN = ("top1", "balanced", "mA", "mAP", "R1")  # of the metrics, in the table
TRIVIAL = ("majority", "random")
DRAWN = ("balanced", "mA", "mAP", "top1")  # over the blocks; the first that there is
COLUMNS_SHOWN, ATTRIBUTES = 6, "attributes"
BLOCK = re.compile(r"(cls|mean)_block(\d+)")


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
        cells: dict[str, dict[str, str]] = {}
        own = {score.name: score for score in scores if score.column == column}
        for score in own.values():
            if score.metric in SHOWN or score.protocol in TRIVIAL and not score.metric:
                text = f"{100 * score.value:.1f}"
                spread = own.get(f"{score.name}_std")
                text += f" +- {100 * spread.value:.1f}" if spread else ""
                title = f"{score.protocol} {score.metric}".strip()
                cells.setdefault(title, {})[score.read_out] = text
        names = list(dict.fromkeys(score.read_out for score in own.values()))
        names.sort(key=lambda name: _block(name) or ("", 0))  # stable: the others stay in front
        lines = [[f"{column or 'test'}, %", *cells]]
        lines += [[name, *(found.get(name, "") for found in cells.values())] for name in names]
        widths = [max(map(len, cells)) for cells in zip(*lines)]
        rows = ("  ".join(text.ljust(width) for text, width in zip(line, widths)) for line in lines)
        parts.append("\n".join(row.rstrip() for row in rows))
    if len(shown) < len(columns):
        parts.append(f"{len(columns) - len(shown)} further columns are in metrics.json")
    return "\n\n".join(parts)


def draw_layers(scores: list[Score], title: str) -> bytes:
    """A PNG: for each label column and protocol, class token and patch mean over the blocks; dotted, what the
    trivial answer has; dashed, the context, where it was read out. Needs the read-out `layers`."""
    columns = list(dict.fromkeys(score.column for score in scores if _block(score.read_out)))
    rows = _shown(columns)
    kinds = list(dict.fromkeys(score.protocol for score in scores if score.protocol not in TRIVIAL))
    figure, axes = plt.subplots(
        len(rows), len(kinds), figsize=(3.4 * len(kinds), 2.6 * len(rows) + 0.5), squeeze=False, sharex=True
    )
    for row, column in zip(axes, rows):
        own = [score for score in scores if score.column == column]
        for axis, kind in zip(row, kinds):
            _panel(axis, own, kind)
            axis.set_title(f"{column} {axis.get_title()}".strip(), fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("block")
    axes[0][0].legend(fontsize="small")
    left_out = len(columns) - len(rows)
    figure.suptitle(title + (f" ({left_out} further columns in metrics.json)" if left_out else ""))
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, dpi=110)
    plt.close(figure)
    return data.getvalue()


def _panel(axis, own: list[Score], kind: str) -> None:
    """One protocol's curves of one label column, by the metric that says most about it."""
    metrics = {score.metric for score in own if score.protocol == kind}
    metric = next(name for name in DRAWN if name in metrics)
    curves: dict[str, dict[int, float]] = {"cls": {}, "mean": {}}
    trivial = 50.0 if metric in ("balanced", "mA") else None
    for score in own:
        found = _block(score.read_out)
        if score.protocol == kind and score.metric == metric:
            if found:
                curves[found[0]][found[1]] = 100 * score.value
            elif score.read_out == "context":
                axis.axhline(100 * score.value, color="tab:green", linestyle="--", label="context")
        elif trivial is None and score.protocol in TRIVIAL and score.metric in ("", metric):
            trivial = 100 * score.value
    for (token, values), style in zip(curves.items(), ("o-", "s-")):
        axis.plot(list(values), list(values.values()), style, markersize=4, label=token)
    axis.axhline(trivial, color="grey", linestyle=":", label="trivial answer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(title=f"{kind} {metric}", ylabel="%")
    axis.grid(alpha=0.3)


def _shown(columns: list[str]) -> list[str]:
    """The first few, and the mean over the attributes."""
    return [name for i, name in enumerate(columns) if i < COLUMNS_SHOWN or name == ATTRIBUTES]


def _block(read_out: str) -> tuple[str, int] | None:
    """("cls", 3) of cls_block3."""
    found = BLOCK.fullmatch(read_out)
    return (found[1], int(found[2])) if found else None
