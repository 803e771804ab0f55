"""Losses of fine-tuning, as functions."""

import torch
import torch.nn.functional as F


def hard_triplet_loss(features: torch.Tensor, pids: torch.Tensor) -> torch.Tensor:
    """Batch-hard triplets with a soft margin (Hermans et al., 2017, arXiv 1703.07737, eq. 5 and Sec. 3):

        mean_a log(1 + exp(max_p d(a, p) - min_n d(a, n)))

    d is the Euclidean distance of features that are not normalised; p are images of a's vehicle (a too), n
    the others.

    Args:
        features: [N, D]. pids: [N] int64, of two vehicles at least.
    Raises:
        ValueError: the batch holds one vehicle only (looked at on the CPU).
    """
    features = features.double()  # neither autocast nor TF32 rounds it; squares of fp16 numbers overflow
    squared = features.square().sum(dim=1)
    squared_distance = squared[:, None] + squared[None] - 2 * features @ features.t()
    distance = squared_distance.clamp_min(1e-12).sqrt()
    same = pids[:, None] == pids[None]
    if features.device.type == "cpu" and bool(same.all()):  # elsewhere a look would stop the device
        raise ValueError("all images of the batch show one vehicle: a triplet needs another")
    farthest = distance.masked_fill(~same, -torch.inf).amax(dim=1)
    nearest = distance.masked_fill(same, torch.inf).amin(dim=1)
    return F.softplus(farthest - nearest).mean().float()


def identity_loss(logits: torch.Tensor, pids: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy over the vehicles, in float32; smoothing: epsilon of Szegedy et al., 2016, Sec. 7."""
    return F.cross_entropy(logits.float(), pids, label_smoothing=smoothing)


def over_branches(loss, outputs: list[torch.Tensor], pids: torch.Tensor) -> torch.Tensor:
    """TransReID's sum over branches, as its code has it: the global one counts as much as the mean of the
    local ones."""
    first = loss(outputs[0], pids)
    if len(outputs) == 1:
        return first
    local = torch.stack([loss(output, pids) for output in outputs[1:]]).mean()
    return (first + local) / 2


def center_loss(features: torch.Tensor, pids: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """1/2 mean_i ||x_i - c_{y_i}||^2 (Wen et al., ECCV 2016, eq. 2, per image); no gradient for the centres.

    Args:
        features: [N, D]. pids: [N] int64. centers: [K, D] float32.
    """
    return (features.float() - centers[pids]).square().sum(dim=1).mean() / 2


@torch.no_grad()
def move_centers(centers: torch.Tensor, features: torch.Tensor, pids: torch.Tensor, rate: float = 0.5) -> None:
    """c_k <- c_k - rate * sum_{y_i = k} (c_k - x_i) / (1 + n_k), in place (Wen et al., 2016, eq. 4)."""
    sums = torch.zeros_like(centers).index_add_(0, pids, centers[pids] - features.float())
    counts = torch.zeros_like(centers[:, 0]).index_add_(0, pids, torch.ones_like(pids, dtype=centers.dtype))
    centers -= rate * sums / (1 + counts[:, None])
