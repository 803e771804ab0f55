"""Encoders compared on the same queries and pictures, and how sure the numbers are."""

import colorsys
import csv
import json

import numpy as np
import pytest
import torch
from conftest import run_finetune, run_main
from PIL import Image

from engine_encoders import BINS, colour_histogram
from metrics.intervals import Measure, paired_p
from metrics.seg import segmentation_numbers
from metrics.whitening import Whitening
from tools import compare
from util.errors import InputError

HUES = [(220, 30, 30), (30, 200, 40), (40, 60, 220), (230, 220, 40), (200, 40, 220), (40, 210, 220)]


def test_intervals_and_pairs():
    rng = np.random.default_rng(0)
    right = (rng.random((2, 400)) < 0.5).astype(float)
    measure = Measure(right)
    low, high = measure.interval()  # of the mean of two independent seeds
    half = 1.96 * right.mean(axis=0).std() / 20
    assert (low, high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.006)
    assert measure.by_seed() == pytest.approx(right.mean(axis=1)) and measure.value() == pytest.approx(right.mean())
    assert paired_p(measure, measure) == 1
    better = Measure(np.minimum(right + (rng.random(400) < 0.04), 1))  # a few more: far within the interval, yet sure
    assert better.value() < high and paired_p(better, measure) < 0.01
    shuffled = Measure(rng.permuted(right, axis=1))
    assert paired_p(shuffled, measure) > 0.2


def test_intersection_over_union_is_of_the_whole_split():
    confusions = np.random.default_rng(1).integers(0, 50, (1, 7, 4, 4))
    for first, name in ((0, "mIoU"), (1, "parts_mIoU")):
        expected = segmentation_numbers(confusions[0].sum(axis=0), background=True).flat[name]
        measure = Measure(confusions, first)
        assert measure.value() == pytest.approx(expected)
        assert measure.interval()[0] < expected < measure.interval()[1]


def test_histogram_counts_hue_saturation_and_value():
    imgs = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    imgs[0, :, 0, 0], imgs[0, :, 0, 1] = 0, 255  # black and white have no hue
    expected = np.zeros((2, *BINS))
    for n, pixels in enumerate(imgs.flatten(2).permute(0, 2, 1).tolist()):
        for pixel in pixels:
            place = (
                min(int(x * bins), bins - 1) for x, bins in zip(colorsys.rgb_to_hsv(*(p / 255 for p in pixel)), BINS)
            )
            expected[n][tuple(place)] += 1
    assert np.allclose(colour_histogram(imgs).numpy() ** 2 * 20, expected.reshape(2, -1), atol=1e-4)


