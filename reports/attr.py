"""One page about an attribute test: each attribute beside a constant answer, pictures of what is wrong."""

import html
from pathlib import Path

import numpy as np

from datasets.path_list import PathList, printable
from finetune.attr_model import Known
from metrics.attr import attribute_metrics, ratio
from reports.page import Pictures, Section, write_page
from reports.svg import DASHED, FILLED, SOLID, chart, steps

NUMBERS = ("mA", "accuracy", "precision", "recall", "F1")
WORST = 6  # attributes shown with pictures
MOST_CELLS = 25  # values of a column that are drawn as a table of confusions
STYLE = """table.wide td,table.wide th{padding:.1em .7em .1em 0;text-align:right;white-space:nowrap}
table.wide th:first-child,table.wide td:first-child{text-align:left}table.wide td small{color:#555}
.scroll{overflow-x:auto}table.wide tr.low td{background:#fdf0ef}
table.cells td,table.cells th{padding:.15em .5em;text-align:right;font-size:12px;border:1px solid #eee}
table.cells thead th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left}
.cards{gap:12px}.cards li{width:170px;text-align:left;line-height:1.45}
.cards li img,.cards .gone{width:calc(var(--s)*1.6);height:calc(var(--s)*1.6)}
.cards ul{list-style:none;padding:0;margin:.3em 0 0}.cards li li b.right{color:#17803d}
h4{margin:.8em 0 0;font-weight:normal}"""


def percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def beside(value: float, constant: float) -> str:
    """A cell of the table: the number, a constant answer's in small type."""
    return f"<td>{percent(value)} <small>[{percent(constant)}]</small></td>"


def write_attr_report(
    file: Path,
    protocol: str,
    facts: dict[str, object],
    metrics: dict[str, float],
    rows: list[dict],
    known: Known,
    paths: PathList,
    places: np.ndarray,
    probs: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    shown: int = 16,
    seed: int = 0,
) -> None:
    """Write one HTML page that needs no other file and no network.

    Args:
        protocol: the line that belongs to the numbers. facts: weights, set, seed.
        metrics, rows: of `finetune.attr.all_metrics` and `metrics.attr.attribute_rows`.
        paths, places: the test list, and [n] int64 which of it the n images are.
        probs: [n, A] float in [0, 1]. labels: [n, A] int, 1 true, 0 not, -1 unknown.
        shown: images a section. seed: of the random draw.
    Raises:
        InputError: the file cannot be written.
    """
    cards = Cards(known.names, paths, places, probs, labels, threshold)
    sections = [
        Section("attributes", "Attributes", attribute_table(rows, threshold)),
        Section("curves", "Curves", f'<div class="charts">{charts(probs, labels, threshold)}</div>'),
    ]
    confused = "".join(confusion(name, c, known, probs, labels) for name, c in known.groups.items())
    if confused:
        sections.append(Section("confusions", "Confusions", confused))
    worst = "".join(worst_attribute(cards, row, known.names.index(row["attribute"])) for row in lowest(rows))
    note = "<p>Those of the lowest mean of TPR and TNR among the attributes with true and false images.</p>"
    sections.append(Section("worst", "Worst attributes", note + (worst or "<p>None.</p>")))
    for name, title, words, chosen in choose(probs, labels, threshold, shown, seed):
        body = f"<p>{words} {legend()}</p>" + cards.list(chosen)
        sections.append(Section(name, title, body))
    if cards.pictures.lost:
        gone = f'<p><b class="wrong">{len(cards.pictures.lost):,} of the pictures cannot be opened.</b></p>'
        sections.append(Section("lost", "Pictures that are gone", gone, linked=False))
    tiles = {
        f"{name} [constant {percent(metrics['constant_' + name])}]": f"{percent(metrics[name])} %"
        for name in (*NUMBERS, "mA_supported", *(f"top1_{group}" for group in known.groups))
        if f"constant_{name}" in metrics
    }
    intro = f"<p><code>{html.escape(protocol)}</code></p>" + (
        f"<p>{len(probs):,} images, {len(rows)} attributes. In square brackets: the best answer without "
        "looking, the same for every image.</p>"
    )
    write_page(file, "Attributes: " + known.set, intro, tiles, facts, sections, STYLE)


# the attributes


def lowest(rows: list[dict]) -> list[dict]:
    """The WORST attributes by their term of mA; those that are perfect or unsupported are none."""
    able = [row for row in rows if not np.isnan(row["TPR"] + row["TNR"]) and row["mA"] < 1]
    return sorted(able, key=lambda row: row["mA"])[:WORST]


