"""Re-identification sets in the published layouts, and the protocols that score them."""

import numpy as np
import pytest
import torch

from datasets.reid import read_reid
from metrics.reid import (
    FeatureSet,
    ShownQueries,
    cosine_blocks,
    draw_gallery,
    evaluate,
    protocols_of,
    rank_blocks,
    scores,
)
from util.errors import InputError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def lines(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + "\n")


@pytest.fixture
def veri(tmp_path):
    """Ids with a gap, queries that are also in image_test, a view for one image only."""
    train = [f"{pid:04d}_c{cam:03d}_0001645{k}_0.jpg" for pid in (1, 2, 7) for cam in (1, 20) for k in (0, 1)]
    test = [f"{pid:04d}_c{cam:03d}_0002000{k}_0.jpg" for pid in (5, 9) for cam in (2, 3) for k in (0, 1)]
    query = test[::4]
    for part, names in (("train", train), ("test", test), ("query", query)):
        touch(tmp_path, *(f"image_{part}/{name}" for name in names))
        lines(tmp_path / f"name_{part}.txt", *names)
    lines(tmp_path / "keypoint_train.txt", f"VeRi/image_train/{train[0]} {'-1 ' * 40}6")
    return tmp_path


def test_veri(veri):
    data = read_reid(veri)
    assert data.name == "veri776" and data.classes == 3
    assert data.pid_names == ["0001", "0002", "0007", "0005", "0009"]
    assert sorted(set(data.train.pids)) == [0, 1, 2] and set(data.train.camids) == {0, 19}
    assert data.train.viewids[0] == 6 and (data.train.viewids[1:] == -1).all()
    query, gallery = data.tests["test"]
    assert len(query) == 2 and len(gallery) == 8
    assert str(query.paths[0]).endswith("image_query/0005_c002_00020000_0.jpg")
    assert any("21 images have no viewpoint" in note for note in data.notes)
    assert "smaller than the published set" in data.notes
    (protocol,) = protocols_of(data.name, data.tests).values()
    assert protocol.remove_same_camera and protocol.line().startswith("veri776 (same-camera matches removed")


def test_the_rule_is_the_official_junk_list(veri):
    """Good: same vehicle, other camera; junk: same vehicle, same camera (as gt_index and jk_index say)."""
    data = read_reid(veri)
    query, gallery = data.tests["test"]
    rng = np.random.default_rng(0)
    q, g = (torch.from_numpy(rng.standard_normal((n, 4)).astype(np.float32)) for n in (2, 8))
    ranks = rank_blocks(cosine_blocks(q, g), query.pids, gallery.pids, query.camids, gallery.camids)
    assert ranks.counts().tolist() == [2, 2] and ranks.hits.max() <= 6


@pytest.mark.parametrize("style", ["old", "headless", "new"])
def test_veriwild(tmp_path, style):
    images = {f"{pid:05d}/{pid * 10 + k:06d}": cam for pid in (1, 2, 9) for k, cam in enumerate((3, 174, 60))}
    touch(tmp_path, *(f"images/{name}.jpg" for name in images))
    folder = tmp_path / "train_test_split"
    train = [name for name in images if not name.startswith("00009")]
    test, query = [name for name in images if name.startswith("00009")], ["00009/000090"]
    if style == "new":
        for name, listed in (("train_list_start0", train), ("test_3000_id", test), ("test_3000_id_query", query)):
            lines(folder / f"{name}.txt", *(f"{image}.jpg 9 {images[image]}" for image in listed))
    else:
        header = ["id/image;Camera ID;Time;Model;Type;Color"] if style == "old" else []
        lines(folder / "vehicle_info.txt", *header, *(f"{n};{cam};t;m;t;c" for n, cam in images.items()))
        for name, listed in (("train_list", train), ("test_3000", test), ("test_3000_query", query)):
            lines(folder / f"{name}.txt", *listed)
    data = read_reid(tmp_path)
    assert data.name == "veriwild" and data.classes == 2 and len(data.train) == 6
    assert data.train.camids.tolist() == [3, 174, 60, 3, 174, 60]
    query, gallery = data.tests["3000"]
    assert len(query) == 1 and gallery.camids.tolist() == [174, 60]
    assert any("1 images of the test list are queries" in note for note in data.notes)
    kept, removed = (protocols_of(data.name, data.tests, keep)["3000"] for keep in (True, False))
    assert (removed.name, kept.name) == ("veriwild/3000", "veriwild/3000/same-camera-kept")
    assert kept.line()[-8:] != removed.line()[-8:]


