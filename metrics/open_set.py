"""Re-identification where the vehicle may not be there: accept the best of the gallery, or say "unknown".

A query with a match in the gallery is known. Every query is also asked of the gallery without its vehicle: then it is
unknown, as are queries that never had a match. What scores above a threshold t is accepted.

    FAR(t) = accepted unknown queries / unknown queries,  TNR = 1 - FAR
    DIR(t) = known queries whose best image is right and accepted / known queries      (Phillips et al., 2011)
    F1(t)  = 2 right and accepted / (all accepted + known queries)

G gallery images, K known and U unknown queries.
"""

from typing import NamedTuple

import numpy as np
import torch

from metrics.intervals import Measure
from metrics.reid import Device, FeatureSet, Protocol, cosine_blocks, match_pairs

FARS = (0.001, 0.01, 0.1)
NEIGHBOURS, SPLITS = 20, 100


class Answers(NamedTuple):
    """known: [K] scores of the best gallery image. right: [K] bool, whether it shows the query's vehicle. rows: [K]
    int64, which queries these are. unknown: [U] scores. pids: [U] int64, the vehicles of the unknown queries."""

    known: np.ndarray
    right: np.ndarray
    rows: np.ndarray
    unknown: np.ndarray
    pids: np.ndarray


def open_answers(
    protocol: Protocol, query: FeatureSet, gallery: FeatureSet, kind: str, device: Device = "cpu"
) -> Answers:
    """Ask every query with its vehicle and without it, by the rules of a protocol for junk (not its re-ranking).

    kind: cosine, of the best image; margin: less that of the best image of another vehicle; overlap: the share of
    their `NEIGHBOURS` nearest gallery images that the query and its best image have in common (what k-reciprocal
    encoding compares), ties by cosine.
    """
    cameras = (query.camids, gallery.camids) if protocol.remove_same_camera else (None, None)
    matches = match_pairs(query.pids, gallery.pids, *cameras, query.files, gallery.files)
    scorer = _Scorer(gallery, kind, device)
    known, right, rows, unknown, pids, start = [], [], [], [], [], 0
    for similar in cosine_blocks(query.features, gallery.features, device):
        part = slice(start, start + len(similar))
        own, junk = (tuple(torch.from_numpy(ids).to(device) for ids in pairs) for pairs in matches(part))
        similar[junk] = -torch.inf
        asked = np.unique(own[0].cpu().numpy())
        scores, best = scorer(similar[torch.from_numpy(asked).to(device)])
        known.append(scores)
        right.append(gallery.pids[best] == query.pids[part][asked])
        rows.append(asked + start)
        similar[own] = -torch.inf
        left = torch.isfinite(similar).any(dim=1)  # there may be no other vehicle
        unknown.append(scorer(similar[left])[0])
        pids.append(query.pids[part][left.cpu().numpy()])
        start = part.stop
    return Answers(*map(np.concatenate, (known, right, rows, unknown, pids)))


class _Scorer:
    """[q, G] similarities, -inf where an image does not count -> ([q] float64 scores, [q] int64 the best images)."""

    def __init__(self, gallery: FeatureSet, kind: str, device: Device):
        self.kind, self.pids = kind, torch.from_numpy(gallery.pids).to(device)
        if kind == "overlap":  # so many that NEIGHBOURS are left without a vehicle's own images
            most = int(np.unique(gallery.pids, return_counts=True)[1].max())
            k = min(NEIGHBOURS + most, len(gallery.pids))
            blocks = cosine_blocks(gallery.features, gallery.features, device)
            self.near = torch.cat([block.topk(k, dim=1).indices.cpu() for block in blocks]).numpy()

    def __call__(self, similar: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        top, best = similar.max(dim=1) if len(similar) else (similar.new_zeros(0), similar.new_zeros(0).long())
        if self.kind == "margin":
            others = similar.masked_fill(self.pids[None] == self.pids[best][:, None], -torch.inf)
            top = top - others.amax(dim=1).clamp_min(-1)
        scores, best = top.double().cpu().numpy(), best.cpu().numpy()
        if self.kind == "overlap":
            scores = np.array([self._overlap(*row) for row in zip(similar.cpu(), best)]) + 1e-3 * scores
        return scores, best

    def _overlap(self, row: torch.Tensor, best: int) -> float:
        counts = torch.isfinite(row).numpy()
        mine = row.topk(min(NEIGHBOURS, int(counts.sum()))).indices.numpy()
        theirs = self.near[best][counts[self.near[best]]][:NEIGHBOURS]
        return len(np.intersect1d(mine, theirs)) / len(np.union1d(mine, theirs))


def conformal_threshold(unknown: np.ndarray, far: float) -> float:
    """The threshold t of split conformal prediction (Vovk et al., 2005): the ceil((U + 1)(1 - far))-th smallest score;
    infinite where there are too few. A new unknown query that is exchangeable with these U scores above t with
    probability at most `far`, on average over the draws of the U."""
    place = int(np.ceil((len(unknown) + 1) * (1 - far) - 1e-9))
    return float(np.sort(unknown)[place - 1]) if place <= len(unknown) else np.inf


def measured_far(answers: Answers, fars, seed: int = 0) -> np.ndarray:
    """[len(fars), SPLITS]: thresholds are chosen on the unknown queries of a random half of the vehicles, and their
    FAR is measured on those of the others."""
    vehicles, found = np.unique(answers.pids), np.zeros((len(fars), SPLITS))
    for split in range(SPLITS):
        chosen = np.random.default_rng((seed, split)).permutation(vehicles)[: len(vehicles) // 2]
        is_chosen = np.isin(answers.pids, chosen)
        for i, far in enumerate(fars):
            t = conformal_threshold(answers.unknown[is_chosen], far)
            found[i, split] = (answers.unknown[~is_chosen] > t).mean()
    return found


def accepted_right(answers: Answers, far: float) -> np.ndarray:
    """[K] float, 1 where the best image is right and scores above the lowest t at which FAR(t) <= far on these very
    queries: the mean is DIR at this FAR."""
    t = np.sort(answers.unknown)[::-1][int(far * len(answers.unknown))]
    return (answers.right & (answers.known > t)).astype(np.float64)


def open_numbers(answers: Answers, far: float) -> dict[str, float]:
    """AUROC of known against unknown (ties half); DIR at each FAR of `FARS` and its 95% interval; and at the conformal
    threshold for `far` FAR, FAR_std and TNR over `measured_far`'s halves, F1, and the threshold of all queries."""
    both = np.concatenate([answers.unknown, answers.known])
    _, place, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    U, K = len(answers.unknown), len(answers.known)
    numbers = {"AUROC": (ranks[U:].sum() - K * (K + 1) / 2) / (U * K)}
    for share in FARS:
        measure = Measure(accepted_right(answers, share)[None])
        low, high = measure.interval()
        name = f"DIR_{100 * share:g}"
        numbers |= {name: measure.value(), f"{name}_low": low, f"{name}_high": high}
    t, measured = conformal_threshold(answers.unknown, far), measured_far(answers, [far])[0]
    right = (answers.right & (answers.known > t)).sum()
    said = (answers.known > t).sum() + (answers.unknown > t).sum()
    numbers |= {
        "FAR": measured.mean(),
        "FAR_std": measured.std(),
        "TNR": 1 - measured.mean(),
        "F1": 2 * right / (said + K),
    }
    return {name: float(value) for name, value in numbers.items()} | {"threshold": t, "unknown": U, "known": K}
