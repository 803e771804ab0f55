"""A drawn pool with every fault of a crawl, and the truth about each file, to try curation on.

    python -m demo.pool --output pool --num_images 4000

writes

    photos/          the pool: vehicles with a long tail over (body, colour), copies, tracks, rubbish
    truth.csv        path, kind, of, body, colour, make, pid, camid, how; `of` is the original
    labels.csv       the columns of the demo set, for good vehicle pictures and their copies
    captions.csv     path, split and captions of the same and of the pictures without a vehicle
    prompts.json     their short captions as prompts for --vehicle_prompts, vehicles and others apart
    benchmark/       the test split of another set, with labels.csv: some of it has leaked into photos/
    pool.json        the settings and the number of files of each kind

Kinds are listed in `SHARES`; names do not tell them apart, but for tracks, each a folder of its own. The vehicles of
benchmark/ have no other pictures, and their leaked copies are in neither labels.csv nor captions.csv: a CLIP trained on
these has not seen them. Every file depends on its row of the plan alone.
"""

import argparse
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from demo.draw import render
from demo.folder import demo_parser, write_set, write_table
from demo.others import SUBJECTS, draw_other
from demo.vehicle import BODIES, CAMERAS, COLOURS, COLUMNS, demo_rng, label_row, vehicle
from util.cli import run_tool
from util.errors import InputError

