"""The drawn pictures: repeatable, labelled as drawn, told apart by colour and body; sets that appear whole."""

import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from demo import draw, folder
from demo.scene import render_place
from demo.seg import plan as plan_parts
from demo.seg import write_demo_parts
from demo.vehicle import BODIES, CAMERAS, COLUMNS, VIEWS, captions, vehicle
from util.errors import InputError

NUM = 64


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "set"
    return output, draw.write_demo(output, num_images=NUM, size=32, processes=1)


def pixels(*ids, size=48):
    return np.asarray(draw.render(*ids, size=size), dtype=float)


def body_colour(pid):
    """Median RGB of the door in the side views of the daylight cameras."""
    crops = [pixels(0, pid, camid, view, 0)[25:33, 14:34] for camid in (0, 3) for view in (0, 1)]
    return np.median(np.concatenate([crop.reshape(-1, 3) for crop in crops]), axis=0)


def pids_of(colour):
    plain = [pid for pid in range(1000) if "stripe" not in vehicle(0, pid)["marks"]]
    return [pid for pid in plain if vehicle(0, pid)["colour"] == colour and pid % 10 in (0, 2, 4, 6, 9)][:3]


def test_render_is_a_function_of_its_arguments():
    first = draw.render(3, 7, 1, 4, 2)
    draw.render(3, 8, 1, 4, 2)
    assert first.mode == "RGB" and first.size == (96, 96)
    assert first.tobytes() == draw.render(3, 7, 1, 4, 2).tobytes()
    for other in ((4, 7, 1, 4, 2), (3, 7, 2, 4, 2), (3, 7, 1, 5, 2), (3, 7, 1, 4, 3)):
        assert first.tobytes() != draw.render(*other).tobytes()
    assert draw.render(0, 0, 0, 0, 0, size=(80, 40)).size == (80, 40)


@pytest.mark.parametrize("pid", range(len(BODIES)))
def test_every_body_camera_and_view_draws(pid):
    for viewid in range(len(VIEWS)):
        assert pixels(0, pid, (pid + viewid) % len(CAMERAS), viewid, 0, size=24).std() > 10


@pytest.mark.parametrize("ids, size", [((0, 0, 8, 0, 0), 96), ((0, 0, 0, 6, 0), 96), ((0, -1, 0, 0, 0), 96),
                                       ((0, 0, 0, 0, 0), 8)])  # fmt: skip
def test_unknown_ids_and_small_sizes_are_refused(ids, size):
    with pytest.raises(ValueError, match="must be 0|at least 16"):
        draw.render(*ids, size=size)
    with pytest.raises(ValueError, match="camid must be"):
        render_place(0, 8, 0)


def test_equal_vehicles_differ_in_their_marks():
    seen = [(v["body"], v["colour"], v["marks"]) for v in (vehicle(0, pid) for pid in range(1000))]
    assert len(set(seen)) == len(seen)


def test_captions_name_what_is_drawn():
    attrs = vehicle(0, 3)
    for text in captions(attrs, viewid=2, camid=6):
        assert BODIES[attrs["body"]].word in text and attrs["colour"] in text and "front" in text
        assert ("at night" in text) == (text != captions(attrs, 2, 6)[3])


def test_colour_is_seen_in_the_picture():
    reds, blues = (np.array([body_colour(pid) for pid in pids_of(colour)]) for colour in ("red", "blue"))
    assert (reds[:, 0] - reds[:, 2]).min() > 40 and (blues[:, 2] - blues[:, 0]).min() > 40


def test_bodies_have_outlines_of_their_own():
    xs, ys = np.meshgrid(np.arange(0, 11, 0.1), np.arange(0, 3.5, 0.1))
    found = {}
    for body in BODIES:  # of the side, in cells of 10 cm
        found[body] = np.zeros(xs.shape, bool)
        for slab in draw.slabs(body).values():
            nose, tail = (np.interp(ys, part[:, 1], part[:, 0]) for part in (slab.nose, slab.tail))
            found[body] |= (ys >= slab.y0) & (ys <= slab.y1) & (xs >= nose) & (xs <= tail)
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert (a & b).sum() / (a | b).sum() < 0.96, (one, other)


# parts


def test_pictures_with_masks_of_their_parts():
    picture, mask = draw.render_parts(0, 0, 1, 4, 0, (90, 60))
    assert picture.size == (90, 60) and mask.shape == (60, 90)
    assert set(np.unique(mask)) == {24, 25, 26, 40} and (mask == 24).sum() > 500
    again = np.asarray(draw.render(0, 0, 1, 4, 0, (90, 60)), dtype=int)  # the same but for the mirrors
    differs = np.abs(np.asarray(picture, dtype=int) - again).max(axis=2) > 12
    ys, xs = np.nonzero(mask == 26)
    far = np.ones_like(differs)
    far[max(0, ys.min() - 2) : ys.max() + 3, max(0, xs.min() - 2) : xs.max() + 3] = False
    assert differs.any() and not differs[far].any()


def test_the_drawn_parts_have_sizes_of_their_own_and_a_vehicle_is_in_one_split(tmp_path):
    counts = write_demo_parts(tmp_path / "set", num_images=30, size=40, processes=1)
    for split in ("train", "val", "test"):
        assert len(list(tmp_path.glob(f"set/annotations/{split}/*.png"))) == counts[split] > 0
    sizes = {Image.open(file).size for file in tmp_path.glob("set/images/*/*")}
    assert any(h > w for w, h in sizes) and any(w % 2 for w, h in sizes)
    splits = {}
    for row in plan_parts(300, 96, 0):
        splits.setdefault(row["pid"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())


# folders


def test_labels_match_the_files(drawn):
    output, counts = drawn
    with open(output / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == NUM == counts["images"] == counts["train"] + counts["val"]
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
    shots = [(r["pid"], r["camid"], r["viewid"], r["shot"]) for r in rows]
    assert len(set(shots)) == len(shots)
    assert {row["split"] for row in draw.plan(num_images, seed=0, val_ratio=0)} == {"train"}


def test_two_processes_write_the_same_bytes(drawn, tmp_path):
    output, _ = drawn
    draw.write_demo(tmp_path / "two", num_images=NUM, size=32, processes=2)
    files = sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    assert len(files) == NUM + 2
    for path in files:
        assert (output / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_the_same_set_is_left_and_another_refused(drawn, tmp_path):
    output, counts = drawn
    before = (output / "labels.csv").stat().st_mtime_ns
    again = draw.write_demo(output, num_images=NUM, size=32, processes=1)
    assert counts["written"] and again == {**counts, "written": False}
    assert (output / "labels.csv").stat().st_mtime_ns == before
    (tmp_path / "mine.txt").write_text("keep")
    for target, number in ((output, NUM + 1), (tmp_path, NUM)):
        with pytest.raises(InputError, match="remove it"):
            draw.write_demo(target, num_images=number, size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(row, part):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write_set(tmp_path / "set", "set.json", {}, [{"path": "a/b.jpg"}], fail, print, 1)
    assert not list(tmp_path.iterdir())


def test_the_command_line_reports_one_json_line(tmp_path):
    argv = ["--output", str(tmp_path / "set"), "--num_images", "6", "--size", "24", "--processes", "1"]
    line = draw.main(draw.get_args_parser().parse_args(argv))
    assert line["images"] == 6 and line["written"] and json.loads(json.dumps(line)) == line
    with pytest.raises(SystemExit):
        draw.get_args_parser().parse_args([*argv, "--num_image", "6"])
