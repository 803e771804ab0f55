"""The page of a test of fine-grained classes: which are confused, with what, and what was looked at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import PowerNorm, to_hex
from PIL import Image, ImageDraw

from datasets.fgvc import FgvcImages
from metrics.fgvc import ClassScores
from reports.page import BREAK, Html, Page, Pictures, card, cards, folded, image, join, mark, new_axes, table, tag

WORST, PAIRS, SIDE = 15, 8, 4  # classes in the first table; confused pairs; pictures of each class of a pair
SHOWN = 12  # pictures a section
PARTS_SIDE = 240  # px of the pictures with parts
COLOURS = tuple(map(to_hex, colormaps["tab20"].colors))  # of the heads
TILES = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean per class", "majority": "majority"}


@dataclass(frozen=True)
class Answers:
    """What the page is about: n images in the order of `logits` [n, K] float32, all classes by name.

    crop: row -> [3, H, W] uint8, an image as the model sees it. parts: [n, 3, H, W] uint8 -> [n, h] int64, the part
    patch of each head; None: the model has none. patches: columns of their grid, px from one to the next, their px.
    """

    images: FgvcImages
    classes: list[str]
    logits: torch.Tensor
    scores: ClassScores
    crop: Callable[[int], torch.Tensor] | None = None
    parts: Callable[[torch.Tensor], torch.Tensor] | None = None
    patches: tuple[int, int, int] = (0, 0, 0)
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def answers(self) -> torch.Tensor:
        return self.logits.argmax(dim=1)

    def card(self, row: int, kind: str, *words: object) -> Html:
        paths, true = self.images.paths, self.classes[int(self.images.labels[row])]
        return card(self.pictures.one(paths[row], paths.relative(row), f"{true}, {kind}"), *words, kind=kind)


def write_fgvc_report(file: Path, protocol: str, facts: dict[str, object], found: Answers, seed: int = 0) -> None:
    """Write the page; protocol: the line that belongs to the numbers; seed: of the random draw."""
    numbers = found.scores.numbers
    tiles = {title: f"{100 * numbers[name]:.2f} %" for name, title in TILES.items()}
    tiles |= {"images": f"{len(found.images):,}", "classes": f"{numbers['classes_with_images']:,}"}
    page = Page("Fine-grained classes", protocol, tiles, facts)
    page.section("Classes")
    draw_curves(page, found)
    page.add(class_tables(found))
    page.section("Confusion")
    draw_confusion(page, found.scores.confusion.numpy())
    page.section(
        "Most confused classes",
        "Pairs of classes by the number of images of either that are taken for the other; those images come first. ",
        mark("right"), ": answered right, ", mark("wrong"), ": taken for the other class; no mark: for a third, "
        "which is named.",
    )  # fmt: skip
    page.add(confused_pairs(found))
    page.section("Sure and wrong", "Wrong answers with the highest probability: some are mistakes of the labels.")
    page.add(sure_and_wrong(found))
    if found.parts is not None:
        page.section("Selected parts")
        add_parts(page, found, seed)
    page.write(file)


def draw_curves(page: Page, found: Answers) -> None:
    """How the classes spread, and how far down the list the right one is."""
    share, images = found.scores.per_class()
    share = share[images > 0].numpy()
    caption = (
        f"Median {100 * np.median(share):.1f} %; {(share == 0).sum():,} of {len(share):,} classes are never right."
    )
    page.histogram("Classes by their accuracy", share, "right images", "classes", caption)
    last = min(20, max(len(found.classes), 2))
    right = [(found.scores.ranks < k).float().mean().item() for k in range(1, last + 1)]
    page.first_k("Right class among the first k", right, "images", "Images with their class in the first k.")


def class_tables(found: Answers) -> Html:
    """The worst classes, of equal ones those with more images first; all of them behind a click."""
    share, images = found.scores.per_class()
    has = (images > 0).nonzero()[:, 0].tolist()
    rows = []
    for number in sorted(has, key=lambda number: (float(share[number]), -int(images[number]))):
        wrong = found.scores.confusion[number].clone()
        wrong[number] = 0
        most = int(wrong.argmax())
        other = f"{found.classes[most]} ({int(wrong[most])} x)" if wrong[most] else "none"
        rows.append([found.classes[number], f"{100 * share[number]:.1f} %", int(images[number]), other])
    head, absent = ["class", "right", "images", "most frequent wrong answer"], len(images) - len(rows)
    parts = [tag("h3", f"The {min(WORST, len(rows))} worst"), table(head, rows[:WORST])]
    if len(rows) > WORST:
        parts.append(folded(f"all {len(rows):,} classes", table(head, rows)))
    if absent:
        parts.append(tag("p", f"{absent:,} further classes have no test image."))
    return join("", parts)


def draw_confusion(page: Page, confusion: np.ndarray) -> None:
    """Rows: classes, columns: answers, in the order of the classes; share of a row's images."""
    share = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    axes = new_axes("answer", "class", size=(5.4, 5.0))
    axes.grid(False)
    # square root, so that a single image of many is seen
    axes.figure.colorbar(axes.imshow(share, "inferno", PowerNorm(0.5, 0, 1), interpolation="nearest"))
    axes.locator_params(integer=True)
    wrong = int(confusion.sum() - confusion.trace())
    caption = (
        "Row: class, column: answer, both in the order of the classes' names. Black: none of the class's images, "
        f"light yellow: all. {wrong:,} of {confusion.sum():,} answers lie off the diagonal."
    )
    page.figure(f"Confusion of {len(share)} classes", axes, caption, "chart large")


