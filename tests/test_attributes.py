"""Attribute recognition in parts: metrics by hand and by a slow implementation, sets, vectors, model."""

import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch
from layouts import VERI_COLOURS, VERI_TYPES, VERI_WORDS, write_demo_reid

from datasets.attr import VERI, Attribute, read_attribute_set
from demo.reid import plan
from finetune.attr import orthogonal_vectors, sentence, vectors_of_file
from metrics.attr import attribute_metrics, attribute_rows, average_precision, constant_answer, group_top1
from models_vit import VisionTransformer
from models_vtb import VTB, attribute_loss
from util.errors import InputError


def slow_metrics(said, labels) -> dict[str, float]:
    """The published definitions, number by number."""
    balanced, supported, each = [], [], []
    for answers, column in zip(said.T, labels.T):
        rates = [np.mean(answers[column == g] == g) if (column == g).any() else 0.0 for g in (0, 1)]
        balanced.append(np.mean(rates))
        supported += balanced[-1:] if {0, 1} <= set(column) else []
    for p, g in zip(said, labels):
        true, answer = ({a for a in range(len(g)) if g[a] >= 0 and row[a] == 1} for row in (g, p))
        both = len(true & answer)
        if (g >= 0).any():
            precision, recall = (both / len(part) if part else 0.0 for part in (answer, true))
            f1 = 2 * precision * recall / (precision + recall) if both else 0.0
            each.append((both / len(true | answer) if true | answer else 0.0, precision, recall, f1))
    accuracy, precision, recall, f1 = np.mean(each, axis=0)
    found = {"mA": np.mean(balanced), "mA_supported": np.mean(supported), "accuracy": accuracy, "recall": recall}
    return found | {"precision": precision, "F1": f1, "F1_of_means": 2 * precision * recall / (precision + recall)}


@pytest.mark.parametrize("unknown", [0.2, 0.0])
def test_metrics_equal_a_slow_implementation(unknown):
    rng = np.random.default_rng(0)
    labels, said = rng.choice([-1, 0, 1], (40, 7), p=[unknown, 0.7 - unknown, 0.3]), rng.random((40, 7)) > 0.6
    labels[:, 5] = np.minimum(labels[:, 5], 0)  # never true
    labels[0], labels[1], labels[2] = 0, 1, -1 if unknown else labels[2]
    assert attribute_metrics(said, labels) == pytest.approx(slow_metrics(said, labels))


def test_an_attribute_without_support_halves_its_term_and_is_told():
    labels = np.array([[1, 0], [0, 0], [1, 0]])
    for said, mean, supported in ((labels == 1, 0.75, 1.0), (np.ones_like(labels, dtype=bool), 0.25, 0.5)):
        found = attribute_metrics(said, labels)
        assert found["mA"] == mean and found["mA_supported"] == supported
    known, none = attribute_rows(labels.astype(float), labels, ["a", "b"], np.array([0.6, 0.1]), 0.45)
    assert none["support"] == 0 and math.isnan(none["TPR"]) and math.isnan(none["AP"]) and none["mA"] == 0.5
    assert known["mA"] == 1 and known["constant_accuracy"] == 2 / 3
    with pytest.raises(ValueError, match="0 images with a known one"):
        attribute_metrics(np.zeros((2, 2), bool), np.full((2, 2), -1))


def test_top1_of_a_group_and_the_constant_answer():
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
    probs = np.array([[0.3, 0.2, 0.9], [0.6, 0.1, 0], [0.9, 0.8, 0], [0.1, 0.2, 0.1]])
    assert group_top1(probs, labels, [0, 1]) == 0.5  # of the first two images; the others have not one true one
    assert math.isnan(group_top1(probs, np.zeros_like(labels), [0, 1]))
    labels = (np.random.default_rng(0).random((200, 5)) < [0.1, 0.7, 0.4, 0.05, 0.6]).astype(int)
    order, found = np.argsort(-labels.mean(axis=0)), np.broadcast_to(constant_answer(labels), labels.shape)
    answers = [np.broadcast_to(np.isin(np.arange(5), order[:k]), labels.shape) for k in range(1, 6)]
    assert max(range(5), key=lambda k: slow_metrics(answers[k], labels)["F1"]) == found[0].sum() - 1 > 0
    assert (found == answers[found[0].sum() - 1]).all() and attribute_metrics(found, labels)["mA"] == 0.5


