"""Images that are too small, too long, too dark or too blurred to teach anything."""

import numpy as np

from curation.index import Index
from curation.removal import Removal, Removals


def poor_images(
    index: Index,
    *,
    min_side: int,
    aspect: tuple[float, float],
    brightness: tuple[float, float],
    min_contrast: float,
    min_sharpness: float,
) -> Removal:
    """Pool images beyond a limit, each counted under the first that applies; unreadable ones of all sources
    too."""
    out = Removals(len(index))
    pool = ~index.excluded & index.readable
    side = np.minimum(index.width, index.height)
    ratio = index.width / np.maximum(index.height, 1)
    light = index.brightness
    out.add("unreadable", np.flatnonzero(~index.readable))
    for reason, wrong, value in (
        ("small (px)", side < min_side, side),
        ("aspect (width / height)", (ratio < aspect[0]) | (ratio > aspect[1]), ratio),
        ("exposure (mean of 255)", (light < brightness[0]) | (light > brightness[1]), light),
        ("flat (deviation of 255)", index.contrast < min_contrast, index.contrast),
        ("blurred (deviation of the Laplacian)", index.sharpness < min_sharpness, index.sharpness),
    ):
        rows = np.flatnonzero(pool & wrong)
        out.add(reason, rows, value=value[rows])
    return out.finish()
