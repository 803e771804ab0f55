"""Fine-tuning on fine-grained classes, from a set on disk to numbers: saved, continued, shared, refused."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, parse, read_log, run_command, run_finetune
from layouts import write_demo_cars

import main_finetune
from datasets.fgvc import read_fgvc
from finetune import fgvc
from finetune.task import load_model
from metrics.fgvc import class_scores
from models_vit import VisionTransformer, load_encoder
from reports.fgvc import Answers, write_fgvc_report
from util.checkpoint import read_checkpoint
from util.errors import InputError

CPU = "--device cpu --amp none --num_workers 0".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of a drawn set of 4 classes, weights of an encoder of three blocks)."""
    folder = tmp_path_factory.mktemp("fgvc")
    write_demo_cars(folder / "cars", "transfg", classes=4, train=5, test=3, size=40)
    torch.manual_seed(0)
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 3, 3).state_dict()}, folder / "encoder.pth")
    return folder / "cars", folder / "encoder.pth"


def words(files, output, *more) -> list[str]:
    data, encoder = files
    flags = (
        f"--task fgvc --data_path {data} --finetune {encoder} --output_dir {output} --input_size 32 "
        "--stride 8 --batch_size 8 --epochs 2 --print_freq 1 --opt adamw --lr 1e-3"
    )
    return [*flags.split(), *CPU, *more]


def finetune(files, output, *more) -> dict:
    return run_finetune(words(files, output, *more))


def score(file, data, output, *more) -> dict:
    flags = f"--task fgvc --eval --resume {file} --data_path {data} --output_dir {output} --batch_size 8"
    return run_finetune([*flags.split(), *CPU, *more])


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    return output, finetune(files, output, "--report")


def test_a_run_leaves_a_model_that_scores_the_same(files, trained, tmp_path):
    output, numbers = trained
    assert {"top1", "top5", "mean_class_accuracy", "majority", "images", "protocol"} <= set(numbers)
    assert numbers["images"] == 12 and numbers["majority"] == 0.25 and numbers["top5"] == 1.0
    assert numbers["parts"] == "3 parts after 2 blocks"
    assert "12 test images of 4 classes; whole picture to 43 x 43 px, centre crop 32 x 32" in numbers["protocol"]
    assert json.loads((output / "metrics.json").read_text()) == numbers
    log = read_log(output)
    assert [row["epoch"] for row in log] == [0, 1, 1] and log[-1]["test_top1"] == numbers["top1"]
    total = log[0]["train_ce"] + log[0]["train_contrastive"]
    assert log[0]["train_loss"] == pytest.approx(total, rel=1e-5)
    for name, amp in (("model.pth", "none"), ("model.safetensors", "bf16")):  # which is for training only
        assert score(output / name, files[0], tmp_path / name, "--amp", amp) == numbers


def test_everything_on_disk_loads_without_running_code(trained):
    output, _ = trained
    for name in ("model.pth", "checkpoint-last.pth", "checkpoint-1.pth", "model.safetensors"):
        assert read_checkpoint(output / name)["model"]
    found = load_model(output / "model.pth")
    model, config, report = found.model, found.config, found.report
    assert config["classes"] == read_fgvc_classes(output) and config["resize"] == [43, 43]
    assert len(model.base.blocks) == 2 and model.head.weight.shape == (4, 192) and not model.training
    assert "ignored     0 tensors" in report


def read_fgvc_classes(output) -> list[str]:
    return read_fgvc(json.loads((output / "args.json").read_text())["data_path"]).classes


def test_the_page_shows_what_was_measured(trained):
    output, numbers = trained
    page = (output / "report.html").read_text()
    assert numbers["protocol"] in page and f"{100 * numbers['top1']:.2f} %" in page
    assert "Most confused classes" in page and "truth \\ answer" in page
    assert "http" not in page.replace("http-equiv", "")


