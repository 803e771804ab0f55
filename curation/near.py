"""Pairs of images that are alike, without comparing all with all: by perceptual hash, and by embedding."""

from dataclasses import dataclass

import numpy as np
import torch

from curation.hierarchy import members_by_cluster, step_rng
from curation.kmeans import kmeans
from curation.rows import Rows

BANDS = 4  # of 16 bits each
MAX_BITS = 2 * BANDS - 1  # with one flipped bit allowed in a band, no pair up to this distance is missed
PAIR_BLOCK = 4_000_000  # candidate pairs held at a time
BRUTE_ROWS = 20_000  # a base of up to so many rows is compared with all queries


@dataclass(frozen=True)
class Pairs:
    """Alike images: first, second [P] int64, value [P] float32 (how alike; larger is more)."""

    first: np.ndarray
    second: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def hash_pairs(queries: np.ndarray, base: np.ndarray, bits: int, skip_same: bool) -> Pairs:
    """All (query, base) whose 64-bit hashes differ in at most `bits` bits; value: minus the number of bits.

    Multi-index hashing (Norouzi et al., 2012): such a pair agrees in one of four bands but for one bit.

    Args:
        queries, base: uint64. skip_same: they are one set, of which each pair is wanted once, first < second.
    """
    if bits > MAX_BITS:
        raise ValueError(f"at most {MAX_BITS} bits, got {bits}")
    found = [np.zeros(0, dtype=np.int64)]
    for band in range(BANDS):
        shift = np.uint64(16 * band)
        keys = ((base >> shift) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        own = ((queries >> shift) & np.uint64(0xFFFF)).astype(np.int64)
        for flip in [0] + [1 << bit for bit in range(16 if bits >= BANDS else 0)]:
            low = np.searchsorted(ordered, own ^ flip, side="left")
            high = np.searchsorted(ordered, own ^ flip, side="right")
            for first, place in _expand(low, high):
                second = order[place]
                if skip_same:
                    ahead = first < second
                    first, second = first[ahead], second[ahead]
                near = np.bitwise_count(queries[first] ^ base[second]) <= bits
                found.append(first[near] * len(base) + second[near])
    codes = np.unique(np.concatenate(found))
    first, second = codes // max(len(base), 1), codes % max(len(base), 1)
    distance = np.bitwise_count(queries[first] ^ base[second]).astype(np.float32)
    return Pairs(first, second, -distance)


def _expand(low: np.ndarray, high: np.ndarray):
    """Ranges [low, high) of each query -> (query, position) arrays, a bounded number of pairs at a time."""
    counts = high - low
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, done + PAIR_BLOCK, side="right")), start + 1)
        chosen = counts[start:stop]
        query = np.repeat(np.arange(start, stop), chosen)
        within = np.arange(len(query)) - np.repeat(np.cumsum(chosen) - chosen, chosen)
        yield query, np.repeat(low[start:stop], chosen) + within
        start = stop


