"""The page of an attribute test: each attribute beside a constant answer, pictures of what is wrong."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.attr import AttributeImages
from metrics.attr import group_confusion, ratio
from reports.page import Html, Page, Pictures, cards, confusion_table, mark, percent, tag, worst_table

NUMBERS = ("mA", "accuracy", "precision", "recall", "F1", "mA_supported")
COLUMNS = {"train_rate": "train rate", "positive_rate": "positive rate", "TPR": "TPR", "TNR": "TNR", "mA": "mA",
           "AP": "AP", "accuracy": "right answers"}  # fmt: skip
WORST, SHOWN, MOST_LINES = 6, 16, 12  # attributes with pictures; images a section; lines of one kind below a picture
MOST_CELLS = 25  # values of a column that are drawn as a table of confusions
LEGEND = tag(
    "p", mark("right"), ": true and said. ", mark("wrong", "false"), ": said, but not true. ", mark("wrong", "missed"),
    ": true, but not said. With the probability of each.",
)  # fmt: skip


@dataclass(frozen=True)
class AttributeTest:
    """What was scored.

    known: what the model knows of its set: `set`, `names`, `attributes`, `groups`. images: the n that could be read,
    with their labels. probs: [n, A] float in [0, 1].
    """

    known: object
    images: AttributeImages
    probs: np.ndarray
    threshold: float
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def said(self) -> np.ndarray:
        return (self.probs > self.threshold) & (self.images.labels >= 0)

    def card(self, row: int) -> Html:
        """An image, with what is true of it and what was said."""
        true, said, probs, names = self.images.labels[row] == 1, self.said[row], self.probs[row], self.known.names
        lines = []
        for word, which in ("right", true & said), ("missed", true & ~said), ("false", said & ~true):
            found = np.flatnonzero(which)
            found, sign = found[np.argsort(-probs[found], kind="stable")], "right" if word == "right" else "wrong"
            lines += [tag("li", mark(sign, word), f" {names[a]} {probs[a]:.2f}") for a in found[:MOST_LINES]]
        kind, paths = "right" if (true == said).all() else "wrong", self.images.paths
        alt = f"{kind}: " + ", ".join(names[a] for a in np.flatnonzero(true))
        return self.pictures.card(paths[row], paths.relative(row), tag("ul", *lines), kind=kind, alt=alt)

    def cards(self, rows: np.ndarray) -> Html:
        return cards([self.card(row) for row in rows[:SHOWN].tolist()], "cards")


def write_attr_report(file: Path, facts: dict[str, object], metrics: dict, rows: list[dict], test: AttributeTest):
    """Write the page; metrics: numbers, those of a constant answer as `constant_...`, and the protocol; rows: of
    `attribute_rows`."""
    known, labels = test.known, test.images.labels
    names = [name for name in (*NUMBERS, *(f"top1_{g}" for g in known.groups)) if f"constant_{name}" in metrics]
    tiles = {f"{x} [constant {percent(metrics[f'constant_{x}'])}]": percent(metrics[x], " %") for x in names}
    page = Page(f"Attributes: {known.set}", metrics["protocol"], tiles, facts)
    page.section(
        "Attributes",
        f"{len(labels):,} images; true above {test.threshold:g}; in %, the worst first. mA: mean of TPR and TNR. "
        "In square brackets: the best answer without looking, the same for every image.",
    )
    rows = sorted(rows, key=lambda row: (np.isnan(row["TPR"] + row["TNR"]), row["mA"]))
    table = [[row["attribute"], f"{row['support']:,} of {row['images']:,}"] for row in rows]
    for line, row in zip(table, rows):
        for name in COLUMNS:
            constant = f" [{percent(row[f'constant_{name}'])}]" if f"constant_{name}" in row else ""
            line.append(percent(row[name]) + constant)
    page.add(worst_table(["attribute", "true in test", *COLUMNS.values()], table, 40))
    page.section("Confusions", "Of the images with one true value, the most probable one; on the diagonal: right.")
    for name, columns in known.groups.items():
        if len(columns) <= MOST_CELLS:
            values = [known.attributes[c].value for c in columns]
            page.add(tag("h3", name), confusion_table(values, group_confusion(test.probs, labels, columns)))
    page.section("Worst attributes", "What was missed and what was said wrongly, the surest first.")
    true, said = labels == 1, test.said
    for row in [row for row in rows if row["mA"] < 1][:WORST]:
        a = known.names.index(row["attribute"])
        wrong = np.flatnonzero((labels[:, a] >= 0) & (said[:, a] != true[:, a]))
        order = np.argsort(-np.abs(test.probs[:, a] - test.threshold)[wrong], kind="stable")
        page.add(tag("h3", row["attribute"], tag("span", f"{len(wrong):,} wrong")), test.cards(wrong[order][:WORST]))
    page.section("Worst images")
    f1 = ratio(2 * (true & said).sum(axis=1), true.sum(axis=1) + said.sum(axis=1))
    page.add(LEGEND, test.cards(np.argsort(f1, kind="stable")))
    page.write(file)
