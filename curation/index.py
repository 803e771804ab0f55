"""Every image of every source is opened once: index.csv and thumbnails.npy; in the end some rows are manifest.csv."""

import csv
import hashlib
import io
import math
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from curation.sources import JoinedImages
from datasets.images import open_rgb, read_bytes
from datasets.path_list import PackedImages
from util.dist import is_main_process
from util.errors import InputError
from util.files import read_arrays, write_atomic
from util.parallel import Parts, map_in_order, shared, worker_pool
from util.progress import Progress

FIELDS = (
    "source", "role", "path", "identity", "camera", "bytes", "width", "height", "box", "sha256", "pixels",
    "phash", "brightness", "contrast", "sharpness", "problem",
)  # fmt: skip
MANIFEST = ("path", "source", "sha256", "width", "height", "box", "identity", "camera")
MEASURED = {"width": np.int32, "height": np.int32} | dict.fromkeys(("brightness", "contrast", "sharpness"), np.float32)
SIDE = 32  # px of a thumbnail
PART_IMAGES = 4096
BLOCK_ROWS = 65_536  # rows of the table that are Python objects at a time
# [8, 32] the lowest rows of the cosine transform (type II) without the constant one
COSINES = np.cos(np.pi * np.arange(1, 9)[:, None] * (2 * np.arange(SIDE)[None] + 1) / (2 * SIDE))


class Index(SimpleNamespace):
    """Columns of index.csv as arrays [N]; texts of which only equality matters are numbers (-1: empty).

    sources: names; source: int32 (into `sources`), excluded, readable: bool, width, height: int32 px, box: [N, 4]
    int32 px (zeros: none), file_hash, pixel_hash: [N, 2] uint64 (their first 128 bits), phash: uint64, brightness,
    contrast, sharpness: float32, identity, camera: int32.
    """

    def __len__(self) -> int:
        return len(self.source)


def build_index(images: JoinedImages, folder: Path, job: dict, margin: float, workers: int | None) -> None:
    """Write folder/index.csv and folder/thumbnails.npy, [N, 32, 32] uint8 grey; the ranks share the work, a killed run
    goes on at the first part that is missing."""
    parts = Parts(folder / "index.parts", job, "unfinished index", len(images), PART_IMAGES, ".npz")
    progress = Progress("opened", parts.items_to_do(), shown=is_main_process())
    workers = workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with worker_pool(workers, (images, margin)) as pool:
        for start in parts.todo:
            numbers = range(start, parts.stop(start))
            rows, thumbnails = zip(*map_in_order(pool, _measure_chunk, numbers, workers))
            table = np.frombuffer(csv_bytes(rows), dtype=np.uint8)
            arrays = {"table": table, "thumbnails": np.stack(thumbnails)}
            write_atomic(parts.file(start), lambda opened, arrays=arrays: np.savez(opened, **arrays))
            progress.update(progress.done + len(rows))
    progress.close()
    if parts.complete():
        done = [read_arrays(parts.file(start)) for start in parts.starts]
        for start in [start for start, part in zip(parts.starts, done) if part is None]:
            parts.file(start).unlink()
        if any(part is None for part in done):
            raise InputError(f"parts of {parts.folder} were damaged and are removed: run the same command again")
        thumbnails = np.concatenate([part["thumbnails"] for part in done])
        table = b"".join([csv_bytes([FIELDS]), *(part["table"].tobytes() for part in done)])
        write_atomic(folder / "thumbnails.npy", lambda opened: np.save(opened, thumbnails))
        write_atomic(folder / "index.csv", lambda opened: opened.write(table))
        parts.remove()


def csv_bytes(rows: Iterable) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


def _measure_chunk(numbers: list[int]) -> list[tuple[list, np.ndarray]]:
    images, margin = shared()
    return [measure_image(images, number, margin) for number in numbers]


def measure_image(images: JoinedImages, number: int, margin: float) -> tuple[list, np.ndarray]:
    """Return one row of index.csv, the values of `FIELDS`, and the thumbnail, [32, 32] uint8 grey: black where
    `problem` says why an image is unreadable; light and sharpness are those at up to 256 px."""
    thumbnail, source = np.zeros((SIDE, SIDE), dtype=np.uint8), images.locate(number)[0]
    row = dict.fromkeys(FIELDS, "") | {"source": source.name, "role": source.role, "path": images.name(number)}
    row |= {name: images.text(number, name) for name in ("identity", "camera")}
    try:
        row["path"].encode("utf-8")  # names that are not UTF-8 fit into no table
        opened = images[number]
        data = read_bytes(opened) if isinstance(opened, Path) else opened.read()
        row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        image = open_rgb(io.BytesIO(data))
        if box := images.text(number, "box"):
            cut = parse_box(box, *image.size, margin)
            image = image.crop(cut)
            row["box"] = " ".join(map(str, cut))
        grey = image.convert("L")
        thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
        grey.thumbnail((256, 256), Image.Resampling.BOX)
        values = np.asarray(grey, dtype=np.float32)
        size = np.array(image.size, dtype=np.int64).tobytes()  # one row of pixels is not one column of them
        row |= {"pixels": hashlib.sha256(size + image.tobytes()).hexdigest(), "phash": perceptual_hash(thumbnail)}
        row |= {"width": image.width, "height": image.height, "sharpness": f"{sharpness(values):.2f}"}
        row |= {"brightness": f"{values.mean():.1f}", "contrast": f"{values.std():.1f}"}
    except ValueError as error:  # `Unreadable`, such a name, or a box that is none
        row["problem"] = str(error)
    return list(row.values()), thumbnail


