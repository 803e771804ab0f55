"""What a ranking can be made from: cosines in blocks, nearest neighbours, k-reciprocal re-ranking, features expanded by
their neighbours. Nothing here holds a matrix of images by images.

Q queries, G gallery images, N of both together, D numbers a feature.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array, vstack

BLOCK_NUMBERS = 1 << 25  # similarities held at a time
BLOCK_ROWS = 1024  # of a block of the Gram matrix
FIRST_COLUMNS = 256  # sorted whole, before a threshold is known
QUERIES_AT_ONCE = 512  # whose overlaps are summed together
Device = torch.device | str


def unit_rows(name: str, x: torch.Tensor, device: Device) -> torch.Tensor:
    """[n, D] float32 of length 1. ValueError where a feature is not finite; name: what the features are of."""
    x = x.to(device).float()
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if len(bad := (~torch.isfinite(lengths)).nonzero()):
        raise ValueError(f"{name}: the features of row {int(bad[0, 0])} are not finite")
    return x / lengths.clamp_min(1e-12)


def cosine_blocks(query: torch.Tensor, gallery: torch.Tensor, device: Device = "cpu") -> Iterator[torch.Tensor]:
    """[q, G] float32 cosines of some queries at a time with the whole gallery, in order. A block is good until the
    next one is asked for. ValueError where a feature is not finite."""
    q, g = unit_rows("query", query, device), unit_rows("gallery", gallery, device)
    parts = q.chunk(max(1, -(-len(q) * len(g) // BLOCK_NUMBERS)))  # of one size: a small last one would be slower
    # numpy asks the system for large pages, torch does not: first touching those takes a third of the product's time
    block = torch.from_numpy(np.empty((len(parts[0]), len(g)), np.float32)).to(device)
    for part in parts:
        yield torch.mm(part, g.t(), out=block[: len(part)])


def equal_pairs(query: np.ndarray, gallery: np.ndarray):
    """Function of some queries, a slice, -> ([n] int64 their places in it, [n] the gallery rows of equal number)."""
    order = np.argsort(gallery, kind="stable")
    low, high = (np.searchsorted(gallery[order], query, side) for side in ("left", "right"))

    def pairs(part: slice) -> tuple[np.ndarray, np.ndarray]:
        place, owner = ranges(low[part], high[part])
        return owner, order[place]

    return pairs


def ranges(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of the ranges [low, high) joined, and the range of each."""
    lengths = high - low
    owner = np.repeat(np.arange(len(low)), lengths)
    return low[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths), owner