SHARES = {  # of the files in photos/, in per cent
    "clean": 52.5, "exact_copy": 5, "pixel_copy": 4, "near_copy": 10, "track": 8, "non_vehicle": 8, "corrupt": 2,
    "small": 2, "aspect": 2, "blur": 2, "exposure": 2, "leak_exact": 1, "leak_near": 1.5,
}  # fmt: skip
GOOD = ("clean", "exact_copy", "pixel_copy", "near_copy", "track")
HOWS = {  # the ways of each kind that has several; rows take turns
    "pixel_copy": ("png", "bmp", "webp", "jpg"),
    "near_copy": ("jpeg", "resize", "crop", "light", "logo"),
    "leak_near": ("jpeg", "resize", "crop", "light", "logo"),
    "corrupt": ("truncated", "empty", "text", "html"),
    "aspect": ("wide", "tall"),
    "exposure": ("black", "white"),
    "non_vehicle": tuple(SUBJECTS),
}
SHAPES = ((1, 1), (1.25, 1), (1.5, 1), (1, 1.2))  # of clean pictures, in units of `size`
TURNS = 14  # identities of a pair of body and colour; one more is held out for the benchmark
FRAMES = 40  # of a track
TRUTH = ("path", "kind", "of", "body", "colour", "make", "pid", "camid", "how")
CAPTIONS = ("path", "split", "caption", "short_caption")
NOT_FOUND = "<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found.</body></html>\n"


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (largest remainder)."""
    exact = total * np.asarray(weights, dtype=float) / np.sum(weights)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def plan(num_images: int, seed: int) -> tuple[list[dict], list[dict]]:
    """The rows of photos/ and of benchmark/, as `file_bytes` wants them.

    The share of the pair of rank r (from 0) falls as 1 / (r + 1.5): the commonest pair of body and colour has 15% of
    the clean vehicles, the last of the hundred a handful.
    """
    kinds = dict(zip(SHARES, share_out(num_images, list(SHARES.values()))))
    ranked = _ranked(seed)
    tail = 1 / (np.arange(len(ranked)) + 1.5)
    test = _benchmark(max(4, round(0.0375 * num_images)), seed, [pids[TURNS] for pids in ranked])
    clean = []
    for pids, count in zip(ranked, share_out(kinds["clean"], tail)):
        pids = pids[: min(TURNS, math.ceil(count / 3))]
        for k in range(count):
            number = len(clean)
            row = _row("clean", number, label_row(seed, pids[k % len(pids)], k // len(pids)))
            row["shape"] = SHAPES[demo_rng(seed, "pool shape", number).integers(len(SHAPES))]
            row["ending"] = {7: ".webp", 8: ".bmp", 9: ".png"}.get(number % 10, ".jpg")
            clean.append(row)
    rows = list(clean)
    for kind in ("small", "aspect", "blur", "exposure", "corrupt"):
        rng = demo_rng(seed, "pool", kind)
        for k in range(kinds[kind]):
            rank = int(rng.choice(len(tail), p=tail / tail.sum()))
            row = _row(kind, k, label_row(seed, ranked[rank][k % TURNS], 1000 + k))
            if kind == "aspect":
                long = float(rng.uniform(4, 6))
                row["shape"] = (long, 1) if row["how"] == "wide" else (1, long)
            rows.append(row)
    leaked = kinds["leak_exact"]
    rows += _copies("exact_copy", kinds["exact_copy"], clean, seed)
    rows += _copies("pixel_copy", kinds["pixel_copy"], [row for row in clean if row["ending"] == ".jpg"], seed)
    rows += _copies("near_copy", kinds["near_copy"], clean, seed)
    rows += _copies("leak_exact", leaked, test[:leaked], seed)
    rows += _copies("leak_near", kinds["leak_near"], test[leaked:], seed)
    for k in range(kinds["non_vehicle"]):
        row = _row("non_vehicle", k, {})
        short, place = SUBJECTS[row["how"]], CAMERAS[k % len(CAMERAS)].place
        caption = f"{short} {place}" if row["how"] == "place" else f"a picture of {short}"
        rows.append(row | {"caption": caption, "short_caption": short})
    tracks = max(1, round(kinds["track"] / FRAMES))
    for k in range(kinds["track"]):
        frame, track = divmod(k, tracks)
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


def _row(kind: str, number: int, labels: dict) -> dict:
    ways = HOWS.get(kind, ("",))
    how = ways[number % len(ways)]
    return {**labels, "kind": kind, "number": number, "how": how, "shape": (1, 1), "ending": ".jpg"}


def _copies(kind: str, count: int, originals: list[dict], seed: int) -> list[dict]:
    order, rows = demo_rng(seed, "pool", kind).permutation(len(originals)), []
    for k in range(count):
        source = originals[order[k % len(order)]]
        row = {**source, **_row(kind, k, {}), "shape": source["shape"], "source": source}
        if kind in ("exact_copy", "pixel_copy"):
            row["ending"] = source["ending"] if kind == "exact_copy" else f".{row['how']}"
        rows.append(row)
    return rows


def _benchmark(count: int, seed: int, pids: list[int]) -> list[dict]:
    """About four pictures of each of some identities, in random order."""
    rng = demo_rng(seed, "pool benchmark")
    chosen = rng.permutation(pids)[: max(1, count // 4)].tolist()
    rows = []
    for k, place in enumerate(rng.permutation(count).tolist()):
        row = _row("clean", k, label_row(seed, chosen[k % len(chosen)], k // len(chosen)))
        rows.append(row | {"path": f"benchmark/images/{place:05d}.jpg", "split": "test"})
    return rows


def _name(rows: list[dict], seed: int) -> None:
    """Paths, originals by name, and splits; a track is one folder of consecutive frames."""
    places = demo_rng(seed, "pool names").permutation(len(rows)).tolist()
    heads: dict[int, str] = {}
    for row, place in zip(rows, places):
        folder = ("web/", "dealer/", "forum/", "phone/IMG_")[place % 4]
        path = f"photos/{folder}{place:06d}"
        if row["kind"] == "track":
            path = f"photos/cctv/c{row['camid']:02d}_{row['track']:03d}/{row['frame']:05d}"
        row["path"] = path + row["ending"]
        is_val = row["kind"] in GOOD and demo_rng(seed, "pool split", row["pid"]).random() < 0.25
        row["split"] = "val" if is_val else "train"
    for row in rows:  # copies of copies do not occur, so that originals have their names by now
        row["of"] = row["source"]["path"] if "source" in row else ""
        if row["kind"] == "track":
            first = heads.setdefault(row["track"], row["path"])
            row["of"] = "" if first == row["path"] else first


def file_bytes(row: dict, seed: int, size: int) -> bytes:
    """Draw the file of one row of the plan; `number` keys its own stream of random numbers, `size` is in px."""
    kind, how, rng = row["kind"], row["how"], demo_rng(seed, "flaw", row["kind"], row["number"])
    if "source" in row:
        return _copy(file_bytes(row["source"], seed, size), kind, how, rng)
    if kind == "corrupt" and how != "truncated":
        text = {"empty": "", "text": f"photo {row['number']} to follow\n", "html": NOT_FOUND}[how]
        return text.encode()
    if kind == "non_vehicle":
        picture = draw_other(how, seed, row["number"], size)
    elif kind == "track":
        picture = _frame(row, rng, seed, size)
    else:
        shape = tuple(round(share * size) for share in row["shape"])
        picture = render(seed, row["pid"], row["camid"], row["viewid"], row["shot"], shape)
    if kind == "corrupt":
        whole = encode(picture, ".jpg")
        return whole[: int(len(whole) * rng.uniform(0.3, 0.7))]
    if kind == "small":
        side = int(rng.integers(size // 4, size // 2))
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    if kind == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.08, 0.14)))
    if kind == "exposure":
        rest = rng.uniform(0.01, 0.05)  # of the contrast
        picture = picture.point([rest * v if how == "black" else 255 - rest * (255 - v) for v in range(256)] * 3)
    return encode(picture, Path(row["path"]).suffix, CAMERAS[row["camid"]].quality if "camid" in row else 88)


def encode(picture: Image.Image, ending: str, quality: int = 85) -> bytes:
    """An RGB picture as JPEG of this quality, or without loss as .png, .bmp or .webp."""
    opened, is_jpeg = io.BytesIO(), ending.lower() in (".jpg", ".jpeg")
    how = {"quality": quality} if is_jpeg else {"lossless": True}
    picture.save(opened, "JPEG" if is_jpeg else ending[1:], **how)
    return opened.getvalue()


def _frame(row: dict, rng: np.random.Generator, seed: int, size: int) -> Image.Image:
    """A frame of a track: the same view, a pixel or two further, with noise of its own."""
    margin = max(2, size // 24)
    wide = render(seed, row["pid"], row["camid"], row["viewid"], row["shot"], size + 2 * margin)
    left = round(margin * (1 + np.sin(0.11 * row["frame"])))
    top = round(margin * (1 + 0.5 * np.sin(0.07 * row["frame"])))
    pixels = np.asarray(wide.crop((left, top, left + size, top + size)), dtype=float)
    pixels = pixels * rng.uniform(0.985, 1.015) + rng.normal(0, 1.5, (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _copy(data: bytes, kind: str, how: str, rng: np.random.Generator) -> bytes:
    """The same bytes, other bytes of the same pixels (another container, or a comment in the JPEG), or a picture that
    looks almost the same."""
    if kind in ("exact_copy", "leak_exact"):
        return data
    if how == "jpg":
        text = b"saved again"
        return data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[2:]
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    if kind == "pixel_copy":
        return encode(picture, f".{how}")
    (width, height), sign = picture.size, int(rng.choice((-1, 1)))
    if how == "jpeg":
        return encode(picture, ".jpg", int(rng.integers(30, 56)))
    if how == "resize":
        factor = 1 + sign * rng.uniform(0.1, 0.3)
        picture = picture.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    elif how == "crop":
        left, top, right, bottom = rng.uniform(0.01, 0.03, 4) * (width, height, width, height)
        picture = picture.crop((round(left + 0.5), round(top + 0.5), width - round(right), height - round(bottom)))
    elif how == "light":
        factor = 1 + sign * rng.uniform(0.07, 0.15)
        picture = picture.point([min(255, round(factor * v)) for v in range(256)] * 3)
    else:  # logo
        high = max(7, height // 9)
        at, look = (2 if sign < 0 else width - 3 * high, height - high - 3), {"fill": "white", "font_size": high}
        ImageDraw.Draw(picture).text(at, "cars24", stroke_width=1, stroke_fill=(20, 20, 24), **look)
    return encode(picture, ".jpg")


def _write_file(row: dict, folder: Path, seed: int, size: int) -> None:
    (folder / row["path"]).write_bytes(file_bytes(row, seed, size))


def write_pool(
    output: Path, num_images: int = 4000, size: int = 96, seed: int = 0, processes: int | None = None
) -> dict:
    """Write `num_images` files into photos/ and 3.75% more into benchmark/ of a new folder; `size` is the short side of
    a good picture in px. -> images, benchmark, identities (in photos/), counts (files by kind) and written."""
    if num_images < 100 or size < 32:
        raise InputError(f"num_images must be 100 or more and size 32 or more, got {num_images} and {size}")
    rows, test = plan(num_images, seed)
    good = [row for row in rows if row["kind"] in GOOD]
    others = [row for row in rows if row["kind"] == "non_vehicle"]
    counts = {"images": len(rows), "benchmark": len(test), "identities": len({row["pid"] for row in good})}
    counts["counts"] = dict(Counter(row["kind"] for row in rows))

    def finish(folder: Path) -> None:
        blank = dict.fromkeys(("body", "colour", "make", "pid", "camid"), "")  # where no vehicle is seen
        hidden = ("corrupt", "non_vehicle")
        write_table(folder / "truth.csv", TRUTH, (row | blank if row["kind"] in hidden else row for row in rows))
        write_table(folder / "labels.csv", COLUMNS, good)
        write_table(folder / "captions.csv", CAPTIONS, good + others)
        parts = {"vehicle": good, "other": others}
        prompts = {name: sorted({row["short_caption"] for row in part}) for name, part in parts.items()}
        (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
        inside = ({**row, "path": row["path"].removeprefix("benchmark/")} for row in test)
        write_table(folder / "benchmark" / "labels.csv", COLUMNS, inside)

    draw, settings = partial(_write_file, seed=seed, size=size), {"size": size, "seed": seed, **counts}
    return {**counts, "written": write_set(output, "pool.json", settings, rows + test, draw, finish, processes)}


def pool_sheet(pool: Path, num_images: int, seed: int, size: int) -> Image.Image:
    """A row of ten cells for each kind of file, copies beside their originals; grey: no picture."""
    rows, kinds, margin = plan(num_images, seed)[0], list(SHARES), 16
    page = Image.new("RGB", (10 * size, len(kinds) * (size + margin)), "white")
    for line, kind in enumerate(kinds):
        top = line * (size + margin)
        ImageDraw.Draw(page).text((2, top + 2), kind, fill="black")
        pairs = [(row["of"] if "source" in row else "", row["path"]) for row in rows if row["kind"] == kind]
        for column, path in enumerate([path for pair in pairs for path in pair if path][:10]):
            try:
                cell = Image.open(pool / path).convert("RGB")
            except OSError:
                cell = Image.new("RGB", (size, size), "grey")
            if max(cell.size) > size:
                cell = ImageOps.contain(cell, (size, size))
            page.paste(cell, (column * size, top + margin))
    return page


def get_args_parser() -> argparse.ArgumentParser:
    parser = demo_parser("pool", __doc__, 96, "short side of a good picture")
    parser.add_argument("--num_images", type=int, default=4000, help="number of files in photos/ (default 4000)")
    parser.add_argument("--sheet", type=Path, default=None, help="PNG file for a contact sheet (default none)")
    return parser


def main(args: argparse.Namespace) -> dict:
    counts = write_pool(args.output, args.num_images, args.size, args.seed, args.processes)
    if args.sheet:
        pool_sheet(args.output, args.num_images, args.seed, args.size).save(args.sheet)
    return {"output": str(args.output), **counts}


if __name__ == "__main__":
    run_tool(main, get_args_parser().parse_args(), None)
