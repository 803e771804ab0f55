"""Rows of an embedding file as float32 chunks on a device."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from util.errors import InputError

CHUNK = 8192  # rows read at a time
RESIDENT_BYTES = 4e9  # rows that fit into so much are kept on the device


@dataclass(frozen=True)
class Embedded:
    """data: [n, D] memory map; rows: [n] int64, the index rows they belong to, ascending."""

    data: np.ndarray
    rows: np.ndarray

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Turn index rows into rows of `data`."""
        return np.searchsorted(self.rows, rows)


class Rows:
    """[N, D] vectors for clustering, never more than one chunk of them converted at a time.

    Vectors are shifted by their mean (`unit` off), because ||c||^2 - 2xc loses digits where all vectors share a large
    component, as CLIP's do; or scaled to length 1 (`unit` on) for spherical clustering.

    Args:
        data: [M, D] float16 or float32, an array or a memory map.
        index: [N] int64 rows of `data` to use, ascending for speed (default: all).
        centre: [D] float32 shift; None: the mean of the rows, found in one float64 pass that refuses NaN.
    """

    def __init__(
        self, data: np.ndarray, device: torch.device, index: np.ndarray | None = None, unit: bool = False,
        centre: torch.Tensor | None = None,
    ):  # fmt: skip
        self.data, self.device, self.unit, self.dim = data, device, unit, data.shape[1]
        self.index = np.arange(len(data)) if index is None else index
        if not len(self):
            raise InputError("no vectors to cluster: the stages before have dropped every image")
        self.kept, self.centre = None, centre
        if centre is None:
            total = sum(self._raw(start).double().sum(dim=0) for start in range(0, len(self), CHUNK))
            if not total.isfinite().all():
                raise InputError("some embeddings are not finite: embed with another model, or clear --output")
            self.centre = (total / len(self)).float().to(device) * (not unit)
        if len(self) * self.dim * 4 <= RESIDENT_BYTES:
            kept = torch.empty(len(self), self.dim, device=device)
            for start, x in self.chunks():
                kept[start : start + len(x)] = x
            self.kept = kept

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, positions: np.ndarray) -> "Rows":
        """Return some of these rows, shifted alike; positions: int64 among these rows."""
        return Rows(self.data, self.device, self.index[positions], self.unit, self.centre)

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (position of the first row, [n, D] float32)."""
        for start in range(0, len(self), CHUNK):
            yield start, self._prepare(self._raw(start)) if self.kept is None else self.kept[start : start + CHUNK]

    def take(self, positions: np.ndarray) -> torch.Tensor:
        """Return any rows, [n, D] float32."""
        index = self.index[positions]
        order = np.argsort(index, kind="stable")  # memory maps are read forwards
        values = np.empty((len(index), self.dim), dtype=self.data.dtype)
        values[order] = self.data[index[order]]
        return self._prepare(torch.from_numpy(values))

    def restore(self, centroids: torch.Tensor) -> np.ndarray:
        """Turn centroids into the coordinates of `data`, [k, D] float32."""
        return (centroids + self.centre).cpu().numpy()

    def _raw(self, start: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.data[self.index[start : start + CHUNK]]))

    def _prepare(self, values: torch.Tensor) -> torch.Tensor:
        x = values.to(self.device).float()
        return torch.nn.functional.normalize(x, dim=1) if self.unit else x - self.centre
