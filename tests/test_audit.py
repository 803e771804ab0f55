"""Every rule of the auditor against numbers that numpy makes of the same features, image by image."""

import json

import numpy as np
import pytest
import torch
from conftest import refuses, run_main
from test_metrics import dense_reranking, slow_expansion

from datasets.reid import read_reid
from finetune.reid import across_sets
from metrics.reid import draw_gallery
from tools import audit

PIDS, QUERIES, GALLERY, SHARED = 8, 12, 40, 5  # the first five queries lie in the gallery too


class Drawn:
    """A table with empty files and features of its queries and gallery images."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        self.table, self.pids = folder / "reid.csv", [rng.integers(0, PIDS, n) for n in (QUERIES, GALLERY)]
        self.cams = [rng.integers(0, 3, n) for n in (QUERIES, GALLERY)]
        self.paths = [[f"{part}{i}.jpg" for i in range(n)] for part, n in (("q", QUERIES), ("g", GALLERY))]
        centres, views = rng.standard_normal((PIDS, 10)), rng.standard_normal((3, 10))
        self.x, self.y = (
            (centres[p] + views[c] + 1.5 * rng.standard_normal((len(p), 10))).astype(np.float32)
            for p, c in zip(self.pids, self.cams)
        )
        for values in (self.pids, self.cams, (self.x, self.y), self.paths):  # copies
            values[1][:SHARED] = values[0][:SHARED]
        rows = ["path,pid,camid,split", "train.jpg,99,0,train"]
        for part, split in enumerate(("query", "gallery")):
            found = zip(self.paths[part], self.pids[part], self.cams[part])
            rows += [f"{path},{pid},{cam},{split}" for path, pid, cam in found]
        for name in {"train.jpg", *self.paths[0], *self.paths[1]}:
            (folder / name).touch()
        self.table.write_text("\n".join(rows) + "\n")
        self.files = [str(folder / f"{name}.npy") for name in ("query", "gallery")]
        for file, values in zip(self.files, (self.x, self.y)):
            np.save(file, values)
        self.own = np.array(self.paths[0])[:, None] == np.array(self.paths[1])
        self.x, self.y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (self.x, self.y))

    def run(self, folder, *more):
        return run_main(audit, "--data_path", self.table, "--device", "cpu", "--output", folder / "out", *more)


@pytest.fixture
def drawn(tmp_path):
    return Drawn(tmp_path)


def slow(similar, q, g, junk):
    """(mAP, R1) by lists, ties in the order of the gallery."""
    aps, firsts = [], []
    for row, pid, away in zip(similar, q, junk):
        order = [j for j in sorted(range(len(row)), key=lambda j: (-row[j], j)) if not away[j]]
        if ranks := [r for r, j in enumerate(order, 1) if g[j] == pid]:
            aps.append(np.mean([n / r for n, r in enumerate(ranks, 1)]))
            firsts.append(ranks[0] == 1)
    return np.mean(aps), np.mean(firsts)


def expected_rules(d):
    """{rule: (mAP, R1)} without a line of ours, but for what the draws are."""
    (q, g), (qc, gc), own = d.pids, d.cams, d.own
    same = (q[:, None] == g) & (qc[:, None] == gc)
    cosines, junk = d.x @ d.y.T, same | own
    both, alone = np.concatenate([d.y, d.x[SHARED:]]), np.arange(SHARED, QUERIES)
    g2, gc2 = np.concatenate([g, q[SHARED:]]), np.concatenate([gc, qc[SHARED:]])
    own2 = np.concatenate([own, np.arange(QUERIES)[:, None] == alone], axis=1)
    junk2 = own2 | (q[:, None] == g2) & (qc[:, None] == gc2)
    rows = [draw_gallery(g, 0, draw)[0] for draw in range(10)]
    files, g_files = np.arange(QUERIES), np.where(own.any(axis=0), own.argmax(axis=0), -1 - np.arange(GALLERY))
    kept = ~own.any(axis=0)
    dba = slow_expansion(d.y, d.y[kept], g_files, g_files[kept], 10, 3)
    found = {
        "as the set's protocol says": slow(cosines, q, g, junk),
        "junk filter by camera off": slow(cosines, q, g, own),
        "queries join the gallery, each without its own file": slow(d.x @ both.T, q, g2, junk2),
        "queries join the gallery, their own file counts": slow(d.x @ both.T, q, g2, np.zeros_like(junk2)),
        "one random gallery image a vehicle": tuple(
            np.mean([slow(cosines[:, r], q, g[r], junk[:, r]) for r in rows], axis=0)
        ),
        "AQE": slow(slow_expansion(d.x, d.y, files, g_files, 10, 0) @ d.y.T, q, g, junk),
        "alpha-QE": slow(slow_expansion(d.x, d.y, files, g_files, 10, 3) @ d.y.T, q, g, junk),
        "DBA": slow(d.x @ dba.T, q, g, junk),
    }
    for k1, k2 in ((20, 6), (50, 15)):
        distance = dense_reranking(np.concatenate([d.x, d.y]).astype(np.float64), QUERIES, k1, k2, 0.3)
        found[f"re-ranked with {k1}, {k2}, 0.3"] = slow(-distance.astype(np.float32), q, g, junk)
    return found


def test_each_rule_is_its_slow_computation(drawn, tmp_path):
    rows = {row["rule"]: row for row in drawn.run(tmp_path, "--features", *drawn.files)["rows"]}
    expected = expected_rules(drawn)
    assert set(rows) == set(expected)
    for rule, numbers in expected.items():
        assert (rows[rule]["mAP"], rows[rule]["R1"]) == pytest.approx(numbers, abs=1e-4), rule
    first = rows["as the set's protocol says"]
    assert all(row["gain"] == pytest.approx(row["mAP"] - first["mAP"]) for row in rows.values())
    assert len({row["protocol"] for row in rows.values()}) == len(rows)
    assert rows["queries join the gallery, their own file counts"]["R1"] == 1
    text = (tmp_path / "out" / "audit.md").read_text()
    assert all(f"| {rule} |" in text for rule in rows) and text.count("±") == 1


@pytest.mark.parametrize("lists", [False, True])
def test_ranks_say_what_features_say(drawn, tmp_path, lists):
    """Pairs in a .csv, lists in a .jsonl, which here end after 20: the rest stands in the gallery's order."""
    cosines = drawn.x @ drawn.y.T
    orders, file = np.argsort(-cosines, axis=1, kind="stable"), tmp_path / ("found.jsonl" if lists else "found.csv")
    names = [(query, [drawn.paths[1][j] for j in order]) for query, order in zip(drawn.paths[0], orders)]
    if lists:
        file.write_text("".join(json.dumps({"query": q, "gallery": found[:20]}) + "\n" for q, found in names))
        for i, order in enumerate(orders):
            cosines[i, order[:20]] = 100 - np.arange(20)
            cosines[i, order[20:]] = 0
    else:
        file.write_text("\n".join(["query,gallery", *(f"{q},{g}" for q, found in names for g in found)]) + "\n")
    result = drawn.run(tmp_path, "--ranks", file)
    (q, g), own = drawn.pids, drawn.own
    junk = own | (q[:, None] == g) & (drawn.cams[0][:, None] == drawn.cams[1])
    picks = [draw_gallery(g, 0, draw)[0] for draw in range(10)]
    drawn_mean = np.mean([slow(cosines[:, r], q, g[r], junk[:, r]) for r in picks], axis=0)
    expected = [slow(cosines, q, g, junk), slow(cosines, q, g, own), tuple(drawn_mean)]
    assert [(row["mAP"], row["R1"]) for row in result["rows"]] == [pytest.approx(pair, abs=1e-6) for pair in expected]
    said = result["not_said"]
    assert len(said) == 7 + lists and "AQE" in said and ("12 of 12 lists" in str(said)) == lists


