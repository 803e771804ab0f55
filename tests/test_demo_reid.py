"""The drawn re-identification set: its readers find in every layout what was planned, and nothing else."""

import csv
import functools
import json
import math
import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
import pytest
import torch

from datasets.images import open_rgb
from datasets.reid import read_reid
from demo import reid as demo_reid
from demo import render as demo_render
from demo.vehicle import vehicle
from metrics.protocols import draw_gallery, protocols_of
from metrics.reid import rank_hits
from util.errors import InputError

SETTINGS = {"train_ids": 6, "test_ids": 6, "images_per_id": 7, "size": 16}
IMAGES, TRAIN = 12 * 7, 6 * 7
CHOICES = {
    "veri776": {"layout": "veri776"},
    "vehicleid": {"layout": "vehicleid"},
    "old": {"layout": "veriwild"},
    "old_headless": {"layout": "veriwild", "style": "old_headless"},
    "new": {"layout": "veriwild", "style": "new"},
    "table": {"layout": "table"},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """name -> (folder, counts); a picture that several layouts show is drawn once."""
    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_reid, "render", functools.cache(demo_render.render))
        return {
            name: (root / name, demo_reid.write_demo_reid(root / name, **choice, **SETTINGS, processes=1))
            for name, choice in CHOICES.items()
        }


def read(sets, name):
    folder, _ = sets[name]
    return read_reid(folder / "labels.csv" if name == "table" else folder)


def lines(file):
    return file.read_text().splitlines()


def attributes(folder, part):
    """The items of <part>_label.xml; the parser knows no gb2312, so the text is decoded first."""
    file = folder / f"{part}_label.xml"
    with pytest.raises(ValueError, match="multi-byte"):
        ET.parse(file)
    items = ET.fromstring(file.read_text(encoding="gb2312")).find("Items")
    assert int(items.get("number")) == len(items)
    return [item.attrib for item in items]


def identity(data, images):
    return [data.pid_names[pid] for pid in images.pids]


def test_veri_is_read_as_planned(sets):
    folder, counts = sets["veri776"]
    data = read(sets, "veri776")
    query, gallery = data.tests["test"]
    assert (data.name, data.classes, len(data.pid_names)) == ("veri776", 6, 12)
    assert (len(data.train), len(query), len(gallery)) == (TRAIN, 12, 42)
    assert counts == {"images": IMAGES, "train_ids": 6, "test_ids": 6, "cameras": 8, "train": TRAIN,
                      "query": 12, "gallery": 42, "written": True}  # fmt: skip
    cameras = {camera - 1 for camera in demo_reid.CAMERA_NUMBERS["veri776"]}
    assert set(data.train.camids) <= cameras and set(gallery.camids) <= cameras and 19 in cameras
    assert data.train.viewids[-1] == -1 and (data.train.viewids[:-1] >= 0).all()
    assert (query.viewids >= 0).all() and set(gallery.viewids) == set(range(8))
    assert any(note.startswith("1 images have no viewpoint") for note in data.notes)
    assert sorted(map(int, data.pid_names)) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    assert not set(data.train.pids) & set(gallery.pids)
    for images in (data.train, query, gallery):
        assert {open_rgb(path).size for path in images.paths} == {(16, 16)}


def test_veri_queries_are_copied_into_the_gallery(sets):
    folder, _ = sets["veri776"]
    names = {part: lines(folder / f"name_{part}.txt") for part in ("train", "query", "test")}
    for part, listed in names.items():
        assert sorted(file.name for file in (folder / f"image_{part}").iterdir()) == sorted(listed)
    for name in names["query"]:
        assert (folder / "image_query" / name).read_bytes() == (folder / "image_test" / name).read_bytes()
    assert not set(names["train"]) & set(names["test"])
    points = lines(folder / "keypoint_train.txt") + lines(folder / "keypoint_test.txt")
    assert {len(line.split()) for line in points} == {42} and len(points) == IMAGES - 1
    tracks = [line.split() for line in lines(folder / "test_track.txt")]
    assert all(track[0] == track[1] for track in tracks)
    assert sorted(name for track in tracks for name in track[1:]) == names["test"]
    assert len({name[:9] for name in names["test"]}) == len(tracks)


