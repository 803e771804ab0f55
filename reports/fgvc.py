"""The page of a test of fine-grained classes: which are confused, and with what."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from datasets.fgvc import FgvcImages
from metrics.fgvc import ClassScores
from reports.page import BREAK, Html, Page, Pictures, cards, confusion_table, mark, percent, tag, worst_table

PAIRS, SIDE, SHOWN = 8, 4, 12  # confused pairs, pictures of each of their classes, pictures that are sure and wrong
MOST_CELLS = 25  # classes that are drawn as a table of confusions


@dataclass(frozen=True)
class Answers:
    """What the page is about: n images in the order of `logits` [n, K] float32, all classes by name."""

    images: FgvcImages
    classes: list[str]
    logits: torch.Tensor
    scores: ClassScores
    pictures: Pictures = field(default_factory=Pictures)

    def card(self, row: int) -> Html:
        """An image with answer and truth."""
        kind, paths = "wrong" if self.scores.ranks[row] else "right", self.images.paths
        said, true = self.classes[int(self.logits[row].argmax())], self.classes[self.images.labels[row]]
        words = mark(kind), f" {said}", BREAK, f"is {true}"
        return self.pictures.card(paths[row], paths.relative(row), *words, kind=kind)


def write_fgvc_report(file: Path, protocol: str, facts: dict[str, object], found: Answers) -> None:
    """Write the page; protocol: the line that belongs to the numbers."""
    classes, numbers, ranks = found.classes, found.scores.numbers, found.scores.ranks
    confusion, (share, images) = found.scores.confusion, found.scores.per_class()
    tiles = {name.replace("_", " "): percent(x, " %") if x <= 1 else x for name, x in numbers.items()}
    page = Page("Fine-grained classes", protocol, tiles, facts)
    page.section("Classes")
    page.first_k("Right class", [(ranks < k).float().mean().item() for k in range(1, min(20, len(classes)) + 1)])
    rows, wrong = [], confusion.clone().fill_diagonal_(0)
    # the worst first, of equal ones those with more images
    for k in sorted((images > 0).nonzero()[:, 0].tolist(), key=lambda k: (share[k].item(), -int(images[k]))):
        most = int(wrong[k].argmax())
        other = f"{classes[most]} ({int(wrong[k, most])} x)" if wrong[k, most] else "none"
        rows.append([classes[k], percent(share[k].item(), " %"), int(images[k]), other])
    page.add(worst_table(["class", "right", "images", "most frequent wrong answer"], rows))
    page.section("Most confused classes", "Images of either that are taken for the other come first.")
    if len(classes) <= MOST_CELLS:
        page.add(confusion_table(classes, confusion.numpy()))
    both = (confusion + confusion.t()).triu(1).flatten()
    for place in both.argsort(descending=True, stable=True)[:PAIRS].tolist():
        if both[place]:
            a, b = divmod(place, len(classes))
            page.add(tag("article", pair_side(found, a, b), pair_side(found, b, a), kind="row"))
    page.section("Sure and wrong", "Wrong answers with the highest probability: some are mistakes of the labels.")
    probability, rows = found.logits.softmax(dim=1).amax(dim=1), (ranks > 0).nonzero()[:, 0]
    rows = rows[probability[rows].argsort(descending=True, stable=True)][:SHOWN].tolist()
    page.add(cards([found.card(row) for row in rows]))
    page.write(file)


def pair_side(found: Answers, number: int, other: int) -> Html:
    """Images of class `number`: those taken for `other`, then those answered right, then the rest."""
    rows = np.flatnonzero(found.images.labels == number)
    answers = found.logits.argmax(dim=1).numpy()[rows]
    order = np.argsort(np.select([answers == other, answers == number], [0, 1], 2), kind="stable")[:SIDE]
    times = f"{int(found.scores.confusion[number, other])} of {len(rows)} taken for the other"
    title = tag("h4", tag("b", found.classes[number]), BREAK, times)
    return tag("div", title, cards([found.card(row) for row in rows[order].tolist()]))
