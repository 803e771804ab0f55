"""Embeddings of files and what they are worth: extraction, kNN, linear probes, pictures."""

import csv
import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, parse, run_command, small_flags, write_pictures
from layouts import write_demo_reid
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from datasets.images import open_rgb
from datasets.items import PretrainDataset, WholeImages
from datasets.path_list import PathList, list_images
from datasets.samplers import EpochBatches
from datasets.transforms import random_crop_box, sample_rng, whole_image
from engine_extract import extract_batches
from engine_linprobe import build_head, crop_batches, load_read_outs, stored_batches, train_heads
from metrics import probe
from metrics.fgvc import class_scores
from metrics.probe import class_mean_predict, draw_shots, knn_predict, topk_accuracy
from models_mae import MODELS
from models_vit import VisionTransformer, load_encoder
from reports.run import mean_attribute_accuracy, score_table
from tools import report
from util.errors import InputError
from util.optim import LARS, cosine_lr


@pytest.fixture(scope="module")
def run_dir(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    main_pretrain.main(parse(main_pretrain.get_args_parser(), small_flags(pictures, out, "--no_distill")))
    return out


def with_head(run_dir, folder, context: str, hidden: int = 0):
    """A pre-training checkpoint with a context head: the run's weights, the head drawn from seed 7."""
    content = torch.load(run_dir / "checkpoint-last.pth", weights_only=True)
    torch.manual_seed(7)
    distill = {"context": context, "bank": torch.zeros(3, 24), "tau": 1.0, "hidden": hidden}
    mae = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32), distill=distill)
    for weight in mae.distill_head.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    mae.load_state_dict(content["model"], strict=False)
    content["model"] = mae.state_dict()
    content["args"] |= {"context": context, "distill_hidden": hidden, "no_distill": False}
    file = folder / f"checkpoint-{context}.pth"
    torch.save(content, file)
    return file, mae.eval()


def probed(*words) -> dict:
    flags = [*map(str, words), "--num_workers", "0", "--device", "cpu"]
    return main_linprobe.main(main_linprobe.get_args_parser().parse_args(flags))


def test_predictions_by_hand():
    train, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    votes = knn_predict(train, labels, torch.tensor([[2.0, 0.0]]), 2, k=2, temperature=0.5)
    cosine = 0.9 / np.hypot(0.9, 0.1)
    assert votes[0].tolist() == pytest.approx([1.0, np.exp((cosine - 1) / 0.5)], rel=1e-5)
    nearest = knn_predict(train, labels, torch.tensor([[0.0, 3.0], [5.0, 0.1]]), 2, k=1)
    assert nearest.argmax(1).tolist() == [1, 0]
    train, root = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]]), math.sqrt(0.5)
    for classes, query, expected in (
        ([0, 0, 2], [1.0, 0.0], [root, -math.inf, root, -math.inf]),
        ([0, 1, 2], [0.0, 5.0], [0.0, 1.0, root]),
    ):
        scores = class_mean_predict(train, torch.tensor(classes), torch.tensor([query]), len(expected))
        assert scores[0].tolist() == pytest.approx(expected)
    constant, labels = torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
    assert topk_accuracy(constant, labels, 1) == 0.75
    assert class_scores(constant, labels).numbers["mean_class_accuracy"] == 0.5  # not fooled


def test_linear_probe_chooses_its_l2_on_all_rows(monkeypatch):
    fits, x, labels = [], torch.arange(23.0)[:, None].repeat(1, 2), torch.zeros(23, dtype=torch.int64)

    def fit(features, labels, num_classes, l2, steps=60, start=None):
        fits.append((set(features[:, 0].tolist()), l2, start))
        return torch.full((3, num_classes), l2)

    monkeypatch.setattr(probe, "linear_fit", fit)
    assert probe.linear_predict(x, labels, x, 2)[1] == max(probe.L2_GRID)  # all are equally right: the strongest
    held = [fits[-1][0] - kept for kept, *_ in fits[: -1 : len(probe.L2_GRID)]]
    assert len(held) == 5 and set.union(*held) == fits[-1][0] and sum(map(len, held)) == 23
    assert fits[0][2] is None and torch.equal(fits[1][2], torch.full((3, 2), fits[0][1]))
    fits.clear()
    monkeypatch.setattr(probe, "HELD_OUT_ROWS", 6)
    probe.linear_predict(x, labels, x, 2)
    assert len(fits) == 2 * len(probe.L2_GRID) + 1


