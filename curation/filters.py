"""What leaves the pool, and why: unreadable and poor images, and what is no vehicle (copies: curation.copies)."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from curation.index import Index
from curation.rows import Embedded
from util.errors import InputError
from util.files import write_atomic

PROMPTS = Path(__file__).with_name("prompts.json")
BLOCK = 65_536  # embeddings at a time


@dataclass(frozen=True)
class Removal:
    """rows: [n] int64 of the index, ascending; reason: [n] int16 into `reasons`; of: [n] int64, the row that stands
    for it (-1: none); value: [n] float32, what was measured (meaning as the reason says)."""

    rows: np.ndarray
    reason: np.ndarray
    of: np.ndarray
    value: np.ndarray
    reasons: list[str]

    def counts(self) -> dict[str, int]:
        found = np.bincount(self.reason, minlength=len(self.reasons))
        return {name: int(count) for name, count in zip(self.reasons, found) if count}


class Removals:
    """Collects removals of an index of `count` rows; the first reason found for a row stays."""

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

    def left_of(self, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` that are not removed."""
        return rows[self.reason[rows] < 0]

    def finish(self) -> Removal:
        rows = np.flatnonzero(self.reason >= 0)
        return Removal(rows, self.reason[rows], self.of[rows], self.value[rows], self.reasons)


def save_removal(folder: Path, name: str, removal: Removal, path_of) -> None:
    """Write NAME.npz for the stages after and NAME.csv for people; path_of: row -> its path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "path", "reason", "of", "value"])
    arrays = {name: getattr(removal, name) for name in ("rows", "reason", "of", "value")}
    for row, reason, of, value in zip(*(values.tolist() for values in arrays.values())):
        other = path_of(of) if of >= 0 else ""
        writer.writerow([row, path_of(row), removal.reasons[reason], other, f"{value:.4g}"])
    write_atomic(folder / f"{name}.csv", lambda f: f.write(text.getvalue().encode("utf-8", "replace")))
    reasons = np.array(removal.reasons, dtype=np.str_)
    write_atomic(folder / f"{name}.npz", lambda f: np.savez(f, **arrays, reasons=reasons))


def load_removal(folder: Path, name: str) -> Removal:
    with np.load(folder / f"{name}.npz") as stored:
        return Removal(stored["rows"], stored["reason"], stored["of"], stored["value"], stored["reasons"].tolist())


def poor_images(index: Index, args) -> Removal:
    """Remove pool images beyond a limit, each under the first that applies, and unreadable ones of all sources.

    Args:
        args: reads min_side, aspect, brightness, min_contrast, min_sharpness.
    """
    out = Removals(len(index))
    out.add("unreadable", np.flatnonzero(~index.readable))
    side = np.minimum(index.width, index.height)
    ratio = index.width / np.maximum(index.height, 1)
    for reason, value, low, high in (
        ("small (px)", side, args.min_side, np.inf),
        ("aspect (width / height)", ratio, *args.aspect),
        ("exposure (mean of 255)", index.brightness, *args.brightness),
        ("flat (deviation of 255)", index.contrast, args.min_contrast, np.inf),
        ("blurred (deviation of the Laplacian)", index.sharpness, args.min_sharpness, np.inf),
    ):
        rows = np.flatnonzero(~index.excluded & index.readable & ((value < low) | (value > high)))
        out.add(reason, rows, value=value[rows])
    return out.finish()


def read_prompts(file: str | Path | None) -> tuple[list[str], list[str]]:
    """Read the prompts of what is wanted and of everything else; None: the built-in ones."""
    path = Path(file or PROMPTS)
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
        wanted, other = prompts["vehicle"], prompts["other"]
    except FileNotFoundError as error:
        raise InputError(f"--vehicle_prompts {path} does not exist: give a JSON file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'--vehicle_prompts {path}: write {{"vehicle": [texts], "other": [texts]}} ({error})'
        ) from error
    if not wanted or not other or not all(isinstance(text, str) for text in [*wanted, *other]):
        raise InputError(f"--vehicle_prompts {path}: both lists must hold texts")
    return wanted, other


def not_vehicles(
    embedded: Embedded,
    rows: np.ndarray,
    count: int,
    texts: torch.Tensor,
    wanted: int,
    tau: float,
    threshold: float,
    device: torch.device,
) -> Removal:
    """Remove images to which CLIP (Radford et al., 2021, Sec. 3.1) gives the best wanted prompt, against the best of
    the others, a probability below `threshold`.

    Args:
        rows: int64, of an index of `count`. texts: [T, D] unit rows, the `wanted` first ones being the wanted prompts.
        tau: the teacher's temperature.
    """
    out = Removals(count)
    texts = texts.to(device)
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        x = torch.from_numpy(embedded.data[embedded.place(part)]).to(device).float()
        logits = F.normalize(x, dim=1) @ texts.t() / tau
        # the best prompt of each side speaks for it, so that the numbers of prompts do not matter
        margin = logits[:, :wanted].amax(dim=1) - logits[:, wanted:].amax(dim=1)
        probability = margin.sigmoid().cpu().numpy()
        low = probability < threshold
        out.add("not a vehicle (probability)", part[low], value=probability[low])
    return out.finish()
