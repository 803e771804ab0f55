"""Attribute recognition, from a set on disk to numbers: saved, continued, shared, refused."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import command, parse, read_log, run_command, run_finetune
from layouts import write_demo_reid

import main_finetune
from datasets.attr import read_attribute_set
from finetune.attr import AttributeStats, sentence
from finetune.flags import ATTR
from finetune.task import load_model
from models_teacher import encode_texts, load_clip
from models_vit import VisionTransformer
from util.checkpoint import read_checkpoint
from util.errors import InputError

SMALL = (
    "--task attr --input_size 32 --batch_size 8 --epochs 2 --warmup_epochs 1 --num_workers 0 --device cpu "
    "--amp none --print_freq 1 --lr 0.01 --drop_path 0.2"
).split()
CPU = "--device cpu --amp none --num_workers 0".split()


@pytest.fixture(scope="module")
def veri(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "VeRi"
    write_demo_reid(folder, "veri776", train_ids=8, test_ids=5, images_per_id=6, size=32, processes=1)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder of two blocks, so that a run takes seconds."""
    torch.manual_seed(0)
    model = VisionTransformer((32, 32), 16, 48, 2, 3)
    file = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save({"model": model.state_dict(), "config": {"kind": "test", "num_heads": 3}}, file)
    return file


def run(*words) -> dict:
    return run_finetune([str(word) for word in words])


def flags_of(data, encoder, output, *more) -> list[str]:
    return [*SMALL, "--data_path", str(data), "--finetune", str(encoder), "--output_dir", str(output), *more]


@pytest.fixture(scope="module")
def trained(veri, encoder, teacher_files, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    clip = ["--clip_model", teacher_files[0], "--clip_pretrained", teacher_files[1]]
    return output, run(*flags_of(veri, encoder, output, "--report", *clip))


def test_a_run_leaves_a_model_that_scores_the_same_without_a_teacher(veri, trained, tmp_path, capsys):
    output, numbers = trained
    assert json.loads((output / "metrics.json").read_text()) == numbers
    for name in ("mA", "accuracy", "precision", "recall", "F1", "mA_supported", "top1_colour", "top1_type"):
        assert 0 <= numbers[name] <= 1 and 0 <= numbers[f"constant_{name}"] <= 1
    assert numbers["protocol"] == "veri776 (19 attributes, true above 0.45, F1 averaged over images)"
    assert numbers["text_vectors"].startswith("text tower of MiniClip-test, weights ")
    log = read_log(output)
    assert [row["epoch"] for row in log] == [0, 1, 1] and log[-1]["test_mA"] == numbers["mA"]
    assert log[1]["train_loss"] < log[0]["train_loss"]
    only_test = shutil.copytree(veri, tmp_path / "VeRi")
    (only_test / "train_label.xml").unlink()
    shutil.rmtree(only_test / "image_train")
    for name in ("model.pth", "model.safetensors"):
        found = run("--task", "attr", "--eval", "--resume", output / name, "--data_path", only_test, *CPU,
                    "--output_dir", tmp_path / name, "--batch_size", "8")  # fmt: skip
        assert found == numbers
    assert "constant answer" in capsys.readouterr().out


def test_the_files_of_a_run(trained, veri, teacher_files):
    output, numbers = trained
    with open(output / "attributes.csv", newline="") as opened:
        rows = list(csv.DictReader(opened))
    data = read_attribute_set(veri)
    assert [row["attribute"] for row in rows] == [a.name for a in data.attributes]
    assert [int(row["support"]) for row in rows] == (data.test.labels == 1).sum(axis=0).tolist()
    assert numbers["mA"] == pytest.approx(np.mean([float(row["mA"]) for row in rows]), abs=1e-5)
    assert [row["TPR"] == "" for row in rows] == ((data.test.labels == 1).sum(axis=0) == 0).tolist()
    page = (output / "report.html").read_text()
    assert numbers["protocol"] in page and numbers["text_vectors"] in page and "src=http" not in page
    for name in ("Worst attributes", "Confusions", "constant", "type: sedan", "<svg", "data:image/jpeg"):
        assert name in page
    found = load_model(output / "model.pth")
    model, known = found.model, AttributeStats(found.config)
    clip, tokenizer, _ = load_clip(*map(str, teacher_files))
    assert torch.equal(model.attr_vectors, encode_texts(clip, tokenizer, [sentence(a) for a in known.attributes]))
    assert known.constant.sum() >= 1 and known.rates == pytest.approx(data.train.rates())
    for name in ("model.pth", "checkpoint-last.pth", "checkpoint-1.pth", "model.safetensors"):
        assert read_checkpoint(output / name)["model"]  # weights_only
    assert torch.load(output / "model.pth", weights_only=True)["config"]["attributes"][0] == ["colour", "yellow"]


def test_other_text_vectors_are_another_run(veri, encoder, trained, tmp_path):
    np.save(tmp_path / "v.npy", np.eye(19))
    last = ["--resume", str(trained[0] / "checkpoint-last.pth"), "--attr_vectors", str(tmp_path / "v.npy")]
    with pytest.raises(InputError, match="other settings .*text_vectors text tower of .* -> v.npy"):
        run(*flags_of(veri, encoder, tmp_path / "o", *last))


def test_two_ranks_are_one(veri, encoder, trained, teacher_files, tmp_path):
    """Stochastic depth, the norm of the logits and the loss see the whole batch; scoring shares images."""
    clip = ["--clip_model", str(teacher_files[0]), "--clip_pretrained", str(teacher_files[1])]
    words = flags_of(veri, encoder, tmp_path / "two", "--batch_size", "4", *clip)
    done = run_command(command("main_finetune.py", *words, processes=2))
    assert done.returncode == 0, done.stderr
    for one, two in zip(read_log(trained[0]), read_log(tmp_path / "two")):
        for name in ("train_loss", "train_accuracy", "train_grad_norm"):
            assert two.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-4), name
    states = [read_checkpoint(folder / "model.pth")["model"] for folder in (trained[0], tmp_path / "two")]
    for name in ("bn.running_mean", "bn.running_var", "classifier.weight"):
        assert torch.allclose(states[0][name], states[1][name], rtol=1e-3, atol=1e-4), name
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["images"] == 30


