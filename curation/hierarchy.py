"""Hierarchical k-means with resampling (Vo et al., 2024, arXiv 2405.15613): clusters of clusters, level by level.

Level 1 clusters the images, level l > 1 the centroids of level l - 1, each counting once. Clustering centroids again
and again spreads them evenly over what the pool covers, however unevenly the pool fills it.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from curation.kmeans import Clusters, assign, kmeans
from curation.rows import Rows
from util.dist import print_main
from util.errors import InputError
from util.files import read_arrays, write_atomic

PLUS_PLUS = {"cpu": 5_000, "cuda": 50_000}  # clusters seeded by k-means++; more start at random rows

ITERATIONS = 50  # of k-means, at most


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
    indices = np.argsort(assignment, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(assignment, minlength=k))])
    return indices, offsets


def lowest_of_each(assignment: np.ndarray, key: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of each cluster j the counts[j] members with the lowest key -> ascending int64."""
    order = np.lexsort((key, assignment))
    _, offsets = members_by_cluster(assignment, len(counts))
    own = assignment[order]
    return np.sort(order[np.arange(len(order)) - offsets[own] < counts[own]])


def step_rng(seed: int, *numbers: int) -> np.random.Generator:
    """Random numbers of one clustering step, whatever ran before it."""
    counter = [*numbers, *[0] * (4 - len(numbers))]
    return np.random.Generator(np.random.Philox(key=[seed, 0xC1A57E6], counter=counter))


def plan_levels(count: int, ks: list[int] | None, clip: bool = False) -> list[int]:
    """Choose the number of clusters on each level from the flag, or from the number of images.

    Default sizes: an image in forty (in twenty below 500,000) becomes a cluster, then a tenth of them on each level,
    down to no fewer than 10 clusters and at most three levels.

    Args:
        clip: drop levels that such a small source cannot have, rather than refuse.
    """
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
    """Cluster level by level; every finished step is a file of `folder`, so a killed run loses one step at most.

    Args:
        ks: clusters on each level, finest first.
        args: reads seed and resampling (further runs on each level, on the members of every cluster that are closest to
            its centroid, half a cluster's mean size).
        tree_number: which of several trees; only changes the random numbers.
    """
    parents, distance = [], np.empty(0)
    for level, k in enumerate(ks, start=1):
        members, clusters = max(2, len(rows) // k // 2), None
        init = "kmeans++" if k <= PLUS_PLUS[rows.device.type] else "random"
        print_main(f"level {level}: {k:,} clusters of {len(rows):,}, {init} start, {args.resampling} resampling steps")
        for number in range(1 + args.resampling):
            file = folder / f"level{level}_step{number:02d}.npz"
            if (stored := read_arrays(file)) is not None:
                stored["centroids"] = torch.from_numpy(stored["centroids"]).to(rows.device)
                clusters = Clusters(**stored)
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
