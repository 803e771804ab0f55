"""What users see of speed and memory: profile, estimate, advice, the batch that fits."""

import json
import time

import pytest
import torch
from conftest import command, parse, run_command, small_flags

import engine_pretrain
import main_pretrain
import util.loop
from tools import benchmark_data, benchmark_growth, benchmark_pretrain, estimate
from util.errors import InputError
from util.meter import largest_that_fits
from util.step_profile import PARTS, compile_counts


def run_main(flags):
    return main_pretrain.main(parse(main_pretrain.get_args_parser(), flags))


def test_profile_accounts_for_the_whole_step(pictures, teacher_files, texts_file, tmp_path):
    teacher = ["--clip_model", str(teacher_files[0]), "--clip_pretrained", str(teacher_files[1])]
    flags = small_flags(pictures, tmp_path / "run", *teacher, "--text_bank", str(texts_file), "--profile", "8")
    done = run_command(command("main_pretrain.py", *flags))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "profile" / "metrics.json").read_text())
    parts = result["parts_ms"]
    assert set(PARTS) <= set(parts) and sum(parts.values()) == pytest.approx(result["update_ms"])
    for name in ("data wait", "teacher", "encoder", "decoder", "distill head", "backward", "optimiser"):
        assert 0 < parts[name] < result["update_ms"], name
    assert 0 <= parts["other"] < 0.35 * result["update_ms"], "most of the step is accounted for"
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    named = [event for event in trace["traceEvents"] if event.get("name") == "encoder"]
    assert len(named) >= 8
    assert not list((tmp_path / "run").glob("checkpoint*")) and not (tmp_path / "run" / "log.txt").exists()


def test_estimate_agrees_with_the_run(pictures, tmp_path):
    """Hours of the recipe against the time such epochs really take."""
    flags = small_flags(pictures, tmp_path / "run", "--no_distill", "--epochs", "12", "--accum_iter", "2")
    args = estimate.get_estimate_parser().parse_args([*flags, "--steps", "20"])
    result = estimate.main(args)
    assert (result["images"], result["epochs"], result["micro_batch"]) == (40, 12, 8)
    started = time.perf_counter()
    record = run_main(flags)
    seconds = time.perf_counter() - started
    # other processes may run beside either: a factor of three finds wrong units and wrong counts
    assert result["images_per_s"] / 3 < record["images_per_s"] < result["images_per_s"] * 3
    assert result["hours"] * 3600 < 3 * seconds
    assert result["hours"] == pytest.approx(40 * 12 / result["images_per_s"] / 3600)
    assert not list((tmp_path / "run").glob("estimate/checkpoint*"))


