"""The drawn sets: pictures are repeatable and show what their labels say, sets appear whole, the planted pool is what
truth.csv says of it."""

import io
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from layouts import veri_view
from PIL import Image

from curation.index import read_rows
from datasets.images import Unreadable, open_rgb
from demo import draw, reid, seg
from demo import pool as demo_pool
from demo.draw import BODIES, label_row, render, vehicle
from demo.scene import CAMERAS, VIEWS
from util.errors import InputError

SETS = {"seg": seg.PARTS, "pool": demo_pool.POOL, "reid": reid.VERI}


def test_a_picture_is_a_function_of_its_arguments():
    first = render(3, 7, 1, 4, 2)
    for other in ((4, 7, 1, 4, 2), (3, 8, 1, 4, 2), (3, 7, 2, 4, 2), (3, 7, 1, 5, 2), (3, 7, 1, 4, 3)):
        assert first.tobytes() != render(*other).tobytes()
    assert first.mode == "RGB" and first.size == (96, 96) and first.tobytes() == render(3, 7, 1, 4, 2).tobytes()
    assert render(0, 0, 0, 0, 0, size=(80, 40)).size == (80, 40)
    for pid, viewid in itertools.product(range(len(BODIES)), range(len(VIEWS))):
        assert np.asarray(render(0, pid, (pid + viewid) % len(CAMERAS), viewid, 0, size=24)).std() > 10


def test_captions_and_colours_are_those_drawn_and_marks_tell_equal_vehicles_apart():
    row, seen = label_row(0, 3, 0), [vehicle(0, pid) for pid in range(1000)]
    assert row["caption"].split()[1:3] == [row["colour"], BODIES[row["body"]].word]
    assert VIEWS[row["viewid"]] in row["caption"]
    assert len({(v["body"], v["colour"], v["marks"]) for v in seen}) == len(seen)
    for colour, more, less in (("red", 0, 2), ("blue", 2, 0)):
        cars = (pid for pid, v in enumerate(seen) if v["colour"] == colour and pid % 10 in (0, 2, 4, 6, 9))
        for pid in itertools.islice((pid for pid in cars if "stripe" not in seen[pid]["marks"]), 3):
            views = [render(0, pid, camid, view, 0, 48) for camid in (0, 3) for view in (0, 1)]
            doors = np.median([np.asarray(view)[25:33, 14:34] for view in views], axis=(0, 1, 2))
            assert doors[more] - doors[less] > 40


def test_pictures_with_masks_of_their_parts(tmp_path):
    p = draw.draw_vehicle(0, 0, 1, 4, 0, (90, 60), with_mask=True)
    picture, mask = np.asarray(p.record(), dtype=int), p.part_ids()
    assert set(np.unique(mask)) == {24, 25, 26, 40} and (mask == 24).sum() > 500 and mask.shape == (60, 90)
    differs = np.abs(picture - np.asarray(render(0, 0, 1, 4, 0, (90, 60)), dtype=int)).max(axis=2) > 12
    (ys, xs), near = np.nonzero(differs), np.nonzero(mask == 26)  # the same but for the mirrors
    for found, mirror in zip((ys, xs), near):
        assert mirror.min() - 3 < found.min() and found.max() < mirror.max() + 3
    counts = seg.PARTS.write(tmp_path / "set", num_images=30, size=40, processes=1)["counts"]
    for split in ("train", "val", "test"):
        assert len(list(tmp_path.glob(f"set/annotations/{split}/*.png"))) == counts[split] > 0
    sizes = {Image.open(file).size for file in tmp_path.glob("set/images/*/*")}
    assert any(h > w for w, h in sizes) and any(w % 2 for w, h in sizes)
    assert len({row["pid"] for row in seg.plan(300, 0)}) == len({(r["pid"], r["split"]) for r in seg.plan(300, 0)})


def test_two_processes_write_the_same_bytes_and_the_same_set_is_left(tmp_path):
    flags, write = {"train_ids": 5, "test_ids": 5, "images_per_id": 6, "size": 16}, reid.VERI.write
    result = write(tmp_path / "one", processes=1, **flags)
    write(tmp_path / "two", processes=2, **flags)
    files = sorted(path.relative_to(tmp_path / "one") for path in tmp_path.glob("one/**/*") if path.is_file())
    assert len(files) == result["images"] + result["counts"]["query"] + 1
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)
    before = (tmp_path / "one" / files[0]).stat().st_mtime_ns
    assert write(tmp_path / "one", processes=1, **flags) == {**result, "written": False} and result["written"]
    assert (tmp_path / "one" / files[0]).stat().st_mtime_ns == before
    for target, seed in ((tmp_path / "one", 1), (tmp_path, 0)):
        with pytest.raises(InputError, match="remove it"):
            write(target, **flags, seed=seed)
    with pytest.raises(TypeError):
        seg.PARTS._replace(draw=None).write(tmp_path / "three", processes=1)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary folder left, nothing of the one that failed


@pytest.mark.parametrize("name", SETS)
def test_command_lines_hold_the_settings_and_refuse_the_smallest(name, tmp_path):
    args = vars(SETS[name].parser(name, "").parse_args(["--output", str(tmp_path / "set")]))
    for flag, (default, least, _) in SETS[name].flags.items():
        assert args[flag] == default
        with pytest.raises(InputError, match=f"--{flag} {least - 1}: must be {least} or more"):
            SETS[name].write(tmp_path / "set", **{flag: least - 1})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """(folder, rows of truth.csv by path)."""
    folder = tmp_path_factory.mktemp("pool") / "set"
    demo_pool.POOL.write(folder, num_images=112, size=32, processes=1)
    return folder, {row["path"]: row for row in read_rows(folder / "truth.csv")}


