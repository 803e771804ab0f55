"""One page about a test of fine-grained classes: which are confused, with what, and what was looked at."""

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from datasets.fgvc import FgvcImages
from datasets.fgvc_train import CenterCrops
from datasets.path_list import printable
from metrics.fgvc import ClassScores
from reports.page import Pictures, Section, mark, write_page
from reports.rollout import HEAT
from reports.svg import FILLED, SOLID, chart, steps
from reports.thumbnail import jpeg_uri

WORST, PAIRS, SIDE = 15, 8, 4  # classes in the first table; confused pairs; pictures of each class of a pair
MATRIX = 588  # px, side of the drawn confusion matrix at most
PARTS_SIDE = 240  # px of the pictures with parts
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45",
           "#fabed4", "#469990", "#dcbeff", "#9a6324", "#fffac8", "#800000", "#aaffc3")  # fmt: skip
STYLE = """.pair{display:flex;flex-wrap:wrap;gap:24px}
.pair h4{margin:.2em 0;font-weight:normal;max-width:360px}
.matrix{image-rendering:pixelated;max-width:100%;border:1px solid #ccc}.parts{--s:200px;gap:14px}
td.num{text-align:right;padding-right:2em}summary{cursor:pointer;margin:.6em 0;color:#06c}"""


@dataclass(frozen=True)
class Answers:
    """What the page is about: n images in the order of `logits` [n, K] float32, all classes by name."""

    images: FgvcImages
    classes: list[str]
    logits: torch.Tensor
    scores: ClassScores

    @property
    def answers(self) -> torch.Tensor:
        return self.logits.argmax(dim=1)

    def name(self, number: int) -> str:
        return html.escape(printable(self.classes[number]))


def write_fgvc_report(
    file: Path,
    protocol: str,
    facts: dict[str, object],
    found: Answers,
    parts: Callable[[torch.Tensor], torch.Tensor] | None,
    crops: CenterCrops,
    patches: tuple[int, int, int],
    shown: int = 12,
    seed: int = 0,
) -> None:
    """Write one HTML page that needs no other file and no network.

    Args:
        protocol: the line that belongs to the numbers. facts: weights, set, seed.
        parts: [n, 3, H, W] uint8 -> [n, h] int64, the part patch of each head; None: the model has none.
        crops: the test images as the model sees them, in the order of `found`.
        patches: columns of the grid of patches, px from patch to patch, px of a patch.
        shown: pictures a section. seed: of the random draw.
    Raises:
        InputError: the file cannot be written.
    """
    numbers, pictures = found.scores.numbers, Pictures()
    shares = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean per class", "majority": "majority"}
    tiles = {title: f"{100 * numbers[name]:.2f} %" for name, title in shares.items()}
    tiles |= {"images": f"{len(found.images):,}", "classes": f"{numbers['classes_with_images']:,}"}
    sections = [
        Section("classes", "Classes", class_charts(found) + class_tables(found)),
        Section("confusion", "Confusion", matrix_picture(found)),
        Section("pairs", "Most confused classes", confused_pairs(found, pictures)),
        Section("sure", "Sure and wrong", sure_and_wrong(found, pictures, shown)),
    ]
    if parts is not None:
        rows = drawn_rows(found, shown, seed)
        body = part_pictures(found, rows, parts, crops, patches)
        sections.append(Section("parts", "Selected parts", body))
    intro = f"<p><code>{html.escape(protocol)}</code></p>"
    write_page(file, "Fine-grained classes", intro, tiles, facts, sections, STYLE)