def test_veri_indices_agree_with_the_rule(sets):
    folder, _ = sets["veri776"]
    queries, test = lines(folder / "name_query.txt"), lines(folder / "name_test.txt")
    good, junk = (
        [[test[int(index) - 1] for index in line.split()] for line in lines(folder / f"{name}_index.txt")]
        for name in ("gt", "jk")
    )
    assert len(good) == len(junk) == len(queries)
    for name, counted, left in zip(queries, good, junk):
        (pid, cam), others = name.split("_")[:2], [other.split("_")[:2] for other in test]
        assert counted == [x for x, (p, c) in zip(test, others) if p == pid and c != cam]
        assert left == [x for x, (p, c) in zip(test, others) if p == pid and c == cam]
        assert counted and name in left and len(left) > 1
    query, gallery = read(sets, "veri776").tests["test"]
    q, g = torch.randn(len(query), 4), torch.randn(len(gallery), 4)
    ranks = rank_hits(q, g, query.pids, gallery.pids, query.camids, gallery.camids)
    assert ranks.counts().tolist() == [len(counted) for counted in good]
    assert all(
        ranks.hits[ranks.offsets[i] : ranks.offsets[i + 1]].max() <= len(test) - len(left)
        for i, left in enumerate(junk)
    )


def test_veri_attributes_are_in_range_and_true(sets):
    folder, _ = sets["veri776"]
    colours, types = (dict(line.split() for line in lines(folder / f"list_{k}.txt")) for k in ("color", "type"))
    assert list(colours) == [str(i) for i in range(1, 11)] and list(types) == [str(i) for i in range(1, 10)]
    rows = {row["name"]: row for row in demo_reid.plan("veri776", 6, 6, 7, 0)}
    for part in ("train", "test"):
        items = attributes(folder, part)
        assert [item["imageName"] for item in items] == lines(folder / f"name_{part}.txt")
        for item in items:
            row = rows[item["imageName"]]
            assert item["imageName"].startswith(f"{item['vehicleID']}_{item['cameraID']}_")
            found = colours[item["colorID"]], types[item["typeID"]]
            assert found == tuple(demo_reid.VERI_WORDS.get(row[k], row[k]) for k in ("colour", "body"))


def test_vehicleid_is_read_as_planned(sets):
    folder, counts = sets["vehicleid"]
    data = read(sets, "vehicleid")
    assert (data.name, data.classes, len(data.train)) == ("vehicleid", 6, TRAIN)
    pids = {size: set(images.pids) for size, (images, _) in data.tests.items()}
    assert {size: len(found) for size, found in pids.items()} == {"800": 3, "1600": 4, "2400": 5}
    assert not any(pids[a] <= pids[b] for a in pids for b in pids if a != b)
    for size, (images, gallery) in data.tests.items():
        per_id = Counter(images.pids.tolist())
        assert gallery is None and set(images.camids) == set(images.viewids) == {-1}
        assert set(per_id.values()) == ({7} if size == "800" else {2, 7}) and len(images) == counts[f"test_{size}"]
        kept, asked = draw_gallery(images, 0, 0)
        assert len(kept) == len(per_id) and len(asked) == len(images) - len(per_id)
    assert not any("can only be distractors" in note for note in data.notes) and counts["cameras"] == 0


