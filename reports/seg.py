"""The page of a segmentation test: numbers by class, what is taken for what, and pictures with their parts outlined
and numbered."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datasets.images import UNREADABLE, why_unreadable
from datasets.path_list import PathList
from metrics.seg import IGNORE, segmentation_numbers
from reports.page import Html, Page, confusion_table, image, join, percent, table, tag

SIDE = 320  # px, longer side of the embedded pictures
SHOWN = 12  # images a section
TINT = 0.5
# told apart by most colour-blind readers (Okabe and Ito, 2008); further classes have hues all around
COLOURS = ((213, 94, 0), (0, 114, 178), (240, 228, 66), (0, 158, 115), (204, 121, 167), (86, 180, 233),
           (230, 159, 0), (110, 60, 30))  # fmt: skip
STYLE = "figure.part { width: calc(2.4 * var(--s)); margin: 0 } .part img { width: 100% } .parts { gap: 6px }"


@dataclass(frozen=True)
class SegTest:
    """What was scored.

    space: the classes: `name`, `names`, whether the first is `background`. rows: [n] int64 of the images that could
    be read; each: [n, K, K] int64, their confusion matrices, row: truth, column: answer. look: row -> the picture, its
    truth and the model's answer, [h, w] uint8 classes at its size; raises an exception of UNREADABLE.
    """

    space: object
    images: PathList
    rows: np.ndarray
    each: np.ndarray
    look: Callable[[int], tuple[Image.Image, np.ndarray, np.ndarray]]


def write_seg_report(file: Path, protocol: str, facts: dict, test: SegTest, seed: int = 0) -> None:
    """Write the page; images that are shown are computed again. protocol: what the numbers belong to."""
    space, confusion = test.space, test.each.sum(axis=0)
    numbers = segmentation_numbers(confusion, space.background)
    tiles = {name.replace("_", " "): percent(value, 2, " %", "absent") for name, value in numbers.flat.items()}
    page = Page(f"Part segmentation: {space.name}", protocol, tiles, facts, STYLE)
    page.section("Classes")
    page.add(class_table(test, numbers, confusion))
    words = "Of the pixels of each class (row), % by answer (column); an empty row: the class is absent."
    page.section("What is taken for what", words)
    page.add(confusion_table(space.names, confusion, as_shares=True))
    add_legend(page, space)
    scores = image_scores(test.each, space.background)
    draws = np.random.default_rng(seed).permutation(len(scores))[:SHOWN]
    worst, drawn = np.argsort(scores, kind="stable")[:SHOWN], np.sort(draws)
    articles = {place: article(test, place, scores[place]) for place in {*worst.tolist(), *drawn.tolist()}}
    for title, words, places in (
        ("Worst images", "Those of the lowest mean IoU of their own parts.", worst),
        ("Random images", f"Drawn from all images that could be read, seed {seed}.", drawn),
    ):
        page.section(title, words)
        page.add(tag("div", *(articles[place] for place in places.tolist()), kind="row"))
    page.write(file)


def class_table(test: SegTest, numbers, confusion: np.ndarray) -> Html:
    """IoU and accuracy of every class, its share of the pixels and in how many images it is."""
    true, images = confusion.sum(axis=1), (test.each.sum(axis=2) > 0).sum(axis=0)
    rows = []
    for number, name in enumerate(test.space.names):
        iou, acc = (percent(x[number], 2, " %", "absent") for x in (numbers.iou, numbers.acc))
        bar = tag("span", kind="bar", style=f"width:{120 * np.nan_to_num(numbers.iou[number]):.0f}px")
        share = f"{100 * true[number] / max(true.sum(), 1):.3f} %"
        rows.append([key(number + (not test.space.background)), name, iou, bar, acc, share, f"{images[number]:,}"])
    return table(["", "class", "IoU", "", "accuracy", "of the pixels", "images"], rows)


def add_legend(page: Page, space) -> None:
    """Numbers, colours and names of the classes, as the pictures have them."""
    shown = list(enumerate(space.names[1:] if space.background else space.names, 1))
    page.note(join("\u2002 ", [join(" ", [key(number), name]) for number, name in shown]))
    rest = "background" if space.background else "not shown"
    page.note(
        f"Each part has an outline and its number where it is thickest; what has neither is {rest}. "
        "Hatched: without a label, not counted."
    )


def colour_of(number: int) -> tuple[int, int, int]:
    """RGB of part `number`, from 1."""
    if number <= len(COLOURS):
        return COLOURS[number - 1]
    hue = int(255 * (0.61803 * number % 1))
    return Image.new("HSV", (1, 1), (hue, 200, 220)).convert("RGB").getpixel((0, 0))


def key(number: int) -> Html:
    """The sign of a class in legends and pictures: its number on its colour."""
    r, g, b = colour_of(number) if number else (255, 255, 255)
    ink = "#000" if 0.3 * r + 0.6 * g + 0.1 * b > 105 else "#fff"
    return tag("span", number, kind="key", style=f"background:rgb({r},{g},{b});color:{ink}")


def overlay(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture in grey, each class from 1 on in its colour, outlined, its number where it is thickest; pixels
    without a label are hatched.

    Args:
        picture: RGB. mask: [h, w] integers of the same size.
    """
    grey = np.repeat(np.asarray(picture.convert("L"), dtype=np.float32)[:, :, None], 3, axis=2)
    classes = [c for c in np.unique(mask).tolist() if 1 <= c < IGNORE]
    for c in classes:
        region = mask == c
        grey[region] = (1 - TINT) * grey[region] + TINT * np.array(colour_of(c), dtype=np.float32)
    y, x = np.indices(mask.shape)
    grey[(mask == IGNORE) & ((x + y) % 6 < 2)] = 0
    edge = (np.diff(mask, axis=1, prepend=mask[:, :1]) != 0) | (np.diff(mask, axis=0, prepend=mask[:1]) != 0)
    wide = edge.copy()
    wide[:, :-1] |= edge[:, 1:]
    wide[:-1] |= edge[1:]
    grey[wide] = 0
    grey[edge] = 255
    result = Image.fromarray(grey.round().astype(np.uint8))
    draw = ImageDraw.Draw(result)
    for c in classes:
        at = thickest(mask == c)
        draw.text(at, str(c), fill="white", stroke_fill="black", stroke_width=3, anchor="mm", font_size=20)
    return result


