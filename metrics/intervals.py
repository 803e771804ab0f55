"""How sure a number is: intervals and paired tests by the bootstrap (Efron and Tibshirani, 1993) over what was tested.

A `Measure` holds what was found on each tested thing (query, picture), so that the same things can be drawn again for
two encoders. S seeds, n things, K classes, B draws.
"""

from dataclasses import dataclass

import numpy as np

DRAWS, AT_ONCE = 2000, 250
SURE = 0.05  # the p below which a difference is told


@dataclass(frozen=True)
class Measure:
    """items: [S, n] float, the score of each thing (the measure is their mean), or [S, n, K, K] int, the confusion
    matrix of each picture (the measure is the mean IoU of the summed matrix, of classes `first` and on)."""

    items: np.ndarray
    first: int = 0

    def by_seed(self) -> np.ndarray:
        """[S], the measure of each seed."""
        return self._of(np.ones((1, self.items.shape[1])))[:, 0]

    def value(self) -> float:
        return float(self.by_seed().mean())

    def draws(self, seed: int = 0) -> np.ndarray:
        """[B]: the mean over the seeds on things that are drawn with replacement; equal draws for equal n and seed."""
        n = self.items.shape[1]
        rng, parts = np.random.default_rng((seed, n)), []
        for _ in range(DRAWS // AT_ONCE):
            counts = rng.multinomial(n, np.full(n, 1 / n), AT_ONCE)
            parts.append(self._of(counts.astype(np.float64)).mean(axis=0))
        return np.concatenate(parts)

    def interval(self) -> tuple[float, float]:
        """The middle 95% of the draws."""
        return tuple(np.quantile(self.draws(), (0.025, 0.975)).tolist())

    def _of(self, counts: np.ndarray) -> np.ndarray:
        """counts [B, n] of each thing -> [S, B]."""
        if self.items.ndim == 2:
            return self.items @ counts.T / counts.sum(axis=1)
        S, n, K, _ = self.items.shape
        found = counts @ self.items.reshape(S, n, K * K).astype(np.float64)
        found = found.reshape(S, len(counts), K, K)
        right, said = np.diagonal(found, axis1=2, axis2=3), found.sum(axis=2) + found.sum(axis=3)
        with np.errstate(invalid="ignore"):
            iou = right / (said - right)
        return np.nanmean(iou[..., self.first :], axis=2)


def paired_lead(a: Measure, b: Measure) -> tuple[float, float, float]:
    """(low, high, p) of a - b by draws of the same things for both: the middle 95%; two-sided, in [2 / (B + 1), 1]."""
    lead = a.draws() - b.draws()
    tail = min((lead <= 0).sum(), (lead >= 0).sum())
    return (*np.quantile(lead, (0.025, 0.975)).tolist(), float(min(1.0, 2 * (tail + 1) / (DRAWS + 1))))


def paired_p(a: Measure, b: Measure) -> float:
    """The p-value of `paired_lead`."""
    return paired_lead(a, b)[2]
