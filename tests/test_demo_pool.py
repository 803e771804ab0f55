"""The planted pool: repeatable, and every file is what truth.csv says of it."""

import csv
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datasets.images import Unreadable, open_rgb
from demo import pool as demo_pool

NUM, SIZE = 112, 32


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool") / "set"
    demo_pool.POOL.write(folder, num_images=NUM, size=SIZE, processes=1)
    return folder


def table(file):
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def of_kind(folder, *kinds):
    rows = [row for row in table(folder / "truth.csv") if row["kind"] in kinds]
    assert rows
    return rows


def pixels(file):
    return np.asarray(open_rgb(file), dtype=float)


def thumbnail(file):
    """The picture at 16 x 16, less its mean: (768,) float64 of length 1."""
    small = np.asarray(open_rgb(file).resize((16, 16), Image.Resampling.BOX), dtype=float)
    return (small - small.mean()).ravel() / np.linalg.norm(small - small.mean())


def test_truth_counts_every_file(pool):
    rows = table(pool / "truth.csv")
    assert tuple(rows[0]) == demo_pool.TRUTH
    files = {path.relative_to(pool).as_posix() for path in pool.glob("photos/**/*") if path.is_file()}
    assert {row["path"] for row in rows} == files and len(rows) == NUM
    counts, test = Counter(row["kind"] for row in rows), list((pool / "benchmark" / "images").iterdir())
    assert json.loads((pool / "pool.json").read_text())["counts"] == {**counts, "benchmark": len(test)}
    assert set(counts) == set(demo_pool.SHARES)
    for row in rows:
        assert bool(row["body"]) == (row["kind"] not in ("corrupt", "non_vehicle")), row
        assert not row["of"] or (pool / row["of"]).is_file()
        if row["of"] and row["kind"] != "track":
            assert row["of"].startswith("benchmark/") == row["kind"].startswith("leak_")


def test_copies_are_equal_byte_for_byte_or_in_their_pixels_alone(pool):
    for row in of_kind(pool, "exact_copy", "leak_exact"):
        assert (pool / row["path"]).read_bytes() == (pool / row["of"]).read_bytes()
    rows = of_kind(pool, "pixel_copy")
    for row in rows:
        assert (pool / row["path"]).read_bytes() != (pool / row["of"]).read_bytes()
        assert open_rgb(pool / row["path"]).tobytes() == open_rgb(pool / row["of"]).tobytes()
    assert {row["how"] for row in rows} == {"png", "bmp", "webp", "jpg"}


def test_near_copies_look_like_their_originals_and_differ(pool):
    rows = of_kind(pool, "near_copy", "leak_near")
    for row in rows:
        copy, original = (open_rgb(pool / row[key]) for key in ("path", "of"))
        assert copy.tobytes() != original.tobytes()
        assert row["how"] not in ("resize", "crop") or copy.size != original.size
    alike = [float(thumbnail(pool / row["path"]) @ thumbnail(pool / row["of"])) for row in rows]
    others = np.array([thumbnail(pool / row["path"]) for row in of_kind(pool, "clean")])
    apart = (others @ others.T)[np.triu_indices(len(others), 1)]
    assert min(alike) > np.quantile(apart, 0.95) and np.median(alike) > np.quantile(apart, 0.995)
    assert {row["how"] for row in rows} == {"jpeg", "resize", "crop", "light", "logo"}


def test_frames_of_a_track_follow_one_another(pool):
    rows = of_kind(pool, "track")
    assert len({(row["pid"], row["camid"]) for row in rows}) == 1 and len(rows) > 5
    frames = [pixels(pool / row["path"]) for row in sorted(rows, key=lambda row: row["path"])]
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:])]
    assert 0 < min(steps) and np.median(steps) < 12 and sum(row["of"] == "" for row in rows) == 1


