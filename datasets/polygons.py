"""COCO's polygons as masks."""

import numpy as np


def fill_polygon(polygon: list[float], height: int, width: int) -> np.ndarray:
    """[height, width] bool: pixels whose centre, (column + 0.5, row + 0.5), lies inside by the even-odd rule.

    Args:
        polygon: [x, y, x, y, ...] in px, three points or more, closed by itself; it may leave the picture.
    """
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
    count = last - first  # rows whose centres an edge passes
    edge = np.repeat(np.arange(len(points)), count)
    row = np.repeat(first, count) + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    crossings = np.zeros((height, width + 1), dtype=np.int64)
    np.add.at(crossings, (row, column), 1)
    return crossings[:, :width].cumsum(axis=1) % 2 == 1
