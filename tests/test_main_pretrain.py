"""The run as users start it: learning, resuming, ranks, signals, bad steps."""

import json
import math
import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, command, parse, read_log, run_command, small_flags, write_pictures

import main_pretrain
from engine_pretrain import trivial_distillation
from util.checkpoint import read_checkpoint
from util.errors import InputError
from util.loop import Meter


def run_main(flags: list[str]) -> dict:
    return main_pretrain.main(parse(main_pretrain.get_args_parser(), flags))


def teacher_flags(teacher_files, texts_file) -> list[str]:
    config, weights = teacher_files
    return f"--clip_model {config} --clip_pretrained {weights} --text_bank {texts_file} --kl_weight 0.05".split()


def curve(output) -> list[float]:
    """Every number of the log that does not depend on the machine."""
    machine = ("images_per_s", "data_wait", "peak_gigabytes", "compile_")
    return [v for row in read_log(output) for k, v in row.items() if not k.startswith(machine)]


def test_run_with_distillation(pictures, teacher_files, texts_file, tmp_path):
    out = tmp_path / "run"
    flags = small_flags(pictures, out, *teacher_flags(teacher_files, texts_file), "--vis_epochs", "1")
    record = run_main(flags)
    assert json.loads((out / "metrics.json").read_text()) == record
    log = read_log(out)
    assert [row["epoch"] for row in log] == [0, 1]
    wanted = "train_loss train_lr train_loss_pixel train_loss_sim train_loss_kl train_cos train_cos_baseline"
    wanted += " train_kl_baseline train_pixel_baseline train_grad_norm images_per_s data_wait bad_images"
    assert set(wanted.split()) <= set(log[0])
    assert all(math.isfinite(v) for row in log for v in row.values())
    # a random untrained teacher answers nearly the same for every picture
    assert 0.5 < log[0]["train_cos_baseline"] < 1 and 0 < log[0]["train_kl_baseline"] < 0.5
    names = "checkpoint-1.pth encoder.safetensors args.json env.json text_bank.safetensors panels/epoch_0001.png"
    assert all((out / name).is_file() for name in names.split())
    encoder = torch.load(out / "encoder.pth", weights_only=True)
    assert set(encoder) == {"model"} and len(encoder["model"]) == 150
    content = torch.load(out / "checkpoint-last.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "scaler", "args"} <= set(content)
    assert content["epoch"] == 1 and isinstance(content["args"], dict)
    assert any(k.startswith("distill_head.") for k in content["model"])


def test_trivial_baselines_of_known_answers():
    """Two images a quarter turn apart, each sure of a text of its own: numbers by hand."""
    meter = Meter()
    terms = {
        "teacher_embed_mean": torch.tensor([0.5, 0.5]),  # mean of (1, 0) and (0, 1): length sqrt(1/2)
        "teacher_marginal": torch.tensor([0.5, 0.5]),  # mean of (0.9, 0.1) and (0.1, 0.9): entropy ln 2
        "teacher_entropy": torch.tensor(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1))),
    }
    for _ in range(3):
        meter.update(terms, torch.tensor(True))
    meter.update({k: v * 7 for k, v in terms.items()}, torch.tensor(False))  # skipped: counts for nothing
    found = trivial_distillation(*meter.read())
    assert found["cos_baseline"] == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert found["kl_baseline"] == pytest.approx(math.log(2) - 0.325083, abs=1e-5)


def test_no_distill_is_plain_mae_bit_for_bit(pictures, tmp_path):
    """The loop against a few lines of MAE with torch's own AdamW: same losses, same weights."""
    from datasets.items import PretrainDataset
    from datasets.path_list import list_images
    from datasets.samplers import EpochBatches
    from models_mae import MODELS
    from util.optim import adamw_groups, cosine_lr

    out = tmp_path / "run"
    run_main(small_flags(pictures, out, "--no_distill"))
    torch.manual_seed(0)
    model = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32), norm_pix_loss=True)
    optimizer = torch.optim.AdamW(adamw_groups(model, 0.05), lr=0.0, betas=(0.9, 0.95), fused=True)
    dataset = PretrainDataset(list_images(pictures), (32, 32), 4, seed=0, min_area=0.2)
    batches = EpochBatches(40, 8, 0, 1, 0)
    for epoch in range(2):
        batches.set_epoch(epoch)
        for step, items in enumerate(batches):
            samples = [dataset[item] for item in items]
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(epoch + step / 5, 1e-3 * 8 / 256, 0, 1, 2)
            loss = model(torch.stack([s["imgs"] for s in samples]), 0.75, torch.stack([s["noise"] for s in samples]))[
                "pixel"
            ]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trained = torch.load(out / "checkpoint-last.pth", weights_only=True)["model"]
    assert set(trained) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(trained[key], value), key