def test_average_precision_with_ties():
    """Two of four known scores tie: half of the recall at precision 1/2, the rest at 2/3; a constant gets the rate."""
    found = average_precision(np.array([0.9, 0.9, 0.5, 0.1, 0.95]), np.array([1, 0, 1, 0, -1]))
    assert found == pytest.approx(0.5 * 0.5 + 0.5 * 2 / 3)
    assert average_precision(np.ones(4), np.array([1, 0, 0, 0])) == 0.25
    assert math.isnan(average_precision(np.ones(2), np.zeros(2, int)))


@pytest.fixture(scope="module")
def veri(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "VeRi"
    write_demo_reid(folder, "veri776", train_ids=8, test_ids=5, images_per_id=6, size=16, processes=1)
    return folder


@pytest.fixture
def copy(veri, tmp_path):
    return shutil.copytree(veri, tmp_path / "VeRi")


def test_veri_is_read_from_its_gb2312_files(veri):
    data, drawn = read_attribute_set(veri), {row["path"]: row for row in plan(8, 5, 6, 0)}
    assert [a.name for a in data.attributes][:2] == ["colour: yellow", "colour: orange"] and len(VERI) == 19
    for split, images in (("train", data.train), ("test", data.test)):
        assert len(images) == sum((row["split"] == "train") == (split == "train") for row in drawn.values())
        assert (images.labels.sum(axis=1) == 2).all()
        for i, labels in enumerate(images.labels):
            row = drawn[images.paths.relative(i)]
            colour, body = (VERI_WORDS.get(row[key], row[key]) for key in ("colour", "body"))
            assert labels[VERI_COLOURS.index(colour)] == labels[10 + VERI_TYPES.index(body)] == 1
    assert "never true in train: " in "\n".join(data.notes)
    data.train.labels[7, 0] ^= 1
    assert data.sha256() != read_attribute_set(veri).sha256()


def test_a_damaged_veri_is_refused_or_told(copy):
    file = copy / "train_label.xml"
    text = file.read_text(encoding="gb2312")
    items = [line for line in text.splitlines() if "<Item " in line]
    colour, body, gone = (re.search(f'{key}="(.*?)"', items[0]) for key in ("colorID", "typeID", "imageName"))

    def read(changed: str):
        file.write_text(changed, encoding="gb2312")
        return read_attribute_set(copy)

    for changed, message in (
        (text.replace(colour[0], 'colorID="11"', 1), "train_label.xml: .*jpg has colorID '11', known are 1 to 10"),
        (text.replace(body[0], 'typeID="sedan"', 1), "has typeID 'sedan', known are 1 to 9"),
        (text.replace("</Items>", ""), "train_label.xml cannot be read as XML .*line"),
        (text.replace(items[1], items[0]), "train_label.xml: item 2 has a repeated imageName"),
        (re.sub('(colorID|typeID)="[^"]*"', "", text), "not one label of .* listed images is known"),
        ("<TrainingImages/>", "train_label.xml holds no <Item>"),
    ):
        with pytest.raises(InputError, match=message):
            read(changed)
    (copy / "image_train" / gone[1]).unlink()
    other = text.split("?>", 1)[1].replace(items[1] + "\n", "").replace("cameraID", "camID")  # as in derived sets
    notes = "\n".join(read(other.replace(" " + colour[0], "")).notes)
    assert f"1 of the 47 images of {file} are not in {copy / 'image_train'}, e.g. {gone[1]}" in notes
    assert "labels of train are unknown" in notes
    file.unlink()
    with pytest.raises(InputError, match="train_label.xml is missing"):
        read_attribute_set(copy)
    assert len(read_attribute_set(copy, need_train=False, known=VERI).train) == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030", "gb2312"])
def test_veri_in_any_encoding_and_with_types_that_are_unknown(copy, encoding):
    """VeRi-776 1.0 has typeID 0; an editor saves as UTF-8, and leaves the declaration or not."""
    declared = f'<?xml version="1.0" encoding="{"gb2312" if encoding == "utf-8-sig" else encoding}"?>'
    for file, declaration in ((copy / "train_label.xml", declared), (copy / "test_label.xml", "")):
        text = file.read_text(encoding="gb2312").split("?>", 1)[1].replace("<Items", '<Items maker="\u8f66"')
        for value in ("0", "", "-1", "00", "NaN"):
            text = re.sub('typeID="[1-9]"', f'typeID="{value}"', text, count=1)
        write = encoding if declaration or encoding != "utf-8" else "gb18030"  # without mark and declaration
        file.write_bytes((declaration + text).encode(write))
    data = read_attribute_set(copy)
    known = data.train.labels >= 0
    assert len(known) == 48 and not known[:5, 10:].any() and known[5:].all() and known[:, :10].all()
    assert "5 items of train_label.xml have no typeID that is known (0, -1 or none)" in data.notes


def write_table(folder, text: str):
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"")
    (folder / "own.csv").write_text(text)
    return folder / "own.csv"