def test_corrupt_files_alone_cannot_be_read(pool):
    for row in table(pool / "truth.csv"):
        if row["kind"] != "corrupt":
            assert open_rgb(pool / row["path"]).mode == "RGB"
    rows = [row for row in demo_pool.plan(400, seed=0) if row["kind"] == "corrupt"]
    assert {row["how"] for row in rows} == set(demo_pool.HOWS["corrupt"])
    for row in rows:
        with pytest.raises(Unreadable):
            open_rgb(io.BytesIO(demo_pool.file_bytes(row, 0, SIZE)))


def test_bad_pictures_are_as_bad_as_named(pool):
    good = [pixels(pool / row["path"]) for row in of_kind(pool, "clean")]
    assert all(14 < p.mean() < 241 for p in good)
    assert all(max(open_rgb(pool / row["path"]).size) < SIZE / 2 for row in of_kind(pool, "small"))
    for size in (open_rgb(pool / row["path"]).size for row in of_kind(pool, "aspect")):
        assert max(size) >= 4 * min(size) and min(size) == SIZE
    sharp = min(np.abs(np.diff(p, axis=1)).mean() for p in good)
    for row in of_kind(pool, "blur"):
        assert np.abs(np.diff(pixels(pool / row["path"]), axis=1)).mean() < sharp
    for row in of_kind(pool, "exposure"):
        mean = pixels(pool / row["path"]).mean()
        assert mean < 14 if row["how"] == "black" else mean > 241


def test_tables_hold_readable_files_and_no_vehicle_of_the_benchmark(pool):
    labels, captions, test = (table(pool / f"{name}.csv") for name in ("labels", "captions", "benchmark/labels"))
    truth = {row["path"]: row for row in table(pool / "truth.csv")}
    assert {truth[row["path"]]["kind"] for row in labels} == set(demo_pool.GOOD)
    for row in labels:
        assert all(row[key] == truth[row["path"]][key] for key in ("body", "colour", "make", "pid", "camid"))
        assert row["colour"] in row["caption"]
    splits = {split: {r["pid"] for r in labels if r["split"] == split} for split in ("train", "val")}
    assert splits["train"] and splits["val"] and not splits["train"] & splits["val"]
    extra = {row["path"] for row in captions} - {row["path"] for row in labels}
    assert {truth[path]["kind"] for path in extra} == {"non_vehicle"}
    assert test and all((pool / "benchmark" / row["path"]).is_file() and row["split"] == "test" for row in test)
    leaked = {row["pid"] for row in truth.values() if row["kind"].startswith("leak_")}
    others = {row["pid"] for row in truth.values() if not row["kind"].startswith("leak_")}
    assert leaked <= {row["pid"] for row in test} and not others & {row["pid"] for row in test}


def test_the_tail_is_long_and_seeds_differ():
    rows = [row for row in demo_pool.plan(4000, seed=0) if row["kind"] == "clean"]
    counts = sorted(Counter((row["body"], row["colour"]) for row in rows).values())
    assert len(counts) == 100 and counts[0] >= 3 and counts[-1] >= 10 * np.median(counts)
    assert 0.12 < counts[-1] / sum(counts) < 0.18 and len({row["pid"] for row in rows}) > 400
    assert demo_pool.share_out(10, [1, 1, 2]) == [3, 2, 5] and sum(demo_pool.share_out(137, [5, 4, 2.5])) == 137
    one, other = (demo_pool.plan(200, seed) for seed in (0, 1))
    assert [row["path"] for row in one] != [row["path"] for row in other]


@pytest.mark.parametrize("subject", demo_pool.SUBJECTS)
def test_other_subjects_are_functions_of_their_arguments(subject):
    first = demo_pool.draw_other(subject, 0, 3, 40)
    assert first.size == (40, 40) and first.mode == "RGB" and np.asarray(first).std() > 2
    assert first.tobytes() == demo_pool.draw_other(subject, 0, 3, 40).tobytes()
    assert first.tobytes() != demo_pool.draw_other(subject, 0, 11, 40).tobytes()
