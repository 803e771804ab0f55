"""Draws one picture of the demo set.

A vehicle is two to four solid slabs, each a side outline in metres extruded over the width, seen
through a pinhole camera and painted back to front with Pillow at two to three times the final size.
Every random number comes from a Philox stream keyed by the seed and the ids of the thing drawn.
"""

import itertools
import math
from functools import cache, partial

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from datasets.seg import BACKGROUND_ID
from demo.vehicle import BODIES, CAMERAS, CHROME, COLOURS, DARK, GLASS, SHEEN, VIEWS, Body, Camera, demo_rng, vehicle

CAR_BODY, CAR_TYRE, CAR_MIRROR = 24, 25, 26  # PartImageNet's ids


class _Slab:
    """A side outline extruded over the width, with points on its surfaces by coordinates.

    Outlines are (u, y) from the bottom up. Vehicle space is metric: x forward from the middle, y
    up from the ground, z to the vehicle's right.
    """

    def __init__(self, length: float, nose, tail, bottom: float, top: float, taper: float = 0):
        self.length, self.bottom, self.top, self.taper = length, bottom, top, taper
        self.nose, self.tail = np.array(nose), np.array(tail)
        self.ring = np.concatenate([self.nose, self.tail[::-1]])
        self.y0, self.y1 = self.ring[:, 1].min(), self.ring[:, 1].max()

    def y(self, share: float) -> float:
        """Height of a share of the slab, 0 at its bottom."""
        return self.y0 + (self.y1 - self.y0) * share

    def half(self, u, y):
        """Half width in metres: from `bottom` to `top`, drawn in near both ends."""
        end = 1 - np.clip(np.minimum(u, self.length - u) / 0.45, 0, 1)
        width = np.interp(y, (self.y0, self.y1), (self.bottom, self.top))
        return width * (1 - self.taper * end**2)

    def side(self, points, sign: int) -> np.ndarray:
        """(u, y) on the right (sign 1) or left (-1) side."""
        u, y = np.asarray(points, dtype=float).T
        return np.stack([self.length / 2 - u, y, sign * self.half(u, y)], axis=1)

    def face(self, points, front: bool) -> np.ndarray:
        """(a, y) on the nose or the tail, a in -1..1 across the width there."""
        a, y = np.asarray(points, dtype=float).T
        u = np.interp(y, *(self.nose if front else self.tail).T[::-1])
        return np.stack([self.length / 2 - u, y, a * self.half(u, y)], axis=1)


@cache
def _slabs(name: str) -> dict[str, _Slab]:
    """The slabs of a body type, in the order in which they are painted seen from behind."""
    body, half = BODIES[name], BODIES[name].width / 2
    sill, nose, bonnet, waist, roof = body.heights
    u0, u1, u2, u3 = body.cabin
    size, end = body.length, u3 if body.back == "load" else body.length
    boxy = roof > 2.4
    slabs = {
        "lower": _Slab(
            size,
            [(0.45, sill), (0.06, sill), (0, (sill + nose) / 2), (0.08, nose), (u0 + 0.15, bonnet)],
            [
                (end - 0.45, sill),
                (end - 0.06, sill + 0.02),
                (end, (sill + waist) / 2),
                (end - 0.06, waist - 0.02),
                (end - 0.45, waist),
            ],
            half * 0.95,
            half,
            0.05 if boxy else 0.16,
        ),
        "cabin": _Slab(
            size,
            [(u0, bonnet - 0.02), (u1, roof - 0.03)],
            [(u3, waist - 0.02), (u2, roof)],
            half * 0.97,
            half * body.roof,
            0.05 if boxy else 0.1,
        ),
    }
    if body.back == "load":

        def block(u, low, high, width):
            return _Slab(size, [(u, low), (u, high)], [(size, low), (size, high)], width, width)

        slabs = {"frame": block(0.3, 0.5, 0.98, half * 0.8), **slabs, "load": block(u3 + 0.2, 0.98, roof + 0.8, half)}
    return slabs