def test_extract_on_two_ranks(run_dir, tmp_path):
    data = write_pictures(tmp_path / "data", 9)
    (data / "0004.png").write_bytes(b"broken")
    words = f"-m tools.extract --checkpoint {run_dir / 'encoder.pth'} --data_path {data} --device cpu"
    words += f" --output {tmp_path / 'features'} --num_workers 0 --batch_size 4"
    done = run_command(command(*words.split(), processes=2))
    assert done.returncode == 0, done.stderr
    rows, table = np.load(tmp_path / "features.npy"), list(csv.DictReader(open(tmp_path / "features.csv")))
    assert rows.dtype == np.float32 and rows.shape == (9, 192)
    assert [r["path"] for r in table] == [f"{i:04d}.png" for i in range(9)]
    assert np.isnan(rows).all(axis=1).tolist() == [i == 4 for i in range(9)] == [bool(r["problem"]) for r in table]
    model = load_encoder(run_dir / "encoder.safetensors")
    imgs = whole_image(open_rgb(data / "0007.png"), (32, 32))[None]
    with torch.no_grad():
        assert np.allclose(rows[7], model.encode(imgs)["mean"][0].numpy(), atol=1e-5)
    assert not (tmp_path / "features.parts").exists()


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """A table whose labels can be seen: dark or bright pictures, with some holes."""
    folder, rng = tmp_path_factory.mktemp("bright"), np.random.default_rng(0)
    rows = []
    for i in range(48):
        kind, split = i % 2, "val" if i % 4 > 1 else "train"
        pixels = rng.integers(0, 60, (32, 40, 3)) + (190 * kind)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{split},{'dark bright'.split()[kind]},{kind},{1 - kind},{i % 3 == 0:d}")
    rows[5] = rows[5].replace("bright", "")  # a val or train row without a label
    rows.append("48.png,train,dark,0,1,0")
    (folder / "48.png").write_bytes(b"no picture")
    (folder / "labels.csv").write_text("\n".join(["path,split,light,up,down,third", *rows]) + "\n")
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """An encoder of two blocks."""
    file = tmp_path_factory.mktemp("short") / "encoder.pth"
    torch.manual_seed(0)
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 2, 3).state_dict()}, file)
    return file


def test_every_protocol_on_every_label(short, bright, tmp_path, capsys, monkeypatch):
    def answer(train, train_labels, queries, num_classes):  # sure of the first of two classes by 3 to 1
        return torch.tensor([[math.log(3), 0.0]]).expand(len(queries), 2), 0.1

    monkeypatch.setattr(main_linprobe, "linear_predict", answer)
    words = f"--checkpoint {short} --data_path {bright} --protocol knn linear mae fewshot --blr 50 --k 3"
    words += " --label_column light up down third --read_out cls mean layers --draws 3 --shots 1 30"
    words += f" --epochs 40 --warmup_epochs 1 --probe_batch 4 --output_dir {tmp_path / 'out'}"
    metrics = probed(*words.split())
    for protocol in ("knn", "mae_stored", "fewshot30"):
        assert metrics[f"{protocol}_mean_light_top1"] == 1.0, protocol
        assert metrics[f"{protocol}_mean_block1_up_balanced"] == 1.0, protocol
    for name in ("cls", "mean"):  # the last block's tokens are the encoder's
        for ending in ("light_top1", "third_top1"):
            assert metrics[f"knn_{name}_block2_{ending}"] == metrics[f"knn_{name}_{ending}"]
    assert metrics["knn_mean_third_top1"] < 1
    assert metrics["majority_mean_light"] == metrics["majority_cls_block1_light"] <= 0.6
    assert metrics["fewshot30_mean_light_top1_std"] == 0 and metrics["unreadable"] == 1
    parts = [metrics[f"knn_mean_{name}_balanced"] for name in ("up", "down", "third")]
    assert metrics["knn_mean_attributes_mA"] == pytest.approx(np.mean(parts)) and parts[0] == 1
    assert metrics["knn_mean_attributes_columns"] == 3 and metrics["mae_blr"] == 50
    share = metrics["linear_mean_up_top1"]
    nll = share * math.log(4 / 3) + (1 - share) * math.log(4)
    assert metrics["linear_mean_up_nll"] == pytest.approx(nll, abs=1e-6) and metrics["linear_cls_up_l2"] == 0.1
    said = capsys.readouterr().out
    assert "1 rows have no light" in said and "unreadable, left out" in said and "majority" in said