@pytest.mark.parametrize("limit", [0, 1, 5, 100, 511])
def test_search_finds_the_limit(limit):
    def attempt(count):
        if count > limit:
            raise torch.OutOfMemoryError

    found = largest_that_fits(attempt, 512, torch.device("cpu"))
    assert limit - max(limit // 16, 1) <= found <= limit and (found > 0 or limit <= 1)


@pytest.mark.parametrize("limit, message", [(5, r"8 images at a time .* about 5 do: use --micro_batch 5"),
                                            (0, "not even one image fits")])  # fmt: skip
def test_batch_that_does_not_fit_names_one_that_does(pictures, tmp_path, monkeypatch, limit, message):
    real = engine_pretrain.forward_piece

    def small_memory(run, piece, mask_ratio):
        if len(piece["imgs"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(run, piece, mask_ratio)

    monkeypatch.setattr(engine_pretrain, "forward_piece", small_memory)
    with pytest.raises(InputError, match=message):
        run_main(small_flags(pictures, tmp_path / "run", "--no_distill"))


def test_slow_data_is_pointed_at_once(pictures, tmp_path, monkeypatch, capsys):
    real = main_pretrain.PretrainDataset.__getitem__

    def slow(self, item):
        time.sleep(0.05)
        return real(self, item)

    monkeypatch.setattr(main_pretrain.PretrainDataset, "__getitem__", slow)
    run_main(small_flags(pictures, tmp_path / "run", "--no_distill", "--epochs", "1"))
    printed = capsys.readouterr().out
    assert printed.count("raise --num_workers (now 0 a rank)") == 1


def test_silent_start_is_broken(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(util.loop, "QUIET_SECONDS", 0.05)
    real = main_pretrain.PretrainDataset.__getitem__
    monkeypatch.setattr(main_pretrain.PretrainDataset, "__getitem__", lambda s, i: time.sleep(0.02) or real(s, i))
    run_main(small_flags(pictures, tmp_path / "run", "--no_distill", "--epochs", "1"))
    assert "still waiting for the first batch" in capsys.readouterr().out


def test_recompilations_are_counted():
    """A new shape makes torch compile again; the counter sees it."""

    def double(x: torch.Tensor) -> torch.Tensor:
        # code of its own: torch counts by code object, and nn.Linear may have been compiled by another test
        return 2 * x

    block = torch.compile(double, backend="eager", dynamic=False)
    before = compile_counts()
    block(torch.zeros(2, 4))
    first = compile_counts()
    block(torch.zeros(3, 4))
    second = compile_counts()
    assert first["graphs"] > before["graphs"] and first["recompiles"] == before["recompiles"]
    assert second["recompiles"] == first["recompiles"] + 1


def test_gpu_decoding_without_a_gpu_is_refused(pictures, tmp_path):
    with pytest.raises(InputError, match="--decode gpu needs a CUDA device"):
        run_main(small_flags(pictures, tmp_path / "run", "--no_distill", "--decode", "gpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_decoding_trains(pictures, tmp_path):
    flags = small_flags(pictures, tmp_path / "run", "--no_distill", "--decode", "gpu", "--device", "cuda")
    assert run_main(flags)["train_loss"] > 0


def test_data_benchmark_counts_what_it_times(pictures, tmp_path, capsys):
    flags = f"--data_path {pictures} --images 8 --rounds 2 --input_size 32 --large 2 --output {tmp_path}/b.json"
    rows = benchmark_data.main(benchmark_data.get_args_parser().parse_args(flags.split()))["rows"]
    assert [(row["set"], row["variant"]) for row in rows] == [
        (name, variant) for name in ("given", "large") for variant in ("mae", "ours", "packed")
    ]
    assert all(row["images_per_s"] > 0 for row in rows) and rows[0]["ratio"] == 1
    large = {row["variant"]: row for row in rows if row["set"] == "large"}
    assert large["packed"]["kilobytes"] < large["mae"]["kilobytes"] / 3


def test_step_benchmark_compares_equal_work(pictures, tmp_path, monkeypatch, capsys):
    """All variants start from the same loss; ratios are to MAE's formulation."""
    monkeypatch.setattr(benchmark_pretrain, "peak_gigabytes", lambda *_: 0.0)
    flags = "--model mae_vit_tiny_patch16 --input_size 32 --batch_size 2 --rounds 2 --precision fp32"
    flags += " --device cpu"
    parse_flags = benchmark_pretrain.get_args_parser().parse_args
    result = benchmark_pretrain.main(parse_flags(flags.split()))
    rows = result["rows"]
    assert list(rows) == ["mae fp32", "ours fp32", "ours-alt fp32", "ours+cache fp32"]
    losses = [row["loss"] for row in rows.values()]
    assert max(losses) - min(losses) < 1e-5 and rows["mae fp32"]["ratio"] == 1
    # 12 blocks of 192 on 2 tokens, 8 of 128 on 5, forward and twice backward: by hand within the embeddings
    by_hand = 3 * 2 * (12 * 12 * 192**2 * 2 + 8 * 12 * 128**2 * 5) / 1e9
    assert by_hand < result["gflop_per_image"]["student"] < 1.25 * by_hand
    flags += f" --data_path {pictures} --num_workers 1 --variants mae ours"
    result = benchmark_pretrain.main(parse_flags(flags.split()))
    assert list(result["rows"]) == ["mae fp32", "ours fp32"]
    with pytest.raises(InputError, match="open_clip knows"):
        benchmark_pretrain.main(parse_flags([*flags.split(), "--teacher", "ViT-Q-1"]))


def test_growth_benchmark_measures_every_stage(tmp_path, capsys):
    flags = f"--images 1000 --stages manifest pack start --folder {tmp_path}"
    rows = benchmark_growth.main(benchmark_growth.get_args_parser().parse_args(flags.split()))["rows"]
    assert [row["stage"] for row in rows] == ["manifest", "pack", "start"]
    assert all(row["seconds"] > 0 and row["peak_mb"] > 10 for row in rows) and rows[2]["worker_mb"] > 0
