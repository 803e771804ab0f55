"""Hierarchical k-means with resampling (Vo et al., 2024, arXiv 2405.15613): clusters of clusters, level by
level.

Level 1 clusters the images, level l > 1 the centroids of level l - 1, each counting once. Clustering
centroids again and again spreads them evenly over what the pool covers, however unevenly the pool fills it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from curation.kmeans import Clusters, assign, kmeans, memory_bytes
from curation.rows import Rows
from util.dist import barrier, is_main_process, print_main
from util.errors import InputError
from util.files import write_atomic

AUTO_PLUS_PLUS = {"cpu": 5_000, "cuda": 50_000}  # clusters up to which `auto` seeds by k-means++


@dataclass(frozen=True)
class LevelPlan:
    """One level: k clusters; `resampling` further runs on the `members` rows kept of each cluster."""

    k: int
    members: int
    resampling: int


@dataclass(frozen=True)
class Tree:
    """parents[0]: [N] int32, the level-1 cluster of each image; parents[l]: [k_l] int32, the level-(l+1)
    cluster of each level-l cluster; distance: [N] float32, squared, to the level-1 centroid."""

    parents: list[np.ndarray]
    sizes: list[int]
    distance: np.ndarray

    def path(self) -> np.ndarray:
        """[N, levels] int32: each image's cluster on every level."""
        columns = [self.parents[0]]
        for parents in self.parents[1:]:
            columns.append(parents[columns[-1]])
        return np.stack(columns, axis=1)

    def images_below(self, level: int) -> np.ndarray:
        """[k] int64 images in each cluster of a level (0: the clusters of images)."""
        return np.bincount(self.path()[:, level], minlength=self.sizes[level])


def members_by_cluster(assignment: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] cluster numbers -> (indices [N] int64 ordered by cluster, offsets [k + 1] int64)."""
    indices = np.argsort(assignment, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(assignment, minlength=k))])
    return indices, offsets


def plan_levels(
    count: int, ks: list[int] | None, members: list[int] | None, resampling: int, clip: bool = False
) -> list[LevelPlan]:
    """Levels from the flags, or from the number of images.

    Default sizes: an image in forty (in twenty below 500,000) becomes a cluster, then a tenth of them on each
    level, down to no fewer than 10 clusters and at most three levels; half a cluster's mean size is
    resampled.

    Args:
        clip: drop levels that such a small domain cannot have, rather than refuse.
    Raises:
        InputError: sizes that do not shrink, or more clusters than images.
    """
    if not ks:
        ks = [max(1, min(count, 2), count // (40 if count >= 500_000 else 20))]
        if ks[0] == count:  # one or two images
            ks = [1]
        while len(ks) < 3 and ks[-1] // 10 >= 10:
            ks.append(ks[-1] // 10)
    elif clip:
        kept = [level for level, k in enumerate(ks) if k < count]
        members = members and ([members[level] for level in kept] or [1])
        ks = [ks[level] for level in kept] or [1]
    above = [count, *ks]
    for level, (outer, k) in enumerate(zip(above, ks), start=1):
        if not 1 <= k < outer and count > 1:
            raise InputError(
                f"--levels {' '.join(map(str, ks))}: level {level} makes {k} clusters of {outer} "
                f"{'images' if level == 1 else 'clusters'}; every level must be smaller than what it clusters"
            )
    members = members or [max(2, outer // k // 2) for outer, k in zip(above, ks)]
    if len(members) != len(ks):
        raise InputError(f"--members has {len(members)} numbers for {len(ks)} levels: give one a level")
    return [LevelPlan(k, m, resampling) for k, m in zip(ks, members)]


def step_rng(seed: int, *numbers: int) -> np.random.Generator:
    """Random numbers of one clustering step, whatever ran before it."""
    counter = [*numbers, *[0] * (4 - len(numbers))]
    return np.random.Generator(np.random.Philox(key=[seed, 0xC1A57E6], counter=counter))


def nearest_members(clusters: Clusters, count: int, how: str, rng: np.random.Generator) -> np.ndarray:
    """Up to `count` rows of every cluster, `closest` to the centroid or `random` -> ascending int64."""
    N = len(clusters.assignment)
    key = clusters.distance if how == "closest" else rng.random(N)
    order = np.lexsort((key, clusters.assignment))
    offsets = np.concatenate([[0], np.cumsum(clusters.sizes())])
    place = np.arange(N) - offsets[clusters.assignment[order]]
    return np.sort(order[place < count])


def build_tree(
    rows: Rows,
    plan: list[LevelPlan],
    folder: Path,
    *,
    seed: int,
    tree_number: int = 0,
    iterations: int = 50,
    init: str = "auto",
    resample: str = "closest",
) -> Tree:
    """Cluster level by level; every finished step is a file of `folder`, so a killed run loses one step at
    most.

    Args:
        tree_number: which of several trees (one a domain); only changes the random numbers.
        init: `random`, `kmeans++`, or `auto`: k-means++ up to 5,000 clusters on a CPU, 50,000 on CUDA.
        resample: which members of a cluster are clustered again, `closest` (as published) or `random`.
    """
    parents, sizes = [], []
    distance = np.empty(0)
    for level, step in enumerate(plan, start=1):
        chosen = init
        if init == "auto":
            chosen = "kmeans++" if step.k <= AUTO_PLUS_PLUS[rows.device.type] else "random"
        print_main(
            f"level {level}: {step.k} clusters of {len(rows)}, {step.resampling} resampling steps of "
            f"{step.members} a cluster, {chosen} start, {memory_bytes(rows, step.k) / 1e9:.2f} GB of memory"
        )
        clusters = None
        for k in range(1 + step.resampling):
            file = folder / f"level{level}_step{k:02d}.npz"
            stored = load_step(file, rows)
            if stored is None:
                rng = step_rng(seed, tree_number, level, k)
                part = rows
                if clusters is not None:
                    picked = nearest_members(clusters, step.members, resample, rng)
                    if len(picked) < step.k:
                        break  # too few members to say anything new
                    part = rows.subset(picked)
                fresh = kmeans(part, step.k, iterations=iterations, init=chosen, rng=rng)
                stored = fresh if clusters is None else assign(rows, fresh.centroids)
                save_step(file, stored)
                print_main(
                    f"level {level} step {k}/{step.resampling}: inertia {stored.inertia:.6g} after "
                    f"{fresh.iterations} iterations, {fresh.reseeded} empty clusters moved"
                )
            clusters = stored
        parents.append(clusters.assignment)
        sizes.append(step.k)
        if level == 1:
            distance = clusters.distance
        # the next level sees the centroids where the images are, and shifts them anew
        rows = Rows(rows.restore(clusters.centroids), rows.device, unit=rows.unit, alone=rows.alone)
    return Tree(parents, sizes, distance)


def save_step(file: Path, clusters: Clusters) -> None:
    if is_main_process():
        values = {
            "centroids": clusters.centroids.cpu().numpy(),
            "assignment": clusters.assignment,
            "distance": clusters.distance,
            "inertia": np.float64(clusters.inertia),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, lambda opened: np.savez(opened, **values))
    barrier()


def load_step(file: Path, rows: Rows) -> Clusters | None:
    """A finished step, or None; the folder's owner makes sure that it belongs to this job."""
    if not file.is_file():
        return None
    with np.load(file) as stored:
        centroids = torch.from_numpy(stored["centroids"]).to(rows.device)
        return Clusters(centroids, stored["assignment"], stored["distance"], float(stored["inertia"]))
