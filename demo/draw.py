"""Small pictures of parametric vehicles, so that everything runs without gated data.

A vehicle is two to four solid slabs, each a side outline in metres extruded over the width. Body type, paint, make and
small marks belong to the identity (`pid`); place, light, noise and JPEG quality to the camera (`camid`). A picture
depends on (seed, pid, camid, viewid, shot, size) alone, its bytes also on the versions of Pillow and numpy.
"""

import itertools
import math
from collections import namedtuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.scene import CAMERAS, VIEWS, Scene, box, circle, clip, demo_rng

CAR_BODY, CAR_TYRE, CAR_MIRROR, BACKGROUND = 24, 25, 26, 40  # PartImageNet's ids
DARK, GLASS, SHEEN, CHROME = (32, 33, 36), (46, 58, 70), (92, 112, 130), (186, 190, 196)
# in metres; u runs from the nose (0) to the tail (length). word: in captions; heights: of the sill, the nose, the
# bonnet's rear edge, the waist, the roof; cabin: u of the windscreen's foot and head, the rear window's head and foot;
# pillars: u, with side glass between; wheels: u of the axles, then the radius; roof: its width as a share of the body's
Body = namedtuple("Body", "word length width heights cabin pillars wheels roof back")
# fmt: off
COLOURS = {
    "white": (238, 239, 240), "black": (30, 30, 34), "grey": (108, 112, 117), "silver": (184, 190, 197),
    "red": (200, 22, 30), "blue": (26, 74, 190), "green": (22, 122, 58), "yellow": (244, 204, 28),
    "brown": (104, 64, 38), "orange": (240, 118, 20),
}
MARKS = ("rack", "stripe", "sticker", "dent", "sunroof", "two_tone")
MAKES = {  # fictive make: grille, headlamp, spokes of the rim (0: a plain disc)
    "Velmar": ("bars", "round", 5), "Ostrek": ("mesh", "box", 10), "Tarvo": ("oval", "slit", 4),
    "Quillon": ("split", "wedge", 6), "Zephra": ("slot", "round", 0), "Kestal": ("bars", "wedge", 7),
    "Haldor": ("shield", "box", 3), "Nimbra": ("slot", "slit", 8),
}
BODIES = {name: Body(*row) for name, *row in (
    ("sedan", "sedan", 4.7, 1.82, (0.3, 0.76, 0.97, 0.99, 1.45),
     (1.2, 1.98, 3.15, 4.02), (1.3, 2.6, 3.8), (0.85, 3.72, 0.33), 0.76, "window"),
    ("hatchback", "hatchback", 3.8, 1.72, (0.3, 0.8, 1.0, 1.04, 1.52),
     (0.8, 1.5, 3.15, 3.74), (0.9, 2.25, 3.5), (0.7, 3.15, 0.32), 0.78, "window"),
    ("suv", "SUV", 4.7, 1.95, (0.42, 1.02, 1.16, 1.18, 1.82),
     (1.15, 1.75, 4.3, 4.66), (1.35, 2.4, 3.45, 4.4), (0.9, 3.75, 0.41), 0.82, "window"),
    ("pickup", "pickup", 5.4, 1.95, (0.45, 1.0, 1.12, 1.14, 1.82),
     (1.4, 2.05, 3.2, 3.5), (1.55, 2.5, 3.42), (0.95, 4.35, 0.42), 0.8, "bed"),
    ("van", "van", 5.5, 2.02, (0.36, 0.98, 1.2, 1.22, 2.34),
     (0.68, 1.5, 5.36, 5.48), (0.98, 2.05), (0.95, 4.5, 0.36), 0.86, "doors"),
    ("coupe", "coupe", 4.45, 1.86, (0.25, 0.64, 0.86, 0.9, 1.26),
     (1.45, 2.25, 2.75, 4.2), (1.75, 2.85, 3.5), (0.85, 3.6, 0.34), 0.7, "window"),
    ("wagon", "wagon", 4.85, 1.82, (0.3, 0.76, 0.97, 1.02, 1.46),
     (1.2, 1.95, 4.25, 4.8), (1.35, 2.55, 3.55, 4.6), (0.85, 3.72, 0.33), 0.78, "window"),
    ("truck", "box lorry", 7.4, 2.3, (0.45, 1.4, 1.45, 1.45, 2.5),
     (0.02, 0.3, 1.7, 1.75), (0.3, 1.4), (0.95, 5.7, 0.47), 0.88, "load"),
    ("bus", "bus", 10.5, 2.5, (0.34, 1.25, 1.3, 1.3, 3.05), (0.02, 0.3, 10.3, 10.48),
     (0.35, 1.75, 3.35, 4.95, 6.55, 8.15, 9.6, 10.3), (2.3, 7.7, 0.49), 0.93, "window"),
    ("minivan", "minivan", 4.8, 1.9, (0.32, 0.84, 1.05, 1.1, 1.76),
     (0.62, 1.75, 4.3, 4.74), (0.95, 1.5, 2.75, 3.85, 4.6), (0.85, 3.85, 0.34), 0.8, "window"),
)}
RED, RED_GLOW, WHITE, WHITE_GLOW = (176, 18, 22), (255, 40, 30), (226, 234, 240), (255, 250, 222)
GRILLES = {  # half width and half height in shares of the width and in metres, outline, bars of chrome
    "bars": ((0.42, 0.12), box(-1, -1, 1, 1), [box(-1, t, 1, t + 0.25) for t in (-0.5, 0.2)]),
    "mesh": ((0.42, 0.12), box(-1, -1, 1, 1), [box(t, -1, t + 0.05, 1) for t in np.linspace(-0.8, 0.8, 7)]),
    "split": ((0.42, 0.12), box(-1, -1, 1, 1), [box(-0.15, -1, 0.15, 1)]),
    "oval": ((0.34, 0.13), circle(0, 0, 1, 16), []), "slot": ((0.5, 0.06), box(-1, -1, 1, 1), []),
    "shield": ((0.24, 0.2), np.array([(-1, 1), (1, 1), (0.6, -0.7), (0, -1), (-0.6, -0.7)]), []),
}
LAMPS = {  # outlines around the middle of the right lamp
    "round": circle(0, 0, 1, 14) * (0.15, 0.13), "box": box(-0.2, -0.11, 0.2, 0.11),
    "slit": box(-0.2, -0.05, 0.2, 0.06), "wedge": np.array([(-0.2, -0.06), (0.2, -0.1), (0.2, 0.16), (-0.2, 0)]),
}
# fmt: on
RIGHT, LEFT = 1, -1
SIDES, NOSE, TAIL = (RIGHT, LEFT), ("nose",), ("tail",)  # faces of a slab