def test_truth_counts_every_file(pool):
    folder, truth = pool
    assert truth.keys() == {p.relative_to(folder).as_posix() for p in folder.glob("photos/**/*") if p.is_file()}
    counts = Counter(row["kind"] for row in truth.values())
    assert json.loads((folder / "pool.json").read_text())["counts"] == {**counts, "benchmark": 4}
    assert set(counts) == set(demo_pool.SHARES) and len(truth) == 112
    for row in truth.values():
        assert bool(row["body"]) == (row["kind"] not in ("corrupt", "non_vehicle")), row
        assert not row["of"] or (folder / row["of"]).is_file()
        if row["of"] and row["kind"] != "track":
            assert row["of"].startswith("benchmark/") == row["kind"].startswith("leak_")


def test_copies_are_equal_byte_for_byte_or_in_their_pixels_alone_or_look_alike(pool):
    folder, truth = pool
    hows = {"pixel_copy": set(), "near_copy": set()}
    for row in truth.values():
        if row["of"] and row["kind"] != "track":
            (one, a), (two, b) = ((folder / row[key], open_rgb(folder / row[key])) for key in ("path", "of"))
            assert (one.read_bytes() == two.read_bytes()) == (row["kind"] in ("exact_copy", "leak_exact"))
            assert (a.tobytes() == b.tobytes()) == (row["kind"] not in ("near_copy", "leak_near"))
            hows.get(row["kind"], set()).add(row["how"])
            small = [np.asarray(picture.resize((8, 8), Image.Resampling.BOX)).ravel() for picture in (a, b)]
            assert np.corrcoef(small)[0, 1] > 0.8
    assert hows == {kind: set(demo_pool.HOWS[kind]) for kind in hows}
    track = [row for row in truth.values() if row["kind"] == "track"]
    assert len({(row["pid"], row["camid"]) for row in track}) == 1 == sum(not row["of"] for row in track)
    frames = [np.asarray(open_rgb(folder / path), dtype=float) for path in sorted(row["path"] for row in track)]
    steps = [np.abs(a - b).mean() for a, b in itertools.pairwise(frames)]
    assert len(frames) > 5 and 0 < min(steps) and np.median(steps) < 12


def test_corrupt_files_alone_cannot_be_read(pool):
    """How poor the others are, curation tells: tests/test_curate.py."""
    assert all(open_rgb(pool[0] / path).mode == "RGB" for path, row in pool[1].items() if row["kind"] != "corrupt")
    rows = [row for row in demo_pool.plan(400, seed=0) if row["kind"] == "corrupt"]
    assert {row["how"] for row in rows} == set(demo_pool.HOWS["corrupt"])
    for row in rows:
        with pytest.raises(Unreadable):
            open_rgb(io.BytesIO(demo_pool.file_bytes(row, 0, 32)))


def test_tables_hold_good_files_and_no_vehicle_of_the_benchmark(pool):
    folder, truth = pool
    labels, captions = (list(read_rows(folder / f"{name}.csv")) for name in ("labels", "captions"))
    assert {truth[row["path"]]["kind"] for row in labels} == set(demo_pool.GOOD)
    for row in labels:
        assert all(row[key] == truth[row["path"]][key] for key in ("body", "colour", "make", "pid", "camid"))
    train, val = ({r["pid"] for r in labels if r["split"] == split} for split in ("train", "val"))
    assert train and val and not train & val
    extra = {row["path"] for row in captions} - {row["path"] for row in labels}
    assert {truth[path]["kind"] for path in extra} == {"non_vehicle"}
    leaked, others = ({r["pid"] for r in truth.values() if (r["kind"][:4] == "leak") == leak} for leak in (1, 0))
    test = {str(row["pid"]) for row in demo_pool.plan(112, 0) if row["kind"] == "benchmark"}
    assert leaked and leaked <= test and not others & test


def test_the_tail_is_long_and_seeds_differ():
    rows = [row for row in demo_pool.plan(4000, seed=0) if row["kind"] == "clean"]
    counts = sorted(Counter((row["body"], row["colour"]) for row in rows).values())
    assert len(counts) == 100 and counts[0] >= 3 and counts[-1] >= 10 * np.median(counts)
    assert 0.12 < counts[-1] / sum(counts) < 0.18 and len({row["pid"] for row in rows}) > 400
    assert demo_pool.share_out(10, [1, 1, 2]) == [3, 2, 5] and demo_pool.plan(100, 0) != demo_pool.plan(100, 1)
    for subject in demo_pool.SUBJECTS:
        first, again, other = (demo_pool.draw_other(subject, 0, number, 40) for number in (3, 3, 11))
        assert first.size == (40, 40) and first.mode == "RGB" and np.asarray(first).std() > 2
        assert first.tobytes() == again.tobytes() != other.tobytes()


def test_the_test_set_does_not_change_and_views_are_those_that_are_drawn():
    few, many = ([row for row in reid.plan(count, 20, 6, 0) if row["split"] != "train"] for count in (5, 60))
    assert few == many and len({row["pid"] for row in few}) == 20
    with pytest.raises(InputError, match="--train_ids 1490 and --test_ids 11: must be 1500 or less together"):
        reid.plan(1490, 11, 6, 0)
    from_nose = (0, 180, 270, 318, 222, 90, 42, 138)  # by VeRi's view; 90 is the right side
    for row in (rows := reid.plan(5, 5, 12, 1)[::4]):
        p = draw.draw_vehicle(1, row["pid"], row["camid"], row["viewid"], row["shot"], 16)
        off = math.degrees(math.atan2(p.sin, p.cos)) - from_nose[veri_view(row, 1)]
        assert abs((off + 180) % 360 - 180) <= 14
    assert {veri_view(row, 1) for row in rows} == set(range(8))
