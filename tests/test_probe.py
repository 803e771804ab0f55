"""Embeddings of files and what they are worth: extraction, kNN, linear probe, pictures."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import command, parse, run_command, small_flags, write_pictures

import main_linprobe
import main_pretrain
from models_vit import load_encoder
from util.probe import knn_predict, linear_predict, topk_accuracy


@pytest.fixture(scope="module")
def run_dir(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    main_pretrain.main(parse(main_pretrain.get_args_parser(), small_flags(pictures, out, "--no_distill")))
    return out


def test_knn_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    votes = knn_predict(train, labels, torch.tensor([[2.0, 0.0]]), 2, k=2, temperature=0.5)
    cosine = 0.9 / np.hypot(0.9, 0.1)
    assert votes[0].tolist() == pytest.approx([1.0, np.exp((cosine - 1) / 0.5)], rel=1e-5)
    nearest = knn_predict(train, labels, torch.tensor([[0.0, 3.0], [5.0, 0.1]]), 2, k=1)
    assert nearest.argmax(1).tolist() == [1, 0]


def test_linear_probe_separates_what_is_separable():
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=rng) * 3
    labels = torch.arange(200) % 5
    x = centres[labels] + torch.randn(200, 16, generator=rng)
    logits, _ = linear_predict(x[:150], labels[:150], x[150:], 5)
    assert topk_accuracy(logits, labels[150:], 1) > 0.95
    noise, _ = linear_predict(torch.randn(150, 16, generator=rng), labels[:150], x[150:], 5)
    assert topk_accuracy(noise, labels[150:], 1) < 0.6


@pytest.mark.parametrize("processes", [1, 2])
def test_extract(run_dir, tmp_path, processes):
    data = write_pictures(tmp_path / "data", 9)
    (data / "0004.png").write_bytes(b"broken")
    words = f"-m tools.extract --checkpoint {run_dir / 'encoder.pth'} --data_path {data} --device cpu"
    words += f" --output {tmp_path / 'features'} --num_workers 0 --batch_size 4"
    done = run_command(command(*words.split(), processes=processes))
    assert done.returncode == 0, done.stderr
    rows = np.load(tmp_path / "features.npy")
    table = list(csv.DictReader(open(tmp_path / "features.csv")))
    assert rows.dtype == np.float32 and rows.shape == (9, 192)
    assert [r["path"] for r in table] == [f"{i:04d}.png" for i in range(9)]
    assert np.isnan(rows[4]).all() and "Unidentified" in table[4]["problem"] and not table[3]["problem"]
    assert np.isfinite(rows[[0, 1, 2, 3, 5, 6, 7, 8]]).all()
    from datasets.images import open_rgb
    from datasets.transforms import whole_image

    model, _ = load_encoder(run_dir / "encoder.safetensors", fused_attn=False)
    imgs = whole_image(open_rgb(data / "0007.png"), (32, 32))[None]
    with torch.no_grad():
        assert np.allclose(rows[7], model.encode(imgs)["mean"][0].numpy(), atol=1e-5)
    assert not (tmp_path / "features.parts").exists()


def test_linprobe_on_a_table(run_dir, tmp_path, pictures):
    table = tmp_path / "labels.csv"
    lines = [f"{pictures}/{i:04d}.png,{'val' if i % 4 == 0 else 'train'},{'ab'[i % 2]}" for i in range(40)]
    table.write_text("path,split,kind\n" + "\n".join(lines) + "\n")
    flags = f"--checkpoint {run_dir / 'checkpoint-last.pth'} --data_path {table} --label_column kind"
    flags += " --protocol knn linear --read_out mean cls --num_workers 0 --device cpu"
    metrics = main_linprobe.main(parse(main_linprobe.get_args_parser(), flags.split()))
    for name in ("knn_mean_kind_top1", "knn_cls_kind_top1", "linear_mean_kind_top1", "majority_cls_kind"):
        assert 0 <= metrics[name] <= 1


def test_visualize_and_report(run_dir, tmp_path, pictures):
    words = f"-m tools.visualize {pictures} --checkpoint {run_dir / 'checkpoint-last.pth'} --count 3"
    done = run_command(command(*words.split(), "--output", str(tmp_path / "p.png")))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"] == 3 and (tmp_path / "p.png").is_file()
    words = (
        f"-m tools.visualize {pictures} --checkpoint {run_dir / 'encoder.pth'} --model mae_vit_tiny_patch16"
    )
    done = run_command(command(*words.split()))
    assert done.returncode == 2 and "encoder only" in done.stderr and "Traceback" not in done.stderr
    table = tmp_path / "labels.csv"
    lines = [f"{pictures}/{i:04d}.png,{'val' if i % 4 == 0 else 'train'},{'ab'[i % 2]}" for i in range(40)]
    table.write_text("path,split,kind\n" + "\n".join(lines) + "\n")
    words = f"-m tools.report {run_dir} --data_path {table} --label_column kind"
    done = run_command(command(*words.split()))
    assert done.returncode == 0, done.stderr
    assert (run_dir / "report.html").stat().st_size > 20_000 and (run_dir / "report.png").is_file()
