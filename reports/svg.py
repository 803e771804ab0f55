"""Line charts as SVG, for pages that need no other file."""

import math

import numpy as np

SOLID = 'fill="none" stroke="#06c" stroke-width="2.5"'
FILLED = 'fill="#06c" fill-opacity=".3" stroke="#06c" stroke-width="1.5"'
DASHED = 'fill="none" stroke="#b50" stroke-width="2" stroke-dasharray="5 3"'


def chart(title: str, x, y, lines: dict[str, tuple], x_title: str, y_title: str, caption: str) -> str:
    """A figure with an SVG.

    Args:
        x, y: (lowest, highest) of the axes. lines: name -> (xs, ys, SVG attributes); with two and more there
            is a legend.
    """
    left, right, top, bottom = 44, 366, 24, 192

    def px(xs, ys):
        share_x, share_y = (np.asarray(xs) - x[0]) / (x[1] - x[0]), (np.asarray(ys) - y[0]) / (y[1] - y[0])
        places = left + (right - left) * share_x, bottom - (bottom - top) * share_y
        return np.stack(places, axis=-1).round(1)

    parts = [f'<text x="{left}" y="12">{y_title}</text>']
    for value in ticks(*y, 4):
        at = px(x[0], value)[1]
        parts.append(f'<path d="M{left} {at}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{at + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for value in ticks(*x, 6):
        at = px(value, y[0])[0]
        parts.append(f'<text x="{at}" y="{bottom + 15}" text-anchor="middle">{value:.6g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 31}" text-anchor="middle">{x_title}</text>')
    for place, (name, (xs, ys, style)) in enumerate(lines.items()):
        points = " ".join(f"{a},{b}" for a, b in px(xs, ys).tolist())
        parts.append(f'<polyline points="{points}" {style}/>')
        if len(lines) > 1:
            at = right - 216 + 106 * place
            parts.append(f'<path d="M{at} 8h22" {style}/><text x="{at + 26}" y="12">{name}</text>')
    return (
        f'<figure><h3>{title}</h3><svg viewBox="0 0 380 230" role="img" aria-label="{title}: {caption}">'
        f"{''.join(parts)}</svg><figcaption>{caption}</figcaption></figure>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    ten = 10 ** math.floor(math.log10((high - low) / count))
    step = next(m * ten for m in (1, 2, 5, 10) if m * ten * count >= (high - low) * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def steps(edges: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outline of a histogram."""
    return np.repeat(edges, 2), np.concatenate([[0], np.repeat(heights, 2), [0]])
