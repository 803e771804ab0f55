"""Fine-tuning of every task, from a set on disk to numbers: saved, continued, shared, refused in one sentence."""

import csv
import json
import math
import os
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, command, parse, read_log, run_command, run_finetune
from layouts import write_demo_cars, write_demo_parts, write_demo_reid
from safetensors import safe_open

import main_finetune
from datasets.attr import read_attribute_set
from datasets.reid import read_reid
from datasets.seg import part_names
from finetune import task as tasks
from finetune.attr import AttributeStats, sentence
from finetune.fgvc import Fgvc
from finetune.flags import COMMON, TASKS, check_args
from finetune.reid import extract_reid
from finetune.task import load_model
from models_teacher import encode_texts, load_clip
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import read_checkpoint, write_safetensors
from util.errors import InputError

MODEL, ADDRESS = "vit_tiny_patch16", "https://host.invalid/encoder.safetensors"
CPU = "--device cpu --amp none --num_workers 0".split()
SETS = {"reid": "veri", "attr": "veri", "fgvc": "cars", "seg": "parts"}
FLAGS = {
    "reid": "--stride 8 --batch_size 8 --num_instances 2 --warmup_epochs 1 --opt adamw --lr 1e-3 --jpm --jpm_shift 3 "
    "--sie_camera --sie_view",
    "attr": "--batch_size 8 --warmup_epochs 1 --lr 0.01 --drop_path 0.2",
    "fgvc": "--stride 8 --batch_size 8 --opt adamw --lr 1e-3",
    "seg": "--batch_size 4 --lr 1e-3 --decoder mla",
}
NUMBERS = {  # among those of a task
    "reid": "mAP R1 mINP reranked_mAP sie",
    "attr": "mA accuracy precision recall F1 mA_supported top1_colour top1_type constant_mA constant_top1_type",
    "fgvc": "top1 top5 mean_class_accuracy majority",
    "seg": "mIoU mAcc aAcc parts_mIoU unreadable",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory, teacher_files):
    """Drawn sets, an encoder of three blocks, tables."""
    folder = tmp_path_factory.mktemp("sets")
    write_demo_reid(folder / "veri", "veri776", train_ids=8, test_ids=5, images_per_id=6, size=32, processes=1)
    write_demo_cars(folder / "cars", "transfg", classes=4, train=5, test=3, size=40)
    write_demo_parts(folder / "parts", "canonical")
    torch.manual_seed(0)
    encoder = VisionTransformer((32, 32), 16, 192, 3, 3)
    torch.save({"model": encoder.state_dict()}, folder / "encoder.pth")
    config = {"kind": "CGD-MAE encoder", **encoder.settings()}  # as a run of pre-training writes it
    write_safetensors(folder / "encoder.safetensors", encoder.state_dict(), {"config": json.dumps(config)})
    (folder / "t.csv").write_text("path,split,label\na.jpg,train,x\nb.jpg,train,y\n")
    np.save(folder / "v.npy", np.eye(19))
    (folder / "clip").write_text("--clip_model {} --clip_pretrained {}".format(*teacher_files))
    return folder


def words_of(task: str, sets, output, *more) -> list[str]:
    """A run of seconds: two epochs of 32 px."""
    clip = (sets / "clip").read_text() if task == "attr" else ""
    words = f"--task {task} --finetune {sets}/encoder.pth --input_size 32 --epochs 2 --print_freq 1 {FLAGS[task]}"
    words += f" {clip} --data_path {sets / SETS[task]} --output_dir {output}"
    return [*words.split(), *CPU, *map(str, more)]


def finetune(task: str, sets, output, *more) -> dict:
    return run_finetune(words_of(task, sets, output, *more))