def attribute_table(rows: list[dict], threshold: float) -> str:
    head = (
        "attribute", "train rate", "true in test", "positive rate", "TPR", "TNR", "mA", "AP", "right answers"
    )  # fmt: skip
    low = {row["attribute"] for row in lowest(rows)}
    lines = []
    for row in rows:
        name = html.escape(printable(row["attribute"]))
        lines.append(
            f"<tr{' class=low' if row['attribute'] in low else ''}><td>{name}</td>"
            f"<td>{percent(row['train_rate'])}</td><td>{row['support']:,} of {row['images']:,}</td>"
            f"<td>{percent(row['positive_rate'])}</td><td>{percent(row['TPR'])}</td>"
            f"<td>{percent(row['TNR'])}</td>{beside(row['mA'], row['constant_mA'])}"
            f"{beside(row['AP'], row['constant_AP'])}{beside(row['accuracy'], row['constant_accuracy'])}</tr>"
        )
    titles = "".join(f"<th>{title}</th>" for title in head)
    return (
        "<p>In %. mA: mean of TPR and TNR, with TPR 0 where no test image has the attribute. A constant "
        "answer gets the numbers in brackets: for AP the positive rate, for right answers those of always "
        f"saying what is commoner in training. True above {threshold:g}. A dash: not defined. Shaded: the "
        "worst.</p>"
        f'<div class="scroll"><table class="wide"><tr>{titles}</tr>{"".join(lines)}</table></div>'
    )


def confusion(name: str, columns: list[int], known: Known, probs: np.ndarray, labels: np.ndarray) -> str:
    """Rows: what is true; columns: the most probable value. For images with one true value."""
    inside = labels[:, columns] == 1
    rows = inside.sum(axis=1) == 1
    if not rows.any() or len(columns) > MOST_CELLS:
        return ""
    true, said = inside[rows].argmax(axis=1), probs[rows][:, columns].argmax(axis=1)
    counts = np.bincount(true * len(columns) + said, minlength=len(columns) ** 2)
    counts = counts.reshape(len(columns), len(columns))
    values = [html.escape(printable(known.attributes[c].value)) for c in columns]
    body = []
    for i, value in enumerate(values):
        share = ratio(counts[i], np.full(len(columns), counts[i].sum()))
        cells = "".join(
            f'<td style="background:rgba({"23,128,61" if i == j else "194,38,29"},{0.6 * share[j]:.2f})">'
            f"{f'<b>{n:,}</b>' if i == j else f'{n:,}' if n else ''}</td>"
            for j, n in enumerate(counts[i].tolist())
        )
        body.append(f"<tr><th>{value}</th>{cells}<td>{percent(share[i]) if counts[i].sum() else '-'}</td></tr>")
    head = "".join(f"<th>{value}</th>" for value in values)
    title = html.escape(printable(name))
    return (
        f"<h3>{title}</h3><p>Rows: true; columns: the most probable; on the diagonal, in bold, right; at the "
        'end the share of the row that is right, in %.</p><div class="scroll"><table class="cells">'
        f"<thead><tr><td></td>{head}<th>right, %</th></tr></thead>{''.join(body)}</table></div>"
    )


def charts(probs: np.ndarray, labels: np.ndarray, threshold: float) -> str:
    """Probabilities of what is true and what is not, numbers by threshold, F1 of the images."""
    edges = np.linspace(0, 1, 21)
    parts = {"true": probs[labels == 1], "not true": probs[labels == 0]}
    heights = {k: 100 * np.histogram(x, edges)[0] / max(len(x), 1) for k, x in parts.items()}
    styles = (FILLED, DASHED)
    lines = {k: (*steps(edges, h), style) for (k, h), style in zip(heights.items(), styles)}
    some = ", ".join(f"{len(x):,} {name}" for name, x in parts.items())
    top = max(1.0, *(h.max() for h in heights.values()))
    first = chart("Probabilities", (0, 1), (0, top), lines, "probability", "% of the labels",
                  f"Of all attributes: {some}. True is said above {threshold:g}.")  # fmt: skip
    at = np.linspace(0.05, 0.95, 19)
    found = [attribute_metrics(probs > t, labels) for t in at]
    curves = {name: [100 * m[name] for m in found] for name in ("mA", "F1")}
    lines = {name: (at, y, style) for (name, y), style in zip(curves.items(), (SOLID, DASHED))}
    best = ", ".join(f"{name} is highest at {at[int(np.argmax(y))]:.2f}" for name, y in curves.items())
    low = 10 * np.floor(min(map(min, curves.values())) / 10)
    second = chart("Threshold", (0, 1), (min(low, 90), 100), lines, "threshold", "%",
                   f"Scored at {threshold:g}; {best}. The test chooses nothing.")  # fmt: skip
    f1 = image_f1(probs > threshold, labels)
    heights = np.histogram(100 * f1, 20, (0, 100))[0]
    third = chart("F1 of the images", (0, 100), (0, max(int(heights.max()), 1)),
                  {"": (*steps(np.linspace(0, 100, 21), heights), FILLED)}, "F1, %", "images",
                  f"{(f1 == 1).sum():,} of {len(f1):,} images without a fault.")  # fmt: skip
    return first + second + third