def vehicle(seed: int, pid: int) -> dict:
    """Attributes of identity `pid`: body, colour, make, marks and how they are drawn. Bodies take turns, and each ten
    identities of a body wear all ten colours; among the first 1500 those of equal body and colour differ in marks."""
    body, (turn, slot) = list(BODIES)[pid % len(BODIES)], divmod(pid // len(BODIES), len(COLOURS))
    colour = list(COLOURS)[demo_rng(seed, "paint", body, turn).permutation(len(COLOURS))[slot]]
    pairs, rng = list(itertools.combinations(MARKS, 2)), demo_rng(seed, "vehicle", pid)
    start = int(demo_rng(seed, "marks", body, colour).integers(len(pairs)))
    make = list(MAKES)[rng.integers(len(MAKES))]
    accents = [name for name in ("white", "black", "red", "yellow", "blue") if name != colour]
    return {
        "body": body, "colour": colour, "make": make, "marks": pairs[(start + turn) % len(pairs)],
        "rgb": tuple((np.array(COLOURS[colour]) * rng.uniform(0.92, 1.06)).clip(0, 255).tolist()),
        "accent": COLOURS[accents[rng.integers(len(accents))]],
        "roof": COLOURS["black" if colour in ("white", "silver", "yellow", "orange", "grey") else "white"],
        "spot": (float(rng.uniform(0.42, 0.62)), float(rng.uniform(0.48, 0.6))),  # shares of u and y
        "corners": int(rng.integers(3, 7)), "dent_side": int(rng.choice((-1, 1))),
    }  # fmt: skip


def label_row(seed: int, pid: int, shot: int) -> dict:
    """body, colour, make, pid, camid, viewid, shot and caption of the `shot`-th picture of an identity: five cameras
    and six views take turns."""
    attrs, rng = vehicle(seed, pid), demo_rng(seed, "plan", pid)
    cameras, views = rng.permutation(len(CAMERAS))[:5], rng.permutation(len(VIEWS))
    camid, viewid = int(cameras[shot % 5]), int(views[shot % len(views)])
    view, known = VIEWS[viewid], {key: attrs[key] for key in ("body", "colour", "make")}
    # without the place, so that whoever learns from it must look at the vehicle
    words = f"{'an' if attrs['colour'][0] in 'aeiou' else 'a'} {attrs['colour']} {BODIES[attrs['body']].word}"
    caption = f"{words} in {view} view" if "three" in view else f"{words} seen from the {view}"
    return {**known, "pid": pid, "camid": camid, "viewid": viewid, "shot": shot, "caption": caption}


class Slab:
    """A side outline extruded over the width: (u, y) in metres from the bottom up, u from the vehicle's nose to its
    tail. The half width goes from `bottom` to `top` and is drawn in by the share `taper` near both ends."""

    def __init__(self, length: float, nose, tail, bottom: float, top: float, taper: float = 0):
        self.length, self.bottom, self.top, self.taper = length, bottom, top, taper
        self.nose, self.tail = np.array(nose), np.array(tail)
        self.ring = np.concatenate([self.nose, self.tail[::-1]])
        self.y0, self.y1 = self.ring[:, 1].min(), self.ring[:, 1].max()

    def y(self, share: float) -> float:  # 0 at the bottom, 1 at the top
        return self.y0 + (self.y1 - self.y0) * share

    def on(self, face, points) -> np.ndarray:
        """[N, 3] metres of (u, y) on a side, or of (a, y) on nose or tail, a in -1..1 across the width there."""
        a, y = np.asarray(points, dtype=float).T
        u = a if face in SIDES else np.interp(y, *getattr(self, face).T[::-1])
        end = 1 - np.clip(np.minimum(u, self.length - u) / 0.45, 0, 1)
        half = np.interp(y, (self.y0, self.y1), (self.bottom, self.top)) * (1 - self.taper * end**2)
        return np.stack([self.length / 2 - u, y, (face if face in SIDES else a) * half], axis=1)

    def paint(self, faces: tuple, points, colour, k: float = 1.0) -> None:
        """A polygon in a colour of brightness k on those of the faces that are seen."""
        for face in faces:
            if face in self.seen:
                self.p.poly(self.on(face, points), colour, k)

    def solid(self, p: Scene, colour, lid) -> None:
        """The bare surfaces: the strips across the width first, flat ones in the colour `lid`, then the near side."""
        self.p, middle = p, box(-1, self.y(0.1), 1, self.y(0.9))
        self.seen = {side for side in SIDES if side * p.sin * p.distance > self.bottom}
        self.seen |= {face for face in NOSE + TAIL if p.shows(self.on(face, middle)) == (face == "nose")}
        for a, b in zip(self.ring, np.roll(self.ring, -1, 0)):
            quad = np.concatenate([self.on(RIGHT, [a, b]), self.on(LEFT, [b, a])])
            if p.shows(quad):
                nx, ny = (b[1] - a[1], b[0] - a[0]) / np.hypot(*(b - a))
                p.poly(quad, lid if ny > 0.8 else colour, p.sunlight(nx, ny, 0))
        for low, high in itertools.pairwise(np.linspace(0, 1, 10)):
            # the sky lies on the shoulder, the ground darkens the sill
            gloss = 0.74 + 0.24 * low + 0.2 * math.exp(-(((low - 0.75) / 0.1) ** 2))
            band = clip(self.ring, 1, self.y(low), self.y(high) + 0.01)
            for side in SIDES:
                self.paint((side,), band, colour, p.sunlight(0, 0.1, side) * gloss)


def slabs(body: Body) -> dict[str, Slab]:
    """The slabs of a body type, in the order in which they are painted seen from behind."""
    half, (u0, u1, u2, u3) = body.width / 2, body.cabin
    sill, nose, bonnet, waist, roof = body.heights
    size, end, is_boxy = body.length, u3 if body.back == "load" else body.length, roof > 2.4
    front = [(0.45, sill), (0.06, sill), (0, (sill + nose) / 2), (0.08, nose), (u0 + 0.15, bonnet)]
    back = [(end - 0.45, sill), (end - 0.06, sill + 0.02), (end, (sill + waist) / 2), (end - 0.06, waist - 0.02)]
    lower = Slab(size, front, [*back, (end - 0.45, waist)], half * 0.95, half, 0.05 if is_boxy else 0.16)
    front, back = [(u0, bonnet - 0.02), (u1, roof - 0.03)], [(u3, waist - 0.02), (u2, roof)]
    cabin = Slab(size, front, back, half * 0.97, half * body.roof, 0.05 if is_boxy else 0.1)
    if body.back != "load":
        return {"lower": lower, "cabin": cabin}
    frame = Slab(size, [(0.3, 0.5), (0.3, 0.98)], [(size, 0.5), (size, 0.98)], half * 0.8, half * 0.8)
    load = [(u3 + 0.2, 0.98), (u3 + 0.2, roof + 0.8)], [(size, 0.98), (size, roof + 0.8)]
    return {"frame": frame, "lower": lower, "cabin": cabin, "load": Slab(size, *load, half, half)}


def _shadow(p: Scene, body: Body) -> None:
    """Darken the ground under the vehicle and, away from the light, beside it."""
    mask, (sx, _, sz) = Image.new("L", (p.image.width // 3, p.image.height // 3)), p.camera.sun
    away = np.array((sx * p.sin + sz * p.cos, sz * p.sin - sx * p.cos)) * -0.9
    for share, reach in ((0.6, 1), (1.0, 0)):
        ground = np.insert(box(-1, -1, 1, 1) * (body.length / 2, body.width / 2) + away * reach, 1, 0, axis=1)
        xy = [tuple(q) for q in (p.flat(ground) / 3).tolist()]
        ImageDraw.Draw(mask).polygon(xy, fill=int(255 * share * p.camera.shadow))
    mask = mask.filter(ImageFilter.GaussianBlur(p.image.width / 110)).resize(p.image.size)
    p.image.paste((10, 10, 16), mask=mask)


def _treads(p: Scene, body: Body) -> None:
    p.part, r = CAR_TYRE, body.wheels[-1]
    for side, axle in itertools.product((LEFT, RIGHT), body.wheels[:-1]):
        ring = circle(body.length / 2 - axle, r, r, 12)
        outer, inner = (np.insert(ring, 2, side * (body.width / 2 - z), axis=1) for z in (0.04, 0.28))
        for k in range(12):
            p.poly(np.stack([outer[k - 1], outer[k], inner[k], inner[k - 1]]), (22, 22, 24))


def _wheels(p: Scene, body: Body, spokes: int, phase: float) -> None:
    """The outer sides of the wheels on the near side; phase: how far they have turned."""
    r, half = body.wheels[-1], body.width / 2
    near = [side for side in SIDES if side * p.sin * p.distance > half]
    for side, axle in itertools.product(near, body.wheels[:-1]):
        x, rim = body.length / 2 - axle, (64, 66, 70) if spokes else (150, 154, 160)
        shapes = [(clip(circle(x, r, r * 1.16, 24), 1, body.heights[0], 9), (16, 16, 18))]  # the wheel arch
        shapes += [(circle(x, r, r), (26, 26, 28)), (circle(x, r, r * 0.68), CHROME), (circle(x, r, r * 0.6), rim)]
        for angle in phase + 2 * np.pi * np.arange(spokes) / max(spokes, 1):
            out, across = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))]) * r
            across, tip = across * 0.42 / max(spokes, 3), (x, r) + out * 0.62
            shapes.append(([(x, r) - across, (x, r) + across, tip + across, tip - across], CHROME))
        for number, (points, colour) in enumerate(shapes):
            p.part = CAR_TYRE if number else CAR_BODY
            p.poly(np.insert(points, 2, side * (half + 0.01), axis=1), colour)


