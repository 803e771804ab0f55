"""The run as users start it: learning, resuming, ranks, signals, bad steps."""

import json
import math
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, command, parse, read_log, run_command, small_flags, write_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
import models_teacher
from datasets.items import PretrainDataset
from datasets.path_list import list_images
from datasets.samplers import EpochBatches
from engine_pretrain import trivial_distillation
from models_mae import MODELS, MaskedAutoencoderViT
from util.checkpoint import read_checkpoint
from util.errors import InputError
from util.loop import Meter
from util.optim import MuonAdamW, adamw_groups, build_adamw, cosine_lr


def run_main(flags: list[str]) -> dict:
    return main_pretrain.main(parse(main_pretrain.get_args_parser(), flags))


@pytest.fixture
def teacher(teacher_files, texts_file) -> list[str]:
    config, weights = teacher_files
    return f"--clip_model {config} --clip_pretrained {weights} --text_bank {texts_file} --kl_weight 0.05".split()


def curve(output) -> list[float]:
    """Every number of the log that does not depend on the machine."""
    machine = ("images_per_s", "data_wait", "peak_gigabytes")
    return [v for row in read_log(output) for k, v in row.items() if k not in machine]


def steps_of(content: dict) -> set[int]:
    return {int(state["step"]) for state in content["optimizer"]["state"].values()}


def all_finite(state: dict) -> bool:
    return all(torch.isfinite(value).all() for value in state.values())


def assert_equal(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_run_with_distillation(pictures, teacher, tmp_path):
    out = tmp_path / "run"
    record = run_main(small_flags(pictures, out, *teacher, "--vis_epochs", "1"))
    log, wanted = read_log(out), "pixel_baseline kl_baseline cos_baseline loss_pixel loss_sim loss_kl lr grad_norm"
    assert json.loads((out / "metrics.json").read_text()) == record == log[1]
    assert {f"train_{name}" for name in wanted.split()} | {"images_per_s", "data_wait", "bad_images"} <= set(log[0])
    assert [row["epoch"] for row in log] == [0, 1] and all(math.isfinite(v) for row in log for v in row.values())
    # a random untrained teacher answers nearly the same for every picture
    assert 0.5 < log[0]["train_cos_baseline"] < 1 and 0 < log[0]["train_kl_baseline"] < 0.5
    names = "checkpoint-1.pth encoder.safetensors args.json env.json text_bank.safetensors panels/epoch_0001.png"
    assert all((out / name).is_file() for name in names.split())
    encoder, content = (torch.load(out / f"{n}.pth", weights_only=True) for n in ("encoder", "checkpoint-last"))
    assert set(encoder) == {"model"} and len(encoder["model"]) == 150
    assert {"model", "optimizer", "epoch", "scaler", "args"} <= set(content) and content["epoch"] == 1
    assert isinstance(content["args"], dict) and any(k.startswith("distill_head.") for k in content["model"])


def test_trivial_baselines_of_known_answers():
    """Two images a quarter turn apart, (1, 0) and (0, 1), sure of texts of their own, (0.9, 0.1) and (0.1, 0.9)."""
    meter, half = Meter(), torch.tensor([0.5, 0.5])  # both means: of length sqrt(1/2), of entropy ln 2
    entropy = torch.tensor(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    terms = {"teacher_embed_mean": half, "teacher_marginal": half, "teacher_entropy": entropy}
    for ok in (True, True, True, False):  # a skipped one counts for nothing
        meter.update({k: v * (1 if ok else 7) for k, v in terms.items()}, torch.tensor(ok))
    found = trivial_distillation(*meter.read())
    assert found["cos_baseline"] == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert found["kl_baseline"] == pytest.approx(math.log(2) - 0.325083, abs=1e-5)


def test_no_distill_is_plain_mae_bit_for_bit(pictures, tmp_path):
    """The loop against a few lines of MAE with torch's own AdamW: same losses, same weights."""
    run_main(small_flags(pictures, tmp_path / "run", "--no_distill"))
    torch.manual_seed(0)
    model = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32), norm_pix_loss=True)
    optimizer = torch.optim.AdamW(adamw_groups(model, 0.05), lr=0.0, betas=(0.9, 0.95), fused=True)
    dataset = PretrainDataset(list_images(pictures), (32, 32), 4, seed=0, min_area=0.2)
    batches = EpochBatches(40, 8, 0, 1, 0)
    for epoch in range(2):
        batches.set_epoch(epoch)
        for step, items in enumerate(batches):
            samples = [dataset[item] for item in items]
            imgs, noise = (torch.stack([sample[name] for sample in samples]) for name in ("imgs", "noise"))
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(epoch + step / 5, 1e-3 * 8 / 256, 0, 1, 2)
            optimizer.zero_grad()
            model(imgs, 0.75, noise)["pixel"].backward()
            optimizer.step()
    assert_equal(read_checkpoint(tmp_path / "run" / "checkpoint-last.pth")["model"], model.state_dict())


