"""A place seen by a camera, on which shapes are painted by their places in metres, back to front, with Pillow at two to
three times the final size: x forward from the middle of the vehicle, y up from the ground, z to the vehicle's right."""

import hashlib
import math
from collections import namedtuple
from itertools import product

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

VIEWS = ("left side", "right side", "front", "rear", "front three-quarter", "rear three-quarter")
ANGLES = (270, 90, 0, 180, 42, 138)  # of the views, in degrees from the nose
# sky: RGB at the top and at the horizon, as recorded; ground: RGB in white light; light: factor per channel on what
# does not glow; sun: direction to the light (right, up, towards the camera); shadow: darkness, 0..1; height: in metres;
# noise: standard deviation in grey levels; blur: radius in px of a picture 96 wide
Camera = namedtuple("Camera", "backdrop lines sky ground light sun shadow height lamps noise blur quality")
# fmt: off
CAMERAS = (
    Camera("hills", "lanes", ((84, 146, 220), (208, 226, 242)), (112, 114, 118),
           (1.06, 1.04, 1.0), (-0.5, 0.75, 0.45), 0.7, 2.3, False, 2.5, 0, 92),
    Camera("houses", "kerb", ((128, 178, 226), (232, 232, 222)), (128, 122, 116),
           (1.1, 1.02, 0.9), (0.65, 0.6, 0.5), 0.7, 1.8, False, 3, 0.2, 90),
    Camera("fence", "bays", ((168, 174, 180), (206, 209, 211)), (98, 101, 105),
           (0.86, 0.9, 0.95), (0, 1, 0.25), 0.5, 3.2, False, 5, 0.45, 80),
    Camera("trees", "track", ((120, 180, 232), (220, 236, 240)), (92, 140, 58),
           (1.05, 1.05, 0.94), (-0.7, 0.6, 0.3), 0.65, 1.9, False, 2.5, 0, 92),
    Camera("showroom", "tiles", ((232, 233, 236), (246, 246, 248)), (186, 188, 196),
           (1.06, 1.06, 1.08), (0.1, 0.95, 0.5), 0.5, 1.5, False, 1, 0, 95),
    Camera("dusk", "zebra", ((70, 62, 116), (250, 158, 92)), (112, 100, 106),
           (0.96, 0.78, 0.76), (0.8, 0.35, -0.1), 0.45, 2.0, True, 5, 0.3, 84),
    Camera("night", "lanes", ((8, 10, 24), (26, 30, 52)), (72, 74, 80),
           (0.56, 0.6, 0.78), (-0.3, 0.9, 0.4), 0.6, 2.6, True, 8, 0.4, 76),
    Camera("garage", "bays", ((70, 62, 44), (108, 96, 66)), (124, 122, 116),
           (0.88, 0.78, 0.56), (0.2, 0.95, 0.35), 0.65, 2.1, True, 6, 0.3, 82),
)
BEHIND = {  # bands along the whole view 10 m behind the vehicle: lower and upper edge in metres, colour
    "fence": [(0, 3.4, (150, 153, 156))], "trees": [(0, 0.8, (58, 104, 40))],
    "showroom": [(0, 0.15, (120, 122, 128)), (3.3, 3.45, (196, 198, 204))],
    "garage": [(0, 3.2, (168, 162, 150)), (0, 0.9, (70, 96, 120)), (0.9, 1, (220, 190, 60))],
}
# fmt: on
LEAVES = ((0, 0.5, 2.0), (-1.1, 0.36, 1.4), (1.1, 0.38, 1.5), (0.3, 0.66, 1.3))  # x, height and radius in a tree


def demo_rng(*ids: int | str) -> np.random.Generator:
    """A random stream of its own for these ids."""
    digest = hashlib.blake2b("/".join(map(str, ids)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def box(x0, y0, x1, y1) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float)


def circle(x: float, y: float, r: float, n: int = 18) -> np.ndarray:
    angle = np.arange(n) * 2 * np.pi / n
    return np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], axis=1)


def clip(points: np.ndarray, axis: int, low: float, high: float) -> np.ndarray:
    """The part of a convex polygon with low <= coordinate <= high along an axis."""
    for bound, sign in ((low, 1), (high, -1)):
        out = []
        for a, b in zip([*points[-1:], *points[:-1]], points):
            da, db = sign * (a[axis] - bound), sign * (b[axis] - bound)
            if (da < 0) != (db < 0):
                out.append(a + (b - a) * da / (da - db))
            if db >= 0:
                out.append(b)
        points = np.array(out).reshape(-1, points.shape[1])
    return points


