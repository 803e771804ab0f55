"""The first stage: every image of every source is opened once; what was seen is index.csv and
thumbnails.npy."""

import csv
import io
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from curation.measure import FIELDS, SIDE, measure_image
from curation.sources import JoinedImages
from util.dist import is_main_process
from util.files import write_atomic
from util.parallel import Parts, map_in_order, shared, worker_pool
from util.progress import Progress

PART_IMAGES = 4096
BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class Index:
    """Columns of index.csv as arrays [N]; texts of which only equality matters are numbers (-1: empty).

    source: int32 (into `sources`), excluded: bool, width, height: int32 px, box: [N, 4] int32 px (zeros:
    none), file_hash, pixel_hash: [N, 2] uint64 (their first 128 bits), phash: uint64, brightness, contrast,
    sharpness: float32, identity, camera: int32, readable: bool.
    """

    sources: list[str]
    source: np.ndarray
    excluded: np.ndarray
    width: np.ndarray
    height: np.ndarray
    box: np.ndarray
    file_hash: np.ndarray
    pixel_hash: np.ndarray
    phash: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    sharpness: np.ndarray
    identity: np.ndarray
    camera: np.ndarray
    readable: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


def build_index(images: JoinedImages, folder: Path, job: dict, margin: float, workers: int | None) -> None:
    """Write folder/index.csv and folder/thumbnails.npy, [N, 32, 32] uint8 grey; the ranks share the work, a
    killed run goes on at the first part that is missing."""
    parts = Parts(folder / "index.parts", job, "unfinished index", len(images), PART_IMAGES, ".csv")
    progress = Progress("opened", parts.items_to_do(), shown=is_main_process())
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's: processes of this machine
    workers = workers or max(1, (os.cpu_count() or 1) // local)
    done = 0
    with worker_pool(workers, (images, margin)) as pool:
        for start in parts.todo:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            thumbnails = []
            for row, thumbnail in map_in_order(pool, _measure_chunk, range(start, parts.stop(start)), workers):
                writer.writerow(row)
                thumbnails.append(thumbnail)
                done += 1
                if done % 512 == 0:
                    progress.update(done)
            pixels = np.stack(thumbnails).tobytes()  # before the table: a table that exists is a part done
            write_atomic(parts.file(start).with_suffix(".pixels"), lambda opened, d=pixels: opened.write(d))
            data = text.getvalue().encode("utf-8", "replace")
            write_atomic(parts.file(start), lambda opened, d=data: opened.write(d))
        progress.update(done)
    progress.close()
    if parts.complete():

        def join(opened) -> None:
            opened.write((",".join(FIELDS) + "\n").encode())
            for start in parts.starts:
                opened.write(parts.file(start).read_bytes())

        def join_thumbnails(opened) -> None:
            shape = (len(images), SIDE, SIDE)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(opened, header)
            for start in parts.starts:
                opened.write(parts.file(start).with_suffix(".pixels").read_bytes())

        write_atomic(folder / "thumbnails.npy", join_thumbnails)
        write_atomic(folder / "index.csv", join)
        parts.remove()


def _measure_chunk(numbers: list[int]) -> list[tuple[list[str], np.ndarray]]:
    images, margin = shared()
    return [measure_image(images, number, margin) for number in numbers]


def load_index(file: Path) -> Index:
    """index.csv -> arrays, block by block: no more than a few rows are Python objects at a time."""
    known: dict[str, dict[str, int]] = {column: {} for column in ("source", "identity", "camera")}
    rows, blocks = read_rows(file), []
    while block := list(islice(rows, BLOCK_ROWS)):
        blocks.append(_columns(block, known))
    joined = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return Index(list(known["source"]), **joined)


def _columns(rows: list[dict[str, str]], known: dict[str, dict[str, int]]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {
        "excluded": np.array([row["role"] == "exclude" for row in rows]),
        "readable": np.array([not row["problem"] for row in rows]),
        "phash": np.array([int(row["phash"] or "0", 16) for row in rows], dtype=np.uint64),
    }
    for column, numbers in known.items():
        # the same id in two sources is two vehicles
        keys = [row[column] and (row["source"] + "\0" + row[column]) for row in rows]
        if column == "source":
            keys = [row[column] for row in rows]
        values = [numbers.setdefault(key, len(numbers)) if key else -1 for key in keys]
        columns[column] = np.array(values, dtype=np.int32)
    for column in ("width", "height"):
        columns[column] = np.array([int(row[column] or 0) for row in rows], dtype=np.int32)
    for column in ("brightness", "contrast", "sharpness"):
        columns[column] = np.array([float(row[column] or 0) for row in rows], dtype=np.float32)
    boxes = [row["box"].split() or (0, 0, 0, 0) for row in rows]
    columns["box"] = np.array(boxes, dtype=np.int32)
    for column, text in (("file_hash", "sha256"), ("pixel_hash", "pixels")):
        halves = [(int(row[text][:16] or "0", 16), int(row[text][16:32] or "0", 16)) for row in rows]
        columns[column] = np.array(halves, dtype=np.uint64)
    return columns


def read_rows(file: Path):
    """The rows of index.csv as dicts, one at a time."""
    with open(file, encoding="utf-8", newline="") as opened:
        yield from csv.DictReader(opened)
