"""Did curation help? Pool, random draw and selection, counted over cells that played no part in it."""

import numpy as np
import torch

from curation.balance import balance, tail_coverage
from curation.cluster import Domain
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
    embedded: Embedded, domains: list[Domain], selection: np.ndarray, device: torch.device, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Compare sets on cells of equal radius (about one for 20 images, 10 to 1,000), found in each domain by
    itself.

    Args:
        domains: what could have been chosen, one tree each. selection: int64 index rows that were.
    Returns:
        ({"pool" | "random" | "selection": numbers of `balance`, plus tail_coverage}, {same: [K] int64
        sizes}); "random" draws as many of each domain as the selection has.
    """
    rng = step_rng(seed, 3000)
    sizes: dict[str, list[np.ndarray]] = {"pool": [], "random": [], "selection": []}
    for domain in domains:
        chosen = np.intersect1d(domain.rows, selection)
        drawn = rng.choice(domain.rows, len(chosen), replace=False)
        rows = domain.rows
        if len(rows) > MAX_ROWS:
            rows = np.sort(rng.choice(rows, MAX_ROWS, replace=False))
        cell, count = _cells(embedded, rows, device, rng)
        for name, mine in (("pool", rows), ("random", drawn), ("selection", chosen)):
            sizes[name].append(np.bincount(cell[np.isin(rows, mine)], minlength=count))
    joined = {name: np.concatenate(parts) for name, parts in sizes.items()}
    numbers = {
        name: balance(values) | {"tail_coverage": tail_coverage(joined["pool"], values)}
        for name, values in joined.items()
    }
    return numbers, joined


def _cells(embedded: Embedded, rows: np.ndarray, device, rng) -> tuple[np.ndarray, int]:
    """([n] int64 cell of each row, number of cells)."""
    x = Rows(embedded.data, device, embedded.place(rows), unit=True, alone=True)
    net = np.sort(rng.choice(len(rows), min(len(rows), NET_ROWS), replace=False))
    wanted = min(int(np.clip(len(rows) // 20, 10, 1000)), len(net))
    centres = cell_centres(x.take(net), wanted, rng)
    cell = np.concatenate([(part @ centres.t()).argmax(dim=1).cpu().numpy() for _, part in x.chunks()])
    return cell, len(centres)
