"""Every program that takes --input_size takes H,W: 32 px high and 48 wide, from an encoder of 32 x 32."""

import json

import numpy as np
import pytest
import torch
from conftest import small_flags, write_pictures
from PIL import Image
from test_house import PARSERS

import main_finetune
import main_linprobe
import main_pretrain
from benchmarks import run as benchmark
from models_vit import VisionTransformer, load_encoder
from tools import audit, checkpoint, compare, extract, reinforce, report, search
from util.checkpoint import read_checkpoint, read_safetensors_header

TASK = "--epochs 1 --warmup_epochs 0 --opt adamw --amp none --batch_size 4 --print_freq 1 --finetune {in}/encoder.pth"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, teacher_files):
    """Twelve pictures as a set of each task, an encoder, a run of pre-training."""
    folder = tmp_path_factory.mktemp("inputs")
    write_pictures(folder / "photos", 12)
    splits = ["train"] * 8 + ["query"] * 2 + ["gallery"] * 2
    rows = [f"photos/{i:04}.png,{i // 2 if i < 8 else 4 + i % 2},{split}" for i, split in enumerate(splits)]
    (folder / "reid.csv").write_text("\n".join(["path,pid,split", *rows]))
    rows = [f"photos/{i:04}.png,{'train' if i < 8 else 'val'},{i % 2}" for i in range(12)]
    (folder / "labels.csv").write_text("\n".join(["path,split,label", *rows]))
    for i in range(6):
        split = "train" if i < 4 else "val"
        for kind, ending in (("images", "png"), ("annotations", "png")):
            (folder / "parts" / kind / split).mkdir(parents=True, exist_ok=True)
            picture = Image.open(folder / f"photos/{i:04}.png")
            mask = Image.fromarray((np.arange(48)[None].repeat(40, 0) > 8 + 4 * i).astype(np.uint8))
            (picture if kind == "images" else mask).save(folder / f"parts/{kind}/{split}/{i}.{ending}")
    (folder / "parts/classes.json").write_text('{"classes": ["background", "door"]}')
    torch.manual_seed(0)
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 2, 3).state_dict()}, folder / "encoder.pth")
    (folder / "clip").write_text("--clip_model {} --clip_pretrained {}".format(*teacher_files))
    return folder


def pretrained(inputs, out):
    words = small_flags(inputs / "photos", out, *(inputs / "clip").read_text().split(), "--recipe", "paper")
    words += "--epochs 1 --warmup_epochs 0 --input_size 32,48".split()
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(words))
    assert load_encoder(out / "encoder.safetensors").img_size == (32, 48)
    words = f"images {inputs}/photos --checkpoint {out}/checkpoint-last.pth --output {out}/panels.png --count 1"
    report.main(report.get_args_parser().parse_args(words.split()))
    assert (out / "panels.png").is_file()


def scored(inputs, out):
    settings = json.loads((out / "args.json").read_text())
    assert settings["img_size"] == [32, 48] and (out / "metrics.json").is_file()
    assert read_checkpoint(out / "model.pth")["config"]["img_size"] in ([32, 48], (32, 48))


def extracted(inputs, out):
    """By hand: each picture squeezed to 48 wide, 32 high, through the encoder with its table resized."""
    pictures = [Image.open(inputs / f"photos/{i:04}.png").resize((48, 32), Image.Resampling.BICUBIC) for i in range(12)]
    imgs = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    with torch.no_grad():
        wanted = load_encoder(inputs / "encoder.pth", (32, 48)).eval().encode(imgs)["mean"].numpy()
    assert np.allclose(np.load(out / "f.npy"), wanted, atol=2e-2)


def converted(inputs, out):
    assert json.loads(read_safetensors_header(out / "e.safetensors")["config"])["img_size"] == [32, 48]


def said(name: str, key: str):
    return lambda inputs, out: json.loads((out / name).read_text())[key] == [32, 48] or pytest.fail(f"{name} {key}")


LABELS, REID = "--data_path {in}/labels.csv", "--data_path {in}/reid.csv"
FILE, PROBE = "--checkpoint {in}/encoder.pth", "--protocol knn mae --views crop --epochs 1 --warmup_epochs 0"
CASES = [
    (main_pretrain, "", pretrained),
    (main_finetune, f"--task reid {TASK} {REID} --stride 8 --jpm --jpm_shift 3 --num_instances 2", scored),
    (main_finetune, f"--task attr {TASK} {LABELS} --attr_columns label --attr_split val", scored),
    (main_finetune, f"--task fgvc {TASK} {LABELS}", scored),
    (main_finetune, f"--task seg {TASK} --data_path {{in}}/parts --decoder mla", scored),
    (main_linprobe, f"{FILE} {LABELS} {PROBE}", None),
    (main_linprobe, f"{FILE} {REID} --protocol reid", None),
    (extract, f"{FILE} --data_path {{in}}/photos --output {{out}}/f", extracted),
    (search, f"{{in}}/photos/0001.png --gallery {{in}}/photos {FILE} --output {{out}}/s", None),
    (compare, "--encoders {in}/encoder.pth histogram --reid {in}/reid.csv --output {out}/c", None),
    (compare, "--encoders {in}/encoder.pth --labels {in}/labels.csv --parts {in}/parts --parts_size 32,64 "
     "--output {out}/c", None),
    (audit, f"{FILE} {REID} --output {{out}}/a", None),
    (reinforce, "--data_path {in}/photos --views 1 --output {out}/cache {clip}",
     said("cache/cache.json", "input_size")),
    (checkpoint, "convert {in}/encoder.pth --to safetensors --output {out}/e.safetensors", converted),
    (benchmark, "step --model mae_vit_tiny_patch16 --batch_size 2 --rounds 1 --output {out}/b.json", None),
]  # fmt: skip


def test_no_program_is_forgotten():
    takes = {n for n, parsers in PARSERS.items() if any("--input_size" in p._option_string_actions for p in parsers)}
    assert takes == {program.__name__.replace(".", "/") + ".py" for program, *_ in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__} {case[1][:11]}")
def test_a_rectangle_goes_through(case, inputs, tmp_path):
    program, words, check = case
    if words:
        places = {"in": inputs, "out": tmp_path, "clip": (inputs / "clip").read_text()}
        words = f"{words.format(**places)} --input_size 32,48"
        words += " --device cpu" * (program is not checkpoint)
        words += " --num_workers 0" * (program not in (checkpoint, benchmark))
        words += f" --output_dir {tmp_path}" * (program in (main_finetune, main_linprobe))
        assert program.main(program.get_args_parser().parse_args(words.split()))
    if check:
        check(inputs, tmp_path)
