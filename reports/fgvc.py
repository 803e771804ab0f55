"""The page of a test of fine-grained classes: which are confused, and with what."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from datasets.fgvc import FgvcImages
from metrics.fgvc import ClassScores
from reports.page import BREAK, Html, Page, Pictures, cards, confusion_table, mark, percent, tag, worst_table

PAIRS, SIDE, SHOWN, MOST_CELLS = (
    8,
    4,
    12,
    25,
)  # confused pairs, pictures of each class, of a section; classes in a table


@dataclass(frozen=True)
class Answers:
    """What the page is about: n images in the order of `logits` [n, K] float32, all classes by name."""

    images: FgvcImages
    classes: list[str]
    logits: torch.Tensor
    scores: ClassScores
    pictures: Pictures = field(default_factory=Pictures)

    def words(self, row: int) -> tuple[Html, str, Html, str]:
        """Answer and truth."""
        kind = "wrong" if self.scores.ranks[row] else "right"
        said, true = int(self.logits[row].argmax()), int(self.images.labels[row])
        return mark(kind), f" {self.classes[said]}", BREAK, f"is {self.classes[true]}"

    def card(self, row: int) -> Html:
        paths, kind = self.images.paths, "wrong" if self.scores.ranks[row] else "right"
        return self.pictures.card(paths[row], paths.relative(row), *self.words(row), kind=kind)


def write_fgvc_report(file: Path, protocol: str, facts: dict[str, object], found: Answers) -> None:
    """Write the page; protocol: the line that belongs to the numbers."""
    numbers, ranks = found.scores.numbers, found.scores.ranks
    tiles = {name.replace("_", " "): percent(x, " %") if x <= 1 else x for name, x in numbers.items()}
    page = Page("Fine-grained classes", protocol, tiles, facts)
    page.section("Classes")
    page.first_k("Right class", [(ranks < k).float().mean().item() for k in range(1, min(20, len(found.classes)) + 1)])
    page.add(class_table(found))
    page.section("Most confused classes", "Images of either that are taken for the other come first.")
    if len(found.classes) <= MOST_CELLS:
        page.add(confusion_table(found.classes, found.scores.confusion.numpy()))
    page.add(*confused_pairs(found))
    page.section("Sure and wrong", "Wrong answers with the highest probability: some are mistakes of the labels.")
    page.add(sure_and_wrong(found))
    page.write(file)


def class_table(found: Answers) -> Html:
    """The worst classes first, of equal ones those with more images."""
    share, images = found.scores.per_class()
    rows, wrong = [], found.scores.confusion.clone().fill_diagonal_(0)
    for k in sorted((images > 0).nonzero()[:, 0].tolist(), key=lambda k: (float(share[k]), -int(images[k]))):
        most = int(wrong[k].argmax())
        other = f"{found.classes[most]} ({int(wrong[k, most])} x)" if wrong[k, most] else "none"
        rows.append([found.classes[k], percent(share[k], " %"), int(images[k]), other])
    return worst_table(["class", "right", "images", "most frequent wrong answer"], rows)


def confused_pairs(found: Answers) -> list[Html]:
    """The two-way most confused classes side by side."""
    both = (found.scores.confusion + found.scores.confusion.t()).triu(1)
    order = both.flatten().argsort(descending=True, stable=True)[:PAIRS].tolist()
    pairs = [divmod(place, len(both)) for place in order if both.flatten()[place]]
    return [tag("article", pair_side(found, a, b), pair_side(found, b, a), kind="row") for a, b in pairs]


def pair_side(found: Answers, number: int, other: int) -> Html:
    """Images of class `number`: those taken for `other`, then those answered right, then the rest."""
    rows = np.flatnonzero(found.images.labels == number)
    answers = found.logits.argmax(dim=1).numpy()[rows]
    order = np.argsort(np.select([answers == other, answers == number], [0, 1], 2), kind="stable")[:SIDE]
    times = f"{int(found.scores.confusion[number, other])} of {len(rows)} taken for the other"
    title = tag("h4", tag("b", found.classes[number]), BREAK, times)
    return tag("div", title, cards([found.card(row) for row in rows[order].tolist()]))


def sure_and_wrong(found: Answers) -> Html:
    """Wrong answers by the probability that the model gives them."""
    probability, wrong = found.logits.softmax(dim=1).amax(dim=1), (found.scores.ranks > 0).nonzero()[:, 0]
    rows = wrong[probability[wrong].argsort(descending=True, stable=True)][:SHOWN].tolist()
    return cards([found.card(row) for row in rows])
