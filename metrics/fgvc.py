"""Numbers of a classifier from its scores."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ClassScores:
    """numbers: by name, shares in [0, 1] and counts. ranks: [n] int64, how many classes come before the right one.
    confusion: [K, K] int64, row: class, column: answer."""

    numbers: dict[str, float]
    ranks: torch.Tensor
    confusion: torch.Tensor

    def per_class(self) -> tuple[torch.Tensor, torch.Tensor]:
        """([K] float32 share of its images that each class gets right, NaN without images; [K] int64 images)."""
        images = self.confusion.sum(dim=1)
        return self.confusion.diagonal() / images.float(), images


def rank_of_truth(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n] int64: how many classes come before the right one: those with a higher score [n, K], and those with an equal
    one and a lower number, so that a constant answer is right for one class only. Below k: right in the first k."""
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | (scores == own) & before).sum(dim=1)


def class_scores(scores: torch.Tensor, labels: torch.Tensor) -> ClassScores:
    """top1, top5; mean_class_accuracy: mean over the classes that have images; majority: the share of the most frequent
    class; images, classes_with_images. scores: [n, K] float, labels: [n] int64, n from 1."""
    ranks, K = rank_of_truth(scores, labels), scores.shape[1]
    answers = scores.argmax(dim=1)  # of equal scores the first, as in `rank_of_truth`
    confusion = torch.bincount(labels * K + answers, minlength=K * K).view(K, K)
    images = confusion.sum(dim=1)
    numbers = {f"top{k}": (ranks < k).float().mean().item() for k in (1, 5)}
    numbers["mean_class_accuracy"] = (confusion.diagonal() / images)[images > 0].mean().item()
    numbers["majority"] = (images.max() / len(labels)).item()
    numbers |= {"images": len(labels), "classes_with_images": int((images > 0).sum())}
    return ClassScores(numbers, ranks, confusion)
