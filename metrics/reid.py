"""Ranking metrics of re-identification: exact, in blocks, without a full distance matrix or an argsort.

A gallery image is *junk* for a query if it must not be counted (same vehicle, same camera, where the protocol
says so). With the rest in the order of decreasing cosine, ties in the order of the gallery, and
r_1 < r_2 < ... < r_P the ranks of the images of the query's vehicle:

    AP = 1/P sum_i i / r_i      (non-interpolated, Zheng et al., 2015)
    CMC@k = 1 if r_1 <= k else 0
    INP = P / r_P               (Ye et al., 2020, arXiv 2001.04193, eq. 3)

averaged over the queries that have any such image; the others are counted and named, never scored as 0.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch

BLOCK_NUMBERS = 1 << 25  # similarities held at a time
SORTED_NUMBERS = 1 << 23  # sorted on the CPU at a time: after each lookup torch's threads spin a while
SORTED_AT_ONCE = 1 << 18  # by one thread: what stays in its cache


@dataclass(frozen=True)
class Ranks:
    """What every metric needs of one query set against one gallery.

    hits: [H] int64, ranks (from 1) of the gallery images of each query's vehicle, query by query, ascending;
    offsets: [Q + 1] int64, the hits of query q are hits[offsets[q]:offsets[q + 1]].
    """

    hits: np.ndarray
    offsets: np.ndarray

    def counts(self) -> np.ndarray:
        """[Q] int64 gallery images of each query's vehicle."""
        return np.diff(self.offsets)


def rank_hits(
    query: torch.Tensor,
    gallery: torch.Tensor,
    query_pids: np.ndarray,
    gallery_pids: np.ndarray,
    query_camids: np.ndarray | None = None,
    gallery_camids: np.ndarray | None = None,
    *,
    device: torch.device | str = "cpu",
    block_numbers: int = BLOCK_NUMBERS,
) -> Ranks:
    """Ranks of all true matches by cosine similarity.

    A block of queries is compared with the whole gallery. Only the similarities are sorted, not the images
    with them, which vector instructions do several times faster; looking up those of the true matches
    gives their ranks.

    Args:
        query, gallery: [Q, D], [G, D] float features, of any length; not modified.
        query_pids, gallery_pids: [Q], [G] integers.
        query_camids, gallery_camids: [Q], [G] integers: gallery images of the same vehicle and camera are
            junk. None: there is no junk.
        block_numbers: similarities held at a time at most; memory is 4 bytes each, on CUDA 12.
    Returns:
        Ranks; equal for every block size and device up to rounding of the similarities.
    Raises:
        ValueError: lengths differ, features are not finite, or only one of the cameras is given.
    """
    _check(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids)
    blocks = cosine_blocks(query, gallery, torch.device(device), block_numbers)
    return rank_blocks(blocks, query_pids, gallery_pids, query_camids, gallery_camids)


