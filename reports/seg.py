"""The page of a segmentation test: numbers by class, what is taken for what, and pictures with their parts outlined
and numbered."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw

from datasets.images import Unreadable
from datasets.path_list import PathList
from metrics.seg import IGNORE, segmentation_numbers
from reports.page import Html, Page, confusion_table, image, percent, tag, worst_table

SIDE, SHOWN = 320, 12  # px, longer side of the embedded pictures; images a section
COLOURS = (255 * np.array(colormaps["tab20"].colors)).astype(np.uint8)  # of class 1, 2 ...; then from the first again


class SegTest(NamedTuple):
    """What was scored. rows: [n] int64 of the `images` that could be read; each: [n, K, K] int64, their confusion
    matrices, row: truth, column: answer; unreadable: `path<tab>reason` of the others."""

    images: PathList
    rows: np.ndarray
    each: np.ndarray
    unreadable: list[str]


def write_seg_report(file: Path, protocol: str, facts: dict, space, test: SegTest, look: Callable) -> None:
    """Write the page; images that are shown are computed again. protocol: what the numbers belong to. space: the
    classes: `name`, `names`, whether the first is `background`. look: row -> the picture, its truth and the model's
    answer, [h, w] uint8 classes at its size; raises Unreadable."""
    confusion = test.each.sum(axis=0)
    numbers = segmentation_numbers(confusion, space.background)
    tiles = {name.replace("_", " "): percent(value, " %", "absent") for name, value in numbers.flat.items()}
    page = Page(f"Part segmentation: {space.name}", protocol, tiles, facts)
    page.section("Classes", "With their numbers in the pictures. Black there: no label, not counted.")
    rows, true, images = [], confusion.sum(axis=1), (test.each.sum(axis=2) > 0).sum(axis=0)
    for k in np.argsort(numbers.iou, kind="stable").tolist():
        number = k + (not space.background)
        colour = "{},{},{}".format(*COLOURS[(number - 1) % len(COLOURS)]) if number else "255,255,255"
        sign = tag("span", number, kind="key", style=f"background:rgb({colour});color:#000")
        shares = numbers.iou[k], numbers.acc[k], true[k] / max(true.sum(), 1)
        rows.append([sign, space.names[k], *(percent(x, " %", "absent") for x in shares), f"{images[k]:,}"])
    page.add(worst_table(["", "class", "IoU", "accuracy", "of the pixels", "images"], rows))
    page.section("What is taken for what", "Of the pixels of each class (row), by answer (column).")
    page.add(confusion_table(space.names, confusion))
    # mean IoU of each image over the parts that it or its answer shows, or over the background, where there are none
    found = [segmentation_numbers(each, space.background).flat for each in test.each]
    scores = [flat["mIoU"] if math.isnan(parts := flat.get("parts_mIoU", math.nan)) else parts for flat in found]
    worst, drawn = np.argsort(scores, kind="stable"), np.random.default_rng(0).permutation(len(scores))
    for title, places in ("Worst images, by the mean IoU of their parts", worst), ("Random images", drawn):
        page.section(title)
        articles = (article(test, place, scores[place], look, space.background) for place in places[:SHOWN].tolist())
        page.add(tag("div", *articles, kind="row"))
    page.write(file)


def overlay(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """An RGB picture in grey, each class of the mask [h, w] from 1 on in its colour, outlined, with its number;
    pixels without a label are black."""
    pixels = np.asarray(picture.convert("L").convert("RGB")).copy()
    classes = [c for c in np.unique(mask).tolist() if 1 <= c < IGNORE]
    for c in classes:
        pixels[mask == c] = pixels[mask == c] // 2 + COLOURS[(c - 1) % len(COLOURS)] // 2
    pixels[mask == IGNORE] = 0
    pixels[(np.diff(mask, axis=1, prepend=mask[:, :1]) != 0) | (np.diff(mask, axis=0, prepend=mask[:1]) != 0)] = 255
    result = Image.fromarray(pixels)
    draw = ImageDraw.Draw(result)
    for c in classes:
        places = np.argwhere(mask == c)
        y, x = places[len(places) // 2].tolist()  # a pixel of the class, half-way down it
        draw.text((x, y), str(c), fill="white", stroke_fill="black", stroke_width=3, anchor="mm", font_size=20)
    return result


def article(test: SegTest, place: int, score: float, look: Callable, background: bool) -> Html:
    """Image, truth and answer side by side; or the reason why not."""
    name = test.images.relative(row := int(test.rows[place]))
    try:
        picture, *masks = look(row)
    except Unreadable as error:
        return tag("article", tag("h3", name), tag("p", str(error)))
    size = tuple(max(1, round(side * SIDE / max(picture.size))) for side in picture.size)
    shown = {"image": (small := picture.resize(size, Image.Resampling.BICUBIC))}
    for title, values in zip(("truth", "answer"), masks):
        if not background:  # numbers begin with 1
            values = np.where(values == IGNORE, IGNORE, values + 1).astype(np.uint8)
        shown[title] = overlay(small, np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST)))
    figures = [tag("figure", image(x, of, SIDE), tag("figcaption", of), kind="part") for of, x in shown.items()]
    return tag("article", tag("h3", name, tag("span", percent(score, " %"))), tag("div", *figures, kind="row parts"))
