"""Stored teacher embeddings of exactly the views that training draws (a reinforced data set)."""

import json
from pathlib import Path

import numpy as np
import torch

from datasets.text_bank import TeacherIdentity, is_encoded, read_encoded
from util.errors import InputError

HEADER = "cache.json"
SHARD_IMAGES = 10_000


class TeacherCache:
    """Reads `view<k>_shard<s>.npy` files ([up to SHARD_IMAGES, D_t] float16, unit rows) as memory maps.

    Epoch e trains on view e mod K: crop and flip are a function of (seed, view, index), so nothing
    but the embedding needs storing. With the teacher view "full" there is one vector an image.

    Raises:
        InputError: no cache, or an unfinished one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        file = self.folder / HEADER
        if not file.is_file():
            raise InputError(f"--teacher_cache {folder} holds no {HEADER}: build it with python -m tools.reinforce")
        self.header = json.loads(file.read_text())
        self.identity = TeacherIdentity(**self.header["teacher"])
        self.is_full = self.header["teacher_view"] == "full"
        self.num_views = self.header["views"]
        files = shard_files(self.folder, self.header)
        missing = sum(not file.is_file() for file in files)
        if missing:
            raise InputError(
                f"--teacher_cache {folder} is unfinished: {missing} of {len(files)} files are missing; run the same "
                "python -m tools.reinforce command again to complete it"
            )
        self._maps: dict[Path, np.ndarray] = {}

    def view_of(self, epoch: int) -> int:
        """The crop that epoch e trains on; a whole-image cache leaves crops free."""
        return epoch if self.is_full else epoch % self.num_views

    def read(self, epoch: int, index: int) -> torch.Tensor:
        """[D_t] float16: the teacher's embedding of this image in this epoch's view."""
        view = epoch % self.num_views
        file = shard_file(self.folder, view, index // SHARD_IMAGES)
        if file not in self._maps:
            self._maps[file] = np.load(file, mmap_mode="r")
        return torch.from_numpy(self._maps[file][index % SHARD_IMAGES].copy())

    def check(self, expected: dict) -> None:
        """Refuse a cache made for something else.

        Args:
            expected: header entries of this run (`cache_header` without teacher and views).
        Raises:
            InputError: names each difference.
        """
        # a whole-image embedding does not depend on how the student's crops are drawn
        free = ("seed", "crop_min", "input_size") if self.is_full else ()
        wrong = {k: v for k, v in expected.items() if k not in free and self.header[k] != v}
        if wrong:
            differences = ", ".join(
                f"{k} {str(self.header[k])[:24]} in the cache, {str(v)[:24]} here" for k, v in wrong.items()
            )
            raise InputError(
                f"--teacher_cache {self.folder} was made for other views ({differences}): set the flags "
                "back or build a cache with python -m tools.reinforce"
            )

    def bank(self, text_bank: str | None):
        """The encoded text bank: the one stored in the cache, or an encoded file of the same teacher."""
        file = Path(text_bank) if text_bank else self.folder / "text_bank.safetensors"
        if not file.exists():
            raise InputError(f"--text_bank {file} does not exist: give an encoded bank, or build the cache again")
        if not is_encoded(file):
            raise InputError(
                f"--text_bank {file} is not encoded and --teacher_cache brings no text tower: pass the "
                "texts to tools.reinforce, or give an encoded bank (.safetensors, or a folder of "
                "main_describe.py)"
            )
        return read_encoded(file, self.identity)


def cache_header(teacher: dict, views: int, **transform) -> dict:
    """What a cache was made from; `transform`: teacher_view, seed, crop_min, input_size, images_sha,
    images."""
    return {"kind": "cgd-mae teacher cache", "teacher": teacher, "views": views, **transform}


def shard_file(folder: Path, view: int, shard: int) -> Path:
    return folder / f"view{view:03d}_shard{shard:05d}.npy"


def shard_files(folder: Path, header: dict) -> list[Path]:
    shards = -(-header["images"] // SHARD_IMAGES)
    return [shard_file(folder, v, s) for v in range(header["views"]) for s in range(shards)]
