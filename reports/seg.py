"""One page about a segmentation test: numbers by class, what is taken for what, and pictures with their parts
outlined and numbered."""

import html
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from datasets.images import UNREADABLE, why_unreadable
from datasets.path_list import printable
from datasets.seg import LabelSpace, PartsData, open_pair
from datasets.seg_train import shown_to_model
from finetune.seg_eval import PartsResult, model_size, predict_mask
from metrics.seg import IGNORE, segmentation_numbers
from models_setr import SETR
from reports.page import Section, write_page
from reports.thumbnail import jpeg_uri

SIDE = 320  # px, longer side of the embedded pictures
SHOWN = 12  # images a section
TINT = 0.5
# told apart by most colour-blind readers (Okabe and Ito, 2008); further classes have hues all around
COLOURS = ((213, 94, 0), (0, 114, 178), (240, 228, 66), (0, 158, 115), (204, 121, 167), (86, 180, 233),
           (230, 159, 0), (110, 60, 30))  # fmt: skip
SECTIONS = {
    "worst": ("Worst images", "Those of the lowest mean IoU of their own parts."),
    "random": ("Random images", "Drawn from all images that could be read, seed {seed}."),
}
STYLE = """.shown{display:flex;flex-wrap:wrap;gap:0 28px}.parts{display:flex;gap:6px}
.parts figure{width:calc(2.4*var(--s))}
.parts img{width:100%;border:1px solid #222;display:block}article h3{overflow-wrap:anywhere}
.key{display:inline-block;min-width:1.5em;padding:0 .2em;text-align:center;border:2px solid #222;
font-weight:bold;font-size:12px}.bar{display:inline-block;height:.7em;background:#06c}
.wide{overflow-x:auto}.matrix td,.matrix th{padding:.15em .5em;border:1px solid #ddd;font-size:12px}
.matrix td{text-align:right}td.num{text-align:right}"""


def colour_of(number: int) -> tuple[int, int, int]:
    """RGB of part `number`, from 1."""
    if number <= len(COLOURS):
        return COLOURS[number - 1]
    hue = int(255 * (0.61803 * number % 1))
    return Image.new("HSV", (1, 1), (hue, 200, 220)).convert("RGB").getpixel((0, 0))


def key(number: int) -> str:
    """The sign of a class in legends and pictures: its number on its colour."""
    r, g, b = colour_of(number) if number else (255, 255, 255)
    ink = "#000" if 0.3 * r + 0.6 * g + 0.1 * b > 105 else "#fff"
    return f'<span class="key" style="background:rgb({r},{g},{b});color:{ink}">{number}</span>'


