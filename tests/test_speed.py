"""What users see of speed and memory: profile, advice, the batch that fits, benchmarks."""

import json
import time

import pytest
import torch
from conftest import ROOT, command, parse, run_command, small_flags
from util.meter import largest_that_fits
from util.step_profile import PARTS, compile_counts

import engine_pretrain
import main_pretrain
import util.loop
from benchmarks import data, kmeans, ranking, step
from util.errors import InputError


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


BENCHMARKS = [
    (step, "--model mae_vit_tiny_patch16 --input_size 32 --batch_size 2", ["mae", "ours"]),
    (data, "--images 8 --input_size 32", ["mae", "packed", "ours"]),
    (ranking, "--size small --dim 16", ["sorting", "ours"]),
    (kmeans, "--points 600 --dim 8 --clusters 9 --iterations 3", ["ours"]),
]


@pytest.mark.parametrize("benchmark, words, variants", BENCHMARKS)
def test_benchmarks_time_equal_work(pictures, benchmark, words, variants):
    flags = [*words.split(), "--rounds", "2", *(["--data_path", str(pictures)] if benchmark is data else [])]
    result = benchmark.main(benchmark.get_args_parser().parse_args(flags))
    rows = result["rows"]
    assert [name for name in rows if name not in ("faiss", "sklearn")] == variants and result["torch"]
    assert all(row["seconds"] > 0 for row in rows.values()) and next(iter(rows.values()))["times_as_fast"] == 1
    for number in ("loss", "mAP", "R1"):
        values = [row[number] for row in rows.values() if number in row]
        assert not values or max(values) - min(values) < 1e-5


def test_a_benchmark_times_another_checkout(tmp_path, monkeypatch):
    flags = "--size small --dim 16 --rounds 2 --against".split()
    result = ranking.main(ranking.get_args_parser().parse_args([*flags, str(ROOT)]))
    rows = result["rows"]
    assert rows["against"]["mAP"] == rows["ours"]["mAP"] and rows["against"]["seconds"] > 0
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match="its process ended with status 3"):
        ranking.main(ranking.get_args_parser().parse_args([*flags, str(tmp_path)]))