def test_a_table_from_words_to_numbers_and_its_unknowns(veri, encoder, tmp_path, capsys):
    """Whatever the header names; random vectors are said loudly."""
    data, rows = read_attribute_set(veri), ["path,split,colour,pale"]
    for split, part in (("train", data.train), ("test", data.test)):
        for i in range(len(part)):
            colour = data.attributes[int(part.labels[i, :10].argmax())].value
            rows.append(f"{part.paths[i]},{split},{colour if i else ''},{int(part.labels[i, 3])}")
    (tmp_path / "own.csv").write_text("\n".join(rows) + "\n")
    columns = ["--attr_categories", "colour", "--attr_columns", "pale"]
    numbers = run(
        *flags_of(tmp_path / "own.csv", encoder, tmp_path / "o", *columns, "--report", "--input_size", "48,32")
    )
    printed = capsys.readouterr().out
    assert "THE TEXT VECTORS ARE RANDOM" in printed and "labels of train are unknown" in printed
    assert numbers["text_vectors"] == "random orthogonal: no text"
    assert "top1_colour" in numbers and "top1_pale" not in numbers and numbers["images"] == 30
    model = tmp_path / "o" / "model.pth"
    score = ["--task", "attr", "--eval", "--resume", model, *CPU, "--output_dir", tmp_path / "again"]
    assert run(*score, "--data_path", tmp_path / "own.csv", "--batch_size", "8") == numbers
    (tmp_path / "new.csv").write_text(f"path,split,colour,pale\n{data.test.paths[0]},test,pink,0\n")
    with pytest.raises(InputError, match="has colour 'pink', and the model knows"):
        run(*score, "--data_path", tmp_path / "new.csv")
    with pytest.raises(InputError, match="the model knows pale, colour: .*, not VeRi-776's"):
        run(*score, "--data_path", veri)
    other = run(*score, "--data_path", tmp_path / "own.csv", "--attr_threshold", "0.9")
    assert "true above 0.9" in other["protocol"] and other["recall"] < numbers["recall"]


def test_unreadable_test_images_are_listed_and_named_in_the_protocol(veri, trained, tmp_path):
    copy = shutil.copytree(veri, tmp_path / "VeRi")
    (copy / "image_test" / sorted(f.name for f in (copy / "image_test").iterdir())[2]).write_bytes(b"no image")
    numbers = run("--task", "attr", "--eval", "--resume", trained[0] / "model.pth", "--data_path", copy, *CPU,
                  "--output_dir", tmp_path / "out", "--report", "--batch_size", "8")  # fmt: skip
    assert numbers["protocol"].startswith("veri776/1-unreadable-left-out (") and numbers["images"] == 29
    assert "image_test/" in (tmp_path / "out" / "unreadable_test_images.txt").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--attr_threshold 1", r"--attr_threshold 1.0: must be in \(0, 1\)"),
        ("--smoothing 0.1", "drop --smoothing"),
        ("--attr_columns colour", "--attr_columns"),
        ("--attr_format table", "is neither a folder nor a manifest"),
        ("--batch_size 1", "the batch norm of the logits needs 2 images"),
        ("--batch_size 64", "48 training images do not fill one batch of 64"),
        ("--jpm", "--jpm belongs to --task reid"),
    ],
)
def test_contradictions_stop_at_once(veri, encoder, tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as caught:
        run(*flags_of(veri, encoder, tmp_path / "o", *flags.split()))
    assert "\n" not in str(caught.value)


def test_eval_takes_no_flag_that_would_change_the_model(veri, encoder, trained, tmp_path):
    model = f"--resume {trained[0] / 'model.pth'}"
    for flags, message in (
        (f"{model} --attr_vectors v.npy", "--attr_vectors would change the model"),
        (f"{model} --clip_pretrained openai", "--clip_pretrained would change the model"),
        (f"{model} --input_size 64", "--input_size would change the model"),
        (f"--resume {encoder}", "is no model of main_finetune.py: give the model.pth of a run with --task attr"),
    ):
        words = f"--task attr --eval --data_path {veri} --output_dir {tmp_path / 'o'} {flags}".split()
        with pytest.raises(InputError, match=message):
            run(*words, *CPU)


def test_the_recipe_is_vtbs():
    args = parse(main_finetune.get_args_parser(), "--task attr --data_path x --model vit_tiny_patch16".split())
    main_finetune.check_args(args)
    assert (args.img_size, args.batch_size, args.epochs, args.warmup_epochs) == ((224, 224), 128, 20, 5)
    assert (args.opt, args.weight_decay, args.min_lr_ratio, args.warmup_lr_ratio) == ("sgd", 1e-4, 0.002, 0.01)
    assert ATTR.default_lr(args) == 8e-3 and args.attr_threshold == 0.45