@pytest.mark.parametrize("flags, of_two", [("", ""), ("--accum_iter 2 --micro_batch 2", ""), ("", "--compile")])
def test_two_ranks_equal_one(pictures, teacher_files, texts_file, tmp_path, flags, of_two):
    one, two = tmp_path / "one", tmp_path / "two"
    more = [*teacher_flags(teacher_files, texts_file), *flags.split(), "--blr", "0.05"]
    run_main(small_flags(pictures, one, *more))
    words = small_flags(pictures, two, *more, *of_two.split(), "--batch_size", "4")
    done = run_command(command("main_pretrain.py", *words, processes=2))
    assert done.returncode == 0, done.stderr
    assert curve(two) == pytest.approx(curve(one), rel=1e-4 if of_two else 1e-5, abs=1e-7)


def test_leftover_micro_batches_are_used(pictures, tmp_path):
    """5 micro-batches an epoch, accumulated by 2: three updates, the last from one batch."""
    out = tmp_path / "run"
    run_main(small_flags(pictures, out, "--no_distill", "--accum_iter", "2"))
    state = torch.load(out / "checkpoint-last.pth", weights_only=True)["optimizer"]["state"]
    assert {int(s["step"]) for s in state.values()} == {6}


KILLED = """
import os, signal, sys
import engine_pretrain, main_pretrain

at, victims = int(sys.argv.pop(1)), sys.argv.pop(1).split(",")  # start and rank
batches, real = [], engine_pretrain.forward_backward

def forward_backward(*args):
    batches.append(1)
    start_and_rank = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") + os.environ.get("RANK", "0")
    if len(batches) == at and start_and_rank in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

engine_pretrain.forward_backward = forward_backward
main_pretrain.main(main_pretrain.get_args_parser().parse_args())
"""


@pytest.mark.parametrize("processes, at", [(1, 7), (1, 9), (2, 9)])
def test_resume_after_kill_is_exact(pictures, teacher_files, texts_file, tmp_path, processes, at):
    """Killed in the second epoch: at the first batch of an update (7), in the middle of one (9)."""
    more = [*teacher_flags(teacher_files, texts_file), "--accum_iter", "2", "--save_minutes", "0",
            "--batch_size", str(8 // processes)]  # fmt: skip
    straight, killed, script = tmp_path / "straight", tmp_path / "killed", tmp_path / "killed.py"
    script.write_text(KILLED)
    words = small_flags(pictures, straight, *more)
    done = run_command(command("main_pretrain.py", *words, processes=processes))
    assert done.returncode == 0, done.stderr
    words = small_flags(pictures, killed, *more, "--resume", "auto")
    assert (
        run_command(command(str(script), str(at), "00,01", *words, processes=processes)).returncode == -signal.SIGKILL
    )
    done = run_command(command("main_pretrain.py", *words, processes=processes))
    assert done.returncode == 0, done.stderr
    assert f"checkpoint-last.pth at epoch 1, batch {(at - 6) // 2 * 2}" in done.stdout
    a = torch.load(straight / "checkpoint-last.pth", weights_only=True)
    b = torch.load(killed / "checkpoint-last.pth", weights_only=True)
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][key][k]) for k in state)
    assert curve(straight) == curve(killed)


