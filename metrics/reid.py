"""Scores of re-identification: exact, in blocks, without a full distance matrix or an argsort.

A gallery image is *junk* for a query if it must not be counted: the query's own file, and images of the same vehicle
and camera where the protocol says so. With the rest in the order of decreasing similarity, ties in the order of the
gallery, and r_1 < r_2 < ... < r_P the ranks of the images of the query's vehicle:

    AP = 1/P sum_i i / r_i      (non-interpolated, Zheng et al., 2015)
    CMC@k = 1 if r_1 <= k else 0
    INP = P / r_P               (Ye et al., 2020, arXiv 2001.04193, eq. 3)

averaged over the queries that have any such image; the others are counted and named, never scored as 0. Q queries, G
gallery images, D numbers a feature.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from metrics.intervals import Measure
from metrics.rerank import Device, cosine_blocks, equal_pairs, expanded, ranges, reranked_blocks

SORTED_AT_ONCE = 1 << 18  # similarities of one thread: what its cache keeps
MARKS = ("wrong", "right", "junk")
EXPANDED = {
    "aqe": "queries averaged with their {0} nearest",
    "alpha": "queries with their {0} nearest, alpha {1:g}",
    "dba": "gallery images with their {0} nearest, alpha {1:g}",
}


class FeatureSet(NamedTuple):
    """features: [n, D] float, of any length. pids, camids: [n] int64. files: [n] int64, equal for one file, or None."""

    features: torch.Tensor
    pids: np.ndarray
    camids: np.ndarray
    files: np.ndarray | None = None

    @classmethod
    def of(cls, features: torch.Tensor, images) -> "FeatureSet":
        """Of images that have these pids, camids and files."""
        return cls(features, images.pids, images.camids, images.files)

    def take(self, rows: np.ndarray) -> "FeatureSet":
        return FeatureSet(*(None if part is None else part[rows] for part in self))


@dataclass(frozen=True)
class Protocol:
    """The rules of one number. remove_same_camera: gallery images of the query's vehicle and camera do not count
    (VeRi-776's rule; VERI-Wild's authors ask for it too, though their scripts keep them: about 4 points of mAP more).
    draws: 0, or how often one random image of each vehicle becomes the gallery and the rest the queries (VehicleID);
    scores are means over the draws. rerank: (k1, k2, lambda) of `reranked_blocks`, or None. expand: (methods, k, alpha)
    of `expanded`, or None. across: (set of the training, set of the test) where they differ, or None."""

    name: str
    remove_same_camera: bool
    draws: int = 0
    seed: int = 0
    rerank: tuple[int, int, float] | None = None
    expand: tuple[tuple[str, ...], int, float] | None = None
    across: tuple[str, str] | None = None

    def line(self) -> str:
        """One line to print beside the numbers; its last eight digits differ where a rule differs."""
        rule = f"same-camera matches {'removed' if self.remove_same_camera else 'kept, but not the query itself'}"
        if self.draws:
            drawn = f"1 gallery image a vehicle, {self.draws} draws, seed {self.seed}"
            rule = f"{rule}, {drawn}" if self.remove_same_camera else drawn
        ranking = "re-ranked with k1 {}, k2 {}, lambda {:g}".format(*self.rerank) if self.rerank else "no re-ranking"
        for method in self.expand[0] if self.expand else ():
            ranking = f"{EXPANDED[method].format(*self.expand[1:])}, {ranking}"
        ranking += ", trained on {}, tested on {}".format(*self.across) if self.across else ""
        rules = {k: v for k, v in asdict(self).items() if k not in ("expand", "across") or v}  # older lines stay
        digits = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:8]
        return f"{self.name} ({rule}, cosine, {ranking}) #{digits}"


def protocols_of(name: str, tests: dict, keep_same_camera: bool = False, seed: int = 0) -> dict[str, Protocol]:
    """The protocol of each test of a set; tests: {test: (query, gallery)} with camids, -1: not known; gallery None:
    drawn; keep_same_camera: the other variant, under another name; seed: of the draws."""
    found = {}
    for test, (query, gallery) in tests.items():
        title, draws = name if test == "test" else f"{name}/{test}", (10, seed) if gallery is None else ()
        known = gallery is not None and bool((query.camids >= 0).all() and (gallery.camids >= 0).all())
        title += "/same-camera-kept" * (keep_same_camera and known)
        found[test] = Protocol(title, known and not keep_same_camera, *draws)
    return found


def draw_gallery(pids: np.ndarray, seed: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Split as VehicleID does: ([V] int64 gallery rows, one random image of each vehicle; the other rows)."""
    shuffled = np.random.default_rng((seed, draw)).permutation(len(pids))
    gallery = np.sort(shuffled[np.unique(pids[shuffled], return_index=True)[1]])
    return gallery, np.setdiff1d(np.arange(len(pids)), gallery)


