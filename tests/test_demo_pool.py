"""The planted pool: repeatable, and every file is what truth.csv says of it."""

import csv
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datasets.images import UNREADABLE, open_rgb
from demo import pool as demo_pool
from demo.others import SUBJECTS, draw_other
from util.errors import InputError

NUM, SIZE = 112, 32


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    output = tmp_path_factory.mktemp("pool") / "set"
    return output, demo_pool.write_pool(output, NUM, SIZE, processes=1)


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
    flat = (small - small.mean()).ravel()
    return flat / np.linalg.norm(flat)


def test_another_seed_is_another_pool():
    one, other = (demo_pool.plan(200, seed)[0] for seed in (0, 1))
    assert [row["pid"] for row in one[:50]] != [row["pid"] for row in other[:50]]
    assert [row["path"] for row in one] != [row["path"] for row in other]


def test_truth_counts_every_file(pool):
    folder, counts = pool
    rows = table(folder / "truth.csv")
    assert tuple(rows[0]) == demo_pool.TRUTH
    files = {path.relative_to(folder).as_posix() for path in folder.glob("photos/**/*") if path.is_file()}
    assert {row["path"] for row in rows} == files and len(rows) == NUM == counts["images"]
    assert dict(Counter(row["kind"] for row in rows)) == counts["counts"]
    assert set(counts["counts"]) == set(demo_pool.SHARES)
    assert json.loads((folder / "pool.json").read_text())["counts"] == counts["counts"]
    assert len(list((folder / "benchmark" / "images").iterdir())) == counts["benchmark"]
    for row in rows:
        assert bool(row["body"]) == (row["kind"] not in ("corrupt", "non_vehicle")), row
        assert not row["of"] or (folder / row["of"]).is_file()
        if row["of"] and row["kind"] != "track":
            assert row["of"].startswith("benchmark/") == row["kind"].startswith("leak_")


def test_exact_copies_are_equal_byte_for_byte(pool):
    folder, _ = pool
    for row in of_kind(folder, "exact_copy", "leak_exact"):
        assert (folder / row["path"]).read_bytes() == (folder / row["of"]).read_bytes()


def test_pixel_copies_are_equal_in_their_pixels_alone(pool):
    folder, _ = pool
    rows = of_kind(folder, "pixel_copy")
    for row in rows:
        assert (folder / row["path"]).read_bytes() != (folder / row["of"]).read_bytes()
        assert open_rgb(folder / row["path"]).tobytes() == open_rgb(folder / row["of"]).tobytes()
    assert {row["how"] for row in rows} == {"png", "bmp", "webp", "jpg"}


def test_near_copies_look_like_their_originals_and_differ(pool):
    folder, _ = pool
    rows = of_kind(folder, "near_copy", "leak_near")
    for row in rows:
        copy, original = (open_rgb(folder / row[key]) for key in ("path", "of"))
        assert copy.tobytes() != original.tobytes()
        if row["how"] in ("resize", "crop"):
            assert copy.size != original.size
    alike = [float(thumbnail(folder / row["path"]) @ thumbnail(folder / row["of"])) for row in rows]
    others = [thumbnail(folder / row["path"]) for row in of_kind(folder, "clean")]
    apart = (np.array(others) @ np.array(others).T)[np.triu_indices(len(others), 1)]
    assert min(alike) > np.quantile(apart, 0.95) and np.median(alike) > np.quantile(apart, 0.995)
    assert {row["how"] for row in rows} == {"jpeg", "resize", "crop", "light", "logo"}


def test_frames_of_a_track_follow_one_another(pool):
    folder, _ = pool
    rows = of_kind(folder, "track")
    assert len({(row["pid"], row["camid"]) for row in rows}) == 1 and len(rows) > 5
    frames = [pixels(folder / row["path"]) for row in sorted(rows, key=lambda row: row["path"])]
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:])]
    assert 0 < min(steps) and np.median(steps) < 12
    assert sum(row["of"] == "" for row in rows) == 1


def test_corrupt_files_cannot_be_read_and_all_others_can(pool):
    folder, _ = pool
    for row in table(folder / "truth.csv"):
        if row["kind"] == "corrupt":
            with pytest.raises(UNREADABLE):
                open_rgb(folder / row["path"])
        else:
            assert open_rgb(folder / row["path"]).mode == "RGB"


def test_every_way_to_be_corrupt_is_unreadable():
    rows = [row for row in demo_pool.plan(400, seed=0)[0] if row["kind"] == "corrupt"]
    assert {row["how"] for row in rows} == set(demo_pool.HOWS["corrupt"])
    for row in rows:
        with pytest.raises(UNREADABLE):
            open_rgb(io.BytesIO(demo_pool.file_bytes(row, 0, SIZE)))


