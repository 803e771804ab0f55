"""Ranking metrics against a slow implementation written from the protocol's text."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from metrics import rerank
from metrics.reid import FeatureSet, Protocol, ShownQueries, cosine_blocks, evaluate, rank_blocks, scores


def by_hand(query, gallery, q_pids, g_pids, q_cams=None, g_cams=None):
    """One query after another: cosine, stable order, junk removed, then the definitions."""
    unit = [torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (query, gallery)]
    found, similar = [], (unit[0] @ unit[1].t()).numpy()
    for i, row in enumerate(similar):
        ranking = sorted(range(len(row)), key=lambda j: (-row[j], j))
        if q_cams is not None:
            ranking = [j for j in ranking if not (g_pids[j] == q_pids[i] and g_cams[j] == q_cams[i])]
        if ranks := [r for r, j in enumerate(ranking, 1) if g_pids[j] == q_pids[i]]:
            ap = sum(n / r for n, r in enumerate(ranks, 1)) / len(ranks)
            found.append((ap, len(ranks) / ranks[-1], *(ranks[0] <= k for k in (1, 5, 10))))
    means = dict(zip(("mAP", "mINP", "R1", "R5", "R10"), np.mean(found, axis=0)))
    return means | {"queries": len(found), "queries_without_match": len(similar) - len(found)}


def random_case(seed, queries=23, gallery=90, pids=9, cams=4, dim=5):
    rng = np.random.default_rng(seed)
    x, y = (rng.standard_normal((n, dim)) for n in (queries, gallery))
    ids, cameras = ([rng.integers(0, high, n) for n in (queries, gallery)] for high in (pids, cams))
    return x.astype(np.float32), y.astype(np.float32), *ids, *cameras


def rank(query, gallery, *labels, device="cpu"):
    return rank_blocks(cosine_blocks(torch.from_numpy(query), torch.from_numpy(gallery), device), *labels)


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_random_cases(seed, filtered):
    case = random_case(seed)[: 6 if filtered else 4]
    assert scores(rank(*case)) == pytest.approx(by_hand(*case), abs=1e-6)
    if torch.cuda.is_available():  # the device changes nothing
        assert scores(rank(*case, device="cuda")) == pytest.approx(scores(rank(*case)), abs=1e-6)


def test_the_order_of_a_tie_decides():
    one = np.ones((1, 2), dtype=np.float32)
    for pids, place in (([7, 5, 5], 1), ([5, 7, 5], 2), ([5, 5, 7], 3)):
        assert rank(one, np.ones((3, 2), np.float32), np.array([7]), np.array(pids)).hits == place


def test_queries_without_a_match_are_counted_not_scored():
    x, y, q, g, qc, gc = random_case(0, pids=30)
    g = np.where(g == q[0], 99, g)  # an id of the query only
    gc = np.where(g == q[1], qc[1], gc)  # nothing but junk
    found = scores(rank(x, y, q, g, qc, gc))
    assert found["queries_without_match"] >= 2
    assert found == pytest.approx(by_hand(x, y, q, g, qc, gc), abs=1e-6)
    found = scores(rank(x, y, q, g, np.zeros_like(q), np.zeros_like(g)))  # one camera: all is junk
    assert found["queries"] == 0 and found["queries_without_match"] == len(q) and np.isnan(found["mAP"])


def test_blocks_and_layout_change_nothing(monkeypatch):
    x, y, q, g, qc, gc = random_case(5, queries=40)
    whole = rank(x, y, q, g, qc, gc)
    monkeypatch.setattr(rerank, "BLOCK_NUMBERS", 100)
    parts = rank(x, y, q, g, qc, gc)
    assert (whole.hits == parts.hits).all() and (whole.offsets == parts.offsets).all()
    turned = np.random.default_rng(0).permutation(len(y))
    again = scores(rank(x, y[turned], q, g[turned], qc, gc[turned]))
    assert again == pytest.approx(scores(whole), abs=1e-6)


@pytest.mark.parametrize("rerank", [None, (5, 3, 0.3)])
@pytest.mark.parametrize("same_camera", [True, False])
def test_a_query_never_meets_its_own_file(same_camera, rerank):
    """Queries that lie in the gallery too, some of them under another identity: as if they lay there not."""
    x, y, q, g, qc, gc = random_case(3)
    protocol, files = Protocol("table", same_camera, rerank=rerank), np.arange(100, 190)
    both = np.concatenate([g, np.where(q == 2, 7, q)]), np.concatenate([gc, qc]), np.concatenate([files, np.arange(23)])
    query = FeatureSet(torch.from_numpy(x), q, qc, np.arange(23))
    doubled = FeatureSet(torch.from_numpy(np.concatenate([y, x])), *both)
    found = evaluate(protocol, query, doubled)
    assert found["R1"] < 0.8
    if rerank is None:  # each query in a gallery of its own, without its file
        kept = (doubled.take(np.flatnonzero(doubled.files != i)) for i in range(23))
        alone = [evaluate(protocol, query.take(np.array([i])), part) for i, part in enumerate(kept)]
        expected = [row["mAP"] for row in alone if row["queries"]]
        assert found["mAP"] == pytest.approx(np.mean(expected)) and found["queries"] == len(expected)
        cards = ShownQueries(protocol, query, doubled, 23, 0).cards(0, 99)
        assert [card[:3] for card in cards if card[0] == 90] == [(90, 0, "junk")]


def test_bad_features_are_named():
    x, y, q, g, *_ = random_case(0)
    for case, message in (((x, y, q[1:], g), "22"), ((x[1:], y, q, g), "22 queries"), ((x, y[1:], q, g), "23 x 89")):
        with pytest.raises(ValueError, match=message):
            rank(*case)
    y[17, 2] = np.nan
    with pytest.raises(ValueError, match="gallery: the features of row 17 are not finite"):
        rank(x, y, q, g)


def dense_reranking(x, Q, k1, k2, weight):
    """Zhong et al., Sec. 3, image by image."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    N = len(x)
    d = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    d = d / d.max(axis=1, keepdims=True)
    rank = np.argsort(d, axis=1, kind="stable")

    def reciprocal(i, k):
        return {j for j in rank[i, : k + 1] if i in rank[j, : k + 1]}

    V = np.zeros((N, N))
    for i in range(N):
        members = reciprocal(i, k1)
        near = [reciprocal(c, int(np.around(k1 / 2))) for c in members]
        agreeing = [own for own in near if len(own & members) > 2 / 3 * len(own)]
        index = sorted(members.union(*agreeing))
        V[i, index] = np.exp(-d[i, index]) / np.exp(-d[i, index]).sum()
    if k2 > 1:
        V = np.stack([V[rank[i, :k2]].mean(axis=0) for i in range(N)])
    jaccard = np.array([[1 - np.minimum(a, b).sum() / np.maximum(a, b).sum() for b in V[Q:]] for a in V[:Q]])
    return (1 - weight) * jaccard + weight * d[:Q, Q:]


