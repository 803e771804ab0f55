"""k-means that scales (blocks of distances, float64 sums, no [N, k] matrix), on rows of an embedding file; and level by
level, with resampling (Vo et al., 2024, arXiv 2405.15613).

Level 1 clusters the images, level l > 1 the centroids of level l - 1, each counting once. Clustering centroids again
and again spreads them evenly over what the pool covers, however unevenly the pool fills it.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from util.dist import print_main
from util.errors import InputError
from util.files import read_arrays, write_atomic

CHUNK = 8192  # rows read at a time
RESIDENT_BYTES = 4e9  # rows that fit into so much are kept on the device
BLOCK = {"cpu": 2**22, "cuda": 2**28}  # distances held at a time; on a CPU they should stay in its cache
INIT_ROWS = 8  # k-means++ draws its seeds from so many rows per cluster
PLUS_PLUS = {"cpu": 5_000, "cuda": 50_000}  # clusters seeded by k-means++; more start at random rows
ITERATIONS = 50  # of k-means on each level, at most


@dataclass(frozen=True)
class Embedded:
    """data: [n, D] memory map; rows: [n] int64, the index rows they belong to, ascending."""

    data: np.ndarray
    rows: np.ndarray

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Turn index rows into rows of `data`."""
        return np.searchsorted(self.rows, rows)