def test_confused_pairs_and_worst_classes_by_hand(files, tmp_path):
    """Of class 1 two images are taken for 3 and one for 0; of class 3 one for 1; the rest is right."""
    data = read_fgvc(files[0])
    answers = data.test.labels.copy()
    ones, threes = (np.flatnonzero(data.test.labels == k) for k in (1, 3))
    answers[ones], answers[threes[0]] = (3, 3, 0), 1
    logits = 5 * torch.nn.functional.one_hot(torch.from_numpy(answers), 4).float()
    scores = class_scores(logits, torch.from_numpy(data.test.labels))
    names = data.classes
    write_fgvc_report(tmp_path / "page.html", "", {}, Answers(data.test, names, logits, scores))
    table, page, wrong = re.split("<h2", (tmp_path / "page.html").read_text())[1:]
    pairs = re.findall("<article.*?</article>", page, re.S)
    assert len(pairs) == 2 and f"<b>{names[1]}</b><br>2 of 3 taken for the other" in pairs[0]
    assert f"<b>{names[3]}</b><br>1 of 3 taken for the other" in pairs[0]
    assert pairs[0].count('class="wrong"><img') == 4 and pairs[0].count('class="right"><img') == 2
    assert f"<b>{names[0]}</b><br>0 of 3" in pairs[1] and f"<b>{names[1]}</b><br>1 of 3" in pairs[1]
    table = table[table.index("<thead>") :]
    assert table.index(names[1]) < table.index("0.00 %") < table.index("66.67 %") < table.index("100.00 %")
    assert f"{names[3]} (2 x)" in table and "(1 x)" in table
    assert wrong.count('class="wrong"><img') == 4


def test_the_baseline_has_no_parts_and_learns(files, tmp_path):
    flags = "--parts off --report --epochs 10 --no-auto_augment --resize 32 --drop_path 0 --print_freq 20"
    numbers = finetune(files, tmp_path / "o", *flags.split())
    log = read_log(tmp_path / "o")
    assert numbers["parts"] == "no parts" and "train_contrastive" not in log[0]
    assert log[9]["train_accuracy"] > 0.7 and log[9]["train_ce"] < 0.6 * log[0]["train_ce"]
    assert len(load_model(tmp_path / "o" / "model.pth").model.base.blocks) == 3
    assert len(load_encoder(tmp_path / "o" / "model.pth").blocks) == 3