@pytest.mark.parametrize(
    "flags, of_two", [("", ""), ("--accum_iter 2 --micro_batch 2", "--grad_checkpoint"), ("", "--compile")]
)
def test_two_ranks_equal_one(pictures, teacher, tmp_path, flags, of_two):
    """And activation checkpointing and compilation change no number."""
    one, two, more = tmp_path / "one", tmp_path / "two", [*teacher, *flags.split(), "--blr", "0.05"]
    run_main(small_flags(pictures, one, *more))
    words = small_flags(pictures, two, *more, *of_two.split(), "--batch_size", "4")
    done = run_command(command("main_pretrain.py", *words, processes=2))
    assert done.returncode == 0, done.stderr
    assert curve(two) == pytest.approx(curve(one), rel=1e-4 if of_two == "--compile" else 1e-5, abs=1e-7)


KILLED = """
import os, signal, sys
import engine_pretrain, main_pretrain

at, victims = int(sys.argv.pop(1)), sys.argv.pop(1).split(",")  # start and rank
batches, real = [], engine_pretrain.forward_backward
start_and_rank = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") + os.environ.get("RANK", "0")

def forward_backward(*args):
    batches.append(1)
    if len(batches) == at and start_and_rank in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

engine_pretrain.forward_backward = forward_backward
main_pretrain.main(main_pretrain.get_args_parser().parse_args())
"""


@pytest.mark.parametrize("processes, at", [(1, 7), (2, 9)])
def test_resume_after_kill_is_exact(pictures, teacher, tmp_path, processes, at):
    """Killed in the second epoch: at the first batch of an update (7), in the middle of one (9). Data workers that are
    left at the end are no news; the last line is the numbers."""
    more = [*teacher, *f"--accum_iter 2 --save_minutes 0 --batch_size {8 // processes}".split()]
    straight, killed, script = tmp_path / "straight", tmp_path / "killed", tmp_path / "killed.py"
    script.write_text(KILLED)
    words = small_flags(pictures, straight, *more, "--num_workers", "1")
    done = run_command(command("main_pretrain.py", *words, processes=processes))
    assert done.returncode == 0 and "Exception" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["epoch"] == 1
    words = small_flags(pictures, killed, *more, "--resume", "auto")
    done = run_command(command(str(script), str(at), "00,01", *words, processes=processes))
    assert done.returncode == -signal.SIGKILL
    done = run_command(command("main_pretrain.py", *words, processes=processes))
    assert done.returncode == 0, done.stderr
    assert f"checkpoint-last.pth at epoch 1, batch {(at - 6) // 2 * 2}" in done.stdout
    a, b = (torch.load(out / "checkpoint-last.pth", weights_only=True) for out in (straight, killed))
    assert_equal(a["model"], b["model"])
    for key, state in a["optimizer"]["state"].items():
        assert_equal(state, b["optimizer"]["state"][key])
    assert curve(straight) == curve(killed)
    assert steps_of(a) == {6}  # 5 batches an epoch, accumulated by 2: three updates, the last from one batch


def test_torchrun_starts_a_killed_rank_again(pictures, tmp_path):
    """The second start must not look for the first one's ranks."""
    (tmp_path / "killed.py").write_text(KILLED)
    words = small_flags(pictures, tmp_path / "run", *"--no_distill --batch_size 4 --resume auto".split())
    launcher = command("--max-restarts=1", str(tmp_path / "killed.py"), "7", "01", *words, processes=2)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launcher, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-last.pth at epoch 1, batch 1" in done.stdout and len(read_log(tmp_path / "run")) == 2


