"""Metrics of attribute recognition, with a constant answer beside every number.

With g, p in {0, 1}^{n x A} what is true and what is said (p = 1 where the probability exceeds a threshold),
and a fraction 0 where its denominator is 0, as in the published code:

    mA        = mean_a (TP_a / (TP_a + FN_a) + TN_a / (TN_a + FP_a)) / 2
    accuracy  = mean_i |g_i & p_i| / |g_i | p_i|
    precision = mean_i |g_i & p_i| / |p_i|
    recall    = mean_i |g_i & p_i| / |g_i|
    F1        = mean_i 2 precision_i recall_i / (precision_i + recall_i)

F1 is averaged over images; that of mean precision and mean recall, which other code reports, is F1_of_means.
Labels that are not known (-1) count nowhere, and images of which nothing is known neither.
"""

from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.45  # of VTB


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below as float64, 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=np.asarray(below) > 0)


@dataclass(frozen=True)
class Counts:
    """TP, FN, TN, FP of each attribute, [A] int64."""

    tp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray
    fp: np.ndarray

    @classmethod
    def of(cls, said: np.ndarray, labels: np.ndarray) -> "Counts":
        """said: [n, A] bool. labels: [n, A] int, 1 true, 0 not, -1 unknown."""
        true, false = labels == 1, labels == 0
        parts = (said & true, ~said & true, ~said & false, said & false)
        return cls(*(part.sum(axis=0, dtype=np.int64) for part in parts))

    @property
    def support(self) -> np.ndarray:
        """[A] int64 images for which the attribute is true."""
        return self.tp + self.fn

    @property
    def known(self) -> np.ndarray:
        return self.support + self.tn + self.fp

    @property
    def tpr(self) -> np.ndarray:
        """[A] float64, 0 where no image has the attribute."""
        return ratio(self.tp, self.support)

    @property
    def tnr(self) -> np.ndarray:
        return ratio(self.tn, self.tn + self.fp)

    @property
    def balanced(self) -> np.ndarray:
        """[A] float64, the terms of mA."""
        return (self.tpr + self.tnr) / 2

    @property
    def is_supported(self) -> np.ndarray:
        """[A] bool: both kinds of image are there, so that the term of mA can reach 1."""
        return (self.support > 0) & (self.tn + self.fp > 0)


def attribute_metrics(said: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The numbers of one answer.

    Args:
        said: [n, A] bool. labels: [n, A] int, 1 true, 0 not, -1 unknown.
    Returns:
        mA, accuracy, precision, recall, F1, F1_of_means and mA_supported in [0, 1] (mA_supported: the mean
        over the attributes with true and false images alone; NaN where there is none).
    Raises:
        ValueError: shapes differ, or nothing is known.
    """
    if said.shape != labels.shape or said.ndim != 2:
        raise ValueError(f"answers {said.shape} and labels {labels.shape} must both be [n, A]")
    known = labels >= 0
    if not known.any():
        raise ValueError("not one label is known")
    counts = Counts.of(said, labels)
    rows = known.any(axis=1)
    true, answer = (labels == 1)[rows], (said & known)[rows]
    both = (true & answer).sum(axis=1)
    precision, recall = ratio(both, answer.sum(axis=1)), ratio(both, true.sum(axis=1))
    f1 = ratio(2 * precision * recall, precision + recall)
    means = float(precision.mean()), float(recall.mean())
    supported = counts.balanced[counts.is_supported]
    return {
        "mA": float(counts.balanced.mean()),
        "accuracy": float(ratio(both, (true | answer).sum(axis=1)).mean()),
        "precision": means[0],
        "recall": means[1],
        "F1": float(f1.mean()),
        "F1_of_means": 2 * means[0] * means[1] / (sum(means) or 1.0),
        "mA_supported": float(supported.mean()) if len(supported) else float("nan"),
    }


def constant_answer(labels: np.ndarray) -> np.ndarray:
    """[A] bool: the best that can be said of every image alike without looking, by the labels of training.

    The k commonest attributes are said to be true, with the k of the highest mean F1 on the training images;
    of equal ones the fewest, and of equally common attributes the first.

    Args:
        labels: [n, A] int, 1 true, 0 not, -1 unknown.
    """
    known, true = labels >= 0, labels == 1
    order = np.argsort(-ratio(true.sum(axis=0), known.sum(axis=0)), kind="stable")
    rows = known.any(axis=1)
    size = true[rows].sum(axis=1)
    both, said = np.zeros(len(size), np.int64), np.zeros(len(size), np.int64)
    scores = []
    for column in order.tolist():
        both, said = both + true[rows, column], said + known[rows, column]
        scores.append(ratio(2 * both, size + said).mean())
    answer = np.zeros(labels.shape[1], dtype=bool)
    answer[order[: int(np.argmax(scores)) + 1]] = True
    return answer


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under precision over recall, in steps: sum_k (R_k - R_{k-1}) P_k over the different scores, from
    the highest on; NaN where no label is true.

    Args:
        scores: [n] float. labels: [n] int, 1 true, 0 not, -1 unknown.
    """
    scores, true = scores[labels >= 0], (labels[labels >= 0] == 1)
    if not true.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each run of equal scores
    hits = np.cumsum(true[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def group_top1(probs: np.ndarray, labels: np.ndarray, columns: list[int]) -> float:
    """Share of images whose most probable attribute of a group is the true one, among those with exactly one
    true one; NaN where there is no such image.

    Args:
        probs: [n, A] float. labels: [n, A] int. columns: of the group, of which one is true.
    """
    inside = labels[:, columns] == 1
    rows = inside.sum(axis=1) == 1
    if not rows.any():
        return float("nan")
    return float(inside[rows, probs[rows][:, columns].argmax(axis=1)].mean())


def attribute_rows(
    probs: np.ndarray, labels: np.ndarray, names: list[str], rates: np.ndarray, threshold: float
) -> list[dict]:
    """One row an attribute, as plain values in [0, 1] and counts; beside each number what a constant answer
    gets.

    train_rate: share of true training images. images, support: known and true test images. TPR, TNR and their
    mean, the term of mA (a constant gets 0.5, or less where there is no support). AP: average precision,
    that of a constant is the positive rate. accuracy: share of right answers, a constant's by the commoner
    answer of training.

    Args:
        rates: [A] float, share of true images in training.
    """
    counts = Counts.of(probs > threshold, labels)
    constant = Counts.of(np.broadcast_to(rates > 0.5, labels.shape), labels)
    rows = []
    for a, name in enumerate(names):
        images = max(int(counts.known[a]), 1)
        rows.append({
            "attribute": name,
            "train_rate": float(rates[a]),
            "images": int(counts.known[a]),
            "support": int(counts.support[a]),
            "positive_rate": float(counts.support[a] / images),
            "TPR": float(counts.tpr[a]) if counts.support[a] else float("nan"),
            "TNR": float(counts.tnr[a]) if counts.tn[a] + counts.fp[a] else float("nan"),
            "mA": float(counts.balanced[a]),
            "constant_mA": float(constant.balanced[a]),
            "AP": average_precision(probs[:, a], labels[:, a]),
            "constant_AP": float(counts.support[a] / images),
            "accuracy": float((counts.tp[a] + counts.tn[a]) / images),
            "constant_accuracy": float((constant.tp[a] + constant.tn[a]) / images),
        })  # fmt: skip
    return rows