class Rows:
    """[N, D] vectors for clustering, never more than one chunk of them converted at a time.

    Vectors are shifted by their mean (`unit` off), because ||c||^2 - 2xc loses digits where all vectors share a large
    component, as CLIP's do; or scaled to length 1 (`unit` on) for spherical clustering.

    Args:
        data: [M, D] float16 or float32, an array or a memory map.
        index: [N] int64 rows of `data` to use, ascending for speed (default: all).
        centre: [D] float32 shift; None: the mean of the rows, found in one float64 pass that refuses NaN.
    """

    def __init__(self, data: np.ndarray, device: torch.device, index=None, unit: bool = False, centre=None):
        self.data, self.device, self.unit, self.dim = data, device, unit, data.shape[1]
        self.index = np.arange(len(data)) if index is None else index
        if not len(self):
            raise InputError("no vectors to cluster: the stages before have dropped every image")
        self.kept, self.centre = None, centre
        if centre is None:
            total = sum(self._raw(start).double().sum(dim=0) for start in range(0, len(self), CHUNK))
            if not total.isfinite().all():
                raise InputError("some embeddings are not finite: embed with another model, or clear --output")
            self.centre = (total / len(self)).float().to(device) * (not unit)
        if len(self) * self.dim * 4 <= RESIDENT_BYTES:
            kept = torch.empty(len(self), self.dim, device=device)
            for start, x in self.chunks():
                kept[start : start + len(x)] = x
            self.kept = kept

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, positions: np.ndarray) -> "Rows":
        """Return some of these rows, shifted alike; positions: int64 among these rows."""
        return Rows(self.data, self.device, self.index[positions], self.unit, self.centre)

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (position of the first row, [n, D] float32)."""
        for start in range(0, len(self), CHUNK):
            yield start, self._prepare(self._raw(start)) if self.kept is None else self.kept[start : start + CHUNK]

    def take(self, positions: np.ndarray) -> torch.Tensor:
        """Return any rows, [n, D] float32."""
        index = self.index[positions]
        order = np.argsort(index, kind="stable")  # memory maps are read forwards
        values = np.empty((len(index), self.dim), dtype=self.data.dtype)
        values[order] = self.data[index[order]]
        return self._prepare(torch.from_numpy(values))

    def restore(self, centroids: torch.Tensor) -> np.ndarray:
        """Turn centroids into the coordinates of `data`, [k, D] float32."""
        return (centroids + self.centre).cpu().numpy()

    def _raw(self, start: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.data[self.index[start : start + CHUNK]]))

    def _prepare(self, values: torch.Tensor) -> torch.Tensor:
        x = values.to(self.device).float()
        return normalize(x, dim=1) if self.unit else x - self.centre


@dataclass(frozen=True)
class Clusters:
    """centroids: [k, D] float32 in the coordinates of the `Rows`; assignment: [N] int32; distance: [N] float32,
    squared, to the own centroid; inertia: its sum in float64."""

    centroids: torch.Tensor
    assignment: np.ndarray
    distance: np.ndarray
    inertia: float


def step_rng(seed: int, *numbers: int) -> np.random.Generator:
    """Random numbers of one clustering step, whatever ran before it."""
    counter = [*numbers, *[0] * (4 - len(numbers))]
    return np.random.Generator(np.random.Philox(key=[seed, 0xC1A57E6], counter=counter))


def kmeans(rows: Rows, k: int, *, iterations: int, rng, init: str = "random", start=None) -> Clusters:
    """Lloyd's algorithm; spherical where `rows.unit`. No cluster is empty, also where rows repeat.

    Args:
        rng: numpy's generator. init: `random` (k different rows) or `kmeans++` (greedy, on 8k random rows).
        start: [k, D] float32 centroids to begin with instead.
    Returns:
        Clusters that belong to the last centroids; stops early when no label changes.
    """
    if not 1 <= k <= len(rows):
        raise InputError(f"{k} clusters of {len(rows)} images: ask for fewer clusters")
    centroids = start
    if start is None:
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
        centroids = normalize(centroids, dim=1) if rows.unit else centroids
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
    k, step = len(centroids), max(1, BLOCK[x.device.type] // len(centroids))
    offset = torch.zeros(k, device=x.device) if unit else -0.5 * centroids.square().sum(dim=1)
    best, nearest = torch.empty(len(x), device=x.device), torch.empty(len(x), dtype=torch.int64, device=x.device)
    scores = torch.empty(min(step, len(x)), k, device=x.device)
    for start in range(0, len(x), step):
        part, here = x[start : start + step], slice(start, start + step)
        block = torch.addmm(offset, part, centroids.t(), out=scores[: len(part)])
        torch.max(block, dim=1, out=(best[here], nearest[here]))
    constant = 1.0 if unit else 0.0  # ||c||^2 is in the score, except for unit centroids
    return nearest.int(), (x.square().sum(dim=1) - 2 * best + constant).clamp(min=0)


def plus_plus(x: torch.Tensor, k: int, rng: np.random.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007): k rows of x [n, D], 2 + ln k candidates a pick, each drawn
    with probability proportional to its squared distance from the picks so far."""
    picks = [int(rng.integers(len(x)))]
    closest = (x - x[picks[0]]).square().sum(dim=1)
    for _ in range(k - 1):
        cumulative = closest.double().cumsum(dim=0)
        total = float(cumulative[-1])
        if total <= 0:
            raise InputError(f"{k} clusters, but only {len(picks)} distinct vectors: ask for fewer clusters")
        draws = torch.from_numpy(rng.random(2 + int(math.log(k))) * total).to(x.device)
        # `right`: a row without distance cannot be drawn, also not by a draw of exactly 0
        candidates = torch.searchsorted(cumulative, draws, right=True).clamp(max=len(x) - 1)
        # from the differences: copies of a pick must come out at exactly 0
        distance = torch.cdist(x, x[candidates], compute_mode="donot_use_mm_for_euclid_dist").square()
        potential = torch.minimum(distance, closest.unsqueeze(1))  # [n, tries]
        best = int(potential.sum(dim=0, dtype=torch.float64).argmin())
        picks.append(int(candidates[best]))
        closest = potential[:, best]
    return torch.tensor(picks, device=x.device)


@dataclass(frozen=True)
class Tree:
    """parents[0]: [N] int32, the level-1 cluster of each image; parents[l]: [k_l] int32, the level-(l+1) cluster of
    each level-l cluster; distance: [N] float32, squared, to the level-1 centroid."""

    parents: list[np.ndarray]
    sizes: list[int]
    distance: np.ndarray

    def path(self) -> np.ndarray:
        """Return each image's cluster on every level, [N, levels] int32."""
        levels = itertools.accumulate(self.parents, lambda below, parents: parents[below])
        return np.stack(list(levels), axis=1)

    def images_below(self, level: int) -> np.ndarray:
        """Count the images in each cluster of a level (0: the clusters of images), [k] int64."""
        return np.bincount(self.path()[:, level], minlength=self.sizes[level])

    def save(self, folder: Path, rows: np.ndarray) -> None:
        """Write plain arrays: members of cluster j of level l are indices[offsets[j]:offsets[j + 1]]; rows: [N] int64,
        the index row of each image."""
        arrays = {"rows": rows, "distance": self.distance}
        for level, (parents, k) in enumerate(zip(self.parents, self.sizes), start=1):
            indices, offsets = members_by_cluster(parents, k)
            arrays |= {f"parents{level}": parents, f"indices{level}": indices, f"offsets{level}": offsets}
        for name, values in arrays.items():
            write_atomic(folder / f"{name}.npy", lambda f, v=values: np.save(f, v))