def test_crops_pass_the_encoder_in_every_epoch(short, bright, tmp_path):
    words = f"--checkpoint {short} --data_path {bright} --protocol mae --views crop --blr 50"
    words += f" --label_column light --epochs 20 --warmup_epochs 1 --output_dir {tmp_path} --probe_batch 4"
    first = probed(*words.split(), "--batch_size", "128")
    assert first["mae_crop_mean_light_top1"] > 0.9 and "mae_stored_mean_light_top1" not in first
    read_outs, _ = load_read_outs(short, ("mean",), None, "cpu")
    rows = np.arange(3, 23)
    paths = PathList(bright.parent, [f"{i}.png" for i in rows])

    def batches(seed, epoch, batch_size, batch=8):
        images = PretrainDataset(paths, (32, 32), 0, seed=seed, min_area=0.2)
        options = {"batch_size": batch_size, "num_workers": 0}
        return [*crop_batches(epoch, EpochBatches(20, batch, 0, 1, seed), rows, images, read_outs, **options)]

    small, whole = batches(1, 3, 3), batches(1, 3, 100)
    assert len(small) == len(whole) == 2
    for (rows_a, a), (rows_b, b) in zip(small, whole):
        assert rows_a.tolist() == rows_b.tolist() and len(rows_a) == 8 and set(rows_a) <= set(rows)
        assert torch.allclose(a["mean"], b["mean"], atol=1e-5)
    assert batches(1, 4, 8)[0][0].tolist() != small[0][0].tolist() != batches(2, 3, 8)[0][0].tolist()
    # the image's own crop, whatever place it has in the batch
    whole_set = [batches(1, epoch, 50, 20)[0] for epoch in (0, 1)]
    at = [x[0].argsort() for x in whole_set]
    assert not torch.allclose(whole_set[0][1]["mean"][at[0]], whole_set[1][1]["mean"][at[1]], atol=1e-3)


@pytest.mark.parametrize("size, area", [((640, 480), 0.52), ((670, 253), 0.42)])
def test_crops_are_clipped_as_in_maes_probe(size, area):
    """Mean areas of MAE's own code; torchvision's rule, which tries again, has 0.43 and 0.24."""
    boxes = [random_crop_box(sample_rng(0, 0, i, 1), *size, 0.08, clip=True)[0] for i in range(4000)]
    shares = [(right - left) * (lower - upper) / (size[0] * size[1]) for left, upper, right, lower in boxes]
    assert np.mean(shares) == pytest.approx(area, abs=0.01)
    assert all(0 <= a < c <= size[0] and 0 <= b < d <= size[1] for a, b, c, d in boxes)


@pytest.mark.parametrize("context", ["attention", "cls", "mean", "decoder"])
def test_the_context_is_what_pre_training_compares_with_the_teacher(run_dir, tmp_path, context):
    """Of an image of which nothing is masked: the cosine to a teacher's embedding is the one of the loss."""
    file, mae = with_head(run_dir, tmp_path, context, hidden=8 if context == "cls" else 0)
    read_outs, said = load_read_outs(file, ("context", "mean", "layers"), None, "cpu")
    assert f"context head: {context}" in said and len(read_outs.widths) == 2 + 24
    imgs = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    teacher = torch.nn.functional.normalize(torch.randn(3, 24), dim=1)
    with torch.no_grad():
        found = read_outs.encode(imgs)
        latent = mae.forward_features(imgs)
        _, decoded = mae.forward_decoder(latent, torch.arange(4).expand(3, -1))
        sim = mae.distill_head(latent, decoded, teacher)["sim"]
        plain = load_encoder(file).encode(imgs)
    assert 1 - (found["context"] * teacher).sum(dim=1).mean().item() == pytest.approx(sim.item(), abs=1e-5)
    assert torch.allclose(found["mean"], plain["mean"], atol=1e-6)
    assert torch.allclose(found["cls_block12"], plain["cls"], atol=1e-6)
    assert not torch.allclose(found["mean_block11"], found["mean_block12"], atol=1e-2)


def test_files_without_a_context_head_say_so(run_dir, tmp_path):
    for name in ("encoder.safetensors", "checkpoint-last.pth"):  # of a run with --no_distill
        with pytest.raises(InputError, match=f"{name} has no context head.*give checkpoint-last.pth"):
            load_read_outs(run_dir / name, ("context",), None, "cpu")
    file, _ = with_head(run_dir, tmp_path, "decoder")
    with pytest.raises(InputError, match="distill_head.position_weight of .* leave --input_size out"):
        load_read_outs(file, ("context",), (48, 32), "cpu")