class Scene:
    """What a pinhole camera sees: a place, empty yet, and room for a vehicle of `extent` (length, height, width in m).

    The lens is shifted, not tipped, so verticals stay vertical; `cx`, `cy` are the pixel of the horizon straight ahead.
    `rng` serves the whole picture. After `start_mask` each shape is drawn into a mask as well, in the id `part`.
    """

    def __init__(self, seed: int, pid: int, camid: int, viewid: int, shot: int, size, extent: tuple):
        self.camera, self.rng = CAMERAS[camid], demo_rng(seed, "shot", pid, camid, viewid, shot)
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.over = 3 if max(self.size) <= 128 else 2
        self.image = Image.new("RGB", (self.size[0] * self.over, self.size[1] * self.over))
        self.draw, self.glows, self.mask = ImageDraw.Draw(self.image), [], None
        rng, (length, tall, width), frame = self.rng, extent, np.array(self.image.size)
        degrees = ANGLES[viewid] * (rng.choice((-1, 1)) if viewid > 3 else 1)
        theta = math.radians(degrees + rng.uniform(-1, 1) * (6 if viewid < 4 else 14))
        self.cos, self.sin, self.distance = math.cos(theta), math.sin(theta), 2.4 * length + 3
        self.height = max(self.camera.height, 0.9 * tall) * rng.uniform(0.95, 1.15)
        self.roll, self.focal, self.cx, self.cy = rng.uniform(-0.02, 0.02), 1.0, 0.0, 0.0
        # focal length and shift so that the vehicle fills the picture
        corners = product((-length / 2, length / 2), (0, tall), (-width / 2, width / 2))
        flat = self.flat(np.array(list(corners)))
        low, high = flat.min(0), flat.max(0)
        centre = frame * (0.5 + rng.uniform(-0.04, 0.04), 0.55 + rng.uniform(-0.03, 0.04))
        self.focal = float(min(frame * rng.uniform(0.76, 0.88) * (1, 0.92) / (high - low)))
        self.cx, self.cy = (centre - self.focal * (low + high) / 2).tolist()
        _paint_place(self, demo_rng(seed, "place", camid), length)

    def depth(self, points: np.ndarray) -> np.ndarray:
        return self.distance - points[:, 0] * self.cos - points[:, 2] * self.sin

    def flat(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) metres to (N, 2) pixels."""
        scale = self.focal / self.depth(points)
        x = (points[:, 0] * self.sin - points[:, 2] * self.cos) * scale
        y = (self.height - points[:, 1]) * scale
        return np.stack([self.cx + x + self.roll * y, self.cy + y - self.roll * x], axis=1)

    def shows(self, quad: np.ndarray) -> bool:
        """Whether the outer side of a quadrilateral, (4, 3) metres, is seen: by the sign of its area in pixels."""
        flat = self.flat(quad)
        return bool(np.linalg.det(flat[2:] - flat[:2]) > 0)

    def lit(self, colour, k: float = 1.0) -> tuple:
        return tuple(int(min(255, c * k * t)) for c, t in zip(colour, self.camera.light))

    def poly(self, points: np.ndarray, colour, k: float = 1.0, glows: bool = False) -> None:
        """A polygon of (N, 3) metres, k: its brightness; one that glows needs no light."""
        if len(points) > 2:
            self._paint("polygon", points, colour if glows else self.lit(colour, k))

    def line(self, points, thickness: float, colour) -> None:
        """A line along (N, 3) metres, `thickness` metres and at least two pixels wide."""
        width = max(2, round(thickness * self.focal / self.distance))
        self._paint("line", np.array(points, dtype=float), self.lit(colour), width=width, joint="curve")

    def _paint(self, shape: str, points: np.ndarray, colour: tuple, **how) -> None:
        xy = [tuple(q) for q in self.flat(points).tolist()]
        getattr(self.draw, shape)(xy, fill=colour, **how)
        if self.mask:
            getattr(self.parts, shape)(xy, fill=self.part, **how)

    def lamp(self, points: np.ndarray, day: tuple, night: tuple) -> None:
        """A lamp in the colour of day, or glowing where the camera has its lamps lit."""
        self.poly(points, night if self.camera.lamps else day, glows=self.camera.lamps)
        if self.camera.lamps:
            self.glows.append((self.flat(points).mean(0), 0.2 * self.focal / self.distance, night))

    def floor(self, x0: float, z0: float, x1: float, z1: float, colour=(232, 232, 226)) -> None:
        """A rectangle on the ground, without what lies behind the camera."""
        points = np.insert(box(x0, z0, x1, z1), 1, 0, axis=1)
        deep = np.column_stack([points, self.depth(points)])
        self.poly(clip(deep, 3, 0.4, 1e3)[:, :3], colour)

    def sunlight(self, nx: float, ny: float, nz: float) -> float:
        """Brightness of a face with this normal."""
        (sx, sy, sz), cos, sin = self.camera.sun, self.cos, self.sin
        dot = (nx * sin - nz * cos) * sx + ny * sy + (nx * cos + nz * sin) * sz
        return 0.72 + 0.1 * ny + 0.34 * max(0.0, dot)

    def start_mask(self, background: int) -> None:
        self.mask = Image.new("L", self.image.size, background)
        self.parts = ImageDraw.Draw(self.mask)

    def part_ids(self) -> np.ndarray:
        """[H, W] uint8: of the ids inside each pixel the one that covers most of it."""
        (width, height), over = self.size, self.over
        fine = np.asarray(self.mask).reshape(height, over, width, over)
        ids = np.unique(fine)
        return ids[np.stack([(fine == i).sum(axis=(1, 3)) for i in ids]).argmax(axis=0)].astype(np.uint8)

    def record(self) -> Image.Image:
        """What the camera makes of the scene: scaling down, glow, blur, vignette and noise."""
        image, over, (width, height) = self.image.reduce(self.over), self.over, self.size
        if self.glows:
            glow = Image.new("RGB", image.size)
            for at, radius, colour in self.glows:
                (x, y), r = at / over, radius / over
                ImageDraw.Draw(glow).ellipse((x - r, y - r, x + r, y + r), fill=colour)
            image = ImageChops.screen(image, glow.filter(ImageFilter.GaussianBlur(width / 24)))
        image = image.filter(ImageFilter.GaussianBlur(self.camera.blur * width / 96))
        y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        exposure = (1.03 - 0.1 * (x * x + y * y)) * self.rng.uniform(0.93, 1.07)
        noise = self.rng.normal(0, self.camera.noise, (height, width, 1))
        return Image.fromarray((np.asarray(image) * exposure[..., None] + noise).clip(0, 255).astype(np.uint8))


def _paint_place(p: Scene, rng: np.random.Generator, length: float) -> None:
    """Sky, ground, what stands 10 m behind the vehicle, and lines for a vehicle of this length."""
    width, height = p.image.size
    scale, shift = p.focal / (p.distance + 10), p.rng.uniform(-6, 6)
    base, rows = p.cy + scale * p.height, np.arange(height)[:, None]
    up, down = np.clip(rows / max(base, 1), 0, 1), np.clip((rows - base) / (height - base), 0, 1)
    sky = np.array(p.camera.sky[0]) * (1 - up) + np.array(p.camera.sky[1]) * up
    ground = np.array(p.camera.ground) * p.camera.light * (0.84 + 0.2 * down)
    column = np.where(rows < base, sky, ground).clip(0, 255).astype(np.uint8)
    plain = Image.fromarray(column[:, None]).resize((width, height))
    p.image.paste(plain)

    def far(x0, y0, x1, y1, colour, glows=False, shape="rectangle"):
        xy = [width / 2 + (x0 + shift) * scale, base - y1 * scale, width / 2 + (x1 + shift) * scale, base - y0 * scale]
        if xy[2] >= 0 and xy[0] <= width:
            getattr(p.draw, shape)(xy, fill=tuple(colour) if glows else p.lit(colour))

    x = -32.0
    for y0, y1, colour in BEHIND.get(p.camera.backdrop, ()):
        far(-40, y0, 40, y1, colour)
    while x < 32:
        w, h, t = rng.uniform(3.5, 7), rng.uniform(4.5, 11), rng.uniform(0, 1, 3)
        for shape in _stand(p.camera.backdrop, x, w, h, t, rng):
            far(*shape)
        x += w
    below = (0, max(0, round(base)), width, height)
    p.image.paste(plain.crop(below), below)  # over the lower half of the hills
    if p.camera.backdrop == "hills":  # the crash barrier stands in front of them
        far(-40, 0.45, 40, 0.8, (176, 180, 184))
        for post in range(-40, 40, 2):
            far(post, 0, post + 0.12, 0.5, (120, 124, 128))
    _paint_ground(p, length / 2 + 0.5)


def _stand(kind: str, x: float, w: float, h: float, t: np.ndarray, rng: np.random.Generator) -> list[tuple]:
    """One house, tree or pillar, w x h metres at x, as rectangles (x0, y0, x1, y1, colour, whether it glows) and
    ellipses; t: three shares that tell it from its neighbours."""

    def oval(dx, y, rx, ry, colour):
        at = x + w / 2 + dx
        return (at - rx, y - ry, at + rx, y + ry, colour, False, "ellipse")

    if kind == "houses":
        shapes = [(x, 0, x + w, h, (176 + 60 * t[0], 150 + 50 * t[1], 116 + 60 * t[2]))]
        for at in np.arange(x + 0.6, x + w - 1, 1.7):
            shapes.append((at, 0, at + 1, 2.3, (84, 104, 120) if (at - x) % 3 > 1 else (72, 60, 52)))
            shapes += [(at, y, at + 0.9, y + 1.4, (74, 92, 110)) for y in np.arange(3.3, h - 1.4, 2.3)]
        return shapes
    if kind in ("dusk", "night"):
        h, wall = (h * 0.5, (74, 54, 84)) if kind == "dusk" else (h * 0.75, (30, 33, 50))
        windows = product(np.arange(x + 0.5, x + w - 2, 1.2), np.arange(0.8, h - 1, 1.5))
        bright = [(at, y, at + 0.6, y + 0.8, (250, 206, 120), True) for at, y in windows if rng.random() < 0.4]
        return [(x, 0, x + w - 1.2 * t[1], h, wall, True), *bright]
    leaves = ((dx, y, r, 0.55 + 0.5 * y + 0.2 * t[0]) for dx, y, r in LEAVES)  # the upper ones lighter
    return {
        "hills": [oval(0, 0, w / 2 + 7, h / 3, (104 + 20 * t[0], 140 + 20 * t[0], 118))],
        "fence": [(x, 0, x + 0.15, 1.6, (70, 74, 78)), oval(0, 0.7, w / 2 - 0.8, 0.6, (74, 96, 66)),
                  (x + 1, 2, x + w - 1, 2.9, (112, 122, 132))],
        "trees": [(x + w / 2 - 0.2, 0, x + w / 2 + 0.2, h / 2, (86, 62, 40)),
                  *(oval(dx, h * y, r, r, (62 * shade, 122 * shade, 44 * shade)) for dx, y, r, shade in leaves)],
        "showroom": [(x, 0.4, x + w - 0.4, 3.0, (214 + 24 * t[0], 216 + 24 * t[0], 226)),
                     (x + 0.6, 1.2, x + w - 1, 2.4, (60 + 150 * t[0], 110 + 90 * t[1], 60 + 150 * t[2])),
                     (x + w / 2 - 0.5, 3.8, x + w / 2 + 0.5, 3.95, (255, 255, 255), True)],
        "garage": [(x, 0, x + 0.8, 3.2, (128, 124, 116)), (x + 1.6, 2.75, x + w - 1, 2.9, (255, 246, 206), True),
                   (x, 0.5, x + 0.8, 1.3, (228, 186, 40) if t[0] < 0.6 else (188, 60, 44))],
    }[kind]  # fmt: skip


def _paint_ground(p: Scene, end: float) -> None:
    """Lines on the ground, laid along the vehicle, which ends at `end` metres."""
    if p.camera.lines == "track":
        p.floor(-40, -2.9, 40, 2.9, (134, 128, 120))
    joints, colour = np.arange(-12, 12.1, 1.5), {"tiles": (160, 162, 172)}
    for x, z, long, wide in {
        "lanes": [*product([-40], (-5.5, 5.4), [80], [0.12]), *product(range(-39, 40, 6), (-1.9, 1.75), [3], [0.14])],
        "track": product([-40], (-2.7, 2.6), [80], [0.12]),
        "kerb": product([-40], (-3.4, 3.2), [80], [0.12]),
        "bays": [*product([-end], (-4.6, -1.6, 1.5, 4.5), [2 * end], [0.12]), (-end - 0.12, -4.6, 0.12, 9.22)],
        "tiles": [*product([-12], joints, [24], [0.03]), *product(joints, [-12], [0.03], [24])],
        "zebra": product((-end - 3, end + 0.3), np.arange(-5.4, 5.5, 1.2), [2.7], [0.6]),
    }[p.camera.lines]:
        p.floor(x, z, x + long, z + wide, colour.get(p.camera.lines, (232, 232, 226)))
