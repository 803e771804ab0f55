"""Fine-tuning for re-identification, from a set on disk to numbers: saved, continued, shared, refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, parse, read_log, run_command, run_finetune
from layouts import write_demo_reid
from PIL import Image

import main_finetune
from datasets.reid import read_reid
from datasets.samplers import PKBatches, pk_batches
from datasets.transforms import PadCropErase, erase_box, erase_boxes
from engine_finetune import seed_of_step
from finetune.reid import Reid, extract_reid
from finetune.task import load_model
from models_mae import MODELS
from models_transreid import TransReID, TransReIDConfig, hard_triplet_loss
from models_vit import SameOnAnyRanksDropPath, VisionTransformer
from util.checkpoint import read_checkpoint, write_safetensors
from util.errors import InputError
from util.optim import build_finetune_optimizer, layer_number, transreid_lr
from util.run_files import RunFiles

SMALL = (
    "--task reid --model vit_tiny_patch16 --input_size 32 --stride 8 --batch_size 8 --num_instances 2 "
    "--epochs 2 --warmup_epochs 1 --num_workers 0 --device cpu --amp none --print_freq 1 --opt adamw "
    "--lr 1e-3 --jpm --jpm_shift 3 --sie_camera --sie_view"
).split()
CPU = "--device cpu --amp none --num_workers 0".split()


@pytest.fixture(scope="module")
def veri(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "VeRi"
    write_demo_reid(folder, "veri776", train_ids=8, test_ids=5, images_per_id=6, size=32, processes=1)
    return folder


def finetune(data, output, *more) -> dict:
    flags = [*SMALL, "--data_path", str(data), "--output_dir", str(output), *more]
    return run_finetune(flags)


def score(model, data, output, *more) -> dict:
    words = f"--task reid --eval --resume {model} --data_path {data} --output_dir {output}"
    return run_finetune([*words.split(), *CPU, *more])


@pytest.fixture(scope="module")
def trained(veri, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    return output, finetune(veri, output, "--report", "--rerank")


def test_a_run_leaves_a_model_that_scores_the_same(veri, trained, tmp_path, capsys):
    output, numbers = trained
    assert {"mAP", "R1", "mINP", "reranked_mAP", "protocol", "sie"} <= set(numbers)
    assert json.loads((output / "metrics.json").read_text()) == numbers
    assert "same-camera matches removed" in numbers["protocol"] and numbers["sie"].startswith("SIE on (20 cam")
    log = read_log(output)
    assert [row["epoch"] for row in log] == [0, 1, 1] and log[-1]["test_mAP"] == numbers["mAP"]
    assert log[1]["train_loss"] < log[0]["train_loss"]
    for name, amp in (("model.pth", "none"), ("model.safetensors", "bf16")):  # which is for training only
        found = score(output / name, veri, tmp_path / name, "--batch_size", "8", "--amp", amp)
        assert found == {k: v for k, v in numbers.items() if not k.startswith("reranked")}
    assert numbers["protocol"].split(" #")[0] in (output / "report.html").read_text()
    assert "SIE on" in capsys.readouterr().out
    for name in ("model.pth", "checkpoint-last.pth", "checkpoint-1.pth", "model.safetensors"):
        assert read_checkpoint(output / name)["model"]  # weights_only
    found = load_model(output / "model.pth")
    assert found.config["set"] == "veri776" and found.config["camera_names"] is None
    config = found.model.config
    assert found.model.feature_dim == 5 * 192 and config.unknown_view and config.views == 9
    assert "ignored     0 tensors" in found.report and not list(output.glob(".*.tmp"))


def test_a_stop_in_the_middle_of_an_update_keeps_the_buffers_of_the_last(veri, tmp_path):
    """BatchNorm's statistics change in the forward pass: what is saved must not know of one that never became an
    update, and a bad batch must leave nothing in them."""
    flags = [*SMALL, "--data_path", str(veri), "--output_dir", str(tmp_path / "o")]
    args = parse(main_finetune.get_args_parser(), flags)
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


def test_eval_takes_no_flag_that_would_change_the_model(veri, trained, tmp_path):
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 12, 3).state_dict()}, tmp_path / "encoder.pth")
    model, encoder = f"--resume {trained[0] / 'model.pth'}", tmp_path / "encoder.pth"
    for flags, message in (
        (f"{model} --input_size 64", "--input_size would change the model"),
        (f"{model} --sie_weight 1", "--sie_weight would change the model"),
        (f"--finetune {encoder} --jpm", "--jpm would change the model"),
        (f"--resume {encoder}", "is no model of main_finetune.py: give the model.pth"),
        (f"--finetune {trained[0] / 'model.pth'}", "is a model of main_finetune.py: use --resume"),
        (f"{model} --tests 800", "--tests 800: .* has test"),
        (f"{model} --device mps", "choose auto, cuda or cpu"),
    ):
        words = f"--task reid --eval --data_path {veri} --output_dir {tmp_path / 'o'} {flags}".split()
        with pytest.raises(InputError, match=message):
            run_finetune(words)


def test_tables_number_cameras_by_name_and_not_by_row(veri, tmp_path):
    """A model with side information gives the same whatever the order of the rows, and knows its cameras."""
    data = read_reid(veri)
    rows = []
    for name, part in (("train", data.train), *zip(("query", "gallery"), data.tests["test"])):
        rows += [f"{part.paths[i]},{part.pids[i]},gate {part.camids[i]},{name}" for i in range(len(part))]
    head, own = "path,pid,camid,split", tmp_path / "own.csv"
    own.write_text("\n".join([head, *rows]) + "\n")
    words = [word for word in SMALL if word != "--sie_view"]
    run_finetune([*words, "--data_path", str(own), "--output_dir", str(tmp_path / "o"), "--epochs", "2"])
    found = {}
    other = [*rows, rows[-1].replace("gate", "door")]
    for name, lines in (("same", rows), ("reversed", rows[::-1]), ("other", other)):
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *lines]) + "\n")
        words = f"--task reid --eval --resume {tmp_path / 'o' / 'model.pth'} --data_path {tmp_path / name}.csv"
        words = [*words.split(), *CPU, "--batch_size", "1"]
        if name == "other":
            with pytest.raises(InputError, match="knows the cameras gate .*, not door"):
                run_finetune(words)
        else:
            found[name] = run_finetune(words)
    assert found["same"]["mAP"] == pytest.approx(found["reversed"]["mAP"], abs=1e-6)
    assert sorted(f.name for f in (tmp_path / "o").glob("eval_*")) == ["eval_other", "eval_reversed", "eval_same"]


def killed(words: list[str], watched, size: int) -> None:
    """Start, and kill -9 once `watched` is larger than `size` bytes."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (watched.exists() and watched.stat().st_size > size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_goes_on_bit_for_bit(veri, tmp_path):
    words = ["main_finetune.py", *SMALL, "--data_path", str(veri), "--save_minutes", "0", "--epochs", "3"]
    done = run_command(command(*words, "--output_dir", str(tmp_path / "straight")))
    assert done.returncode == 0, done.stderr
    broken = tmp_path / "broken"
    resumed = command(*words, "--output_dir", str(broken), "--resume", "auto")
    killed(resumed, broken / "checkpoint-last.pth", 0)  # in the first epoch
    done = run_command(resumed)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    straight, continued = (read_checkpoint(tmp_path / n / "model.pth")["model"] for n in ("straight", "broken"))
    assert all(torch.equal(straight[name], continued[name]) for name in straight)
    metrics = [(tmp_path / n / "metrics.json").read_text() for n in ("straight", "broken")]
    assert metrics[0] == metrics[1]