def class_charts(found: Answers) -> str:
    """How the classes spread, and how far down the list the right one is."""
    share, images = found.scores.per_class()
    share = 100 * share[images > 0].numpy()
    heights, edges = np.histogram(share, 20, (0, 100))
    caption = f"Median {np.median(share):.1f} %; {(share == 0).sum():,} of {len(share):,} classes are never right."
    first = chart("Classes by their accuracy", (0, 100), (0, max(heights.max(), 1)),
                  {"": (*steps(edges, heights), FILLED)}, "% of its images", "classes", caption)  # fmt: skip
    last = min(20, max(len(found.classes), 2))
    ks = range(1, last + 1)
    right = [100 * (found.scores.ranks < k).float().mean().item() for k in ks]
    some = ", ".join(f"{k}: {right[k - 1]:.1f} %" for k in (1, 2, 5, 10, 20) if k <= last)
    second = chart("Right class among the first k", (1, last), (0, 100), {"": (ks, right, SOLID)},
                   "k", "% of the images", f"Images with their class in the first k. {some}.")  # fmt: skip
    return f'<div class="charts">{first}{second}</div>'


def class_tables(found: Answers) -> str:
    """The worst classes, of equal ones those with more images first; all of them behind a click."""
    share, images = found.scores.per_class()
    has = (images > 0).nonzero()[:, 0].tolist()
    order = sorted(has, key=lambda number: (float(share[number]), -int(images[number])))
    head = "<tr><th>class</th><th>right</th><th>images</th><th>most frequent wrong answer</th></tr>"

    def row(number: int) -> str:
        wrong = found.scores.confusion[number].clone()
        wrong[number] = 0
        most = int(wrong.argmax())
        other = f"{found.name(most)} ({int(wrong[most])} x)" if wrong[most] else "none"
        right = f"{100 * share[number]:.1f} %"
        return (
            f'<tr><td>{found.name(number)}</td><td class="num">{right}</td>'
            f'<td class="num">{int(images[number])}</td><td>{other}</td></tr>'
        )

    worst = "".join(map(row, order[:WORST]))
    text = f"<h3>The {min(WORST, len(order))} worst</h3><table>{head}{worst}</table>"
    if len(order) > WORST:
        rows = "".join(map(row, order))
        text += f"<details><summary>all {len(order):,} classes</summary><table>{head}{rows}</table></details>"
    absent = len(images) - len(order)
    return text + (f"<p>{absent:,} further classes have no test image.</p>" if absent else "")