@dataclass(frozen=True)
class Ranks:
    """hits: [H] int64, ranks (from 1) of the gallery images of each query's vehicle, query by query, ascending;
    offsets: [Q + 1] int64, the hits of query q are hits[offsets[q]:offsets[q + 1]]."""

    hits: np.ndarray
    offsets: np.ndarray

    def counts(self) -> np.ndarray:
        """How many hits each query has, [Q]."""
        return np.diff(self.offsets)

    def average_precision(self) -> np.ndarray:
        """[Q] float64 AP of each query; NaN where it has no match."""
        counts, scored = self.counts(), self.counts() > 0
        place = np.arange(len(self.hits)) - np.repeat(self.offsets[:-1], counts) + 1
        ap = np.full(len(counts), np.nan)
        ap[scored] = np.add.reduceat(place / self.hits, self.offsets[:-1][scored]) / counts[scored]
        return ap

    def by_query(self) -> dict[str, np.ndarray]:
        """[Q] float64 whose means are mAP and R1: AP, and 1 where the first image is right; NaN without a match."""
        first = np.full(len(self.offsets) - 1, np.nan)
        scored = self.counts() > 0
        first[scored] = self.hits[self.offsets[:-1][scored]] <= 1
        return {"mAP": self.average_precision(), "R1": first}


def evaluate(
    protocol: Protocol, query: FeatureSet, gallery: FeatureSet | None = None, device: Device = "cpu", similar=None
) -> dict[str, float]:
    """`scores` by a protocol, with 95% intervals over the queries as mAP_low, mAP_high, R1_low, R1_high. With draws
    the gallery is one random image of each vehicle, of the gallery that is given or else of the queries; then scores
    are means over the draws, with standard deviations as mAP_std, R1_std ... similar: see `rank`."""
    return evaluate_queries(protocol, query, gallery, device, similar)[0]