def test_two_ranks_are_one(veri, trained, tmp_path):
    """Training: the same losses up to rounding (the heads see the whole batch); scoring: same digits."""
    words = ["main_finetune.py", *SMALL, "--data_path", str(veri), "--batch_size", "4"]
    done = run_command(command(*words, "--output_dir", str(tmp_path / "two"), processes=2))
    assert done.returncode == 0, done.stderr
    words[-1] = "8"
    done = run_command(command(*words, "--output_dir", str(tmp_path / "one")))
    assert done.returncode == 0, done.stderr
    for one, two in zip(*(read_log(tmp_path / name) for name in ("one", "two"))):
        for name in ("train_loss", "train_id", "train_triplet", "train_grad_norm"):
            assert two.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-4), name
    score = f"main_finetune.py --task reid --eval --resume {trained[0] / 'model.pth'} --data_path {veri}"
    score = [*score.split(), *CPU, "--batch_size", "16"]
    found = []
    for processes in (1, 2):
        folder = tmp_path / f"eval{processes}"
        done = run_command(command(*score, "--output_dir", str(folder), processes=processes))
        assert done.returncode == 0, done.stderr
        found.append((folder / "metrics.json").read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["encoder.pth", "encoder.safetensors"])
def test_a_plain_encoder_can_be_scored_as_it_is(veri, tmp_path, name):
    torch.manual_seed(0)
    encoder = VisionTransformer((32, 32), 16, 192, 12, 3)
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    config = {"kind": "CGD-MAE encoder", **encoder.settings()}  # as a run of pre-training writes it
    write_safetensors(tmp_path / "encoder.safetensors", encoder.state_dict(), {"config": json.dumps(config)})
    flags = f"--task reid --eval --finetune {tmp_path / name} --input_size 48 --data_path {veri}"
    words = [*flags.split(), *CPU, "--output_dir", str(tmp_path / "out")]
    numbers = run_finetune(words)
    assert 0 < numbers["mAP"] < 1 and numbers["sie"] == "SIE off"


