"""The demo pictures: repeatable, labelled as drawn, and told apart by colour and body."""

import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from demo import draw as demo
from demo import render as demo_render
from demo import vehicle as demo_vehicle

NUM = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "set"
    counts = demo.write_demo(output, num_images=NUM, size=32, processes=1)
    return output, counts


def rows_of(output):
    with open(output / "labels.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixels(*ids, size=48):
    return np.asarray(demo_render.render(*ids, size=size), dtype=float)


def body_colour(pid):
    """Mean RGB of the door region in the side views of the daylight cameras."""
    crops = [pixels(0, pid, camid, view, 0)[25:33, 14:34] for camid in (0, 3) for view in (0, 1)]
    return np.median(np.concatenate([crop.reshape(-1, 3) for crop in crops]), axis=0)


def pids_of(colour, count, bodies=("sedan", "suv", "van", "wagon", "minivan")):
    found = (
        pid
        for pid in range(1000)
        if (v := demo_vehicle.vehicle(0, pid))["colour"] == colour
        and v["body"] in bodies
        and "stripe" not in v["marks"]
    )
    return list(itertools.islice(found, count))


def test_render_is_a_function_of_its_arguments():
    first = demo_render.render(3, 7, 1, 4, 2)
    demo_render.render(3, 8, 1, 4, 2)
    assert first.mode == "RGB" and first.size == (96, 96)
    assert first.tobytes() == demo_render.render(3, 7, 1, 4, 2).tobytes()
    for other in ((4, 7, 1, 4, 2), (3, 7, 2, 4, 2), (3, 7, 1, 5, 2), (3, 7, 1, 4, 3)):
        assert first.tobytes() != demo_render.render(*other).tobytes()


@pytest.mark.parametrize("pid", range(len(demo_vehicle.BODIES)))
def test_every_body_camera_and_view_draws(pid):
    for viewid in range(len(demo_vehicle.VIEWS)):
        camid = (pid + viewid) % len(demo_vehicle.CAMERAS)
        assert pixels(0, pid, camid, viewid, 0, size=24).std() > 10


def test_size_may_be_a_pair():
    assert demo_render.render(0, 0, 0, 0, 0, size=(80, 40)).size == (80, 40)


@pytest.mark.parametrize("ids", [(0, 0, 8, 0, 0), (0, 0, 0, 6, 0), (0, -1, 0, 0, 0)])
def test_unknown_ids_are_refused(ids):
    with pytest.raises(ValueError):
        demo_render.render(*ids)


def test_a_size_too_small_is_refused():
    with pytest.raises(ValueError, match="16 x 16"):
        demo_render.render(0, 0, 0, 0, 0, size=8)


def test_equal_vehicles_differ_in_their_marks():
    seen = [(v["body"], v["colour"], v["marks"]) for v in (demo_vehicle.vehicle(0, pid) for pid in range(1000))]
    assert len(set(seen)) == len(seen)


def test_captions_name_what_is_drawn():
    attrs = demo_vehicle.vehicle(0, 3)
    for text in demo_vehicle.captions(attrs, viewid=2, camid=6):
        assert demo_vehicle.BODIES[attrs["body"]].word in text and attrs["colour"] in text
        assert "front" in text
        assert ("at night" in text) == (text != demo_vehicle.captions(attrs, 2, 6)[3])


def test_labels_match_the_files(folder):
    output, counts = folder
    rows = rows_of(output)
    assert tuple(rows[0]) == demo.COLUMNS
    assert len(rows) == NUM == counts["images"] == counts["train"] + counts["val"]
    files = {str(path.relative_to(output).as_posix()) for path in output.rglob("*.jpg")}
    assert {row["path"] for row in rows} == files
    for row in rows:
        assert row["path"].startswith(f"images/{row['split']}/{row['body']}/")
        attrs = demo_vehicle.vehicle(0, int(row["pid"]))
        assert all(str(attrs[key]) == row[key] for key in ("body", "colour", "make"))
        assert row["colour"] in row["caption"]
    with Image.open(output / rows[0]["path"]) as image:
        assert image.size == (32, 32) and image.format == "JPEG"
    assert not [p for p in output.parent.iterdir() if p != output]  # no temporary folder left


@pytest.mark.parametrize("num_images", [60, 250, 1000])
def test_splits_part_identities_and_cameras_overlap(num_images):
    rows = demo._plan(num_images, seed=0, val_ratio=0.25)
    parts = {split: {r["pid"] for r in rows if r["split"] == split} for split in ("train", "val")}
    assert parts["train"] and parts["val"] and not parts["train"] & parts["val"]
    for split in parts:  # both are ImageFolder trees of the same classes
        assert {r["body"] for r in rows if r["split"] == split} == set(demo_vehicle.BODIES)
    for pid in parts["train"] | parts["val"]:
        assert len({r["camid"] for r in rows if r["pid"] == pid}) >= 3
    shots = [(r["pid"], r["camid"], r["viewid"], r["shot"]) for r in rows]
    assert len(set(shots)) == len(shots)


def test_no_validation_share_keeps_everything_in_train():
    assert {row["split"] for row in demo._plan(60, seed=0, val_ratio=0)} == {"train"}


def test_two_processes_write_the_same_bytes(folder, tmp_path):
    output, _ = folder
    demo.write_demo(tmp_path / "two", num_images=NUM, size=32, processes=2)
    files = sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    assert len(files) == NUM + 2
    for path in files:
        assert (output / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_the_same_set_is_left_and_another_refused(folder, tmp_path):
    output, counts = folder
    before = (output / "labels.csv").stat().st_mtime_ns
    again = demo.write_demo(output, num_images=NUM, size=32, processes=1)
    assert counts["written"] and again == {**counts, "written": False}
    assert (output / "labels.csv").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="remove it"):
        demo.write_demo(output, num_images=NUM + 1, size=32)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="remove it"):
        demo.write_demo(tmp_path, num_images=NUM, size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(demo, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.write_demo(tmp_path / "set", num_images=4, size=32, processes=1)
    assert not list(tmp_path.iterdir())


def test_colour_is_seen_in_the_picture():
    reds = np.array([body_colour(pid) for pid in pids_of("red", 3)])
    blues = np.array([body_colour(pid) for pid in pids_of("blue", 3)])
    assert (reds[:, 0] - reds[:, 2]).min() > 40
    assert (blues[:, 2] - blues[:, 0]).min() > 40


def test_bodies_have_outlines_of_their_own():
    def outline(body):  # of the side, in cells of 10 cm
        slabs = demo_render._slabs(body).values()
        xs, ys = np.meshgrid(np.arange(0, 11, 0.1), np.arange(0, 3.5, 0.1))
        inside = np.zeros(xs.shape, bool)
        for slab in slabs:
            nose, tail = (np.interp(ys, part[:, 1], part[:, 0]) for part in (slab.nose, slab.tail))
            inside |= (ys >= slab.y0) & (ys <= slab.y1) & (xs >= nose) & (xs <= tail)
        return inside

    for one, other in itertools.combinations(demo_vehicle.BODIES, 2):
        a, b = outline(one), outline(other)
        assert (a & b).sum() / (a | b).sum() < 0.96, (one, other)


def test_the_command_line_reports_one_json_line(tmp_path, monkeypatch, capsys):
    argv = [
        "demo",
        "--output",
        str(tmp_path / "set"),
        "--num_images",
        "6",
        "--size",
        "24",
        "--processes",
        "1",
        "--sheet",
        str(tmp_path / "sheet.png"),
    ]
    monkeypatch.setattr("sys.argv", argv)
    demo.main()
    line = json.loads(capsys.readouterr().out)
    assert line["images"] == 6 and line["written"] and line["seconds"] >= 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (24 * len(demo_vehicle.CAMERAS), 24 * len(demo_vehicle.VIEWS))
