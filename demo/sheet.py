"""A contact sheet of the planted pool: a row for each kind, copies beside their originals."""

import csv
from pathlib import Path

from PIL import Image, ImageDraw

from datasets.images import UNREADABLE, open_rgb

COLUMNS = 10


def pool_sheet(pool: Path, size: int = 96) -> Image.Image:
    """RGB page of 10 cells of `size` px a kind of truth.csv, read from the files themselves.

    Where a kind has originals, each copy stands to the right of its own.
    """
    with open(pool / "truth.csv", newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    margin = 16
    page = Image.new("RGB", (COLUMNS * size, len(kinds) * (size + margin)), "white")
    draw = ImageDraw.Draw(page)
    for line, kind in enumerate(kinds):
        top = line * (size + margin)
        draw.text((2, top + 2), kind, fill="black")
        cells = []
        for row in (row for row in rows if row["kind"] == kind):
            cells += [row["of"]] * (row["of"] != "" and kind != "track") + [row["path"]]
            if len(cells) >= COLUMNS:
                break
        for column, path in enumerate(cells[:COLUMNS]):
            page.paste(_cell(pool / path, size), (column * size, top + margin))
    return page


def _cell(file: Path, size: int) -> Image.Image:
    """The picture, shrunk to fit; small ones keep their size; files that are no picture stay grey."""
    cell = Image.new("RGB", (size, size), (128, 128, 128))
    try:
        picture = open_rgb(file)
    except UNREADABLE:
        ImageDraw.Draw(cell).text((4, size // 2 - 6), f"{file.stat().st_size} bytes", fill="white")
        return cell
    picture.thumbnail((size - 2, size - 2))
    cell.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return cell
