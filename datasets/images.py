"""One image file -> an RGB picture, whatever its format, mode and rotation. The only place that opens pictures."""

import contextlib
import errno
import io
import os
import re
import stat
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, features

from util.errors import AWAY

# what is decoded, whatever a file is called; Pillow's other decoders are old, rarely tested, or start programs
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] if features.check("avif") else [])]
ENDINGS = ".jpg .jpeg .jpe .jfif .mpo .png .webp .bmp .gif .tif .tiff .avif"
IMAGE_ENDINGS = tuple(ending for ending in ENDINGS.split() if ending != ".avif" or "AVIF" in FORMATS)
MAX_PIXELS, MAX_BYTES = 2**27, 2**29  # of one picture, before it is decoded or read; a 108-megapixel photo fits
EXIF_ORIENTATION = 0x0112
PATIENCE = 20.0  # seconds that an outage of the file system is waited for
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd EXIF and palettes, image by image
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}


class Unreadable(ValueError):
    """A file is missing, damaged or no picture; the text says why, the same for the same file."""


class Cut(NamedTuple):
    """What of a picture lies in a box: left, upper, right, lower in px of the upright picture, as EXIF turns it."""

    file: str | Path | BinaryIO
    box: tuple[int, int, int, int]

    def __fspath__(self) -> str:
        return os.fspath(self.file)

    def __str__(self) -> str:
        return f"{self.file}#{','.join(map(str, self.box))}"


def boxed(file: str | Path | BinaryIO, box) -> "str | Path | BinaryIO | Cut":
    """`file`, or what of it lies in the box; None or zeros: there is none."""
    return Cut(file, tuple(map(int, box))) if box is not None and any(box) else file


class Outage:
    """Tells a file system that is away from a file that is damaged or was never there."""

    folders: set[str] = set()  # in which a file was read
    since: float | None = None

    def wait(self, folder: str, error: OSError) -> bool:
        """Whether to try again, after a pause; raises `Unreadable` where the folder does not answer for `PATIENCE`."""
        is_away = error.errno == errno.ENOENT and folder in self.folders and not os.path.isdir(folder)
        if error.errno in LASTING and not is_away:
            return False
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since < PATIENCE:
            time.sleep(0.2)
            return True
        if os.path.isdir(folder):  # only this file cannot be read: a bad sector
            return False
        raise Unreadable(f"{AWAY}: {error.strerror}") from error


outage = Outage()


def read_bytes(file: str | Path) -> bytes:
    """A regular file, whole; raises `Unreadable`. Errors of the file system are waited for."""
    folder = os.path.dirname(os.fspath(file))
    while True:
        try:
            found = os.stat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
                raise Unreadable(f"no regular file, or larger than {MAX_BYTES:,} bytes")
            with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
                data = opened.read()
            outage.folders.add(folder)
            outage.since = None
            return data
        except Unreadable:
            raise
        except OSError as error:
            if not outage.wait(folder, error):
                raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error
        except ValueError as error:  # a zero byte or a lone surrogate
            raise Unreadable(f"no file has such a name ({error})") from error


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Around calls of Pillow: what is raised inside it, of whatever type, is `Unreadable`; our own errors pass."""
    try:
        yield
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        if not any(frame.f_globals.get("__name__", "").startswith("PIL.") for frame, _ in frames):
            raise
        text = re.sub(r" ?<_io\.[^>]*>", "", str(error))  # without memory addresses
        raise Unreadable(" ".join(f"{type(error).__name__}: {text}".split())[:200]) from error


def open_image(file: str | Path | BinaryIO, decode: bool = True) -> Image.Image:
    """The picture in the mode and the rotation in which it is stored; without `decode` only its header is read."""
    with decoding():
        image = Image.open(io.BytesIO(read_bytes(file)) if isinstance(file, (str, Path)) else file, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Unreadable(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        if decode:
            image.load()
        return image


def open_rgb(file: str | Path | BinaryIO | Cut) -> Image.Image:
    """Decode to 8-bit RGB: EXIF rotation applied, alpha over white, 16-bit scaled to 8, of a `Cut` what lies in its
    box; raises `Unreadable`."""
    return decode_rgb(open_upright(file))


def open_upright(file: str | Path | BinaryIO | Cut) -> Image.Image:
    """A picture of which only the header is read, so that `size` is known before pixels are decoded; one that EXIF
    turns, and a `Cut`, is decoded at once. Raises `Unreadable`."""
    image = open_image(file.file if isinstance(file, Cut) else file, decode=False)
    with decoding():
        if is_turned(image):
            image.load()
            image = ImageOps.exif_transpose(image)
    if not isinstance(file, Cut):
        return image
    (left, upper, right, lower), (width, height) = file.box, image.size
    if left >= width or upper >= height or right <= 0 or lower <= 0:
        raise Unreadable(f"the box {' '.join(map(str, file.box))} lies outside of its {width} x {height} px")
    return to_rgb(image).crop((max(left, 0), max(upper, 0), min(right, width), min(lower, height)))


def upright_size(file: str | Path) -> tuple[int, int] | None:
    """(width, height) of a picture as it is shown, by its header alone; None where that cannot be read."""
    with contextlib.suppress(Unreadable), decoding():
        if os.path.isfile(file):
            with Image.open(file, formats=FORMATS) as image:
                turn = image.getexif().get(EXIF_ORIENTATION, 1) if "exif" in image.info else 1
                return image.size[::-1] if turn >= 5 else image.size
    return None


def decode_rgb(image: Image.Image, factor: int = 1) -> Image.Image:
    """The pixels of what `open_upright` opened; a JPEG's sides divided by `factor` (1, 2, 4, 8): its decoder then skips
    most of the inverse cosine transform, so that big photos cost little more than their entropy decoding."""
    with decoding():
        if image.format == "JPEG" and factor > 1:  # a turned picture has lost its format
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        return to_rgb(image)


@decoding()
def is_turned(image: Image.Image) -> bool:
    """Whether EXIF asks for a rotation or mirroring before display."""
    return ("exif" in image.info or image.format != "JPEG") and image.getexif().get(EXIF_ORIENTATION, 1) != 1


@decoding()
def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, 8 bits a channel."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        is_wide = image.mode.startswith("I;16") or values.max(initial=0) > 255  # mode I does not tell
        image = Image.fromarray((values * (255 / 65535 if is_wide else 1.0)).clip(0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
