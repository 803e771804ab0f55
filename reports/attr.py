"""The page of an attribute test: each attribute beside a constant answer, pictures of what is wrong."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.path_list import PathList
from metrics.attr import attribute_metrics, ratio
from reports.page import Html, Page, Pictures, card, cards, confusion_table, join, mark, new_axes, percent, table, tag

NUMBERS = ("mA", "accuracy", "precision", "recall", "F1", "mA_supported")
HEAD = ["attribute", "train rate", "true in test", "positive rate", "TPR", "TNR", "mA", "AP", "right answers"]
WORST = 6  # attributes shown with pictures
SHOWN = 16  # images a section
MOST_CELLS = 25  # values of a column that are drawn as a table of confusions
MOST_LINES = 12  # of one kind below a picture
VERDICTS = {"right": "right", "false": "wrong", "missed": "wrong"}  # word: drawing


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

    def image_f1(self) -> np.ndarray:
        """[n] float64: 2 |g & p| / (|g| + |p|) of each image, 0 where both are empty."""
        true = self.labels == 1
        return ratio(2 * (true & self.said).sum(axis=1), true.sum(axis=1) + self.said.sum(axis=1))

    def card(self, row: int) -> Html:
        """An image, with what is true of it and what was said."""
        true, said, probs, names = self.labels[row] == 1, self.said[row], self.probs[row], self.known.names
        lines = []
        for word, which in (("right", true & said), ("missed", true & ~said), ("false", said & ~true)):
            found, sign = np.flatnonzero(which), mark(VERDICTS[word], word)
            found = found[np.argsort(-probs[found], kind="stable")].tolist()
            lines += [tag("li", sign, f" {names[a]} {probs[a]:.2f}") for a in found[:MOST_LINES]]
            if len(found) > MOST_LINES:
                lines.append(tag("li", sign, f": {len(found) - MOST_LINES} more"))
        kind, place = "right" if (true == said).all() else "wrong", int(self.places[row])
        alt = f"{kind}: " + ", ".join(names[a] for a in np.flatnonzero(true))
        picture = self.pictures.one(self.paths[place], self.paths.relative(place), alt)
        return card(picture, tag("ul", *(lines or [tag("li", "nothing is true, nothing was said")])), kind=kind)

    def cards(self, rows: np.ndarray) -> Html:
        return cards([self.card(row) for row in rows.tolist()], "cards")


def write_attr_report(
    file: Path, facts: dict[str, object], metrics: dict, rows: list[dict], test: AttributeTest, seed: int = 0
) -> None:
    """Write the page.

    Args:
        metrics: numbers, those of a constant answer as `constant_...`, and the protocol. rows: of `attribute_rows`.
        seed: of the random images.
    """
    names = [name for name in (*NUMBERS, *(f"top1_{g}" for g in test.known.groups)) if f"constant_{name}" in metrics]
    tiles = {
        f"{name} [constant {percent(metrics[f'constant_{name}'])}]": percent(metrics[name], sign=" %") for name in names
    }
    page = Page(f"Attributes: {test.known.set}", metrics["protocol"], tiles, facts)
    page.note(
        f"{len(test.probs):,} images, {len(rows)} attributes. In square brackets: the best answer without looking, "
        "the same for every image."
    )
    able = [row for row in rows if not np.isnan(row["TPR"] + row["TNR"]) and row["mA"] < 1]
    worst = sorted(able, key=lambda row: row["mA"])[:WORST]
    add_attributes(page, rows, [row["attribute"] for row in worst], test.threshold)
    page.section("Curves")
    draw_curves(page, test)
    if test.known.groups:
        add_confusions(page, test)
    page.section("Worst attributes", "Those of the lowest mean of TPR and TNR among those with true and false images.")
    for row in worst:
        add_worst_attribute(page, test, row)
    f1 = test.image_f1()
    wrong_by = np.where(test.labels == 1, 1 - test.probs, np.where(test.labels == 0, test.probs, 0)).max(axis=1)
    lowest = "Those of the lowest F1, among equals the surest of what is wrong first."
    for title, words, chosen in (
        ("Worst images", lowest, np.lexsort((-wrong_by, f1))),
        ("Random images", f"Drawn from all, seed {seed}.", np.random.default_rng(seed).permutation(len(f1))),
    ):
        page.section(title, words, " ", legend())
        page.add(test.cards(chosen[:SHOWN]))
    if lost := len(test.pictures.lost):
        page.note(tag("b", f"{lost:,} of the pictures cannot be opened.", kind="wrong"))
    page.write(file)


def add_attributes(page: Page, rows: list[dict], worst: list[str], threshold: float) -> None:
    """A row an attribute, a constant answer's numbers in brackets."""

    def beside(row: dict, name: str) -> Html:
        return join(" ", [percent(row[name]), tag("small", f"[{percent(row[f'constant_{name}'])}]")])

    lines = [
        [tag("b", row["attribute"], kind="wrong") if row["attribute"] in worst else row["attribute"],
         percent(row["train_rate"]), f"{row['support']:,} of {row['images']:,}",
         *(percent(row[name]) for name in ("positive_rate", "TPR", "TNR")),
         *(beside(row, name) for name in ("mA", "AP", "accuracy"))]
        for row in rows
    ]  # fmt: skip
    page.section(
        "Attributes",
        "In %. mA: mean of TPR and TNR, with TPR 0 where no test image has the attribute. A constant answer gets the "
        "numbers in brackets: for AP the positive rate, for right answers those of always saying what is commoner in "
        f"training. True above {threshold:g}. A dash: not defined. Red: the worst.",
    )
    page.add(table(HEAD, lines))