def test_search_without_fine_tuning_is_the_evaluation_of_main_finetune(short, tmp_path):
    veri = tmp_path / "VeRi"
    write_demo_reid(veri, "veri776", train_ids=5, test_ids=5, images_per_id=6, size=32, processes=1)
    data = f"--data_path {veri} --output_dir {tmp_path / 'out'}"
    words = f"--checkpoint {short} --protocol reid --read_out mean cls layers {data}"
    found = probed(*words.split(), "--batch_size", "16")
    words = f"--task reid --eval --finetune {short} --input_size 32 --batch_size 16 {data}"
    words += " --num_workers 0 --device cpu --amp none"
    one = main_finetune.main(parse(main_finetune.get_args_parser(), words.split()))
    for name in ("mAP", "R1", "R10", "mINP", "queries", "protocol"):
        assert found[f"reid_cls_{name}"] == one[name]
    assert found["reid_cls_block2_mAP"] == found["reid_cls_mAP"] != found["reid_mean_mAP"]
    assert 0 < found["random_cls_mAP"] == found["random_mean_mAP"] < 0.6


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--protocol reid knn", "call it alone"),
        ("--views crop", "--views crop is for --protocol mae"),
        ("--shots 0", "--shots 0: must be at least 1"),
        ("--warmup_epochs 90", "leaves nothing of --epochs"),
        ("--blr 0", "must be positive"),
        ("--label_column colour", "has no column 'colour'"),
        ("--protocol mae --blr 1e30 --label_column light --epochs 40", "the probe's loss is .* lower --blr"),
    ],
)
def test_refusals(short, bright, flags, message):
    with pytest.raises(InputError, match=message):
        probed("--checkpoint", short, "--data_path", bright, *flags.split())


def test_heads_follow_maes_recipe():
    """One head against the update written out: order, schedule, normalisation over the batch."""
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(21, 6, generator=rng) * 3 + 1, torch.arange(21) % 3
    labels[4] = -1
    args = SimpleNamespace(blr=20.0, epochs=3, warmup_epochs=1, seed=5)
    rows, order = np.arange(1, 21), EpochBatches(20, 8, 0, 1, 5)
    stored = partial(stored_batches, order=order, rows=rows, features={"f": x, "other": x.flip(1)})
    tasks = {"a": (labels, 3), "b": (labels.clamp(0, 1), 2)}
    widths = {"f": 6, "other": 6}
    heads = train_heads(stored, order, widths, tasks, args, torch.device("cpu"))
    assert set(heads) == {(name, task) for name in widths for task in tasks}
    expected = build_head(6, 3, 5)
    assert expected[1].weight.std().item() == pytest.approx(0.01, rel=0.5) and not expected[1].bias.any()
    optimizer, means = LARS(expected.parameters()), []
    for epoch in range(3):
        for step in range(2):  # 20 rows: two batches of 8, 4 are left out
            lr = cosine_lr(epoch + step / 2, 20.0 * 8 / 256, 0.0, 1, 3)
            optimizer.param_groups[0]["lr"] = lr
            chosen = torch.from_numpy(rows[order.global_batch(epoch, step)])
            chosen = chosen[labels[chosen] >= 0]
            means.append(x[chosen].mean(0))
            z = (x[chosen] - x[chosen].mean(0)) / (x[chosen].var(0, unbiased=False) + 1e-6).sqrt()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(expected[1](z), labels[chosen]).backward()
            optimizer.step()
    trained = heads["f", "a"]
    assert torch.allclose(trained[1].weight, expected[1].weight, atol=1e-6) and not trained.training
    assert torch.allclose(trained[1].bias, expected[1].bias, atol=1e-6)
    assert trained[0].weight is None
    assert torch.allclose(trained[0].running_mean, torch.stack(means).mean(0), atol=1e-5)


def test_shots_are_nested_drawn_by_seed_and_even():
    labels = np.array([0, 1, 0, 1, 2, 0, 0, 1, 0, 1, 0])
    one, three = draw_shots(labels, 1, 0, 4), draw_shots(labels, 3, 0, 4)
    assert np.bincount(labels[one]).tolist() == [1, 1, 1] and set(one) <= set(three)
    assert np.bincount(labels[three]).tolist() == [3, 3, 1] and three.tolist() == sorted(three)
    drawn = {tuple(draw_shots(labels, 1, seed, draw)) for seed in (0, 1) for draw in range(30)}
    assert len(drawn) > 8 and {row for rows in drawn for row in rows} == set(range(11))