def test_tables_of_binary_columns_and_of_words(tmp_path):
    rows = "0.jpg,train,1.0,0\n1.jpg,train,0,-1\n2.jpg,test,False,TRUE\n3.jpg,val,1,1\n"
    file = write_table(tmp_path, "path,split,taxi,rack\n" + rows)
    data, notes = read_attribute_set(file), "\n".join(read_attribute_set(file).notes)
    assert data.attributes == (Attribute("taxi"), Attribute("rack")) and data.train.rates().tolist() == [0.5, 0.0]
    assert data.train.labels.tolist() == [[1, 0], [0, -1]] and data.test.labels.tolist() == [[0, 1]]
    for note in ("1 of split 'val'", "1 labels of train are unknown", "1 attributes are never true in train: rack"):
        assert note in notes
    assert read_attribute_set(file, binary=["taxi"], test_split="validation").test.labels.tolist() == [[1]]
    rows = "0.jpg,train,red,1\n1.jpg,train,,0\n2.jpg,test,blue,1\n"
    file = write_table(tmp_path, "path,split,paint,taxi\n" + rows)
    data = read_attribute_set(file, categorical=["paint"], binary=["taxi"])
    assert [a.name for a in data.attributes] == ["taxi", "paint: blue", "paint: red"]
    assert data.train.labels.tolist() == [[1, 0, 1], [0, -1, -1]] and data.test.labels.tolist() == [[1, 1, 0]]
    with pytest.raises(InputError, match="has paint 'red', and the model knows blue, green"):
        read_attribute_set(file, known=(Attribute("paint", "blue"), Attribute("paint", "green")))


TWO = "path,split,taxi\n0.jpg,train,1\n1.jpg,test,1\n"


@pytest.mark.parametrize("text, options, message", [
    ("path,split\n0.jpg,train\n1.jpg,test\n", {}, "names no attribute"),
    ("path,taxi\n0.jpg,1\n", {}, "no column 'split': it has path, taxi"),
    ("path,split,taxi\n0.jpg,train,1\n", {}, "no row with split 'test': it has 'train'; choose one with"),
    ("path,split,taxi\n0.jpg,test,1\n", {}, "no row with split 'train': it has 'test'"),
    (TWO.replace("train,1", "train,2"), {}, "0.jpg has taxi '2', not 0, 1 or nothing"),
    (TWO.replace("train,1", "train,"), {}, "not one label of 1 listed images is known"),
    (TWO, {"binary": ["bus"]}, "no column 'bus'"), (TWO, {"categorical": ["taxi"]}, "holds 1 different"),
    (TWO, {"binary": ["taxi"], "categorical": ["taxi"]}, "name it once"),
    (TWO, {"test_split": "train"}, "would test on what is"),
    (TWO.replace("0.jpg", "8.jpg"), {}, "none of the first 1 images"),
])  # fmt: skip
def test_damaged_tables_stop_with_one_sentence(tmp_path, text, options, message):
    with pytest.raises(InputError, match=message):
        read_attribute_set(write_table(tmp_path, text), **options)