def evaluate_queries(
    protocol: Protocol, query: FeatureSet, gallery: FeatureSet | None = None, device: Device = "cpu", similar=None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """`evaluate`, and `Ranks.by_query`, {} where the gallery is drawn."""
    if not protocol.draws:
        ranks = rank(protocol, query, gallery, device, similar)
        return scores(ranks) | intervals(ranks), ranks.by_query()
    found = []
    for draw in range(protocol.draws):
        kept, asked = draw_gallery((gallery or query).pids, protocol.seed, draw)
        sides = (query, gallery.take(kept)) if gallery else (query.take(asked), query.take(kept))
        found.append(scores(rank(protocol, *sides, device, similar)))
    each = {key: [row[key] for row in found] for key in found[0]}
    spread = {f"{key}_std": float(np.std(each[key])) for key in ("mAP", "R1", "R5", "R10")}
    return {key: float(np.mean(values)) for key, values in each.items()} | spread, {}


def intervals(ranks: Ranks) -> dict[str, float]:
    """The 95% bootstrap intervals of mAP and R1 over the scored queries; {} where there are none."""
    found = {}
    for name, values in ranks.by_query().items():
        if len(known := values[~np.isnan(values)]):
            found |= dict(zip((f"{name}_low", f"{name}_high"), Measure(known[None]).interval()))
    return found


def scores(ranks: Ranks, topk: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """mAP, CMC ("R1", ...), mINP in [0, 1], NaN where no query has a match; numbers of scored and of matchless
    queries."""
    counts = ranks.counts()
    scored = counts > 0
    first, last = ranks.hits[ranks.offsets[:-1][scored]], ranks.hits[ranks.offsets[1:][scored] - 1]
    each = {"mAP": ranks.average_precision()[scored], **{f"R{k}": first <= k for k in topk}}
    each["mINP"] = counts[scored] / last
    means = {name: float(values.mean()) if len(values) else np.nan for name, values in each.items()}
    return means | {"queries": int(scored.sum()), "queries_without_match": int((~scored).sum())}


def rank(
    protocol: Protocol, query: FeatureSet, gallery: FeatureSet, device: Device = "cpu", similar: Callable | None = None
) -> Ranks:
    """Ranks of all true matches by the rules of a protocol. similar: (query features, gallery features) -> blocks that
    `rank_blocks` takes, where features are no vectors; then nothing is expanded or re-ranked."""
    cameras = (query.camids, gallery.camids) if protocol.remove_same_camera else (None, None)
    if protocol.expand:
        query, gallery = expanded(query, gallery, *protocol.expand, device)
    make_blocks, options = (reranked_blocks, protocol.rerank) if protocol.rerank else (cosine_blocks, ())
    sides = query.features, gallery.features
    blocks = similar(*sides) if similar else make_blocks(*sides, *options, device=device)
    return rank_blocks(blocks, query.pids, gallery.pids, *cameras, query.files, gallery.files)


def rank_blocks(
    blocks: Iterable, query_pids, gallery_pids, query_camids=None, gallery_camids=None,
    query_files=None, gallery_files=None,
) -> Ranks:  # fmt: skip
    """Ranks of all true matches; ValueError where the pids are not as many as the similarities. Only similarities are
    sorted, not images with them, which is several times faster; looking up those of the matches gives their ranks.

    blocks: [q, G] similarities of some queries at a time, in order; junk in them is overwritten. Junk are, of [Q] and
    [G] int64 that are given, images of the query's pid and camid, and its own file, whatever its pid.
    """
    matches = match_pairs(query_pids, gallery_pids, query_camids, gallery_camids, query_files, gallery_files)
    hits, counts, start = [np.zeros(0, np.int64)], np.zeros(len(query_pids), np.int64), 0
    for similar in blocks:
        part = slice(start, start + len(similar))
        if similar.shape[1] != len(gallery_pids):
            raise ValueError(f"{len(similar)} x {similar.shape[1]} similarities, {len(gallery_pids)} gallery pids")
        (owner, good), junk = matches(part)
        counts[part] = np.bincount(owner, minlength=len(similar))
        if len(good):
            similar[tuple(torch.from_numpy(ids).to(similar.device) for ids in junk)] = -torch.inf
            hits.append(_block_ranks(similar, owner, good, counts[part]))
        start = part.stop
    if start != len(query_pids):
        raise ValueError(f"similarities of {start} queries, but {len(query_pids)} pids")
    return Ranks(np.concatenate(hits), np.concatenate([[0], np.cumsum(counts)]))


def match_pairs(query_pids, gallery_pids, query_camids=None, gallery_camids=None, query_files=None, gallery_files=None):
    """Function of some queries, a slice -> ((places in it, gallery rows) of the true matches, the same of the junk),
    each [n] int64; see `rank_blocks`."""
    if query_files is None or gallery_files is None:  # all are different
        query_files, gallery_files = np.full(len(query_pids), -1), np.arange(len(gallery_pids))
    same_pid, same_file = equal_pairs(query_pids, gallery_pids), equal_pairs(query_files, gallery_files)

    def matches(part: slice):
        owner, same = same_pid(part)
        good = gallery_files[same] != query_files[part][owner]
        if query_camids is not None:
            good &= gallery_camids[same] != query_camids[part][owner]
        junk = tuple(map(np.concatenate, zip((owner[~good], same[~good]), same_file(part))))
        return (owner[good], same[good]), junk

    return matches


def _block_ranks(similar: torch.Tensor, owner: np.ndarray, good: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[n] int64 ranks of pairs of a block [q, G], query by query, ascending; owner, good: their rows, ascending, and
    columns; counts: [q] pairs of each row."""
    G, slots = similar.shape[1], ranges(np.zeros_like(counts), counts)[0]
    rows, columns, slots = (torch.from_numpy(ids).to(similar.device) for ids in (owner, good, slots))
    values, ordered = similar[rows, columns], _sorted_rows(similar)
    padded = torch.full((len(similar), int(counts.max())), torch.inf, device=similar.device)
    padded[rows, slots] = values
    low, high = (torch.searchsorted(ordered, padded, side=side)[rows, slots] for side in ("left", "right"))
    ranks, everywhere = G + 1 - high, torch.arange(G, device=similar.device)
    for tied in (high - low > 1).nonzero()[:, 0].split(max(1, (1 << 24) // G)):
        ahead = (similar[rows[tied]] == values[tied, None]) & (everywhere < columns[tied, None])
        ranks[tied] += ahead.sum(dim=1)
    ranks = ranks.cpu().numpy()
    return ranks[np.lexsort((ranks, owner))]


def _sorted_rows(similar: torch.Tensor) -> torch.Tensor:
    """[q, G] float32 with ascending rows."""
    if similar.device.type != "cpu":
        return similar.sort(dim=1).values
    ordered = similar.numpy().copy()
    parts = np.array_split(ordered, -(-ordered.size // SORTED_AT_ONCE))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda part: part.sort(axis=1), parts))  # in place; numpy has vector instructions for it
    return torch.from_numpy(ordered)


class ShownQueries:
    """The queries that the page shows. ranks: of all true matches. ap: [Q] float64 in [0, 1], NaN: no match. chosen:
    {section: query rows, in order}, at most `shown` each; similar: {query row: [G] float32 cosines} of those."""

    def __init__(self, protocol: Protocol, query: FeatureSet, gallery: FeatureSet, shown: int, seed: int, device="cpu"):
        self.protocol, self.query, self.gallery = protocol, query, gallery
        self.ranks = rank(protocol, query, gallery, device)
        self.ap = self.ranks.average_precision()
        scored = np.flatnonzero(~np.isnan(self.ap))
        drawn = np.random.default_rng(seed).random(len(self.ap))
        orders = {"worst": self.ap[scored], "random": drawn[scored]}
        self.chosen = {name: scored[np.argsort(by, kind="stable")][:shown] for name, by in orders.items()}
        wanted = np.unique(np.concatenate(list(self.chosen.values())))
        blocks = cosine_blocks(query.features[wanted], gallery.features, device)
        self.similar = dict(zip(wanted.tolist(), np.concatenate([block.cpu().numpy().copy() for block in blocks])))

    def cards(self, row: int, topk: int) -> list[tuple[int, int, str, float]]:
        """(gallery row, rank from 1 or 0 for junk, a word of MARKS, cosine) of a chosen query's first `topk` counted
        images, of up to as many junk ones among them, and of the first right one where it comes later."""
        query, gallery, similar = self.query, self.gallery, self.similar[row]
        order = np.argsort(-similar, kind="stable")
        same = gallery.pids == query.pids[row]
        junk = same & self.protocol.remove_same_camera & (gallery.camids == query.camids[row])
        if query.files is not None and gallery.files is not None:
            junk |= gallery.files == query.files[row]
        marks, counted = np.where(junk, 2, same)[order], ~junk[order]
        ranks = np.cumsum(counted)
        within = (ranks - counted < topk) & (counted | (np.cumsum(~counted) <= topk))
        within[np.flatnonzero(marks == 1)[:1]] = True
        columns = order, ranks * counted, np.array(MARKS)[marks], similar[order]
        return list(zip(*(column[within].tolist() for column in columns)))