def draw_curves(page: Page, test: AttributeTest) -> None:
    """Probabilities of what is true and what is not, numbers by threshold, F1 of the images."""
    values = {"true": test.probs[test.labels == 1], "not true": test.probs[test.labels == 0]}
    parts = {name: (x, np.ones(len(x))) for name, x in values.items()}
    some = ", ".join(f"{len(x):,} {name}" for name, x in values.items())
    caption = f"Of all attributes: {some}. True is said above {test.threshold:g}."
    page.shares("Probabilities", np.linspace(0, 1, 21), parts, ("probability", "labels"), caption)
    at, axes, best = np.linspace(0.05, 0.95, 19), new_axes("threshold", "%"), []
    found = [attribute_metrics(test.probs > t, test.labels) for t in at]
    for name, style in (("mA", "-"), ("F1", "--")):
        values = [100 * metrics[name] for metrics in found]
        axes.plot(at, values, style, label=name)
        best.append(f"{name} is highest at {at[int(np.argmax(values))]:.2f}")
    caption = f"Scored at {test.threshold:g}; {', '.join(best)}. The test chooses nothing."
    page.figure("Threshold", axes, caption)
    f1 = test.image_f1()
    caption = f"{(f1 == 1).sum():,} of {len(f1):,} images without a fault."
    page.histogram("F1 of the images", f1, "F1", "images", caption)


def add_confusions(page: Page, test: AttributeTest) -> None:
    """Of each column of words: rows: what is true; columns: the most probable. For images with one true value."""
    page.section(
        "Confusions",
        "Rows: true; columns: the most probable; on the diagonal, in bold, right; at the end the share of the row that "
        "is right, in %.",
    )
    for name, columns in test.known.groups.items():
        inside, K = test.labels[:, columns] == 1, len(columns)
        rows = inside.sum(axis=1) == 1
        if rows.any() and K <= MOST_CELLS:
            true, said = inside[rows].argmax(axis=1), test.probs[rows][:, columns].argmax(axis=1)
            counts = np.bincount(true * K + said, minlength=K * K).reshape(K, K)
            values = [test.known.attributes[c].value for c in columns]
            page.add(tag("h3", name), confusion_table(values, counts))


def legend() -> Html:
    words = {"right": ": true and said. ", "false": ": said, but not true. ", "missed": ": true, but not said. "}
    parts = [part for word, text in words.items() for part in (mark(VERDICTS[word], word), text)]
    return join("", [*parts, "With the probability of each. Solid green frame: no fault; dashed red: one."])


def add_worst_attribute(page: Page, test: AttributeTest, row: dict) -> None:
    """What was missed and what was taken for it, the surest first."""
    name, column = row["attribute"], test.known.names.index(row["attribute"])
    label, said, score = test.labels[:, column], test.said[:, column], test.probs[:, column]
    numbers = f"mA {percent(row['mA'])} %, AP {percent(row['AP'])} %"
    parts = [tag("h3", name, tag("span", f"{numbers}, true in {row['support']:,} of {row['images']:,} images"))]
    missed, taken = np.flatnonzero((label == 1) & ~said), np.flatnonzero((label == 0) & said)
    for words, found, order in (("Missed: {}, not said", missed, score), ("False: {} said, not true", taken, -score)):
        if len(found):
            chosen = found[np.argsort(order[found], kind="stable")][:WORST]
            parts += [tag("h4", words.format(name), f": {len(found):,}."), test.cards(chosen)]
    page.add(tag("article", *parts))
