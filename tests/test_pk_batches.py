"""Batches of P vehicles with K images each."""

import numpy as np
import pytest

from datasets.samplers import count_used, pk_batches
from util.errors import InputError

# vehicle: images; 3 and 7 have fewer than K
COUNTS = {0: 9, 1: 4, 2: 13, 3: 1, 4: 8, 5: 6, 6: 5, 7: 3, 8: 40}
PIDS = np.random.default_rng(0).permutation(np.repeat(list(COUNTS), list(COUNTS.values())))


def test_every_row_holds_different_vehicles_with_k_images_each():
    batches = pk_batches(PIDS, 3, 4, seed=1, epoch=0)
    vehicles = PIDS[batches].reshape(len(batches), 3, 4)
    assert (vehicles == vehicles[:, :, :1]).all()
    assert all(len(set(row)) == 3 for row in vehicles[:, :, 0])
    groups = {pid: max(1, count // 4) for pid, count in COUNTS.items()}
    shown = {pid: int((vehicles[:, :, 0] == pid).sum()) for pid in COUNTS}
    assert all(shown[pid] <= groups[pid] for pid in COUNTS)
    left = [pid for pid in COUNTS if shown[pid] < groups[pid]]
    assert len(left) < 3, "it stops only when fewer than P vehicles are left"
    for pid, count in COUNTS.items():
        used = batches[PIDS[batches] == pid]
        if count >= 4:
            assert len(set(used)) == len(used), "no image twice"
        elif len(used):
            assert set(used) == set(np.flatnonzero(PIDS == pid)), "all of a small vehicle, some twice"
    found = count_used(PIDS, batches)
    assert found["batches"] == len(batches) and found["images"] == len(np.unique(batches))


def test_an_epoch_is_a_function_of_seed_and_number():
    first = pk_batches(PIDS, 3, 4, seed=1, epoch=5)
    assert (first == pk_batches(PIDS, 3, 4, seed=1, epoch=5)).all()
    for seed, epoch in ((1, 6), (2, 5)):
        other = pk_batches(PIDS, 3, 4, seed=seed, epoch=epoch)
        assert other.shape != first.shape or (other != first).any()


def test_all_vehicles_come_over_the_epochs():
    seen = set()
    for epoch in range(20):
        seen |= set(PIDS[pk_batches(PIDS, 3, 4, seed=0, epoch=epoch)].ravel())
    assert seen == set(COUNTS)


def test_too_few():
    with pytest.raises(InputError, match="show 9 vehicles, a batch needs 10"):
        pk_batches(PIDS, 10, 4, seed=0, epoch=0)
    with pytest.raises(InputError, match="at least 2 of both"):
        pk_batches(PIDS, 4, 1, seed=0, epoch=0)