def _mirrors(p: Scene, body: Body, behind: bool) -> None:
    """In pictures with a mask, side mirrors beside the windscreen's foot: those `behind` the body or before it."""
    x, y, half = body.length / 2 - body.cabin[0] - 0.45, body.heights[3] + 0.04, body.width / 2
    high, p.part = 0.2 if body.heights[4] < 2 else 0.42, CAR_MIRROR
    for side in (LEFT, RIGHT):
        is_near = side * p.sin * p.distance > half
        if not p.mask or behind == (is_near or (p.cos > 0 and abs(p.sin) < 0.5)):
            continue
        inner, outer = side * (half - 0.03), side * (half + 0.26)
        faces = ((inner, x - 0.1, x - 0.1, 0.7), (inner, x + 0.1, x + 0.1, 0.9), (outer, x - 0.1, x + 0.1, 0.55))
        for z0, x0, x1, k in faces:
            p.poly(np.array([(x0, y, z0), (x1, y, outer), (x1, y + high, outer), (x0, y + high, z0)]), DARK, k)


def _cabin(s: Slab, body: Body, attrs: dict) -> None:
    """Windows, and what lies on the roof."""
    y, centre = s.y, s.ring.mean(0)
    pane = (s.ring - centre) * (0.97, 0.72) + centre + (0, 0.02)
    pane = clip(pane, 1, y(0.4 if s.y1 - s.y0 > 1 and body.back == "doors" else 0.06), 9)
    for a, b in itertools.pairwise(body.pillars):
        window = clip(pane, 0, a + 0.03, b - 0.03)
        s.paint(SIDES, window, GLASS)
        s.paint(SIDES, clip(window, 1, window[:, 1].mean() + 0.1, 9), SHEEN)
    ends = NOSE + TAIL if body.back in ("window", "bed") else NOSE
    s.paint(ends, box(-0.9, y(0.06), 0.9, y(0.88)), GLASS)
    s.paint(ends, [(-0.5, y(0.88)), (-0.1, y(0.88)), (-0.5, y(0.5)), (-0.88, y(0.5))], SHEEN)
    for a in (-0.82, 0.08) if body.back == "doors" else ():
        s.paint(TAIL, box(a, y(0.35), a + 0.74, y(0.88)), GLASS)
    x0, x1, z = body.length / 2 - s.nose[1, 0] - 0.1, body.length / 2 - s.tail[1, 0] + 0.1, s.top * 0.75
    if "sunroof" in attrs["marks"]:
        s.p.poly(np.insert(box(x0, z, x0 * 0.6 + x1 * 0.4, -z), 1, s.y1, axis=1), GLASS)
    for at in (-z, z) if "rack" in attrs["marks"] else ():
        s.p.line([(x0, s.y1 + 0.1, at), (x1, s.y1 + 0.1, at)], 0.09, (52, 54, 58))