def score(task: str, model, data, output, *more) -> dict:
    words = f"--task {task} --eval --resume {model} --data_path {data} --output_dir {output} --batch_size 8"
    return run_finetune([*words.split(), *CPU, *map(str, more)])


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    """task -> (folder of its run, numbers); trained once."""
    runs = {}

    def run(task: str):
        if task not in runs:
            output = tmp_path_factory.mktemp(task) / "run"
            runs[task] = output, finetune(task, sets, output, "--report", *["--rerank"] * (task == "reid"))
        return runs[task]

    return run


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_a_model_that_scores_the_same(task, sets, trained, tmp_path, capsys):
    output, numbers = trained(task)
    assert json.loads((output / "metrics.json").read_text()) == numbers and set(NUMBERS[task].split()) < set(numbers)
    log, first = read_log(output), NUMBERS[task].split()[0]
    assert [row["epoch"] for row in log] == [0, 1, 1] and log[-1][f"test_{first}"] == numbers[first]
    assert task == "fgvc" or log[1]["train_loss"] < log[0]["train_loss"]
    data = sets / SETS[task]
    if task == "attr":  # neither the training part nor the teacher is needed
        data = shutil.copytree(data, tmp_path / "VeRi")
        (data / "train_label.xml").unlink()
        shutil.rmtree(data / "image_train")
    for name, amp in (("model.pth", "none"), ("model.safetensors", "bf16")):  # which is for training only
        found = score(task, output / name, data, tmp_path / name, "--amp", amp)
        assert found == {name: value for name, value in numbers.items() if not name.startswith("reranked")}
    said = capsys.readouterr().out
    assert numbers["protocol"] in said and {"reid": "SIE on", "attr": "constant answer"}.get(task, "") in said
    for name in ("model.pth", "checkpoint-last.pth", "checkpoint-1.pth", "model.safetensors"):
        assert read_checkpoint(output / name)["model"]  # weights_only
    found = load_model(output / "model.pth")
    assert found.task == task and not found.model.training and "ignored     0 tensors" in found.report
    assert not list(output.glob(".*.tmp"))
    page = (output / "report.html").read_text()
    assert numbers["protocol"].split(" (")[0] in page and "http" not in page.replace("http-equiv", "")


def test_what_a_reid_model_knows(trained):
    output, numbers = trained("reid")
    assert "same-camera matches removed" in numbers["protocol"] and numbers["sie"].startswith("SIE on (20 cam")
    found = load_model(output / "model.pth")
    assert found.config["set"] == "veri776" and found.config["camera_names"] is None
    config = found.model.config
    assert found.model.feature_dim == 5 * 192 and config.unknown_view and config.views == 9


def test_the_attributes_of_a_run(trained, sets, teacher_files):
    output, numbers = trained("attr")
    assert numbers["protocol"] == "veri776 (19 attributes, true above 0.45, F1 averaged over images)"
    assert numbers["text_vectors"].startswith("text tower of MiniClip-test, weights ")
    with open(output / "attributes.csv", newline="") as opened:
        rows = list(csv.DictReader(opened))
    data = read_attribute_set(sets / "veri")
    true = (data.test.labels == 1).sum(axis=0)
    assert [row["attribute"] for row in rows] == [a.name for a in data.attributes]
    assert [int(row["support"]) for row in rows] == true.tolist()
    assert [row["TPR"] == "" for row in rows] == (true == 0).tolist()
    assert numbers["mA"] == pytest.approx(np.mean([float(row["mA"]) for row in rows]), abs=1e-5)
    found = load_model(output / "model.pth")
    known, (clip, tokenizer, _) = AttributeStats(found.config), load_clip(*map(str, teacher_files))
    assert torch.equal(found.model.attr_vectors, encode_texts(clip, tokenizer, list(map(sentence, known.attributes))))
    assert known.constant.sum() >= 1 and known.rates == pytest.approx(data.train.rates())
    page = (output / "report.html").read_text()
    for words in ("Worst attributes", "Confusions", "constant", "type: sedan", "<svg", "data:image/jpeg"):
        assert words in page


