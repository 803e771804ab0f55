"""Beyond a million pictures: the gallery's vectors and their graph (HNSW) in usearch, an optional package."""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch

from tools.gallery import CURE, Changed, Condition, Gallery, search_rows
from util.errors import InputError
from util.files import read_json, write_atomic

FEW = 10_000  # pictures that meet the conditions are compared one by one, without the graph


def usearch_index() -> type:
    try:
        from usearch.index import Index
    except ImportError as error:
        why = "pip install usearch, or make an index without the flag, which is searched exactly"
        raise InputError(f"--engine usearch needs the package usearch: {why}") from error
    return Index


class GraphGallery(Gallery):
    """The same gallery, whose vectors usearch holds for a search, with its graph (HNSW): in a file of their own, named
    after the segments in it, which a writer makes last. What it finds is compared exactly."""

    @property
    def graph(self) -> Path:
        names = "".join(name for name, _ in self.segments)
        return self.folder / f"graph-{hashlib.sha256(names.encode()).hexdigest()[:16]}.usearch"

    def _load(self, file: Path, view: bool):
        try:
            return usearch_index().restore(str(file), view=view)  # says so where the file is cut short
        except RuntimeError as error:
            raise InputError(f"{file} is damaged ({error}): remove it; the next --gallery builds it anew") from error

    def _keys(self, segment: int, rows: np.ndarray) -> np.ndarray:
        """What usearch calls rows of a segment: they stay when others are joined."""
        return np.uint64(int(re.sub(r"\D", "", self.segments[segment][0])) << 32) + rows.astype(np.uint64)

    def _numbers(self, keys: np.ndarray) -> np.ndarray:
        first = np.concatenate([self._keys(segment, np.zeros(1)) for segment in range(len(self.segments))])
        return self.ends[np.searchsorted(first >> 32, keys >> 32)] + (keys & 0xFFFFFFFF).astype(np.int64)

    def tidy(self) -> None:
        """Beside what every gallery does: bring the graph to the segments, and write it anew."""
        super().tidy()
        old = next(self.folder.glob("graph-*.usearch"), None)
        if self.segments and not self.graph.is_file():
            how = {"ndim": self.about["width"], "metric": "cos", "dtype": "f16"}
            index = self._load(old, view=False) if old else usearch_index()(**how)
            keys = index.keys[:].astype(np.uint64) if old else np.zeros(0, np.uint64)
            wanted = np.array([self._keys(i, np.zeros(1))[0] >> 32 for i in range(len(self.segments))])
            known = np.unique(keys >> 32)
            index.remove(keys[~np.isin(keys >> 32, wanted)])
            for segment in np.flatnonzero(~np.isin(wanted, known)).tolist():
                rows = np.flatnonzero(~self.segments[segment][1])
                index.add(self._keys(segment, rows), self._read(segment, "embeddings")[rows])
            write_atomic(self.graph, lambda opened: index.save(opened.name))
        for file in self.folder.glob("graph-*.usearch"):
            if file != self.graph:
                file.unlink()

    def search(self, query: torch.Tensor, k: int, conditions: list[Condition]) -> tuple[np.ndarray, np.ndarray, int]:
        if not self.graph.is_file():
            if read_json(self.file, CURE) != self.about:
                raise Changed
            print(f"{self.folder}: its graph is not built yet (a --gallery was stopped): the search is exact")
            return super().search(query, k, conditions)
        index = self._load(self.graph, view=True)
        chosen = self._chosen(conditions)
        kept, total = np.concatenate(chosen), sum(int(flags.sum()) for flags in chosen)
        values, found = np.full((len(query), k), -np.inf, np.float32), np.zeros((len(query), k), np.int64)
        few = [self._keys(i, np.flatnonzero(flags)) for i, flags in enumerate(chosen)] if total <= FEW else None
        for place, line in enumerate(query if total else ()):
            if not torch.isfinite(line).all():  # an unreadable query
                continue
            keys, count = np.concatenate(few) if few else None, 2 * k * len(kept) // max(total, 1)
            while keys is None:
                near = np.sort(index.search(line.cpu().numpy(), min(count, len(index))).keys)
                keys = near[kept[self._numbers(near)]]
                if len(keys) < min(k, total) and count < len(index):
                    keys, count = None, 4 * count
            rows = np.array(index.get(keys)).reshape(len(keys), -1)
            own = search_rows(line[None], [(self._numbers(keys), rows)], k)
            values[place, : own[0].shape[1]], found[place, : own[1].shape[1]] = own[0][0], own[1][0]
        return values[:, :total], found[:, :total], total
