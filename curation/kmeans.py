"""k-means that scales: blocks of distances, float64 sums, no [N, k] matrix, ranks that share the rows."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from curation.rows import Rows
from util.errors import InputError

BLOCK = {"cpu": 2**22, "cuda": 2**28}  # distances held at a time; on a CPU they should stay in its cache
INIT_ROWS = 8  # k-means++ draws its seeds from so many rows per cluster


@dataclass(frozen=True)
class Clusters:
    """centroids: [k, D] float32 in the coordinates of the `Rows`; assignment: [N] int32; distance: [N] float32,
    squared, to the own centroid; inertia: its sum in float64."""

    centroids: torch.Tensor
    assignment: np.ndarray
    distance: np.ndarray
    inertia: float
    iterations: int = 0
    reseeded: int = 0


def kmeans(
    rows: Rows,
    k: int,
    *,
    iterations: int,
    rng: np.random.Generator,
    init: str = "random",
    start: torch.Tensor | None = None,
) -> Clusters:
    """Lloyd's algorithm; spherical where `rows.unit`.

    Args:
        rng: the same on every rank.
        init: `random` (k rows without repeats) or `kmeans++` (greedy, on 8k random rows).
        start: [k, D] float32 centroids to begin with instead.
    Returns:
        Clusters that belong to the last centroids; stops early when no label changes. An empty cluster takes the
        farthest member of the largest one, so some end empty only where there are fewer than k distinct rows.
    """
    if not 1 <= k <= len(rows):
        raise InputError(f"{k} clusters of {len(rows)} images: ask for fewer clusters")
    centroids = start if start is not None else seed_centroids(rows, k, init, rng)
    labels = torch.full((rows.last - rows.first,), -1, dtype=torch.int32, device=rows.device)
    done = reseeded = 0
    for _ in range(iterations):
        sums = torch.zeros(k, rows.dim + 1, dtype=torch.float64, device=rows.device)
        distance = torch.empty(len(labels), device=rows.device)
        changed = torch.zeros(1, dtype=torch.int64, device=rows.device)
        for position, x in rows.chunks():
            here = slice(position - rows.first, position - rows.first + len(x))
            nearest, distance[here] = assign_block(x, centroids, rows.unit)
            changed += (labels[here] != nearest).sum()
            labels[here] = nearest
            sums[:, :-1].index_add_(0, nearest, x.double())
            sums[:, -1] += nearest.bincount(minlength=k)
        _all_reduce(rows, sums)
        _all_reduce(rows, changed)
        if not changed:
            break
        done += 1
        counts = sums[:, -1]
        fresh = (sums[:, :-1] / counts.clamp(min=1).unsqueeze(1)).float()
        centroids = torch.where(counts.unsqueeze(1) > 0, fresh, centroids)
        if rows.unit:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            reseeded += reseed(rows, centroids, empty, counts, labels, distance)
    return replace(assign(rows, centroids), iterations=done, reseeded=reseeded)


def assign(rows: Rows, centroids: torch.Tensor) -> Clusters:
    """Give each row to its nearest centroid; distances come from the differences, without cancellation."""
    labels = torch.empty(rows.last - rows.first, dtype=torch.int32, device=rows.device)
    distance = torch.empty(len(labels), device=rows.device)
    for position, x in rows.chunks():
        here = slice(position - rows.first, position - rows.first + len(x))
        labels[here], _ = assign_block(x, centroids, rows.unit)
        distance[here] = (x - centroids[labels[here].long()]).square().sum(dim=1)
    labels, distance = _gather(rows, labels), _gather(rows, distance)
    return Clusters(centroids, labels, distance, float(distance.sum(dtype=np.float64)))


def assign_block(x: torch.Tensor, centroids: torch.Tensor, unit: bool = False):
    """x: [n, D], centroids: [k, D], float32 -> (nearest [n] int32, squared distance [n] float32).

    The nearest centroid has the largest xc - ||c||^2 / 2: one matrix product and one maximum, block by block.
    """
    k = len(centroids)
    offset = torch.zeros(k, device=x.device) if unit else -0.5 * centroids.square().sum(dim=1)
    transposed = centroids.t()
    step = max(1, BLOCK[x.device.type] // k)
    best = torch.empty(len(x), device=x.device)
    nearest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    scores = torch.empty(min(step, len(x)), k, device=x.device)
    for start in range(0, len(x), step):
        part = x[start : start + step]
        block = scores[: len(part)]
        torch.addmm(offset, part, transposed, out=block)
        torch.max(block, dim=1, out=(best[start : start + step], nearest[start : start + step]))
    constant = 1.0 if unit else 0.0  # ||c||^2 is in the score, except for unit centroids
    return nearest.int(), (x.square().sum(dim=1) - 2 * best + constant).clamp(min=0)


def seed_centroids(rows: Rows, k: int, init: str, rng: np.random.Generator) -> torch.Tensor:
    """Choose k rows of the data as first centroids, [k, D]."""
    count = k if init == "random" else min(len(rows), max(INIT_ROWS * k, 1024))
    pool = rows.take(np.sort(rng.choice(len(rows), count, replace=False, shuffle=False)))
    return pool if init == "random" else pool[plus_plus(pool, k, rng)]


def plus_plus(x: torch.Tensor, k: int, rng: np.random.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007): k rows of x [n, D], 2 + ln k candidates a pick, each drawn
    with probability proportional to its squared distance from the picks so far."""
    tries = 2 + int(math.log(k))
    picks = [int(rng.integers(len(x)))]
    closest = (x - x[picks[0]]).square().sum(dim=1)
    for _ in range(k - 1):
        cumulative = closest.double().cumsum(dim=0)
        total = float(cumulative[-1])
        if total <= 0:
            raise InputError(f"{k} clusters, but only {len(picks)} distinct vectors: ask for fewer clusters")
        draws = torch.from_numpy(rng.random(tries) * total).to(x.device)
        # `right`: a row without distance cannot be drawn, also not by a draw of exactly 0
        candidates = torch.searchsorted(cumulative, draws, right=True).clamp(max=len(x) - 1)
        # from the differences: copies of a pick must come out at exactly 0
        distance = torch.cdist(x, x[candidates], compute_mode="donot_use_mm_for_euclid_dist").square()
        potential = torch.minimum(distance, closest.unsqueeze(1))  # [n, tries]
        best = int(potential.sum(dim=0, dtype=torch.float64).argmin())
        picks.append(int(candidates[best]))
        closest = potential[:, best]
    return torch.tensor(picks, device=x.device)


