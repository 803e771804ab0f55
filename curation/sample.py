"""A balanced sample of an exact size from a tree of clusters (Vo et al., 2024, Sec. 3.3)."""

import numpy as np

from curation.hierarchy import Tree, members_by_cluster, step_rng


def water_fill(sizes: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """Shares that are as equal as the sizes allow: share_j = min(level, size_j), their sum exactly `target`.

    What the integer level leaves over goes, one each, to random clusters that still have more.

    Args:
        sizes: [J] int64 >= 0. target: at most their sum; more is cut to it.
    Returns:
        [J] int64.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    if target >= sizes.sum():
        return sizes.copy()
    ascending = np.sort(sizes)
    below = np.concatenate([[0], np.cumsum(ascending)])[:-1]  # images of all smaller clusters
    # the level if all clusters from this one on were cut: right for the first that is larger than it
    levels = (target - below) // np.arange(len(sizes), 0, -1)
    level = levels[np.argmax(ascending > levels)]
    shares = np.minimum(sizes, level)
    rest = int(target - shares.sum())
    shares[rng.choice(np.flatnonzero(sizes > level), rest, replace=False)] += 1
    return shares


def sample_tree(tree: Tree, target: int, *, seed: int, how: str = "random", tree_number: int = 0):
    """Share the target over the top clusters, each share over its children, down to the images.

    Args:
        how: `random` members of a level-1 cluster, or those `closest` to its centroid.
    Returns:
        (ascending int64 rows, min(target, N) of them, none twice; [k_top] int64 shares of the top clusters).
    """
    rng = step_rng(seed, tree_number, 1000)
    path = tree.path()
    top_shares = water_fill(tree.images_below(len(tree.sizes) - 1), target, rng)
    shares = top_shares
    for level in range(len(tree.sizes) - 1, 0, -1):
        children, offsets = members_by_cluster(tree.parents[level], tree.sizes[level])
        sizes = np.bincount(path[:, level - 1], minlength=tree.sizes[level - 1])
        below = np.zeros(tree.sizes[level - 1], dtype=np.int64)
        for cluster in np.flatnonzero(shares):
            mine = children[offsets[cluster] : offsets[cluster + 1]]
            below[mine] = water_fill(sizes[mine], int(shares[cluster]), rng)
        shares = below
    key = tree.distance if how == "closest" else rng.random(len(path))
    order = np.lexsort((key, path[:, 0]))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(path[:, 0], minlength=tree.sizes[0]))])
    place = np.arange(len(path)) - offsets[path[order, 0]]
    return np.sort(order[place < shares[path[order, 0]]]), top_shares