def test_vehicleid_attributes_are_true_where_there_are_any(sets):
    folder, counts = sets["vehicleid"]
    owner = dict(line.split() for line in lines(folder / "attribute" / "img2vid.txt"))
    assert len(owner) == counts["images"] and set(owner) == {f.stem for f in (folder / "image").iterdir()}
    rows = {str(row["number"]): row for row in demo_reid.plan("vehicleid", 6, 6, 7, 0)}
    assert set(owner.values()) == set(rows)
    for kind, size in (("model", 80), ("color", 7)):
        names = {i: name for name, i in map(str.split, lines(folder / "attribute" / f"{kind}_names.txt"))}
        assert list(names) == [str(i) for i in range(size)]
        for vid, i in map(str.split, lines(folder / "attribute" / f"{kind}_attr.txt")):
            row = rows[vid]
            assert names[i] == (row["colour"] if kind == "color" else f"{row['make']}_{row['body']}")


def test_veriwild_styles_are_the_same_set(sets):
    old, headless, new = (read(sets, name) for name in ("old", "old_headless", "new"))
    for other in (headless, new):
        assert other.pid_names == old.pid_names and other.classes == old.classes == 6
        for one, two in zip([old.train, *sum(old.tests.values(), ())], [other.train, *sum(other.tests.values(), ())]):
            assert list(map(one.paths.relative, range(len(one)))) == list(map(two.paths.relative, range(len(two))))
            for column in ("pids", "camids", "viewids"):
                assert (getattr(one, column) == getattr(two, column)).all()
    assert not any("left its gallery" in note for note in old.notes)
    assert any("6 images of the test list are queries" in note for note in new.notes)
    first = {name: lines(sets[name][0] / "train_test_split" / "vehicle_info.txt")[0] for name in ("old", "new")}
    assert set(first.values()) == {"id/image;Camera ID;Time;Model;Type;Color"}
    label = [line.split()[1] for line in lines(sets["new"][0] / "train_test_split" / "train_list_start0.txt")]
    assert sorted(set(map(int, label))) == list(range(6))


def test_veriwild_is_read_as_planned(sets):
    _, counts = sets["old"]
    data = read(sets, "old")
    per_id = Counter(data.train.pids.tolist())
    assert sorted(set(per_id.values())) == [1, 7] and counts["train"] == len(data.train) < TRAIN
    before = set()
    for size, ids in (("3000", 3), ("5000", 4), ("10000", 6)):
        query, gallery = data.tests[size]
        assert len(query) == len(set(query.pids)) == ids and len(gallery) == 6 * ids
        assert set(query.pids) == set(gallery.pids) > before
        before = set(query.pids)
        for pid, camid in zip(query.pids, query.camids):
            cameras = gallery.camids[gallery.pids == pid]
            assert camid in cameras and (cameras != camid).any()
    used = set(data.train.camids) | set(gallery.camids)
    assert used <= set(demo_reid.CAMERA_NUMBERS["veriwild"]) and max(used) == 174