def test_sentences_and_vectors_of_random_numbers():
    words = {("colour", "orange"): "an orange vehicle", ("type", "SUV"): "an SUV"}
    words |= {("Body Type", "pickup_truck"): "a pickup truck", ("has_roof_rack",): "a vehicle, has roof rack"}
    words |= {("fuel", "diesel"): "a vehicle, fuel diesel"}
    assert {key: sentence(Attribute(*key)) for key in words} == {k: f"a photo of {v}." for k, v in words.items()}
    for count, dim in ((19, 192), (30, 8)):
        vectors, again, other = (orthogonal_vectors(count, dim, seed) for seed in (0, 0, 1))
        assert vectors.shape == (count, max(count, dim)) and vectors.dtype == torch.float32
        assert torch.allclose(vectors @ vectors.t(), torch.eye(count), atol=1e-5)
        assert torch.equal(vectors, again) and not torch.equal(vectors, other)


def test_vectors_of_a_file(tmp_path):
    bad, many = "is no array of numbers in a .npy", "attributes need finite numbers"
    for values, count, message in (
        (np.full((3, 2), np.nan), 3, f"3 {many}"), (np.zeros(3), 3, rf"shape \(3,\), and 3 {many} \(3, D\)"),
        (np.ones((3, 5)), 4, rf"shape \(3, 5\), and 4 {many}"), (np.array([["a"]]), 1, f"{bad}: could not convert"),
    ):  # fmt: skip
        np.save(tmp_path / "v.npy", values)
        with pytest.raises(InputError, match=message):
            vectors_of_file(tmp_path / "v.npy", count)
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY\x01")
    for name, message in (("damaged", bad), ("gone", "No such file")):
        with pytest.raises(InputError, match=message):
            vectors_of_file(tmp_path / f"{name}.npy", 3)
    np.save(tmp_path / "v.npy", vectors := torch.randn(3, 5).double())
    found, source = vectors_of_file(tmp_path / "v.npy", 3)
    assert torch.equal(found, vectors.float()) and source.startswith("v.npy, sha256 ")


def test_vtb_is_what_its_equations_say():
    torch.manual_seed(0)
    model = VTB(VisionTransformer((32, 32), 16, 24, 2, 2), torch.randn(5, 7)).eval()
    imgs, encoder, expected = torch.randn(3, 3, 32, 32), model.base, torch.zeros(3, 5)
    with torch.no_grad():
        for parameter in (model.vis_embed, model.tex_embed):
            assert not parameter.any()  # zero at the start
            parameter.normal_()
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        for n, img in enumerate(imgs):
            x = encoder.blocks[0](encoder.embed(img[None]))[0] + model.vis_embed[0]  # not normed
            text = [model.word_embed(vector) + model.tex_embed[0, 0] for vector in model.attr_vectors]
            fused = encoder.norm(encoder.blocks[1](torch.cat([torch.stack(text), x])[None]))[0]
            for a in range(5):
                logit = fused[a] @ model.classifier.weight[a] + model.classifier.bias[a]
                scale = model.bn.weight[a] / (model.bn.running_var[a] + model.bn.eps).sqrt()
                expected[n, a] = (logit - model.bn.running_mean[a]) * scale + model.bn.bias[a]
    assert torch.allclose(model(imgs), expected, atol=1e-5)
    assert model.attr_vectors.shape == (5, 7) and "attr_vectors" in model.state_dict()  # saved, not trained


def test_the_loss_is_the_weighted_sum_over_attributes():
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=rng, requires_grad=True), torch.randint(-1, 2, (6, 3), generator=rng)
    rates, expected = torch.tensor([0.1, 0.5, 0.9]), 0.0
    for i, a in itertools.product(range(6), range(3)):
        p = 1 / (1 + math.exp(-logits[i, a].item()))
        terms = {1: -math.exp(1 - rates[a]) * math.log(p), 0: -math.exp(rates[a]) * math.log(1 - p)}
        expected += terms.get(labels[i, a].item(), 0)
    loss = attribute_loss(logits, labels, rates)
    assert loss.item() == pytest.approx(expected / 6, rel=1e-5)
    loss.backward()
    assert not logits.grad[labels < 0].any() and (logits.grad[labels >= 0] != 0).all()