def parse_box(text: str, width: int, height: int, margin: float) -> tuple[int, int, int, int]:
    """Read `left upper right lower` in px (spaces, commas or semicolons), grow it by `margin` of its size on each side
    and cut it to the picture.

    Raises:
        ValueError: not four numbers, or nothing of the box lies in the picture.
    """
    numbers = [float(part) for part in text.replace(",", " ").replace(";", " ").strip("[]() ").split()]
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"the box '{text}' is not four numbers, left upper right lower")
    left, upper, right, lower = numbers
    grow_x, grow_y = margin * (right - left), margin * (lower - upper)
    left, upper = max(0, round(left - grow_x)), max(0, round(upper - grow_y))
    right, lower = min(width, round(right + grow_x)), min(height, round(lower + grow_y))
    if left >= right or upper >= lower:
        raise ValueError(f"the box '{text}' leaves nothing of a picture of {width} x {height} px")
    return left, upper, right, lower


def sharpness(grey: np.ndarray) -> float:
    """Standard deviation of the Laplacian of [H, W] float32; 0 for pictures under 3 px."""
    if min(grey.shape) < 3:
        return 0.0
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).std())


def perceptual_hash(thumbnail: np.ndarray) -> str:
    """64 bits in hex: which of 8 x 8 low frequencies of the [32, 32] uint8 grey picture lie above their median."""
    low = COSINES @ thumbnail.astype(np.float64) @ COSINES.T
    return np.packbits((low > np.median(low)).ravel()).tobytes().hex()


def read_rows(file: Path):
    """Yield the rows of index.csv as dicts, one at a time."""
    with open(file, encoding="utf-8", newline="") as opened:
        yield from csv.DictReader(opened)


def load_index(file: Path) -> Index:
    """Read index.csv into arrays, block by block."""
    known: dict[str, dict[str, int]] = {column: {} for column in ("source", "identity", "camera")}
    rows, blocks = read_rows(file), []
    while block := list(islice(rows, BLOCK_ROWS)):
        blocks.append(_columns(block, known))
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return Index(sources=list(known["source"]), **columns)


def _columns(rows: list[dict[str, str]], known: dict[str, dict[str, int]]) -> dict[str, np.ndarray]:
    def hashes(name: str) -> np.ndarray:
        return np.array([[int(row[name][i : i + 16] or "0", 16) for i in (0, 16)] for row in rows], dtype=np.uint64)

    columns: dict[str, np.ndarray] = {
        "excluded": np.array([row["role"] == "exclude" for row in rows]),
        "readable": np.array([not row["problem"] for row in rows]),
        "phash": hashes("phash")[:, 0],
        "box": np.array([row["box"].split() or (0, 0, 0, 0) for row in rows], dtype=np.int32),
        "file_hash": hashes("sha256"),
        "pixel_hash": hashes("pixels"),
    }
    for column, numbers in known.items():  # the same id in two sources is two vehicles
        prefixes = ["" if column == "source" else row["source"] + "\0" for row in rows]
        keys = [row[column] and prefix + row[column] for prefix, row in zip(prefixes, rows)]
        columns[column] = np.array([numbers.setdefault(key, len(numbers)) if key else -1 for key in keys], np.int32)
    return columns | {
        name: np.array([float(row[name] or 0) for row in rows], dtype=dtype) for name, dtype in MEASURED.items()
    }


def write_manifest(folder: Path, cut_folder: str, images: JoinedImages, selection: np.ndarray, extra: dict) -> int:
    """Write folder/manifest.csv, one row a selected image in the order of the index.

    Images that have no file of their own, or of which a box is wanted, are written to folder/images as they will be
    trained on (packed images byte for byte, boxes as JPEG of quality 95); all others stay where they are.

    Args:
        cut_folder: name of the folder in folder/images, another one for another index.
        selection: [n] int64 index rows, ascending. extra: further columns, n values each.
    Returns:
        How many images were written.
    """
    table, written, rows = [[*MANIFEST, *extra]], 0, enumerate(read_rows(folder / "index.csv"))
    for wanted, *values in zip(selection.tolist(), *extra.values()):
        row = next(row for number, row in rows if number == wanted)
        (source, index), box = images.locate(wanted), row["box"]
        if box or isinstance(source.paths, PackedImages):
            file, encoded = folder / "images" / cut_folder / source.name / f"{wanted:09d}.jpg", io.BytesIO()
            if box and not file.is_file():
                cut = open_rgb(source.paths[index]).crop(tuple(map(int, box.split())))
                cut.save(encoded, "JPEG", quality=95, subsampling=0)
            elif not file.is_file():
                encoded.write(source.paths.read(index))
            if not file.is_file():
                write_atomic(file, lambda opened, encoded=encoded: opened.write(encoded.getvalue()))
            row |= {"path": str(file.relative_to(folder)), "box": ""}  # it is cut already
            written += 1
        table.append([*(row[name] for name in MANIFEST), *values])
    write_atomic(folder / "manifest.csv", lambda opened: opened.write(csv_bytes(table)))
    return written
