"""Copies of one picture within the pool, and copies of benchmark pictures."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from curation.align import Aligner
from curation.index import Index
from curation.near import Pairs, embedding_pairs, hash_pairs, once, stars
from curation.removal import Removal, Removals

# alike by hash or embedding is only believed where the pixels do not contradict: plain backgrounds share
# hashes, and two cars of one model share embeddings
FLOOR = 0.8  # of the agreement
CANDIDATE_COSINE = 0.65  # of the nearest neighbours, those at least so alike are laid over each other


@dataclass(frozen=True)
class Likeness:
    """When two images are near copies: at most `bits` of their hashes differ, or the cosine of their
    embeddings or the agreement of their aligned pixels is at least so high."""

    bits: int
    cosine: float
    agreement: float


@dataclass(frozen=True)
class Embedded:
    """data: [n, D] memory map; rows: [n] int64, the index rows they belong to, ascending."""

    data: np.ndarray
    rows: np.ndarray

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Index rows -> rows of `data`."""
        return np.searchsorted(self.rows, rows)


def near_pairs(
    index: Index, embedded: Embedded, first: np.ndarray, second: np.ndarray, like: Likeness, aligner: Aligner, seed: int
) -> Pairs:
    """Near copies between two lists of index rows (or within one, given twice); value: their
    agreement (`Aligner.agreement`).

    A pair is near when, among the nearest neighbours, (1) the agreement is at least `like.agreement`; an
    agreement of 0.8 is enough where (2) the hashes differ in at most `like.bits`, or (3) the cosine is at
    least `like.cosine`, each among the other's nearest (within one list).
    """
    within = first is second
    by_hash = hash_pairs(index.phash[first], index.phash[second], like.bits, within)
    floor = min(CANDIDATE_COSINE, like.cosine)
    alike = embedding_pairs(
        embedded.data, embedded.place(first), embedded.place(second), floor, aligner.device, seed=seed
    )
    both_ways = np.ones(len(alike), dtype=bool)
    if within:
        alike, both_ways = once(alike)
    hash_fits = aligner.agreement(first[by_hash.first], second[by_hash.second])
    fits = aligner.agreement(first[alike.first], second[alike.second])
    near_hash = hash_fits >= FLOOR
    near = fits >= like.agreement
    near |= (alike.value >= like.cosine) & both_ways & (fits >= FLOOR)
    return Pairs(
        np.concatenate([by_hash.first[near_hash], alike.first[near]]),
        np.concatenate([by_hash.second[near_hash], alike.second[near]]),
        np.concatenate([hash_fits[near_hash], fits[near]]),
    )