@pytest.fixture
def vehicleid(tmp_path):
    rows = [(f"{i:07d}", 100 + i // 3) for i in range(60)]
    touch(tmp_path, *(f"image/{name}.jpg" for name, _ in rows))
    folder = tmp_path / "train_test_split"
    lines(folder / "train_list.txt", *(f"{name} {pid}" for name, pid in rows[:30]))
    lines(folder / "test_list_800.txt", *(f"{name} {pid}" for name, pid in rows[30:]))
    return tmp_path


def test_vehicleid_draws_one_gallery_image_a_vehicle(vehicleid):
    data = read_reid(vehicleid)
    images, gallery = data.tests["800"]
    protocol = protocols_of(data.name, data.tests)["800"]
    assert gallery is None and protocol.draws == 10 and "10 draws, seed 0" in protocol.line()
    draws = [draw_gallery(images.pids, 0, i) for i in range(10)]
    for kept, asked in draws:
        assert sorted(images.pids[kept]) == sorted(set(images.pids)) and len(kept) + len(asked) == 30
        assert not set(kept) & set(asked)
    assert len({tuple(kept) for kept, _ in draws}) == 10
    assert all((a == b).all() for a, b in zip(draws[3], draw_gallery(images.pids, 0, 3)))
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32))
    images = FeatureSet(features, images.pids, images.camids)
    found = evaluate(protocol, images)
    by_draw = []
    for kept, asked in draws:
        blocks = cosine_blocks(features[asked], features[kept])
        by_draw.append(scores(rank_blocks(blocks, images.pids[asked], images.pids[kept])))
    assert found["R1"] == pytest.approx(np.mean([row["R1"] for row in by_draw]))
    assert found["R1_std"] == pytest.approx(np.std([row["R1"] for row in by_draw])) and found["queries"] == 20


def table(tmp_path, text):
    touch(tmp_path, *(f"{name}.jpg" for name in "abcdef"))
    lines(tmp_path / "own.csv", *text.split())
    return tmp_path / "own.csv"