@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_stopping_leaves_a_resumable_checkpoint(pictures, tmp_path, processes, number):
    out, more = tmp_path / "run", f"--no_distill --epochs 300 --num_workers 1 --batch_size {8 // processes}"
    process = subprocess.Popen(
        command("main_pretrain.py", *small_flags(pictures, out, *more.split()), processes=processes), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch 1  3/5"):
            break
    os.killpg(process.pid, number)
    rest = process.stdout.read()
    assert process.wait(timeout=60) != 0
    assert "checkpoint-last.pth (epoch 1, batch " in rest and "go on with: main_pretrain.py --data_path" in rest
    content = read_checkpoint(out / "checkpoint-last.pth")
    assert steps_of(content) == {(content["epoch"] + 1) * 5 + content["batches_done"]} and min(steps_of(content)) >= 8


def poison(monkeypatch, factor: float, calls: range) -> None:
    """These calls of the model give a loss times `factor`."""
    forward, count = MaskedAutoencoderViT.forward, []

    def poisoned(self, *args, **kwargs):
        terms = forward(self, *args, **kwargs)
        count.append(1)
        return terms | {"pixel": terms["pixel"] * (factor if len(count) in calls else 1)}

    monkeypatch.setattr(MaskedAutoencoderViT, "forward", poisoned)


def test_non_finite_steps_are_skipped_and_reported(pictures, tmp_path, monkeypatch):
    poison(monkeypatch, math.nan, range(3, 4))
    run_main(small_flags(pictures, out := tmp_path / "run", "--no_distill"))
    log = read_log(out)
    assert [row["skipped_updates"] for row in log] == [1, 0]
    assert all(math.isfinite(v) for row in log for v in row.values())
    (report,) = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
    assert report["batches"] == [2, 3] and len(report["files"]) == 8 and report["terms"]["pixel"] == "nan"
    content = read_checkpoint(out / "checkpoint-last.pth")
    assert steps_of(content) == {9} and all_finite(content["model"])


@pytest.mark.parametrize("print_freq", ["1", "20"])
def test_too_many_bad_steps_stop_with_good_weights(pictures, tmp_path, monkeypatch, print_freq):
    """Also where good updates follow before the run looks: 5 good, 4 bad, 1 good in the second epoch."""
    poison(monkeypatch, math.inf, range(6, 10))
    out = tmp_path / "run"
    with pytest.raises(InputError, match="3 updates in a row"):
        run_main(small_flags(pictures, out, "--no_distill", "--max_bad_steps", "3", "--print_freq", print_freq))
    content = read_checkpoint(out / "checkpoint-last.pth")
    assert all_finite(content["model"]) and steps_of(content) == {5 + (print_freq == "20")}


def test_fp16_without_a_loss_scale_stops(pictures, tmp_path, monkeypatch):
    """Gradients that are never finite, under a finite loss."""
    build = main_pretrain.build_adamw

    def poisoned(model, *args):
        model.cls_token.register_hook(lambda gradient: gradient * math.nan)
        return build(model, *args)

    monkeypatch.setattr(main_pretrain, "build_adamw", poisoned)
    flags = small_flags(pictures, tmp_path / "run", "--no_distill", "--amp", "fp16", "--epochs", "30")
    with pytest.raises(InputError, match="fp16 finds no loss scale"):
        run_main(flags)
    monkeypatch.undo()  # what made them so is gone: the run goes on
    record = run_main([*flags, "--resume", "auto", "--epochs", "8", "--allow_change", "epochs"])
    assert record["skipped_updates"] < 5


def test_unreadable_images_are_replaced_counted_and_limited(tmp_path):
    data, out = write_pictures(tmp_path / "data", 40), tmp_path / "run"
    (data / "0007.png").write_bytes(b"not a picture")
    run_main(small_flags(data, out, "--no_distill", "--max_bad_ratio", "0.05"))
    assert [row["bad_images"] for row in read_log(out)] == [1, 1]
    assert "0007.png" in (out / "bad_images.txt").read_text()
    for index in range(12):
        (data / f"{index:04d}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="of 40 images could not be read"):
        run_main(small_flags(data, tmp_path / "run2", "--no_distill"))


def test_nothing_of_an_outage_is_in_the_weights(tmp_path, monkeypatch):
    """The folder goes away in the middle of an epoch and comes back: the run is as if nothing had happened."""
    data, away, cut = write_pictures(tmp_path / "data", 40), tmp_path / "away", tmp_path / "cut"
    flags = ["--no_distill", "--print_freq", "20"]
    run_main(small_flags(data, tmp_path / "straight", *flags))
    update, updates = main_pretrain.StopGuard.committing, []

    def counted(guard):
        updates.append(1)
        if len(updates) == 7:
            data.rename(away)
        return update(guard)

    monkeypatch.setattr(main_pretrain.StopGuard, "committing", counted)
    monkeypatch.setattr("datasets.images.PATIENCE", 0.0)
    with pytest.raises(InputError, match="the file system is away .*bad_images.txt, the update is not in the weights"):
        run_main(small_flags(data, cut, *flags, "--max_bad_ratio", "1"))
    away.rename(data)
    run_main(small_flags(data, cut, *flags, "--resume", "auto", "--max_bad_ratio", "0.01"))
    assert_equal(*(read_checkpoint(tmp_path / name / "encoder.pth")["model"] for name in ("straight", "cut")))
    assert curve(tmp_path / "straight") == curve(cut)


def test_weights_that_are_not_finite_replace_nothing(pictures, tmp_path, monkeypatch):
    out, end = tmp_path / "run", main_pretrain.end_epoch

    def poisoned(run, *args, **kwargs):
        if run.epoch == 1:
            run.bare.norm.weight.data[3] = math.nan
        return end(run, *args, **kwargs)

    monkeypatch.setattr(main_pretrain, "end_epoch", poisoned)
    with pytest.raises(InputError, match="is not written: 1 tensors of the model are not finite, first norm.weight"):
        run_main(small_flags(pictures, out, "--no_distill"))
    assert not (out / "encoder.pth").exists() and all_finite(read_checkpoint(out / "checkpoint-last.pth")["model"])


def test_a_continued_run_takes_its_precision_threads_and_warm_up_again(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, words = torch.get_num_threads(), " ".join(small_flags(pictures, tmp_path / "run", "--no_distill"))
    flags = words.replace("--amp none", "").replace("--warmup_epochs 1", "").split()
    try:
        monkeypatch.setattr("util.dist.pick_threads", lambda: 3)
        run_main([*flags, "--amp", "bf16", "--epochs", "1"])
        monkeypatch.setattr("util.dist.pick_threads", lambda: 1)  # a neighbour is busy now
        capsys.readouterr()
        run_main([*flags, "--epochs", "2", "--resume", "auto", "--allow_change", "epochs"])
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr().out
    assert all(words in said for words in ("bf16 (the run's)", "3 threads", "0.1 of warm-up"))
    assert "precision was" not in said


def test_init_from_an_encoder_starts_anew(pictures, tmp_path, capsys):
    for name, more in (("first", ""), ("second", f"--lr 0 --init {tmp_path}/first/encoder.safetensors")):
        run_main(small_flags(pictures, tmp_path / name, *f"--no_distill --epochs 1 {more}".split()))
    assert "loaded    150 tensors" in capsys.readouterr().out
    assert_equal(*(read_checkpoint(tmp_path / name / "encoder.pth")["model"] for name in ("first", "second")))


def test_resume_refuses_another_run(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    run_main(small_flags(pictures, out, "--no_distill", "--epochs", "1"))
    flags = small_flags(pictures, out, "--no_distill", "--resume", "auto")
    with pytest.raises(InputError, match=r"epochs 1 -> 2.*--allow_change"):
        run_main(flags)
    run_main([*flags, "--allow_change", "epochs"])
    assert [row["epoch"] for row in read_log(out)] == [0, 1]
    wrong = {"--allow_change epoch": "epoch: choose among .* epochs", "--clip_grad 1": "clip_grad 0.0 -> 1.0.*--allow"}
    for more, message in wrong.items():
        with pytest.raises(InputError, match=message):
            run_main([*flags, *more.split()])
    capsys.readouterr()
    (out / "checkpoint-last.pth").write_bytes((out / "checkpoint-last.pth").read_bytes()[:1000])
    run_main([*flags, "--epochs", "3", "--amp", "bf16", "--allow_change", "epochs"])
    said = capsys.readouterr().out
    assert "truncated or damaged" in said and "precision was float32 and is bfloat16" in said


def test_a_used_folder_is_not_started_over(pictures, tmp_path):
    out = tmp_path / "run"
    flags = small_flags(pictures, out, *"--no_distill --save_freq 1 --keep_checkpoints 2 --epochs 4".split())
    run_main(flags)
    kept = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    (out / ".checkpoint-last.pth.4711.tmp").write_bytes(b"half")  # of a kill: goes with the next start
    names = {"checkpoint-last.pth", "checkpoint-2.pth", "checkpoint-3.pth"}
    assert {name for name in kept if name.startswith("checkpoint")} == names
    for name in ("checkpoint-last.pth", "checkpoint-3.pth"):
        with pytest.raises(InputError, match=f"holds a run .{name}.: --resume auto goes on with it"):
            run_main(flags)
        (out / name).unlink()
    for name in names:
        (out / name).write_bytes(kept[name])
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == kept
    record = run_main([*flags, "--resume", "auto"])  # finished: nothing but its numbers
    assert json.loads((out / "metrics.json").read_text()) == record == read_log(out)[-1] and record["epoch"] == 3


def test_going_back_keeps_what_is_written(pictures, tmp_path):
    """From a file of an earlier epoch: new checkpoints stay beside those of later ones, TensorBoard keeps the
    finished epochs. Epochs 0, 2 and the last are saved, as in MAE."""
    out = tmp_path / "run"
    flags = small_flags(pictures, out, "--no_distill", "--save_freq", "2", "--epochs", "4")
    run_main(flags)
    assert {file.stem for file in out.glob("checkpoint-[0-9]*")} == {"checkpoint-0", "checkpoint-2", "checkpoint-3"}
    (out / "checkpoint-9.pth").write_bytes((out / "checkpoint-3.pth").read_bytes())
    run_main([*flags, "--keep_checkpoints", "1", "--resume", str(out / "checkpoint-0.pth")])
    names = sorted(file.name for file in out.glob("checkpoint-*.pth"))
    assert names == ["checkpoint-3.pth", "checkpoint-9.pth", "checkpoint-last.pth"]
    assert [row["epoch"] for row in read_log(out)] == [0, 1, 2, 3]
    events = EventAccumulator(str(out)).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1000, 2000, 3000, 4000]


RECIPE_OF = {  # images, processes, flags -> recipe, batch of a process, epochs, side, view of the teacher, its norm
    (1_000_000, 2, ""): ("paper", 64, 400, "224", "crop", "none"),
    (50_000, 1, "--epochs 10 --batch_size 256"): ("small", 256, 10, "128", "full", "whiten"),  # 1,950 updates
    (49_999, 1, ""): ("small", 32, 30, "128", "full", "whiten"),
    (4887, 2, ""): ("small", 16, 30, "128", "full", "whiten"),  # 30 epochs of 152 updates
    (1000, 1, ""): ("small", 32, 146, "128", "full", "whiten"),  # 4,500 updates of 31 an epoch
    (10, 1, ""): ("small", 10, 400, "128", "full", "whiten"),
    (1000, 1, "--model mae_vit_base_patch16 --teacher_view crop"): ("small", 32, 146, "224", "crop", "none"),
    (1000, 1, "--no_distill --accum_iter 2 --input_size 64"): ("small", 32, 300, "64", "full", "none"),
    (1000, 1, "--kl_weight 1"): ("small", 32, 146, "128", "full", "none"),
    (1000, 1, "--recipe paper"): ("paper", 64, 400, "224", "crop", "none"),
}


@pytest.mark.parametrize("case", RECIPE_OF, ids=str)
def test_the_recipe_follows_from_the_number_of_updates(monkeypatch, case):
    images, world, flags = case
    monkeypatch.setattr(main_pretrain, "get_world_size", lambda: world)
    args = main_pretrain.get_args_parser().parse_args(flags.split())
    main_pretrain.take_recipe(args, images)
    found = (args.recipe, args.batch_size, args.epochs, args.input_size, args.teacher_view, args.teacher_norm)
    assert found == RECIPE_OF[case]
    assert args.norm_pix_loss is (args.recipe == "small") and not set(flags.split("--")) & set(args.by_recipe)
    main_pretrain.check_args(args)


def test_the_small_recipe_embeds_once_and_goes_on_as_it_began(pictures, teacher_files, tmp_path, capsys, monkeypatch):
    """Nothing but pictures and a teacher is said. On two ranks, and when it goes on, it is the same run."""
    teacher = f"--clip_model {teacher_files[0]} --clip_pretrained {teacher_files[1]} --device cpu --amp none"
    words = f"--data_path {pictures} {teacher} --num_workers 0 --vis_epochs 0 --epochs 2".split()
    one, two = tmp_path / "one", tmp_path / "two"
    run_main([*words, "--output_dir", str(one)])
    said = capsys.readouterr().out
    assert "recipe small: model mae_vit_tiny_patch16, input_size 128, batch_size 32, blr 0.002" in said
    assert "note: 2 updates: expect no more than of random weights" in said
    log = read_log(one)
    assert log[1]["train_cos_baseline"] < 0.5 and "train_loss_kl" not in log[0]  # whitened: far from all alike
    loaded = []
    monkeypatch.setattr(models_teacher.FrozenTeacher, "forward", lambda *_: loaded.append(1))
    with pytest.raises(InputError, match="epochs 2 -> 3"):
        run_main([*words, "--output_dir", str(one), "--resume", "auto", "--epochs", "3"])
    run_main([*words, "--output_dir", str(one), "--resume", "auto"])
    assert not loaded and read_log(one) == log  # nothing was embedded again
    done = run_command(command("main_pretrain.py", *words, "--output_dir", str(two), processes=2))
    assert done.returncode == 0, done.stderr
    assert "batch_size 16" in done.stdout and curve(two) == pytest.approx(curve(one), rel=1e-5, abs=1e-7)


BAD = {
    "--teacher_norm whiten --teacher_view full --kl_weight 1": "--kl_weight compares with texts",
    "--teacher_norm whiten": "add --teacher_view full or --teacher_cache",
    "--no_distill --data_path /no/such/folder": "does not exist",
    "--no_distill --input_size 100": "multiple of the patch size 16",
    "--no_distill --input_size big": "one side or H,W",
    "--no_distill --accum_iter 9": "--accum_iter 5 or less",
    "--no_distill --batch_size 50": "at most 40",
    "--no_distill --warmup_epochs 3": "longer than --epochs",
    "--sim_weight 0 --kl_weight 0": "use --no_distill",
    "--no_distill --resume auto --init x.pth": "only one of them",
    "--no_distill --text_bank x.txt": "have no use with --no_distill",
    "--clip_model ViT-Q-99": "unknown to open_clip",
    "--clip_model ViT-B-32 --clip_pretrained /no/w.pt": "Three ways",
    "--no_distill --mask_ratio 1.0": "keeps 0 of 4",
    "--no_distill --init /no/such.pth": "does not exist",
    "--no_distill --resume /no/such.pth": "does not exist",
    "--no_distill --output_dir README.md": "README.md cannot be written to (File exists)",
    "--text_bank /no/such.txt --clip_pretrained /no/w.pt --clip_model ViT-B-32": "/no/such.txt",
    "--no_distill --crop_min 0": "must be in (0, 1]",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(pictures, tmp_path, flags):
    with pytest.raises(InputError) as caught:
        run_main(small_flags(pictures, tmp_path / "run", *flags.split()))
    assert BAD[flags] in str(caught.value) and "\n" not in str(caught.value)


def test_missing_rank_is_reported_not_waited_for(pictures, tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29741"}
    words = command("main_pretrain.py", *small_flags(pictures, tmp_path, "--no_distill", "--dist_timeout", "5"))
    started = time.monotonic()
    done = subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and time.monotonic() - started < 90 and "Traceback" not in done.stderr
    assert "rank 0 of 2" in done.stderr and "not every rank came" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_cuda_run(pictures, teacher, tmp_path, amp):
    run_main(small_flags(pictures, tmp_path / "run", *teacher, "--device", "cuda", "--amp", amp))
    assert all(math.isfinite(v) for row in read_log(tmp_path / "run") for v in row.values())


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw(pictures, tmp_path):
    torch.manual_seed(0)
    models = [MODELS["mae_vit_tiny_patch16"](img_size=(32, 32)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    before = {name: value.clone() for name, value in models[0].named_parameters()}
    for build, model in zip((MuonAdamW, build_adamw), models):
        optimizer = build(model, 0.01, 0.0)
        torch.manual_seed(1)
        model(torch.randn(4, 3, 32, 32))["pixel"].backward()
        optimizer.found_inf = torch.ones(())
        optimizer.step()  # skipped
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    for (name, ours), adamw in zip(models[0].named_parameters(), models[1].parameters()):
        if not ("blocks." in name and ours.ndim == 2):
            assert torch.equal(ours, adamw), name
            continue
        turned = torch.linalg.svdvals((ours - before[name]).detach()) / (0.01 * 0.2 * max(ours.shape) ** 0.5)
        assert 0.6 < turned.max() < 1.3 and turned[3] > 0.5, name  # Newton-Schulz makes them nearly equal
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_main(small_flags(pictures, whole, "--no_distill", "--opt", "muon", "--blr", "0.05", "--save_freq", "1"))
    again.mkdir()
    shutil.copy(whole / "checkpoint-0.pth", again / "checkpoint-last.pth")
    more = ("--no_distill", "--blr", "0.05", "--resume", "auto")
    with pytest.raises(InputError, match="opt muon -> adamw"):
        run_main(small_flags(pictures, again, *more))
    run_main(small_flags(pictures, again, *more, "--opt", "muon"))
    assert_equal(*(read_checkpoint(out / "checkpoint-last.pth")["model"] for out in (whole, again)))
