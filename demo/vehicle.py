"""Who and where in the drawn sets: identities, their attributes and captions, and the cameras."""

import hashlib
import itertools
from collections import namedtuple
from collections.abc import Iterable

import numpy as np

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
# fmt: on
VIEWS = ("left side", "right side", "front", "rear", "front three-quarter", "rear three-quarter")
COLUMNS = ("path", "split", "body", "colour", "make", "pid", "camid", "viewid", "caption")
DARK, GLASS, SHEEN, CHROME = (32, 33, 36), (46, 58, 70), (92, 112, 130), (186, 190, 196)
# Body types, in metres; u runs from the nose (0) to the tail (length), y up. word: in captions; heights: of the sill,
# the nose, the bonnet's rear edge, the waist, the roof; cabin: u of the windscreen's foot and head, the rear window's
# head and foot; pillars: u, with side glass between; wheels: u of the axles, then the radius; roof: half width there as
# a share of the body's; back: what the tail is: a rear window, a bed behind one, doors, or a load box.
Body = namedtuple("Body", "word length width heights cabin pillars wheels roof back")
# Cameras: where each hangs, what it sees behind the vehicle, and how it records it. lines: on the
# ground; sky: RGB at the top and at the horizon, as recorded; ground: RGB in white light; light: factor per channel
# on what does not glow; sun: direction to the light (right, up, towards the camera); shadow: darkness on the ground,
# 0..1; height: in metres; noise: standard deviation in grey levels; blur: radius in px of a picture 96 wide.
Camera = namedtuple("Camera", "backdrop lines sky ground light sun shadow height lamps noise blur quality")
# fmt: off
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
# fmt: on


def demo_rng(*ids: int | str) -> np.random.Generator:
    """A random stream of its own for these ids."""
    digest = hashlib.blake2b("/".join(map(str, ids)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def vehicle(seed: int, pid: int) -> dict:
    """Attributes of identity `pid` (0 or more): body, colour, make, marks and how they are drawn.

    Bodies take turns, and each ten identities of a body wear all ten colours. Two identities of equal body and
    colour differ in their pair of marks, among the first 1500 identities.
    """
    if pid < 0:
        raise ValueError(f"pid must be 0 or more, got {pid}")
    body, (turn, slot) = list(BODIES)[pid % len(BODIES)], divmod(pid // len(BODIES), len(COLOURS))
    colour = list(COLOURS)[demo_rng(seed, "paint", body, turn).permutation(len(COLOURS))[slot]]
    pairs = list(itertools.combinations(MARKS, 2))
    start = int(demo_rng(seed, "marks", body, colour).integers(len(pairs)))
    rng = demo_rng(seed, "vehicle", pid)
    make = list(MAKES)[rng.integers(len(MAKES))]
    accents = [name for name in ("white", "black", "red", "yellow", "blue") if name != colour]
    return {
        "body": body, "colour": colour, "make": make, "marks": pairs[(start + turn) % len(pairs)],
        "rgb": tuple((np.array(COLOURS[colour]) * rng.uniform(0.92, 1.06)).clip(0, 255).tolist()),
        "accent": COLOURS[accents[rng.integers(len(accents))]],
        "roof": COLOURS["black" if colour in ("white", "silver", "yellow", "orange", "grey") else "white"],
        "spot": (float(rng.uniform(0.42, 0.62)), float(rng.uniform(0.48, 0.6))),  # shares of u and y
        "corners": int(rng.integers(3, 7)),
        "dent_side": int(rng.choice((-1, 1))),
    }  # fmt: skip


def looks(seed: int, pids: Iterable[int]) -> list[list[int]]:
    """The identities in groups of equal body and colour, in the order in which these are met."""
    groups: dict[tuple, list[int]] = {}
    for pid in pids:
        attrs = vehicle(seed, pid)
        groups.setdefault((attrs["body"], attrs["colour"]), []).append(pid)
    return list(groups.values())


def label_row(seed: int, pid: int, shot: int) -> dict:
    """`COLUMNS` but path and split, and shot, of the `shot`-th picture of an identity.

    Five cameras and six views take turns: thirty shots until a pair comes back.
    """
    attrs, rng = vehicle(seed, pid), demo_rng(seed, "plan", pid)
    cameras, views = rng.permutation(len(CAMERAS))[:5], rng.permutation(len(VIEWS))
    camid, viewid = int(cameras[shot % 5]), int(views[shot % len(views)])
    view, known = VIEWS[viewid], {key: attrs[key] for key in ("body", "colour", "make")}
    # without the place, so that whoever learns from it must look at the vehicle
    words = f"{'an' if attrs['colour'][0] in 'aeiou' else 'a'} {attrs['colour']} {BODIES[attrs['body']].word}"
    caption = f"{words} in {view} view" if "three" in view else f"{words} seen from the {view}"
    return {**known, "pid": pid, "camid": camid, "viewid": viewid, "shot": shot, "caption": caption}
