"""The files of the planted pool, good and bad: a row of its plan -> the bytes of one file."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.others import draw_other
from demo.render import render
from demo.vehicle import CAMERAS, demo_rng

HOWS = {  # the ways of each kind that has several; rows take turns
    "pixel_copy": ("png", "bmp", "webp", "jpg"),
    "near_copy": ("jpeg", "resize", "crop", "light", "logo"),
    "leak_near": ("jpeg", "resize", "crop", "light", "logo"),
    "corrupt": ("truncated", "empty", "text", "html"),
    "aspect": ("wide", "tall"),
    "exposure": ("black", "white"),
}
NOT_FOUND = "<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found.</body></html>\n"


def file_bytes(row: dict, seed: int, size: int) -> bytes:
    """The file of one row of the plan; a function of its arguments.

    Args:
        row: has path, kind, how, number (its own stream of random numbers) and shape (width and
            height in units of `size`); vehicles have pid, camid, viewid, shot; copies and leaks
            have `source`, the row of their original; frames of a track have `frame`.
        size: side of the pictures in px.
    """
    kind, how, rng = row["kind"], row["how"], demo_rng(seed, "flaw", row["kind"], row["number"])
    if kind in ("exact_copy", "leak_exact"):
        return file_bytes(row["source"], seed, size)
    if kind == "pixel_copy":
        return _same_pixels(file_bytes(row["source"], seed, size), how)
    if kind in ("near_copy", "leak_near"):
        with Image.open(io.BytesIO(file_bytes(row["source"], seed, size))) as original:
            return _almost_same(original.convert("RGB"), how, rng)
    if kind == "corrupt":
        return _corrupt(row, how, rng, seed, size)
    if kind == "non_vehicle":
        picture = draw_other(how, seed, row["number"], size)
    elif kind == "track":
        picture = _frame(row, rng, seed, size)
    else:
        picture = _vehicle(row, seed, size)
    if kind == "small":
        side = int(rng.integers(size // 4, size // 2))
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    if kind == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.08, 0.14)))
    if kind == "exposure":
        rest = rng.uniform(0.01, 0.05)  # of the contrast
        picture = picture.point([rest * v if how == "black" else 255 - rest * (255 - v) for v in range(256)] * 3)
    return encode(picture, Path(row["path"]).suffix, CAMERAS[row["camid"]].quality if "camid" in row else 88)


def encode(picture: Image.Image, ending: str, quality: int = 85) -> bytes:
    """An RGB picture as JPEG of this quality, or without loss as .png, .bmp or .webp."""
    opened = io.BytesIO()
    if ending.lower() in (".jpg", ".jpeg"):
        picture.save(opened, "JPEG", quality=quality)
    else:
        picture.save(opened, ending[1:].upper(), lossless=True)  # PNG and BMP know no loss anyway
    return opened.getvalue()


def _vehicle(row: dict, seed: int, size: int) -> Image.Image:
    width, height = (round(share * size) for share in row["shape"])
    return render(seed, row["pid"], row["camid"], row["viewid"], row["shot"], (width, height))


def _frame(row: dict, rng: np.random.Generator, seed: int, size: int) -> Image.Image:
    """A frame of a track: the same view, a pixel or two further, with noise of its own."""
    margin = max(2, size // 24)
    wide = render(seed, row["pid"], row["camid"], row["viewid"], row["shot"], (size + 2 * margin, size + 2 * margin))
    dx, dy = margin * (1 + np.sin(0.11 * row["frame"])), margin * (1 + 0.5 * np.sin(0.07 * row["frame"]))
    left, top = round(dx), round(dy)
    pixels = np.asarray(wide.crop((left, top, left + size, top + size)), dtype=float)
    pixels = pixels * rng.uniform(0.985, 1.015) + rng.normal(0, 1.5, (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _same_pixels(data: bytes, how: str) -> bytes:
    """Other bytes of the same decoded pixels: another container, or a comment in the JPEG."""
    if how == "jpg":
        text = b"saved again"
        return data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[2:]
    with Image.open(io.BytesIO(data)) as original:
        return encode(original.convert("RGB"), f".{how}")


def _almost_same(picture: Image.Image, how: str, rng: np.random.Generator) -> bytes:
    width, height = picture.size
    sign = int(rng.choice((-1, 1)))
    if how == "jpeg":
        return encode(picture, ".jpg", int(rng.integers(30, 56)))
    if how == "resize":
        factor = 1 + sign * rng.uniform(0.1, 0.3)
        wanted = (round(width * factor), round(height * factor))
        picture = picture.resize(wanted, Image.Resampling.BICUBIC)
    elif how == "crop":
        left, top, right, bottom = rng.uniform(0.01, 0.03, 4) * (width, height, width, height)
        box = (round(left + 0.5), round(top + 0.5), width - round(right), height - round(bottom))
        picture = picture.crop(box)
    elif how == "light":
        factor = 1 + sign * rng.uniform(0.07, 0.15)
        picture = picture.point([min(255, round(factor * v)) for v in range(256)] * 3)
    else:  # logo
        picture, high = picture.copy(), max(7, height // 9)
        at = (2 if sign < 0 else width - 3 * high, height - high - 3)
        ImageDraw.Draw(picture).text(
            at, "cars24", fill=(255, 255, 255), stroke_width=1, stroke_fill=(20, 20, 24), font_size=high
        )
    return encode(picture, ".jpg")


def _corrupt(row: dict, how: str, rng: np.random.Generator, seed: int, size: int) -> bytes:
    if how == "truncated":
        whole = encode(_vehicle(row, seed, size), ".jpg")
        return whole[: int(len(whole) * rng.uniform(0.3, 0.7))]
    return {"empty": b"", "text": f"photo {row['number']} to follow\n".encode(), "html": NOT_FOUND.encode()}[how]
