"""What leaves the pool, and why: unreadable and poor images, and what is no vehicle (copies: curation.copies)."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from curation.index import Index, csv_bytes
from util.errors import InputError
from util.files import fits, read_json, write_atomic

PROMPTS = Path(__file__).with_name("prompts.json")


class Removals:
    """Why rows of an index go; the first reason found for a row stays. reason: [count] int16 into `reasons` (-1: none);
    of: [count] int64, the row that stands for it (-1: none); value: [count] float32, what was measured."""

    def __init__(self, count: int):
        self.reasons: list[str] = []
        self.reason = np.full(count, -1, dtype=np.int16)
        self.of = np.full(count, -1, dtype=np.int64)
        self.value = np.zeros(count, dtype=np.float32)

    @property
    def rows(self) -> np.ndarray:
        return np.flatnonzero(self.reason >= 0)

    def add(self, reason: str, rows: np.ndarray, of: np.ndarray | int = -1, value: np.ndarray | float = 0) -> None:
        """rows: int64, none twice."""
        new = self.reason[rows] < 0
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.reason[rows[new]] = self.reasons.index(reason)
        for all_values, values in ((self.of, of), (self.value, value)):
            all_values[rows[new]] = np.broadcast_to(values, rows.shape)[new]

    def left_of(self, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` that are not removed."""
        return rows[self.reason[rows] < 0]

    def save(self, folder: Path, name: str, path_of) -> dict[str, int]:
        """Write NAME.npz for later stages and NAME.csv for people; path_of: row -> its path; -> counts by reason."""
        rows, table = self.rows, [["row", "path", "reason", "of", "value"]]
        arrays = {"rows": rows, "reason": self.reason[rows], "of": self.of[rows], "value": self.value[rows]}
        for row, reason, of, value in zip(*(values.tolist() for values in arrays.values())):
            table.append([row, path_of(row), self.reasons[reason], path_of(of) if of >= 0 else "", f"{value:.4g}"])
        write_atomic(folder / f"{name}.csv", lambda f: f.write(csv_bytes(table)))
        arrays["reasons"] = np.array(self.reasons, dtype=np.str_)
        write_atomic(folder / f"{name}.npz", lambda f: np.savez(f, **arrays))
        found = Counter(self.reasons[reason] for reason in arrays["reason"])
        return {"removed": len(rows)} | {name: found[name] for name in self.reasons if found[name]}


def load_removal(folder: Path, name: str) -> SimpleNamespace:
    """Read what `Removals.save` wrote: rows, reason, of, value, reasons."""
    with np.load(folder / f"{name}.npz") as stored:
        return SimpleNamespace(**stored)


def poor_images(index: Index, args) -> Removals:
    """Remove pool images beyond a limit of the flags, each under the first, and unreadable ones of all sources."""
    out = Removals(len(index))
    out.add("unreadable", np.flatnonzero(~index.readable))
    for reason, value, low, high in (
        ("small (px)", np.minimum(index.width, index.height), args.min_side, np.inf),
        ("aspect (width / height)", index.width / np.maximum(index.height, 1), *args.aspect),
        ("exposure (mean of 255)", index.brightness, *args.brightness),
        ("flat (deviation of 255)", index.contrast, args.min_contrast, np.inf),
        ("blurred (deviation of the Laplacian)", index.sharpness, args.min_sharpness, np.inf),
    ):
        rows = np.flatnonzero(~index.excluded & index.readable & ((value < low) | (value > high)))
        out.add(reason, rows, value=value[rows])
    return out


def read_prompts(file: str | Path | None) -> tuple[list[str], list[str]]:
    """Read the prompts of what is wanted and of everything else; None: the built-in ones."""
    path, cure = Path(file or PROMPTS), 'write {"vehicle": [texts], "other": [texts]}'
    prompts = read_json(path, cure)
    if not all(fits(prompts.get(side), [str]) and prompts[side] for side in ("vehicle", "other")):
        raise InputError(f"--vehicle_prompts {path} is not made like curation/prompts.json: {cure}")
    return prompts["vehicle"], prompts["other"]


def vehicle_probability(x: torch.Tensor, wanted: torch.Tensor, other: torch.Tensor, tau: float) -> torch.Tensor:
    """[n] CLIP's probability (Radford et al., 2021, Sec. 3.1) of the best wanted prompt against the best of the others.
    x: [n, D] embeddings; wanted, other: [T, D] unit rows; tau: the teacher's temperature."""
    best = [(F.normalize(x, dim=1) @ texts.t() / tau).amax(dim=1) for texts in (wanted, other)]
    return (best[0] - best[1]).sigmoid()