def test_whitened_rows_vary_alike():
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1.0, 0.5]) + 7
    white = Whitening.of(rows)(rows)
    assert white.mean(dim=0).abs().max() < 1e-4
    variances = torch.linalg.eigvalsh(torch.cov(white.T))
    assert 0.9 < variances[-1] < 1.01 and variances[0] > 0.1 and torch.cov(white.T).triu(1).abs().max() < 1e-3


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Six vehicles, each of a hue, before two cameras, as re-id and as labels; halves of two colours with masks."""
    root, rng, rows = tmp_path_factory.mktemp("sets"), np.random.default_rng(0), []
    for split, names in (("train", "ab"), ("test", "ab")):
        for pid, hue in enumerate(HUES):
            for camid, name in enumerate(names):
                pixels = np.clip(rng.normal(hue, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
                file = f"{split}_{pid}_{name}.png"
                Image.fromarray(pixels).save(root / file)
                part = "train" if split == "train" else ("query", "gallery")[camid]
                rows.append([file, pid + 10 * (split == "test"), camid, part, "warm" if pid % 2 else "cold"])
    for name, head in (
        ("reid", ["path", "pid", "camid", "split", "type"]),
        ("labels", ["path", "type", "x", "split", "hue"]),
    ):
        with open(root / f"{name}.csv", "w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(head)
            for path, pid, camid, part, kind in rows:
                named = [path, kind, 0, "train" if part == "train" else "val", f"hue{pid % 10}"]
                writer.writerow([path, pid, camid, part, kind] if name == "reid" else named)
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            (root / "parts" / kind / split).mkdir(parents=True)
        for number in range(4):
            mask = np.zeros((48, 64), np.uint8)
            mask[:, : 16 + 8 * number] = 1
            colours = np.array([(200, 30, 30), (30, 40, 200)])[mask]
            Image.fromarray(np.clip(rng.normal(colours, 20), 0, 255).astype(np.uint8)).save(
                root / f"parts/images/{split}/{number}.png"
            )
            Image.fromarray(mask).save(root / f"parts/annotations/{split}/{number}.png")
    (root / "parts/classes.json").write_text('{"classes": ["background", "door"]}')
    return root


def test_rows_are_compared_on_the_same_queries(sets, teacher_files, tmp_path):
    clip = f"clip=open_clip:{teacher_files[0]}@{teacher_files[1]}"
    words = (
        f"--encoders random:vit_tiny_patch16 colours=histogram,histogram {clip} --input_size 32 --parts_size 64".split()
    )
    words += ["--reid", sets / "reid.csv", "--group", "type", "--labels", sets / "labels.csv", "--label_column", "hue"]
    words += ["--protocol", "knn", "linear", "--k", 1, "--parts", sets / "parts", "--output", tmp_path / "out"]
    means = run_main(compare, *words, "--num_workers", 0, "--device", "cpu")
    facts = json.loads((tmp_path / "out/compared.json").read_text())
    assert means == {name: found["value"] for name, found in facts.items()}
    for what in ("mAP", "R1", "DIR@FAR1%", "mAP warm", "mAP cold", "knn hue", "linear hue"):
        assert means[f"colours | {what} | histogram"] == 1, what  # a hue is all there is to find
    assert facts["colours | mAP | histogram"]["seeds"] == [1, 1] and "colours | mAP | histogram whitened" in facts
    assert facts["random:vit_tiny_patch16 | mAP | cls"]["p"] is None and facts["clip | mAP | embedding"]["p"] > 0
    assert (
        means["random:vit_tiny_patch16 | mIoU of parts | tokens"] > 0.8 and "clip | mIoU of parts | tokens" not in means
    )
    text = (tmp_path / "out/compared.md").read_text()
    assert "| colours | histogram | 100.0 [100, 100]" in text and "mAP warm (3)" in text and "knn hue (12)" in text


def test_a_fine_tuned_model_is_a_row_too(sets, tmp_path):
    words = f"--task reid --data_path {sets}/reid.csv --model vit_tiny_patch16 --input_size 32 --batch_size 4"
    words += " --num_instances 2 --epochs 1 --warmup_epochs 0 --num_workers 0"
    words += f" --device cpu --amp none --output_dir {tmp_path}/run"
    scored = run_finetune(words.split())
    words = f"--encoders tuned={tmp_path}/run/model.pth --reid {sets}/reid.csv --output {tmp_path}/out --num_workers 0"
    means = run_main(compare, *words.split(), "--device", "cpu")
    assert means["tuned | mAP | feature"] == pytest.approx(scored["mAP"], abs=1e-6)


WRONG = {
    "--encoders histogram": "nothing to compare on",
    "--encoders a=histogram a=histogram --labels x": "a name of its own",
    "--encoders random:vit_giant --labels {sets}/labels.csv --label_column hue": "give one of random:vit_tiny",
    "--encoders clip:x --labels {sets}/labels.csv --label_column hue": "neither a file nor one of open_clip",
    "--encoders histogram --reid {sets}/reid.csv --group colour": "no column 'colour'",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_compared_is_said(sets, tmp_path, words):
    with pytest.raises(InputError, match=WRONG[words]):
        run_main(compare, *words.format(sets=sets).split(), "--output", tmp_path / "out", "--device", "cpu")