def test_own_table(tmp_path):
    rows = "path,pid,camid,split a.jpg,x,north,train b.jpg,y,south,train"
    rows += " c.jpg,z,north,query d.jpg,z,south,gallery"
    data = read_reid(table(tmp_path, rows))
    assert data.pid_names == ["x", "y", "z"] and data.classes == 2
    query, gallery = data.tests["test"]
    assert query.camids[0] != gallery.camids[0] and protocols_of(data.name, data.tests)["test"].remove_same_camera
    without = "path,pid,split a.jpg,x,train b.jpg,y,train c.jpg,z,query d.jpg,z,gallery"
    data = read_reid(table(tmp_path, without))
    assert not protocols_of(data.name, data.tests)["test"].remove_same_camera
    assert any("same-camera filter and the camera embedding are off" in note for note in data.notes)
    sets = [FeatureSet(torch.ones(1, 2), images.pids, images.camids) for images in data.tests["test"]]
    assert evaluate(protocols_of(data.name, data.tests)["test"], *sets)["R1"] == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,pid a.jpg,x", "has no column 'split': it has path, pid"),
        ("path,pid,split a.jpg,x,test", "split 'test' is none of train, query, gallery"),
        ("path,pid,split a.jpg,x,train b.jpg,y,query", "no row with split 'gallery'"),
        ("path,pid,split b.jpg,y,query c.jpg,y,gallery", "no training image is listed"),
        ("path,pid,split a.jpg,x,train b.jpg,y,query c.jpg,z,gallery", "1 are of vehicles missing from the gallery"),
        ("path,pid,camid,split a.jpg,x,1,train b.jpg,y,2,query c.jpg,y,2,gallery", "1 have their own camera only"),
        ("path,pid,camid,split a.jpg,x,1,train b.jpg,y,,query c.jpg,y,2,gallery", "1 of 3 rows have no camid"),
        ("path,pid,split q.jpg,x,train r.jpg,y,query s.jpg,y,gallery", "none of the first"),
    ],
)
def test_own_table_with_faults(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_reid(table(tmp_path, text))


def test_broken_sets_have_one_sentence(veri, vehicleid, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_reid(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no layout that is known"):
        read_reid(tmp_path / "empty")
    lines(veri / "name_train.txt", "car.jpg")
    with pytest.raises(InputError, match="line 1 is .car.jpg., not like 0001_c001_.*give a table"):
        read_reid(veri, "veri776")
    lines(vehicleid / "train_test_split" / "train_list.txt", "0000001 5 6")
    with pytest.raises(InputError, match="line 1 is '0000001 5 6', not like 'name id'"):
        read_reid(vehicleid, "vehicleid")
    (vehicleid / "train_test_split" / "train_list.txt").unlink()
    with pytest.raises(InputError, match="train_list.txt does not exist"):
        read_reid(vehicleid, "vehicleid")
    folder = tmp_path / "wild" / "train_test_split"
    lines(folder / "vehicle_info.txt", "00001/000001;3;t;m;t;c")
    lines(folder / "train_list.txt", "00001/000001", "00002/000002")
    lines(folder / "test_3000.txt", "00001/000001")
    lines(folder / "test_3000_query.txt", "00001/000001")
    with pytest.raises(InputError, match="train_list.txt: vehicle_info.txt has no camera for 00002"):
        read_reid(tmp_path / "wild")


def write_table(folder, *rows):
    """Rows `path,pid,split[,camid]`; every file has content of its own, but for what is there already."""
    lines(folder / "own.csv", "path,pid,split" + ",camid" * (rows[0].count(",") > 2), *rows)
    for name in (row.split(",")[0] for row in rows):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{name:>40}")
    return folder / "own.csv"


def test_what_names_no_vehicle_is_neither_class_nor_distractor(tmp_path):
    rows = ["a.jpg,1.0,train", "b.jpg,2.0,train", "c.jpg,-1,train", "d.jpg,,train", "e.jpg,-1.0,train"]
    rows.append("f.jpg,nan,query")
    rows += ["g.jpg,3.0,query", "h.jpg,3,gallery", "i.jpg,-1,gallery", "0000_c1s1_1_1.jpg,0000,gallery"]
    data = read_reid(write_table(tmp_path, *rows, "0000_c2s1_1_1.jpg,0000,train", "0000_c2s1_1_2.jpg,0,query"))
    assert data.pid_names == ["1", "2", "0000", "3"] and data.classes == len(data.train) == 2
    query, gallery = data.tests["test"]
    assert len(query) == 1 and [gallery.paths.relative(i) for i in range(2)] == ["h.jpg", "0000_c1s1_1_1.jpg"]
    assert data.notes[1:4] == ["5 images of vehicle -1 are left out", "2 images of vehicle 0000 are left out",
                              "1 images of vehicle 0000 in the gallery are distractors"]  # fmt: skip


def test_junk_needs_no_camera(tmp_path):
    rows = ["a.jpg,1,train,1.0", "b.jpg,-1,gallery,-1", "c.jpg,2,query,1", "d.jpg,2.0,gallery,2"]
    data = read_reid(write_table(tmp_path, *rows))
    assert data.camera_names == ["1", "2"] and data.tests["test"][1].camids.tolist() == [1]
    with pytest.raises(InputError, match="1 of 5 rows have no camid"):
        read_reid(write_table(tmp_path, *rows, "e.jpg,2,gallery,nan"))


def test_numbers_of_identities_do_not_hang_on_chance(tmp_path):
    names = ["1", "01", "001", "\u0661", "\u00b2", "9" * 5000, "x"]
    rows = [f"{i}.jpg,{name},train" for i, name in enumerate(names)] + ["q.jpg,y,query", "g.jpg,y,gallery"]
    expected = ["001", "01", "1", "9" * 5000, "x", "\u00b2", "\u0661"]
    assert read_reid(write_table(tmp_path, *rows)).pid_names[:7] == expected


@pytest.mark.parametrize("cameras", ["", ",1"])
@pytest.mark.parametrize("how", ["path", "spelling", "link", "copy", "label"])
def test_a_query_never_meets_its_own_file(tmp_path, how, cameras):
    other = {"path": "q.jpg", "spelling": "./q.jpg", "label": "q.jpg"}.get(how, "more/q.jpg")
    rows = [f"{name}.jpg,{name[0]},train{cameras}" for name in ("a", "b")]
    rows += [f"q.jpg,x,query{cameras}", f"{other},{'y' if how == 'label' else 'x'},gallery{cameras}"]
    file = write_table(tmp_path, *rows, f"n.jpg,y,gallery{cameras}", f"r.jpg,x,gallery{cameras and ',2'}")
    if how in ("copy", "link"):
        (tmp_path / other).unlink()
        if how == "copy":
            (tmp_path / other).write_bytes((tmp_path / "q.jpg").read_bytes())
        else:
            (tmp_path / other).symlink_to(tmp_path / "q.jpg")
    data = read_reid(file)
    assert "test test: 1 queries lie in the gallery too, by path or content: none meets its own file" in data.notes
    features = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    sets = [FeatureSet.of(x, images) for x, images in zip(features, data.tests["test"])]
    for keep in (False, True):
        protocol = protocols_of(data.name, data.tests, keep)["test"]
        found = evaluate(protocol, *sets)
        assert (found["R1"], found["mAP"]) == (0, 0.5)  # first n.jpg, of another vehicle, then r.jpg
        assert [card[2] for card in ShownQueries(protocol, *sets, 1, 0).cards(0, 3)] == ["junk", "wrong", "right"]
    with pytest.raises(InputError, match="of 1 queries 1 are of vehicles missing from the gallery"):
        read_reid(write_table(tmp_path, *rows, f"n.jpg,y,gallery{cameras}"))


def test_drawn_galleries_do_not_hold_the_query_again(vehicleid):
    file = vehicleid / "train_test_split" / "test_list_800.txt"
    rows = file.read_text().splitlines()
    lines(file, *rows, *rows[:30:10])  # three are listed twice
    data = read_reid(vehicleid)
    assert "test 800: 3 images are there a second time: where one is a query, the other does not count" in data.notes
    images = data.tests["800"][0]
    x = torch.nn.functional.one_hot(torch.from_numpy(images.files)).float()  # equal for one file alone
    found = evaluate(protocols_of(data.name, data.tests)["800"], FeatureSet.of(x, images))
    assert found["mAP"] < 0.5 and 20 <= found["queries"] < 23
