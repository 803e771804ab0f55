"""k-means, the hierarchy and the balanced sample, against plain NumPy and known answers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from curation.kmeans import Rows, assign, build_tree, kmeans, members_by_cluster, plan_levels, plus_plus, step_rng
from curation.sample import balance, sample_tree, tail_coverage, water_fill
from util.errors import InputError

CPU = torch.device("cpu")


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"seed": 0, "resampling": 2} | changes)


def blobs(n: int, centres: int, dim: int = 8, seed: int = 0, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = 10 * rng.standard_normal((centres, dim))
    return (middle[rng.integers(0, centres, n)] + rng.standard_normal((n, dim))).astype(dtype)


def plain_lloyd(x, centroids, iterations):
    """The textbook, in float64."""
    x = x.astype(np.float64)
    for _ in range(iterations):
        labels = ((x[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
        centroids = np.stack(
            [x[labels == j].mean(0) if (labels == j).any() else centroids[j] for j in range(len(centroids))]
        )
    distance = ((x[:, None] - centroids[None]) ** 2).sum(2)
    return centroids, distance.argmin(1), distance.min(1)


@pytest.mark.parametrize("shift", [0, 1000])
def test_same_as_plain_lloyd_in_float64(shift):
    """Also where all vectors share a large component, which costs the usual distance trick its digits."""
    x = blobs(600, 12) + np.float32(shift)
    start = x[:12].astype(np.float64)
    rows = Rows(x, CPU)
    found = kmeans(rows, 12, iterations=6, rng=step_rng(0, 1), start=torch.from_numpy(x[:12]) - rows.centre)
    centroids, labels, distance = plain_lloyd(x, start, 6)
    assert (found.assignment == labels).all()
    np.testing.assert_allclose(rows.restore(found.centroids), centroids, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.distance, distance, rtol=2e-3, atol=1e-4)
    assert found.inertia == pytest.approx(distance.sum(), rel=1e-4)


def test_half_precision_files_and_subsets_read_alike(tmp_path, monkeypatch):
    x = blobs(20_000, 5, dtype=np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    index = np.arange(0, 20_000, 2)
    results = [kmeans(Rows(x[index], CPU), 5, iterations=4, rng=step_rng(0, 1))]
    monkeypatch.setattr("curation.kmeans.RESIDENT_BYTES", 0)
    for data, chosen in ((x[index], None), (mapped, index)):
        results.append(kmeans(Rows(data, CPU, chosen), 5, iterations=4, rng=step_rng(0, 1)))
    for other in results[1:]:
        assert (other.assignment == results[0].assignment).all() and other.inertia == results[0].inertia


def test_spherical_clusters_follow_directions():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    truth = rng.integers(0, 6, 500)
    x = (directions[truth] + 0.05 * rng.standard_normal((500, 6))) * rng.uniform(0.1, 100, (500, 1))
    found = kmeans(Rows(x.astype(np.float32), CPU, unit=True), 6, iterations=20, init="kmeans++", rng=step_rng(0, 1))
    assert len({(a, b) for a, b in zip(truth.tolist(), found.assignment.tolist())}) == 6
    norms = found.centroids.norm(dim=1)
    assert torch.allclose(norms, torch.ones(6), atol=1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = ((unit - found.centroids.numpy()[found.assignment]) ** 2).sum()
    assert found.inertia == pytest.approx(expected, rel=1e-3)


def test_empty_clusters_are_moved():
    """All starts in one blob of two: no cluster stays empty, the far blob is found."""
    x = np.concatenate([blobs(200, 1, seed=1), blobs(200, 1, seed=2) + 500])
    rows = Rows(x, CPU)
    start = rows.take(np.array([0, 0, 0, 0, 0, 1]))
    found = kmeans(rows, 6, iterations=10, rng=step_rng(0, 1), start=start)
    assert (np.bincount(found.assignment, minlength=len(found.centroids)) > 0).all() and len(found.centroids) == 6
    assert len(set(found.assignment[:200]) & set(found.assignment[200:])) == 0


@pytest.mark.parametrize("k", [9, 10])
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_no_cluster_is_empty_where_rows_repeat(init, k):
    """Ten rows of which one is repeated, and fifty of three kinds."""
    x, few = blobs(10, 10), np.repeat(blobs(3, 3), [1, 1, 48], axis=0)
    x[3] = x[7]
    for seed in range(20 if init == "random" or k == 9 else 0):
        found = kmeans(Rows(x, CPU), k, iterations=5, init=init, rng=step_rng(seed, 1))
        assert np.bincount(found.assignment, minlength=k).min() > 0 and found.inertia == pytest.approx(0, abs=1e-6)
        tree = assign(Rows(x, CPU), found.centroids)
        assert np.bincount(tree.assignment, minlength=k).min() > 0
    assert np.bincount(kmeans(Rows(few, CPU), 5, iterations=5, rng=step_rng(0, 1)).assignment, minlength=5).min() > 0


def test_plus_plus_never_picks_a_vector_twice():
    x = torch.from_numpy(blobs(40, 3)).repeat(4, 1)
    picks = plus_plus(x, 40, step_rng(0, 1))
    assert len(torch.unique(x[picks], dim=0)) == 40
    with pytest.raises(InputError, match="only 40 distinct vectors"):
        plus_plus(x, 41, step_rng(0, 1))


def test_bad_input_has_one_sentence():
    x = blobs(100, 3)
    x[7, 0] = np.nan
    with pytest.raises(InputError, match="some embeddings are not finite"):
        Rows(x, CPU)
    with pytest.raises(InputError, match="101 clusters of 100 images"):
        kmeans(Rows(blobs(100, 3), CPU), 101, iterations=1, rng=step_rng(0, 1))
    with pytest.raises(InputError, match="level 2 makes 200 clusters of 100"):
        plan_levels(1000, [100, 200])


def test_steps_on_disk_are_not_done_again(tmp_path, monkeypatch):
    rows = Rows(blobs(2000, 10), CPU)
    whole = build_tree(rows, [40, 6], tmp_path / "a", settings())
    build_tree(rows, [40, 6], tmp_path / "b", settings())
    for name in ("level1_step02.npz", "level2_step00.npz", "level2_step01.npz", "level2_step02.npz"):
        (tmp_path / "b" / name).unlink()
    runs = []
    monkeypatch.setattr("curation.kmeans.kmeans", lambda *a, **k: runs.append(1) or kmeans(*a, **k))
    again = build_tree(rows, [40, 6], tmp_path / "b", settings())
    assert len(runs) == 4 and (again.path() == whole.path()).all()


@pytest.mark.parametrize("seed", range(20))
def test_water_filling_is_exact_and_as_equal_as_possible(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 50 if seed % 2 else 4, rng.integers(1, 30))
    for target in {0, 1, int(sizes.sum() // 3), int(sizes.sum()), int(sizes.sum()) + 5}:
        shares = water_fill(sizes, target, np.random.default_rng(1))
        assert shares.sum() == min(target, sizes.sum()) and (shares <= sizes).all() and (shares >= 0).all()
        cut = shares < sizes  # whoever was cut has at least what any other has, minus the one handed out
        if cut.any():
            assert shares.max() - shares[cut].min() <= 1


def rings(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points on four rings of equal width, crowded towards the inner one -> (x, ring, area share of each
    ring)."""
    rng = np.random.default_rng(seed)
    ring = rng.choice(4, n, p=[0.85, 0.1, 0.04, 0.01])
    radius = np.sqrt(rng.uniform((ring + 0.2) ** 2, (ring + 1.0) ** 2))
    angle = rng.uniform(0, 2 * np.pi, n)
    area = (np.arange(4) + 1.0) ** 2 - (np.arange(4) + 0.2) ** 2
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return x.astype(np.float32), ring, area / area.sum()


