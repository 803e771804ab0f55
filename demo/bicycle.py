"""Draws a bicycle and the mask of its parts, at the places and through the lenses of the demo set."""

import itertools
import math

import numpy as np
from PIL import Image

from demo.render import _circle, _Painter, _PartPainter, _record, _Scene
from demo.vehicle import CHROME, COLOURS, DARK, demo_rng

BODY, HEAD, SEAT, TYRE = 27, 28, 29, 30  # PartImageNet's ids
LENGTH, WIDTH, TALL = 1.75, 0.5, 1.08  # metres
RADIUS = 0.34
REAR, FRONT, CRANK = (-0.52, RADIUS), (0.55, RADIUS), (-0.06, 0.28)  # (x, y): hubs and pedals
SEAT_TOP, HEAD_TOP, HEAD_LOW = (-0.24, 0.82), (0.36, 0.88), (0.41, 0.68)
FRAME = (
    (CRANK, SEAT_TOP), (CRANK, HEAD_LOW), (SEAT_TOP, HEAD_TOP), (REAR, CRANK), (REAR, SEAT_TOP),
    (HEAD_TOP, FRONT),
)  # fmt: skip


def bicycle(seed: int, pid: int) -> dict:
    """Attributes of bicycle `pid`: colour, thickness of its tubes and tyres in metres, spokes, handlebar."""
    rng = demo_rng(seed, "bicycle", pid)
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    return {
        "colour": colour,
        "rgb": COLOURS[colour],
        "tube": float(rng.uniform(0.04, 0.07)),
        "tyre": float(rng.uniform(0.05, 0.09)),
        "spokes": int(rng.integers(5, 12)),
        "raised": float(rng.uniform(0.05, 0.18)),  # the handlebar above the frame
    }


class _Tubes:
    """Lines with a thickness in metres."""

    def __init__(self, p: _Painter):
        self.p = p

    def line(self, points, thickness: float, colour):
        """(x, y) or (x, y, z) in metres, one after another."""
        points = np.array([(*point, 0.0)[:3] for point in points], dtype=float)
        flat = [tuple(q) for q in self.p.lens(points).tolist()]
        width = max(1, round(thickness * self.p.lens.focal / self.p.lens.distance))
        self.p.draw.line(flat, fill=self.p.lit(colour), width=width, joint="curve")


def _draw(p: _Painter, attrs: dict, phase: float):
    """Wheels, frame, seat and handlebar, in this order."""
    tubes, flat = _Tubes(p), isinstance(p, _PartPainter)
    p.part = TYRE
    for x, y in (REAR, FRONT):
        rim = _circle(x, y, RADIUS, 28)
        if flat:  # what is seen between the spokes belongs to the wheel
            p.poly(np.insert(rim, 2, 0, axis=1), DARK)
        for angle in phase + 2 * np.pi * np.arange(attrs["spokes"]) / attrs["spokes"]:
            end = (x + RADIUS * math.cos(angle), y + RADIUS * math.sin(angle))
            tubes.line([(x, y), end], 0.012, CHROME)
        tubes.line([*rim, *rim[:2]], attrs["tyre"], DARK)
    p.part = BODY
    for a, b in FRAME:
        tubes.line([a, b], attrs["tube"], attrs["rgb"])
    tubes.line(_circle(*CRANK, 0.09, 14).tolist() + [(CRANK[0] + 0.09, CRANK[1])], 0.03, CHROME)
    tubes.line([(CRANK[0] - 0.1, CRANK[1] - 0.12), (CRANK[0] + 0.1, CRANK[1] + 0.12)], 0.04, DARK)
    p.part = SEAT
    tubes.line([SEAT_TOP, (SEAT_TOP[0] - 0.03, SEAT_TOP[1] + 0.12)], 0.035, CHROME)
    for z in (-0.06, 0.0, 0.06):
        tubes.line(
            [(SEAT_TOP[0] - 0.17, SEAT_TOP[1] + 0.15, z), (SEAT_TOP[0] + 0.12, SEAT_TOP[1] + 0.14, z / 3)], 0.08, DARK
        )
    p.part = HEAD
    top = (HEAD_TOP[0] - 0.02, HEAD_TOP[1] + attrs["raised"])
    tubes.line([HEAD_TOP, top], 0.045, CHROME)
    for sign in (-1, 1):
        tubes.line([(*top, 0), (top[0], top[1] + 0.02, sign * 0.24)], 0.045, CHROME)
        tubes.line([(top[0], top[1] + 0.02, sign * 0.24), (top[0] - 0.14, top[1] - 0.03, sign * 0.25)], 0.055, DARK)


def _shade(p: _Painter):
    """A dark strip on the ground."""
    corners = itertools.product((-LENGTH / 2, LENGTH / 2), (-0.08, 0.08))
    points = np.array([(x, 0.0, z) for x, z in corners])[[0, 1, 3, 2]]
    p.poly(points, tuple(0.55 * c for c in p.camera.ground))


def render_bicycle(
    seed: int, pid: int, camid: int, viewid: int, shot: int, size: int | tuple[int, int] = 96
) -> tuple[Image.Image, np.ndarray]:
    """One RGB picture of bicycle `pid`, and the mask of its parts: [H, W] uint8 in PartImageNet's ids.

    Arguments and errors as those of `demo_render.render`.
    """
    attrs, scene = bicycle(seed, pid), _Scene(seed, pid, camid, viewid, shot, size)
    scene.look_at(LENGTH, WIDTH, TALL)
    p = scene.place(LENGTH)
    _shade(p)
    phase = scene.rng.uniform(0, 2 * math.pi)
    _draw(p, attrs, phase)
    picture = _record(p, scene.rng, scene.size, scene.over)
    parts = scene.parts()
    _draw(parts, attrs, phase)
    return picture, scene.mask(parts)
