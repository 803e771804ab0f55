"""Batches of P vehicles with K images each, for triplets; a function of (seed, epoch)."""

from collections.abc import Iterator

import numpy as np

from util.errors import InputError


def pk_batches(pids: np.ndarray, P: int, K: int, seed: int, epoch: int) -> np.ndarray:
    """The batches of an epoch.

    The images of each vehicle are shuffled and cut into groups of K; a vehicle with fewer is drawn from with
    replacement until it has K, what is left over at the end of a longer one waits for another epoch. Then
    batch after batch takes one group of each of P vehicles, drawn among those that still have one, until
    fewer than P do. No vehicle is twice in a batch. (The rule of TransReID's code.)

    Args:
        pids: [n] integers, the vehicle of each image.
    Returns:
        [batches, P * K] int64 image numbers; the K of a vehicle stand together, so that P / ranks vehicles
        are one rank's share of a row.
    Raises:
        InputError: fewer than P vehicles, or P or K below 2.
    """
    if P < 2 or K < 2:
        raise InputError(f"{P} vehicles x {K} images: a triplet needs at least 2 of both")
    members = _by_vehicle(pids)
    if len(members) < P:
        raise InputError(
            f"the training images show {len(members)} vehicles, a batch needs {P}: lower --batch_size, raise "
            "--num_instances, or add vehicles"
        )
    rng = np.random.default_rng((seed, epoch))
    groups = [list(_groups(images, K, rng)) for images in members]
    left = list(range(len(groups)))  # vehicles with a group
    batches = []
    while len(left) >= P:
        drawn = rng.choice(len(left), P, replace=False)
        batches.append(np.concatenate([groups[left[i]].pop() for i in drawn]))
        for i in sorted((i for i in drawn if not groups[left[i]]), reverse=True):
            left[i] = left[-1]
            left.pop()
    return np.stack(batches)


def count_used(pids: np.ndarray, batches: np.ndarray) -> dict[str, int]:
    """What an epoch shows: batches, vehicles and different images in them, for the run's log."""
    used = np.unique(batches)
    return {"batches": len(batches), "vehicles": len(np.unique(pids[used])), "images": len(used)}


def _by_vehicle(pids: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(pids, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(pids[order])) + 1)


def _groups(images: np.ndarray, K: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    if len(images) < K:
        yield rng.permutation(np.concatenate([images, rng.choice(images, K - len(images))]))
        return
    shuffled = rng.permutation(images)
    for start in range(0, len(images) - K + 1, K):
        yield shuffled[start : start + K]