def image_f1(said: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n] float64: 2 |g & p| / (|g| + |p|) of each image, 0 where both are empty."""
    true, said = labels == 1, said & (labels >= 0)
    return ratio(2 * (true & said).sum(axis=1), true.sum(axis=1) + said.sum(axis=1))


# the images


def choose(probs: np.ndarray, labels: np.ndarray, threshold: float, shown: int, seed: int):
    """(id, title, words, [*] rows of the images) of each section of pictures."""
    f1 = image_f1(probs > threshold, labels)
    wrong_by = np.where(labels == 1, 1 - probs, np.where(labels == 0, probs, 0)).max(axis=1)
    worst = np.lexsort((-wrong_by, f1))[:shown]
    some = np.random.default_rng(seed).permutation(len(probs))[:shown]
    lowest_f1 = "Those of the lowest F1, among equals the surest of what is wrong first."
    return (
        ("images", "Worst images", lowest_f1, worst),
        ("random", "Random images", f"Drawn from all, seed {seed}.", some),
    )  # fmt: skip


VERDICTS = {"right": "right", "false": "wrong", "missed": "wrong"}  # word: frame and drawing
MOST_LINES = 12  # of one kind below a picture


def verdict(word: str) -> str:
    """The word with a check mark or a cross."""
    kind = VERDICTS[word]
    return f'<b class="{kind}"><svg class="mark" aria-hidden="true"><use href="#{kind}"/></svg> {word}</b>'


def legend() -> str:
    return (
        f"{verdict('right')}: true and said. {verdict('false')}: said, but not true. {verdict('missed')}: "
        "true, but not said. With the probability of each. Solid green frame: without a fault; dashed red "
        "frame: with one."
    )


def worst_attribute(cards: "Cards", row: dict, column: int) -> str:
    """What was missed and what was taken for it, the surest first."""
    true, said = cards.labels[:, column] == 1, cards.said[:, column]
    score = cards.probs[:, column]
    missed = np.flatnonzero(true & ~said)
    taken = np.flatnonzero((cards.labels[:, column] == 0) & said)
    missed = missed[np.argsort(score[missed], kind="stable")]
    taken = taken[np.argsort(-score[taken], kind="stable")]
    name = html.escape(printable(row["attribute"]))
    numbers = f"mA {percent(row['mA'])} %, AP {percent(row['AP'])} %"
    parts = [f"<h3>{name}<span>{numbers}, true in {row['support']:,} of {row['images']:,} images</span></h3>"]
    for words, found in ((f"Missed: {name}, not said", missed), (f"False: {name} said, not true", taken)):
        if len(found):
            parts.append(f"<h4>{words}: {len(found):,}.</h4>{cards.list(found[:WORST])}")
    return f"<article>{''.join(parts)}</article>"


class Cards:
    """Images as HTML, with what is true of them and what was said."""

    def __init__(self, names, paths: PathList, places, probs, labels, threshold: float):
        self.names = [html.escape(printable(name)) for name in names]
        self.paths, self.places, self.probs, self.labels = paths, places, probs, labels
        self.said = (probs > threshold) & (labels >= 0)
        self.pictures = Pictures()

    def list(self, rows: np.ndarray) -> str:
        if not len(rows):
            return "<p>None.</p>"
        return f'<ol class="cards">{"".join(self.one(row) for row in rows.tolist())}</ol>'

    def one(self, row: int) -> str:
        true, said, probs = self.labels[row] == 1, self.said[row], self.probs[row]
        lines = []
        for word, which in (("right", true & said), ("missed", true & ~said), ("false", said & ~true)):
            found = np.flatnonzero(which)
            found = found[np.argsort(-probs[found], kind="stable")].tolist()
            lines += [f"<li>{verdict(word)} {self.names[a]} {probs[a]:.2f}</li>" for a in found[:MOST_LINES]]
            if len(found) > MOST_LINES:
                lines.append(f"<li>{verdict(word)}: {len(found) - MOST_LINES} more</li>")
        is_right = bool((true == said).all())
        alt = f"{'right' if is_right else 'wrong'}: " + ", ".join(self.names[a] for a in np.flatnonzero(true))
        picture = self.pictures.one(self.paths, int(self.places[row]), alt)
        empty = "<li>nothing is true, nothing was said</li>"
        return f'<li class="{"right" if is_right else "wrong"}">{picture}<ul>{"".join(lines) or empty}</ul></li>'
