"""StanfordCars in its layouts; folders and tables; what becomes of a picture."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pictures
from layouts import BOX, CAR_FOLDERS, write_demo_cars, write_mat
from PIL import Image
from scipy.io import savemat

from datasets.fgvc import list_labelled, read_cell_strings, read_fgvc, read_struct_array, renumber_classes
from datasets.items import CenterCrops
from datasets.tables import PUBLISHED
from datasets.transforms import CropFlipAugment
from util.errors import InputError


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    root = tmp_path_factory.mktemp("cars")
    for layout in CAR_FOLDERS:
        write_demo_cars(root / layout, layout, classes=6, train=2, test=1, size=32)
    return root


def as_rows(data):
    parts = (("train", data.train), ("test", data.test))
    return [(n, Path(p.paths.relative(i)).name, data.classes[p.labels[i]]) for n, p in parts for i in range(len(p))]


def annotate(folder, layout, change) -> Path:
    file = folder / ("cars_annos.mat" if layout == "annos" else "car/devkit/cars_train_annos.mat")
    names = {"class_names": read_cell_strings(file, "class_names")} if layout == "annos" else {}
    write_mat(file, {"annotations": change(read_struct_array(file, "annotations"))} | names)
    return folder


def test_what_a_mat_file_holds(tmp_path):
    file, rows = tmp_path / "a.mat", [{"class": 300, "fname": "a.jpg", "empty": ""}]
    write_mat(file, {"annotations": rows, "class_names": ["Velmar ", "", "b"]})
    assert read_struct_array(file, "annotations") == [{"class": 300, "fname": "a.jpg", "empty": None}]
    assert read_cell_strings(file, "class_names") == read_cell_strings(file, "any") == ["Velmar", None, "b"]
    (tmp_path / "b.mat").write_bytes(file.read_bytes()[:400])
    large = {"annotations": np.zeros((3000, 3000))}
    savemat(tmp_path / "d.mat", large, do_compression=True)  # 70 kB that unpack to 72 MB
    head = struct.pack("<8I", 14, 48, 6, 8, 1, 0, 5, 8) + struct.pack("<6I", 1, 2**31 - 1, 1, 1, 120, 0)
    (tmp_path / "e.mat").write_bytes(file.read_bytes()[:128] + head)  # a cell array of two milliards
    for name, variable, message in (
        ("a.mat", "other", "no struct array 'other'"),
        ("b.mat", "annotations", "b.mat cannot be read"),
        ("c.mat", "annotations", "c.mat cannot be read .*No such file"),
        ("d.mat", "annotations", "d.mat cannot be read .*larger than"),
        ("e.mat", "annotations", "e.mat cannot be read .*larger than"),
    ):
        with pytest.raises(InputError, match=message):
            read_struct_array(tmp_path / name, variable)


def test_every_layout_tells_the_same(cars, monkeypatch):
    found = {layout: read_fgvc(cars / layout) for layout in CAR_FOLDERS}
    assert as_rows(found["transfg"]) == as_rows(found["torchvision"])
    own = [(split, name) for split, _, name in as_rows(found["transfg"])]
    assert own == [(split, name) for split, _, name in as_rows(found["annos"])]
    for data in found.values():
        assert data.name == "StanfordCars" and len(data.train) == 12 and len(data.test) == 6
        assert np.bincount(data.train.labels).tolist() == [2] * 6
        assert "smaller than the published set" in data.notes[0]
    inside = read_fgvc(cars / "torchvision" / "stanford_cars")
    assert as_rows(inside) == as_rows(found["torchvision"]) and inside.sha256() == found["torchvision"].sha256()
    assert len(read_fgvc(cars / "transfg", need_train=False).train) == 0
    monkeypatch.setitem(PUBLISHED, "StanfordCars", {"training images": 12, "test images": 6, "classes": 6})
    assert read_fgvc(cars / "annos").notes[0].endswith("6 classes; all counts as published")


def put(name, value):
    return lambda rows: [rows[0] | {name: value}, *rows[1:]]


def only(*names):
    return lambda rows: [{name: row[name] for name in names} for row in rows]


@pytest.mark.parametrize(
    "layout, change, message",
    [
        ("transfg", put("class", 0), "annotation 1: class 0 is outside 1..6"),
        ("transfg", only(*BOX, "fname"), "has no field 'class': its fields are bbox_x1, .*, fname, expected fname"),
        ("transfg", put("fname", 3), "annotation 1: 'fname' is 3, expected a file name"),
        ("transfg", put("class", "4"), "annotation 1: 'class' is '4', expected one whole number"),
        ("transfg", put("fname", "no.jpg"), "1 of the 12 images of .* do not exist, first .*no.jpg"),
        ("annos", put("test", 2), "field 'test' must be 0 .train. or 1 .test."),
        ("annos", only("class", "test"), "no field 'relative_im_path'"),
    ],
)
def test_wrong_annotations_get_a_sentence(cars, tmp_path, layout, change, message):
    folder = shutil.copytree(cars / layout, tmp_path / "set")
    with pytest.raises(InputError, match=message) as caught:
        read_fgvc(annotate(folder, layout, change))
    assert "\n" not in str(caught.value)


def test_incomplete_copies_get_a_sentence(cars, tmp_path):
    folder = shutil.copytree(cars / "transfg", tmp_path / "set")
    data = read_fgvc(annotate(folder, "transfg", only("fname", "class")))  # fields are read by name
    assert as_rows(data) == as_rows(read_fgvc(cars / "transfg"))
    test, devkit = folder / "car" / "cars_test_annos_withlabels.mat", folder / "car" / "devkit"
    test.rename(devkit / test.name)  # where some copies have it
    assert as_rows(read_fgvc(folder)) == as_rows(data)
    for gone, message in ((test.name, "withlabels.mat: .* holds no cl"), ("cars_meta.mat", "cars_meta.mat cannot be")):
        (devkit / gone).unlink()
        with pytest.raises(InputError, match=message):
            read_fgvc(folder)


def test_folders_and_tables(tmp_path):
    for split, name, count in (("train", "a", 3), ("train", "b", 2), ("val", "b", 1), ("val", "c", 2)):
        write_pictures(tmp_path / "tree" / split / name, count)
    tree = read_fgvc(tmp_path / "tree")
    assert tree.classes == ["a", "b", "c"] and tree.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert tree.test.labels.tolist() == [1, 2, 2] and "scores are of split val" in tree.notes[1]
    assert any("1 classes have no training image: c" in note for note in tree.notes)
    shutil.copytree(tmp_path / "tree" / "val", tmp_path / "tree" / "test")
    assert read_fgvc(tmp_path / "tree").test.paths.relative(0).startswith("test/")
    rows = ["path,split,model", "tree/train/a/0000.png,train,x", "tree/train/a/0001.png,train,y"]
    rows += ["tree/train/a/0002.png,test,y", "tree/train/b/0000.png,val,x", "tree/train/b/0001.png,train,"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    table = read_fgvc(tmp_path / "t.csv", "model")
    assert table.classes == ["x", "y"] and len(table.train) == 2 and table.test.labels.tolist() == [1]
    assert "1 rows have no 'model' and are left out" in table.notes
    assert "1 rows of other splits than train and test are not used" in table.notes
    with pytest.raises(InputError, match="no column 'label': it has path, split, model; --label_column chooses"):
        read_fgvc(tmp_path / "t.csv")
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "nowhere does not exist"), ("empty", "an ImageFolder needs train/ and test/")):
        with pytest.raises(InputError, match=message):
            read_fgvc(tmp_path / name)


def test_labelled_images(tmp_path):
    """Labels that are none are counted: -1, NaN; pandas writes 1.0."""
    rows = ["a.jpg,train,1.0", "b.jpg,train,2", "c.jpg,train,-1", "d.jpg,val,1", "e.jpg,val,nan", "f.jpg,val,2.0"]
    file = tmp_path / "t.csv"
    file.write_text("\n".join(["path,split,label", *rows]))
    found = list_labelled(file)
    assert (found.classes, found.unlabelled, found.labels.tolist()) == (["1", "2"], 2, [0, 1, -1, 0, -1, 1])
    for content, message in (
        ("path,split\na,train\n", "no column 'label'"),
        ("path,split,label\na,train,x\nb,train,y\n", "no row with split 'val'"),
        ("path,split,label\na,train,x\nb,val,x\n", "nothing to tell apart"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            list_labelled(file)
    for name in ("train/train", "train/bus", "val/bus", "val/train"):  # a class may be called train
        write_pictures(tmp_path / "tree" / name, 1)
    assert list_labelled(tmp_path / "tree").classes == ["bus", "train"]


def test_labels_in_the_numbers_of_a_model(cars):
    data = read_fgvc(cars / "transfg")
    for classes in (data.classes, ["other", *data.classes[::-1]]):
        turned = renumber_classes(data, classes, "m.pth")
        assert as_rows(turned) == as_rows(data) and turned.test.labels.max() == len(classes) - 1
    with pytest.raises(InputError, match="m.pth knows 5 classes .*, not '.*' of 1 test"):
        renumber_classes(data, data.classes[:-1], "m.pth")


def picture(width=50, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_augmentation_is_a_function_of_its_numbers():
    augment, state = CropFlipAugment((32, 24), (40, 32)), torch.get_rng_state()
    views = [augment(picture(), np.random.default_rng(seed))["imgs"] for seed in (1, 1, 2, 3)]
    assert torch.equal(views[0], views[1]) and views[0].shape == (3, 32, 24) and views[0].dtype == torch.uint8
    assert not torch.equal(views[0], views[2]) and not torch.equal(views[2], views[3])
    assert torch.equal(torch.get_rng_state(), state)  # nothing outside has moved
    torch.manual_seed(5)
    assert torch.equal(augment(picture(), np.random.default_rng(1))["imgs"], views[0])  # nor does it matter


def test_crops_reach_every_place_and_the_policy_changes_pictures():
    augment = CropFlipAugment((6, 6), (8, 8), auto_augment=False)
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    seen = [augment(ramp, np.random.default_rng(seed))["imgs"][0] for seed in range(300)]
    assert 110 < sum(bool(view[0, 0] > view[0, 1]) for view in seen) < 190  # mirrored
    corners = {int(min(view[0, 0], view[0, -1])) for view in seen}
    assert corners == {8 * top + left for top in range(3) for left in range(3)}
    whole = [CropFlipAugment((40, 50), (40, 50), auto_augment=policy) for policy in (True, False)]
    pairs = [[augment(picture(), np.random.default_rng(seed))["imgs"] for augment in whole] for seed in range(40)]
    changed = sum(not torch.equal(*pair) for pair in pairs)
    assert 25 < changed <= 40 and len({view.numpy().tobytes() for view, _ in pairs}) > 10


def test_centre_crops(cars):
    paths = read_fgvc(cars / "transfg").test.paths
    crops = CenterCrops(paths, (24, 30), (28, 36))
    imgs, index, problem = crops[2]
    whole = CenterCrops(paths, (28, 36), (28, 36))[2][0]
    assert imgs.shape == (3, 24, 30) and (index, problem) == (2, "") and len(crops) == 6
    assert torch.equal(imgs, whole[:, 2:26, 3:33])
