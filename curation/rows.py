"""Rows of an embedding file as float32 chunks on a device; each rank walks over its own share."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from util.dist import get_rank, get_world_size
from util.errors import InputError

CHUNK = 8192  # rows read at a time; the same grid for any number of ranks


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
        resident_bytes: rows of this rank are kept on the device where they fit into so many bytes.
        alone: this rank clusters by itself, the others take no part.
    """

    def __init__(
        self,
        data: np.ndarray,
        device: torch.device,
        index: np.ndarray | None = None,
        unit: bool = False,
        centre: torch.Tensor | None = None,
        resident_bytes: float = 4e9,
        alone: bool = False,
    ):
        self.data, self.device, self.unit = data, device, unit
        self.index = np.arange(len(data)) if index is None else index
        self.dim = data.shape[1]
        if not len(self):
            raise InputError("no vectors to cluster: the stages before have dropped every image")
        self.alone = alone or get_world_size() == 1
        world, rank = (1, 0) if self.alone else (get_world_size(), get_rank())
        chunks = -(-len(self) // CHUNK)
        self.first = min(chunks * rank // world * CHUNK, len(self))
        self.last = min(chunks * (rank + 1) // world * CHUNK, len(self))
        self.resident_bytes, self.kept = resident_bytes, None
        self.centre = self._check_and_centre() if centre is None else centre.to(device)
        if (self.last - self.first) * self.dim * 4 <= resident_bytes and self.last > self.first:
            kept = torch.empty(self.last - self.first, self.dim, device=device)
            for start, x in self.chunks():
                kept[start - self.first : start - self.first + len(x)] = x
            self.kept = kept

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, positions: np.ndarray) -> "Rows":
        """Return some of these rows, shifted alike; positions: int64 among these rows."""
        index = self.index[positions]
        return Rows(self.data, self.device, index, self.unit, self.centre, self.resident_bytes, self.alone)

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (position of the first row, [n, D] float32) over this rank's rows."""
        for start in range(self.first, self.last, CHUNK):
            stop = min(start + CHUNK, self.last)
            if self.kept is not None:
                yield start, self.kept[start - self.first : stop - self.first]
            else:
                yield start, self._prepare(self._raw(start, stop))

    def take(self, positions: np.ndarray) -> torch.Tensor:
        """Return any rows, [n, D] float32, on every rank."""
        index = self.index[positions]
        order = np.argsort(index, kind="stable")  # memory maps are read forwards
        values = np.empty((len(index), self.dim), dtype=self.data.dtype)
        values[order] = self.data[index[order]]
        return self._prepare(torch.from_numpy(values))

    def restore(self, centroids: torch.Tensor) -> np.ndarray:
        """Turn centroids into the coordinates of `data`, [k, D] float32."""
        return (centroids + self.centre).cpu().numpy()

    def _raw(self, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.data[self.index[start:stop]]))

    def _prepare(self, values: torch.Tensor) -> torch.Tensor:
        x = values.to(self.device).float()
        return torch.nn.functional.normalize(x, dim=1) if self.unit else x - self.centre

    def _check_and_centre(self) -> torch.Tensor:
        total = torch.zeros(self.dim, dtype=torch.float64)
        for start in range(self.first, self.last, CHUNK):
            total += self._raw(start, min(start + CHUNK, self.last)).double().sum(dim=0)
        if not self.alone:
            total = total.to(self.device)
            dist.all_reduce(total)
        if not total.isfinite().all():
            raise InputError("some embeddings are not finite: embed with another model, or clear --output")
        return torch.zeros(self.dim, device=self.device) if self.unit else (total / len(self)).float().to(self.device)