def thickest(region: np.ndarray) -> tuple[int, int]:
    """(x, y) of a pixel of a bool [h, w] with most of the region around it."""
    window = int(0.8 * math.sqrt(region.sum())) | 1  # odd
    sums = np.pad(region, window // 2 + 1).cumsum(axis=0).cumsum(axis=1)
    around = sums[window:, window:] - sums[:-window, window:] - sums[window:, :-window] + sums[:-window, :-window]
    around = around[: region.shape[0], : region.shape[1]]
    y, x = np.unravel_index(np.argmax(np.where(region, around, -1)), region.shape)
    return int(x), int(y)


def image_scores(each: np.ndarray, background: bool) -> np.ndarray:
    """[n] mean IoU of each image over the parts that it or its answer shows (over the background, where there
    are none); each: [n, K, K] int64."""
    found = [segmentation_numbers(confusion, background).flat for confusion in each]
    parts = np.array([flat.get("parts_mIoU", math.nan) for flat in found])
    return np.where(np.isnan(parts), [flat["mIoU"] for flat in found], parts)


def article(test: SegTest, place: int, score: float) -> Html:
    """Image, truth and answer side by side; or the reason why not."""
    row = int(test.rows[place])
    name = test.images.relative(row)
    try:
        picture, *masks = test.look(row)
    except UNREADABLE as error:
        return tag("article", tag("h3", name), tag("p", why_unreadable(error)))
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    small = picture.resize(size, Image.Resampling.BICUBIC)
    shown = {"image": small}
    for title, values in zip(("truth", "answer"), masks):
        if not test.space.background:  # numbers begin with 1
            values = np.where(values == IGNORE, IGNORE, values + 1).astype(np.uint8)
        shown[title] = overlay(small, np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST)))
    figures = [
        tag("figure", image(drawn, title, SIDE), tag("figcaption", title), kind="part")
        for title, drawn in shown.items()
    ]
    words = f"mean IoU of its parts {100 * score:.1f} %, {picture.size[0]} x {picture.size[1]} px"
    return tag("article", tag("h3", name, tag("span", words)), tag("div", *figures, kind="row parts"))
