"""One image file -> an RGB picture, whatever its format, mode and rotation."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def open_rgb(path: str | Path) -> Image.Image:
    """Decode to 8-bit RGB: EXIF rotation applied, alpha over white, 16-bit scaled to 8.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: the file is missing,
            truncated or no image (Pillow's own exceptions; `UNREADABLE` lists them).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and palettes, image by image
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)


UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, 8 bits a channel."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