def test_bad_pictures_are_as_bad_as_named(pool):
    folder, _ = pool
    good = [pixels(folder / row["path"]) for row in of_kind(folder, "clean")]
    for row in of_kind(folder, "small"):
        assert max(open_rgb(folder / row["path"]).size) < SIZE / 2
    for row in of_kind(folder, "aspect"):
        size = open_rgb(folder / row["path"]).size
        assert max(size) >= 4 * min(size) and min(size) == SIZE
    sharp = min(np.abs(np.diff(p, axis=1)).mean() for p in good)
    for row in of_kind(folder, "blur"):
        assert np.abs(np.diff(pixels(folder / row["path"]), axis=1)).mean() < sharp
    for row in of_kind(folder, "exposure"):
        mean = pixels(folder / row["path"]).mean()
        assert mean < 14 if row["how"] == "black" else mean > 241
    assert all(14 < p.mean() < 241 for p in good)


def test_benchmark_vehicles_are_seen_nowhere_else(pool):
    folder, _ = pool
    test = {row["pid"] for row in table(folder / "benchmark" / "labels.csv")}
    rows = table(folder / "truth.csv")
    assert test and not test & {row["pid"] for row in rows if not row["kind"].startswith("leak_")}
    assert test >= {row["pid"] for row in rows if row["kind"].startswith("leak_")}
    leaked = {row["path"] for row in rows if row["kind"].startswith("leak_")}
    for name in ("labels.csv", "captions.csv"):
        assert not leaked & {row["path"] for row in table(folder / name)}


def test_labels_and_captions_belong_to_readable_files(pool):
    folder, _ = pool
    labels, captions = table(folder / "labels.csv"), table(folder / "captions.csv")
    truth = {row["path"]: row for row in table(folder / "truth.csv")}
    assert {row["kind"] for row in truth.values() if row["path"] in {x["path"] for x in labels}} == set(demo_pool.GOOD)
    for row in labels:
        assert all(row[key] == truth[row["path"]][key] for key in ("body", "colour", "make", "pid", "camid"))
        assert row["colour"] in row["caption"]
    splits = {split: {r["pid"] for r in labels if r["split"] == split} for split in ("train", "val")}
    assert splits["train"] and splits["val"] and not splits["train"] & splits["val"]
    extra = {row["path"] for row in captions} - {row["path"] for row in labels}
    assert {truth[path]["kind"] for path in extra} == {"non_vehicle"}
    for row in table(folder / "benchmark" / "labels.csv"):
        assert (folder / "benchmark" / row["path"]).is_file() and row["split"] == "test"


def test_the_tail_is_long():
    rows, _ = demo_pool.plan(4000, seed=0)
    pairs = Counter((row["body"], row["colour"]) for row in rows if row["kind"] == "clean")
    counts = sorted(pairs.values())
    assert len(counts) == 100 and counts[0] >= 3
    assert counts[-1] >= 10 * np.median(counts)
    assert 0.12 < counts[-1] / sum(counts) < 0.18
    assert len({row["pid"] for row in rows if row["kind"] == "clean"}) > 400


def test_shares_add_up():
    for total in (100, 101, 137, 4000):
        assert sum(demo_pool.share_out(total, list(demo_pool.SHARES.values()))) == total
    assert demo_pool.share_out(10, [1, 1, 2]) == [3, 2, 5]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_other_subjects_are_functions_of_their_arguments(subject):
    first = draw_other(subject, 0, 3, 40)
    assert first.size == (40, 40) and first.mode == "RGB" and np.asarray(first).std() > 2
    assert first.tobytes() == draw_other(subject, 0, 3, 40).tobytes()
    assert first.tobytes() != draw_other(subject, 0, 11, 40).tobytes()


def test_the_same_pool_is_left_and_another_refused(pool, tmp_path):
    folder, counts = pool
    before = (folder / "truth.csv").stat().st_mtime_ns
    assert demo_pool.write_pool(folder, NUM, SIZE) == {**counts, "written": False}
    assert (folder / "truth.csv").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="remove it"):
        demo_pool.write_pool(folder, NUM, SIZE, seed=1)
    with pytest.raises(InputError, match="100 or more"):
        demo_pool.write_pool(tmp_path / "new", 99, SIZE)
    assert not list(tmp_path.iterdir())


def test_the_command_line_leaves_the_pool_and_draws_a_sheet(pool, tmp_path):
    folder, _ = pool
    words = f"--output {folder} --num_images {NUM} --size {SIZE} --sheet {tmp_path / 'sheet.png'}"
    line = demo_pool.main(demo_pool.get_args_parser().parse_args(words.split()))
    assert line["images"] == NUM and not line["written"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 10 * SIZE and np.asarray(sheet).std() > 10
