"""Which images make up a batch: a pure function of (seed, epoch), shared by all ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from util.errors import InputError


class Batches(Sampler):
    """One rank's part of the batches of an epoch: all ranks `draw` the same rows [batches, batch_size * world] int64 of
    image numbers, and rank r takes the r-th part of each."""

    with_slots = False  # items are (epoch, index), or (epoch, slot, index): `slot` is a place of the epoch

    def __init__(self, batch_size: int, rank: int, world: int, seed: int):
        self.batch_size, self.rank, self.size, self.seed = batch_size, rank, batch_size * world, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Next iteration: this epoch, from global batch `start` on."""
        self.epoch, self.start, self.rows = epoch, start, self.draw(epoch)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.rows)

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """The images of global batch `step`, all ranks in rank order."""
        return (self.rows if epoch == self.epoch else self.draw(epoch))[step]

    def __len__(self) -> int:
        return len(self.rows) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch, rows = self.epoch, self.rows
        places = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for step in range(self.start, len(rows)):
            slots = [(step * self.size + place,) if self.with_slots else () for place in places]
            yield [(epoch, *slot, index) for slot, index in zip(slots, rows[step, places].tolist())]


class EpochBatches(Batches):
    """Batches of (epoch, index): one permutation an epoch, cut. What does not fill a batch is left out that epoch, as
    in MAE; each epoch leaves out others."""

    def __init__(self, num_images: int, batch_size: int, rank: int, world: int, seed: int):
        if num_images < batch_size * world:
            batch = f"one batch of {batch_size * world} (--batch_size {batch_size} x {world} processes)"
            cure = f"lower --batch_size to at most {max(num_images // world, 1)}"
            raise InputError(f"{num_images} training images do not fill {batch}: {cure}")
        self.num_images = num_images
        super().__init__(batch_size, rank, world, seed)

    def draw(self, epoch: int) -> np.ndarray:
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_images)
        return order[: len(order) // self.size * self.size].reshape(-1, self.size)


class PKBatches(Batches):
    """Batches of P vehicles x K images (`pk_batches`), with slots: an image that fills two places is not twice the
    same. Epochs may differ by a batch. pids: [n] int64; num_instances: K."""

    with_slots = True

    def __init__(self, pids: np.ndarray, batch_size: int, num_instances: int, rank: int, world: int, seed: int):
        if batch_size * world % num_instances:
            what = f"is no multiple of --num_instances {num_instances}: a batch holds whole vehicles"
            raise InputError(f"--batch_size {batch_size} x {world} processes {what}")
        self.pids, self.num_instances = pids, num_instances
        super().__init__(batch_size, rank, world, seed)

    def draw(self, epoch: int) -> np.ndarray:
        return pk_batches(self.pids, self.size // self.num_instances, self.num_instances, self.seed, epoch)

    @property
    def num_images(self) -> int:
        return self.rows.size


def pk_batches(pids: np.ndarray, P: int, K: int, seed: int, epoch: int) -> np.ndarray:
    """The batches of an epoch by the rule of TransReID's code, [batches, P * K] int64 image numbers, the K of a vehicle
    side by side. pids: [n] integers, the vehicle of each image.

    The images of each vehicle are shuffled and cut into groups of K; of a vehicle with fewer, K are drawn with
    replacement, so that some may be missing; what is left over of a longer one waits for another epoch. Then batch
    after batch takes one group of each of P vehicles, drawn among those that still have one, until fewer than P do."""
    if P < 2 or K < 2:
        raise InputError(f"{P} vehicles x {K} images: a triplet needs at least 2 of both")
    order = np.argsort(pids, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(pids[order])) + 1)
    if len(members) < P:
        cure = "lower --batch_size, raise --num_instances, or add vehicles"
        raise InputError(f"the training images show {len(members)} vehicles, a batch needs {P}: {cure}")
    rng = np.random.default_rng((seed, epoch))
    groups, batches = [], []  # of the vehicles that still have one
    for images in members:
        shuffled = rng.permutation(images if len(images) >= K else rng.choice(images, K))
        groups.append([shuffled[i : i + K] for i in range(0, len(shuffled) - K + 1, K)])
    while len(groups) >= P:
        drawn = rng.choice(len(groups), P, replace=False)
        batches.append(np.concatenate([groups[i].pop() for i in drawn]))
        for i in sorted((i for i in drawn if not groups[i]), reverse=True):
            groups[i] = groups[-1]
            groups.pop()
    return np.stack(batches)
