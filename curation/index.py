"""Where a pool comes from (named folders, manifests, packed sets as one numbered list), and its index: every image is
opened once, for index.csv and thumbnails.npy; in the end some rows are manifest.csv."""

import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from datasets.images import boxed, open_rgb, read_bytes
from datasets.path_list import PackedImages, PathList, check_first_exist, list_images, printable
from datasets.tables import cell, iterate_table
from util.cli import Progress
from util.dist import Parts, is_main_process, map_in_order, print_main, shared, worker_pool
from util.errors import InputError
from util.files import read_arrays, write_atomic

TEST_SPLITS = ("val", "dev", "test", "query", "gallery", "probe")  # beginnings of a split's name
COLUMNS = {"identity": "pid", "camera": "camid", "box": "box"}  # what a manifest may say of an image: default column
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


@dataclass
class Source:
    """One `--pool` or `--exclude`. role: "pool" or "exclude"; columns: texts of a manifest's columns by their meaning;
    left_out: rows that the manifest's column `split` puts on the other side."""

    name: str
    role: str
    paths: PathList | PackedImages
    columns: dict[str, PathList] = field(default_factory=dict)
    left_out: int = 0


class JoinedImages:
    """The images of all sources under running numbers; item i is what `open_rgb` opens. boxes: [N, 4] int32 to cut out
    of them, or None."""

    def __init__(self, sources: list[Source], boxes: np.ndarray | None = None):
        self.sources, self.boxes = sources, boxes
        self.ends = np.cumsum([len(source.paths) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, number: int) -> tuple[Source, int]:
        """Return the source and the place in it."""
        source = int(np.searchsorted(self.ends, number, side="right"))
        return self.sources[source], number - (int(self.ends[source - 1]) if source else 0)

    def __getitem__(self, number: int):
        source, index = self.locate(number)
        return boxed(source.paths[index], None if self.boxes is None else self.boxes[number].tolist())

    def text(self, number: int, column: str) -> str:
        """Return a manifest's value, or ''."""
        source, index = self.locate(number)
        return source.columns[column].relative(index) if column in source.columns else ""

    def name(self, number: int) -> str:
        """Return the absolute path of a file; for a packed image the folder and the name it had."""
        source, index = self.locate(number)
        return str(Path(source.paths.root).absolute() / source.paths.relative(index))

    def fingerprint(self) -> list[list[str]]:
        """Identify what the sources list, in their order: rows of the index are numbered by it."""
        return [
            [source.role, source.name, str(Path(source.paths.root).absolute()), source.paths.sha256()]
            + [f"{name} {source.columns[name].sha256()}" for name in sorted(source.columns)]
            for source in self.sources
        ]


def open_sources(pools: list[str], excludes: list[str], column_names: dict[str, str]) -> JoinedImages:
    """Read `NAME=PATH` flags; column_names: the manifests' columns of the meanings `identity`, `camera` and `box`. Of a
    manifest with a column `split`, a pool takes all rows but validation and test ones, an exclusion all but `train`."""
    sources: list[Source] = []
    for role, spec in [*(("pool", spec) for spec in pools), *(("exclude", spec) for spec in excludes)]:
        given, _, path = spec.partition("=")
        if not given or not path:
            raise InputError(f"--{role} {spec}: write NAME=PATH, for example cars=/data/cars")
        name = re.sub(r"[^\w.+ -]", "_", given).lstrip(". -")[:60].rstrip() or "_"
        if given != name:  # names become folders, columns and headings
            print_main(f"--{role} {printable(given)!r}: it is called {name} here")
        if any(other.name == name and other.role == role for other in sources):
            raise InputError(f"--{role} {name} is given twice: choose another name for {path}")
        sources.append(_open(name, role, Path(path), column_names))
    for column, name in column_names.items():
        if name != COLUMNS[column] and not any(column in source.columns for source in sources):
            raise InputError(f"--{column}_column {name}: no manifest of --pool or --exclude has values in it")
    return JoinedImages(sources)


def _open(name: str, role: str, path: Path, column_names: dict[str, str]) -> Source:
    if not path.exists():
        raise InputError(f"--{role} {name}={path} does not exist: give a folder, a manifest or a packed set")
    if path.is_dir():
        if role == "exclude" and (path / "train").is_dir():
            raise InputError(f"--exclude {name}={path} holds a folder train/: give the folder of its test images")
        return Source(name, role, list_images(path))
    rows, left_out = [], 0
    for row in iterate_table(path):
        split = cell(row, "split").lower()
        if split.startswith(TEST_SPLITS) if role == "pool" else split == "train":
            left_out += 1
            continue
        if isinstance(box := row.get(column_names["box"]), list | tuple):
            row[column_names["box"]] = " ".join(map(str, box))
        rows.append([row["path"], *(cell(row, column) for column in column_names.values())])
    if not rows:
        side = "validation or test" if role == "pool" else "training"
        raise InputError(f"--{role} {name}={path}: all {left_out} rows are {side} rows by their column 'split'")
    files, *texts = zip(*rows)
    check_first_exist(paths := PathList(path.parent, files), path)
    columns = {column: PathList(Path(), values) for column, values in zip(column_names, texts) if any(values)}
    return Source(name, role, paths, columns, left_out)


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
            arrays = {"table": np.frombuffer(csv_bytes(rows), dtype=np.uint8), "thumbnails": np.stack(thumbnails)}
            write_atomic(parts.file(start), lambda opened, arrays=arrays: np.savez(opened, **arrays))
            progress.update(progress.done + len(rows))
    progress.close()
    if parts.complete():
        done = {start: read_arrays(parts.file(start)) for start in parts.starts}
        if damaged := [start for start, part in done.items() if part is None]:
            for start in damaged:
                parts.file(start).unlink()
            raise InputError(f"parts of {parts.folder} were damaged and are removed: run the same command again")
        thumbnails = np.concatenate([part["thumbnails"] for part in done.values()])
        table = b"".join([csv_bytes([FIELDS]), *(part["table"].tobytes() for part in done.values())])
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
            image, row["box"] = image.crop(cut), " ".join(map(str, cut))
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
    and cut it to the picture; ValueError: not four numbers, or nothing of the box lies in the picture."""
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
    return Index(sources=list(known["source"]), **{k: np.concatenate([each[k] for each in blocks]) for k in blocks[0]})


def _columns(rows: list[dict[str, str]], known: dict[str, dict[str, int]]) -> dict[str, np.ndarray]:
    def hashes(name: str) -> np.ndarray:
        return np.array([[int(row[name][i : i + 16] or "0", 16) for i in (0, 16)] for row in rows], dtype=np.uint64)

    columns = {
        "excluded": np.array([row["role"] == "exclude" for row in rows]),
        "readable": np.array([not row["problem"] for row in rows]),
        "box": np.array([row["box"].split() or (0, 0, 0, 0) for row in rows], dtype=np.int32),
        "phash": hashes("phash")[:, 0], "file_hash": hashes("sha256"), "pixel_hash": hashes("pixels"),
    }  # fmt: skip
    for column, numbers in known.items():  # the same id in two sources is two vehicles
        prefixes = ["" if column == "source" else row["source"] + "\0" for row in rows]
        keys = [row[column] and prefix + row[column] for prefix, row in zip(prefixes, rows)]
        columns[column] = np.array([numbers.setdefault(key, len(numbers)) if key else -1 for key in keys], np.int32)
    measured = {name: [float(row[name] or 0) for row in rows] for name in MEASURED}
    return columns | {name: np.array(values, dtype=MEASURED[name]) for name, values in measured.items()}


def write_manifest(folder: Path, cut_folder: str, images: JoinedImages, selection: np.ndarray, extra: dict) -> int:
    """Write folder/manifest.csv, one row a selected image in the order of the index.

    Images that have no file of their own, or of which a box is wanted, are written to folder/images/cut_folder as they
    will be trained on (packed images byte for byte, boxes as JPEG of quality 95); all others stay where they are.
    selection: [n] int64 index rows, ascending; extra: further columns; -> how many images were written.
    """
    table, written, rows = [[*MANIFEST, *extra]], 0, enumerate(read_rows(folder / "index.csv"))
    for wanted, *values in zip(selection.tolist(), *extra.values()):
        row = next(row for number, row in rows if number == wanted)
        (source, index), box = images.locate(wanted), row["box"]
        if box or isinstance(source.paths, PackedImages):
            file, encoded = folder / "images" / cut_folder / source.name / f"{wanted:09d}.jpg", io.BytesIO()
            if not file.is_file():
                if box:
                    cut = open_rgb(boxed(source.paths[index], [*map(int, box.split())]))
                    cut.save(encoded, "JPEG", quality=95, subsampling=0)
                else:
                    encoded.write(source.paths.read(index))
                write_atomic(file, lambda opened, encoded=encoded: opened.write(encoded.getvalue()))
            row |= {"path": str(file.relative_to(folder)), "box": ""}  # it is cut already
            written += 1
        table.append([*(row[name] for name in MANIFEST), *values])
    write_atomic(folder / "manifest.csv", lambda opened: opened.write(csv_bytes(table)))
    return written