def test_table_is_read_as_planned(sets):
    folder, counts = sets["table"]
    data = read(sets, "table")
    query, gallery = data.tests["test"]
    assert (len(data.train), len(query), len(gallery)) == (TRAIN, 12, 30) and data.classes == 6
    assert len(set(data.train.camids) | set(gallery.camids)) == counts["cameras"] == 8
    assert protocols_of(data)["test"].remove_same_camera
    with open(folder / "labels.csv", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert set(rows[0]) == {"path", "pid", "camid", "viewid", "split"} and len(rows) == IMAGES
    assert {row["viewid"] for row in rows} == set("01234567")


def test_one_seed_shows_the_same_pictures_in_every_layout(sets):
    """By identity: the bytes of all its pictures, as far as a layout has them."""
    shown = {}
    for name in CHOICES:
        data = read(sets, name)
        shown[name] = {}
        for images in [data.train, *(part for pair in data.tests.values() for part in pair if part)]:
            for pid, path in zip(identity(data, images), images.paths):
                shown[name].setdefault(int(pid), set()).add(path.read_bytes())
    for found in shown.values():
        assert set(found) == set(shown["table"])
        assert all(pictures <= shown["table"][pid] for pid, pictures in found.items())
    assert shown["veri776"] == shown["table"]


def test_vehicles_that_share_body_and_colour_are_in_the_test():
    rows = demo_reid.plan("table", 60, 20, 6, 0)
    for split, groups in (("test", 5), ("train", 15)):
        looks = Counter((r["body"], r["colour"]) for r in rows if r["split"] == split and not r["shot"])
        assert len(looks) == groups and set(looks.values()) == {4}
    test = {row["pid"] for row in rows if row["split"] == "test"}
    assert {r["pid"] for r in demo_reid.plan("table", 5, 20, 6, 0) if r["split"] == "test"} == test
    marks = Counter((v["body"], v["colour"], v["marks"]) for v in (vehicle(0, pid) for pid in {r["pid"] for r in rows}))
    assert set(marks.values()) == {1}


def test_views_are_those_that_are_drawn(monkeypatch):
    """`plan` and `render` draw the side of a three-quarter view alike."""
    angles = []

    class Lens(demo_render._Lens):
        def __init__(self, theta, *rest, roll):
            angles.append(math.degrees(theta))
            super().__init__(theta, *rest, roll)

    monkeypatch.setattr(demo_render, "_Lens", Lens)
    from_nose = (0, 180, 270, 318, 222, 90, 42, 138)  # by VeRi's view; 90 is the right side
    rows = demo_reid.plan("veri776", 5, 5, 12, 1)[::4]
    for row in rows:
        demo_render.render(1, row["pid"], row["camid"], row["viewid"], row["shot"], 16)
    off = (np.array(angles) - [from_nose[row["view"]] for row in rows] + 180) % 360 - 180
    assert np.abs(off).max() <= 14 and {row["view"] for row in rows} == set(range(8))


def test_two_processes_write_the_same_bytes(sets, tmp_path):
    folder, _ = sets["veri776"]
    demo_reid.write_demo_reid(tmp_path / "two", "veri776", **SETTINGS, processes=2)
    one, two = (sorted(file for file in root.rglob("*") if file.is_file()) for root in (folder, tmp_path / "two"))
    assert [f.relative_to(folder) for f in one] == [f.relative_to(tmp_path / "two") for f in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two))
    assert demo_reid.plan("veri776", 6, 6, 7, 1) != demo_reid.plan("veri776", 6, 6, 7, 0)


def test_the_same_set_is_left_and_another_refused(sets, capsys, monkeypatch):
    folder, counts = sets["new"]
    flags = " ".join(f"--{name} {value}" for name, value in SETTINGS.items())
    words = f"x --output {folder} --layout veriwild --style new {flags}"
    monkeypatch.setattr("sys.argv", words.split())
    demo_reid.main()
    line = json.loads(capsys.readouterr().out)
    assert {key: line[key] for key in counts} == {**counts, "written": False}
    with pytest.raises(InputError, match="remove it"):
        demo_reid.write_demo_reid(folder, "veriwild", **SETTINGS, style="old")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_ids": 0}, "5 or more each and 1200 or less together.* got 0, 6, 7 and 16"),
        ({"test_ids": 0}, "got 6, 0, 7 and 16"),
        ({"train_ids": 1200}, "1200 or less together"),
        ({"images_per_id": 5}, "images_per_id 6 or more .* got 6, 6, 5 and 16"),
        ({"size": 8}, "size 16 or more"),
        ({"style": "new"}, "layout table has no style 'new'"),
        ({"layout": "veriwild", "style": "older"}, "no style 'older': veriwild has old, old_headless, new"),
        ({"layout": "market"}, "layout 'market' is unknown: choose one of veri776"),
    ],
)
def test_wrong_settings_have_one_sentence(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        demo_reid.write_demo_reid(tmp_path / "set", **{"layout": "table", **SETTINGS, **change})
    assert not list(tmp_path.iterdir())


def test_a_wrong_flag_stops_with_one_sentence(tmp_path, capsys, monkeypatch):
    words = f"x --output {tmp_path / 'set'} --layout veri776 --style old"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit):
        demo_reid.main()
    assert "layout veri776 has no style 'old'" in capsys.readouterr().err
