"""A drawn pool with every fault of a crawl, and the truth about each file, to try curation on; and `DrawnSet`.

    python -m demo.pool --output pool --num_images 4000

photos/ is the pool: vehicles with a long tail over (body, colour), copies, tracks, rubbish. benchmark/ is the test
split of another set, some of which has leaked into photos/: its vehicles are in no table but truth.csv, which says what
each file is, and of which file a copy. labels.csv lists good pictures, captions.csv these and those without a vehicle.
"""

import csv
import io
import json
import math
import multiprocessing.pool
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.draw import BODIES, COLOURS, label_row, render, vehicle
from demo.scene import CAMERAS, Scene, demo_rng
from util.cli import Parser, run_tool
from util.errors import InputError

VERSION = 3  # raise when the pictures change, so that an older folder is not taken for a new one
SIZE = "side of a picture, about the short one where they differ, in px"
SEED = "seed of every random choice"
SHARES = {  # of the files in photos/, in per cent
    "clean": 52.5, "exact_copy": 5, "pixel_copy": 4, "near_copy": 10, "track": 8, "non_vehicle": 8, "corrupt": 2,
    "small": 2, "aspect": 2, "blur": 2, "exposure": 2, "leak_exact": 1, "leak_near": 1.5,
}  # fmt: skip
GOOD = ("clean", "exact_copy", "pixel_copy", "near_copy", "track")
SUBJECTS = {  # of pictures without any vehicle, and their captions
    "place": "an empty place without any vehicle", "gradient": "a smooth colour gradient",
    "texture": "a rough texture", "page": "a page of printed text", "shapes": "overlapping coloured shapes",
}  # fmt: skip
NEAR = ("jpeg", "resize", "crop", "light", "logo")
HOWS = {  # the ways of each kind that has several; rows take turns
    "pixel_copy": ("png", "bmp", "webp", "jpg"), "near_copy": NEAR, "leak_near": NEAR, "aspect": ("wide", "tall"),
    "corrupt": ("truncated", "empty", "text", "html"), "exposure": ("black", "white"), "non_vehicle": tuple(SUBJECTS),
}  # fmt: skip
SHAPES = ((1, 1), (1.25, 1), (1.5, 1), (1, 1.2))  # of clean pictures, in units of `size`
TURNS, FRAMES = 14, 40  # identities of a pair of body and colour (one more is in the benchmark); pictures of a track
LABELS = ("path", "split", "body", "colour", "make", "pid", "camid", "viewid", "caption")
TRUTH = ("path", "kind", "of", "body", "colour", "make", "pid", "camid", "how")
HTML = "<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found.</body></html>\n"
WORDS = "the of and sale price open house market report notes weekly river winter music garden".split()


