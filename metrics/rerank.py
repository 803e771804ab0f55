"""Re-ranking with k-reciprocal encoding (Zhong et al., CVPR 2017, arXiv 1701.08398), without N x N matrices.

All images, queries and gallery, are nodes; d is the squared Euclidean distance of unit features, divided by
the largest one of each row. R(i) are the k-reciprocal neighbours of i, expanded by those of its members that
mostly agree (eq. 4 and 5). v_i has exp(-d) at R(i), sums to 1 (eq. 7), and is averaged over the k2
nearest (eq. 11). The Jaccard distance of v (eq. 10) is mixed with d (eq. 12).
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from metrics.reid import BLOCK_NUMBERS


def reranked_blocks(
    query: torch.Tensor,
    gallery: torch.Tensor,
    device: torch.device | str = "cpu",
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    block_numbers: int = BLOCK_NUMBERS,
) -> Iterator[torch.Tensor]:
    """Minus the final distance of some queries at a time from the whole gallery: what `rank_blocks` takes.

    Args:
        query, gallery: [Q, D], [G, D] float.
        k1, k2: neighbours that may be reciprocal, and over how many a vector is averaged.
        weight: lambda, share of the first distance in the final one.
    Yields:
        [q, G] float32 on the CPU. Memory: N x (k1 + 1) neighbours and about N x 3 k1 numbers of v.
    """
    device = torch.device(device)
    x = F.normalize(torch.cat([query, gallery]).to(device).float(), dim=1)
    Q, N = len(query), len(x)
    near, largest = _neighbours(x, min(k1 + 1, N), block_numbers)
    rows, columns = _expanded(near, k1)
    d = (2 - 2 * _dots(x, rows, columns)) / largest[rows]
    rows, columns, values = _normalised(rows, columns, np.exp(-d), N)
    if k2 > 1:
        rows, columns, values = _averaged(rows, columns, values, near[:, :k2])
    offsets = np.searchsorted(rows, np.arange(N + 1))
    by_column = np.argsort(columns, kind="stable")
    column_rows, column_values = rows[by_column], values[by_column]
    column_offsets = np.searchsorted(columns[by_column], np.arange(N + 1))
    step = max(1, block_numbers // N)
    for start in range(0, Q, step):
        stop = min(start + step, Q)
        first = (2 - 2 * (x[start:stop] @ x[Q:].t())).cpu().numpy() / largest[start:stop, None]
        jaccard = np.empty((stop - start, N - Q), dtype=np.float32)
        for i in range(start, stop):
            mine = slice(offsets[i], offsets[i + 1])
            low, high = column_offsets[columns[mine]], column_offsets[columns[mine] + 1]
            place, owner = _ranges(low, high)
            shared = np.minimum(values[mine][owner], column_values[place])
            common = np.bincount(column_rows[place], weights=shared, minlength=N)[Q:]
            jaccard[i - start] = 1 - common / (2 - common)
        yield torch.from_numpy(-((1 - weight) * jaccard + weight * first).astype(np.float32))


def _neighbours(x: torch.Tensor, k: int, block_numbers: int) -> tuple[np.ndarray, np.ndarray]:
    """([N, k] int64 the nearest of each, itself first, [N] the largest squared distance of each)."""
    near, largest = [], []
    for part in torch.arange(len(x), device=x.device).split(max(1, block_numbers // len(x))):
        d = 2 - 2 * (x[part] @ x.t())
        largest.append(d.amax(dim=1).cpu())
        d[torch.arange(len(part), device=x.device), part] = -1  # first, also among equals
        near.append(d.topk(k, dim=1, largest=False).indices.cpu())
    return torch.cat(near).numpy(), torch.cat(largest).numpy()


def _reciprocal(near: np.ndarray) -> np.ndarray:
    """[M] int64, sorted: i * N + j for all j in near[i] with i in near[j]."""
    N = len(near)
    ahead = np.arange(N)[:, None] * N + near
    back = near * N + np.arange(N)[:, None]
    ahead = np.sort(ahead.ravel())
    return ahead[_contains(np.sort(back.ravel()), ahead)]


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[place] == keys


def _expanded(near: np.ndarray, k1: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of R*: R(i), and R(c) with k1 / 2 for the c in R(i) that share two thirds of it."""
    N = len(near)
    whole = _reciprocal(near)
    half = _reciprocal(near[:, : int(np.around(k1 / 2)) + 1])
    half_offsets = np.searchsorted(half, np.arange(N + 1) * N)
    found = [whole]
    for part in np.array_split(whole, max(1, len(whole) * k1 // 8_000_000)):
        i, c = part // N, part % N
        place, owner = _ranges(half_offsets[c], half_offsets[c + 1])
        keys = i[owner] * N + half[place] % N
        size = half_offsets[c + 1] - half_offsets[c]
        shared = np.bincount(owner, weights=_contains(whole, keys), minlength=len(part))
        found.append(keys[(shared > 2 / 3 * size)[owner]])
    keys = np.unique(np.concatenate(found))
    return keys // N, keys % N


def _ranges(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of the ranges [low, high) joined, and the range of each."""
    lengths = high - low
    owner = np.repeat(np.arange(len(low)), lengths)
    return low[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths), owner


def _dots(x: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    parts = []
    for start in range(0, len(rows), 65_536):
        a, b = (torch.from_numpy(v[start : start + 65_536]).to(x.device) for v in (rows, columns))
        parts.append((x[a] * x[b]).sum(dim=1).cpu())
    return torch.cat(parts).numpy()


def _normalised(rows, columns, values, N: int):
    return rows, columns, (values / np.bincount(rows, weights=values, minlength=N)[rows]).astype(np.float32)


def _averaged(rows, columns, values, near: np.ndarray):
    """v_i becomes the mean of v over its nearest."""
    N, k2 = near.shape
    offsets = np.searchsorted(rows, np.arange(N + 1))
    place, owner = _ranges(offsets[near.ravel()], offsets[near.ravel() + 1])
    keys = owner // k2 * N + columns[place]
    order = np.argsort(keys, kind="stable")
    keys, starts = np.unique(keys[order], return_index=True)
    summed = np.add.reduceat(values[place][order], starts) / k2
    return keys // N, keys % N, summed.astype(np.float32)