def _front(s: Slab, body: Body, attrs: dict) -> None:
    """Sill and doors; bumper, grille and headlamps: the face of the make."""
    y, (grille, lamp, _) = s.y, MAKES[attrs["make"]]
    s.paint(SIDES, clip(s.ring, 1, 0, y(0.13)), DARK)
    for u in body.pillars[:3]:
        s.paint(SIDES, box(u + 0.1, y(0.12), u + 0.13, y(0.97)), attrs["rgb"], 0.45)
        s.paint(SIDES, box(u + 0.18, y(0.76), u + 0.36, y(0.81)), DARK)
    s.paint(SIDES, box(0.06, y(0.55), 0.3, y(0.72)), (214, 222, 228))
    (wide, high), shape, bars = GRILLES[grille]
    size, at = np.array((wide, high)), (0, s.y0 + 0.52 * min(s.y1 - s.y0, 0.75))
    s.paint(NOSE, box(-0.97, s.y0, 0.97, at[1] - 0.24), DARK)
    s.paint(NOSE, shape * (size + (0.04, 0.025)) + at, CHROME)
    s.paint(NOSE, shape * size + at, DARK)
    for bar in bars:
        s.paint(NOSE, bar * size + at, attrs["rgb"] if grille == "split" else CHROME)
    for side in (LEFT, RIGHT) if "nose" in s.seen else ():
        shape, at_lamp = LAMPS[lamp] * (side, 1), (side * 0.75, at[1] + 0.04)
        s.paint(NOSE, shape * 1.2 + at_lamp, DARK)
        s.p.lamp(s.on("nose", shape + at_lamp), WHITE, WHITE_GLOW)
    _plate(s, NOSE, y(0) + 0.1)
    if body.back == "bed":
        bed = box(body.length / 2 - body.cabin[3] - 0.12, -0.85, 0.12 - body.length / 2, 0.85)
        s.p.poly(np.insert(bed, 1, s.y1, axis=1), (40, 41, 44))