class DrawnSet(NamedTuple):
    """A program that draws a folder of pictures, which appears whole or not at all; an equal one is not drawn again."""

    stamp: str  # the file that holds the settings
    flags: dict  # name -> default, smallest value that makes sense, help
    plan: Callable  # (**settings but size) -> rows, each with `path` and a `split` or `kind` to be counted
    draw: Callable  # (row, folder, seed, size) writes the file of one row
    finish: Callable  # (folder, rows) writes tables after the last file

    def parser(self, name: str, manual: str) -> Parser:
        parser = Parser(name, manual)
        add = parser.add_argument
        add("--output", type=Path, required=True, help="folder to write; one that holds this very set is left as it is")
        add("--processes", type=int, default=None, help="number of workers (default: one per core)")
        for flag, (default, _, text) in self.flags.items():
            add(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
        return parser

    def write(self, output: Path, **given) -> dict:
        """Draw every row under a temporary name, then rename -> output, images, counts (files by split or kind) and
        written: False where `output` holds this very set."""
        processes = given.pop("processes", None) or os.cpu_count() or 1
        settings, output = {flag: row[0] for flag, row in self.flags.items()} | given, Path(output).absolute()
        for flag, (_, least, _) in self.flags.items():
            if settings[flag] < least:
                raise InputError(f"--{flag} {settings[flag]}: must be {least} or more")
        rows = self.plan(**{name: value for name, value in settings.items() if name != "size"})
        result = {"images": len(rows), "counts": dict(Counter(row.get("kind", row["split"]) for row in rows))}
        about = json.dumps(settings | result | {"version": VERSION}, indent=1) + "\n"
        result = {"output": str(output), **result, "written": True}
        if (output / self.stamp).is_file() and (output / self.stamp).read_text(encoding="utf-8") == about:
            return result | {"written": False}
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise InputError(f"{output} exists and does not hold this set: name another --output or remove it first")
        output.parent.mkdir(parents=True, exist_ok=True)
        # spawned, not forked: the caller may have torch threads running
        workers = multiprocessing.get_context("spawn").Pool if processes > 1 else multiprocessing.pool.ThreadPool
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
            part = Path(temporary, output.name)
            for folder in {(part / row["path"]).parent for row in rows}:
                folder.mkdir(parents=True, exist_ok=True)
            with workers(processes) as pool:
                pool.starmap(self.draw, ((row, part, settings["seed"], settings["size"]) for row in rows), chunksize=16)
            self.finish(part, rows)
            (part / self.stamp).write_text(about, encoding="utf-8")
            part.rename(output)
        return result


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (largest remainder)."""
    exact = total * np.asarray(weights, dtype=float) / np.sum(weights)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def plan(num_images: int, seed: int) -> list[dict]:
    """The rows of photos/ and then of benchmark/. The share of the r-th pair of body and colour falls as 1 / (r + 1.5):
    the commonest has 15% of the clean vehicles, the last of the hundred a handful."""
    kinds, pairs = dict(zip(SHARES, share_out(num_images, list(SHARES.values())))), {}
    for pid in range((TURNS + 1) * len(BODIES) * len(COLOURS)):
        attrs = vehicle(seed, pid)
        pairs.setdefault((attrs["body"], attrs["colour"]), []).append(pid)
    order, rows = demo_rng(seed, "pool tail").permutation(len(pairs)), []
    ranked = [list(pairs.values())[k] for k in order]  # identities, those of the commonest pair first
    tail = 1 / (np.arange(len(ranked)) + 1.5)
    for pids, count in zip(ranked, share_out(kinds["clean"], tail)):
        pids = pids[: min(TURNS, math.ceil(count / 3))]
        for k in range(count):
            row = _row("clean", len(rows), label_row(seed, pids[k % len(pids)], k // len(pids)))
            row["shape"] = SHAPES[demo_rng(seed, "pool shape", len(rows)).integers(len(SHAPES))]
            row["ending"] = {7: ".webp", 8: ".bmp", 9: ".png"}.get(len(rows) % 10, ".jpg")
            rows.append(row)
    clean = list(rows)
    for kind in ("small", "aspect", "blur", "exposure", "corrupt"):
        rng = demo_rng(seed, "pool", kind)
        for k in range(kinds[kind]):
            rank = int(rng.choice(len(tail), p=tail / tail.sum()))
            rows.append(_row(kind, k, label_row(seed, ranked[rank][k % TURNS], 1000 + k)))
            if kind == "aspect":
                long = float(rng.uniform(4, 6))
                rows[-1]["shape"] = (long, 1) if rows[-1]["how"] == "wide" else (1, long)
    rng, count, test = demo_rng(seed, "pool benchmark"), max(4, round(0.0375 * num_images)), []
    chosen = rng.permutation([pids[TURNS] for pids in ranked])[: max(1, count // 4)].tolist()
    for k, place in enumerate(rng.permutation(count).tolist()):  # about four pictures of each
        row = _row("benchmark", k, label_row(seed, chosen[k % len(chosen)], k // len(chosen)))
        test.append(row | {"path": f"benchmark/images/{place:05d}.jpg", "split": "test"})
    jpegs, leaked = [row for row in clean if row["ending"] == ".jpg"], kinds["leak_exact"]
    sources = {"exact_copy": clean, "pixel_copy": jpegs, "near_copy": clean}
    for kind, originals in (sources | {"leak_exact": test[:leaked], "leak_near": test[leaked:]}).items():
        order = demo_rng(seed, "pool", kind).permutation(len(originals))
        for k in range(kinds[kind]):
            source = originals[order[k % len(order)]]
            row = {**source, **_row(kind, k, {}), "shape": source["shape"], "source": source}
            row["ending"] = {"exact_copy": source["ending"], "pixel_copy": f".{row['how']}"}.get(kind, ".jpg")
            rows.append(row)
    rows += [_row("non_vehicle", k, {}) for k in range(kinds["non_vehicle"])]
    heads = len(rows)
    for k in range(kinds["track"]):
        frame, track = divmod(k, max(1, round(kinds["track"] / FRAMES)))
        pid = clean[demo_rng(seed, "pool track", track).integers(len(clean))]["pid"]
        rows.append(_row("track", k, label_row(seed, pid, 2000 + track)) | {"frame": frame, "track": track})
        rows[-1] |= {"head": rows[heads + track]} if frame else {}
    _name(rows, seed)
    return rows + test


def _row(kind: str, number: int, labels: dict) -> dict:
    ways = HOWS.get(kind, ("",))
    row = {"kind": kind, "number": number, "how": ways[number % len(ways)], "shape": (1, 1), "ending": ".jpg"}
    return labels | row


def _name(rows: list[dict], seed: int) -> None:
    """Paths and splits; a track is one folder of consecutive frames."""
    for row, place in zip(rows, demo_rng(seed, "pool names").permutation(len(rows)).tolist()):
        name = f"{('web/', 'dealer/', 'forum/', 'phone/IMG_')[place % 4]}{place:06d}"
        if row["kind"] == "track":
            name = f"cctv/c{row['camid']:02d}_{row['track']:03d}/{row['frame']:05d}"
        row["path"] = f"photos/{name}{row['ending']}"
        is_val = row["kind"] in GOOD and demo_rng(seed, "pool split", row["pid"]).random() < 0.25
        row["split"] = "val" if is_val else "train"


def file_bytes(row: dict, seed: int, size: int) -> bytes:
    """Draw the file of one row of the plan; `number` keys its own stream of random numbers, `size` is in px."""
    kind, how, rng = row["kind"], row["how"], demo_rng(seed, "flaw", row["kind"], row["number"])
    if "source" in row:
        return _copy(file_bytes(row["source"], seed, size), kind, how, rng)
    if kind == "corrupt" and how != "truncated":
        return {"empty": "", "text": f"photo {row['number']} to follow\n", "html": HTML}[how].encode()
    if kind == "non_vehicle":
        return encode(draw_other(how, seed, row["number"], size), ".jpg", 88)
    ids, margin = [row[key] for key in ("pid", "camid", "viewid", "shot")], max(2, size // 24)
    shape = [round(share * size) for share in row["shape"]]
    picture = render(seed, *ids, size + 2 * margin if kind == "track" else shape)
    if kind == "track":  # the same view, a pixel or two further, with noise of its own
        left, top = (round(margin * (1 + k * np.sin(w * row["frame"]))) for k, w in ((1, 0.11), (0.5, 0.07)))
        pixels = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=float)
        pixels = pixels * rng.uniform(0.985, 1.015) + rng.normal(0, 1.5, (size, size, 1))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    elif kind == "small":
        picture = picture.resize((int(rng.integers(size // 4, size // 2)),) * 2, Image.Resampling.LANCZOS)
    elif kind == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.08, 0.14)))
    elif kind == "exposure":
        rest = rng.uniform(0.01, 0.05)  # of the contrast
        picture = picture.point([rest * v if how == "black" else 255 - rest * (255 - v) for v in range(256)] * 3)
    elif kind == "corrupt":
        whole = encode(picture, ".jpg")
        return whole[: int(len(whole) * rng.uniform(0.3, 0.7))]
    return encode(picture, row["ending"], CAMERAS[row["camid"]].quality)


def encode(picture: Image.Image, ending: str, quality: int = 85) -> bytes:
    """An RGB picture as JPEG of this quality, or without loss as .png, .bmp or .webp."""
    opened, is_jpeg = io.BytesIO(), ending == ".jpg"
    picture.save(opened, "JPEG" if is_jpeg else ending[1:], quality=quality if is_jpeg else 80, lossless=not is_jpeg)
    return opened.getvalue()


def _copy(data: bytes, kind: str, how: str, rng: np.random.Generator) -> bytes:
    """The same bytes, other bytes of the same pixels, or a picture that looks almost the same."""
    if kind in ("exact_copy", "leak_exact"):
        return data
    if how == "jpg":
        return data[:2] + b"\xff\xfe\x00\x0dsaved again" + data[2:]
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


def draw_other(subject: str, seed: int, number: int, size: int) -> Image.Image:
    """One RGB picture, `size` px square, of a subject of `SUBJECTS`: what a careless crawl brings along."""
    rng, page = demo_rng(seed, "other", subject, number), Image.new("RGB", (size, size))

    def colour(low: int = 0) -> tuple:
        return tuple(rng.integers(low, 256, 3).tolist())

    if subject == "place":
        return Scene(seed, -1, number % len(CAMERAS), 4, number, size, (4.5, 1.5, 1.8)).record()
    if subject == "page":
        page.paste(colour(225), (0, 0, size, size))
        for y in range(4, size, max(8, size // 10) + 2):
            line = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), 6))
            ImageDraw.Draw(page).text((4, y), line, fill=(40, 40, 48), font_size=max(8, size // 10))
    if subject == "shapes":
        page.paste(colour(), (0, 0, size, size))
        for x, y, share in rng.uniform(0, size, (8, 3)):
            sides, turn = int(rng.integers(3, 9)), int(rng.integers(0, 360))
            ImageDraw.Draw(page).regular_polygon((x, y, 0.08 * size + 0.27 * share), sides, turn, colour())
    for cells in {"gradient": (2,), "texture": (6, 16, size)}.get(subject, ()):  # coarse to fine, as in bark or cloth
        grid = rng.integers(0, 256, (cells, cells, 3 if subject == "gradient" else 1), dtype=np.uint8)
        grid = Image.fromarray(np.broadcast_to(grid, (cells, cells, 3)).copy())
        page = Image.blend(page, grid.resize((size, size), Image.Resampling.BICUBIC), 1 if cells < 7 else 0.4)
    return page


def _write_file(row: dict, folder: Path, seed: int, size: int) -> None:
    (folder / row["path"]).write_bytes(file_bytes(row, seed, size))


def _write_table(file: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _write_tables(folder: Path, rows: list[dict]) -> None:
    good = [r for r in rows if r["kind"] in GOOD]
    others = [r | {"caption": SUBJECTS[r["how"]]} for r in rows if r["kind"] == "non_vehicle"]
    blank = dict.fromkeys(("body", "colour", "make", "pid", "camid"), "")  # where no vehicle is seen
    truth = ({**r, "of": r.get("source", r.get("head", {})).get("path")} for r in rows if r["kind"] != "benchmark")
    truth = (r | blank if r["kind"] in ("non_vehicle", "corrupt") else r for r in truth)
    _write_table(folder / "truth.csv", TRUTH, truth)
    _write_table(folder / "labels.csv", LABELS, good)
    _write_table(folder / "captions.csv", ("path", "split", "caption"), good + others)
    prompts = {name: sorted({r["caption"] for r in part}) for name, part in (("vehicle", good), ("other", others))}
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")


FLAGS = {"num_images": (4000, 100, "number of pictures"), "size": (96, 32, SIZE), "seed": (0, 0, SEED)}
POOL = DrawnSet("pool.json", FLAGS, plan, _write_file, _write_tables)


def get_args_parser() -> Parser:
    return POOL.parser("demo.pool", __doc__)


if __name__ == "__main__":
    run_tool(lambda args: POOL.write(**vars(args)), get_args_parser().parse_args(), None)