@pytest.mark.parametrize("k1, k2, weight", [(20, 6, 0.3), (7, 1, 0.0), (5, 3, 0.5)])
def test_sparse_reranking_is_the_dense_one(k1, k2, weight, monkeypatch):
    rng = np.random.default_rng(k1)
    centres = rng.standard_normal((8, 12))
    x = centres[rng.integers(0, 8, 110)] + 0.8 * rng.standard_normal((110, 12))
    query, gallery = torch.from_numpy(x[:30]).float(), torch.from_numpy(x[30:]).float()
    expected = dense_reranking(x, 30, k1, k2, weight)
    for block_numbers in (10**6, 500):
        monkeypatch.setattr(rerank, "BLOCK_NUMBERS", block_numbers)
        blocks = [block.clone() for block in rerank.reranked_blocks(query, gallery, k1, k2, weight)]
        assert -torch.cat(blocks).numpy() == pytest.approx(expected, abs=1e-5)


def by_index(x, k):
    """Nearest neighbours by a whole matrix: itself, then the others, equal ones in order."""
    similar = x @ x.T
    np.fill_diagonal(similar, 9)
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("rows, first", [(1024, 256), (7, 4), (16, 5)])
def test_neighbours_and_ties_in_blocks(rows, first, monkeypatch):
    """Corners of a cube: every product is exact, most are equal, and some corners are there twice."""
    monkeypatch.setattr(rerank, "BLOCK_ROWS", rows)
    monkeypatch.setattr(rerank, "FIRST_COLUMNS", first)
    x = np.random.default_rng(0).choice([-0.25, 0.25], (110, 16)).astype(np.float32)
    x[50:60] = x[3]
    for k in (1, 2, 21, 110):
        near, largest = rerank.neighbours(torch.from_numpy(x), k)
        assert (near == by_index(x, k)).all() and (largest == 2 - 2 * (x @ x.T).min(axis=1)).all()


