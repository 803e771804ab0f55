"""All similarities of a test in one pass: ranks, AP, histograms, and the lists of the queries to show."""

from typing import NamedTuple

import numpy as np
import torch

from datasets.reid import ReidImages
from metrics.protocols import Protocol
from metrics.reid import Ranks, rank_blocks, scores

BINS = 20_000  # of the cosines in [-1, 1]: those of some encoders fill a hundredth of it
COUNTED = 1 << 25  # pairs of different vehicles counted at most


class Card(NamedTuple):
    """A gallery image in a list: row, rank from 1 (junk, which is not counted: 0), right, wrong or junk."""

    row: int
    rank: int
    mark: str
    cosine: float


class Ranking:
    """What the page needs of all similarities, in one pass over their blocks.

    ranks: of all true matches. ap: [Q] float64 in [0, 1], NaN: no match. chosen: {section: query rows, in
    order}; similar: {query row: [G] float32} of those, as they were scored: a cosine computed again may
    differ in its last digit and swap two images. true, others: [BINS] int64, pairs of the same vehicle
    without junk, and of different vehicles, by cosine; beyond COUNTED pairs, `others` are with a random part
    of the gallery.
    """

    def __init__(self, protocol: Protocol, query: ReidImages, gallery: ReidImages, shown: int, seed: int):
        self.protocol, self.query, self.gallery, self.shown = protocol, query, gallery, shown
        rng = np.random.default_rng(seed)
        self.priority = rng.random(len(query))
        columns = rng.permutation(len(gallery))[: max(1, COUNTED // max(len(query), 1))]
        self.columns, self.sampled = np.sort(columns), np.isin(np.arange(len(gallery)), columns)
        order = np.argsort(gallery.pids, kind="stable")
        pids, starts = np.unique(gallery.pids[order], return_index=True)
        self.same = dict(zip(pids.tolist(), np.split(order, starts[1:])))  # pid -> gallery rows
        self.ranks, self.ap = Ranks(np.zeros(0, np.int64), np.zeros(1, np.int64)), np.zeros(0)
        self.chosen: dict[str, np.ndarray] = {}
        self.similar: dict[int, np.ndarray] = {}
        self.true, self.others = np.zeros((2, BINS), np.int64)

    def is_junk(self, query_rows: np.ndarray, gallery_rows: np.ndarray) -> np.ndarray:
        """[n] bool of pairs of the same vehicle."""
        if not self.protocol.remove_same_camera:
            return np.zeros(len(gallery_rows), dtype=bool)
        return self.query.camids[query_rows] == self.gallery.camids[gallery_rows]

    def add(self, similar: torch.Tensor) -> None:
        """[q, G] float cosines of the next queries."""
        rows = np.arange(len(self.ap), len(self.ap) + len(similar))
        same = [self.same.get(pid, np.zeros(0, np.int64)) for pid in self.query.pids[rows].tolist()]
        owner, column = np.repeat(rows, [len(found) for found in same]), np.concatenate(same)
        pairs = tuple(torch.from_numpy(i).to(similar.device) for i in (owner - rows[0], column))
        cosines = similar[pairs]
        self._count(similar, cosines.cpu(), owner, column)
        cameras = (self.query.camids[rows], self.gallery.camids) if self.protocol.remove_same_camera else ()
        ranks = rank_blocks([similar], self.query.pids[rows], self.gallery.pids, *cameras)
        similar[pairs] = cosines  # the ranking has overwritten the junk
        hits, offsets = self.ranks.hits, self.ranks.offsets
        self.ranks = Ranks(
            np.concatenate([hits, ranks.hits]), np.concatenate([offsets, offsets[-1] + ranks.offsets[1:]])
        )
        self.ap = np.concatenate([self.ap, average_precisions(ranks)])
        self.chosen = self._choose()
        wanted = {int(row) for found in self.chosen.values() for row in found}
        fresh = {row: similar[row - rows[0]].cpu().numpy().copy() for row in wanted if row >= rows[0]}
        self.similar = fresh | {row: x for row, x in self.similar.items() if row in wanted}

    def _count(self, similar, cosines, owner, column) -> None:
        """All pairs with the sampled part of the gallery, less those of the same vehicle."""
        columns = slice(None) if self.sampled.all() else torch.from_numpy(self.columns).to(similar.device)
        self.others += _histogram(similar[:, columns]) - _histogram(cosines[self.sampled[column]])
        self.true += _histogram(cosines[~self.is_junk(owner, column)])

    def _choose(self) -> dict[str, np.ndarray]:
        """Those of the queries so far. Who is chosen of all is also chosen of any first part, so that the
        similarities of the others may be dropped on the way."""
        scored = np.flatnonzero(~np.isnan(self.ap))
        ap, pids = self.ap[scored], self.query.pids[scored]
        best = np.lexsort((-self.ranks.counts()[scored], -ap))
        first = np.sort(np.unique(pids[best], return_index=True)[1])  # of each vehicle
        order = {
            "worst": np.argsort(ap, kind="stable"),
            "best": np.concatenate([best[first], np.delete(best, first)]),
            "random": np.argsort(self.priority[scored], kind="stable"),
        }
        return {name: scored[rows[: self.shown]] for name, rows in order.items()}

    def cards(self, row: int, topk: int) -> list[Card]:
        """The list of a chosen query: its first `topk` counted images, up to as many junk ones among them,
        and the first right one where it comes later. Ties in the order of the gallery."""
        similar, same = self.similar[row], self.same.get(int(self.query.pids[row]), np.zeros(0, np.int64))
        mark = np.full(len(similar), "wrong")
        mark[same] = np.where(self.is_junk(np.full(len(same), row), same), "junk", "right")
        order = np.argsort(-similar, kind="stable")
        mark = mark[order]
        counted = mark != "junk"
        rank = np.cumsum(counted)
        within = (rank - counted < topk) & (counted | (np.cumsum(~counted) <= topk))
        within[np.flatnonzero(mark == "right")[:1]] = True
        return [
            Card(int(order[i]), int(rank[i] * counted[i]), str(mark[i]), float(similar[order[i]]))
            for i in np.flatnonzero(within)
        ]


def average_precisions(ranks: Ranks) -> np.ndarray:
    """[Q] float64 AP of each query by `scores`; NaN where it has no match."""
    pairs = zip(ranks.offsets[:-1], ranks.offsets[1:])
    return np.array([scores(Ranks(ranks.hits[a:b], np.array([0, b - a])), ())["mAP"] for a, b in pairs])


def _histogram(cosines: torch.Tensor) -> np.ndarray:
    """[BINS] int64; in parts, as torch counts in float32."""
    counts = np.zeros(BINS, np.int64)
    for part in cosines.reshape(-1).split(1 << 22):
        counts += torch.histc(part.clamp(-1, 1), BINS, -1, 1).long().cpu().numpy()
    return counts