def load_tree(folder: Path) -> tuple[Tree, np.ndarray]:
    """Read what `Tree.save` wrote -> (tree, [N] int64 index rows of its images)."""
    levels = range(1, 1 + len(list(folder.glob("parents*.npy"))))
    parents = [np.load(folder / f"parents{level}.npy") for level in levels]
    sizes = [len(np.load(folder / f"offsets{level}.npy")) - 1 for level in levels]
    return Tree(parents, sizes, np.load(folder / "distance.npy")), np.load(folder / "rows.npy")


def members_by_cluster(assignment: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] cluster numbers -> (indices [N] int64 ordered by cluster, offsets [k + 1] int64)."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(assignment, minlength=k))])
    return np.argsort(assignment, kind="stable"), offsets


def lowest_of_each(assignment: np.ndarray, key: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of each cluster j the counts[j] members with the lowest key -> ascending int64."""
    order, (_, offsets) = np.lexsort((key, assignment)), members_by_cluster(assignment, len(counts))
    own = assignment[order]
    return np.sort(order[np.arange(len(order)) - offsets[own] < counts[own]])


def plan_levels(count: int, ks: list[int] | None, clip: bool = False) -> list[int]:
    """Choose the number of clusters on each level from the flag, or from the number of images: an image in forty (in
    twenty below 500,000) becomes a cluster, then a tenth of them on each level, down to no fewer than 10 clusters and
    at most three levels; `clip` drops levels that such a small source cannot have, rather than refuse."""
    if not ks:
        ks = [max(1, min(count, 2), count // (40 if count >= 500_000 else 20)) if count > 2 else 1]
        while len(ks) < 3 and ks[-1] // 10 >= 10:
            ks.append(ks[-1] // 10)
    elif clip:
        ks = [k for k in ks if k < count] or [1]
    for level, (outer, k) in enumerate(zip([count, *ks], ks), start=1):
        if not 1 <= k < outer and count > 1:
            words = f"--levels {' '.join(map(str, ks))}: level {level} makes {k} clusters of {outer}"
            raise InputError(f"{words}; every level must be smaller than what it clusters")
    return ks


def build_tree(rows: Rows, ks: list[int], folder: Path, args, tree_number: int = 0) -> Tree:
    """Cluster level by level, ks clusters, finest first; every finished step is a file of `folder`, so a killed run
    loses one step at most. args.resampling: further runs on each level, on the members of every cluster that are
    closest to its centroid, half a cluster's mean size. tree_number only changes the random numbers."""
    parents, distance = [], None
    for level, k in enumerate(ks, start=1):
        members, clusters = max(2, len(rows) // k // 2), None
        init = "kmeans++" if k <= PLUS_PLUS[rows.device.type] else "random"
        print_main(f"level {level}: {k:,} clusters of {len(rows):,}, {init} start, {args.resampling} resampling steps")
        for number in range(1 + args.resampling):
            file = folder / f"level{level}_step{number:02d}.npz"
            if (stored := read_arrays(file)) is not None:
                clusters = Clusters(**stored | {"centroids": torch.from_numpy(stored["centroids"]).to(rows.device)})
                continue
            rng, part = step_rng(args.seed, tree_number, level, number), rows
            if clusters is not None:
                picked = lowest_of_each(clusters.assignment, clusters.distance, np.full(k, members))
                if len(picked) < k:
                    break  # too few members to say anything new
                part = rows.subset(picked)
            fresh = kmeans(part, k, iterations=ITERATIONS, init=init, rng=rng)
            clusters = fresh if clusters is None else assign(rows, fresh.centroids)
            arrays = vars(clusters) | {"centroids": clusters.centroids.cpu().numpy()}
            write_atomic(file, lambda opened, arrays=arrays: np.savez(opened, **arrays))
        print_main(f"level {level}: mean squared distance to the centroid {clusters.inertia / len(rows):.4g}")
        parents.append(clusters.assignment)
        distance = clusters.distance if level == 1 else distance
        # the next level sees the centroids where the images are, and shifts them anew
        rows = Rows(rows.restore(clusters.centroids), rows.device, unit=rows.unit)
    return Tree(parents, ks, distance)
