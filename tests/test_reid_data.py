"""Re-identification sets in the published layouts, and the protocols that score them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.reid import read_reid
from metrics.reid import FeatureSet, ShownQueries, cosine_blocks, draw_gallery, evaluate, protocols_of, rank_blocks
from util.errors import InputError


def touch(root, *names):
    """Files of these names, each with content of its own, but for what is there already."""
    for file in (root / name for name in names):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{file.name:>40}")


def lines(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + "\n")


def write_table(folder, *rows):
    lines(folder / "own.csv", "path,pid,split" + ",camid" * (rows[0].count(",") > 2), *rows)
    touch(folder, *(row.split(",")[0] for row in rows))
    return folder / "own.csv"


@pytest.fixture
def veri(tmp_path):
    """Ids with a gap, queries that are also in image_test, a view for one image only."""
    train = [f"{pid:04d}_c{cam:03d}_0001645{k}_0.jpg" for pid in (1, 2, 7) for cam in (1, 20) for k in (0, 1)]
    test = [f"{pid:04d}_c{cam:03d}_0002000{k}_0.jpg" for pid in (5, 9) for cam in (2, 3) for k in (0, 1)]
    for part, names in (("train", train), ("test", test), ("query", test[::4])):
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
    assert (len(query), len(gallery), query.paths.relative(0)) == (2, 8, "image_query/0005_c002_00020000_0.jpg")
    assert any("21 images have no viewpoint" in note for note in data.notes)
    assert "smaller than the published set" in data.notes
    (protocol,) = protocols_of(data.name, data.tests).values()
    assert protocol.remove_same_camera and protocol.line().startswith("veri776 (same-camera matches removed")
    # the official junk list: good is the same vehicle by another camera, junk by the same (gt_index and jk_index)
    rng = np.random.default_rng(0)
    q, g = (torch.from_numpy(rng.standard_normal((n, 4)).astype(np.float32)) for n in (2, 8))
    ranks = rank_blocks(cosine_blocks(q, g), query.pids, gallery.pids, query.camids, gallery.camids)
    assert ranks.counts().tolist() == [2, 2] and ranks.hits.max() <= 6


@pytest.mark.parametrize("style", ["old", "headless", "new"])
def test_veriwild(tmp_path, style):
    images = {f"{pid:05d}/{pid * 10 + k:06d}": cam for pid in (1, 2, 9) for k, cam in enumerate((3, 174, 60))}
    touch(tmp_path, *(f"images/{name}.jpg" for name in images))
    folder, train, test = tmp_path / "train_test_split", list(images)[:6], list(images)[6:]
    if style == "new":
        for name, listed in (("train_list_start0", train), ("test_3000_id", test), ("test_3000_id_query", test[:1])):
            lines(folder / f"{name}.txt", *(f"{image}.jpg 9 {images[image]}" for image in listed))
    else:
        header = ["id/image;Camera ID;Time;Model;Type;Color"] if style == "old" else []
        lines(folder / "vehicle_info.txt", *header, *(f"{n};{cam};t;m;t;c" for n, cam in images.items()))
        for name, listed in (("train_list", train), ("test_3000", test), ("test_3000_query", test[:1])):
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
    for name, part in (("train_list", rows[:30]), ("test_list_800", rows[30:])):
        lines(tmp_path / "train_test_split" / f"{name}.txt", *(f"{image} {pid}" for image, pid in part))
    return tmp_path


def test_vehicleid_draws_one_gallery_image_a_vehicle(vehicleid):
    data = read_reid(vehicleid)
    images, gallery = data.tests["800"]
    protocol = protocols_of(data.name, data.tests)["800"]
    assert gallery is None and protocol.draws == 10 and "10 draws, seed 0" in protocol.line()
    draws = [draw_gallery(images.pids, 0, i) for i in range(10)]
    for kept, asked in draws:
        assert sorted(images.pids[kept]) == sorted(set(images.pids)) and sorted([*kept, *asked]) == list(range(30))
    assert len({tuple(kept) for kept, _ in draws}) == 10
    assert all((a == b).all() for a, b in zip(draws[3], draw_gallery(images.pids, 0, 3)))
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32))
    sets = FeatureSet(features, images.pids, images.camids)
    found, rule = evaluate(protocol, sets), replace(protocol, draws=0)
    each = [evaluate(rule, sets.take(asked), sets.take(kept))["R1"] for kept, asked in draws]
    assert (found["R1"], found["R1_std"], found["queries"]) == pytest.approx((np.mean(each), np.std(each), 20))


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


def test_own_table(tmp_path):
    rows = ["a.jpg,x,train,north", "b.jpg,y,train,south", "c.jpg,z,query,north", "d.jpg,z,gallery,south"]
    data = read_reid(write_table(tmp_path, *rows))
    assert data.pid_names == ["x", "y", "z"] and data.classes == 2
    query, gallery = data.tests["test"]
    assert query.camids[0] != gallery.camids[0] and protocols_of(data.name, data.tests)["test"].remove_same_camera
    data = read_reid(write_table(tmp_path, *(row.rpartition(",")[0] for row in rows)))
    assert not protocols_of(data.name, data.tests)["test"].remove_same_camera
    assert any("same-camera filter and the camera embedding are off" in note for note in data.notes)
    sets = [FeatureSet(torch.ones(1, 2), images.pids, images.camids) for images in data.tests["test"]]
    assert evaluate(protocols_of(data.name, data.tests)["test"], *sets)["R1"] == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,pid,split a.jpg,x,test", "split 'test' is none of train, query, gallery"),
        ("path,pid,split a.jpg,x,train b.jpg,y,query", "no row with split 'gallery'"),
        ("path,pid,split b.jpg,y,query c.jpg,y,gallery", "no training image is listed"),
        ("path,pid,split a.jpg,x,train b.jpg,y,query c.jpg,z,gallery", "1 are of vehicles missing from the gallery"),
        ("path,pid,camid,split a.jpg,x,1,train b.jpg,y,2,query c.jpg,y,2,gallery", "1 have their own camera only"),
        ("path,pid,camid,split a.jpg,x,1,train b.jpg,y,,query c.jpg,y,2,gallery", "1 of 3 rows have no camid"),
    ],
)
def test_own_table_with_faults(tmp_path, text, message):
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    lines(tmp_path / "own.csv", *text.split())
    with pytest.raises(InputError, match=message):
        read_reid(tmp_path / "own.csv")


def test_broken_sets_have_one_sentence(veri, vehicleid, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("nothing", "does not exist"), ("empty", "has no layout that is known")):
        with pytest.raises(InputError, match=message):
            read_reid(tmp_path / name)
    list_of_ids = vehicleid / "train_test_split" / "train_list.txt"
    for format, file, text, message in (
        ("veri776", veri / "name_train.txt", "car.jpg", ".car.jpg., not like 0001_c001_.*give a table"),
        ("vehicleid", list_of_ids, "0000001 5 6", "'0000001 5 6', not like 'name id'"),
    ):
        lines(file, text)
        with pytest.raises(InputError, match=f"line 1 is {message}"):
            read_reid(tmp_path, format)
    list_of_ids.unlink()
    with pytest.raises(InputError, match="train_list.txt does not exist"):
        read_reid(vehicleid, "vehicleid")
    folder = tmp_path / "wild" / "train_test_split"
    lines(folder / "vehicle_info.txt", "00001/000001;3;t;m;t;c")
    lines(folder / "train_list.txt", "00001/000001", "00002/000002")
    for name in ("test_3000", "test_3000_query"):
        lines(folder / f"{name}.txt", "00001/000001")
    with pytest.raises(InputError, match="train_list.txt: vehicle_info.txt has no camera for 00002"):
        read_reid(tmp_path / "wild")


def test_what_names_no_vehicle_is_neither_class_nor_distractor(tmp_path):
    rows = ["a.jpg,1.0,train", "b.jpg,2.0,train", "c.jpg,-1,train", "d.jpg,,train", "e.jpg,-1.0,train"]
    rows += ["f.jpg,nan,query", "g.jpg,3.0,query", "h.jpg,3,gallery", "i.jpg,-1,gallery"]
    rows += ["0000_c1s1_1_1.jpg,0000,gallery", "0000_c2s1_1_1.jpg,0000,train", "0000_c2s1_1_2.jpg,0,query"]
    data = read_reid(write_table(tmp_path, *rows))
    assert data.pid_names == ["1", "2", "0000", "3"] and data.classes == len(data.train) == 2
    query, gallery = data.tests["test"]
    assert len(query) == 1 and [gallery.paths.relative(i) for i in range(2)] == ["h.jpg", "0000_c1s1_1_1.jpg"]
    assert data.notes[1:4] == ["5 images of vehicle -1 are left out", "2 images of vehicle 0000 are left out",
                              "1 images of vehicle 0000 in the gallery are distractors"]  # fmt: skip

    rows = ["a.jpg,1,train,1.0", "b.jpg,-1,gallery,-1", "c.jpg,2,query,1", "d.jpg,2.0,gallery,2"]
    data = read_reid(write_table(tmp_path, *rows))  # junk needs no camera
    assert data.camera_names == ["1", "2"] and data.tests["test"][1].camids.tolist() == [1]
    with pytest.raises(InputError, match="1 of 5 rows have no camid"):
        read_reid(write_table(tmp_path, *rows, "e.jpg,2,gallery,nan"))


def test_numbers_of_identities_do_not_hang_on_chance(tmp_path):
    ordered = ["001", "01", "1", "9" * 5000, "x", "\u00b2", "\u0661"]
    rows = [f"{i}.jpg,{ordered[i]},train" for i in (2, 1, 0, 6, 5, 3, 4)] + ["q.jpg,y,query", "g.jpg,y,gallery"]
    assert read_reid(write_table(tmp_path, *rows)).pid_names[:7] == ordered


@pytest.mark.parametrize("cameras", ["", ",1"])
@pytest.mark.parametrize("how", ["path", "spelling", "link", "copy", "label"])
def test_a_query_never_meets_its_own_file(tmp_path, how, cameras):
    other = {"path": "q.jpg", "spelling": "./q.jpg", "label": "q.jpg"}.get(how, "more/q.jpg")
    rows = [f"{name}.jpg,{name[0]},train{cameras}" for name in ("a", "b")]
    rows += [f"q.jpg,x,query{cameras}", f"{other},{'y' if how == 'label' else 'x'},gallery{cameras}"]
    touch(tmp_path, "q.jpg", "more/n.jpg")
    if how == "copy":
        (tmp_path / other).write_bytes((tmp_path / "q.jpg").read_bytes())
    if how == "link":
        (tmp_path / other).symlink_to(tmp_path / "q.jpg")
    data = read_reid(write_table(tmp_path, *rows, f"n.jpg,y,gallery{cameras}", f"r.jpg,x,gallery{cameras and ',2'}"))
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