def embedding_pairs(
    data: np.ndarray,
    queries: np.ndarray,
    base: np.ndarray,
    cosine: float,
    device: torch.device,
    *,
    neighbours: int = 8,
    seed: int = 0,
    probes: int = 4,
) -> Pairs:
    """(query, base) pairs with at least this cosine, among the nearest `neighbours` of each query.

    With a base of up to 20,000 rows all are compared; beyond, the base is cut into cells of about a
    thousand by k-means and a query looks into its nearest four.

    Args:
        data: [N, D] embeddings; queries, base: int64 rows of it. A row is no neighbour of itself.
    Returns:
        Pairs of positions in `queries` and `base`; value: the cosine.
    """
    if not len(queries) or not len(base):
        return Pairs(*(np.zeros(0, dtype=t) for t in (np.int64, np.int64, np.float32)))
    if len(base) <= BRUTE_ROWS:
        return _compare(data, queries, base, np.arange(len(queries)), np.arange(len(base)), cosine, device, neighbours)
    rows = Rows(data, device, base, unit=True, alone=True)
    cells = max(2, len(base) // 1000)
    clusters = kmeans(rows, cells, iterations=8, rng=step_rng(seed, 2000), strict=False)
    centroids = clusters.centroids
    members, offsets = members_by_cluster(clusters.assignment, cells)
    visits = [np.zeros((0, probes), dtype=np.int64)]
    for start in range(0, len(queries), 65_536):
        x = _unit(data, queries[start : start + 65_536], device)
        visits.append((x @ centroids.t()).topk(min(probes, cells), dim=1).indices.cpu().numpy())
    wanted = np.concatenate(visits[1:])
    cell_order = np.argsort(wanted.ravel(), kind="stable")
    cell_ends = np.cumsum(np.bincount(wanted.ravel(), minlength=cells))
    found = []
    for cell in range(cells):
        asking = cell_order[(cell_ends[cell - 1] if cell else 0) : cell_ends[cell]] // wanted.shape[1]
        there = members[offsets[cell] : offsets[cell + 1]]
        if len(asking) and len(there):
            found.append(_compare(data, queries, base, asking, there, cosine, device, neighbours))
    first, second, value = (np.concatenate([getattr(p, name) for p in found]) for name in ("first", "second", "value"))
    return _nearest(first, second, value, neighbours)


def _compare(data, queries, base, asking, there, cosine, device, neighbours) -> Pairs:
    """Positions `asking` of the queries against positions `there` of the base."""
    y = _unit(data, base[there], device)
    parts = []
    theirs = torch.from_numpy(base[there]).to(device)
    for start in range(0, len(asking), 2048):
        mine = asking[start : start + 2048]
        similar = _unit(data, queries[mine], device) @ y.t()
        similar[theirs[None] == torch.from_numpy(queries[mine]).to(device)[:, None]] = -2
        value, place = similar.topk(min(neighbours, len(there)), dim=1)
        row, column = (value >= cosine).nonzero(as_tuple=True)
        picked = place[row, column].cpu().numpy()
        parts.append((mine[row.cpu().numpy()], there[picked], value[row, column].cpu().numpy()))
    return Pairs(*(np.concatenate(arrays) for arrays in zip(*parts)))


def _nearest(first, second, value, neighbours: int) -> Pairs:
    """Keep each query's best few of what several cells gave."""
    order = np.lexsort((-value, first))
    first, second, value = first[order], second[order], value[order]
    starts = np.searchsorted(first, first, side="left")
    kept = np.arange(len(first)) - starts < neighbours
    return Pairs(first[kept], second[kept], value[kept])


def once(pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """Pairs within one set, once each, first < second, and [P] bool whether they hold in both directions."""
    low, high = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
    codes = low * (int(high.max(initial=-1)) + 1) + high
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    return Pairs(low[first], high[first], pairs.value[first]), counts == 2


def _unit(data, rows, device) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(data[rows])).to(device).float()
    return torch.nn.functional.normalize(x, dim=1)


def stars(order: np.ndarray, pairs: Pairs, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images go, and which one stays for each: every image that goes is itself alike to the one that
    stays, so that a chain of small steps (a surveillance track) does not end as one image.

    Args:
        order: [n] int64, images in order of preference: an image stays unless an earlier one that stays
            stands for it.
        cap: images that one may stand for, itself counted, the most alike first.
    Returns:
        ([n] int64, the image that stands for each (itself if it stays), [n] float32 value of that pair).
    """
    keeper = np.arange(len(order))
    value = np.ones(len(order), dtype=np.float32)
    free = np.ones(len(order), dtype=bool)
    ends = np.concatenate([pairs.first, pairs.second])
    others = np.concatenate([pairs.second, pairs.first])
    values = np.concatenate([pairs.value, pairs.value])
    by_end = np.lexsort((others, -values, ends))
    others, values = others[by_end], values[by_end]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(ends, minlength=len(order)))])
    for image in order[np.diff(offsets)[order] > 0].tolist():
        if not free[image]:
            continue
        free[image] = False
        mine = slice(offsets[image], offsets[image + 1])
        near, alike = others[mine], values[mine]
        still = free[near]
        near, first = np.unique(near[still], return_index=True)  # a pair may have been found twice
        alike = alike[still][first]
        chosen = np.argsort(-alike, kind="stable")[: cap - 1]
        keeper[near[chosen]], value[near[chosen]], free[near[chosen]] = image, alike[chosen], False
    return keeper, value