def test_reranking_with_ties_is_the_dense_one(monkeypatch):
    monkeypatch.setattr(rerank, "BLOCK_ROWS", 32)
    corners = np.unique(np.random.default_rng(1).choice([-1.0, 1.0], (110, 16)), axis=0)
    corners = np.random.default_rng(2).permutation(corners)
    query, gallery = torch.from_numpy(corners[:30]), torch.from_numpy(corners[30:])
    expected = dense_reranking(corners, 30, 20, 6, 0.3)
    for at_once in (512, 3):
        monkeypatch.setattr(rerank, "QUERIES_AT_ONCE", at_once)
        found = torch.cat([block.clone() for block in rerank.reranked_blocks(query, gallery, 20, 6, 0.3)])
        assert -found.numpy() == pytest.approx(expected, abs=1e-5)


def slow_expansion(x, y, x_files, y_files, k, alpha):
    """Row by row: x and its k nearest of y that are other files."""
    out = []
    for row, file in zip(x, x_files):
        cosines = [(float(row @ other), -i) for i, other in enumerate(y) if y_files[i] != file]
        best = sorted(cosines, reverse=True)[:k]
        whole = row + sum(max(cosine, 0) ** alpha * y[-i] for cosine, i in best)
        out.append(whole / np.linalg.norm(whole))
    return np.stack(out)


@pytest.mark.parametrize("methods", [("aqe",), ("alpha",), ("dba",), ("alpha", "dba")])
def test_expansions_are_the_slow_ones(methods, monkeypatch):
    """Six queries lie in the gallery: none meets its own file, and none is taken up by a gallery image."""
    monkeypatch.setattr(rerank, "BLOCK_NUMBERS", 500)
    monkeypatch.setattr(rerank, "FIRST_COLUMNS", 16)
    x, y, q, g, *_ = random_case(4)
    y[:6], q_files, g_files = x[:6], np.arange(23), np.concatenate([np.arange(6), 100 + np.arange(84)])
    query, gallery = FeatureSet(torch.from_numpy(x), q, q, q_files), FeatureSet(torch.from_numpy(y), g, g, g_files)
    found = rerank.expanded(query, gallery, methods, 5, 3.0)
    x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x, y))
    if "dba" in methods:
        y = slow_expansion(y, y[6:], g_files, g_files[6:], 5, 3.0)
    if methods[0] in ("aqe", "alpha"):
        x = slow_expansion(x, y, q_files, g_files, 5, 3.0 if methods[0] == "alpha" else 0)
    assert found[0].features.numpy() == pytest.approx(x, abs=1e-5)
    assert found[1].features.numpy() == pytest.approx(y, abs=1e-5)
    protocol = Protocol("table", False, expand=(methods, 5, 3.0))
    files = found[0].features, found[1].features, q, g, None, None, q_files, g_files
    whole = scores(rank_blocks(cosine_blocks(*files[:2]), *files[2:]))
    assert evaluate(protocol, query, gallery)["mAP"] == pytest.approx(whole["mAP"])


def test_what_is_done_is_in_the_line():
    plain = Protocol("table", True)
    rules = {"name": "table", "remove_same_camera": True, "draws": 0, "seed": 0, "rerank": None}
    digits = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:8]
    assert plain.line() == f"table (same-camera matches removed, cosine, no re-ranking) #{digits}"  # as ever
    more = replace(plain, expand=(("alpha", "dba"), 10, 3.0), across=("veri776", "veriwild"), draws=10)
    for words in (
        "gallery images with their 10 nearest, alpha 3, queries with their 10 nearest, alpha 3, no re-ranking",
        "trained on veri776, tested on veriwild", "same-camera matches removed, 1 gallery image a vehicle, 10 draws",
    ):  # fmt: skip
        assert words in more.line()
    lines = {replace(more, **{name: None}).line()[-8:] for name in ("expand", "across")} | {more.line()[-8:]}
    assert len(lines) == 3