def test_the_report_of_a_run_and_of_images(run_dir, tmp_path, pictures):
    words = ["images", str(pictures), "--checkpoint", str(run_dir / "checkpoint-last.pth"), "--count", "3"]
    args = report.get_args_parser().parse_args([*words, "--output", str(tmp_path / "p.png")])
    assert report.main(args)["images"] == 3 and (tmp_path / "p.png").is_file()
    words[3] = str(run_dir / "encoder.pth")
    with pytest.raises(InputError, match="encoder only"):
        report.main(report.get_args_parser().parse_args([*words, "--model", "mae_vit_tiny_patch16"]))
    table = tmp_path / "labels.csv"
    lines = [f"{pictures}/{i:04d}.png,{'val' if i % 4 == 0 else 'train'},{'ab'[i % 2]}" for i in range(40)]
    table.write_text("path,split,kind\n" + "\n".join(lines) + "\n")
    words = ["run", str(run_dir), "--data_path", str(table), "--label_column", "kind"]
    report.main(report.get_args_parser().parse_args(words))
    assert (run_dir / "report.html").stat().st_size > 20_000
    for name, content in itertools.product(("log.txt", "args.json"), (b"[1]\n", b"\xff", b"{\n", b"[" * 99_999, b"7")):
        whole = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(content)
        with pytest.raises(InputError, match="log.txt or args.json in .* is damaged"):
            report.main(report.get_args_parser().parse_args(words))
        (run_dir / name).write_bytes(whole)


def test_lars_by_hand():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))  # norm 5
    bias, zero = torch.nn.Parameter(torch.tensor([1.0])), torch.nn.Parameter(torch.zeros(1, 2))
    optimizer = LARS([weight, bias, zero], lr=2.0, trust_coefficient=0.1)
    # the gradient's norm is 10: 0.1 * 5 / 10 = 0.05
    weight.grad, bias.grad = torch.tensor([[0.0, 6.0], [8.0, 0.0]]), torch.tensor([0.5])
    zero.grad = torch.ones(1, 2)
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([[3.0, -0.6], [-0.8, 4.0]]))
    assert bias.item() == 0.0 and torch.allclose(zero, torch.full((1, 2), -2.0))  # neither is adapted
    norm = weight.detach().norm().item()
    weight.grad.zero_()[0, 1] = 1.0
    bias.grad.zero_()
    optimizer.step()  # the momentum of the first step, and the ratio 0.1 * |w| / 1
    expected = [-0.8 - 2 * 0.9 * 0.4, -0.6 - 2 * (0.9 * 0.3 + 0.1 * norm), -2 * 0.9 * 0.5]
    assert [weight[1, 0].item(), weight[0, 1].item(), bias.item()] == pytest.approx(expected, rel=1e-5)


def test_tables_of_scores():
    values = {"cls": 0.31, "mean_block2": 0.2, "cls_block2": 0.5, "cls_block10": 0.4}
    scores = {("knn", name, "", metric): value for name, value in values.items() for metric in ("mAP", "R5")}
    scores |= {("random", "cls", "", "mAP"): 0.1, ("knn", "cls", "", "mAP_std"): 0.02}
    lines = score_table(scores).splitlines()
    assert lines[0].split("  ")[0] == "test, %" and "31.0 +- 2.0" in lines[1] and "10.0" in lines[1]
    assert [line.split()[0] for line in lines[1:]] == ["cls", "cls_block2", "cls_block10", "mean_block2"]
    many = {("knn", "cls", f"c{i}", "balanced"): i / 10 for i in range(9)}
    mean = mean_attribute_accuracy(many)
    assert mean == pytest.approx({("knn", "cls", "attributes", "mA"): 0.4, ("knn", "cls", "attributes", "columns"): 9})
    table = score_table(many | mean)
    assert "c5, %" in table and "c6, %" not in table and "attributes, %" in table
    assert "3 further columns are in metrics.json" in table and mean_attribute_accuracy(scores) == {}


def test_a_class_token_does_not_keep_the_patches_in_memory(pictures):
    """On the CPU it is a view of all tokens; over many images these would fill the memory."""
    encoder, loading = VisionTransformer((32, 32), 16, 24, 1, 2), {"batch_size": 4, "num_workers": 0}
    images = WholeImages(list_images(pictures), np.arange(8), encoder.img_size)
    batches = extract_batches(lambda imgs, _: encoder.encode(imgs), images, torch.device("cpu"), **loading)
    assert all(values.flags.c_contiguous for _, rows, _ in batches for values in rows.values())