def confused_pairs(found: Answers) -> Html:
    """The two-way most confused classes side by side, images that were taken for the other first."""
    confusion = found.scores.confusion
    both = (confusion + confusion.t()).triu(1)
    order = both.flatten().argsort(descending=True, stable=True)[:PAIRS].tolist()
    pairs = [divmod(place, len(both)) for place in order if both.flatten()[place]]
    articles = [tag("article", pair_side(found, a, b), pair_side(found, b, a), kind="row") for a, b in pairs]
    return join("", articles or [tag("p", "No class is taken for another.")])


def pair_side(found: Answers, number: int, other: int) -> Html:
    """Images of class `number`: those taken for `other`, then those answered right, then the rest."""
    rows = np.flatnonzero(found.images.labels == number)
    answers = found.answers.numpy()[rows]
    order = np.argsort(np.select([answers == other, answers == number], [0, 1], 2), kind="stable")
    items = []
    for row, answer in zip(rows[order[:SIDE]].tolist(), answers[order].tolist()):
        kind = {other: "wrong", number: "right"}.get(answer, "")
        items.append(found.card(row, kind, mark(kind) if kind else found.classes[answer]))
    times = f"{int(found.scores.confusion[number, other])} of {len(rows)} taken for the other"
    return tag("div", tag("h4", tag("b", found.classes[number]), BREAK, times), cards(items))


def sure_and_wrong(found: Answers) -> Html:
    """Wrong answers by the probability that the model gives them."""
    probability = found.logits.softmax(dim=1).amax(dim=1)
    wrong = (found.scores.ranks > 0).nonzero()[:, 0]
    items = []
    for row in wrong[probability[wrong].argsort(descending=True, stable=True)][:SHOWN].tolist():
        said, true = (found.classes[int(k)] for k in (found.answers[row], found.images.labels[row]))
        items.append(found.card(row, "wrong", f"{100 * probability[row]:.0f} %: {said}", BREAK, f"is {true}"))
    return cards(items, empty="No answer is wrong.")


def add_parts(page: Page, found: Answers, seed: int) -> None:
    """Random images as the model sees them, half of them answered right as far as there are any; each head's part in
    a frame of its own colour."""
    rng, right = np.random.default_rng(seed), found.scores.ranks.numpy() == 0
    order = [rng.permutation(np.flatnonzero(chosen)) for chosen in (right, ~right)]
    half = max(SHOWN // 2, SHOWN - len(order[1]))
    rows = np.concatenate([order[0][:half], order[1]])[:SHOWN].tolist()
    imgs = torch.stack([found.crop(row) for row in rows])
    items, chosen = [], found.parts(imgs).cpu()
    for row, pixels, ids in zip(rows, imgs, chosen.tolist()):
        kind, said = "right" if right[row] else "wrong", found.classes[int(found.answers[row])]
        words = [mark(kind), said] if right[row] else [
            mark(kind), said, f"is {found.classes[int(found.images.labels[row])]}"]  # fmt: skip
        picture = image(framed(pixels, ids, found.patches), "selected parts", PARTS_SIDE)
        items.append(card(picture, join(BREAK, words), kind=kind))
    different = np.mean([len(set(ids)) for ids in chosen.tolist()])
    page.note(
        f"The patch that each of the {chosen.shape[1]} heads leads to (a colour a head; heads may agree: "
        f"{different:.1f} different patches an image here). Only these and the class token reach the last block."
    )
    page.add(cards(items, "big"))


def framed(pixels: torch.Tensor, ids: list[int], patches: tuple[int, int, int]) -> Image.Image:
    """[3, H, W] uint8 -> the picture, enlarged to about PARTS_SIDE, with a frame around each patch of `ids`;
    those of several heads lie one inside another."""
    columns, stride, patch = patches
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = PARTS_SIDE / max(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
    draw, seen = ImageDraw.Draw(picture), dict.fromkeys(ids, 0)
    for head, number in enumerate(ids):
        row, column = divmod(number, columns)
        inset, seen[number] = 3 * seen[number], seen[number] + 1
        left, top, side = (column * stride * scale + inset, row * stride * scale + inset, patch * scale - 2 * inset)
        if side > 4:
            colour = COLOURS[head % len(COLOURS)]
            draw.rectangle([left, top, left + side - 1, top + side - 1], outline=colour, width=2)
    return picture
