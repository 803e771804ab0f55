"""The page of an attribute test: each attribute beside a constant answer, pictures of what is wrong."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.path_list import PathList
from metrics.attr import group_confusion, ratio
from reports.page import Html, Page, Pictures, cards, confusion_table, mark, percent, tag, worst_table

NUMBERS = ("mA", "accuracy", "precision", "recall", "F1", "mA_supported")
COLUMNS = {"train_rate": "train rate", "positive_rate": "positive rate", "TPR": "TPR", "TNR": "TNR", "mA": "mA",
           "AP": "AP", "accuracy": "right answers"}  # fmt: skip
WORST, SHOWN, MOST_LINES = 6, 16, 12  # attributes with pictures; images a section; lines of one kind below a picture
MOST_CELLS = 25  # values of a column that are drawn as a table of confusions
VERDICTS = {"right": "right", "missed": "wrong", "false": "wrong"}  # word: drawing
LEGEND = tag(
    "p", mark("right"), ": true and said. ", mark("wrong", "false"), ": said, but not true. ", mark("wrong", "missed"),
    ": true, but not said. With the probability of each.",
)  # fmt: skip


@dataclass(frozen=True)
class AttributeTest:
    """What was scored.

    known: what the model knows of its set: `set`, `names`, `attributes`, `groups`. paths: the test list; places: [n]
    int64 which of it the n images are. probs: [n, A] float in [0, 1]; labels: [n, A] int, 1 true, 0 not, -1 unknown.
    """

    known: object
    paths: PathList
    places: np.ndarray
    probs: np.ndarray
    labels: np.ndarray
    threshold: float
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def said(self) -> np.ndarray:
        return (self.probs > self.threshold) & (self.labels >= 0)

    def card(self, row: int) -> Html:
        """An image, with what is true of it and what was said."""
        true, said, probs, names = self.labels[row] == 1, self.said[row], self.probs[row], self.known.names
        lines = []
        for (word, sign), which in zip(VERDICTS.items(), (true & said, true & ~said, said & ~true)):
            found = np.flatnonzero(which)
            found = found[np.argsort(-probs[found], kind="stable")].tolist()
            lines += [tag("li", mark(sign, word), f" {names[a]} {probs[a]:.2f}") for a in found[:MOST_LINES]]
        kind, place = "right" if (true == said).all() else "wrong", int(self.places[row])
        alt = f"{kind}: " + ", ".join(names[a] for a in np.flatnonzero(true))
        return self.pictures.card(self.paths[place], self.paths.relative(place), tag("ul", *lines), kind=kind, alt=alt)

    def cards(self, rows: np.ndarray) -> Html:
        return cards([self.card(row) for row in rows[:SHOWN].tolist()], "cards")


def write_attr_report(file: Path, facts: dict[str, object], metrics: dict, rows: list[dict], test: AttributeTest):
    """Write the page; metrics: numbers, those of a constant answer as `constant_...`, and the protocol; rows: of
    `attribute_rows`."""
    names = [name for name in (*NUMBERS, *(f"top1_{g}" for g in test.known.groups)) if f"constant_{name}" in metrics]
    tiles = {f"{x} [constant {percent(metrics[f'constant_{x}'])}]": percent(metrics[x], " %") for x in names}
    page = Page(f"Attributes: {test.known.set}", metrics["protocol"], tiles, facts)
    page.section(
        "Attributes",
        f"{len(test.probs):,} images; true above {test.threshold:g}; in %, the worst first. mA: mean of TPR and TNR. "
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
    for name, columns in test.known.groups.items():
        if len(columns) <= MOST_CELLS:
            values = [test.known.attributes[c].value for c in columns]
            counts = group_confusion(test.probs, test.labels, columns)
            page.add(tag("h3", name), confusion_table(values, counts))
    page.section("Worst attributes", "What was missed and what was said wrongly, the surest first.")
    for row in [row for row in rows if row["mA"] < 1][:WORST]:
        column = test.known.names.index(row["attribute"])
        label, said, score = test.labels[:, column], test.said[:, column], test.probs[:, column]
        wrong = np.flatnonzero((label >= 0) & (said != (label == 1)))
        order = np.argsort(-np.abs(score - test.threshold)[wrong], kind="stable")
        page.add(tag("h3", row["attribute"], tag("span", f"{len(wrong):,} wrong")), test.cards(wrong[order][:WORST]))
    true = test.labels == 1
    f1 = ratio(2 * (true & test.said).sum(axis=1), true.sum(axis=1) + test.said.sum(axis=1))
    page.section("Worst images")
    page.add(LEGEND, test.cards(np.argsort(f1, kind="stable")))
    page.write(file)
