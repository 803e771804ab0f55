"""Pictures without any vehicle: what a careless crawl brings along."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.scene import render_place
from demo.vehicle import CAMERAS, COLOURS, demo_rng

WORDS = "the of and sale price open house market report notes weekly river winter music garden".split()
SUBJECTS = {  # short captions
    "place": "an empty place without any vehicle",
    "gradient": "a smooth colour gradient",
    "texture": "a rough texture",
    "chart": "a chart on white paper",
    "page": "a page of printed text",
    "shapes": "overlapping coloured shapes",
    "flower": "a flower seen from close by",
}


def draw_other(subject: str, seed: int, number: int, size: int) -> Image.Image:
    """One RGB picture, `size` px square, of a subject of `SUBJECTS`; a function of its arguments."""
    if subject == "place":
        return render_place(seed, number % len(CAMERAS), number, size)
    draw = {"gradient": _gradient, "texture": _texture, "chart": _chart, "page": _page, "shapes": _shapes}
    return draw.get(subject, _flower)(demo_rng(seed, "other", subject, number), size)


def _colour(rng: np.random.Generator) -> tuple:
    return tuple(rng.integers(0, 256, 3).tolist())


def _cubic(pixels: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)


def _gradient(rng, size):
    return _cubic(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8), size)


def _texture(rng, size):
    page = np.zeros((size, size, 3))
    for cells, weight in ((6, 0.5), (16, 0.3), (size, 0.2)):  # coarse to fine, as in bark or cloth
        shape = (cells, max(2, cells // int(rng.integers(1, 5))), 3)
        page += weight * np.asarray(_cubic(rng.integers(0, 256, shape, dtype=np.uint8), size))
    tint = np.array(_colour(rng)) / 255
    grey = page.mean(axis=2, keepdims=True)
    return Image.fromarray((grey * (0.4 + 0.6 * tint)).clip(0, 255).astype(np.uint8))


def _chart(rng, size):
    page = Image.new("RGB", (size, size), "white")
    draw, unit = ImageDraw.Draw(page), size / 20
    for row in range(4, 18, 3):
        draw.line([(2 * unit, row * unit), (19 * unit, row * unit)], fill=(214, 216, 220))
    heights, fill = rng.uniform(2, 14, 8), _colour(rng)
    tops = [((3 + 2 * k) * unit, (18 - heights[k]) * unit) for k in range(8)]
    if rng.random() < 0.5:
        for x, y in tops:
            draw.rectangle([x, y, x + 1.4 * unit, 18 * unit], fill=fill)
    else:
        draw.line(tops, fill=fill, width=max(1, round(unit / 2)))
    draw.line([(2 * unit, 2 * unit), (2 * unit, 18 * unit), (19 * unit, 18 * unit)], fill=(40, 40, 44))
    return page


def _page(rng, size):
    page = Image.new("RGB", (size, size), tuple(rng.integers(225, 256, 3).tolist()))
    draw, high = ImageDraw.Draw(page), max(8, size // 10)
    for y in range(high // 2, size, high + 2):
        line = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), 6))
        draw.text((high // 2, y), line, fill=(40, 40, 48), font_size=high)
    return page


def _shapes(rng, size):
    page = Image.new("RGB", (size, size), _colour(rng))
    draw = ImageDraw.Draw(page)
    for _ in range(int(rng.integers(5, 10))):
        x, y, r = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0.08, 0.35) * size
        if rng.random() < 0.5:
            draw.ellipse([x - r, y - r, x + r, y + r], fill=_colour(rng))
        else:
            draw.regular_polygon((x, y, r), int(rng.integers(3, 7)), int(rng.integers(0, 360)), _colour(rng))
    return page


def _flower(rng, size):
    """Petals around a disc before a blurred lawn."""
    over = 3 * size
    lawn = _cubic(rng.integers((20, 70, 10), (70, 150, 50), (9, 9, 3)), over)
    page = lawn.filter(ImageFilter.GaussianBlur(over / 60))
    x, y, r = over * rng.uniform(0.4, 0.6), over * rng.uniform(0.4, 0.6), over * rng.uniform(0.26, 0.4)
    petals, turn = int(rng.integers(5, 13)), rng.uniform(0, 6)
    fill = COLOURS[("white", "red", "yellow", "orange", "blue")[rng.integers(5)]]
    angles = turn + 2 * np.pi * np.arange(petals) / petals
    for k, angle in enumerate(angles):
        shade = tuple(int(c * (0.82 + 0.18 * (k % 2))) for c in fill)
        at = (x + 0.62 * r * np.cos(angle), y + 0.62 * r * np.sin(angle))
        ImageDraw.Draw(page).circle(at, r * min(0.42, 2.2 / petals), fill=shade)
    ImageDraw.Draw(page).circle((x, y), 0.36 * r, fill=(120, 84, 20))
    return page.reduce(3)