def overlay(picture: Image.Image, mask: np.ndarray, first: int) -> Image.Image:
    """The picture in grey, each class from `first` on in its colour, outlined, its number where it is
    thickest; pixels without a label are hatched.

    Args:
        picture: RGB. mask: [h, w] integers of the same size.
    """
    grey = np.repeat(np.asarray(picture.convert("L"), dtype=np.float32)[:, :, None], 3, axis=2)
    classes = [c for c in np.unique(mask).tolist() if first <= c < IGNORE]
    for c in classes:
        region = mask == c
        grey[region] = (1 - TINT) * grey[region] + TINT * np.array(colour_of(c), dtype=np.float32)
    y, x = np.indices(mask.shape)
    grey[(mask == IGNORE) & ((x + y) % 6 < 2)] = 0
    edge = np.zeros(mask.shape, dtype=bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
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
    padded = np.pad(region, window // 2 + 1)
    sums = padded.cumsum(axis=0).cumsum(axis=1)
    around = sums[window:, window:] - sums[:-window, window:] - sums[window:, :-window] + sums[:-window, :-window]
    around = around[: region.shape[0], : region.shape[1]]
    y, x = np.unravel_index(np.argmax(np.where(region, around, -1)), region.shape)
    return int(x), int(y)


def image_scores(each: np.ndarray, background: bool) -> np.ndarray:
    """[n] mean IoU of each image over the parts that it or its answer shows (over the background, where there
    are none); each: [n, K, K] int64."""
    scores = np.empty(len(each))
    for row, confusion in enumerate(each):
        numbers = segmentation_numbers(confusion, background)
        value = numbers.flat.get("parts_mIoU", numbers.flat["mIoU"])
        scores[row] = numbers.flat["mIoU"] if math.isnan(value) else value
    return scores


def write_seg_report(
    file: Path,
    protocol: str,
    about: dict,
    model: SETR,
    data: PartsData,
    split: str,
    mode: str,
    result: PartsResult,
    amp_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> None:
    """Write one HTML page that needs no other file and no network; images that are shown are computed again.

    Args:
        protocol: what the numbers belong to. about: weights, set, seed.
        result: of `evaluate_parts` with this `mode`.
    Raises:
        InputError: the file cannot be written.
    """
    space = data.space
    numbers = segmentation_numbers(result.confusion, space.background)
    scores = image_scores(result.each, space.background)
    draws = np.random.default_rng(seed).permutation(len(scores))[:SHOWN]
    chosen = {"worst": np.argsort(scores, kind="stable")[:SHOWN], "random": np.sort(draws)}
    sections = [
        Section("classes", "Classes", class_table(space, numbers, result)),
        Section("confusion", "What is taken for what", confusion_table(space, result.confusion)),
        Section("legend", "Legend", legend(space), False),
    ]
    drawn: dict[int, str] = {}
    for name, rows in chosen.items():
        title, words = SECTIONS[name]
        for row in set(rows.tolist()) - set(drawn):
            drawn[row] = _article(model, data, split, mode, result, row, scores[row], amp_dtype)
        articles = "".join(drawn[row] for row in rows.tolist())
        body = f'<p>{words.format(seed=seed)}</p><div class="shown">{articles}</div>'
        sections.append(Section(name, title, body))
    tiles = {name.replace("_", " "): _percent(value) for name, value in numbers.flat.items()}
    intro = f"<p><code>{html.escape(protocol)}</code></p>"
    write_page(file, f"Part segmentation: {space.name}", intro, tiles, about, sections, STYLE)


def _percent(value: float) -> str:
    return "absent" if math.isnan(value) else f"{100 * value:.2f} %"


def class_table(space: LabelSpace, numbers, result: PartsResult) -> str:
    """IoU and accuracy of every class, its share of the pixels and in how many images it is."""
    true = result.confusion.sum(axis=1)
    images = (result.each.sum(axis=2) > 0).sum(axis=0)
    rows = ["<tr><th></th><th>class</th><th>IoU</th><th></th><th>accuracy</th><th>of the pixels</th>"
            "<th>images</th></tr>"]  # fmt: skip
    for number, name in enumerate(space.names):
        iou, acc = numbers.iou[number], numbers.acc[number]
        bar = "" if math.isnan(iou) else f'<span class="bar" style="width:{120 * iou:.0f}px"></span>'
        rows.append(
            f"<tr><td>{key(number if space.background else number + 1)}</td><td>{html.escape(name)}</td>"
            f'<td class="num">{_percent(iou)}</td><td>{bar}</td><td class="num">{_percent(acc)}</td>'
            f'<td class="num">{100 * true[number] / max(true.sum(), 1):.3f} %</td>'
            f'<td class="num">{images[number]:,}</td></tr>'
        )
    return f"<table>{''.join(rows)}</table>"


def confusion_table(space: LabelSpace, confusion: np.ndarray) -> str:
    """Each row: of the pixels of a class, how many % are taken for which."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in space.names)
    rows = [f"<tr><th>truth \\ answer</th>{heads}</tr>"]
    for name, pixels in zip(space.names, confusion):
        total = pixels.sum()
        cells = ""
        for value in pixels.tolist():
            share = value / total if total else 0.0
            text = "" if not total else "0" if not value else f"{100 * share:.1f}"
            cells += f'<td style="background:rgba(0,102,204,{0.6 * share:.2f})">{text}</td>'
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return (
        "<p>Of the pixels of each class (row), % by answer (column); an empty row: the class is absent.</p>"
        f'<div class="wide"><table class="matrix">{"".join(rows)}</table></div>'
    )


def legend(space: LabelSpace) -> str:
    """Numbers, colours and names of the classes, as the pictures have them."""
    first = 1 if space.background else 0
    keys = " ".join(
        f"{key(number + 1 - first)} {html.escape(name)}&ensp;"
        for number, name in enumerate(space.names)
        if number >= first
    )
    return (
        f"<p>{keys}</p><p>Each part has an outline and its number where it is thickest; what has neither is "
        f"{'background' if first else 'not shown'}. Hatched: without a label, not counted.</p>"
    )


def _article(model, data, split, mode, result, place: int, score: float, amp_dtype) -> str:
    """Image, truth and answer side by side; or the reason why not."""
    part, row = data.splits[split], int(result.rows[place])
    name = html.escape(printable(part.images.relative(row)))
    try:
        picture, mask = open_pair(part.images[row], part.masks[row])
    except UNREADABLE as error:
        return f"<article><h3>{name}</h3><p>{html.escape(why_unreadable(error))}</p></article>"
    truth = data.space.table[mask]
    device, crop = model.base.pos_embed.device, model.base.img_size
    with torch.inference_mode():
        imgs = shown_to_model(picture, model_size(picture.size, crop, mode)).to(device)
        answer = predict_mask(model, imgs, truth.shape, 16, amp_dtype).cpu().numpy().astype(np.uint8)
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    small = picture.resize(size, Image.Resampling.BICUBIC)
    figures = [("image", small)]
    for title, values in (("truth", truth), ("answer", answer)):
        if not data.space.background:  # numbers begin with 1
            values = np.where(values == IGNORE, IGNORE, values + 1).astype(np.uint8)
        shrunk = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
        figures.append((title, overlay(small, shrunk, 1)))
    body = "".join(
        f'<figure><img src="{jpeg_uri(image, SIDE, 85)}" alt="{title}"><figcaption>{title}</figcaption></figure>'
        for title, image in figures
    )
    size = f"{picture.size[0]} x {picture.size[1]} px"
    return (
        f"<article><h3>{name}<span>mean IoU of its parts {100 * score:.1f} %, {size}</span></h3>"
        f'<div class="parts">{body}</div></article>'
    )
