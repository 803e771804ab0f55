"""Images of one tracklet -> one feature: T tracks of n images, D numbers a feature."""

import numpy as np
import torch
import torch.nn.functional as F


def pool_tracks(
    features: torch.Tensor, tracks: np.ndarray, how: str, quality: torch.Tensor | None = None
) -> tuple[torch.Tensor, np.ndarray]:
    """([T, D] float32 in the order of the numbers of the tracks, [T] the first row of each).

    Args:
        features: [n, D], of any length. tracks: [n] int64, equal for one track.
        how: mean (of unit vectors), quality (the same, weighted), medoid (the image nearest to all others).
        quality: [n] weights, not negative; of images that all have none the mean is taken.
    """
    x = F.normalize(features.double(), dim=1)
    _, first, group = np.unique(tracks, return_index=True, return_inverse=True)
    owner = torch.from_numpy(group)
    weighted = x * quality.double().clamp_min(1e-12)[:, None] if how == "quality" else x
    pooled = torch.zeros(len(first), x.shape[1], dtype=torch.float64).index_add_(0, owner, weighted)
    if how == "medoid":  # the sum of an image's cosines with its track is its product with their sum
        nearest = np.lexsort((-(x * pooled[owner]).sum(dim=1).numpy().round(9), group))  # of equal ones the first
        pooled = x[nearest[np.searchsorted(group[nearest], np.arange(len(first)))]]
    return F.normalize(pooled, dim=1).float(), first


def sharpness(imgs: torch.Tensor) -> torch.Tensor:
    """[N] float32 deviation of the Laplacian of [N, 3, H, W] uint8 in grey. Of pictures resized to what a model sees it
    tells both blur and size: few pixels that are drawn large have no fine detail."""
    grey = imgs.float().mean(dim=1)
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (around - 4 * grey[:, 1:-1, 1:-1]).flatten(1).std(dim=1, correction=0)