def test_classes_and_parts_of_a_run(trained, sets, tmp_path):
    output, numbers = trained("fgvc")
    assert numbers["images"] == 12 and numbers["majority"] == 0.25 and numbers["top5"] == 1.0
    assert numbers["parts"] == "3 parts after 2 blocks"
    assert "12 test images of 4 classes; whole picture to 43 x 43 px, centre crop 32 x 32" in numbers["protocol"]
    first = read_log(output)[0]
    assert first["train_loss"] == pytest.approx(first["train_ce"] + first["train_contrastive"], rel=1e-5)
    model = load_model(output / "model.pth").model
    assert len(model.base.blocks) == 2 and model.head.weight.shape == (4, 192)
    larger = score("fgvc", output / "model.pth", sets / "cars", tmp_path, "--resize", "48")
    assert "whole picture to 48 x 48 px, centre crop 32 x 32" in larger["protocol"]
    output, numbers = trained("seg")
    assert numbers["protocol"].startswith("parts/car_bicycle/test (8 classes, ") and numbers["IoU_Car Side Mirror"] >= 0
    page = (output / "report.html").read_text()
    for number, name in enumerate(part_names("car_bicycle"), 1):
        assert page.count(f">{number}</span></td><td>{name}</td>") == 1
    assert score("seg", output / "model.pth", sets / "parts", tmp_path, "--seg_split", "val")["mIoU"] != numbers["mIoU"]


def test_the_baseline_has_no_parts_and_learns(sets, tmp_path):
    flags = "--parts off --epochs 10 --no-auto_augment --resize 32 --drop_path 0 --print_freq 20"
    numbers, log = finetune("fgvc", sets, tmp_path / "o", *flags.split()), read_log(tmp_path / "o")
    assert numbers["parts"] == "no parts" and "train_contrastive" not in log[0]
    assert log[9]["train_accuracy"] > 0.7 and log[9]["train_ce"] < 0.6 * log[0]["train_ce"]
    assert len(load_model(tmp_path / "o" / "model.pth").model.base.blocks) == 3
    assert len(load_encoder(tmp_path / "o" / "model.pth").blocks) == 3


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_are_one(task, sets, trained, tmp_path):
    """Training: losses, norms of gradients and weights up to rounding, as losses and statistics see the whole batch;
    scoring: the same digits."""
    batch = str(2 if task == "seg" else 4)
    words = words_of(task, sets, tmp_path / "two", "--batch_size", batch)
    done = run_command(command("main_finetune.py", *words, processes=2))
    assert done.returncode == 0, done.stderr
    for epoch, (one, two) in enumerate(zip(read_log(trained(task)[0])[:2], read_log(tmp_path / "two"))):
        names = [name for name in one if name.startswith("train_") and name != "train_accuracy"]
        assert {"train_loss", "train_grad_norm"} < {*names}
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=(1e-5, 1e-4)[epoch])
    one, two = (read_checkpoint(folder / "model.pth")["model"] for folder in (trained(task)[0], tmp_path / "two"))
    for name in [name for name in one if "running" in name and task in ("attr", "seg")]:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4), name
    alone = score(task, tmp_path / "two" / "model.pth", sets / SETS[task], tmp_path / "alone", "--batch_size", batch)
    assert json.loads((tmp_path / "two" / "metrics.json").read_text()) == alone


