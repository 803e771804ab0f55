"""The drawn sets: pictures are repeatable and show what their labels say, the planted pool is what truth.csv says of
it, published layouts of the re-identification set are read as planned, and sets appear whole."""

import csv
import io
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from layouts import veri_view, write_demo_reid
from PIL import Image

from datasets.images import Unreadable, open_rgb
from datasets.reid import read_reid
from demo import draw, reid, seg
from demo import pool as demo_pool
from demo.draw import BODIES, label_row, vehicle
from demo.scene import CAMERAS, VIEWS
from metrics.reid import draw_gallery
from util.errors import InputError

SETS = {"seg": seg.PARTS, "pool": demo_pool.POOL, "reid": reid.VERI}

# pictures


def drawn(*ids, size=48):
    return np.asarray(draw.render(*ids, size=size), dtype=float)


def test_render_is_a_function_of_its_arguments():
    first = draw.render(3, 7, 1, 4, 2)
    draw.render(3, 8, 1, 4, 2)
    assert first.mode == "RGB" and first.size == (96, 96)
    assert first.tobytes() == draw.render(3, 7, 1, 4, 2).tobytes()
    for other in ((4, 7, 1, 4, 2), (3, 7, 2, 4, 2), (3, 7, 1, 5, 2), (3, 7, 1, 4, 3)):
        assert first.tobytes() != draw.render(*other).tobytes()
    assert draw.render(0, 0, 0, 0, 0, size=(80, 40)).size == (80, 40)
    for pid, viewid in itertools.product(range(len(BODIES)), range(len(VIEWS))):
        assert drawn(0, pid, (pid + viewid) % len(CAMERAS), viewid, 0, size=24).std() > 10


def test_captions_name_what_is_drawn_and_marks_tell_equal_vehicles_apart():
    row = label_row(0, 3, 0)
    assert row["caption"].split()[1:3] == [row["colour"], BODIES[row["body"]].word]
    assert VIEWS[row["viewid"]] in row["caption"]
    seen = [(v["body"], v["colour"], v["marks"]) for v in (vehicle(0, pid) for pid in range(1000))]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("colour, more, less", [("red", 0, 2), ("blue", 2, 0)])
def test_colour_is_seen_in_the_picture(colour, more, less):
    of = [pid for pid in range(1000) if vehicle(0, pid)["colour"] == colour and pid % 10 in (0, 2, 4, 6, 9)]
    for pid in [pid for pid in of if "stripe" not in vehicle(0, pid)["marks"]][:3]:
        doors = [drawn(0, pid, camid, view, 0)[25:33, 14:34] for camid in (0, 3) for view in (0, 1)]
        rgb = np.median(np.concatenate(doors).reshape(-1, 3), axis=0)
        assert rgb[more] - rgb[less] > 40


def test_bodies_have_outlines_of_their_own():
    xs, ys = np.meshgrid(np.arange(0, 11, 0.1), np.arange(0, 3.5, 0.1))
    found = {}
    for name, body in BODIES.items():  # of the side, in cells of 10 cm
        found[name] = np.zeros(xs.shape, bool)
        for slab in draw.slabs(body).values():
            nose, tail = (np.interp(ys, part[:, 1], part[:, 0]) for part in (slab.nose, slab.tail))
            found[name] |= (ys >= slab.y0) & (ys <= slab.y1) & (xs >= nose) & (xs <= tail)
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert (a & b).sum() / (a | b).sum() < 0.96, (one, other)


def test_pictures_with_masks_of_their_parts(tmp_path):
    p = draw.draw_vehicle(0, 0, 1, 4, 0, (90, 60), with_mask=True)
    picture, mask = p.record(), p.part_ids()
    assert picture.size == (90, 60) and mask.shape == (60, 90)
    assert set(np.unique(mask)) == {24, 25, 26, 40} and (mask == 24).sum() > 500
    again = np.asarray(draw.render(0, 0, 1, 4, 0, (90, 60)), dtype=int)  # the same but for the mirrors
    differs = np.abs(np.asarray(picture, dtype=int) - again).max(axis=2) > 12
    ys, xs = np.nonzero(mask == 26)
    far = np.ones_like(differs)
    far[max(0, ys.min() - 2) : ys.max() + 3, max(0, xs.min() - 2) : xs.max() + 3] = False
    assert differs.any() and not differs[far].any()
    counts = seg.PARTS.write(tmp_path / "set", num_images=30, size=40, processes=1)["counts"]
    for split in ("train", "val", "test"):
        assert len(list(tmp_path.glob(f"set/annotations/{split}/*.png"))) == counts[split] > 0
    sizes = {Image.open(file).size for file in tmp_path.glob("set/images/*/*")}
    assert any(h > w for w, h in sizes) and any(w % 2 for w, h in sizes)
    assert len({row["pid"] for row in seg.plan(300, 0)}) == len({(r["pid"], r["split"]) for r in seg.plan(300, 0)})


