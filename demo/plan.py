"""The plan of the planted pool: which file is what, and of whom."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from demo.draw import label_row
from demo.flaws import HOWS
from demo.others import SUBJECTS, describe_other
from demo.vehicle import BODIES, COLOURS, demo_rng, vehicle

SHARES = {  # of the files in photos/, in per cent
    "clean": 52.5,
    "exact_copy": 5,
    "pixel_copy": 4,
    "near_copy": 10,
    "track": 8,
    "non_vehicle": 8,
    "corrupt": 2,
    "small": 2,
    "aspect": 2,
    "blur": 2,
    "exposure": 2,
    "leak_exact": 1,
    "leak_near": 1.5,
}
GOOD = ("clean", "exact_copy", "pixel_copy", "near_copy", "track")
SHAPES = ((1, 1), (1.25, 1), (1.5, 1), (1, 1.2))
TURNS = 14  # identities of a pair of body and colour; one more is held out for the benchmark
FRAMES = 40  # of a track


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (largest remainder)."""
    exact = total * np.asarray(weights, dtype=float) / np.sum(weights)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def plan(num_images: int, seed: int) -> tuple[list[dict], list[dict]]:
    """The rows of photos/ and of benchmark/, as `demo_flaws.file_bytes` wants them.

    The share of the pair of rank r (from 0) falls as 1 / (r + 1.5): the commonest pair of body and
    colour has 15% of the clean vehicles, the last of the hundred a handful.
    """
    kinds = dict(zip(SHARES, share_out(num_images, list(SHARES.values()))))
    ranked = _ranked(seed)
    tail = 1 / (np.arange(len(ranked)) + 1.5)
    test = _benchmark(max(4, round(0.0375 * num_images)), seed, [pids[TURNS] for pids in ranked])

    rows = []
    for pids, count in zip(ranked, share_out(kinds["clean"], tail)):
        pids = pids[: min(TURNS, math.ceil(count / 3))]
        for k in range(count):
            rows.append(_row("clean", k, label_row(seed, pids[k % len(pids)], k // len(pids))))
    clean = list(rows)
    for number, row in enumerate(clean):
        row["number"] = number
        row["shape"] = SHAPES[demo_rng(seed, "pool shape", number).integers(len(SHAPES))]
        row["ending"] = {7: ".webp", 8: ".bmp", 9: ".png"}.get(number % 10, ".jpg")
    jpegs = [row for row in clean if row["ending"] == ".jpg"]
    for kind in ("small", "aspect", "blur", "exposure", "corrupt"):
        rng = demo_rng(seed, "pool", kind)
        for k in range(kinds[kind]):
            rank = int(rng.choice(len(tail), p=tail / tail.sum()))
            row = _row(kind, k, label_row(seed, ranked[rank][k % TURNS], 1000 + k))
            if kind == "aspect":
                long = float(rng.uniform(4, 6))
                row["shape"] = (long, 1) if row["how"] == "wide" else (1, long)
            rows.append(row)
    for kind, originals in (
        ("exact_copy", clean),
        ("pixel_copy", jpegs),
        ("near_copy", clean),
        ("leak_exact", test[: kinds["leak_exact"]]),
        ("leak_near", test[kinds["leak_exact"] :]),
    ):
        order = demo_rng(seed, "pool", kind).permutation(len(originals))
        for k in range(kinds[kind]):
            source = originals[order[k % len(order)]]
            row = {**source, **_row(kind, k, {}), "shape": source["shape"], "source": source}
            if kind in ("exact_copy", "pixel_copy"):
                row["ending"] = source["ending"] if kind == "exact_copy" else f".{row['how']}"
            rows.append(row)
    for k in range(kinds["non_vehicle"]):
        subject = list(SUBJECTS)[k % len(SUBJECTS)]
        caption, short = describe_other(subject, k)
        rows.append(_row("non_vehicle", k, {"caption": caption, "short_caption": short}, how=subject))
    tracks = max(1, round(kinds["track"] / FRAMES))
    for k in range(kinds["track"]):
        track, frame = k % tracks, k // tracks
        first = clean[demo_rng(seed, "pool track", track).integers(len(clean))]
        row = _row("track", k, label_row(seed, first["pid"], 2000 + track))
        rows.append(row | {"frame": frame, "track": track})
    _name(rows, seed)
    return rows, test


@cache
def _ranked(seed: int) -> list[list[int]]:
    """The identities of each pair of body and colour, commonest pair first."""
    pairs: dict[tuple, list[int]] = {}
    for pid in range((TURNS + 1) * len(BODIES) * len(COLOURS)):
        attrs = vehicle(seed, pid)
        pairs.setdefault((attrs["body"], attrs["colour"]), []).append(pid)
    order = demo_rng(seed, "pool tail").permutation(len(pairs))
    return [list(pairs.values())[k] for k in order]


def _row(kind: str, number: int, labels: dict, how: str = "") -> dict:
    ways = HOWS.get(kind, (how,))
    fixed = {"kind": kind, "number": number, "how": ways[number % len(ways)]}
    return {**labels, **fixed, "shape": (1, 1), "ending": ".jpg"}


def _benchmark(count: int, seed: int, pids: list[int]) -> list[dict]:
    """About four pictures of each of some identities, in random order."""
    rng = demo_rng(seed, "pool benchmark")
    chosen = rng.permutation(pids)[: max(1, count // 4)].tolist()
    rows = []
    for k, place in enumerate(rng.permutation(count).tolist()):
        row = _row("clean", k, label_row(seed, chosen[k % len(chosen)], k // len(chosen)))
        name = f"benchmark/images/{place:05d}.jpg"
        rows.append(row | {"path": name, "split": "test"})
    return rows


def _name(rows: list[dict], seed: int) -> None:
    """Paths, originals by name, and splits; a track is one folder of consecutive frames."""
    places = demo_rng(seed, "pool names").permutation(len(rows)).tolist()
    heads: dict[int, str] = {}
    for row, place in zip(rows, places):
        if row["kind"] == "track":
            path = f"photos/cctv/c{row['camid']:02d}_{row['track']:03d}/{row['frame']:05d}"
        else:
            folder = ("web/", "dealer/", "forum/", "phone/IMG_")[place % 4]
            path = f"photos/{folder}{place:06d}"
        row["path"] = path + row["ending"]
        row["split"] = "train"
        if row["kind"] in GOOD and demo_rng(seed, "pool split", row["pid"]).random() < 0.25:
            row["split"] = "val"
    for row in rows:  # copies of copies do not occur, so that originals have their names by now
        row["of"] = row["source"]["path"] if "source" in row else ""
        if row["kind"] == "track":
            first = heads.setdefault(row["track"], row["path"])
            row["of"] = "" if first == row["path"] else first
