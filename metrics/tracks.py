"""Images of one tracklet -> one feature: T tracks of n images, D numbers a feature."""

import numpy as np
import torch
import torch.nn.functional as F


def pool_tracks(
    features: torch.Tensor, tracks: np.ndarray, how: str, quality: torch.Tensor | None = None
) -> tuple[torch.Tensor, np.ndarray]:
    """([T, D] float32 in the order of the numbers of the tracks, [T] the row of the image that is most like its track).

    Args:
        features: [n, D], of any length. tracks: [n] int64, equal for one track.
        how: mean (of unit vectors), quality (the same, weighted), medoid (the image nearest to all others).
        quality: [n] weights, not negative; of images that all have none the mean is taken.
    """
    x = F.normalize(features.double(), dim=1)
    names, group = np.unique(tracks, return_inverse=True)
    owner = torch.from_numpy(group)
    weights = torch.ones(len(x), dtype=torch.float64)
    if how == "quality":
        weights = quality.double().clamp_min(1e-12)
    pooled = torch.zeros(len(names), x.shape[1], dtype=torch.float64).index_add_(0, owner, x * weights[:, None])
    # the sum of the cosines with all of a track is the product with their sum
    likeness = (x * F.normalize(pooled, dim=1)[owner]).sum(dim=1).numpy()
    order = np.lexsort((-likeness, group))
    rows = order[np.searchsorted(group[order], np.arange(len(names)))]
    return (x[rows] if how == "medoid" else F.normalize(pooled, dim=1)).float(), rows


def sharpness(imgs: torch.Tensor) -> torch.Tensor:
    """[N] float32 deviation of the Laplacian of [N, 3, H, W] uint8 in grey. Of pictures resized to what a model sees it
    tells both blur and size: few pixels that are drawn large have no fine detail."""
    grey = imgs.float().mean(dim=1)
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (around - 4 * grey[:, 1:-1, 1:-1]).flatten(1).std(dim=1, correction=0)
