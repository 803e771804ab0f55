"""How a re-identification set is scored, by name: the name is printed beside every number."""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from datasets.reid import ReidData, ReidImages
from metrics.reid import Ranks, rank_blocks, rank_hits, scores
from metrics.rerank import reranked_blocks


@dataclass(frozen=True)
class Protocol:
    """The rules of one number.

    name: of the protocol; numbers of different protocols must not stand in one column.
    remove_same_camera: gallery images of the query's vehicle and camera do not count (VeRi-776's rule; also
        what VERI-Wild's authors ask for, though their scripts keep them, which adds about 4 points of mAP).
    draws: 0, or how often one random image of each vehicle becomes the gallery and the rest the queries
        (VehicleID); the scores are means over the draws.
    seed: of the draws; draw i is a function of (seed, i) and the list.
    rerank: (k1, k2, lambda) of `metrics.rerank`, or None.
    """

    name: str
    remove_same_camera: bool
    draws: int = 0
    seed: int = 0
    rerank: tuple[int, int, float] | None = None

    def line(self) -> str:
        """One line to print beside the numbers."""
        if self.draws:
            rule = f"1 gallery image a vehicle, {self.draws} draws, seed {self.seed}"
        else:
            rule = f"same-camera matches {'removed' if self.remove_same_camera else 'kept'}"
        ranking = "no re-ranking"
        if self.rerank:
            ranking = "re-ranked with k1 {}, k2 {}, lambda {:g}".format(*self.rerank)
        return f"{self.name} ({rule}, cosine, {ranking}) #{self.hash()}"

    def hash(self) -> str:
        """Eight digits that are equal only for equal rules."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]


def protocols_of(data: ReidData, keep_same_camera: bool = False, seed: int = 0) -> dict[str, Protocol]:
    """The protocol of each test of a set: {test: Protocol}.

    Args:
        keep_same_camera: the other variant, under another name.
        seed: of VehicleID's draws.
    """
    found = {}
    for test, (query, gallery) in data.tests.items():
        name = data.name if test == "test" else f"{data.name}/{test}"
        if gallery is None:
            found[test] = Protocol(name, False, draws=10, seed=seed)
            continue
        cameras = query.has_cameras() and gallery.has_cameras()
        if keep_same_camera and cameras:
            name += "/same-camera-kept"
        found[test] = Protocol(name, cameras and not keep_same_camera)
    return found


def draw_gallery(images: ReidImages, seed: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """VehicleID's split: ([V] int64 gallery rows, one random image of each vehicle; the other rows)."""
    rng = np.random.default_rng((seed, draw))
    shuffled = rng.permutation(len(images))
    _, first = np.unique(images.pids[shuffled], return_index=True)
    gallery = np.sort(shuffled[first])
    return gallery, np.setdiff1d(np.arange(len(images)), gallery)


def evaluate(
    protocol: Protocol,
    query: ReidImages,
    query_features: torch.Tensor,
    gallery: ReidImages | None = None,
    gallery_features: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Score features by a protocol.

    Args:
        query_features, gallery_features: [Q, D], [G, D] float, in the order of the images; without a gallery
            the protocol draws it from the queries.
    Returns:
        mAP, R1, R5, R10, mINP in [0, 1], queries, queries_without_match; with draws the means, and the
        standard deviation over them as mAP_std, R1_std ...
    """

    def rank(q: torch.Tensor, g: torch.Tensor, *ids: np.ndarray | None) -> Ranks:
        if not protocol.rerank:
            return rank_hits(q, g, *ids, device=device)
        k1, k2, weight = protocol.rerank
        return rank_blocks(reranked_blocks(q, g, device, k1=k1, k2=k2, weight=weight), *ids)

    if gallery is not None:
        cameras = (query.camids, gallery.camids) if protocol.remove_same_camera else (None, None)
        return scores(rank(query_features, gallery_features, query.pids, gallery.pids, *cameras))
    found = []
    for draw in range(protocol.draws):
        kept, asked = draw_gallery(query, protocol.seed, draw)
        rows = (query_features[asked], query_features[kept], query.pids[asked], query.pids[kept])
        found.append(scores(rank(*rows)))
    result = {key: float(np.mean([row[key] for row in found])) for key in found[0]}
    spread = {f"{key}_std": float(np.std([row[key] for row in found])) for key in ("mAP", "R1", "R5", "R10")}
    return result | spread