def _plate(s: Slab, face: tuple, middle: float) -> None:
    a = 0.26 / s.bottom
    s.paint(face, box(-a, middle - 0.06, a, middle + 0.06), (236, 236, 226))
    for at in (-0.8, -0.5, -0.1, 0.2, 0.5):  # nothing to read
        s.paint(face, box(a * at, middle - 0.035, a * (at + 0.2), middle + 0.035), (50, 52, 60))


def _rear(s: Slab, body: Body, attrs: dict) -> None:
    """Bumper, lamps and plate."""
    y, high = s.y, 0.12 if MAKES[attrs["make"]][1] in ("slit", "box") else 0.24
    if body.back != "load":
        s.paint(SIDES, box(body.length - 0.26, y(0.55), body.length - 0.05, y(0.78)), RED)
    s.paint(TAIL, box(-0.96, y(0), 0.96, y(0.2)), DARK)
    for a in (-0.8, 0.8) if "tail" in s.seen else ():
        s.p.lamp(s.on("tail", box(a - 0.15, y(0.62 - high), a + 0.15, y(0.62 + high))), RED, RED_GLOW)
    _plate(s, TAIL, y(0.36))


def _marks(s: Slab, body: Body, attrs: dict) -> None:
    """Ribs of a load box; stripe, sticker and dent."""
    y, accent, size = s.y, attrs["accent"], max(0.2, 0.2 * (s.y1 - s.y0))
    if body.back == "load":
        for u in np.arange(s.nose[0, 0] + 0.9, body.length - 0.3, 0.9):
            s.paint(SIDES, box(u, y(0.04), u + 0.03, y(0.96)), attrs["rgb"], 0.7)
        for a in (-0.02, -0.95, 0.92):
            s.paint(TAIL, box(a, y(0.04), a + 0.03, y(0.96)), attrs["rgb"], 0.5)
    spot = (attrs["spot"][0] * body.length, y(attrs["spot"][1]))
    if "stripe" in attrs["marks"]:
        s.paint(SIDES, clip(s.ring, 1, y(0.42), y(0.58)), accent)
        s.paint(NOSE + TAIL, box(0.2, y(0.3), 0.36, s.y1), accent)
    if "sticker" in attrs["marks"]:
        s.paint(SIDES, circle(*spot, size, attrs["corners"]), accent)
        s.paint(TAIL, circle(-0.5, y(0.85), size / 2, attrs["corners"]), accent)
    if "dent" in attrs["marks"]:
        side = (attrs["dent_side"],)
        s.paint(side, circle(*spot, 0.16, 12) * (1, 0.7) + (0, spot[1] * 0.3), attrs["rgb"], 0.5)
        s.paint(side, circle(spot[0] - 0.05, spot[1] + 0.03, 0.07, 10), attrs["rgb"], 0.8)


