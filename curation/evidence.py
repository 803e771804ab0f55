"""Did curation help? The pool, a random draw and the selection on clusters that played no part in it."""

import numpy as np
import torch

from curation.balance import balance, tail_coverage
from curation.duplicates import Embedded
from curation.hierarchy import step_rng
from curation.kmeans import kmeans
from curation.rows import Rows

MAX_ROWS = 500_000  # rows the independent clusters are found on


def judge(
    embedded: Embedded, pool: np.ndarray, selection: np.ndarray, device: torch.device, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Compare sets on a flat k-means of the pool that has its own seed (about one cluster for 20 images, 10
    to 2,000).

    Args:
        pool: int64 index rows that could have been chosen; selection: those that were.
    Returns:
        ({"pool" | "random" | "selection": numbers of `balance`, plus tail_coverage}, {same: [K] int64
        sizes}); "random" is a random draw from the pool of the selection's size.
    """
    clusters = int(np.clip(len(pool) // 20, 10, 2000))
    rng = step_rng(seed, 3000)
    place = embedded.place(pool)
    if len(place) > MAX_ROWS:
        place = np.sort(rng.choice(place, MAX_ROWS, replace=False))
    rows = Rows(embedded.data, device, place, alone=True)
    found = kmeans(rows, min(clusters, len(place)), iterations=15, rng=rng)
    numbers = embedded.rows[place]
    drawn = np.isin(numbers, rng.choice(pool, min(len(selection), len(pool)), replace=False))
    chosen = np.isin(numbers, selection)
    sizes = {
        name: np.bincount(found.assignment[mask], minlength=clusters)
        for name, mask in (("pool", np.ones(len(place), bool)), ("random", drawn), ("selection", chosen))
    }
    numbers_of = {
        name: balance(values) | {"tail_coverage": tail_coverage(sizes["pool"], values)}
        for name, values in sizes.items()
    }
    return numbers_of, sizes
