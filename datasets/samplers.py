"""Which images make up a batch: a pure function of (seed, epoch), shared by all ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from util.dist import get_rank, get_world_size
from util.errors import InputError


class EpochBatches(Sampler):
    """Batches of (epoch, index) for one rank.

    All ranks share one permutation an epoch; global batch s is its slice [s * G, (s + 1) * G) with G = batch_size *
    world, and rank r takes the r-th part. What does not fill a batch is left out that epoch, as in MAE; each epoch
    leaves out others.

    Args:
        batch_size: images of one rank.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world: int, seed: int):
        self.num_images, self.batch_size = num_images, batch_size
        self.rank, self.world, self.seed = rank, world, seed
        self.epoch = self.start = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.num_images // (self.batch_size * self.world)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Next iteration: this epoch, from global batch `start` on."""
        self.epoch, self.start = epoch, start

    def permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return rng.permutation(self.num_images)

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """[G] int64: the images of global batch `step`, all ranks in rank order."""
        size = self.batch_size * self.world
        return self.permutation(epoch)[step * size : (step + 1) * size]

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = self.epoch, self.permutation(self.epoch)
        for step in range(self.start, self.batches_per_epoch):
            first = (step * self.world + self.rank) * self.batch_size
            yield [(epoch, int(i)) for i in permutation[first : first + self.batch_size]]


def epoch_batches(num_images: int, batch_size: int, seed: int) -> EpochBatches:
    """This rank's batches of (epoch, index).

    Raises:
        InputError: the images do not fill one batch of all ranks.
    """
    world = get_world_size()
    if num_images < batch_size * world:
        raise InputError(
            f"{num_images} training images do not fill one batch of {batch_size * world} (--batch_size "
            f"{batch_size} x {world} processes): lower --batch_size to at most {max(num_images // world, 1)}"
        )
    return EpochBatches(num_images, batch_size, get_rank(), world, seed)


class PKBatches(Sampler):
    """This rank's part of the batches of P vehicles x K images (`pk_batches`), as (epoch, slot, index); `slot` is a
    place of the epoch, so that an image that fills two places is not twice the same.

    Args:
        pids: [n] int64. batch_size: images of one rank. num_instances: K.
    Raises:
        InputError: all ranks' batch is no multiple of K, or fewer than P vehicles.
    """

    def __init__(self, pids: np.ndarray, batch_size: int, num_instances: int, rank: int, world: int, seed: int):
        if batch_size * world % num_instances:
            raise InputError(
                f"--batch_size {batch_size} x {world} processes is no multiple of --num_instances "
                f"{num_instances}: a batch holds whole vehicles"
            )
        self.pids, self.batch_size, self.num_instances = pids, batch_size, num_instances
        self.rank, self.world, self.seed = rank, world, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Next iteration: this epoch, from global batch `start` on."""
        size = self.batch_size * self.world
        self.epoch, self.start = epoch, start
        self.rows = pk_batches(self.pids, size // self.num_instances, self.num_instances, self.seed, epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Of the epoch that is set; others may have one more or less."""
        return len(self.rows)

    @property
    def num_images(self) -> int:
        return self.rows.size

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """[G] int64: the images of global batch `step` of the epoch that is set."""
        if epoch != self.epoch:
            raise ValueError(f"epoch {epoch} is not set, {self.epoch} is")
        return self.rows[step]

    def __len__(self) -> int:
        return len(self.rows) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, rows, first = self.epoch, self.rows, self.rank * self.batch_size
        for step in range(self.start, len(rows)):
            slots = range(first, first + self.batch_size)
            yield [(epoch, step * rows.shape[1] + slot, int(rows[step, slot])) for slot in slots]


def pk_batches(pids: np.ndarray, P: int, K: int, seed: int, epoch: int) -> np.ndarray:
    """The batches of an epoch, by the rule of TransReID's code.

    The images of each vehicle are shuffled and cut into groups of K; a vehicle with fewer is drawn from with
    replacement until it has K, what is left over at the end of a longer one waits for another epoch. Then batch after
    batch takes one group of each of P vehicles, drawn among those that still have one, until fewer than P do. No
    vehicle is twice in a batch.

    Args:
        pids: [n] integers, the vehicle of each image.
    Returns:
        [batches, P * K] int64 image numbers; the K of a vehicle stand together.
    Raises:
        InputError: fewer than P vehicles, or P or K below 2.
    """
    if P < 2 or K < 2:
        raise InputError(f"{P} vehicles x {K} images: a triplet needs at least 2 of both")
    order = np.argsort(pids, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(pids[order])) + 1)
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


def _groups(images: np.ndarray, K: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    if len(images) < K:
        yield rng.permutation(np.concatenate([images, rng.choice(images, K - len(images))]))
        return
    shuffled = rng.permutation(images)
    for start in range(0, len(images) - K + 1, K):
        yield shuffled[start : start + K]


def count_used(pids: np.ndarray, batches: np.ndarray) -> dict[str, int]:
    """What an epoch shows: batches, vehicles and different images in them, for the run's log."""
    used = np.unique(batches)
    return {"batches": len(batches), "vehicles": len(np.unique(pids[used])), "images": len(used)}