def matrix_picture(found: Answers) -> str:
    """Rows: classes, columns: answers, in the order of the classes; share of a row's images."""
    confusion = found.scores.confusion.numpy()
    share = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    stops = np.linspace(0, 1, len(HEAT))
    level = np.sqrt(share)  # so that a single image of many is seen
    pixels = np.stack([np.interp(level, stops, channel) for channel in zip(*HEAT)], axis=-1)
    picture, data = Image.fromarray(pixels.round().astype(np.uint8)), io.BytesIO()
    times = min(max(MATRIX // len(share), 1), 24)
    picture.resize((times * len(share),) * 2, Image.Resampling.NEAREST).save(data, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    wrong = int(confusion.sum() - confusion.trace())
    return (
        "<p>Row: class, column: answer, both in the order of the classes' names, from the upper left on. "
        f"Black: none of the class's images, light yellow: all. {wrong:,} of {confusion.sum():,} answers "
        f'lie off the diagonal.</p><img class="matrix" src="{uri}" alt="confusion of {len(share)} classes">'
    )


def confused_pairs(found: Answers, pictures: Pictures) -> str:
    """The two-way most confused classes side by side, images that were taken for the other first."""
    confusion = found.scores.confusion
    both = (confusion + confusion.t()).triu(1)
    order = both.flatten().argsort(descending=True, stable=True)[:PAIRS].tolist()
    pairs = [divmod(place, len(both)) for place in order if both.flatten()[place]]
    text = (
        "Pairs of classes by the number of images of either that are taken for the other; those images come "
        f"first. {mark('right')}: answered right, {mark('wrong')}: taken for the other class; no mark: for a "
        "third, which is named."
    )
    articles = []
    for one, other in pairs:
        times = [int(confusion[one, other]), int(confusion[other, one])]
        sides = "".join(
            pair_side(found, pictures, a, b, count) for a, b, count in zip((one, other), (other, one), times)
        )
        articles.append(f'<article class="pair">{sides}</article>')
    return f"<p>{text}</p>" + ("".join(articles) or "<p>No class is taken for another.</p>")


def pair_side(found: Answers, pictures: Pictures, number: int, other: int, times: int) -> str:
    """Pictures of one class of a pair."""
    rows = np.flatnonzero(found.images.labels == number)
    answers = found.answers.numpy()[rows]
    order = np.argsort(np.where(answers == other, 0, np.where(answers == number, 1, 2)), kind="stable")[:SIDE]
    cards = []
    for row, answer in zip(rows[order].tolist(), answers[order].tolist()):
        kind = {other: "wrong", number: "right"}.get(answer, "")
        picture = pictures.one(found.images.paths, row, f"{found.name(number)}, answer {found.name(answer)}")
        cards.append(f'<li class="{kind}">{picture}{mark(kind) if kind else found.name(answer)}</li>')
    title = f"<b>{found.name(number)}</b><br>{times} of {len(rows)} taken for the other"
    return f"<div><h4>{title}</h4><ol>{''.join(cards)}</ol></div>"


def sure_and_wrong(found: Answers, pictures: Pictures, shown: int) -> str:
    """Wrong answers by the probability that the model gives them."""
    probability, answers = found.logits.softmax(dim=1).max(dim=1)
    wrong = (found.scores.ranks > 0).nonzero()[:, 0]
    rows = wrong[probability[wrong].argsort(descending=True, stable=True)][:shown].tolist()
    cards = "".join(
        f'<li class="wrong">{pictures.one(found.images.paths, row, "wrong")}{100 * probability[row]:.0f} %: '
        f"{found.name(int(answers[row]))}<br>is {found.name(int(found.images.labels[row]))}</li>"
        for row in rows
    )
    text = "Wrong answers with the highest probability: some are mistakes of the labels."
    return f"<p>{text}</p>" + (f"<ol>{cards}</ol>" if cards else "<p>No answer is wrong.</p>")


def drawn_rows(found: Answers, shown: int, seed: int) -> list[int]:
    """Random images, half of them answered right as far as there are any."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    right = found.scores.ranks.numpy() == 0
    order = [rng.permutation(np.flatnonzero(chosen)) for chosen in (right, ~right)]
    half = max(shown // 2, shown - len(order[1]))
    rows = np.concatenate([order[0][:half], order[1]])[:shown]
    return rows.tolist()


def part_pictures(
    found: Answers,
    rows: list[int],
    parts: Callable[[torch.Tensor], torch.Tensor],
    crops: CenterCrops,
    patches: tuple[int, int, int],
) -> str:
    """Test images as the model sees them, each head's part in a frame of its own colour."""
    imgs = torch.stack([crops[row][0] for row in rows])
    chosen, answers = parts(imgs).cpu(), found.answers
    cards = []
    for row, pixels, ids in zip(rows, imgs, chosen.tolist()):
        uri = jpeg_uri(framed(pixels, ids, patches), PARTS_SIDE, quality=85)
        kind = "right" if found.scores.ranks[row] == 0 else "wrong"
        words = found.name(int(answers[row]))
        words += "" if kind == "right" else f"<br>is {found.name(int(found.images.labels[row]))}"
        cards.append(f'<li class="{kind}"><img src="{uri}" alt="selected parts">{mark(kind)}<br>{words}</li>')
    kinds = [len(set(ids)) for ids in chosen.tolist()]
    text = (
        f"The patch that each of the {chosen.shape[1]} heads leads to (a colour a head; heads may agree: "
        f"{np.mean(kinds):.1f} different patches an image here). Only these and the class token reach "
        "the last block."
    )
    return f'<p>{text}</p><ol class="parts">{"".join(cards)}</ol>'


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