def test_torchrun_starts_a_killed_rank_again(pictures, tmp_path):
    """The second start must not look for the first one's ranks."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    words = small_flags(pictures, tmp_path / "run", "--no_distill", "--batch_size", "4", "--resume", "auto")
    launcher = command(str(script), "7", "01", *words, processes=2)
    launcher.insert(launcher.index(str(script)), "--max-restarts=1")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launcher, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-last.pth at epoch 1, batch 1" in done.stdout and len(read_log(tmp_path / "run")) == 2


def test_ends_quietly(pictures, tmp_path):
    """Data workers that are left at the end are no news; the last line is the numbers."""
    flags = small_flags(pictures, tmp_path / "run", "--no_distill", "--num_workers", "2", "--epochs", "1")
    done = run_command(command("main_pretrain.py", *flags))
    assert done.returncode == 0 and "Exception" not in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["epoch"] == 0


@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_stopping_leaves_a_resumable_checkpoint(pictures, tmp_path, processes, number):
    out = tmp_path / "run"
    flags = small_flags(pictures, out, "--no_distill", "--epochs", "300", "--num_workers", "1",
                        "--batch_size", str(8 // processes))  # fmt: skip
    process = subprocess.Popen(
        command("main_pretrain.py", *flags, processes=processes), cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
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
    steps = {int(s["step"]) for s in content["optimizer"]["state"].values()}
    assert steps == {(content["epoch"] + 1) * 5 + content["batches_done"]} and min(steps) >= 8


def test_non_finite_steps_are_skipped_and_reported(pictures, tmp_path, monkeypatch):
    from models_mae import MaskedAutoencoderViT

    forward, calls = MaskedAutoencoderViT.forward, []

    def poisoned(self, *args, **kwargs):
        terms = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            terms["pixel"] = terms["pixel"] * float("nan")
        return terms

    monkeypatch.setattr(MaskedAutoencoderViT, "forward", poisoned)
    out = tmp_path / "run"
    run_main(small_flags(pictures, out, "--no_distill"))
    log = read_log(out)
    assert [row["skipped_updates"] for row in log] == [1, 0]
    assert all(math.isfinite(v) for row in log for v in row.values())
    (report,) = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
    assert report["batches"] == [2, 3] and len(report["files"]) == 8
    assert report["terms"]["pixel"] == "nan"
    state = torch.load(out / "checkpoint-last.pth", weights_only=True)
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {9}
    assert all(torch.isfinite(v).all() for v in state["model"].values())


@pytest.mark.parametrize("print_freq", ["1", "20"])
def test_too_many_bad_steps_stop_with_good_weights(pictures, tmp_path, monkeypatch, print_freq):
    """Also where good updates follow before the run looks: 5 good, 4 bad, 1 good in the second epoch."""
    from models_mae import MaskedAutoencoderViT

    forward = MaskedAutoencoderViT.forward
    calls = []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        terms = forward(self, *args, **kwargs)
        return terms | {"pixel": terms["pixel"] * (math.inf if 5 < len(calls) < 10 else 1)}

    monkeypatch.setattr(MaskedAutoencoderViT, "forward", poisoned)
    out = tmp_path / "run"
    with pytest.raises(InputError, match="3 updates in a row"):
        run_main(small_flags(pictures, out, "--no_distill", "--max_bad_steps", "3", "--print_freq", print_freq))
    content = read_checkpoint(out / "checkpoint-last.pth")
    assert all(torch.isfinite(v).all() for v in content["model"].values())
    assert {int(s["step"]) for s in content["optimizer"]["state"].values()} == {5 + (print_freq == "20")}


def test_fp16_without_a_loss_scale_stops(pictures, tmp_path, monkeypatch):
    """Gradients that are never finite, under a finite loss."""
    import main_pretrain

    build = main_pretrain.build_adamw

    def poisoned(model, *args):
        model.cls_token.register_hook(lambda gradient: gradient * math.nan)
        return build(model, *args)

    monkeypatch.setattr(main_pretrain, "build_adamw", poisoned)
    flags = small_flags(pictures, tmp_path / "run", "--no_distill", "--amp", "fp16", "--epochs", "30")
    with pytest.raises(InputError, match="fp16 finds no loss scale"):
        run_main(flags)
    monkeypatch.undo()  # what made them so is gone: the run goes on
    run_main([*flags, "--resume", "auto", "--epochs", "8", "--allow_change", "epochs"])
    assert [row["skipped_updates"] < 5 for row in read_log(tmp_path / "run")][-1]


def test_unreadable_images_are_replaced_counted_and_limited(tmp_path):
    data = write_pictures(tmp_path / "data", 40)
    (data / "0007.png").write_bytes(b"not a picture")
    out = tmp_path / "run"
    run_main(small_flags(data, out, "--no_distill", "--max_bad_ratio", "0.05"))
    assert [row["bad_images"] for row in read_log(out)] == [1, 1]
    assert "0007.png" in (out / "bad_images.txt").read_text()
    for index in range(12):
        (data / f"{index:04d}.png").write_bytes(b"broken")
    done = run_command(command("main_pretrain.py", *small_flags(data, tmp_path / "run2", "--no_distill")))
    assert done.returncode == 2
    assert "could not be read" in done.stderr and "Traceback" not in done.stderr


def test_nothing_of_an_outage_is_in_the_weights(tmp_path, monkeypatch):
    """The folder goes away in the middle of an epoch and comes back: the run is as if nothing had happened."""
    data, away = write_pictures(tmp_path / "data", 40), tmp_path / "away"
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
        run_main(small_flags(data, tmp_path / "cut", *flags, "--max_bad_ratio", "1"))
    away.rename(data)
    run_main(small_flags(data, tmp_path / "cut", *flags, "--resume", "auto", "--max_bad_ratio", "0.01"))
    a, b = (torch.load(tmp_path / name / "encoder.pth", weights_only=True)["model"] for name in ("straight", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert curve(tmp_path / "straight") == curve(tmp_path / "cut")


def test_weights_that_are_not_finite_replace_nothing(pictures, tmp_path, monkeypatch):
    out, end = tmp_path / "run", main_pretrain.end_epoch

    def poisoned(run, *args, **kwargs):
        if run.epoch == 1:
            run.bare.norm.weight.data[3] = math.nan
        return end(run, *args, **kwargs)

    monkeypatch.setattr(main_pretrain, "end_epoch", poisoned)
    with pytest.raises(InputError, match="is not written: 1 tensors of the model are not finite, first norm.weight"):
        run_main(small_flags(pictures, out, "--no_distill"))
    assert not (out / "encoder.pth").exists()
    assert all(torch.isfinite(v).all() for v in read_checkpoint(out / "checkpoint-last.pth")["model"].values())


def test_a_continued_run_takes_its_precision_threads_and_warm_up_again(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    out, before = tmp_path / "run", torch.get_num_threads()
    flags = [flag for flag in small_flags(pictures, out, "--no_distill") if flag not in ("--amp", "none")]
    at = flags.index("--warmup_epochs")
    del flags[at : at + 2]
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr("util.dist.pick_threads", lambda: 3)
        run_main([*flags, "--amp", "bf16", "--epochs", "1"])
        monkeypatch.setattr("util.dist.pick_threads", lambda: 1)  # a neighbour is busy now
        capsys.readouterr()
        run_main([*flags, "--epochs", "2", "--resume", "auto", "--allow_change", "epochs"])
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr().out
    assert (
        "bf16 (the run's)" in said and "3 threads" in said and "0.1 of warm-up" in said and "precision was" not in said
    )


def test_init_from_an_encoder_starts_anew(pictures, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    run_main(small_flags(pictures, first, "--no_distill"))
    run_main(small_flags(pictures, second, "--no_distill", "--init", str(first / "encoder.safetensors"),
                         "--epochs", "1", "--lr", "0"))  # fmt: skip
    assert "loaded    150 tensors" in capsys.readouterr().out
    a = torch.load(first / "encoder.pth", weights_only=True)["model"]
    b = torch.load(second / "encoder.pth", weights_only=True)["model"]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_refuses_another_run(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    run_main(small_flags(pictures, out, "--no_distill", "--epochs", "1"))
    flags = small_flags(pictures, out, "--no_distill", "--resume", "auto")
    with pytest.raises(InputError, match=r"epochs 1 -> 2.*--allow_change"):
        run_main(flags)
    run_main([*flags, "--allow_change", "epochs"])
    assert [row["epoch"] for row in read_log(out)] == [0, 1]
    with pytest.raises(InputError, match="--allow_change epoch: choose among .* epochs"):
        run_main([*flags, "--allow_change", "epoch"])
    with pytest.raises(InputError, match=r"clip_grad 0.0 -> 1.0.*--allow_change"):
        run_main([*flags, "--epochs", "2", "--clip_grad", "1"])
    capsys.readouterr()
    run_main([*flags, "--epochs", "3", "--amp", "bf16", "--allow_change", "epochs"])
    assert "precision was float32 and is bfloat16" in capsys.readouterr().out


def test_a_used_folder_is_not_started_over(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    flags = small_flags(pictures, out, "--no_distill", "--save_freq", "1", "--keep_checkpoints", "2")
    run_main([*flags, "--epochs", "4"])
    kept = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    (out / ".checkpoint-last.pth.4711.tmp").write_bytes(b"half")  # of a kill: goes with the next start
    assert {name for name in kept if name.startswith("checkpoint")} == {
        "checkpoint-last.pth", "checkpoint-2.pth", "checkpoint-3.pth"
    }  # fmt: skip
    with pytest.raises(InputError, match="holds a run .checkpoint-last.pth.: --resume auto goes on with it"):
        run_main(flags)
    (out / "checkpoint-last.pth").unlink()
    with pytest.raises(InputError, match="holds a run .checkpoint-3.pth."):
        run_main(flags)
    (out / "checkpoint-last.pth").write_bytes(kept["checkpoint-last.pth"])
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == kept
    capsys.readouterr()
    record = run_main([*flags, "--epochs", "4", "--resume", "auto"])  # finished: nothing but its numbers
    assert json.loads((out / "metrics.json").read_text()) == record == read_log(out)[-1] and record["epoch"] == 3


def test_going_back_keeps_what_is_written(pictures, tmp_path):
    """From a file of an earlier epoch: new checkpoints stay beside those of later ones, TensorBoard keeps the
    finished epochs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    flags = small_flags(pictures, out, "--no_distill", "--save_freq", "1", "--keep_checkpoints", "4")
    run_main([*flags, "--epochs", "4"])
    (out / "checkpoint-9.pth").write_bytes((out / "checkpoint-3.pth").read_bytes())
    run_main([*flags, "--epochs", "4", "--keep_checkpoints", "1", "--resume", str(out / "checkpoint-0.pth")])
    names = sorted(file.name for file in out.glob("checkpoint-*.pth"))
    assert names == ["checkpoint-3.pth", "checkpoint-9.pth", "checkpoint-last.pth"]
    assert [row["epoch"] for row in read_log(out)] == [0, 1, 2, 3]
    events = EventAccumulator(str(out)).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1000, 2000, 3000, 4000]