class _Lens:
    """A pinhole camera, `distance` metres from the vehicle at angle `theta` from its nose.

    The lens is shifted, not tipped, so verticals stay vertical however high the camera hangs.
    `cx`, `cy` are the pixel of the horizon straight ahead.
    """

    def __init__(self, theta: float, distance: float, height: float, roll: float):
        self.cos, self.sin = math.cos(theta), math.sin(theta)
        self.distance, self.height, self.roll = distance, height, roll
        self.focal, self.cx, self.cy = 1.0, 0.0, 0.0

    def depth(self, points: np.ndarray) -> np.ndarray:
        return self.distance - points[:, 0] * self.cos - points[:, 2] * self.sin

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) metres to (N, 2) pixels."""
        scale = self.focal / self.depth(points)
        x = (points[:, 0] * self.sin - points[:, 2] * self.cos) * scale
        y = (self.height - points[:, 1]) * scale
        return np.stack([self.cx + x + self.roll * y, self.cy + y - self.roll * x], axis=1)

    def fit(self, points: np.ndarray, centre: np.ndarray, extent: np.ndarray):
        """Choose focal length and shift so that the points fill `extent` pixels at `centre`."""
        flat = self(points)
        low, high = flat.min(0), flat.max(0)
        self.focal = float(min(extent / (high - low)))
        self.cx, self.cy = (centre - self.focal * (low + high) / 2).tolist()


def _circle(x: float, y: float, r: float, n: int = 18, phase: float = 0.0) -> np.ndarray:
    angle = phase + np.arange(n) * 2 * np.pi / n
    return np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], axis=1)


def _box(x0, y0, x1, y1) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float)


def _slice(points: np.ndarray, axis: int, low: float, high: float) -> np.ndarray:
    """The part of a convex polygon with low <= coordinate <= high along an axis."""
    for bound, sign in ((low, 1), (high, -1)):
        out = []
        for a, b in zip([*points[-1:], *points[:-1]], points, strict=True):
            da, db = sign * (a[axis] - bound), sign * (b[axis] - bound)
            if (da < 0) != (db < 0):
                out.append(a + (b - a) * da / (da - db))
            if db >= 0:
                out.append(b)
        points = np.array(out).reshape(-1, points.shape[1])
    return points


class _Painter:
    """Draws polygons of vehicle space in the light of a camera."""

    def __init__(self, image: Image.Image, lens: _Lens, camera: Camera):
        self.image, self.lens, self.camera = image, lens, camera
        self.draw, self.glows = ImageDraw.Draw(image), []
        self.part = CAR_BODY  # what is being painted

    def lit(self, colour, k: float = 1.0) -> tuple:
        return tuple(int(min(255, c * k * t)) for c, t in zip(colour, self.camera.light, strict=True))

    def poly(self, points: np.ndarray, colour, k: float = 1.0):
        if len(points) > 2:
            self.draw.polygon([tuple(q) for q in self.lens(points).tolist()], fill=self.lit(colour, k))

    def floor(self, x0: float, z0: float, x1: float, z1: float, colour=(232, 232, 226)):
        """A rectangle on the ground, without what lies behind the camera."""
        flat = _box(x0, z0, x1, z1)
        points = np.stack([flat[:, 0], flat[:, 0] * 0, flat[:, 1]], axis=1)
        deep = np.column_stack([points, self.lens.depth(points)])
        self.poly(_slice(deep, 3, 0.4, 1e3)[:, :3], colour)

    def sunlight(self, nx: float, ny: float, nz: float) -> float:
        """Brightness of a face with this normal."""
        (sx, sy, sz), cos, sin = self.camera.sun, self.lens.cos, self.lens.sin
        dot = (nx * sin - nz * cos) * sx + ny * sy + (nx * cos + nz * sin) * sz
        return 0.72 + 0.1 * ny + 0.34 * max(0.0, dot)

    def lamp(self, points: np.ndarray, day, night):
        """A lamp in the colour of day, or glowing where the camera has its lamps lit."""
        if not self.camera.lamps:
            return self.poly(points, day)
        flat = self.lens(points)
        self.draw.polygon([tuple(q) for q in flat.tolist()], fill=night)
        self.glows.append((flat.mean(0), 0.2 * self.lens.focal / self.lens.distance, night))


class _PartPainter(_Painter):
    """Draws the same polygons in the id of the part that they belong to."""

    def lit(self, colour, k: float = 1.0) -> int:
        return self.part

    def lamp(self, points: np.ndarray, day, night):
        self.poly(points, day)


def _backdrop(p: _Painter, rng: np.random.Generator, shift: float):
    """Sky, ground and what stands 10 m behind the vehicle, moved `shift` metres to the right."""
    width, height = p.image.size
    scale = p.lens.focal / (p.lens.distance + 10)
    base, kind = p.lens.cy + scale * p.lens.height, p.camera.backdrop
    rows = np.arange(height)[:, None]
    up, down = np.clip(rows / max(base, 1), 0, 1), np.clip((rows - base) / (height - base), 0, 1)
    sky = np.array(p.camera.sky[0]) * (1 - up) + np.array(p.camera.sky[1]) * up
    ground = np.array(p.camera.ground) * p.camera.light * (0.84 + 0.2 * down)
    column = np.where(rows < base, sky, ground).clip(0, 255).astype(np.uint8)
    plain = Image.fromarray(column[:, None]).resize((width, height))
    p.image.paste(plain)

    def box(x0, y0, x1, y1, colour, glows=False, shape=p.draw.rectangle):
        xy = [width / 2 + (x0 + shift) * scale, base - y1 * scale, width / 2 + (x1 + shift) * scale, base - y0 * scale]
        if xy[2] >= 0 and xy[0] <= width:
            shape(xy, fill=tuple(colour) if glows else p.lit(colour))

    def oval(x, y, rx, ry, colour):
        box(x - rx, y - ry, x + rx, y + ry, colour, shape=p.draw.ellipse)

    for y0, y1, colour in {
        "fence": [(0, 3.4, (150, 153, 156))],
        "trees": [(0, 0.8, (58, 104, 40))],
        "showroom": [(0, 0.15, (120, 122, 128)), (3.3, 3.45, (196, 198, 204))],
        "garage": [(0, 3.2, (168, 162, 150)), (0, 0.9, (70, 96, 120)), (0.9, 1, (220, 190, 60))],
    }.get(kind, ()):
        box(-40, y0, 40, y1, colour)
    x = -32.0
    while x < 32:
        w, h, t = rng.uniform(3.5, 7), rng.uniform(4.5, 11), rng.uniform(0, 1, 3)
        if kind == "hills":
            oval(x + w / 2, 0, w / 2 + 7, h / 3, (104 + 20 * t[0], 140 + 20 * t[0], 118))
        elif kind == "houses":
            box(x, 0, x + w, h, (176 + 60 * t[0], 150 + 50 * t[1], 116 + 60 * t[2]))
            for at in np.arange(x + 0.6, x + w - 1, 1.7):
                box(at, 0, at + 1, 2.3, (84, 104, 120) if (at - x) % 3 > 1 else (72, 60, 52))
                for y in np.arange(3.3, h - 1.4, 2.3):
                    box(at, y, at + 0.9, y + 1.4, (74, 92, 110))
        elif kind == "fence":
            box(x, 0, x + 0.15, 1.6, (70, 74, 78))
            oval(x + w / 2, 0.7, w / 2 - 0.8, 0.6, (74, 96, 66))
            box(x + 1, 2, x + w - 1, 2.9, (112, 122, 132))
        elif kind == "trees":
            box(x + w / 2 - 0.2, 0, x + w / 2 + 0.2, h / 2, (86, 62, 40))
            for dx, y, r in ((0, 0.5, 2.0), (-1.1, 0.36, 1.4), (1.1, 0.38, 1.5), (0.3, 0.66, 1.3)):
                shade = 0.55 + 0.5 * y + 0.2 * t[0]
                oval(x + w / 2 + dx, h * y, r, r, (62 * shade, 122 * shade, 44 * shade))
        elif kind in ("dusk", "night"):
            h *= 0.5 if kind == "dusk" else 0.75
            box(x, 0, x + w - 1.2 * t[1], h, (74, 54, 84) if kind == "dusk" else (30, 33, 50), True)
            for at in np.arange(x + 0.5, x + w - 2, 1.2):
                for y in np.arange(0.8, h - 1, 1.5):
                    if rng.random() < 0.4:
                        box(at, y, at + 0.6, y + 0.8, (250, 206, 120), True)
        elif kind == "showroom":
            box(x, 0.4, x + w - 0.4, 3.0, (214 + 24 * t[0], 216 + 24 * t[0], 226))
            box(x + 0.6, 1.2, x + w - 1, 2.4, (60 + 150 * t[0], 110 + 90 * t[1], 60 + 150 * t[2]))
            box(x + w / 2 - 0.5, 3.8, x + w / 2 + 0.5, 3.95, (255, 255, 255), True)
        elif kind == "garage":
            box(x, 0, x + 0.8, 3.2, (128, 124, 116))
            box(x, 0.5, x + 0.8, 1.3, (228, 186, 40) if t[0] < 0.6 else (188, 60, 44))
            box(x + 1.6, 2.75, x + w - 1, 2.9, (255, 246, 206), True)
        x += w
    below = (0, max(0, round(base)), width, height)
    p.image.paste(plain.crop(below), below)  # over the lower half of the hills
    if kind == "hills":  # the crash barrier stands in front of them
        box(-40, 0.45, 40, 0.8, (176, 180, 184))
        for post in range(-40, 40, 2):
            box(post, 0, post + 0.12, 0.5, (120, 124, 128))


def _lines(p: _Painter, length: float):
    """Lines and surfaces on the ground, laid along the vehicle."""
    kind, end = p.camera.lines, length / 2 + 0.5
    if kind == "track":
        p.floor(-40, -2.9, 40, 2.9, (134, 128, 120))
    for z in {"lanes": (-5.5, 5.4), "track": (-2.7, 2.6), "kerb": (-3.4, 3.2)}.get(kind, ()):
        p.floor(-40, z, 40, z + 0.12)
    for x, z in itertools.product(range(-39, 40, 6), {"lanes": (-1.9, 1.75)}.get(kind, ())):
        p.floor(x, z, x + 3, z + 0.14)
    if kind == "bays":
        for z in (-4.6, -1.6, 1.5, 4.5):
            p.floor(-end, z, end, z + 0.12)
        p.floor(-end - 0.12, -4.6, -end, 4.62)
    for at in np.arange(-12, 12.1, 1.5) if kind == "tiles" else ():
        p.floor(-12, at, 12, at + 0.03, (160, 162, 172))
        p.floor(at, -12, at + 0.03, 12, (160, 162, 172))
    for z, x in itertools.product(np.arange(-5.4, 5.5, 1.2), (-end - 3, end + 0.3)):
        if kind == "zebra":
            p.floor(x, z, x + 2.7, z + 0.6)


def _shadow(p: _Painter, body: Body):
    """Darken the ground under the vehicle and, away from the light, beside it."""
    mask = Image.new("L", (p.image.width // 3, p.image.height // 3))
    (sx, _, sz), cos, sin = p.camera.sun, p.lens.cos, p.lens.sin
    away = np.array((sx * sin + sz * cos, sz * sin - sx * cos)) * -0.9
    for share, reach in ((0.6, 1), (1.0, 0)):
        flat = _box(-1, -1, 1, 1) * (body.length / 2, body.width / 2) + away * reach
        corners = np.stack([flat[:, 0], flat[:, 0] * 0, flat[:, 1]], axis=1)
        ImageDraw.Draw(mask).polygon(
            [tuple(q) for q in (p.lens(corners) / 3).tolist()], fill=int(255 * share * p.camera.shadow)
        )
    mask = mask.filter(ImageFilter.GaussianBlur(p.image.width / 110)).resize(p.image.size)
    p.image.paste((10, 10, 16), mask=mask)


def _wheels(p: _Painter, body: Body, rim: int, phase: float, discs: bool):
    """The treads of all wheels, or (`discs`) the outer sides of those on the near side."""
    r, width = body.wheels[-1], body.width / 2
    p.part = CAR_TYRE
    for sign, axle in itertools.product((-1, 1), body.wheels[:-1]):
        x = body.length / 2 - axle

        def draw(points, colour, z=sign * (width + 0.01)):
            p.poly(np.insert(points, 2, z, axis=1), colour)

        if not discs:
            outer, inner = (np.insert(_circle(x, r, r, 12), 2, sign * (width - z), axis=1) for z in (0.04, 0.28))
            for k in range(12):
                p.poly(np.stack([outer[k - 1], outer[k], inner[k], inner[k - 1]]), (22, 22, 24))
        elif sign * p.lens.sin * p.lens.distance > width:
            arch = _slice(_circle(x, r, r * 1.16, 24), 1, body.heights[0], 9)
            p.part = CAR_BODY
            draw(arch, (16, 16, 18))
            p.part = CAR_TYRE
            draw(_circle(x, r, r), (26, 26, 28))
            draw(_circle(x, r, r * 0.68), CHROME)
            draw(_circle(x, r, r * 0.6), (64, 66, 70) if rim else (150, 154, 160))
            for angle in phase + 2 * np.pi * np.arange(rim) / max(rim, 1):
                out, across = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))]) * r
                across = across * 0.42 / max(rim, 3)
                draw(
                    [(x, r) - across, (x, r) + across, (x, r) + out * 0.62 + across, (x, r) + out * 0.62 - across],
                    CHROME,
                )
    p.part = CAR_BODY


def _mirrors(p: _Painter, body: Body, colour, before: bool):
    """Side mirrors beside the windscreen's foot: those behind the body (`before` it is painted) or the
    others."""
    x, y, half = body.length / 2 - body.cabin[0] - 0.45, body.heights[3] + 0.04, body.width / 2
    high = 0.2 if body.heights[4] < 2 else 0.42
    p.part = CAR_MIRROR
    for sign in (-1, 1):
        is_near = sign * p.lens.sin * p.lens.distance > half
        if before == (is_near or (p.lens.cos > 0 and abs(p.lens.sin) < 0.5)):
            continue
        inner, outer = sign * (half - 0.03), sign * (half + 0.26)
        for z0, z1, x0, x1, k in (
            (inner, outer, x - 0.1, x - 0.1, 0.7),
            (inner, outer, x + 0.1, x + 0.1, 0.9),
            (outer, outer, x - 0.1, x + 0.1, 0.55),
        ):
            quad = [(x0, y, z0), (x1, y, z1), (x1, y + high, z1), (x0, y + high, z0)]
            p.poly(np.array(quad), colour, k)
    p.part = CAR_BODY


def _solid(p: _Painter, slab: _Slab, colour, lid):
    """The bare surfaces of a slab: the strips across the width first, then the near side."""
    for a, b in zip(slab.ring, np.roll(slab.ring, -1, 0), strict=True):
        edge = np.stack([a, b])
        quad = np.concatenate([slab.side(edge, 1), slab.side(edge, -1)[::-1]])
        if _turn(p.lens(quad)) > 0:
            nx, ny = (b[1] - a[1], b[0] - a[0]) / np.hypot(*(b - a))
            p.poly(quad, lid if ny > 0.8 else colour, p.sunlight(nx, ny, 0))
    for sign in _near(p, slab):
        for low, high in itertools.pairwise(np.linspace(0, 1, 10)):
            # the sky lies on the shoulder, the ground darkens the sill
            gloss = 0.74 + 0.24 * low + 0.2 * math.exp(-(((low - 0.75) / 0.1) ** 2))
            band = _slice(slab.ring, 1, slab.y(low), slab.y(high) + 0.01)
            p.poly(slab.side(band, sign), colour, p.sunlight(0, 0.1, sign) * gloss)


def _turn(quad: np.ndarray) -> float:
    """Twice the signed area of a quadrilateral in pixels; its sign tells which side is seen."""
    (ax, ay), (bx, by) = quad[2] - quad[0], quad[3] - quad[1]
    return ax * by - bx * ay


def _near(p: _Painter, slab: _Slab) -> list[int]:
    """The side (1 right, -1 left) that the camera sees, if any."""
    return [sign for sign in (-1, 1) if sign * p.lens.sin * p.lens.distance > slab.bottom]


def _details(p: _Painter, name: str, slab: _Slab, attrs: dict):
    """What is fixed to one slab: glass, doors, lamps, plates and the marks."""
    body, marks, paint = BODIES[attrs["body"]], attrs["marks"], attrs["rgb"]
    y, near = slab.y, _near(p, slab)
    ends = [f for f in (True, False) if (_turn(p.lens(slab.face(_box(-1, y(0.1), 1, y(0.9)), f))) > 0) == f]

    def side(points, colour, k=1.0):
        for sign in near:
            p.poly(slab.side(points, sign), colour, k)

    def face(front, points, colour, k=1.0):
        if front in ends:
            p.poly(slab.face(points, front), colour, k)

    def plate(front, middle):
        a = 0.26 / slab.bottom
        face(front, _box(-a, middle - 0.06, a, middle + 0.06), (236, 236, 226))
        for at in (-0.8, -0.5, -0.1, 0.2, 0.5):  # nothing to read
            face(front, _box(a * at, middle - 0.035, a * (at + 0.2), middle + 0.035), (50, 52, 60))

    if name == "cabin":
        tall = slab.y1 - slab.y0 > 1
        centre = slab.ring.mean(0)
        pane = (slab.ring - centre) * (0.97, 0.72) + centre + (0, 0.02)
        pane = _slice(pane, 1, y(0.4 if tall and body.back == "doors" else 0.06), 9)
        for a, b in itertools.pairwise(body.pillars):
            window = _slice(pane, 0, a + 0.03, b - 0.03)
            side(window, GLASS)
            side(_slice(window, 1, window[:, 1].mean() + 0.1, 9), SHEEN)
        for front in (True, False) if body.back in ("window", "bed") else (True,):
            face(front, _box(-0.9, y(0.06), 0.9, y(0.88)), GLASS)
            face(front, [(-0.5, y(0.88)), (-0.1, y(0.88)), (-0.5, y(0.5)), (-0.88, y(0.5))], SHEEN)
        for a in (-0.82, 0.08) if body.back == "doors" else ():
            face(False, _box(a, y(0.35), a + 0.74, y(0.88)), GLASS)
        u0, u1 = slab.nose[1, 0] + 0.1, slab.tail[1, 0] - 0.1
        x0, x1, z = body.length / 2 - u0, body.length / 2 - u1, slab.top * 0.75
        if "sunroof" in marks:
            roof = [
                (x0, slab.y1, z),
                (x0 * 0.6 + x1 * 0.4, slab.y1, z),
                (x0 * 0.6 + x1 * 0.4, slab.y1, -z),
                (x0, slab.y1, -z),
            ]
            p.poly(np.array(roof), GLASS)
        for s in (-1, 1) if "rack" in marks else ():
            rail = p.lens(np.array([(x0, slab.y1 + 0.1, s * z), (x1, slab.y1 + 0.1, s * z)]))
            p.draw.line(
                [tuple(q) for q in rail.tolist()],
                fill=p.lit((52, 54, 58)),
                width=max(2, round(0.09 * p.lens.focal / p.lens.distance)),
            )
    if name == "lower":
        side(_slice(slab.ring, 1, 0, y(0.13)), DARK)
        for u in body.pillars[:3]:
            side(_box(u + 0.1, y(0.12), u + 0.13, y(0.97)), paint, 0.45)
            side(_box(u + 0.18, y(0.76), u + 0.36, y(0.81)), DARK)
        side(_box(0.06, y(0.55), 0.3, y(0.72)), (214, 222, 228))
        if True in ends:
            _nose(p, slab, attrs, partial(face, True))
            plate(True, y(0) + 0.1)
        if body.back == "bed":
            bed = _box(body.length / 2 - body.cabin[3] - 0.12, -0.85, 0.12 - body.length / 2, 0.85)
            p.poly(np.insert(bed, 1, slab.y1, axis=1), (40, 41, 44))
    if name == ("frame" if body.back == "load" else "lower"):
        if body.back != "load":
            side(_box(body.length - 0.26, y(0.55), body.length - 0.05, y(0.78)), (176, 18, 22))
        face(False, _box(-0.96, y(0), 0.96, y(0.2)), DARK)
        high = 0.12 if attrs["lamp"] in ("slit", "box") else 0.24
        for a in (-0.8, 0.8) if False in ends else ():
            lamp = slab.face(_box(a - 0.15, y(0.62 - high), a + 0.15, y(0.62 + high)), False)
            p.lamp(lamp, (176, 18, 22), (255, 40, 30))
        plate(False, y(0.36))
    if name == "load":
        for u in np.arange(slab.nose[0, 0] + 0.9, body.length - 0.3, 0.9):
            side(_box(u, y(0.04), u + 0.03, y(0.96)), paint, 0.7)
        for a in (-0.02, -0.95, 0.92):
            face(False, _box(a, y(0.04), a + 0.03, y(0.96)), paint, 0.5)
    if name == ("load" if body.back == "load" else "lower"):
        accent, size = COLOURS[attrs["accent"]], max(0.2, 0.2 * (slab.y1 - slab.y0))
        spot = (attrs["spot"][0] * body.length, y(attrs["spot"][1]))
        if "stripe" in marks:
            side(_slice(slab.ring, 1, y(0.42), y(0.58)), accent)
            for front in (True, False):
                face(front, _box(0.2, y(0.3), 0.36, slab.y1), accent)
        if "sticker" in marks:
            side(_circle(*spot, size, attrs["corners"]), accent)
            face(False, _circle(-0.5, y(0.85), size / 2, attrs["corners"]), accent)
        if "dent" in marks and attrs["dent_side"] in near:
            side(_circle(*spot, 0.16, 12) * (1, 0.7) + (0, spot[1] * 0.3), paint, 0.5)
            side(_circle(spot[0] - 0.05, spot[1] + 0.03, 0.07, 10), paint, 0.8)


def _nose(p: _Painter, slab: _Slab, attrs: dict, draw):
    """Bumper, grille and headlamps: the face of the make."""
    kind, y = attrs["grille"], slab.y0 + 0.52 * min(slab.y1 - slab.y0, 0.75)
    draw(_box(-0.97, slab.y0, 0.97, y - 0.24), DARK)
    size = np.array({"oval": (0.34, 0.13), "slot": (0.5, 0.06), "shield": (0.24, 0.2)}.get(kind, (0.42, 0.12)))
    shape = {
        "oval": _circle(0, 0, 1, 16),
        "shield": np.array([(-1, 1), (1, 1), (0.6, -0.7), (0, -1), (-0.6, -0.7)]),
    }.get(kind, _box(-1, -1, 1, 1))
    draw(shape * (size + (0.04, 0.025)) + (0, y), CHROME)
    draw(shape * size + (0, y), DARK)
    bars = {
        "bars": [_box(-1, t, 1, t + 0.25) for t in (-0.5, 0.2)],
        "mesh": [_box(t, -1, t + 0.05, 1) for t in np.linspace(-0.8, 0.8, 7)],
        "split": [_box(-0.15, -1, 0.15, 1)],
    }.get(kind, ())
    for bar in bars:
        draw(bar * size + (0, y), attrs["rgb"] if kind == "split" else CHROME)
    lamp = {
        "round": _circle(0, 0, 1, 14) * (0.15, 0.13),
        "box": _box(-0.2, -0.11, 0.2, 0.11),
        "slit": _box(-0.2, -0.05, 0.2, 0.06),
        "wedge": np.array([(-0.2, -0.06), (0.2, -0.1), (0.2, 0.16), (-0.2, 0)]),
    }[attrs["lamp"]]
    for sign in (-1, 1):
        shape = lamp * (sign, 1)
        draw(shape * 1.2 + (sign * 0.75, y + 0.04), DARK)
        p.lamp(slab.face(shape + (sign * 0.75, y + 0.04), True), (226, 234, 240), (255, 250, 222))


class _Scene:
    """What the ids of a picture say: where its vehicle stands, and through which lens it is seen. `rng` goes
    on with what comes after."""

    def __init__(self, seed: int, pid: int, camid: int, viewid: int, shot: int, size):
        if not 0 <= camid < len(CAMERAS) or not 0 <= viewid < len(VIEWS):
            raise ValueError(
                f"camid must be 0..{len(CAMERAS) - 1} and viewid 0..{len(VIEWS) - 1}, "
                f"got camid {camid} and viewid {viewid}"
            )
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if min(self.size) < 16:
            raise ValueError(f"a picture needs at least 16 x 16 pixels, got {self.size[0]} x {self.size[1]}")
        self.seed, self.camid, self.camera = seed, camid, CAMERAS[camid]
        self.rng = demo_rng(seed, "shot", pid, camid, viewid, shot)
        self.over = 3 if max(self.size) <= 128 else 2
        degrees = (270, 90, 0, 180, 42, 138)[viewid] * (self.rng.choice((-1, 1)) if viewid > 3 else 1)
        self.theta = math.radians(degrees + self.rng.uniform(-1, 1) * (6 if viewid < 4 else 14))

    def look_at(self, length: float, width: float, tall: float) -> None:
        """Choose the lens so that a box of this size in metres fills the picture."""
        above = max(self.camera.height, 0.9 * tall) * self.rng.uniform(0.95, 1.15)
        self.lens = _Lens(self.theta, 2.4 * length + 3, above, roll=self.rng.uniform(-0.02, 0.02))
        box = itertools.product((-length / 2, length / 2), (0, tall), (-width / 2, width / 2))
        self.frame = np.array(self.size) * self.over
        self.lens.fit(
            np.array(list(box)),
            self.frame * (0.5 + self.rng.uniform(-0.04, 0.04), 0.55 + self.rng.uniform(-0.03, 0.04)),
            self.frame * self.rng.uniform(0.76, 0.88) * (1, 0.92),
        )

    def place(self, length: float) -> _Painter:
        """A painter of the place where the camera hangs."""
        p = _Painter(Image.new("RGB", tuple(self.frame.tolist())), self.lens, self.camera)
        _backdrop(p, demo_rng(self.seed, "place", self.camid), self.rng.uniform(-6, 6))
        _lines(p, length)
        return p

    def parts(self) -> _PartPainter:
        """A painter of the mask."""
        empty = Image.new("L", tuple(self.frame.tolist()), BACKGROUND_ID)
        return _PartPainter(empty, self.lens, self.camera)

    def mask(self, p: _PartPainter) -> np.ndarray:
        """[H, W] uint8: of the ids inside each pixel the one that covers most of it."""
        (width, height), over = self.size, self.over
        fine = np.asarray(p.image).reshape(height, over, width, over)
        ids = np.unique(fine)
        shares = np.stack([(fine == i).sum(axis=(1, 3)) for i in ids])
        return ids[shares.argmax(axis=0)].astype(np.uint8)


def _car_scene(seed: int, pid: int, camid: int, viewid: int, shot: int, size) -> tuple[_Scene, dict, dict]:
    """The scene, attributes and slabs of vehicle `pid`."""
    attrs = vehicle(seed, pid)
    scene, slabs = _Scene(seed, pid, camid, viewid, shot, size), _slabs(attrs["body"])
    body = BODIES[attrs["body"]]
    scene.look_at(body.length, body.width, max(slab.y1 for slab in slabs.values()))
    return scene, attrs, slabs


def _car(p: _Painter, attrs: dict, slabs: dict[str, _Slab], phase: float, mirrors: bool):
    """A vehicle, back to front; phase: of its wheels."""
    body, tall = BODIES[attrs["body"]], max(slab.y1 for slab in slabs.values())
    _wheels(p, body, attrs["rim"], phase, discs=False)
    if mirrors:
        _mirrors(p, body, DARK, before=True)
    names = list(slabs)
    if body.back == "load" and p.lens.cos > 0:  # the cab stands before its load
        names = ["frame", "load", "lower", "cabin"]
    roof = COLOURS[attrs["roof"]] if "two_tone" in attrs["marks"] else attrs["rgb"]
    for name in names:
        colour = {"frame": (44, 45, 48), "cabin": roof if tall < 2 else attrs["rgb"]}.get(name, attrs["rgb"])
        if name == "load":  # a shade lighter than the cab, so that the two come apart
            colour = tuple(c * 0.85 + 36 for c in attrs["rgb"])
        _solid(p, slabs[name], colour, roof if name == "cabin" else colour)
        _details(p, name, slabs[name], attrs)
        if name == ("frame" if body.back == "load" else "lower"):
            _wheels(p, body, attrs["rim"], phase, discs=True)
    if mirrors:
        _mirrors(p, body, DARK, before=False)


def _picture(scene: _Scene, attrs: dict, slabs: dict[str, _Slab], mirrors: bool) -> tuple[Image.Image, float]:
    """The picture of a vehicle, and the phase of its wheels."""
    body = BODIES[attrs["body"]]
    p = scene.place(body.length)
    _shadow(p, body)
    phase = scene.rng.uniform(0, 2 * math.pi)
    _car(p, attrs, slabs, phase, mirrors)
    return _record(p, scene.rng, scene.size, scene.over), phase


def render(seed: int, pid: int, camid: int, viewid: int, shot: int, size: int | tuple[int, int] = 96) -> Image.Image:
    """One RGB picture of vehicle `pid`; `size` is the side or (width, height) in pixels.

    `shot` numbers the pictures of equal (pid, camid, viewid): each has its own scale, position,
    tilt, wheel angle and noise. Raises ValueError for an unknown camid or viewid, a negative pid
    and a side under 16 pixels.
    """
    return _picture(*_car_scene(seed, pid, camid, viewid, shot, size), mirrors=False)[0]


def render_parts(
    seed: int, pid: int, camid: int, viewid: int, shot: int, size: int | tuple[int, int] = 96
) -> tuple[Image.Image, np.ndarray]:
    """As `render`, with side mirrors, and the mask of its parts: [H, W] uint8 in PartImageNet's ids."""
    scene, attrs, slabs = _car_scene(seed, pid, camid, viewid, shot, size)
    picture, phase = _picture(scene, attrs, slabs, mirrors=True)
    p = scene.parts()
    _car(p, attrs, slabs, phase, mirrors=True)
    return picture, scene.mask(p)


