"""A list of paths that costs two arrays, however long it is."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def printable(name: str) -> str:
    """A file name for tables and messages: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class PathList:
    """Paths in one contiguous buffer: a million paths are two arrays, shared by forked workers."""

    def __init__(self, root: Path, paths: Iterable[str]):
        """Paths are relative to `root` or absolute."""
        encoded = [os.fsencode(path) for path in paths]
        self.root = Path(root)
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def from_arrays(cls, root: Path, names: np.ndarray, ends: np.ndarray) -> "PathList":
        """names: uint8, all names one after another; ends: int64, where each ends."""
        paths = cls(root, [])
        paths.bytes, paths.ends = names, ends
        return paths

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