def test_a_run_that_is_stopped_in_an_epoch_goes_on_bit_for_bit(sets, trained, tmp_path, monkeypatch):
    """Stopped in the second update of the second epoch; stochastic depth, AutoAugment and all."""
    true, calls = Fgvc.loss, []

    def stops(*what):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return true(*what)

    expected = trained("fgvc")
    monkeypatch.setattr(Fgvc, "loss", stops)
    with pytest.raises(KeyboardInterrupt):
        finetune("fgvc", sets, tmp_path / "o", "--save_minutes", "0")
    numbers = finetune("fgvc", sets, tmp_path / "o", "--resume", "auto")
    assert len(calls) == 5 and numbers == expected[1]  # the second update alone was done again
    ours, theirs = (read_checkpoint(o / "model.pth")["model"] for o in (tmp_path / "o", expected[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(InputError, match="contrastive_weight"):
        finetune("fgvc", sets, tmp_path / "o", "--resume", "auto", "--contrastive_weight", "2")
    with pytest.raises(InputError, match="other settings .*text_vectors text tower of .* -> v.npy"):
        more = ["--resume", trained("attr")[0] / "checkpoint-last.pth", "--attr_vectors", sets / "v.npy"]
        finetune("attr", sets, tmp_path / "a", *more, "--clip_pretrained", "")


def test_a_stop_in_the_middle_of_an_update_keeps_the_buffers_of_the_last(sets, tmp_path):
    """BatchNorm's statistics change in the forward pass: what is saved must not know of one that never became an
    update, and a bad batch must leave nothing in them."""
    args = parse(main_finetune.get_args_parser(), words_of("reid", sets, tmp_path / "o"))
    main_finetune.check_args(args)
    run = main_finetune.build_run(args, torch.device("cpu"))
    run.task.batches.set_epoch(0)
    batch = next(iter(run.loader))
    run.model.train()
    before = {name: value.clone() for name, value in run.bare.named_buffers()}

    def saved() -> dict:
        run.files.save(run)
        return read_checkpoint(tmp_path / "o" / "checkpoint-last.pth")["model"]

    run.task.loss(run.model, batch)
    state = saved()
    changed = [name for name, value in run.bare.named_buffers() if not torch.equal(value, before[name])]
    assert {"bottleneck.0.running_mean", "bottleneck.4.num_batches_tracked"} <= set(changed)
    assert all(torch.equal(state[name], before[name]) for name in changed)
    run.commit_buffers(torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in run.bare.named_buffers())
    run.task.loss(run.model, batch)
    run.commit_buffers(torch.tensor(True))
    state, now = saved(), dict(run.bare.named_buffers())
    assert all(torch.equal(state[name], now[name]) and not torch.equal(now[name], before[name]) for name in changed)


@pytest.mark.parametrize(
    "task, broken, protocol",
    [
        ("reid", ("image_query", "image_test"), "veri776/2-unreadable-left-out ("),
        ("attr", ("image_test",), "veri776/1-unreadable-left-out ("),
        ("fgvc", ("car/cars_test",), ", 1 unreadable left out"),
        ("seg", ("images/test", "annotations/test"), ", 2 unreadable left out"),
    ],
)
def test_unreadable_test_images_make_another_protocol(task, broken, protocol, sets, trained, tmp_path):
    copy = shutil.copytree(sets / SETS[task], tmp_path / "set")
    for i, folder in enumerate(broken):
        sorted((copy / folder).iterdir())[i].write_bytes(b"no image")
    numbers = score(task, trained(task)[0] / "model.pth", copy, tmp_path / "out", "--report")
    assert protocol in numbers["protocol"]
    lines = (tmp_path / "out" / "unreadable_test_images.txt").read_text().splitlines()
    assert len(lines) == len(broken) and all("UnidentifiedImageError" in line for line in lines)
    if task == "reid":  # the others keep their features
        model, loading = load_model(trained("reid")[0] / "model.pth").model, {"batch_size": 4, "num_workers": 0}
        whole, found = (
            extract_reid(model, read_reid(path).tests["test"][0], "query", **loading) for path in (sets / "veri", copy)
        )
        assert torch.equal(found.values, whole.values[1:]) and len(found.images) == len(whole.images) - 1


def test_unreadable_training_images_are_replaced_counted_and_limited(sets, tmp_path):
    copy = shutil.copytree(sets / "veri", tmp_path / "VeRi")
    data = read_reid(copy)
    data.train.paths[0].write_bytes(b"no image")
    with pytest.raises(InputError, match="1 of 4[08] images could not be read.*bad_images.txt"):
        finetune("reid", sets, tmp_path / "strict", "--data_path", copy)
    finetune("reid", sets, tmp_path / "lax", "--data_path", copy, "--max_bad_ratio", "0.1")
    assert data.train.paths.relative(0) in (tmp_path / "lax" / "bad_images.txt").read_text()


@pytest.mark.parametrize("name", ["encoder.pth", "encoder.safetensors"])
def test_a_plain_encoder_can_be_scored_as_it_is(sets, tmp_path, name):
    words = f"--task reid --eval --finetune {sets / name} --input_size 48 --data_path {sets}/veri"
    numbers = run_finetune([*words.split(), *CPU, "--output_dir", str(tmp_path)])
    assert 0 < numbers["mAP"] < 1 and numbers["sie"] == "SIE off"
    with safe_open(tmp_path / "queries.safetensors", framework="np") as opened:
        for name in ("mAP", "R1"):
            assert np.nanmean(opened.get_tensor(f"test {name}")) == pytest.approx(numbers[name], abs=1e-6)
            assert numbers[f"{name}_low"] <= numbers[name] <= numbers[f"{name}_high"]


def test_tables_number_cameras_by_name_and_not_by_row(sets, trained, tmp_path):
    """A model with side information gives the same whatever the order of the rows, and knows its cameras."""
    data, rows = read_reid(sets / "veri"), []
    for name, part in (("train", data.train), *zip(("query", "gallery"), data.tests["test"])):
        rows += [f"{part.paths[i]},{part.pids[i]},gate {part.camids[i]},{name}" for i in range(len(part))]
    tables = {"same": rows, "reversed": rows[::-1], "other": [*rows, rows[-1].replace("gate", "door")]}
    for name, lines in tables.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["path,pid,camid,split", *lines]) + "\n")
    words = [word for word in words_of("reid", sets, tmp_path / "o") if word != "--sie_view"]
    run_finetune([*words, "--data_path", f"{tmp_path}/same.csv"])
    words = f"--task reid --eval --resume {tmp_path}/o/model.pth --batch_size 1 --data_path {tmp_path}"
    found = [run_finetune([*f"{words}/{name}.csv".split(), *CPU]) for name in ("same", "reversed")]
    assert found[0]["mAP"] == pytest.approx(found[1]["mAP"], abs=1e-6)
    with pytest.raises(InputError, match="knows the cameras gate .*, not door"):
        run_finetune([*f"{words}/other.csv".split(), *CPU])
    assert sorted(f.name for f in (tmp_path / "o").glob("eval_*")) == ["eval_other", "eval_reversed", "eval_same"]
    with pytest.raises(InputError, match="the cameras or views of veri776, and means nothing on table"):
        score("reid", trained("reid")[0] / "model.pth", tmp_path / "same.csv", tmp_path / "p")


def test_side_information_that_the_set_lacks_is_refused(sets, tmp_path):
    write_demo_reid(tmp_path / "id", "vehicleid", train_ids=5, test_ids=5, images_per_id=6, size=16, processes=1)
    words = words_of("reid", sets, tmp_path / "o", "--data_path", tmp_path / "id")
    words = [word for word in words if not word.startswith("--sie")]
    for flag, message in (("--sie_camera", "does not say which camera"), ("--sie_view", "knows no viewpoints")):
        with pytest.raises(InputError, match=message):
            run_finetune([*words, flag])
    numbers = run_finetune([*words, "--report"])
    assert {"800_R1", "800_R1_std", "2400_mAP"} <= set(numbers) and "10 draws" in numbers["800_protocol"]
    assert (tmp_path / "o" / "report_800.html").exists()


def test_a_table_of_attributes_and_its_unknowns(sets, tmp_path, capsys):
    """Whatever the header names; random vectors are said loudly."""
    data, rows = read_attribute_set(sets / "veri"), ["path,split,colour,pale"]
    for split, part in (("train", data.train), ("test", data.test)):
        for i in range(len(part)):
            colour = data.attributes[int(part.labels[i, :10].argmax())].value
            rows.append(f"{part.paths[i]},{split},{colour if i else ''},{int(part.labels[i, 3])}")
    own, model = tmp_path / "own.csv", tmp_path / "o" / "model.pth"
    own.write_text("\n".join(rows) + "\n")
    more = f"--data_path {own} --attr_categories colour --attr_columns pale --input_size 48,32 --clip_pretrained="
    numbers, printed = finetune("attr", sets, tmp_path / "o", *more.split()), capsys.readouterr().out
    assert "THE TEXT VECTORS ARE RANDOM" in printed and "labels of train are unknown" in printed
    assert numbers["text_vectors"] == "random orthogonal: no text"
    assert "top1_colour" in numbers and "top1_pale" not in numbers and numbers["images"] == 30
    assert score("attr", model, own, tmp_path) == numbers
    (tmp_path / "new.csv").write_text(f"path,split,colour,pale\n{data.test.paths[0]},test,pink,0\n")
    for path, message in (
        (tmp_path / "new.csv", "has colour 'pink'"),
        (sets / "veri", "pale, colour: .*, not VeRi-776"),
    ):
        with pytest.raises(InputError, match=message):
            score("attr", model, path, tmp_path)
    other = score("attr", model, own, tmp_path, "--attr_threshold", "0.9")
    assert "true above 0.9" in other["protocol"] and other["recall"] < numbers["recall"]


@pytest.mark.parametrize(
    "task, flags, message",
    [
        ("reid", "--data_path nowhere", "nowhere does not exist"),
        ("reid", "--data_path {sets}/t.csv", "(?i)'?pid'?"),
        ("reid", "--tests 800", "--tests 800: .* has test"),
        ("reid", "--num_instances 3", "--batch_size 8 x 1 processes is no multiple of --num_instances 3"),
        ("reid", "--batch_size 64", "show 8 vehicles, a batch needs 32"),
        ("reid", "--resume gone.pth", "--resume gone.pth does not exist"),
        ("reid", "--allow_change lrr", "--allow_change lrr: choose among"),
        ("reid", "--format vehicleid", "the list .*train_list.txt is missing|has no test_list"),
        ("reid", "--warmup_epochs 2", "leaves nothing of --epochs 2"),
        ("reid", "--finetune {sets}/encoder.pth --stride 20", "--stride 20 at 32 x 32 px"),
        ("reid", "--finetune {sets}/encoder.pth --jpm_shift 99", "cannot be shifted by 99"),
        ("reid", "--finetune nowhere.pth", "nowhere.pth does not exist"),
        ("attr", "--data_path {sets}/t.csv --attr_categories hue", "hue"),
        ("attr", "--clip_pretrained gone.pt", "--clip_pretrained gone.pt does not exist"),
        ("attr", "--smoothing 0.1", "drop --smoothing"),
        ("attr", "--attr_format table", "is neither a folder nor a manifest"),
        ("attr", "--batch_size 1", "the batch norm of the logits needs 2 images"),
        ("attr", "--jpm", "--jpm belongs to --task reid"),
        ("fgvc", "--data_path {sets}/t.csv --label_column model", "has no column 'model': it has path, split, label"),
        ("fgvc", "--data_path {sets}/t.csv", "has no row with split 'test' and a 'label': it has train"),
        ("seg", "--data_path {sets}/veri", "missing|no folder"),
        ("seg", "--batch_size 64", "21 training images do not fill one batch of 64"),
    ],
)
def test_contradictions_stop_at_once(task, flags, message, sets, tmp_path, monkeypatch):
    """Nothing is fetched before the rest is right."""
    for module in (main_finetune, tasks):
        fetch = module.fetch

        def fetched(name, fetch=fetch):
            assert name != ADDRESS
            return fetch(name)

        monkeypatch.setattr(module, "fetch", fetched)
    with pytest.raises(InputError, match=message) as caught:
        finetune(task, sets, tmp_path / "o", "--finetune", ADDRESS, *flags.format(sets=sets).split())
    assert "\n" not in str(caught.value)


def test_eval_takes_the_model_as_it_is(sets, trained, tmp_path):
    write_demo_cars(tmp_path / "cars", "annos", classes=6, train=1, test=1, size=32)
    for kind in ("images", "annotations"):
        shutil.copytree(sets / "parts" / kind / "val", tmp_path / "parts" / kind / "val")
    (tmp_path / "parts" / "classes.json").write_text(json.dumps({"classes": [f"class {i}" for i in range(8)]}))
    encoder, own = f"--finetune {sets}/encoder.pth", {task: f"--resume {trained(task)[0]}/model.pth" for task in TASKS}
    for task, flags, message in (
        ("reid", f"{own['reid']} --input_size 64", "--input_size would change the model"),
        ("reid", f"{own['reid']} --sie_weight 1", "--sie_weight would change the model"),
        ("reid", f"{own['reid']} --tests 800", "--tests 800: .* has test"),
        ("reid", f"{own['reid']} --device mps", "choose auto, cuda or cpu"),
        ("reid", f"{encoder} --jpm", "--jpm would change the model"),
        ("reid", own["reid"].replace("--resume", "--finetune"), "is a model of main_finetune.py: use --resume"),
        ("reid", f"{own['reid']} {encoder}", "--eval scores one model"),
        ("attr", f"{own['attr']} --attr_vectors v.npy", "--attr_vectors would change the model"),
        ("attr", f"{own['attr']} --clip_pretrained openai", "--clip_pretrained would change the model"),
        ("fgvc", f"{own['fgvc']} --parts off", "--parts would change the model that --eval scores"),
        ("fgvc", f"{own['fgvc']} --resize 24", "--resize 24 px leaves no crop of 32 x 32 px"),
        ("fgvc", f"{own['fgvc']} --data_path {tmp_path}/cars", "knows 4 classes .*, not '.* Hatchback 2012' of 2 test"),
        ("seg", f"{own['seg']} --decoder naive", "--decoder would change the model"),
        ("seg", f"{own['seg']} --aux_weight 0.4", "--aux_weight would change the model"),  # the default
        ("seg", f"{own['seg']} --data_path {tmp_path}/parts", "knows the classes background, Car Body"),
        ("seg", own["fgvc"], "is a CGD-MAE TransFG: give the model.pth of a run with --task seg"),
        *(
            (task, f"--resume {sets}/encoder.pth", "is no model of main_finetune.py: give the model.pth")
            for task in TASKS
        ),
        *((task, encoder, f"an encoder has no answers for --task {task} before") for task in ("attr", "fgvc", "seg")),
    ):
        words = f"--task {task} --eval --data_path {sets / SETS[task]} --output_dir {tmp_path / 'o'} {flags}"
        with pytest.raises(InputError, match=message):
            run_finetune([*CPU, *words.split()])
    with pytest.raises(InputError, match="model.pth is a TransFG model: its last block"):
        load_encoder(trained("fgvc")[0] / "model.pth")


# flags and recipes


def checked(*words: str):
    args = parse(main_finetune.get_args_parser(), [*words, "--data_path", "x", "--model", MODEL])
    check_args(args)
    return args


@pytest.mark.parametrize("task", TASKS)
def test_every_number_has_an_interval_and_nothing_else_passes(task):
    for flag in [*sum(COMMON.values(), []), *TASKS[task].flags]:
        if flag.how.get("type") in (int, float):
            low, high = map(float, (ends := flag.within[1:-1].split(",")))
            wrong = [f"{low - 1:g}"] + [f"{high + 1:g}"] * math.isfinite(high)
            wrong += ends[:1] * (flag.within[0] == "(") + ends[1:] * (flag.within[-1] == ")" and math.isfinite(high))
            for value in wrong:
                with pytest.raises(InputError, match=f"--{flag.name} .*must be in ") as caught:
                    checked("--task", task, f"--{flag.name}", *[value.strip()] * flag.how.get("nargs", 1))
                assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "task, recipe",
    [
        ("reid", ((256, 256), 64, 120, 5, "sgd", 1e-4, 0.0, 0.002, 0.01, 0.008)),
        ("attr", ((224, 224), 128, 20, 5, "sgd", 1e-4, 0.0, 0.002, 0.01, 8e-3)),
        ("fgvc", ((448, 448), 16, 20, 1, "sgd", 0.0, 1.0, 0.0, 0.0, 0.03)),
        ("seg", ((512, 512), 16, 100, 0, "sgd", 0.0, 0.0, 0.1, 0.0, 1e-3)),
    ],
)
def test_recipes_and_their_warm_up(task, recipe):
    args = checked("--task", task)
    names = "img_size batch_size epochs warmup_epochs opt weight_decay clip_grad min_lr_ratio warmup_lr_ratio".split()
    assert (*(getattr(args, name) for name in names), TASKS[task].default_lr(args)) == recipe
    epochs, warm_up = recipe[2:4]
    more = {epochs: checked("--task", task, "--epochs", str(epochs)).warmup_epochs for epochs in (1, 2, 2 * epochs)}
    assert more[2] == pytest.approx(warm_up * 2 / epochs) and more[1] < 1 and more[2 * epochs] == warm_up
    assert checked("--task", task, "--epochs", "9", "--warmup_epochs", "3").warmup_epochs == 3


