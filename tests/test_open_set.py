"""Queries whose vehicle is not in the gallery: scores, thresholds and what they promise."""

import json

import numpy as np
import pytest
import torch
from conftest import refuses, run_finetune, run_main
from layouts import write_demo_reid

from datasets.reid import read_reid
from finetune.open_set import model_identity, read_open_set, write_open_set
from metrics.open_set import Answers, accepted_right, conformal_threshold, measured_far, open_answers, open_numbers
from metrics.reid import FeatureSet, Protocol
from models_vit import VisionTransformer
from tools import search
from util.checkpoint import write_safetensors
from util.errors import OPEN_SCORES


def some_features(seed=0, queries=23, gallery=60):
    """Vehicles 0..8 before three cameras; query 0's vehicle is nowhere, query 1 is an image of the gallery."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((10, 6))
    pids = [rng.integers(0, 9, n) for n in (queries, gallery)]
    pids[0][0] = 9
    camids = [rng.integers(0, 3, n) for n in (queries, gallery)]
    x = [centres[p] + rng.standard_normal((len(p), 6)) for p in pids]
    files = [np.arange(queries), np.arange(queries, queries + gallery)]
    x[0][1], pids[0][1], files[0][1] = x[1][4], pids[1][4], files[1][4]
    return [FeatureSet(torch.from_numpy(f).float(), p, c, n) for f, p, c, n in zip(x, pids, camids, files)]


def by_hand(query, gallery, kind):
    q, g = (
        F / np.linalg.norm(F, axis=1, keepdims=True)
        for F in (s.features.numpy().astype(np.float32) for s in (query, gallery))
    )
    known, right, rows, unknown, pids = [], [], [], [], []
    for i, cosines in enumerate(q @ g.T):
        same = gallery.pids == query.pids[i]
        junk = (same & (gallery.camids == query.camids[i])) | (gallery.files == query.files[i])
        for without in (False, True):
            left = np.flatnonzero(~junk & ~(same & without))
            if not without and not (same & ~junk).any():
                continue
            order = left[np.argsort(-cosines[left], kind="stable")]
            best, score = order[0], cosines[order[0]]
            if kind == "margin":
                score -= max(cosines[j] for j in order if gallery.pids[j] != gallery.pids[best])
            if kind == "overlap":
                theirs = [j for j in np.argsort(-(g @ g.T)[best], kind="stable") if j in left][:20]
                score = len(set(order[:20]) & set(theirs)) / len(set(order[:20]) | set(theirs)) + 1e-3 * score
            if without:
                unknown.append(score), pids.append(query.pids[i])
            else:
                known.append(score), right.append(gallery.pids[best] == query.pids[i]), rows.append(i)
    return Answers(*map(np.array, (known, right, rows, unknown, pids)))


@pytest.mark.parametrize("kind", OPEN_SCORES)
def test_every_query_is_asked_with_and_without_its_vehicle(kind):
    query, gallery = some_features()
    found, expected = open_answers(Protocol("x", True), query, gallery, kind), by_hand(query, gallery, kind)
    assert 0 not in found.rows and len(found.unknown) == 23
    for name in Answers._fields:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-5), name


def test_the_threshold_keeps_its_promise():
    scores = np.random.default_rng(0).random(99)
    assert conformal_threshold(scores, 0.01) == scores.max() and conformal_threshold(scores, 0.1) == np.sort(scores)[89]
    assert conformal_threshold(scores[:98], 0.01) == np.inf  # too few to promise one in a hundred
    accepted = []
    for seed in range(400):
        drawn = np.random.default_rng(seed).exponential(size=500)
        accepted.append((drawn[50:] > conformal_threshold(drawn[:50], 0.1)).mean())
    exact = 1 - np.ceil(51 * 0.9) / 51  # the expected share of a new score above the 46th of 50
    assert np.mean(accepted) == pytest.approx(exact, abs=0.006) and exact <= 0.1


def test_numbers_by_counting():
    rng = np.random.default_rng(1)
    known, unknown = np.round(rng.normal(1, 1, 300), 1), np.round(rng.normal(0, 1, 400), 1)  # with ties
    answers = Answers(known, rng.random(300) < 0.7, np.arange(300), unknown, np.repeat(np.arange(100), 4))
    numbers = open_numbers(answers, 0.05)
    pairs = known[:, None] - unknown[None]
    assert numbers["AUROC"] == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    for far, name in ((0.001, "DIR_0.1"), (0.01, "DIR_1"), (0.1, "DIR_10")):
        best = max((answers.right & (known > t)).mean() for t in np.unique(unknown) if (unknown > t).mean() <= far)
        assert numbers[name] == pytest.approx(best) == accepted_right(answers, far).mean()
        assert numbers[f"{name}_low"] <= best <= numbers[f"{name}_high"]
    t = numbers["threshold"]
    right, said = (answers.right & (known > t)).sum(), (known > t).sum() + (unknown > t).sum()
    precision, recall = right / said, right / 300
    assert numbers["F1"] == pytest.approx(2 * precision * recall / (precision + recall))
    measured = measured_far(answers, [0.01, 0.05, 0.1]).mean(axis=1)
    assert (measured <= [0.012, 0.052, 0.102]).all() and (np.diff(measured) > 0).all()
    assert numbers["TNR"] == pytest.approx(1 - measured[1])


def test_a_threshold_belongs_to_its_model(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer((32, 32), 16, 24, 1, 2)
    file, facts = tmp_path / "open_set.safetensors", {"far": 0.01, "score": "cosine"}
    write_open_set(file, 0.5, facts | model_identity(model), None)
    threshold, found, white = read_open_set(file, model_identity(model))
    assert threshold == 0.5 and found["far"] == 0.01 and white is None
    model.set_pixel_stats((0.5,) * 3, (0.5,) * 3)
    refuses("was chosen with another model .its model_sha256 differ", read_open_set, file, model_identity(model))
    write_open_set(file, np.inf, facts | model_identity(model), None)
    refuses("too few queries to promise --far 0.01", read_open_set, file, model_identity(model))
    write_safetensors(file, {"threshold": torch.zeros(1)}, {})
    refuses("holds no threshold", read_open_set, file, {})
    file.write_bytes(b"x")
    refuses("holds no threshold", read_open_set, file, {})


def test_scored_whitened_and_open(tmp_path):
    write_demo_reid(tmp_path / "veri", "veri776", size=32)
    torch.manual_seed(0)
    model = VisionTransformer((32, 32), 16, 192, 12, 3)
    write_safetensors(tmp_path / "encoder.safetensors", model.state_dict(), {"config": json.dumps(model.settings())})
    words = f"--task reid --eval --finetune {tmp_path}/encoder.safetensors --data_path {tmp_path}/veri --input_size 32"
    words += f" --output_dir {tmp_path}/out --num_workers 0 --device cpu --whiten --open_set --far 0.1 --report"
    numbers = run_finetune(words.split())
    assert numbers["protocol"].startswith("veri776 (") and numbers["whitened_protocol"].startswith("veri776/whitened (")
    assert numbers["whitened_mAP"] != numbers["mAP"] and 0 <= numbers["open_FAR"] <= 0.2
    file = tmp_path / "out/open_set.safetensors"
    threshold, facts, white = read_open_set(file, model_identity(model))
    assert threshold == numbers["open_threshold"] and white.scale.shape == (192, 192) and facts["far"] == 0.1
    pages = {name: (tmp_path / f"out/{name}.html").read_text() for name in ("report", "report_whitened")}
    assert "Unknown vehicles" in pages["report_whitened"] and "Unknown vehicles" not in pages["report"]

    # a search for two queries: by the same features as the evaluation, refused and told as the file says
    data = read_reid(tmp_path / "veri")
    query, gallery = data.tests["test"]
    words = f"--gallery {gallery.paths.root}/image_test --checkpoint {tmp_path}/encoder.safetensors --device cpu"
    words = [
        str(query.paths[0]),
        str(query.paths[1]),
        *words.split(),
        "--num_workers",
        0,
        "--output",
        f"{tmp_path}/found",
        "--open_set",
    ]
    counts = run_main(search, *words, file)
    found = json.loads((tmp_path / "found/results.json").read_text())
    assert counts["found"] + counts["unknown"] == 2 and counts["embedded"] == len(gallery)
    assert [entry["in_gallery"] for entry in found] == [entry["results"][0]["cosine"] > threshold for entry in found]
    for limit, there in ((-1.0, 2), (1.5, 0)):
        write_open_set(tmp_path / "own.safetensors", limit, facts, white)
        assert run_main(search, *words, tmp_path / "own.safetensors")["found"] == there
    refuses("whitening", run_main, search, *words[:-1])  # the index holds whitened features
    write_open_set(tmp_path / "own.safetensors", 0.5, facts | {"score": "margin"}, white)
    refuses("a search compares cosines", run_main, search, *words, tmp_path / "own.safetensors")
    write_open_set(tmp_path / "own.safetensors", 0.5, facts | {"model_sha256": "0"}, white)
    refuses("another model", run_main, search, *words, tmp_path / "own.safetensors")
