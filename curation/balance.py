"""How evenly a set is spread over clusters or cells."""

import numpy as np


def balance(sizes: np.ndarray) -> dict[str, float]:
    """Numbers of a cluster-size histogram [K].

    Returns:
        gini (0: all equal), entropy (normalised by log K, 1: all equal), effective (exp of the entropy: as
        many equal clusters would have it), coverage (share of clusters hit), top_share (images in the
        largest 1% of clusters).
    """
    sizes = np.sort(np.asarray(sizes, dtype=np.float64))
    K, total = len(sizes), sizes.sum()
    p = sizes[sizes > 0] / total
    entropy = float(-(p * np.log(p)).sum())
    gini = float((2 * np.arange(1, K + 1) - K - 1) @ sizes / (K * total))
    return {
        "gini": gini,
        "entropy": entropy / np.log(K) if K > 1 else 1.0,
        "effective": float(np.exp(entropy)),
        "coverage": float((sizes > 0).mean()),
        "top_share": float(sizes[-max(1, K // 100) :].sum() / total),
    }


def tail_coverage(pool_sizes: np.ndarray, chosen_sizes: np.ndarray) -> float:
    """Share of the smallest tenth of the pool's non-empty clusters of which something was chosen."""
    filled = np.flatnonzero(pool_sizes > 0)
    order = filled[np.argsort(pool_sizes[filled], kind="stable")]
    tail = order[: max(1, len(order) // 10)]
    return float((chosen_sizes[tail] > 0).mean())