def test_the_sample_covers_rings_by_area(tmp_path):
    """The toy of the paper: hierarchical sampling is near uniform by area, flat sampling follows the
    crowd."""
    x, ring, area = rings(20_000)
    rows = Rows(x, CPU)

    def off(levels: list[int], resampling: int) -> float:
        folder = tmp_path / "_".join(map(str, levels))
        tree = build_tree(rows, levels, folder, settings(resampling=resampling))
        chosen = sample_tree(tree, 600, seed=0)
        assert len(chosen) == 600 == len(np.unique(chosen))
        share = np.bincount(ring[chosen], minlength=4) / 600
        return float(0.5 * np.abs(share - area).sum())  # total variation

    flat, deep = off([300], 0), off([1000, 300, 60], 3)
    at_random = 0.5 * np.abs(np.bincount(ring, minlength=4) / len(x) - area).sum()
    print(json.dumps({"random": at_random, "flat": flat, "hierarchical": deep}))
    assert deep < 0.12 and deep < 0.5 * flat and flat < at_random


def test_closest_members_are_taken(tmp_path):
    rows = Rows(blobs(500, 5), CPU)
    tree = build_tree(rows, [5], tmp_path, settings(resampling=0))
    chosen = sample_tree(tree, 50, seed=0, how="closest")
    indices, offsets = members_by_cluster(tree.parents[0], 5)
    for j in range(5):
        mine = indices[offsets[j] : offsets[j + 1]]
        expected = mine[np.argsort(tree.distance[mine], kind="stable")[:10]]
        assert set(expected) == set(chosen) & set(mine)


def test_balance_of_known_histograms():
    even = balance(np.full(200, 5))
    assert even["gini"] == pytest.approx(0) and even["entropy"] == pytest.approx(1)
    assert even["effective"] == pytest.approx(200) and even["top_share"] == pytest.approx(0.01)
    one = balance(np.array([0, 0, 0, 8]))
    assert one["gini"] == pytest.approx(0.75) and one["effective"] == pytest.approx(1) and one["coverage"] == 0.25
    assert tail_coverage(np.array([1, 1, 50, 50] * 5), np.array([1, 0, 9, 9] * 5)) == 0.5