class Nearest:
    """The `k` most similar images of each of `count` rows, while blocks of columns pass by in ascending order; equal
    ones stay in that order. similar: [count, k] float32, descending, -inf: none. ids: [count, k] int32 columns."""

    def __init__(self, count: int, k: int):
        self.similar, self.ids = np.full((count, k), -np.inf, np.float32), np.zeros((count, k), np.int32)

    def see(self, start: int, block: np.ndarray, first: int = 0) -> None:
        """Take a block [r, c] of the rows from `start` and the columns from `first` on; -inf in it never counts."""
        rows, width = slice(start, start + len(block)), block.shape[1]
        if width > FIRST_COLUMNS and np.isneginf(self.similar[rows, -1]).any():  # some columns first, for a threshold
            cut = max(FIRST_COLUMNS, width // 4)
            self.see(start, block[:, :cut], first)
            block, first = block[:, cut:], first + cut
        above = block > self.similar[rows, -1:]  # few, and only they are sorted
        if above.flags.c_contiguous:
            row, column = np.divmod(np.flatnonzero(above), above.shape[1])
        else:
            column, row = np.divmod(np.flatnonzero(above.T), len(above))
            order = np.argsort(row, kind="stable")
            row, column = row[order], column[order]
        counts = np.bincount(row, minlength=len(above))
        if not (counts := counts[changed := np.flatnonzero(counts)]).size:
            return
        k, (slot, owner) = self.ids.shape[1], ranges(np.zeros_like(counts), counts)
        similar = np.full((len(changed), k + counts.max()), -np.inf, np.float32)
        ids = np.zeros(similar.shape, np.int32)
        changed += start
        similar[:, :k], ids[:, :k] = self.similar[changed], self.ids[changed]
        similar[owner, k + slot], ids[owner, k + slot] = block[row, column], first + column
        order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        self.similar[changed] = np.take_along_axis(similar, order, axis=1)
        self.ids[changed] = np.take_along_axis(ids, order, axis=1)


def neighbours(x: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """([N, k] int32 the nearest of each row, itself first and equals in order, [N] float32 the largest squared distance
    of each). x: [N, D] of length 1. The Gram matrix is symmetric: each of its blocks is multiplied once and serves the
    rows of both sides; one block is held."""
    found, lowest = Nearest(len(x), k - 1), np.full(len(x), np.inf, np.float32)
    block = torch.from_numpy(np.empty(BLOCK_ROWS**2, np.float32)).to(x.device)

    def look(side: tuple[int, np.ndarray, int]) -> None:
        start, similar, first = side
        own = lowest[start : start + len(similar)]
        np.minimum(own, similar.min(axis=1), out=own)
        if start == first:
            np.fill_diagonal(similar, -np.inf)
        if k > 1:
            found.see(start, similar, first)

    with ThreadPoolExecutor(min(2, torch.get_num_threads())) as pool:  # the two sides are different rows
        for i in range(0, len(x), BLOCK_ROWS):
            for j in range(i, len(x), BLOCK_ROWS):
                a, b = x[i : i + BLOCK_ROWS], x[j : j + BLOCK_ROWS]
                similar = torch.mm(a, b.t(), out=block[: len(a) * len(b)].view(len(a), len(b))).cpu().numpy()
                list(pool.map(look, ((i, similar, j), (j, similar.T, i))[: 1 + (i < j)]))
    return np.concatenate([np.arange(len(x), dtype=np.int32)[:, None], found.ids], axis=1), 2 - 2 * lowest


def reranked_blocks(
    query: torch.Tensor, gallery: torch.Tensor, k1: int, k2: int, weight: float, device: Device = "cpu"
) -> Iterator[torch.Tensor]:
    """k-reciprocal encoding (Zhong et al., CVPR 2017, arXiv 1701.08398) without N x N matrices: yields [q, G] float32
    on the CPU, minus the final distance. weight: lambda, share of d in it. A block is good until the next one is asked
    for.

    All N images, queries and gallery, are nodes; d is the squared Euclidean distance of unit features, divided by the
    largest one of each row. R(i) are the k-reciprocal neighbours of i, expanded by those of its members that mostly
    agree (eq. 4 and 5). v_i has exp(-d) at R(i), sums to 1 (eq. 7), and is averaged over the k2 nearest (eq. 11). The
    Jaccard distance of v (eq. 10) is mixed with d (eq. 12).

    Memory beside the features that are given: two copies of them (8 N D bytes), about 50 N k1 + 24 bytes for each
    number in v (N of them times 30 to 200, by how well neighbours agree), and half a GB of blocks.
    """
    x, Q, start = torch.cat([unit_rows("query", query, device), unit_rows("gallery", gallery, device)]), len(query), 0
    near, largest = neighbours(x, min(k1 + 1, len(x)))
    v = _encoded(x, near, largest, k1, k2)
    del x  # `cosine_blocks` has its own
    v, lists = v[:Q], v[Q:].tocsc()  # inverted: which gallery images have a number in a column
    for similar in cosine_blocks(query, gallery, device):
        distance = similar.cpu().numpy()  # in its place
        distance *= -2
        distance += 2
        distance /= largest[start : start + len(distance), None]
        distance *= -weight
        distance -= 1 - weight  # as if nothing overlapped
        step = min(QUERIES_AT_ONCE, max(1, BLOCK_NUMBERS // 8 // len(gallery)))
        for first in range(0, len(distance), step):
            own = distance[first : first + step].reshape(-1)
            common = _overlaps(v, start + first, len(own) // len(gallery), lists)
            met = np.flatnonzero(common)  # few
            own[met] += (1 - weight) * (common[met] / (2 - common[met]))
        start += len(distance)
        yield torch.from_numpy(distance)


def _overlaps(v: csr_array, first: int, count: int, lists) -> np.ndarray:
    """[count * G] float64 sums of the smaller ones of v_i and v_j over the columns that both have, of the queries from
    `first` on; lists: v of the gallery, by columns."""
    ends, G = v.indptr[first : first + count + 1], lists.shape[0]
    mine = slice(ends[0], ends[-1])
    columns, row = v.indices[mine], np.repeat(np.arange(count), np.diff(ends))
    place, owner = ranges(lists.indptr[columns], lists.indptr[columns + 1])
    shared = np.minimum(v.data[mine][owner], lists.data[place])
    return np.bincount(row[owner] * G + lists.indices[place], weights=shared, minlength=count * G)


def _encoded(x: torch.Tensor, near: np.ndarray, largest: np.ndarray, k1: int, k2: int) -> csr_array:
    """v of all images, [N, N] float32."""
    v = _expanded(near, k1)
    N, rows = len(x), np.repeat(np.arange(len(x), dtype=np.int32), np.diff(v.indptr))
    pairs = zip(*(torch.from_numpy(ids).long().split(8192) for ids in (rows, v.indices)))
    dots = torch.cat([(x[a.to(x.device)] * x[b.to(x.device)]).sum(dim=1).cpu() for a, b in pairs]).numpy()
    values = np.exp(-(2 - 2 * dots) / largest[rows])
    v.data = (values / np.bincount(rows, weights=values, minlength=N)[rows]).astype(np.float32)
    if k2 > 1:
        v = (_incidence(near[:, :k2]) @ v).tocsr()
        v.data /= near[:, :k2].shape[1]
    return v


def _incidence(near: np.ndarray) -> csr_array:
    """[N, k] -> [N, N] of 0 and 1: 1 at (i, j) for all j in near[i]."""
    N, k = near.shape
    return csr_array((np.ones(N * k, np.float32), near.ravel(), np.arange(0, N * k + 1, k, np.int32)), (N, N))


def _expanded(near: np.ndarray, k1: int) -> csr_array:
    """R* as [N, N], not 0 where j is in R*(i): R(i), and R(c) with k1 / 2 for the c in R(i) that share two thirds."""
    N, found = len(near), []
    nearest = _incidence(near), _incidence(near[:, : int(np.around(k1 / 2)) + 1])
    whole, half = (ahead.multiply(ahead.T).tocsr() for ahead in nearest)  # reciprocal ones
    enough, backwards = 2 / 3 * np.diff(half.indptr), half.T.tocsr()
    for part in np.array_split(np.arange(N), max(1, N * k1 * k1 // 8_000_000)):
        own = whole[part]
        shared = (own @ backwards).multiply(own).tocsr()
        shared.data = (shared.data > enough[shared.indices]).astype(np.float32)
        shared.eliminate_zeros()
        found.append((own + shared @ half).tocsr())
    return vstack(found).tocsr()


def expanded(query, gallery, methods: tuple[str, ...], k: int, alpha: float, device: Device = "cpu"):
    """Two `FeatureSet` of unit features that have taken up their k nearest gallery images, in the order dba, query.

    aqe: a query becomes the mean of itself and those; alpha: those weigh cos^alpha (Radenovic et al., 2018). dba: so
    does each gallery image with its own neighbours. None takes up its own file, nor does a gallery image take up the
    file of any query, as what is asked for would lie in the answers. Other junk is no junk here, as nothing knows it.
    """
    q, g = unit_rows("query", query.features, device), unit_rows("gallery", gallery.features, device)
    files = np.arange(len(g)) if gallery.files is None else gallery.files
    asked = np.full(len(q), -1) if query.files is None else query.files
    if "dba" in methods:
        kept = np.flatnonzero(~np.isin(files, asked))
        g = _with_nearest(g, g[torch.from_numpy(kept).to(g.device)], equal_pairs(files, files[kept]), k, alpha)
    if "aqe" in methods or "alpha" in methods:
        q = _with_nearest(q, g, equal_pairs(asked, files), k, alpha if "alpha" in methods else 0)
    return query._replace(features=q), gallery._replace(features=g)


def _with_nearest(x: torch.Tensor, others: torch.Tensor, same_file, k: int, alpha: float) -> torch.Tensor:
    """[n, D] of length 1: x and its k nearest others, weighted by cos^alpha, negative cosines as 0; same_file: of
    `equal_pairs`. Memory: a block of cosines and a copy of both."""
    if not len(others):
        return x
    found, start, parts = Nearest(len(x), min(k, len(others))), 0, []
    for similar in cosine_blocks(x, others, x.device):
        similar = similar.cpu().numpy()
        similar[same_file(slice(start, start + len(similar)))] = -np.inf
        found.see(start, similar)
        start += len(similar)
    weights = np.where(np.isfinite(found.similar), found.similar.clip(0) ** alpha, 0).astype(np.float32)
    ids, weights = (torch.from_numpy(a).to(x.device).split(1024) for a in (found.ids, weights))
    for own, near, by in zip(x.split(1024), ids, weights):
        parts.append(F.normalize(own + torch.einsum("nk,nkd->nd", by, others[near.long()]), dim=1))
    return torch.cat(parts)
