"""One image file -> an RGB picture, whatever its format, mode and rotation."""

import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from util.errors import InputError

EXIF_ORIENTATION = 0x0112


def open_rgb(file: str | Path | BinaryIO) -> Image.Image:
    """Decode to 8-bit RGB: EXIF rotation applied, alpha over white, 16-bit scaled to 8.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: the file is missing,
            truncated or no image (Pillow's own exceptions; `UNREADABLE` lists them).
    """
    return open_reduced(file, lambda width, height: 1)[0]


def open_reduced(
    file: str | Path | BinaryIO, reduction: Callable[[int, int], int]
) -> tuple[Image.Image, tuple[int, int]]:
    """As `open_rgb`, but a JPEG is decoded to 1/2, 1/4 or 1/8 where that suffices.

    The decoder then skips most of the inverse cosine transform, so big photos cost little more than
    their entropy decoding.

    Args:
        reduction: called once, (width, height) in px of the upright picture -> factor: 1, 2, 4 or 8.
    Returns:
        The RGB picture and the (width, height) it has when not reduced.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and palettes, image by image
        with Image.open(file) as image:
            if is_turned(image):
                image.load()
                image = ImageOps.exif_transpose(image)
            full_size = image.size
            factor = reduction(*full_size)
            if image.format == "JPEG" and factor > 1:  # a turned picture has lost its format
                image.draft(None, (full_size[0] // factor, full_size[1] // factor))
            image.load()
        return to_rgb(image), full_size


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF asks for a rotation or mirroring before display."""
    return ("exif" in image.info or image.format != "JPEG") and image.getexif().get(EXIF_ORIENTATION, 1) != 1


UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


def why_unreadable(error: Exception) -> str:
    """One line for lists and logs; the same for the same file, so without memory addresses."""
    text = re.sub(r" ?<_io\.[^>]*>", "", f"{type(error).__name__}: {error}")
    return " ".join(text.split())


def open_given(file: str | Path, flag: str) -> Image.Image:
    """`open_rgb` of a picture that a flag names; InputError where it cannot be read."""
    try:
        return open_rgb(file)
    except UNREADABLE as error:
        raise InputError(f"{flag} {file} cannot be read: {why_unreadable(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, 8 bits a channel."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        is_wide = image.mode.startswith("I;16") or values.max(initial=0) > 255  # mode I does not tell
        scale = 255 / 65535 if is_wide else 1.0
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
