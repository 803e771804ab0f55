"""What is measured of one image: hashes, size, light, sharpness, a thumbnail; one decode an image."""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from curation.sources import JoinedImages, parse_box
from datasets.images import UNREADABLE, open_rgb, why_unreadable

FIELDS = (
    "source", "role", "path", "identity", "camera", "bytes", "width", "height", "box", "sha256", "pixels",
    "phash", "brightness", "contrast", "sharpness", "problem",
)  # fmt: skip
SIDE = 32  # px of a thumbnail


def measure_image(images: JoinedImages, number: int, margin: float) -> tuple[list[str], np.ndarray]:
    """One row of index.csv, the values of `FIELDS` as texts, and its thumbnail, [32, 32] uint8 grey.

    `problem` says why an image is unreadable; its thumbnail is black.
    """
    thumbnail = np.zeros((SIDE, SIDE), dtype=np.uint8)
    source = images.sources[images.locate(number)[0]]
    row = dict.fromkeys(FIELDS, "")
    row |= {"source": source.name, "role": source.role, "path": images.name(number)}
    row |= {"identity": images.text(number, "identity"), "camera": images.text(number, "camera")}
    try:
        row["path"].encode("utf-8")  # names that are not UTF-8 fit into no table
        opened = images[number]
        data = opened.read_bytes() if isinstance(opened, Path) else opened.read()
        row |= {"bytes": str(len(data)), "sha256": hashlib.sha256(data).hexdigest()}
        image = open_rgb(io.BytesIO(data))
        box = images.text(number, "box")
        if box:
            cut = parse_box(box, *image.size, margin)
            image = image.crop(cut)
            row["box"] = " ".join(map(str, cut))
        grey = image.convert("L")
        thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
        row |= measure_pixels(image, grey, thumbnail)
    except UNREADABLE as error:
        row["problem"] = why_unreadable(error)
    return list(row.values()), thumbnail


def measure_pixels(image: Image.Image, grey: Image.Image, thumbnail: np.ndarray) -> dict[str, str]:
    """RGB and grey picture -> size (px), hash of the pixels, perceptual hash, and of the grey picture at no
    more than 256 px: mean and standard deviation (0 to 255) and the deviation of its Laplacian."""
    small = grey.copy()
    small.thumbnail((256, 256), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32)
    size = np.array(image.size, dtype=np.int64).tobytes()  # one row of pixels is not one column of them
    return {
        "width": str(image.width),
        "height": str(image.height),
        "pixels": hashlib.sha256(size + image.tobytes()).hexdigest(),
        "phash": f"{perceptual_hash(thumbnail):016x}",
        "brightness": f"{values.mean():.1f}",
        "contrast": f"{values.std():.1f}",
        "sharpness": f"{sharpness(values):.2f}",
    }


def sharpness(grey: np.ndarray) -> float:
    """Standard deviation of the Laplacian of [H, W] float32; 0 for pictures under 3 px."""
    if min(grey.shape) < 3:
        return 0.0
    middle = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * middle).std())


def _cosines() -> np.ndarray:
    """[8, 32] the lowest rows of the cosine transform (type II), without the constant one: 1 to 8."""
    k, n = np.arange(1, 9)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


COSINES = _cosines()


def perceptual_hash(thumbnail: np.ndarray) -> int:
    """64 bits: which of 8 x 8 low frequencies of the [32, 32] uint8 grey picture lie above their median."""
    low = COSINES @ thumbnail.astype(np.float64) @ COSINES.T
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