def test_the_best_epoch_stands_beside_the_last(tmp_path):
    values, run = {0: 0.3, 20: 0.62, 39: 0.55}, tmp_path / "run"
    run.mkdir()
    records = [{"epoch": e, "test_mAP": x, "test_R1": x, "test_reranked_mAP": 0.9} for e, x in values.items()]
    lines = [json.dumps(record) for record in [{"epoch": 0, "loss": 1.0}, *records, {"epoch": 39, "test_800_mAP": 0.1}]]
    (run / "log.txt").write_text("\n".join([*lines, '{"epoch": 4']) + "\n")
    found = run_main(audit, "--run", run, "--output", tmp_path / "out")
    assert [(row["rule"], row["mAP"], round(row["gain"], 4)) for row in found["rows"]] == [
        ("epoch 39, the last", 0.55, 0.0), ("epoch 20, the best of 3 by this test itself", 0.62, 0.07),
    ]  # fmt: skip
    assert "one epoch only" in found["not_said"]["best epoch against last, 800_"]
    assert found["not_said"][str(run / "log.txt")].startswith("1 damaged")
    refuses("has no log.txt", run_main, audit, "--run", tmp_path, "--output", tmp_path / "out")


def test_bad_input_is_a_sentence(drawn, tmp_path):
    def wrong(message, *more):
        refuses(message, drawn.run, tmp_path, *more)

    wrong("give --data_path with one of")
    wrong("give --data_path with one of", "--features", *drawn.files, "--ranks", "x.csv")
    wrong("needs 2, a file a part", "--features", drawn.files[0])
    wrong("a row for each of the 40 gallery images", "--features", drawn.files[0], drawn.files[0])
    narrow, file = tmp_path / "narrow.npy", tmp_path / "found.csv"
    np.save(narrow, np.zeros((GALLERY, 3), np.float32))
    wrong("3 and 10 columns", "--features", drawn.files[0], narrow)
    narrow.write_bytes(b"no array")
    wrong("is damaged", "--features", drawn.files[0], narrow)
    for text, message in (
        ("g0.jpg,q0.jpg", "'g0.jpg' is no query image"), ("q0.jpg,x.jpg", "row 1: 'x.jpg' is no gallery image"),
        ("q1.jpg,g9.jpg", "no row for q0.jpg"), ("q0.jpg,g9.jpg\nq0.jpg,g9.jpg", "twice the same image for q0.jpg"),
    ):  # fmt: skip
        file.write_text(f"query,gallery\n{text}\n")
        wrong(message, "--ranks", file)
    file.write_text("query\nq0.jpg\n")
    wrong("has no column 'gallery'", "--ranks", file)
    wrong("--tests 800: .* has test", "--features", *drawn.files, "--tests", "800")
    x = np.load(drawn.files[0])
    x[1] = np.nan  # an unreadable image: counted in the protocol's name
    np.save(drawn.files[0], x)
    first = drawn.run(tmp_path, "--features", *drawn.files)["rows"][0]
    assert "table/1-unreadable-left-out (" in first["protocol"]
    assert first["queries"] + first["queries_without_match"] == QUERIES - 1


