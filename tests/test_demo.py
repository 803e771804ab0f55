"""The drawn pictures: repeatable, labelled as drawn, told apart by colour and body; sets that appear whole."""

import csv
import itertools

import numpy as np
import pytest
from PIL import Image

from demo import draw, folder, pool, reid, seg
from demo.scene import render_place
from demo.vehicle import BODIES, CAMERAS, COLUMNS, VIEWS, captions, vehicle
from util.errors import InputError

NUM = 64
SETS = {"draw": draw.DEMO, "seg": seg.PARTS, "pool": pool.POOL, "reid": reid.VERI}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "set"
    return output, draw.DEMO.write(output, num_images=NUM, size=32, processes=1)


def pixels(*ids, size=48):
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
        assert pixels(0, pid, (pid + viewid) % len(CAMERAS), viewid, 0, size=24).std() > 10


@pytest.mark.parametrize("ids, size", [((0, 0, 8, 0, 0), 96), ((0, 0, 0, 6, 0), 96), ((0, -1, 0, 0, 0), 96),
                                       ((0, 0, 0, 0, 0), 8)])  # fmt: skip
def test_unknown_ids_and_small_sizes_are_refused(ids, size):
    with pytest.raises(ValueError, match="must be 0|at least 16"):
        draw.render(*ids, size=size)
    with pytest.raises(ValueError, match="camid must be"):
        render_place(0, 8, 0)


def test_captions_name_what_is_drawn_and_marks_tell_equal_vehicles_apart():
    attrs = vehicle(0, 3)
    for text in captions(attrs, viewid=2, camid=6):
        assert BODIES[attrs["body"]].word in text and attrs["colour"] in text and "front" in text
        assert ("at night" in text) == (text != captions(attrs, 2, 6)[3])
    seen = [(v["body"], v["colour"], v["marks"]) for v in (vehicle(0, pid) for pid in range(1000))]
    assert len(set(seen)) == len(seen)


def test_colour_is_seen_in_the_picture():
    for colour, more, less in (("red", 0, 2), ("blue", 2, 0)):
        of = [pid for pid in range(1000) if vehicle(0, pid)["colour"] == colour and pid % 10 in (0, 2, 4, 6, 9)]
        for pid in [pid for pid in of if "stripe" not in vehicle(0, pid)["marks"]][:3]:
            doors = [pixels(0, pid, camid, view, 0)[25:33, 14:34] for camid in (0, 3) for view in (0, 1)]
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
    picture, mask = draw.render_parts(0, 0, 1, 4, 0, (90, 60))
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


def test_labels_match_the_files(drawn):
    output, result = drawn
    with open(output / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == NUM == result["images"] == sum(result["counts"].values())
    assert {row["path"] for row in rows} == {path.relative_to(output).as_posix() for path in output.rglob("*.jpg")}
    for row in rows:
        assert row["path"].startswith(f"images/{row['split']}/{row['body']}/") and row["colour"] in row["caption"]
        assert all(str(vehicle(0, int(row["pid"]))[key]) == row[key] for key in ("body", "colour", "make"))
    with Image.open(output / rows[0]["path"]) as image:
        assert image.size == (32, 32) and image.format == "JPEG"
    assert not [p for p in output.parent.iterdir() if p != output]  # no temporary folder left


@pytest.mark.parametrize("num_images", [60, 250, 1000])
def test_splits_part_identities_and_cameras_overlap(num_images):
    rows = draw.plan(num_images, seed=0, val_ratio=0.25)
    parts = {split: {r["pid"] for r in rows if r["split"] == split} for split in ("train", "val")}
    assert parts["train"] and parts["val"] and not parts["train"] & parts["val"]
    for split in parts:  # both are ImageFolder trees of the same classes
        assert {r["body"] for r in rows if r["split"] == split} == set(BODIES)
    for pid in parts["train"] | parts["val"]:
        assert len({r["camid"] for r in rows if r["pid"] == pid}) >= 3
    assert len({(r["pid"], r["camid"], r["viewid"], r["shot"]) for r in rows}) == len(rows)
    assert {row["split"] for row in draw.plan(num_images, seed=0, val_ratio=0)} == {"train"}


def test_two_processes_write_the_same_bytes_and_the_same_set_is_left(drawn, tmp_path):
    output, result = drawn
    draw.DEMO.write(tmp_path / "two", num_images=NUM, size=32, processes=2)
    files = sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    assert len(files) == NUM + 2
    for path in files:
        assert (output / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    before = (output / "labels.csv").stat().st_mtime_ns
    assert draw.DEMO.write(output, num_images=NUM, size=32, processes=1) == {**result, "written": False}
    assert result["written"] and (output / "labels.csv").stat().st_mtime_ns == before
    for target, number in ((output, NUM + 1), (tmp_path, NUM)):
        with pytest.raises(InputError, match="remove it"):
            draw.DEMO.write(target, num_images=number, size=32)


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(row, part):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write_set(tmp_path / "set", "set.json", {}, [{"path": "a/b.jpg"}], fail, print, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SETS)
def test_command_lines_hold_the_settings_and_refuse_the_smallest(name, tmp_path):
    parser = SETS[name].parser(name, "")
    args = vars(parser.parse_args(["--output", str(tmp_path / "set")]))
    assert {flag: args[flag] for flag in SETS[name].settings} == SETS[name].settings
    for flag, least in SETS[name].least.items():
        with pytest.raises(InputError, match=f"--{flag} {least - 1}: must be {least} or more"):
            SETS[name].write(tmp_path / "set", **{flag: least - 1})
    assert not list(tmp_path.iterdir())
