"""Stored teacher embeddings of exactly the views that training draws (a reinforced data set)."""

import os
import zlib
from pathlib import Path

import numpy as np
import torch

from datasets.images import Unreadable
from datasets.text_bank import TeacherIdentity, is_encoded, read_encoded
from util.errors import InputError
from util.files import read_json, write_atomic, write_json

HEADER = "cache.json"
SHARD_IMAGES = 10_000
NPY_HEADER = 128  # bytes before the rows
AGAIN = "run the same python -m tools.reinforce command again to complete it"


class TeacherCache:
    """Reads `view<k>_shard<s>.npy` files ([up to SHARD_IMAGES, D_t] float16, unit rows).

    Epoch e trains on view e mod K: crop and flip are a function of (seed, view, index), so nothing but the embedding
    needs storing. With the teacher view "full" there is one vector an image. A row of zeros: the picture could not be
    read when the cache was built.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / HEADER).is_file():
            raise InputError(f"--teacher_cache {folder} holds no {HEADER}: build it with python -m tools.reinforce")
        self.header = read_json(self.folder / HEADER, "build the cache again with python -m tools.reinforce")
        self.identity = TeacherIdentity(**self.header["teacher"])
        self.is_full, self.num_views = self.header["teacher_view"] == "full", self.header["views"]
        files = [shard_file(self.folder, *shard) for shard in shards(self.header)]
        if missing := sum(not file.is_file() for file in files):
            what = f"{missing} of {len(files)} files are missing"
            raise InputError(f"--teacher_cache {folder} is unfinished: {what}; {AGAIN}")
        for shard in shards(self.header):
            read_shard(self.folder, self.header, *shard)

    def view_of(self, epoch: int) -> int:
        """The crop that epoch e trains on; a whole-image cache leaves crops free."""
        return epoch if self.is_full else epoch % self.num_views

    def read(self, epoch: int, index: int) -> torch.Tensor:
        """[D_t] float16: the teacher's embedding of this image in this epoch's view; raises `Unreadable`."""
        size, file = 2 * self.identity.embed_dim, shard_file(self.folder, epoch % self.num_views, index)
        with open(file, "rb") as opened:  # not as a memory map, which ends the process where a file is cut short
            data = os.pread(opened.fileno(), size, NPY_HEADER + index % SHARD_IMAGES * size)
        if not any(data):
            raise Unreadable(f"no embedding in the teacher cache: {AGAIN}")
        return torch.frombuffer(bytearray(data), dtype=torch.float16)

    def check(self, expected: dict) -> None:
        """Refuse a cache made for something else: `expected` holds entries of its header as this run has them. An
        embedding of the whole image does not depend on how the student's crops are drawn."""
        free, differ = ("seed", "crop_min", "input_size") if self.is_full else (), []
        for key in (key for key in expected if key not in free):
            if self.header[key] != expected[key]:
                differ.append(f"{key} {str(self.header[key])[:24]} in the cache, {str(expected[key])[:24]} here")
        if differ:
            cure = "set the flags back or build a cache with python -m tools.reinforce"
            raise InputError(f"--teacher_cache {self.folder} was made for other views ({', '.join(differ)}): {cure}")

    def bank(self, text_bank: str | None):
        """The encoded text bank: the one stored in the cache, or an encoded file of the same teacher."""
        file = Path(text_bank) if text_bank else self.folder / "text_bank.safetensors"
        if not file.exists():
            raise InputError(f"--text_bank {file} does not exist: give an encoded bank, or build the cache again")
        if not is_encoded(file):
            what = "is not encoded and --teacher_cache brings no text tower: pass the texts to tools.reinforce"
            raise InputError(f"--text_bank {file} {what}, or give an encoded bank")
        return read_encoded(file, self.identity)


def shard_file(folder: Path, view: int, index: int) -> Path:
    """Where the embedding of image `index` lies."""
    return folder / f"view{view:03d}_shard{index // SHARD_IMAGES:05d}.npy"


def shards(header: dict) -> list[tuple[int, int]]:
    """(view, first image) of every file."""
    return [(view, first) for view in range(header["views"]) for first in range(0, header["images"], SHARD_IMAGES)]


def write_shard(folder: Path, view: int, first: int, rows: np.ndarray) -> None:
    """rows: [n, D_t] float16, and beside them their checksum."""
    file = shard_file(folder, view, first)
    write_json(file.with_suffix(".json"), {"crc32": zlib.crc32(np.ascontiguousarray(rows))})
    write_atomic(file, lambda opened: np.save(opened, rows))


def read_shard(folder: Path, header: dict, view: int, first: int) -> np.ndarray:
    """[n, D_t] float16; InputError where size, checksum or the length of a row are wrong."""
    file, cure = shard_file(folder, view, first), "remove it and run the same python -m tools.reinforce command again"
    wanted = min(SHARD_IMAGES, header["images"] - first), header["teacher"]["embed_dim"]
    crc = read_json(file.with_suffix(".json"), cure).get("crc32")
    try:
        rows = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is damaged ({error}): {cure}") from error
    if rows.shape != wanted or rows.dtype != np.float16 or zlib.crc32(rows) != crc:
        raise InputError(f"{file} is damaged (its checksum differs): {cure}")
    lengths = np.linalg.norm(rows.astype(np.float32), axis=1)
    if not (np.abs(lengths - 1)[lengths != 0] < 0.01).all():
        raise InputError(f"{file} is damaged (an embedding is no unit vector): {cure}")
    return rows