def test_another_set_than_trained_on_is_said(drawn):
    data = read_reid(drawn.table)
    own = {"set": "table", "trained_on": f"reid#{data.sha256()[:8]}"}
    assert across_sets(own, data, drawn.table) is None and across_sets({}, data, drawn.table) is None
    assert across_sets({"set": "table"}, data, drawn.table) is None  # an older model, and the same layout
    assert across_sets({"set": "veri776"}, data, drawn.table) == ("veri776", own["trained_on"])
    drawn.table.write_text(drawn.table.read_text() + "g9.jpg,98,0,train\n")
    other = read_reid(drawn.table)  # of the same name
    assert across_sets(own, other, drawn.table) == (own["trained_on"], f"reid#{other.sha256()[:8]}")


def test_an_encoder_as_it_is(drawn, tmp_path, pictures):
    """Real pictures in place of the empty files: the numbers of `main_finetune.py --eval`."""
    from conftest import run_finetune

    from models_vit import VisionTransformer

    for i, name in enumerate(sorted({"train.jpg", *drawn.paths[0], *drawn.paths[1]})):
        (tmp_path / name).write_bytes((pictures / f"{i % 40:04d}.png").read_bytes())
    torch.manual_seed(0)
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 12, 3).state_dict()}, tmp_path / "vit.pth")
    words = f"--data_path {drawn.table} --device cpu --num_workers 0 --batch_size 16 --input_size 32"
    found = run_main(audit, *words.split(), "--checkpoint", tmp_path / "vit.pth", "--output", tmp_path / "out")
    expand = "--rerank --expand aqe --expand_k 10"
    evaluated = run_finetune(f"--task reid --eval --finetune {tmp_path}/vit.pth {words} {expand}".split())
    rows = {row["rule"]: row for row in found["rows"]}
    for rule, prefix in (
        ("as the set's protocol says", ""), ("re-ranked with 20, 6, 0.3", "reranked_"), ("AQE", "expanded_"),
    ):  # fmt: skip
        assert rows[rule]["mAP"] == pytest.approx(evaluated[f"{prefix}mAP"], abs=1e-6)
        assert rows[rule]["protocol"] == evaluated[f"{prefix}protocol"]
    assert {"expanded_reranked_mAP", "expanded_mAP"} <= set(evaluated)
    refuses("both expand the queries", run_finetune, f"--task reid --eval --finetune {tmp_path}/vit.pth {words} "
            "--expand aqe alpha".split())  # fmt: skip
