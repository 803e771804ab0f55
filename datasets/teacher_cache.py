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

    Epoch e trains on view e mod K: crop and flip are a function of (seed, view, index), so nothing but the embedding
    needs storing. With the teacher view "full" there is one vector an image.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / HEADER).is_file():
            raise InputError(f"--teacher_cache {folder} holds no {HEADER}: build it with python -m tools.reinforce")
        self.header = json.loads((self.folder / HEADER).read_text())
        self.identity = TeacherIdentity(**self.header["teacher"])
        self.is_full = self.header["teacher_view"] == "full"
        self.num_views = self.header["views"]
        files = [shard_file(self.folder, view, first) for view, first in shards(self.header)]
        if missing := sum(not file.is_file() for file in files):
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
        file = shard_file(self.folder, epoch % self.num_views, index)
        if file not in self._maps:
            self._maps[file] = np.load(file, mmap_mode="r")
        return torch.from_numpy(self._maps[file][index % SHARD_IMAGES].copy())

    def check(self, expected: dict) -> None:
        """Refuse a cache made for something else: `expected` holds entries of its header as this run has them."""
        # a whole-image embedding does not depend on how the student's crops are drawn
        free = ("seed", "crop_min", "input_size") if self.is_full else ()
        differ = [
            f"{key} {str(self.header[key])[:24]} in the cache, {str(value)[:24]} here"
            for key, value in expected.items() if key not in free and self.header[key] != value
        ]  # fmt: skip
        if differ:
            raise InputError(
                f"--teacher_cache {self.folder} was made for other views ({', '.join(differ)}): set the flags back or "
                "build a cache with python -m tools.reinforce"
            )

    def bank(self, text_bank: str | None):
        """The encoded text bank: the one stored in the cache, or an encoded file of the same teacher."""
        file = Path(text_bank) if text_bank else self.folder / "text_bank.safetensors"
        if not file.exists():
            raise InputError(f"--text_bank {file} does not exist: give an encoded bank, or build the cache again")
        if not is_encoded(file):
            raise InputError(
                f"--text_bank {file} is not encoded and --teacher_cache brings no text tower: pass the texts to "
                "tools.reinforce, or give an encoded bank (.safetensors, or a folder of main_describe.py)"
            )
        return read_encoded(file, self.identity)


def shard_file(folder: Path, view: int, index: int) -> Path:
    """Where the embedding of image `index` lies."""
    return folder / f"view{view:03d}_shard{index // SHARD_IMAGES:05d}.npy"


def shards(header: dict) -> list[tuple[int, int]]:
    """(view, first image) of every file."""
    return [(view, first) for view in range(header["views"]) for first in range(0, header["images"], SHARD_IMAGES)]
