"""k-means, the hierarchy and the balanced sample, against plain NumPy and known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from curation.kmeans import Rows, assign, build_tree, kmeans, members_by_cluster, plus_plus, step_rng
from curation.sample import balance, sample_tree, tail_coverage, water_fill
from util.errors import InputError

CPU = torch.device("cpu")


def blobs(n: int, centres: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = 10 * rng.standard_normal((centres, dim))
    return (middle[rng.integers(0, centres, n)] + rng.standard_normal((n, dim))).astype(np.float32)


@pytest.mark.parametrize("shift, resident", [(0, 4e9), (1000, 0)])
def test_same_as_plain_lloyd_in_float64(shift, resident, monkeypatch):
    """Also where all vectors share a large component, which costs the usual distance trick its digits; whether the rows
    stay in memory or are read again and again."""
    monkeypatch.setattr("curation.kmeans.RESIDENT_BYTES", resident)
    x = blobs(600, 12) + np.float32(shift)
    rows, centroids = Rows(x, CPU), x[:12].astype(np.float64)
    found = kmeans(rows, 12, iterations=6, start=torch.from_numpy(x[:12]) - rows.centre, rng=None)
    for step in range(7):  # the textbook
        distance = ((x[:, None].astype(np.float64) - centroids) ** 2).sum(2)
        labels = distance.argmin(1)
        if step < 6:
            groups = [x[labels == j].astype(np.float64) for j in range(12)]
            centroids = np.stack([group.mean(0) if len(group) else old for group, old in zip(groups, centroids)])
    assert (found.assignment == labels).all()
    np.testing.assert_allclose(rows.restore(found.centroids), centroids, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.distance, distance.min(1), rtol=2e-3, atol=1e-4)
    assert found.inertia == pytest.approx(distance.min(1).sum(), rel=1e-4)


def test_spherical_clusters_follow_directions():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 500)
    x = np.linalg.qr(rng.standard_normal((6, 6)))[0][truth] + 0.05 * rng.standard_normal((500, 6))
    rows = Rows((x * rng.uniform(0.1, 100, (500, 1))).astype(np.float32), CPU, unit=True)
    found = kmeans(rows, 6, iterations=20, init="kmeans++", rng=step_rng(0, 1))
    assert len(set(zip(truth.tolist(), found.assignment.tolist()))) == 6
    assert torch.allclose(found.centroids.norm(dim=1), torch.ones(6), atol=1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True) - found.centroids.numpy()[found.assignment]
    assert found.inertia == pytest.approx((unit**2).sum(), rel=1e-3)


@pytest.mark.parametrize("k", [9, 10])
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_no_cluster_is_empty_where_rows_repeat(init, k):
    """Ten rows of which one is repeated, and fifty of three kinds."""
    x, few = blobs(10, 10), np.repeat(blobs(3, 3), [1, 1, 48], axis=0)
    x[3] = x[7]
    for seed in range(20 if init == "random" or k == 9 else 0):
        found = kmeans(Rows(x, CPU), k, iterations=5, init=init, rng=step_rng(seed, 1))
        assert np.bincount(found.assignment, minlength=k).min() > 0 and found.inertia == pytest.approx(0, abs=1e-6)
        assert np.bincount(assign(Rows(x, CPU), found.centroids).assignment, minlength=k).min() > 0
    assert np.bincount(kmeans(Rows(few, CPU), 5, iterations=5, rng=step_rng(0, 1)).assignment, minlength=5).min() > 0


def test_plus_plus_never_picks_a_vector_twice():
    x = torch.from_numpy(blobs(40, 3)).repeat(4, 1)
    assert len(torch.unique(x[plus_plus(x, 40, step_rng(0, 1))], dim=0)) == 40
    with pytest.raises(InputError, match="only 40 distinct vectors"):
        plus_plus(x, 41, step_rng(0, 1))
    with pytest.raises(InputError, match="some embeddings are not finite"):
        Rows(np.full((9, 2), np.nan, np.float32), CPU)


@pytest.mark.parametrize("seed", range(20))
def test_water_filling_is_exact_and_as_equal_as_possible(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 50 if seed % 2 else 4, rng.integers(1, 30))
    for target in {0, 1, int(sizes.sum() // 3), int(sizes.sum()), int(sizes.sum()) + 5}:
        shares = water_fill(sizes, target, np.random.default_rng(1))
        assert shares.sum() == min(target, sizes.sum()) and (shares <= sizes).all() and (shares >= 0).all()
        cut = shares < sizes  # whoever was cut has at least what any other has, minus the one handed out
        assert not cut.any() or shares.max() - shares[cut].min() <= 1


def test_the_sample_covers_rings_by_area(tmp_path):
    """The toy of the paper, points crowded on the inner of four rings of equal width: hierarchical sampling is near
    uniform by area, flat sampling follows the crowd."""
    rng, n = np.random.default_rng(0), 20_000
    ring = rng.choice(4, n, p=[0.85, 0.1, 0.04, 0.01])
    radius, angle = np.sqrt(rng.uniform((ring + 0.2) ** 2, (ring + 1.0) ** 2)), rng.uniform(0, 2 * np.pi, n)
    area = (np.arange(4) + 1.0) ** 2 - (np.arange(4) + 0.2) ** 2
    rows = Rows(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32), CPU)

    def off(chosen: np.ndarray) -> float:  # total variation
        return 0.5 * np.abs(np.bincount(ring[chosen], minlength=4) / len(chosen) - area / area.sum()).sum()

    def sampled(levels: list[int], resampling: int) -> float:
        tree = build_tree(rows, levels, tmp_path / str(len(levels)), SimpleNamespace(seed=0, resampling=resampling))
        chosen = sample_tree(tree, 600, seed=0)
        assert len(chosen) == 600 == len(np.unique(chosen))
        return off(chosen)

    flat, deep = sampled([300], 0), sampled([1000, 300, 60], 3)
    assert deep < 0.12 and deep < 0.5 * flat and flat < off(np.arange(n))


def test_closest_members_are_taken(tmp_path):
    tree = build_tree(Rows(blobs(500, 5), CPU), [5], tmp_path, SimpleNamespace(seed=0, resampling=0))
    chosen = set(sample_tree(tree, 50, seed=0, how="closest"))
    indices, offsets = members_by_cluster(tree.parents[0], 5)
    for mine in np.split(indices, offsets[1:-1]):
        assert set(mine[np.argsort(tree.distance[mine], kind="stable")[:10]]) == chosen & set(mine)


def test_balance_of_known_histograms():
    even, one = balance(np.full(200, 5)), balance(np.array([0, 0, 0, 8]))
    assert even == pytest.approx({"gini": 0, "entropy": 1, "effective": 200, "coverage": 1, "top_share": 0.01})
    assert one["gini"] == pytest.approx(0.75) and one["effective"] == pytest.approx(1) and one["coverage"] == 0.25
    assert tail_coverage(np.array([1, 1, 50, 50] * 5), np.array([1, 0, 9, 9] * 5)) == 0.5