def cosine_blocks(
    query: torch.Tensor, gallery: torch.Tensor, device: torch.device, block_numbers: int = BLOCK_NUMBERS
) -> Iterator[torch.Tensor]:
    """[q, G] float32 cosines of some queries at a time with the whole gallery, in order.

    A block is good until the next one is asked for, which takes its memory.
    """
    q, g = unit_rows(query, "query", device), unit_rows(gallery, "gallery", device)
    blocks = -(-len(q) // max(1, block_numbers // max(len(g), 1)))
    rows = -(-len(q) // max(1, blocks))  # of one size: a small last one would multiply slower
    block = _empty(rows, len(g), device)
    for part in q.split(max(1, rows)):
        yield torch.mm(part, g.t(), out=block[: len(part)])


def _empty(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """[rows, columns] float32. numpy asks the system for large pages and torch does not: first touching them
    takes as long as a third of the product."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty((rows, columns), dtype=np.float32))
    return torch.empty(rows, columns, device=device)


def unit_rows(x: torch.Tensor, name: str, device: torch.device) -> torch.Tensor:
    """[n, D] float -> float32 rows of length 1; ValueError where one is not finite."""
    x = x.to(device).float()
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not torch.isfinite(lengths).all():
        bad = int((~torch.isfinite(lengths)).nonzero()[0, 0])
        raise ValueError(f"{name}: the features of row {bad} are not finite")
    return torch.div(x, lengths.clamp_min(1e-12), out=_empty(*x.shape, device))


def rank_blocks(
    blocks: Iterable[torch.Tensor],
    query_pids: np.ndarray,
    gallery_pids: np.ndarray,
    query_camids: np.ndarray | None = None,
    gallery_camids: np.ndarray | None = None,
) -> Ranks:
    """`rank_hits` of similarities that come as [q, G] blocks in the order of the queries; junk in them is
    overwritten."""
    order = np.argsort(gallery_pids, kind="stable")
    ordered = gallery_pids[order]
    first = np.searchsorted(ordered, query_pids, side="left")
    last = np.searchsorted(ordered, query_pids, side="right")
    hits: list[np.ndarray] = [np.zeros(0, np.int64)]
    counts = np.zeros(len(query_pids), dtype=np.int64)
    start = 0
    for similar in blocks:
        stop = start + len(similar)
        same, owner = _members(order, first[start:stop], last[start:stop])
        junk = np.zeros(len(same), dtype=bool)
        if query_camids is not None:
            junk = gallery_camids[same] == query_camids[start:stop][owner]
        ranks, found = _block_ranks(similar, same[~junk], owner[~junk], same[junk], owner[junk])
        hits.append(ranks)
        counts[start:stop] = found
        start = stop
    return Ranks(np.concatenate(hits), np.concatenate([[0], np.cumsum(counts)]))


def _members(order: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gallery rows order[first[q]:last[q]] of all queries joined, and the query of each."""
    lengths = last - first
    owner = np.repeat(np.arange(len(first)), lengths)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return order[first[owner] + within], owner


def _block_ranks(similar: torch.Tensor, good, good_owner, junk, junk_owner) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the good (query, gallery) pairs of one block, query by query, ascending.

    Args:
        similar: [q, G]; junk in it is overwritten. good, junk: [*] int64 columns; *_owner: [*] int64 rows,
            ascending.
    Returns:
        ([len(good)] int64, [q] int64 number of good ones).
    """
    device, (count, columns) = similar.device, similar.shape
    found = np.bincount(good_owner, minlength=count)
    if not len(good):
        return np.zeros(0, np.int64), found
    similar[torch.from_numpy(junk_owner).to(device), torch.from_numpy(junk).to(device)] = -torch.inf
    slot = np.arange(len(good)) - np.repeat(np.cumsum(found) - found, found)
    good, owner, slot = (torch.from_numpy(a).to(device) for a in (good, good_owner, slot))
    value = similar[owner, good]
    up_to, tied = _places(similar, value, owner, slot, found)
    ranks = columns - up_to + 1
    tied = tied.nonzero()[:, 0]
    if len(tied):
        ranks[tied] += _equals_ahead(similar, value[tied], good[tied], owner[tied])
    ranks, owner = ranks.cpu().numpy(), owner.cpu().numpy()
    return ranks[np.argsort(owner * (columns + 1) + ranks)], found


def _places(similar, value, owner, slot, found) -> tuple[torch.Tensor, torch.Tensor]:
    """Where hits stand when the similarities of their query are sorted.

    Args:
        similar: [q, G] float32. value, owner, slot: [n] similarity, query, and number among its query's hits,
            query by query. found: [q] int64 hits of each query.
    Returns:
        [n] int64 similarities up to and with the hit's own, [n] bool whether another is equal to it.
    """
    padded = torch.full((len(found), int(found.max())), torch.inf, device=similar.device)
    padded[owner, slot] = value
    up_to, tied = torch.empty_like(padded, dtype=torch.long), torch.empty_like(padded, dtype=torch.bool)
    for part, ordered in _sorted_rows(similar):
        torch.searchsorted(ordered, padded[part], right=True, out=up_to[part])
        before = (up_to[part] - 2).clamp_min(0)  # the one below the hit itself
        tied[part] = (ordered.gather(1, before) == padded[part]) & (up_to[part] > 1)
    return up_to[owner, slot], tied[owner, slot]


def _sorted_rows(similar: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which rows of [q, G] float32, and these sorted, good until the next are asked for."""
    if similar.device.type != "cpu":
        yield slice(None), similar.sort(dim=1).values
        return
    count, columns = similar.shape
    step, inner = (max(1, numbers // max(columns, 1)) for numbers in (SORTED_NUMBERS, SORTED_AT_ONCE))
    source, scratch = similar.numpy(), _empty(min(step, count), columns, similar.device)

    def sort(target: np.ndarray, start: int) -> None:
        rows = target[start % step : start % step + inner]
        np.copyto(rows, source[start : start + len(rows)])
        rows.sort(axis=1)  # numpy does it with vector instructions, torch does not

    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for first in range(0, count, step):
            ordered = scratch[: count - first]
            list(pool.map(sort, repeat(ordered.numpy()), range(first, first + len(ordered), inner)))
            yield slice(first, first + step), ordered


def _equals_ahead(similar, value, good, owner) -> torch.Tensor:
    """[n] int64: gallery images as similar as the hit and before it in the gallery."""
    step = max(1, (1 << 24) // similar.shape[1])
    columns = torch.arange(similar.shape[1], device=similar.device)
    return torch.cat(
        [
            ((similar[o] == v[:, None]) & (columns < g[:, None])).sum(dim=1)
            for o, v, g in zip(owner.split(step), value.split(step), good.split(step))
        ]
    )


def _check(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids) -> None:
    for name, x, pids, camids in (
        ("query", query, query_pids, query_camids),
        ("gallery", gallery, gallery_pids, gallery_camids),
    ):
        if len(x) != len(pids) or (camids is not None and len(camids) != len(pids)):
            raise ValueError(f"{name}: {len(x)} features, {len(pids)} pids, camids {camids is not None}")
    if (query_camids is None) != (gallery_camids is None):
        raise ValueError("cameras are needed of both query and gallery, or of neither")


def scores(ranks: Ranks, topk: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """mAP, CMC ("R1", ...), mINP in [0, 1], and the numbers of scored and of matchless queries.

    NaN where no query has a match.
    """
    counts = ranks.counts()
    scored = counts > 0
    result: dict[str, float] = {"queries": int(scored.sum()), "queries_without_match": int((~scored).sum())}
    if not scored.any():
        return {"mAP": np.nan, **{f"R{k}": np.nan for k in topk}, "mINP": np.nan, **result}
    place = np.arange(len(ranks.hits)) - np.repeat(ranks.offsets[:-1], counts) + 1
    precision = place / ranks.hits
    starts = ranks.offsets[:-1][scored]
    ap = np.add.reduceat(precision, starts) / counts[scored]
    first, last = ranks.hits[starts], ranks.hits[ranks.offsets[1:][scored] - 1]
    cmc = {f"R{k}": float((first <= k).mean()) for k in topk}
    return {"mAP": float(ap.mean()), **cmc, "mINP": float((counts[scored] / last).mean()), **result}
