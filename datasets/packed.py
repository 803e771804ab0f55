"""A packed set: many JPEGs in a few big files, read through memory maps (made by tools.pack)."""

import bisect
import hashlib
import io
import json
import mmap
import zlib
from pathlib import Path

import numpy as np

from datasets.path_list import PathList
from util.errors import InputError

HEADER = "pack.json"
OFFSET, LENGTH, CRC = range(3)  # columns of a shard's index


class PackedImages:
    """The images of a packed set; stands wherever a `PathList` does.

    Files: `pack.json` (what it was made from), `shard<k>.bin` (encoded images, one after another),
    `shard<k>.npy` ([n, 3] int64: offset and length in bytes, CRC-32), `names.npy` (uint8, the names
    they had) and `name_ends.npy` (int64). A worker holds maps, not copies.

    Raises:
        InputError: unfinished, damaged header, a shard of another size than its index says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.header = json.loads((self.folder / HEADER).read_text())
        self.root = self.folder
        shards = range(self.header["shards"])
        missing = [k for k in shards if not shard_file(self.folder, k).is_file()]
        if missing or not (self.folder / "names.npy").is_file():
            raise InputError(
                f"--data_path {self.folder} is an unfinished packed set: run the same python -m tools.pack "
                "command again to complete it"
            )
        names = np.load(self.folder / "names.npy", mmap_mode="r")
        self._names = PathList.from_arrays(self.folder, names, np.load(self.folder / "name_ends.npy"))
        indices = [np.load(shard_file(self.folder, k).with_suffix(".npy")) for k in shards]
        for k, index in enumerate(indices):
            wanted = int(index[-1, OFFSET] + index[-1, LENGTH]) if len(index) else 0
            size = shard_file(self.folder, k).stat().st_size
            if size != wanted:
                raise InputError(
                    f"{shard_file(self.folder, k)} has {size} bytes where its index says {wanted}: "
                    "it is damaged; remove it and run python -m tools.pack again"
                )
        self._index = np.concatenate(indices)
        self._shard_ends = np.cumsum([len(index) for index in indices]).tolist()
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self._index)

    def relative(self, index: int) -> str:
        return self._names.relative(index)

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            ValueError: its checksum is wrong; named and counted like any unreadable image.
        """
        offset, length, crc = self._index[index].tolist()
        shard = bisect.bisect_right(self._shard_ends, index)
        if shard not in self._maps:
            with open(shard_file(self.folder, shard), "rb") as opened:
                self._maps[shard] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        data = self._maps[shard][offset : offset + length]
        if zlib.crc32(data) != crc:
            raise ValueError(f"checksum differs in {shard_file(self.folder, shard).name} at byte {offset}")
        return data

    def __getitem__(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.read(index))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}  # spawned workers open their own maps

    def sha256(self) -> str:
        """Identity of the list: names, order and encoded bytes (by their checksums)."""
        digest = hashlib.sha256(self._names.sha256().encode())
        digest.update(np.ascontiguousarray(self._index[:, CRC]).tobytes())
        return digest.hexdigest()


def is_packed(folder: Path) -> bool:
    return (folder / HEADER).is_file()


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard{shard:05d}.bin"
