"""What users see of speed and memory."""

import pytest
import torch
from conftest import ROOT, parse, small_flags

import main_pretrain
import models_mae
from benchmarks import run
from util.errors import InputError


def test_a_batch_that_does_not_fit_names_the_cure(pictures, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models_mae.MaskedAutoencoderViT, "forward", no_memory)
    with pytest.raises(InputError, match="does not fit into the memory of cpu: .*--micro_batch"):
        flags = small_flags(pictures, tmp_path / "run", "--no_distill")
        main_pretrain.main(parse(main_pretrain.get_args_parser(), flags))


BENCHMARKS = {
    "step --model mae_vit_tiny_patch16 --input_size 32 --batch_size 2": ["mae", "ours"],
    "data --images 8 --input_size 32 --data_path PICTURES": ["mae", "packed", "ours"],
    "ranking --size small --dim 16": ["sorting", "ours"],
    "ranking --size small --dim 16 --rerank": ["ours"],
    "kmeans --points 600 --dim 8 --clusters 9 --iterations 3": ["ours"],
}


def run_benchmark(words: str) -> dict:
    return run.main(run.get_args_parser().parse_args([*words.split(), "--rounds", "2"]))


@pytest.mark.parametrize("words, variants", BENCHMARKS.items())
def test_benchmarks_time_equal_work(pictures, words, variants):
    result = run_benchmark(words.replace("PICTURES", str(pictures)))
    rows = result["rows"]
    assert [name for name in rows if name != "faiss"] == variants and result["torch"]
    assert all(row["seconds"] > 0 for row in rows.values()) and next(iter(rows.values()))["times_as_fast"] == 1
    for number in ("loss", "mAP", "R1"):
        values = [row[number] for row in rows.values() if number in row]
        assert not values or max(values) - min(values) < 1e-5


def test_a_benchmark_times_another_checkout(tmp_path):
    rows = run_benchmark(f"ranking --size small --dim 16 --against {ROOT}")["rows"]
    assert rows["against"]["mAP"] == rows["ours"]["mAP"] and rows["against"]["seconds"] > 0
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match="its process ended with status 3"):
        run_benchmark(f"ranking --size small --dim 16 --against {tmp_path}")