def test_the_help_of_a_task_shows_its_flags_alone(capsys):
    with pytest.raises(SystemExit):
        main_finetune.get_args_parser().parse_args(["--task", "fgvc", "--help"])
    shown = capsys.readouterr().out
    assert "--parts" in shown and "--batch_size" in shown and "--num_instances" not in shown and "seg)" not in shown


SIGNS = {"veri776": "image_train", "var": "train_label.xml", "vehicleid": "train_test_split",
         "veriwild": "train_test_split", "stanfordcars": "devkit", "partimagenet": "images/train"}  # fmt: skip


def script(name: str, *words, **env) -> subprocess.CompletedProcess:
    env, words = os.environ | {"PYTHON": "echo"} | env, ["bash", f"scripts/{name}", *map(str, words)]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "scripts").glob("finetune_*.sh")))
def test_recipes_say_what_is_wrong_and_run_what_parses(name, tmp_path):
    (tmp_path / "empty").mkdir()
    folder, weights = tmp_path / "set", tmp_path / "my encoder.pth"
    (folder / SIGNS[name.removeprefix("finetune_").removesuffix(".sh").split("_")[0]]).mkdir(parents=True)
    for image in range(16 if "part" in name else 0):
        (folder / "images/train" / f"{image}.jpg").touch()
        (folder / "classes.json").touch()
    weights.touch()
    for words, message in (
        ((), "give CHECKPOINT and the folder"),
        ((weights,), "give CHECKPOINT and the folder"),
        (("gone.pth", folder), "gone.pth is no file, no address, and no name"),
        ((weights, "nowhere"), "nowhere is no folder"),
        ((weights, tmp_path / "empty"), "it holds none of"),
        ((weights, folder, "best"), "row 'best': choose among"),
    ):
        done = script(name, *words)
        errors = [line for line in done.stderr.splitlines() if not line.startswith(("+", "no keypoint"))]
        assert done.returncode == 2 and errors[-1].startswith("error: ") and message in errors[-1], done.stderr
        assert ("Usage:" in done.stderr) == (len(words) < 2)
    rows = done.stderr.split("choose among ")[1].split()
    assert script(name, weights, folder, GPUS="3").returncode == script(name, weights, folder, GPUS="x").returncode == 2
    assert script(name, "--help").stdout.count("Usage:") == 1
    calls = [(weights, [row]) for row in rows] + [("mae_vit_base", [rows[-1], "--epochs", "6"])]
    for checkpoint, more in [*calls, (weights, ["--epochs", "6"])]:
        done = script(name, checkpoint, folder, *more)
        assert done.returncode == 0, done.stderr
        ran = shlex.split(done.stderr.splitlines()[-1].removeprefix("+ exec echo "))
        args = parse(main_finetune.get_args_parser(), ran[ran.index("main_finetune.py") + 1 :])
        check_args(args)
        assert args.finetune == str(checkpoint) and (args.epochs == 6) == ("6" in more)
        assert "/" in args.output_dir and (more[0] in args.output_dir or more[0] not in rows)