def test_views_are_those_that_are_drawn():
    """`plan` and `render` draw the side of a three-quarter view alike."""
    from_nose = (0, 180, 270, 318, 222, 90, 42, 138)  # by VeRi's view; 90 is the right side
    rows = reid.plan(5, 5, 12, 1)[::4]
    for row in rows:
        p = draw.draw_vehicle(1, row["pid"], row["camid"], row["viewid"], row["shot"], 16)
        off = (math.degrees(math.atan2(p.sin, p.cos)) - from_nose[veri_view(row, 1)] + 180) % 360 - 180
        assert abs(off) <= 14
    assert {veri_view(row, 1) for row in rows} == set(range(8))


# sets


def test_two_processes_write_the_same_bytes_and_the_same_set_is_left(tmp_path):
    flags = {"train_ids": 5, "test_ids": 5, "images_per_id": 6, "size": 16}
    result = reid.VERI.write(tmp_path / "one", processes=1, **flags)
    reid.VERI.write(tmp_path / "two", processes=2, **flags)
    files = sorted(path.relative_to(tmp_path / "one") for path in tmp_path.glob("one/**/*") if path.is_file())
    assert len(files) == result["images"] + result["counts"]["query"] + 1
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    before = (tmp_path / "one" / files[0]).stat().st_mtime_ns
    assert reid.VERI.write(tmp_path / "one", processes=1, **flags) == {**result, "written": False}
    assert result["written"] and (tmp_path / "one" / files[0]).stat().st_mtime_ns == before
    for target, seed in ((tmp_path / "one", 1), (tmp_path, 0)):
        with pytest.raises(InputError, match="remove it"):
            reid.VERI.write(target, **flags, seed=seed)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary folder left


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(row, folder, seed, size):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        seg.PARTS._replace(draw=fail).write(tmp_path / "set", processes=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SETS)
def test_command_lines_hold_the_settings_and_refuse_the_smallest(name, tmp_path):
    args = vars(SETS[name].parser(name, "").parse_args(["--output", str(tmp_path / "set")]))
    for flag, (default, least, _) in SETS[name].flags.items():
        assert args[flag] == default
        with pytest.raises(InputError, match=f"--{flag} {least - 1}: must be {least} or more"):
            SETS[name].write(tmp_path / "set", **{flag: least - 1})
    assert not list(tmp_path.iterdir())


# the planted pool

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


def test_copies_are_equal_byte_for_byte_or_in_their_pixels_alone_or_look_alike(pool):
    for row in of_kind(pool, "exact_copy", "leak_exact"):
        assert (pool / row["path"]).read_bytes() == (pool / row["of"]).read_bytes()
    rows = of_kind(pool, "pixel_copy")
    for row in rows:
        assert (pool / row["path"]).read_bytes() != (pool / row["of"]).read_bytes()
        assert open_rgb(pool / row["path"]).tobytes() == open_rgb(pool / row["of"]).tobytes()
    assert {row["how"] for row in rows} == {"png", "bmp", "webp", "jpg"}
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


def test_bad_files_are_as_bad_as_named(pool):
    for row in table(pool / "truth.csv"):
        if row["kind"] != "corrupt":
            assert open_rgb(pool / row["path"]).mode == "RGB"
    rows = [row for row in demo_pool.plan(400, seed=0) if row["kind"] == "corrupt"]
    assert {row["how"] for row in rows} == set(demo_pool.HOWS["corrupt"])
    for row in rows:
        with pytest.raises(Unreadable):
            open_rgb(io.BytesIO(demo_pool.file_bytes(row, 0, SIZE)))
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
    labels, captions = (table(pool / f"{name}.csv") for name in ("labels", "captions"))
    truth = {row["path"]: row for row in table(pool / "truth.csv")}
    assert {truth[row["path"]]["kind"] for row in labels} == set(demo_pool.GOOD)
    for row in labels:
        assert all(row[key] == truth[row["path"]][key] for key in ("body", "colour", "make", "pid", "camid"))
        assert row["colour"] in row["caption"]
    splits = {split: {r["pid"] for r in labels if r["split"] == split} for split in ("train", "val")}
    assert splits["train"] and splits["val"] and not splits["train"] & splits["val"]
    extra = {row["path"] for row in captions} - {row["path"] for row in labels}
    assert {truth[path]["kind"] for path in extra} == {"non_vehicle"}
    leaked, others = (
        {r["pid"] for r in truth.values() if r["kind"].startswith("leak_") == is_leak} for is_leak in (1, 0)
    )
    test = {str(row["pid"]) for row in demo_pool.plan(NUM, 0) if row["kind"] == "benchmark"}
    assert leaked and leaked <= test and not others & test


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
    first, again, other = (demo_pool.draw_other(subject, 0, number, 40) for number in (3, 3, 11))
    assert first.size == (40, 40) and first.mode == "RGB" and np.asarray(first).std() > 2
    assert first.tobytes() == again.tobytes() != other.tobytes()