def _first_of_each(keys: np.ndarray) -> np.ndarray:
    """[n, m] -> [n] int64, the first row that equals each row."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def find_leaks(
    index: Index,
    embedded: Embedded,
    alive: np.ndarray,
    benchmark_of: Callable[[int], str | None],
    *,
    like: Likeness,
    aligner: Aligner,
    seed: int,
) -> Removal:
    """Pool rows that are a picture of an excluded source: the same bytes, the same pixels, or near; and rows
    whose path says that they are a test image of a known benchmark.

    Args:
        alive: [n] int64 pool rows still in. benchmark_of: row -> the benchmark whose test split it lies in,
        if any.
    """
    out = Removals(len(index))
    named = [(int(row), name) for row in alive if (name := benchmark_of(int(row)))]
    for name in dict.fromkeys(name for _, name in named):
        rows = np.array([row for row, other in named if other == name], dtype=np.int64)
        out.add(f"{name}: in a folder of its test images", rows)
    excluded = np.flatnonzero(index.excluded & index.readable)
    both = np.concatenate([excluded, alive])  # so that the first of equal ones is an excluded one
    for reason, keys in (("same file", index.file_hash), ("same pixels", index.pixel_hash)):
        first = both[_first_of_each(keys[both])]
        hit = index.excluded[first[len(excluded) :]]
        for number in np.unique(index.source[first[len(excluded) :][hit]]):
            mine = hit & (index.source[first[len(excluded) :]] == number)
            of = first[len(excluded) :][mine]
            out.add(f"{index.sources[number]}: {reason}", alive[mine], of, 1.0)
    rest = alive[~out.removed()[alive]]
    pairs = near_pairs(index, embedded, rest, excluded, like, aligner, seed)
    order = np.lexsort((-pairs.value, pairs.first))
    order = order[np.unique(pairs.first[order], return_index=True)[1]]  # the best match of each
    rows, of = rest[pairs.first[order]], excluded[pairs.second[order]]
    for number in np.unique(index.source[of]):
        mine = index.source[of] == number
        name = index.sources[number]
        out.add(f"{name}: near (agreement)", rows[mine], of[mine], pairs.value[order][mine])
    return out.finish()


def find_duplicates(
    index: Index,
    embedded: Embedded,
    alive: np.ndarray,
    leaked: np.ndarray,
    *,
    like: Likeness,
    aligner: Aligner,
    group_cap: int,
    track_cap: int,
    seed: int,
) -> Removal:
    """Of copies the largest picture stays, and those that are no direct copies of one that stays; of each
    (identity, camera) at most `track_cap` stay.

    Args:
        alive, leaked: int64 pool rows, ascending. Near copies of a leaked picture go with it.
    """
    out = Removals(len(index))
    keys = np.concatenate([index.file_hash, index.box.astype(np.uint64)], axis=1)
    for reason, values in (("same file", keys), ("same pixels", index.pixel_hash)):
        rest = alive[~out.removed()[alive]]
        first = rest[_first_of_each(values[rest])]
        copies = first != rest
        out.add(reason, rest[copies], first[copies], 1.0)
    rest = np.sort(np.concatenate([alive[~out.removed()[alive]], leaked]))
    pairs = near_pairs(index, embedded, rest, rest, like, aligner, seed)
    is_leaked = np.isin(rest, leaked)
    leak = np.full(len(rest), -1, dtype=np.int64)  # a leaked picture takes all its copies, beyond any cap
    likeness = np.zeros(len(rest), dtype=np.float32)
    for one, other in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
        hit = is_leaked[one] & ~is_leaked[other]
        better = np.argsort(pairs.value[hit], kind="stable")  # the most alike is written last
        leak[other[hit][better]], likeness[other[hit][better]] = one[hit][better], pairs.value[hit][better]
    gone = leak >= 0
    out.add("copy of a leaked picture (agreement)", rest[gone], rest[leak[gone]], likeness[gone])
    inside = ~is_leaked & ~gone
    kept = inside[pairs.first] & inside[pairs.second]
    area = index.width[rest].astype(np.int64) * index.height[rest]
    order = np.lexsort((rest, -area))
    of, likeness = stars(order, Pairs(pairs.first[kept], pairs.second[kept], pairs.value[kept]), group_cap)
    gone = of != np.arange(len(rest))
    out.add("near copy (agreement)", rest[gone], rest[of[gone]], likeness[gone])
    rest = alive[~out.removed()[alive]]
    known = rest[(index.identity[rest] >= 0) & (index.camera[rest] >= 0)]
    pairs_of_ids = np.stack([index.identity[known], index.camera[known]], axis=1)
    if len(known):
        _, inverse, counts = np.unique(pairs_of_ids, axis=0, return_inverse=True, return_counts=True)
        inverse = inverse.reshape(-1)
        order = np.argsort(inverse, kind="stable")
        place = np.arange(len(known)) - np.repeat(np.cumsum(counts) - counts, counts)
        total = counts[inverse[order]]
        # evenly spaced frames stay: the k-th that begins a new of `track_cap` equal stretches
        cap = np.minimum(total, track_cap)
        stays = (place * cap // total) != ((place - 1) * cap // total)
        gone = known[order[~stays]]
        out.add("beyond the cap of its identity and camera (images)", np.sort(gone), value=track_cap)
    return out.finish()
