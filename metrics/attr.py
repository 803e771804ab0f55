"""Metrics of attribute recognition, with a constant answer beside every number.

With g, p in {0, 1}^{n x A} what is true and what is said (p = 1 where the probability exceeds a threshold),
and a fraction 0 where its denominator is 0, as in the published code:

    mA        = mean_a (TP_a / (TP_a + FN_a) + TN_a / (TN_a + FP_a)) / 2
    accuracy  = mean_i |g_i & p_i| / |g_i | p_i|
    precision = mean_i |g_i & p_i| / |p_i|
    recall    = mean_i |g_i & p_i| / |g_i|
    F1        = mean_i 2 precision_i recall_i / (precision_i + recall_i)

F1 is averaged over images; that of mean precision and mean recall, which other code reports, is F1_of_means. Said:
[n, A] bool. Labels: [n, A] int, 1 true, 0 not, -1 unknown: counted nowhere, as images of which nothing is known.
"""

import numpy as np

THRESHOLD = 0.45  # of VTB


def ratio(above: np.ndarray, below: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """above / below as float64, `empty` where `below` is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), empty), where=np.asarray(below) > 0)


def rates_of(said: np.ndarray, labels: np.ndarray, empty: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """TPR, TNR of each attribute, [A] float64; `empty` where it has no true (or no false) image."""
    true, false = labels == 1, labels == 0
    tpr = ratio((said & true).sum(axis=0), true.sum(axis=0), empty)
    return tpr, ratio((~said & false).sum(axis=0), false.sum(axis=0), empty)


def attribute_metrics(said: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """mA, accuracy, precision, recall, F1, F1_of_means and mA_supported in [0, 1] (mA_supported: the mean over the
    attributes with true and false images alone; NaN where there is none). ValueError where nothing is known."""
    rows = (labels >= 0).any(axis=1)
    if said.shape != labels.shape or not rows.any():
        raise ValueError(f"answers {said.shape}, labels {labels.shape}, {rows.sum()} images with a known one")
    true, answer = (labels == 1)[rows], (said & (labels >= 0))[rows]
    both = (true & answer).sum(axis=1)
    precision, recall = ratio(both, answer.sum(axis=1)), ratio(both, true.sum(axis=1))
    terms = sum(rates_of(said, labels)) / 2
    supported = terms[(labels == 1).any(axis=0) & (labels == 0).any(axis=0)]
    each = {"mA": terms, "accuracy": ratio(both, (true | answer).sum(axis=1)), "precision": precision}
    each |= {"recall": recall, "F1": ratio(2 * precision * recall, precision + recall)}
    means = {name: float(values.mean()) for name, values in each.items()}
    p, r = means["precision"], means["recall"]
    means["F1_of_means"] = 2 * p * r / ((p + r) or 1.0)
    return means | {"mA_supported": float(supported.mean()) if len(supported) else float("nan")}


def constant_answer(labels: np.ndarray) -> np.ndarray:
    """[A] bool, the best that can be said of every image alike: the k attributes that are commonest in training, with
    the k of the highest mean F1 there; of equal ones the fewest, and the first."""
    labels = labels[(labels >= 0).any(axis=1)]
    known, true = labels >= 0, labels == 1
    order = np.argsort(-ratio(true.sum(axis=0), known.sum(axis=0)), kind="stable")
    both, said = true[:, order].cumsum(axis=1), known[:, order].cumsum(axis=1)  # of the first 1, 2 ... A
    scores = ratio(2 * both, true.sum(axis=1, keepdims=True) + said).mean(axis=0)
    answer = np.zeros(labels.shape[1], dtype=bool)
    answer[order[: int(np.argmax(scores)) + 1]] = True
    return answer


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under precision over recall of one attribute, in steps: sum_k (R_k - R_{k-1}) P_k over the different
    scores [n], from the highest on; NaN where no label is true."""
    scores, true = scores[labels >= 0], (labels[labels >= 0] == 1)
    if not true.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each run of equal scores
    hits = np.cumsum(true[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def group_top1(probs: np.ndarray, labels: np.ndarray, columns: list[int]) -> float:
    """Share of images whose most probable attribute among `columns` is the true one; NaN where there is no image."""
    counts = group_confusion(probs, labels, columns)
    return float(ratio(np.trace(counts), counts.sum(), np.nan))


def group_confusion(probs: np.ndarray, labels: np.ndarray, columns: list[int]) -> np.ndarray:
    """[K, K] images by their true attribute among `columns`, of those with exactly one, and the most probable one."""
    inside, K = labels[:, columns] == 1, len(columns)
    rows = inside.sum(axis=1) == 1
    true, said = inside[rows].argmax(axis=1), probs[rows][:, columns].argmax(axis=1)
    return np.bincount(true * K + said, minlength=K * K).reshape(K, K)


def attribute_rows(
    probs: np.ndarray, labels: np.ndarray, names: list[str], rates: np.ndarray, threshold: float
) -> list[dict]:
    """One row an attribute, as plain values in [0, 1] and counts, beside each number what a constant answer gets; probs
    [n, A] float, rates [A] float, share of true images in training. images, support: known and true test images. mA:
    the attribute's term of it. AP: average precision, of a constant the positive rate. accuracy: share of right
    answers, a constant's by the commoner answer of training."""
    said, constant = probs > threshold, np.broadcast_to(rates > 0.5, labels.shape)
    known, true, (tpr, tnr) = labels >= 0, labels == 1, rates_of(said, labels, np.nan)
    images, support = known.sum(axis=0), true.sum(axis=0)
    columns = {
        "attribute": np.array(names, dtype=object), "train_rate": rates, "images": images, "support": support,
        "positive_rate": ratio(support, images), "TPR": tpr, "TNR": tnr,
        "mA": sum(rates_of(said, labels)) / 2, "constant_mA": sum(rates_of(constant, labels)) / 2,
        "AP": np.array([average_precision(*pair) for pair in zip(probs.T, labels.T)]),
        "constant_AP": ratio(support, images),
        "accuracy": ratio(((said == true) & known).sum(axis=0), images),
        "constant_accuracy": ratio(((constant == true) & known).sum(axis=0), images),
    }  # fmt: skip
    return [dict(zip(columns, row)) for row in zip(*(column.tolist() for column in columns.values()))]