def reseed(rows: Rows, centroids, empty, counts, labels, distance) -> int:
    """Move empty centroids, in place, onto the farthest members of the largest clusters; -> how many moved."""
    k = len(centroids)
    donors = counts.argsort(descending=True, stable=True)[: len(empty)]
    donors = donors[counts[donors] > 1]
    farthest = torch.zeros(k, device=rows.device)
    own = labels.long()
    farthest.scatter_reduce_(0, own, distance, "amax")
    _all_reduce(rows, farthest, dist.ReduceOp.MAX)
    row = torch.full((k,), 2**60, dtype=torch.int64, device=rows.device)
    here = (distance >= farthest[own]) & (distance > 0)
    positions = torch.arange(rows.first, rows.last, device=rows.device)
    row.scatter_reduce_(0, own[here], positions[here], "amin")
    _all_reduce(rows, row, dist.ReduceOp.MIN)
    donors = donors[row[donors] < 2**60]  # a cluster of equal rows has nothing to give
    if len(donors):
        centroids[empty[: len(donors)]] = rows.take(row[donors].cpu().numpy())
    return len(donors)


def _all_reduce(rows: Rows, x: torch.Tensor, operation=dist.ReduceOp.SUM) -> None:
    if not rows.alone:
        dist.all_reduce(x, operation)


def _gather(rows: Rows, own: torch.Tensor) -> np.ndarray:
    """Collect this rank's values into [N] of all rows, on every rank."""
    if rows.alone:
        return own.cpu().numpy()
    whole = torch.zeros(len(rows), dtype=own.dtype, device=own.device)
    whole[rows.first : rows.last] = own
    dist.all_reduce(whole)  # every row has one owner
    return whole.cpu().numpy()