# the re-identification set and published layouts of it

STYLES = {
    "veri776": "veri776",
    "vehicleid": "vehicleid",
    "old": "veriwild",
    "old_headless": "veriwild",
    "new": "veriwild",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """style -> folder."""
    root = tmp_path_factory.mktemp("sets")
    for style, layout in STYLES.items():
        write_demo_reid(root / style, layout, style=style, train_ids=6, test_ids=6, images_per_id=7, size=16)
    return {style: root / style for style in STYLES}


def test_veri_is_read_as_planned(sets):
    data = read_reid(sets["veri776"])
    query, gallery = data.tests["test"]
    assert (data.name, data.classes, len(data.pid_names)) == ("veri776", 6, 12)
    assert (len(data.train), len(query), len(gallery)) == (42, 12, 42)
    cameras = {camera - 1 for camera in reid.CAMERA_NUMBERS}
    assert set(data.train.camids) <= cameras and set(gallery.camids) <= cameras and 19 in cameras
    assert data.train.viewids[-1] == -1 and (data.train.viewids[:-1] >= 0).all()
    assert (query.viewids >= 0).all() and set(gallery.viewids) == set(range(8))
    assert any(note.startswith("1 images have no viewpoint") for note in data.notes)
    assert sorted(map(int, data.pid_names)) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    assert not set(data.train.pids) & set(gallery.pids)
    for path in query.paths:  # copied out of the gallery
        assert path.read_bytes() == (sets["veri776"] / "image_test" / path.name).read_bytes()


def test_vehicleid_is_read_as_planned(sets):
    data = read_reid(sets["vehicleid"])
    assert (data.name, data.classes, len(data.train)) == ("vehicleid", 6, 42)
    pids = {size: set(images.pids) for size, (images, _) in data.tests.items()}
    assert {size: len(found) for size, found in pids.items()} == {"800": 3, "1600": 4, "2400": 5}
    assert not any(pids[a] <= pids[b] for a in pids for b in pids if a != b)
    for size, (images, gallery) in data.tests.items():
        per_id = Counter(images.pids.tolist())
        assert gallery is None and set(images.camids) == set(images.viewids) == {-1}
        assert set(per_id.values()) == ({7} if size == "800" else {2, 7})
        kept, asked = draw_gallery(images.pids, 0, 0)
        assert len(kept) == len(per_id) and len(asked) == len(images) - len(per_id)
    assert not any("can only be distractors" in note for note in data.notes)


def test_veriwild_is_read_as_planned_in_all_styles(sets):
    old, headless, new = (read_reid(sets[name]) for name in ("old", "old_headless", "new"))
    for other in (headless, new):
        assert other.pid_names == old.pid_names and other.classes == old.classes == 6
        for one, two in zip([old.train, *sum(old.tests.values(), ())], [other.train, *sum(other.tests.values(), ())]):
            assert list(map(one.paths.relative, range(len(one)))) == list(map(two.paths.relative, range(len(two))))
            for column in ("pids", "camids", "viewids"):
                assert (getattr(one, column) == getattr(two, column)).all()
    assert not any("left its gallery" in note for note in old.notes)
    assert any("6 images of the test list are queries" in note for note in new.notes)
    assert sorted(set(Counter(old.train.pids.tolist()).values())) == [1, 7]
    before = set()
    for size, ids in (("3000", 3), ("5000", 4), ("10000", 6)):
        query, gallery = old.tests[size]
        assert len(query) == len(set(query.pids)) == ids and len(gallery) == 6 * ids
        assert set(query.pids) == set(gallery.pids) > before
        before = set(query.pids)


def test_the_test_set_does_not_change_with_the_number_of_training_vehicles():
    few, many = ([row for row in reid.plan(count, 20, 6, 0) if row["split"] != "train"] for count in (5, 60))
    assert few == many and len({row["pid"] for row in few}) == 20
    with pytest.raises(InputError, match="--train_ids 1490 and --test_ids 11: must be 1500 or less together"):
        reid.plan(1490, 11, 6, 0)
