"""The drawn re-identification set, and published layouts of it: readers find what was planned, and nothing else."""

import math
from collections import Counter

import numpy as np
import pytest
from layouts import veri_view, write_demo_reid

from datasets.images import open_rgb
from datasets.reid import read_reid
from demo import reid as demo_reid
from demo import scene as demo_scene
from demo.draw import render
from metrics.reid import draw_gallery
from util.errors import InputError

SETTINGS = {"train_ids": 6, "test_ids": 6, "images_per_id": 7, "size": 16}
TRAIN = 6 * 7
CHOICES = {
    "veri776": ("veri776", "old"),
    "vehicleid": ("vehicleid", "old"),
    "old": ("veriwild", "old"),
    "old_headless": ("veriwild", "old_headless"),
    "new": ("veriwild", "new"),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """name -> folder."""
    root = tmp_path_factory.mktemp("sets")
    for name, (layout, style) in CHOICES.items():
        write_demo_reid(root / name, layout, style=style, **SETTINGS)
    return {name: root / name for name in CHOICES}


def test_veri_is_read_as_planned(sets):
    data = read_reid(sets["veri776"])
    query, gallery = data.tests["test"]
    assert (data.name, data.classes, len(data.pid_names)) == ("veri776", 6, 12)
    assert (len(data.train), len(query), len(gallery)) == (TRAIN, 12, 42)
    cameras = {camera - 1 for camera in demo_reid.CAMERA_NUMBERS}
    assert set(data.train.camids) <= cameras and set(gallery.camids) <= cameras and 19 in cameras
    assert data.train.viewids[-1] == -1 and (data.train.viewids[:-1] >= 0).all()
    assert (query.viewids >= 0).all() and set(gallery.viewids) == set(range(8))
    assert any(note.startswith("1 images have no viewpoint") for note in data.notes)
    assert sorted(map(int, data.pid_names)) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    assert not set(data.train.pids) & set(gallery.pids)
    for images in (data.train, query, gallery):
        assert {open_rgb(path).size for path in images.paths} == {(16, 16)}
    for path in query.paths:  # copied out of the gallery
        twin = sets["veri776"] / "image_test" / path.name
        assert path.read_bytes() == twin.read_bytes()


def test_vehicleid_is_read_as_planned(sets):
    data = read_reid(sets["vehicleid"])
    assert (data.name, data.classes, len(data.train)) == ("vehicleid", 6, TRAIN)
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


def test_views_are_those_that_are_drawn(monkeypatch):
    """`plan` and `render` draw the side of a three-quarter view alike."""
    angles, aim = [], demo_scene.Scene.aim
    monkeypatch.setattr(demo_scene.Scene, "aim", lambda p, *at: (angles.append(math.degrees(at[0])), aim(p, *at)))
    from_nose = (0, 180, 270, 318, 222, 90, 42, 138)  # by VeRi's view; 90 is the right side
    rows = demo_reid.plan(5, 5, 12, 1)[::4]
    for row in rows:
        render(1, row["pid"], row["camid"], row["viewid"], row["shot"], 16)
    off = (np.array(angles) - [from_nose[veri_view(row, 1)] for row in rows] + 180) % 360 - 180
    assert np.abs(off).max() <= 14 and {veri_view(row, 1) for row in rows} == set(range(8))


def test_the_test_set_does_not_change_with_the_number_of_training_vehicles():
    few, many = ([row for row in demo_reid.plan(count, 20, 6, 0) if row["split"] != "train"] for count in (5, 60))
    assert few == many and len({row["pid"] for row in few}) == 20
    with pytest.raises(InputError, match="--train_ids 1490 and --test_ids 11: must be 1500 or less together"):
        demo_reid.plan(1490, 11, 6, 0)