def test_a_run_that_is_stopped_in_an_epoch_goes_on_bit_for_bit(files, trained, tmp_path, monkeypatch):
    """Stopped in the second update of the second epoch; stochastic depth, AutoAugment and all."""
    true, calls = fgvc.Fgvc.loss, []

    def stops(*what):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return true(*what)

    monkeypatch.setattr(fgvc.Fgvc, "loss", stops)
    with pytest.raises(KeyboardInterrupt):
        finetune(files, tmp_path / "o", "--save_minutes", "0")
    numbers = finetune(files, tmp_path / "o", "--resume", "auto")
    assert len(calls) == 5 and numbers == trained[1]  # the second update alone was done again
    ours, theirs = (read_checkpoint(o / "model.pth")["model"] for o in (tmp_path / "o", trained[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(InputError, match="contrastive_weight"):
        finetune(files, tmp_path / "o", "--resume", "auto", "--contrastive_weight", "2")


def test_two_ranks_are_one(files, trained, tmp_path):
    """The contrastive loss sees the whole batch, so its gradient and all losses are those of one process."""
    flags = words(files, tmp_path / "two", "--batch_size", "4")
    done = run_command(command("main_finetune.py", *flags, processes=2))
    assert done.returncode == 0, done.stderr
    for one, two in zip(read_log(trained[0]), read_log(tmp_path / "two")):
        for name in ("train_loss", "train_ce", "train_contrastive", "train_grad_norm", "train_accuracy"):
            assert two.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-4), name
    numbers = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for name, value in trained[1].items():  # an answer at the edge may fall to either side
        assert numbers[name] == (pytest.approx(value, abs=0.1) if isinstance(value, float) else value)


def test_unreadable_images_are_counted(files, trained, tmp_path):
    copy = shutil.copytree(files[0], tmp_path / "cars")
    data = read_fgvc(copy)
    data.test.paths[1].write_bytes(b"no image")
    data.train.paths[0].write_bytes(b"")
    numbers = score(trained[0] / "model.pth", copy, tmp_path / "o")
    assert numbers["images"] == 11 and "1 unreadable left out" in numbers["protocol"]
    assert "cars_test/00002.jpg" in (tmp_path / "o" / "unreadable_test_images.txt").read_text()
    with pytest.raises(InputError, match="1 of 20 images could not be read"):
        finetune((copy, files[1]), tmp_path / "strict")


def test_schedule_is_linear_then_a_cosine_in_updates():
    args = SimpleNamespace(lr=0.03, warmup_epochs=1.0, epochs=20, min_lr_ratio=0.0, warmup_lr_ratio=0.0)
    lr = fgvc.Fgvc(args, "cpu").lr
    assert [lr(0), lr(0.5), lr(1)] == pytest.approx([0, 0.015, 0.03]) and lr(20) == pytest.approx(0, abs=1e-9)
    assert lr(10) == pytest.approx(0.03 * 0.5 * (1 + np.cos(np.pi * 9 / 19)))
    args.warmup_lr_ratio = 0.1
    assert lr(0) == pytest.approx(0.003)


def test_defaults_are_the_recipes():
    args = parse(main_finetune.get_args_parser(), ["--task", "fgvc", "--data_path", "x", "--model", "vit_base_patch16"])
    main_finetune.check_args(args)
    found = (args.img_size, args.batch_size, args.opt, args.weight_decay, args.clip_grad, args.epochs)
    assert found == ((448, 448), 16, "sgd", 0.0, 1.0, 20) and args.contrastive_weight == 1
    assert main_finetune.TASKS["fgvc"].default_lr(args) == 0.03


def test_the_help_of_a_task_shows_its_flags_alone(capsys):
    with pytest.raises(SystemExit):
        main_finetune.get_args_parser().parse_args(["--task", "fgvc", "--help"])
    shown = capsys.readouterr().out
    assert "--parts" in shown and "--batch_size" in shown and "--num_instances" not in shown and "seg)" not in shown
    code = "import sys, finetune.flags; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--contrastive_weight -1", "--contrastive_weight -1.0: must be in"),
        ("--contrastive_margin 1", r"--contrastive_margin 1.0: must be in \[-1, 1\)"),
        ("--resize 24", "--resize 24 px leaves no crop of 32 x 32 px: give 32"),
        ("--batch_size 64", "20 training images do not fill one batch of 64"),
        ("--label_column model --data_path {table}", "has no column 'model': it has path, split, label"),
        ("--data_path {table}", "has no row with split 'test' and a 'label': it has train"),
        ("--data_path nowhere", "nowhere does not exist"),
        ("--stride 20", "--stride 20 at 32 x 32 px"),
        ("--finetune nowhere.pth", "nowhere.pth does not exist"),
        ("--warmup_epochs 2", "leaves nothing of --epochs 2"),
        ("--eval", "--eval scores one model|before it is trained"),
        ("--jpm", "--jpm belongs to --task reid"),
        ("--smoothing 1", "--smoothing 1.0: must be in"),
    ],
)
def test_contradictions_stop_at_once(files, tmp_path, flags, message):
    table = tmp_path / "t.csv"
    table.write_text("path,split,label\na.jpg,train,x\nb.jpg,train,y\n")
    with pytest.raises(InputError, match=message) as caught:
        finetune(files, tmp_path / "o", *flags.format(table=table).split())
    assert "\n" not in str(caught.value)


def test_eval_takes_the_model_as_it_is(files, trained, tmp_path):
    model, (data, encoder) = trained[0] / "model.pth", files
    for file, flags, message in (
        (model, "--parts off", "--parts would change the model that --eval scores"),
        (model, "--input_size 64", "--input_size would change the model"),
        (model, "--resize 24", "--resize 24 px leaves no crop of 32 x 32 px"),
        (encoder, "", "is no model of main_finetune.py: give the model.pth of a run with --task fgvc"),
    ):
        with pytest.raises(InputError, match=message):
            score(file, data, tmp_path / "o", *flags.split())
    other = tmp_path / "others"
    write_demo_cars(other, "annos", classes=6, train=1, test=1, size=32)
    with pytest.raises(InputError, match="knows 4 classes .*, not '.* Hatchback 2012' of 2 test images"):
        score(model, other, tmp_path / "o")
    with pytest.raises(InputError, match="model.pth is a TransFG model: its last block"):
        load_encoder(model)
    larger = score(model, data, tmp_path / "large", "--resize", "48")
    assert "whole picture to 48 x 48 px, centre crop 32 x 32" in larger["protocol"]
