"""A balanced sample of an exact size from trees of clusters (Vo et al., 2024, Sec. 3.3), and whether it is any better.

Trees and their images are dicts by name: "all", or a tree of its own for each source.
"""

import numpy as np
import torch

from curation.kmeans import Embedded, Rows, Tree, lowest_of_each, members_by_cluster, step_rng
from util.errors import InputError

MAX_ROWS = 500_000  # rows that are counted
NET_ROWS = 10_000  # rows the cells are found on


def water_fill(sizes: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """Share `target` as equally as the sizes [J] int64 allow: share_j = min(level, size_j), their sum exactly the
    target, or that of the sizes if it is smaller; what the integer level leaves over goes, one each, to random clusters
    that still have more."""
    sizes = np.asarray(sizes, dtype=np.int64)
    if target >= sizes.sum():
        return sizes.copy()
    ascending = np.sort(sizes)
    below = np.cumsum(ascending) - ascending  # images of all smaller clusters
    # the level if all clusters from this one on were cut: right for the first that is larger than it
    levels = (target - below) // np.arange(len(sizes), 0, -1)
    level = levels[np.argmax(ascending > levels)]
    shares = np.minimum(sizes, level)
    shares[rng.choice(np.flatnonzero(sizes > level), int(target - shares.sum()), replace=False)] += 1
    return shares


def sample_tree(tree: Tree, target: int, *, seed: int, how: str = "random", tree_number: int = 0) -> np.ndarray:
    """Share the target over the top clusters, each share over its children, down to the images.

    Args:
        how: `random` members of a level-1 cluster, or those `closest` to its centroid.
    Returns:
        [min(target, N)] int64 rows, ascending, none twice.
    """
    rng = step_rng(seed, tree_number, 1000)
    shares = water_fill(tree.images_below(len(tree.sizes) - 1), target, rng)
    for level in range(len(tree.sizes) - 1, 0, -1):
        children, offsets = members_by_cluster(tree.parents[level], tree.sizes[level])
        sizes = tree.images_below(level - 1)
        below = np.zeros_like(sizes)
        for cluster in np.flatnonzero(shares):
            mine = children[offsets[cluster] : offsets[cluster + 1]]
            below[mine] = water_fill(sizes[mine], int(shares[cluster]), rng)
        shares = below
    key = tree.distance if how == "closest" else rng.random(len(tree.distance))
    return lowest_of_each(tree.parents[0], key, shares)


def draw_sample(trees: dict[str, tuple[Tree, np.ndarray]], args) -> tuple[np.ndarray, dict[str, int]]:
    """Draw exactly --target_size images, as many of each tree as of the others where its size allows.

    trees: name -> (tree, index rows of its images). -> ([n] int64 index rows, ascending; how many of each tree).
    """
    sizes = np.array([len(rows) for _, rows in trees.values()], dtype=np.int64)
    if args.target_size > sizes.sum():
        raise InputError(f"--target_size {args.target_size}: {sizes.sum()} images are left; lower it, or add pools")
    shares = dict(zip(trees, water_fill(sizes, args.target_size, step_rng(args.seed, 4000)).tolist()))
    chosen = []
    for number, (name, (tree, rows)) in enumerate(trees.items()):
        chosen.append(rows[sample_tree(tree, shares[name], seed=args.seed, how=args.sample, tree_number=number)])
    return np.sort(np.concatenate(chosen)), shares


def balance(sizes: np.ndarray) -> dict[str, float]:
    """Tell how evenly a set is spread over cells of these sizes [K]: gini (0: all equal), entropy (normalised by log K,
    1: all equal), effective (exp of the entropy: as many equal cells would have it), coverage (share of cells hit),
    top_share (images in the largest 1% of cells)."""
    sizes = np.sort(np.asarray(sizes, dtype=np.float64))
    K, total = len(sizes), sizes.sum()
    p = sizes[sizes > 0] / total
    entropy = float(-(p * np.log(p)).sum())
    return {
        "gini": float((2 * np.arange(1, K + 1) - K - 1) @ sizes / (K * total)),
        "entropy": entropy / np.log(K) if K > 1 else 1.0,
        "effective": float(np.exp(entropy)),
        "coverage": float((sizes > 0).mean()),
        "top_share": float(sizes[-max(1, K // 100) :].sum() / total),
    }


def tail_coverage(pool_sizes: np.ndarray, chosen_sizes: np.ndarray) -> float:
    """Share of the smallest tenth of the pool's non-empty clusters of which something was chosen."""
    filled = np.flatnonzero(pool_sizes > 0)
    tail = filled[np.argsort(pool_sizes[filled], kind="stable")][: max(1, len(filled) // 10)]
    return float((chosen_sizes[tail] > 0).mean())


def judge(embedded: Embedded, domains: dict, selection: np.ndarray, device: torch.device, seed: int) -> tuple:
    """Compare pool, random draw and selection on cells of equal radius (about one for 20 images, 10 to 1,000), which
    played no part in the choice.

    Args:
        domains: index rows that could have been chosen, by tree. selection: int64 index rows that were.
    Returns:
        ({"pool" | "random" | "selection": numbers of `balance`, plus tail_coverage}, {same: [K] int64 sizes}); "random"
        draws as many of each domain as the selection has.
    """
    rng, sizes = step_rng(seed, 3000), {"pool": [], "random": [], "selection": []}
    for rows in domains.values():
        chosen = np.intersect1d(rows, selection)
        drawn = rng.choice(rows, len(chosen), replace=False)
        if len(rows) > MAX_ROWS:
            rows = np.sort(rng.choice(rows, MAX_ROWS, replace=False))
        x = Rows(embedded.data, device, embedded.place(rows), unit=True)
        net = x.take(np.sort(rng.choice(len(rows), min(len(rows), NET_ROWS), replace=False)))
        centres = cell_centres(net, min(int(np.clip(len(rows) // 20, 10, 1000)), len(net)), rng)
        cell = np.concatenate([(part @ centres.t()).argmax(dim=1).cpu().numpy() for _, part in x.chunks()])
        for name, mine in zip(sizes, (rows, drawn, chosen)):
            sizes[name].append(np.bincount(cell[np.isin(rows, mine)], minlength=len(centres)))
    sizes = {name: np.concatenate(parts) for name, parts in sizes.items()}
    numbers = {name: balance(of) | {"tail_coverage": tail_coverage(sizes["pool"], of)} for name, of in sizes.items()}
    return numbers, sizes


def cell_centres(x: torch.Tensor, wanted: int, rng: np.random.Generator) -> torch.Tensor:
    """Find centres of about `wanted` cells of equal radius: rows of x in random order, each no nearer than the radius
    to those before (a greedy net). Clusters of k-means hold about equally many rows, so that a random draw looks even
    on them. x: [n, D] unit vectors; wanted: 1 to n; -> [K, D], K within a tenth of `wanted` where a radius does so."""
    x = x[torch.from_numpy(rng.permutation(len(x))).to(x.device)]
    low, high, best = -1.0, 1.0, x[:1]
    for _ in range(20):
        cosine, free, centres = (low + high) / 2, torch.ones(len(x), dtype=torch.bool, device=x.device), []
        while len(centres) < 2 * wanted and free.any():
            first = int(free.to(torch.uint8).argmax())
            centres.append(x[first])
            free &= x @ x[first] < cosine
            free[first] = False  # rounding: a vector's own cosine may lie below 1
        if abs(len(centres) - wanted) <= abs(len(best) - wanted):
            best = torch.stack(centres)
        if abs(len(centres) - wanted) <= wanted // 10:
            break
        low, high = (cosine, high) if len(centres) < wanted else (low, cosine)
    return best
