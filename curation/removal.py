"""What a stage takes out of the pool, and why."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.files import write_atomic


@dataclass(frozen=True)
class Removal:
    """rows: [n] int64 of the index, ascending; reason: [n] int16 into `reasons`; of: [n] int64, the row that
    stands for it (-1: none); value: [n] float32, what was measured (meaning as the reason says)."""

    rows: np.ndarray
    reason: np.ndarray
    of: np.ndarray
    value: np.ndarray
    reasons: list[str]

    def counts(self) -> dict[str, int]:
        found = np.bincount(self.reason, minlength=len(self.reasons))
        return {name: int(count) for name, count in zip(self.reasons, found) if count}


class Removals:
    """Collects removals; the first reason found for a row stays."""

    def __init__(self, count: int):
        self.reason = np.full(count, -1, dtype=np.int16)
        self.of = np.full(count, -1, dtype=np.int64)
        self.value = np.zeros(count, dtype=np.float32)
        self.reasons: list[str] = []

    def add(self, reason: str, rows: np.ndarray, of: np.ndarray | int = -1, value: np.ndarray | float = 0) -> None:
        """rows: int64, none twice."""
        of, value = np.broadcast_to(of, rows.shape), np.broadcast_to(value, rows.shape)
        new = self.reason[rows] < 0
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.reason[rows[new]] = self.reasons.index(reason)
        self.of[rows[new]], self.value[rows[new]] = of[new], value[new]

    def removed(self) -> np.ndarray:
        return self.reason >= 0

    def finish(self) -> Removal:
        rows = np.flatnonzero(self.removed())
        return Removal(rows, self.reason[rows], self.of[rows], self.value[rows], self.reasons)


def save_removal(folder: Path, name: str, removal: Removal, path_of) -> None:
    """NAME.npz for the stages after, NAME.csv for people; path_of: row -> its path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "path", "reason", "of", "value"])
    for row, reason, of, value in zip(
        removal.rows.tolist(), removal.reason.tolist(), removal.of.tolist(), removal.value.tolist()
    ):
        other = path_of(of) if of >= 0 else ""
        writer.writerow([row, path_of(row), removal.reasons[reason], other, f"{value:.4g}"])
    write_atomic(folder / f"{name}.csv", lambda f: f.write(text.getvalue().encode("utf-8", "replace")))
    arrays = {"rows": removal.rows, "reason": removal.reason, "of": removal.of, "value": removal.value}
    arrays["reasons"] = np.array(removal.reasons, dtype=np.str_)
    write_atomic(folder / f"{name}.npz", lambda f: np.savez(f, **arrays))


def load_removal(folder: Path, name: str) -> Removal:
    with np.load(folder / f"{name}.npz") as stored:
        return Removal(stored["rows"], stored["reason"], stored["of"], stored["value"], stored["reasons"].tolist())