def test_unreadable_test_images_make_another_protocol(veri, tmp_path, trained):
    copy = shutil.copytree(veri, tmp_path / "VeRi")
    query, gallery = read_reid(copy).tests["test"]
    query.paths[1].write_bytes(b"no image")
    gallery.paths[0].write_bytes(b"")
    model = load_model(trained[0] / "model.pth").model
    found, whole = (
        extract_reid(model, images, "query", batch_size=4, num_workers=0)
        for images in (query, read_reid(veri).tests["test"][0])
    )
    assert found.unreadable[0].startswith(f"{query.paths.relative(1)}\tUnidentifiedImageError: cannot")
    assert torch.equal(found.values, whole.values[[0, *range(2, len(query))]]) and len(found.images) == len(query) - 1
    numbers = score(trained[0] / "model.pth", copy, tmp_path / "out")
    assert numbers["protocol"].startswith("veri776/2-unreadable-left-out (")
    assert len((tmp_path / "out" / "unreadable_test_images.txt").read_text().splitlines()) == 2


def test_unreadable_training_images_are_replaced_counted_and_limited(veri, tmp_path):
    copy = shutil.copytree(veri, tmp_path / "VeRi")
    data = read_reid(copy)
    data.train.paths[0].write_bytes(b"no image")
    with pytest.raises(InputError, match="1 of 4[08] images could not be read.*bad_images.txt"):
        finetune(copy, tmp_path / "strict")
    finetune(copy, tmp_path / "lax", "--max_bad_ratio", "0.1", "--epochs", "2")
    assert data.train.paths.relative(0) in (tmp_path / "lax" / "bad_images.txt").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--eval", "--eval scores one model"),
        ("--warmup_epochs 2", "leaves nothing of --epochs 2"),
        ("--stride 20", "--stride 20 at 32 x 32 px"),
        ("--num_instances 3", "--batch_size 8 x 1 processes is no multiple of --num_instances 3"),
        ("--batch_size 64", "show 8 vehicles, a batch needs 32"),
        ("--jpm_shift 99", "cannot be shifted by 99"),
        ("--erase 2", r"--erase 2.0: must be in \[0, 1\]"),
        ("--layer_decay 0", r"must be in \(0, 1\]"),
        ("--num_workers -1", "must not be negative"),
        ("--input_size 32,x", "--input_size 32,x"),
        ("--format vehicleid", "the list .*train_list.txt is missing|has no test_list"),
    ],
)
def test_contradictions_stop_at_once(veri, tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as caught:
        finetune(veri, tmp_path, *flags.split())
    assert "\n" not in str(caught.value)


def test_side_information_that_the_set_lacks_is_refused(tmp_path):
    write_demo_reid(tmp_path / "id", "vehicleid", train_ids=5, test_ids=5, images_per_id=6, size=16, processes=1)
    for flag, message in (("--sie_camera", "does not say which camera"), ("--sie_view", "knows no viewpoints")):
        words = [word for word in SMALL if not word.startswith("--sie")]
        words += ["--data_path", str(tmp_path / "id"), "--output_dir", str(tmp_path / "o"), flag]
        words += ["--num_instances", "2"]
        with pytest.raises(InputError, match=message):
            run_finetune(words)
    words = [*words[:-3], "--num_instances", "2", "--epochs", "2", "--report"]
    numbers = run_finetune(words)
    assert {"800_R1", "800_R1_std", "2400_mAP"} <= set(numbers) and "10 draws" in numbers["800_protocol"]
    assert (tmp_path / "o" / "report_800.html").exists()


def test_a_model_of_one_set_says_so_on_another(veri, trained, tmp_path):
    table = tmp_path / "own.csv"
    data = read_reid(veri)
    rows = [f"{data.train.paths[i]},{data.train.pids[i]},{50 + i % 3},train" for i in range(12)]
    for name, part in zip(("query", "gallery"), data.tests["test"]):
        rows += [f"{part.paths[i]},{part.pids[i]},{70 + i % 30},{name}" for i in range(len(part))]
    table.write_text("\n".join(["path,pid,camid,split", *rows]) + "\n")
    with pytest.raises(InputError, match="the cameras or views of veri776, and means nothing on table"):
        score(trained[0] / "model.pth", table, tmp_path / "o")


# parts


def test_augmentation_is_a_function_of_its_numbers():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    augment = PadCropErase((32, 24), erase=1.0)
    one, two, other = (augment(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one) and one["imgs"].shape == (3, 32, 24)
    assert not torch.equal(one["imgs"], other["imgs"])
    plain = PadCropErase((32, 24), flip=0.0, pad=0, erase=0.0)(image, np.random.default_rng(1))
    mirrored = PadCropErase((32, 24), flip=1.0, pad=0, erase=0.0)(image, np.random.default_rng(1))
    assert torch.equal(plain["imgs"].flip(2), mirrored["imgs"]) and plain["erase"][2] == 0


def test_erasing_fills_the_box_with_normal_noise_and_nothing_else():
    rng = np.random.default_rng(0)
    boxes = [erase_box(rng, (200, 100)) for _ in range(500)]
    areas = np.array([h * w for *_, h, w in boxes]) / 20_000
    assert 0.018 < areas.min() and areas.max() < 0.34 and 0.15 < areas.mean() < 0.2
    assert all(0 <= top and top + h <= 200 and 0 <= left and left + w <= 100 for top, left, h, w in boxes)
    imgs = torch.zeros(3, 3, 60, 50)
    seeds = torch.tensor([[5, 10, 40, 30, 7], [0, 0, 0, 0, 8], [5, 10, 40, 30, 7]])
    erase_boxes(imgs, seeds)
    assert torch.equal(imgs[0], imgs[2]) and not imgs[1].any()
    inside = imgs[0, :, 5:45, 10:40].clone()
    assert abs(inside.mean()) < 0.05 and abs(inside.std() - 1) < 0.05
    imgs[0, :, 5:45, 10:40] = 0
    assert not imgs[0].any()


def test_batches_of_ranks_are_parts_of_one(veri):
    pids = read_reid(veri).train.pids
    whole = PKBatches(pids, 8, 2, 0, 1, seed=3)
    parts = [PKBatches(pids, 4, 2, rank, 2, seed=3) for rank in (0, 1)]
    for batches in (whole, *parts):
        batches.set_epoch(4, 1)
    for one, left, right in zip(whole, *parts):
        assert one == left + right and len(one) == 8
    assert len(whole) == len(parts[0]) == whole.batches_per_epoch - 1
    slots = [slot for batch in whole for _, slot, _ in batch]
    assert len(set(slots)) == len(slots)


def test_a_vehicle_with_few_images_is_drawn_with_replacement():
    """TransReID: np.random.choice(idxs, K, replace=True), so 16 vehicles of 3 show 38.5 of 48 images at K 4."""
    pids = np.repeat(np.arange(17), [3] * 16 + [5])
    batches = [pk_batches(pids, 17, 4, 0, epoch)[0] for epoch in range(60)]
    assert all((np.bincount(pids[batch]) == 4).all() for batch in batches)
    few, more = (np.mean([len(np.unique(b[rule(pids[b])])) for b in batches]) for rule in (
        lambda x: x < 16, lambda x: x == 16))  # fmt: skip
    assert few == pytest.approx(48 * (1 - (2 / 3) ** 4), abs=1) and more == 4


def timm_cosine(base: float, first: float, last: float, epoch: int) -> float:
    """The scheduler of TransReID's code for a group of learning rate `base`, 5 of 120 epochs of warm-up."""
    if epoch < 5:
        return first + epoch * (base - first) / 5
    return last + 0.5 * (base - last) * (1 + math.cos(math.pi * epoch / 120))


def test_biases_have_twice_the_peak_and_the_same_ends():
    args = SimpleNamespace(lr=0.008, warmup_epochs=5.0, epochs=120, min_lr_ratio=0.002, warmup_lr_ratio=0.01)
    lr = Reid(args, "cpu").lr
    for epoch in range(1, 121):
        for factor in (1, 2):
            expected = timm_cosine(factor * 0.008, 0.01 * 0.008, 0.002 * 0.008, epoch)
            assert lr(epoch - 1 + 0.5, factor) == pytest.approx(expected)
    assert lr(119, 2) == lr(119)


def test_the_schedule_is_transreids():
    lrs = [transreid_lr(epoch, 0.008, 8e-5, 1.6e-5, 5, 120) for epoch in range(120)]
    assert lrs[0] == pytest.approx(8e-5 + (0.008 - 8e-5) / 5)
    assert lrs[4] == pytest.approx(1.6e-5 + (0.008 - 1.6e-5) * 0.5 * (1 + np.cos(np.pi * 5 / 120)))
    assert lrs[59] == pytest.approx((0.008 + 1.6e-5) / 2) and lrs[119] == pytest.approx(1.6e-5)
    assert max(lrs) == lrs[4]


def test_layers_and_groups_of_the_optimiser():
    model = TransReID(VisionTransformer((32, 32), 16, 24, 3, 3), 5, TransReIDConfig(jpm=True, parts=2, shift=2))
    names = {name: layer_number(name, 3) for name, _ in model.named_parameters()}
    assert names["base.pos_embed"] == names["base.patch_embed.proj.weight"] == 0
    assert names["base.blocks.1.norm1.bias"] == 2 and names["b1.0.mlp.fc1.weight"] == 3
    assert names["classifier.0.weight"] == names["bottleneck.1.weight"] == 4
    optimizer = build_finetune_optimizer(model, 3, "sgd", 0.1, 1e-4, layer_decay=0.5, bias_lr_factor=2)
    scale = {id(p): (g["lr_scale"], g["peak_scale"]) for g in optimizer.param_groups for p in g["params"]}
    assert scale[id(model.base.pos_embed)] == (0.5**4, 1) and scale[id(model.classifier[0].weight)] == (1, 1)
    assert scale[id(model.b1[0].mlp.fc1.bias)] == (0.5, 2)
    assert all(g["weight_decay"] == 1e-4 for g in optimizer.param_groups)
    adamw = build_finetune_optimizer(model, 3, "adamw", 0.1, 0.05)
    decay = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert decay[id(model.base.pos_embed)] == 0 and decay[id(model.b1[0].mlp.fc1.weight)] == 0.05


def test_a_skipped_first_update_leaves_no_trace_in_sgd():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = build_finetune_optimizer(model, 1, "sgd", 0.1, 0.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert torch.allclose(model.weight, before - 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triplets_are_not_rounded_by_autocast(dtype):
    """Features of LayerNorm at ViT-B's width: distances of nearby vehicles drown in half precision."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 768, generator=rng)
    features = centres.repeat_interleave(4, dim=0) + 0.7 * torch.randn(64, 768, generator=rng)
    pids = torch.arange(16).repeat_interleave(4)
    expected = hard_triplet_loss(10 * features, pids)
    with torch.autocast("cpu", dtype):
        assert torch.equal(hard_triplet_loss(10 * features, pids), expected)


def test_stochastic_depth_skips_whole_samples_and_keeps_the_mean():
    layer = SameOnAnyRanksDropPath(0.25)
    x = torch.ones(4000, 2, 3)
    assert torch.equal(layer.eval()(x), x)
    torch.manual_seed(seed_of_step(0, 1, 2))
    y = layer.train()(x)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y == y[:, :1, :1]).all() and abs(y.mean() - 1) < 0.05
    assert seed_of_step(0, 1, 2) != seed_of_step(0, 2, 1)


def test_transreids_loader_takes_our_encoder(tmp_path):
    """Its contract (`base.load_param`): every name but those with 'head' or 'dist' is looked up in its model,
    an unknown one is a KeyError; the path must not say 'distilled'."""
    distill = {"context": "attention", "bank": torch.randn(4, 8), "tau": 0.07, "hidden": 0}
    mae = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32), distill=distill)
    args = SimpleNamespace(output_dir=tmp_path, save_minutes=1, keep_checkpoints=1, resume="")
    RunFiles(args, {}, {}, [], "--init").export("encoder", mae)
    content = torch.load(tmp_path / "encoder.pth", weights_only=True)
    assert list(content) == ["model"] and len(content["model"]) == 150
    encoder = VisionTransformer((32, 32), 16, 192, 12, 3)
    theirs = {name: torch.zeros_like(value) for name, value in encoder.state_dict().items()}
    for name, value in content["model"].items():
        assert "head" not in name and "dist" not in name and value.dtype == torch.float32 and value.is_contiguous()
        theirs[name].copy_(value)
    assert all(torch.equal(theirs[name], mae.state_dict()[name]) for name in theirs)
