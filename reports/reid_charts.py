"""The curves of a re-identification report."""

import math

import numpy as np

from metrics.ranking import BINS, Ranking
from metrics.reid import scores
from reports.svg import DASHED, FILLED, SOLID, chart, steps

CMC_RANKS = 50


def charts(ranking: Ranking) -> str:
    """CMC, AP and cosines."""
    if not ranking.chosen["worst"].size:
        return "<p>No query has a match: there is nothing to draw.</p>"
    last = min(CMC_RANKS, len(ranking.gallery))
    found = scores(ranking.ranks, tuple(range(1, last + 1)))
    cmc = [100 * found[f"R{k}"] for k in range(1, last + 1)]
    some = ", ".join(f"{k}: {cmc[k - 1]:.1f} %" for k in (1, 5, 10, 20, 50) if k <= last)
    low = min(math.floor(cmc[0] / 10) * 10, 90)
    first = chart("CMC", (1, max(last, 2)), (low, 100), {"": (range(1, last + 1), cmc, SOLID)},
                  "rank k", "% of the queries", f"Queries with a match in the first k. {some}.")  # fmt: skip
    ap = 100 * ranking.ap[~np.isnan(ranking.ap)]
    heights, edges = np.histogram(ap, 20, (0, 100))
    caption = f"Median {np.median(ap):.1f} %; {(ap < 10).sum():,} of {len(ap):,} queries are below 10 %."
    second = chart("AP of the queries", (0, 100), (0, max(heights.max(), 1)),
                   {"": (*steps(edges, heights), FILLED)}, "AP, %", "queries", caption)  # fmt: skip
    return first + second + cosine_chart(ranking)


def cosine_chart(ranking: Ranking) -> str:
    """Both histograms over the range that holds all but a two-thousandth at either end of each."""
    pairs = {"same vehicle": ranking.true, "different vehicles": ranking.others}
    if not ranking.others.any():
        return ""
    above = [np.append(np.cumsum(x[::-1])[::-1], 0) / x.sum() for x in pairs.values()]  # share from a bin on
    inside = np.flatnonzero(np.any([(x > 5e-4) & (x <= 1 - 5e-4) for x in above], axis=0))
    low, high = (inside[0] - 1, inside[-1] + 1) if inside.size else (0, BINS)
    width = math.ceil((high - low) / min(50, max(10, math.isqrt(int(ranking.true.sum())))))
    count = math.ceil((high - low) / width)
    place = np.clip((np.arange(BINS) - low) // width, 0, count - 1)
    heights = [100 * np.bincount(place, x, count) / x.sum() for x in pairs.values()]
    edges = (low + width * np.arange(count + 1)) * 2 / BINS - 1
    lines = {name: (*steps(edges, h), style) for name, h, style in zip(pairs, heights, (FILLED, DASHED))}
    cut = int(np.argmax(above[1] <= 1e-3))
    sample = "" if ranking.sampled.all() else ", of a random part of the gallery"
    caption = (
        f"{ranking.true.sum():,} pairs of one vehicle, {ranking.others.sum():,} of different ones{sample}. "
        f"A cosine of {2 * cut / BINS - 1:.3f} is reached by at most 1 in 1,000 of the different ones and by "
        f"{100 * above[0][cut]:.1f} % of the same."
    )
    top = max(h.max() for h in heights)
    return chart("Cosine of query and gallery", edges[[0, -1]], (0, top), lines, "cosine", "% of the pairs", caption)
