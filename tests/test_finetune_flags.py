"""What is wrong with flags, paths, tables and recipes shows in one sentence, before anything is loaded or fetched."""

import math
import os
import shlex
import subprocess

import numpy as np
import pytest
from conftest import ROOT, parse, run_finetune
from layouts import write_demo_reid

import main_finetune
from finetune import task as tasks
from finetune.flags import COMMON, TASKS, check_args
from util.errors import InputError

ADDRESS = "https://host.invalid/encoder.safetensors"
SCRIPTS = sorted(file.name for file in (ROOT / "scripts").glob("finetune_*.sh"))
SIGNS = {"veri776": "image_train", "var": "train_label.xml", "vehicleid": "train_test_split",
         "veriwild": "train_test_split", "stanfordcars": "devkit", "partimagenet": "images/train"}  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_demo_reid(folder / "veri", "veri776", train_ids=8, test_ids=5, images_per_id=6, size=16, processes=1)
    (folder / "t.csv").write_text("path,split,label\na.jpg,train,x\nb.jpg,train,y\n")
    np.save(folder / "v.npy", np.eye(3))
    return folder


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--task reid --data_path nowhere", "nowhere does not exist"),
        ("--task reid --data_path {sets}/veri --tests 800", "--tests 800: .* has test"),
        ("--task reid --data_path {sets}/veri --num_instances 3", "no multiple of --num_instances 3"),
        ("--task reid --data_path {sets}/t.csv", "(?i)'?pid'?"),
        ("--task reid --data_path {sets}/veri --resume gone.pth", "--resume gone.pth does not exist"),
        ("--task reid --data_path {sets}/veri --allow_change lrr", "--allow_change lrr: choose among"),
        ("--task reid --eval --data_path {sets}/veri --tests 800", "--tests 800: .* has test"),
        ("--task attr --data_path {sets}/t.csv --attr_categories hue", "hue"),
        ("--task attr --data_path {sets}/t.csv --clip_pretrained gone.pt", "--clip_pretrained gone.pt does not exist"),
        ("--task fgvc --data_path {sets}/t.csv --label_column model", "has no column 'model'"),
        ("--task fgvc --data_path {sets}/t.csv --resize 20", "--resize 20 px leaves no crop"),
        ("--task seg --data_path {sets}/veri", "missing|no folder"),
    ],
)
def test_nothing_is_fetched_before_the_rest_is_right(sets, tmp_path, monkeypatch, flags, message):
    def fetched(*_):
        raise AssertionError("fetched")

    for module in (main_finetune, tasks):
        monkeypatch.setattr(module, "fetch", fetched)
    words = f"{flags.format(sets=sets)} --finetune {ADDRESS} --output_dir {tmp_path / 'o'} --device cpu --num_workers 0"
    with pytest.raises(InputError, match=message) as caught:
        run_finetune(words.split())
    assert "\n" not in str(caught.value)


NUMBERS = [(task, f) for task, about in TASKS.items() for f in [*sum(COMMON.values(), []), *about.flags]
           if f.how.get("type") in (int, float)]  # fmt: skip


@pytest.mark.parametrize("task, flag", NUMBERS, ids=lambda x: getattr(x, "name", x))
def test_every_number_has_an_interval_and_nothing_else_passes(task, flag, capsys):
    low, high = map(float, flag.within[1:-1].split(","))
    wrong = ["nan", "inf", "-inf", "1e999", "x", "", "1²", "0x10", str(low - 1), "-1" if low >= 0 else "-9"]
    wrong += [] if math.isinf(high) else [str(high + 1)]
    wrong += [flag.within[1:-1].split(",")[0]] * (flag.within[0] == "(") + [str(high)] * (flag.within[-1] == ")")
    base = ["--task", task, "--data_path", "x", "--model", "vit_tiny_patch16"]
    for value in wrong:
        values = [value] * flag.how.get("nargs", 1)
        try:
            check_args(parse(main_finetune.get_args_parser(), [*base, f"--{flag.name}={values[0]}"] if len(values) == 1
                             else [*base, f"--{flag.name}", *values]))  # fmt: skip
        except InputError as error:
            assert f"--{flag.name}" in str(error) and "\n" not in str(error), value
        except SystemExit:
            said = capsys.readouterr().err
            assert said.startswith("error: ") and said.count("\n") == 1 and flag.name in said, (value, said)
        else:
            raise AssertionError(f"--{flag.name} {value} passes")


@pytest.mark.parametrize("task", TASKS)
def test_a_shorter_run_has_as_much_warm_up(task):
    def warm_up(*more: str) -> float:
        args = parse(main_finetune.get_args_parser(), ["--task", task, "--data_path", "x", "--model", MODEL, *more])
        check_args(args)
        return args.warmup_epochs

    recipe, epochs = warm_up(), {"reid": 120, "seg": 100}.get(task, 20)
    assert warm_up("--epochs", "2") == pytest.approx(recipe * 2 / epochs) and warm_up("--epochs", "1") < 1
    assert warm_up("--epochs", str(2 * epochs)) == recipe and warm_up("--epochs", "9", "--warmup_epochs", "3") == 3
    with pytest.raises(InputError, match="--warmup_epochs 40 leaves nothing of --epochs 30"):
        warm_up("--epochs", "30", "--warmup_epochs", "40")


MODEL = "vit_tiny_patch16"


def script(name: str, *words, **env) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": "echo"} | env
    return subprocess.run(
        ["bash", f"scripts/{name}", *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_recipes_say_what_is_wrong_and_run_what_parses(name, tmp_path):
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "set"
    (folder / SIGNS[name.removeprefix("finetune_").removesuffix(".sh").split("_")[0]]).mkdir(parents=True)
    for image in range(16 if "part" in name else 0):
        (folder / "images/train" / f"{image}.jpg").touch()
        (folder / "classes.json").touch()
    weights = tmp_path / "my encoder.pth"
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
    assert script(name, weights, folder, GPUS="3").returncode == script(name, weights, folder, GPUS="x").returncode == 2
    assert script(name, "--help").stdout.count("Usage:") == 1
    rows = script(name, weights, folder, "best").stderr.split("choose among ")[1].split()
    for row in rows:
        for checkpoint, more in (
            (weights, [row]),
            ("mae_vit_base", [row, "--epochs", "6"]),
            (weights, ["--epochs", "6"]),
        ):
            done = script(name, checkpoint, folder, *more)
            assert done.returncode == 0, done.stderr
            ran = shlex.split(done.stderr.splitlines()[-1].removeprefix("+ exec echo "))
            args = parse(main_finetune.get_args_parser(), ran[ran.index("main_finetune.py") + 1 :])
            check_args(args)
            assert args.finetune == str(checkpoint) and (args.epochs == 6) == ("6" in more)
            assert "/" in args.output_dir and (row in args.output_dir or row not in more)