def render_place(seed: int, camid: int, shot: int, size: int | tuple[int, int] = 96) -> Image.Image:
    """One RGB picture of where a camera hangs, without a vehicle; `size` as for `render`.

    Raises ValueError for an unknown camid.
    """
    if not 0 <= camid < len(CAMERAS):
        raise ValueError(f"camid must be 0..{len(CAMERAS) - 1}, got {camid}")
    width, height = (size, size) if isinstance(size, int) else size
    camera, rng = CAMERAS[camid], demo_rng(seed, "place shot", camid, shot)
    over = 3 if max(width, height) <= 128 else 2
    lens = _Lens(rng.uniform(0, 2 * math.pi), 14.0, camera.height, roll=rng.uniform(-0.02, 0.02))
    lens.focal = width * over * rng.uniform(1.1, 2.0)
    lens.cx, lens.cy = width * over * rng.uniform(0.3, 0.7), height * over * rng.uniform(0.35, 0.6)
    p = _Painter(Image.new("RGB", (width * over, height * over)), lens, camera)
    _backdrop(p, demo_rng(seed, "place", camid), rng.uniform(-6, 6))
    _lines(p, 4.5)
    return _record(p, rng, (width, height), over)


def _record(p: _Painter, rng: np.random.Generator, size: tuple, over: int) -> Image.Image:
    """What the camera makes of the scene: scaling down, glow, blur, vignette and noise."""
    image = p.image.reduce(over)
    if p.glows:
        glow = Image.new("RGB", image.size)
        for at, radius, colour in p.glows:
            (x, y), r = at / over, radius / over
            ImageDraw.Draw(glow).ellipse((x - r, y - r, x + r, y + r), fill=colour)
        image = ImageChops.screen(image, glow.filter(ImageFilter.GaussianBlur(size[0] / 24)))
    if p.camera.blur:
        image = image.filter(ImageFilter.GaussianBlur(p.camera.blur * size[0] / 96))
    y, x = np.ogrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
    exposure = (1.03 - 0.1 * (x * x + y * y)) * rng.uniform(0.93, 1.07)
    noise = rng.normal(0, p.camera.noise, (size[1], size[0], 1))
    pixels = np.asarray(image) * exposure[..., None] + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sheet(seed: int = 0, size: int = 96) -> Image.Image:
    """A contact sheet: a column for every camera, a row for every view, a vehicle in each cell."""
    page = Image.new("RGB", (len(CAMERAS) * size, len(VIEWS) * size))
    for row, camid in itertools.product(range(len(VIEWS)), range(len(CAMERAS))):
        picture = render(seed, row * len(CAMERAS) + camid, camid, row, 0, size)
        page.paste(picture, (camid * size, row * size))
    return page
