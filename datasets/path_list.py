"""Lists of images that cost a few arrays, however long: paths of files, and packed sets (made by tools.pack)."""

import bisect
import hashlib
import io
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from datasets.images import Unreadable
from util.errors import InputError
from util.files import read_array, read_json

PACK_HEADER = "pack.json"
OFFSET, LENGTH, CRC = range(3)  # columns of a shard's index


def printable(name: str) -> str:
    """A name for tables, messages and pictures, on one line: bytes that are not UTF-8 become \\xNN, control characters
    \\n, \\x1b ..."""
    given = ((c, chr(ord(c) - 0xDC00) if "\udc80" <= c <= "\udcff" else c) for c in name)  # as `os.fsdecode` has them
    return "".join(c if c.isprintable() else byte.encode("unicode_escape").decode() for c, byte in given)


class PathList:
    """Paths in one contiguous buffer: a million paths are two arrays, shared by forked workers."""

    def __init__(self, root: Path, paths: Iterable[str]):
        """Paths are relative to `root` or absolute."""
        encoded = [os.fsencode(path) for path in paths]
        self.root = Path(root)
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def take(self, rows: np.ndarray) -> "PathList":
        """Some of the paths, in the order of `rows`."""
        return PathList(self.root, (self.relative(row) for row in rows.tolist()))

    def __len__(self) -> int:
        return len(self.ends)

    def relative(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.bytes[start : self.ends[index]].tobytes())

    def __getitem__(self, index: int) -> Path:
        return self.root / self.relative(index)

    def sha256(self) -> str:
        """Identity of the list: the relative paths and their order, not the root."""
        digest = hashlib.sha256(self.ends.tobytes())
        digest.update(self.bytes.tobytes())
        return digest.hexdigest()


class PackedImages:
    """The images of a packed set; stands wherever a `PathList` does.

    Files: `pack.json` (what it was made from), `shard<k>.bin` (encoded images, one after another), `shard<k>.npy`
    ([n, 3] int64: offset and length in bytes, CRC-32), `names.npy` (uint8, the names they had) and `name_ends.npy`
    (int64).

    Raises:
        InputError: unfinished, or a shard of another size than its index says.
    """

    def __init__(self, folder: str | Path):
        self.root, again = Path(folder), "remove it and run python -m tools.pack again"
        count = read_json(self.root / PACK_HEADER, again).get("shards", 0)
        files = [shard_file(self.root, k) for k in range(count if isinstance(count, int) else 0)]
        if not all(file.is_file() for file in (*files, self.root / "names.npy")):
            raise InputError(
                f"--data_path {self.root} is an unfinished packed set: run the same python -m tools.pack command "
                "again to complete it"
            )
        self._names = PathList(self.root, [])
        self._names.bytes = read_array(self.root / "names.npy", again)
        self._names.ends = np.array(read_array(self.root / "name_ends.npy", again))
        indices = [np.array(read_array(file.with_suffix(".npy"), again)).reshape(-1, 3) for file in files]
        for file, index in zip(files, indices):
            wanted, size = int(index[:, LENGTH].sum()), file.stat().st_size
            if size != wanted:
                raise InputError(f"{file} has {size} bytes where its index says {wanted}: it is damaged; {again}")
        self._index = np.concatenate(indices) if indices else np.zeros((0, 3), np.int64)
        if not len(self._index) or len(self._names) != len(self._index):
            raise InputError(f"--data_path {self.root} is damaged (its lists of names and images differ): {again}")
        self._shard_ends = np.cumsum([len(index) for index in indices]).tolist()

    def __len__(self) -> int:
        return len(self._index)

    def relative(self, index: int) -> str:
        return self._names.relative(index)

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            Unreadable: its checksum is wrong.
        """
        offset, length, crc = self._index[index].tolist()
        file = shard_file(self.root, bisect.bisect_right(self._shard_ends, index))
        with open(file, "rb") as opened:
            data = os.pread(opened.fileno(), length, offset)
        if zlib.crc32(data) != crc:
            raise Unreadable(f"checksum differs in {file.name} at byte {offset}")
        return data

    def __getitem__(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.read(index))

    def sha256(self) -> str:
        """Identity of the list: names, order and encoded bytes (by their checksums)."""
        digest = hashlib.sha256(self._names.sha256().encode())
        digest.update(np.ascontiguousarray(self._index[:, CRC]).tobytes())
        return digest.hexdigest()


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard{shard:05d}.bin"