def draw_vehicle(seed: int, pid: int, camid: int, viewid: int, shot: int, size=96, with_mask: bool = False) -> Scene:
    """The scene of a picture with vehicle `pid` in it; with a mask of PartImageNet's ids it has side mirrors.

    size: side or (width, height) in pixels. shot: number among pictures of equal (pid, camid, viewid), each with its
    own scale, position, tilt, wheel angle and noise.
    """
    attrs = vehicle(seed, pid)
    body, paint, shown = BODIES[attrs["body"]], attrs["rgb"], slabs(BODIES[attrs["body"]])
    tall, has_load = max(slab.y1 for slab in shown.values()), body.back == "load"
    p = Scene(seed, pid, camid, viewid, shot, size, (body.length, tall, body.width))
    _shadow(p, body)
    if with_mask:
        p.start_mask(BACKGROUND)
    phase, roof = p.rng.uniform(0, 2 * math.pi), attrs["roof"] if "two_tone" in attrs["marks"] else paint
    # the load is a shade lighter than the cab, so that the two come apart
    colours = {"frame": (44, 45, 48), "cabin": roof if tall < 2 else paint, "load": tuple(c * 0.85 + 36 for c in paint)}
    lower = [_front] if has_load else [_front, _rear, _marks]
    parts = {"frame": [_rear], "lower": lower, "cabin": [_cabin], "load": [_marks]}
    _treads(p, body)
    _mirrors(p, body, behind=True)
    # seen from the front, the cab stands before its load
    for name in ("frame", "load", "lower", "cabin") if has_load and p.cos > 0 else shown:
        colour, p.part = colours.get(name, paint), CAR_BODY
        shown[name].solid(p, colour, roof if name == "cabin" else colour)
        for part in parts[name]:
            part(shown[name], body, attrs)
        if name == ("frame" if has_load else "lower"):
            _wheels(p, body, MAKES[attrs["make"]][2], phase)
    _mirrors(p, body, behind=False)
    return p


def render(seed: int, pid: int, camid: int, viewid: int, shot: int, size: int | tuple[int, int] = 96) -> Image.Image:
    """One RGB picture, as `draw_vehicle` describes it."""
    return draw_vehicle(seed, pid, camid, viewid, shot, size).record()