def test_resume_auto_passes_over_a_truncated_file(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    run_main(small_flags(pictures, out, "--no_distill"))
    last = out / "checkpoint-last.pth"
    last.write_bytes(last.read_bytes()[:1000])
    run_main(small_flags(pictures, out, "--no_distill", "--resume", "auto"))
    assert "truncated or damaged" in capsys.readouterr().out


def test_less_memory_same_run(pictures, teacher_files, texts_file, tmp_path):
    """Activation checkpointing changes no number."""
    teacher = teacher_flags(teacher_files, texts_file)
    plain, saving = tmp_path / "plain", tmp_path / "saving"
    run_main(small_flags(pictures, plain, *teacher))
    run_main(small_flags(pictures, saving, *teacher, "--grad_checkpoint"))
    assert curve(saving) == pytest.approx(curve(plain), rel=1e-5, abs=1e-7)


BAD = {
    "no such folder": ("--data_path /no/such/folder", "does not exist"),
    "patch does not divide": ("--input_size 100", "multiple of the patch size 16"),
    "size is no number": ("--input_size big", "one side or H,W"),
    "accumulation never updates": ("--accum_iter 9", "--accum_iter 5 or less"),
    "batch larger than data": ("--batch_size 50", "at most 40"),
    "warm-up longer than run": ("--warmup_epochs 3", "longer than --epochs"),
    "nothing to distil": ("--sim_weight 0 --kl_weight 0", "use --no_distill"),
    "resume and init": ("--resume auto --init x.pth", "only one of them"),
    "bank without teacher": ("--no_distill --text_bank x.txt", "have no use with --no_distill"),
    "unknown teacher": ("--clip_model ViT-Q-99", "unknown to open_clip"),
    "teacher file missing": ("--clip_model ViT-B-32 --clip_pretrained /no/w.pt", "Three ways"),
    "mask everything": ("--no_distill --mask_ratio 1.0", "keeps 0 of 4"),
    "missing init": ("--no_distill --init /no/such.pth", "does not exist"),
    "missing resume": ("--no_distill --resume /no/such.pth", "does not exist"),
    "output is a file": ("--no_distill --output_dir README.md", "README.md cannot be written to (File exists)"),
    "no such bank": ("--text_bank /no/such.txt --clip_pretrained /no/w.pt --clip_model ViT-B-32", "/no/such.txt"),
    "bad crop": ("--no_distill --crop_min 0", "must be in (0, 1]"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=list(BAD))
def test_bad_flags(pictures, tmp_path, flags, message):
    given = small_flags(pictures, tmp_path / "run", *flags.split())
    if "clip_model" not in flags and "--no_distill" not in flags and "weight" not in flags:
        given.append("--no_distill")
    with pytest.raises(InputError) as caught:
        run_main(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_rank_is_reported_not_waited_for(pictures, tmp_path):
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "29741"}  # fmt: skip
    words = small_flags(pictures, tmp_path / "run", "--no_distill", "--dist_timeout", "5")
    started = time.monotonic()
    done = subprocess.run(
        command("main_pretrain.py", *words), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and time.monotonic() - started < 90
    assert "rank 0 of 2" in done.stderr and "not every rank came" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_cuda_run(pictures, teacher_files, texts_file, tmp_path, amp):
    teacher = teacher_flags(teacher_files, texts_file)
    flags = small_flags(pictures, tmp_path / "run", *teacher, "--device", "cuda", "--amp", amp)
    run_main(flags)
    assert all(math.isfinite(v) for row in read_log(tmp_path / "run") for v in row.values())
