"""k-means that scales: blocks of distances, float64 sums, no [N, k] matrix."""

import math
from dataclasses import dataclass

import numpy as np
import torch

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


def kmeans(
    rows: Rows, k: int, *, iterations: int, rng: np.random.Generator, init: str = "random",
    start: torch.Tensor | None = None,
) -> Clusters:  # fmt: skip
    """Lloyd's algorithm; spherical where `rows.unit`. No cluster is empty, also where rows repeat.

    Args:
        init: `random` (k different rows) or `kmeans++` (greedy, on 8k random rows).
        start: [k, D] float32 centroids to begin with instead.
    Returns:
        Clusters that belong to the last centroids; stops early when no label changes.
    """
    if not 1 <= k <= len(rows):
        raise InputError(f"{k} clusters of {len(rows)} images: ask for fewer clusters")
    centroids = start
    if start is None:  # k-means++ among some rows
        count = k if init == "random" else min(len(rows), max(INIT_ROWS * k, 1024))
        centroids = rows.take(np.sort(rng.choice(len(rows), count, replace=False, shuffle=False)))
        centroids = centroids if init == "random" else centroids[plus_plus(centroids, k, rng)]
    labels = torch.full((len(rows),), -1, dtype=torch.int32, device=rows.device)
    distance = torch.empty(len(rows), device=rows.device)
    for _ in range(iterations):
        sums, changed = torch.zeros(k, rows.dim + 1, dtype=torch.float64, device=rows.device), 0
        for position, x in rows.chunks():
            here = slice(position, position + len(x))
            nearest, distance[here] = assign_block(x, centroids, rows.unit)
            changed += (labels[here] != nearest).sum()
            labels[here] = nearest
            sums[:, :-1].index_add_(0, nearest, x.double())
            sums[:, -1] += nearest.bincount(minlength=k)
        if not changed:
            break
        counts = sums[:, -1:]
        centroids = torch.where(counts > 0, (sums[:, :-1] / counts.clamp(min=1)).float(), centroids)
        if rows.unit:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
        if not counts.all():
            fill_empty(rows, centroids, labels.cpu().numpy().copy(), distance.cpu().numpy().copy())
    return assign(rows, centroids)


def assign(rows: Rows, centroids: torch.Tensor) -> Clusters:
    """Give each row to its nearest centroid, and each empty cluster a row; distances come from the differences,
    without cancellation."""
    centroids, labels, distance = centroids.clone(), [], []
    for _, x in rows.chunks():
        nearest, _ = assign_block(x, centroids, rows.unit)
        labels.append(nearest.cpu().numpy())
        distance.append((x - centroids[nearest.long()]).square().sum(dim=1).cpu().numpy())
    labels, distance = np.concatenate(labels), np.concatenate(distance)
    fill_empty(rows, centroids, labels, distance)
    return Clusters(centroids, labels, distance, float(distance.sum(dtype=np.float64)))


def fill_empty(rows: Rows, centroids: torch.Tensor, labels: np.ndarray, distance: np.ndarray) -> None:
    """Give each empty cluster, in place, one of the rows [N] that are farthest from their centroids."""
    counts = np.bincount(labels, minlength=len(centroids))
    empty, taken = np.flatnonzero(counts == 0), []
    for row in np.argsort(-distance, kind="stable").tolist() if len(empty) else ():
        if len(taken) < len(empty) and counts[labels[row]] > 1:
            counts[labels[row]] -= 1
            taken.append(row)
    if taken:
        centroids[torch.from_numpy(empty).to(rows.device)] = rows.take(np.array(taken))
        labels[taken], distance[taken] = empty, 0


def assign_block(x: torch.Tensor, centroids: torch.Tensor, unit: bool = False):
    """x: [n, D], centroids: [k, D], float32 -> (nearest [n] int32, squared distance [n] float32).

    The nearest centroid has the largest xc - ||c||^2 / 2: one matrix product and one maximum, block by block.
    """
    k, transposed = len(centroids), centroids.t()
    offset = torch.zeros(k, device=x.device) if unit else -0.5 * centroids.square().sum(dim=1)
    step = max(1, BLOCK[x.device.type] // k)
    best, nearest = torch.empty(len(x), device=x.device), torch.empty(len(x), dtype=torch.int64, device=x.device)
    scores = torch.empty(min(step, len(x)), k, device=x.device)
    for start in range(0, len(x), step):
        part, here = x[start : start + step], slice(start, start + step)
        block = torch.addmm(offset, part, transposed, out=scores[: len(part)])
        torch.max(block, dim=1, out=(best[here], nearest[here]))
    constant = 1.0 if unit else 0.0  # ||c||^2 is in the score, except for unit centroids
    return nearest.int(), (x.square().sum(dim=1) - 2 * best + constant).clamp(min=0)


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
