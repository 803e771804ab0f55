"""Did curation help? Pool, random draw and selection, counted over cells that played no part in it."""

import numpy as np
import torch

from curation.balance import balance, tail_coverage
from curation.duplicates import Embedded
from curation.hierarchy import step_rng
from curation.rows import Rows

MAX_ROWS = 500_000  # rows that are counted
NET_ROWS = 10_000  # rows the cells are found on


def cell_centres(x: torch.Tensor, wanted: int, rng: np.random.Generator) -> torch.Tensor:
    """Centres of about `wanted` cells of equal radius: rows in random order, each no nearer than the radius
    to those before (a greedy net). Clusters of k-means hold about equally many rows, so that a random draw
    looks even on them; cells hold as many as there are.

    Args:
        x: [n, D] unit vectors. wanted: from 1 to n.
    Returns:
        [K, D], K within a tenth of `wanted` where a radius gives that.
    """
    x = x[torch.from_numpy(rng.permutation(len(x))).to(x.device)]
    low, high, best = -1.0, 1.0, x[:1]
    for _ in range(20):
        cosine = (low + high) / 2
        found = _net(x, cosine, 2 * wanted)
        if abs(len(found) - wanted) <= abs(len(best) - wanted):
            best = found
        if abs(len(found) - wanted) <= wanted // 10:
            break
        low, high = (cosine, high) if len(found) < wanted else (low, cosine)
    return best


def _net(x: torch.Tensor, cosine: float, most: int) -> torch.Tensor:
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    centres = []
    while len(centres) < most and free.any():
        first = int(free.to(torch.uint8).argmax())
        centres.append(x[first])
        free &= x @ x[first] < cosine
        free[first] = False  # rounding: a vector's own cosine may lie below 1
    return torch.stack(centres)


def judge(
    embedded: Embedded, pool: np.ndarray, selection: np.ndarray, device: torch.device, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Compare sets on cells of equal radius (about one for 20 images, 10 to 1,000).

    Args:
        pool: int64 index rows that could have been chosen; selection: those that were.
    Returns:
        ({"pool" | "random" | "selection": numbers of `balance`, plus tail_coverage}, {same: [K] int64
        sizes}); "random" is a random draw from the pool of the selection's size.
    """
    rng = step_rng(seed, 3000)
    place = embedded.place(pool)
    if len(place) > MAX_ROWS:
        place = np.sort(rng.choice(place, MAX_ROWS, replace=False))
    rows = Rows(embedded.data, device, place, unit=True, alone=True)
    net = np.sort(rng.choice(len(place), min(len(place), NET_ROWS), replace=False))
    wanted = min(int(np.clip(len(pool) // 20, 10, 1000)), len(net))
    centres = cell_centres(rows.take(net), wanted, rng)
    cell = np.concatenate([(x @ centres.t()).argmax(dim=1).cpu().numpy() for _, x in rows.chunks()])
    numbers = embedded.rows[place]
    drawn = np.isin(numbers, rng.choice(pool, min(len(selection), len(pool)), replace=False))
    chosen = np.isin(numbers, selection)
    sizes = {
        name: np.bincount(cell[mask], minlength=len(centres))
        for name, mask in (("pool", np.ones(len(place), bool)), ("random", drawn), ("selection", chosen))
    }
    numbers_of = {
        name: balance(values) | {"tail_coverage": tail_coverage(sizes["pool"], values)}
        for name, values in sizes.items()
    }
    return numbers_of, sizes
