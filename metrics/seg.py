"""Numbers of segmentation from one confusion matrix of the whole split. K classes."""

from typing import NamedTuple

import numpy as np
import torch

from metrics.attr import ratio

IGNORE = 255  # label of pixels that do not count


def confusion_matrix(truth: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """[K, K] int64 pixels by true class (rows) and predicted class (columns); ValueError for a class that is none.
    truth: integers of any shape, 255 where there is no label; predicted: the same shape, 0 to K - 1."""
    if truth.shape != predicted.shape:
        raise ValueError(f"truth is {tuple(truth.shape)}, the prediction {tuple(predicted.shape)}")
    labelled = truth != IGNORE
    truth, predicted = truth[labelled].long(), predicted[labelled].long()
    for name, x in (("truth", truth), ("prediction", predicted)):
        if len(x) and (x.min() < 0 or x.max() >= num_classes):
            raise ValueError(f"{name} has classes from {x.min()} to {x.max()}, there are {num_classes}")
    return torch.bincount(truth * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


class SegmentationNumbers(NamedTuple):
    """iou, acc: [K] float64, NaN where a class is absent (see `segmentation_numbers`). flat: by name."""

    iou: np.ndarray
    acc: np.ndarray
    flat: dict[str, float]


def segmentation_numbers(confusion: np.ndarray, background: bool) -> SegmentationNumbers:
    """The field's numbers, all in [0, 1]:

        IoU_c = TP_c / (TP_c + FP_c + FN_c),  Acc_c = TP_c / (TP_c + FN_c)
        mIoU, mAcc: means over classes that are not NaN;  aAcc = sum_c TP_c / sum of all

    A class that is neither in the truth nor predicted has NaN for both; one that is predicted only has IoU 0 and Acc
    NaN. Where class 0 is the background, the same come once more without it (`parts_`); parts_aAcc is the share of the
    parts' pixels that are named right. confusion: [K, K] int64.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    right, true, said = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    iou, acc, flat = ratio(right, true + said - right, np.nan), ratio(right, true, np.nan), {}
    for prefix, first in (("", 0), ("parts_", 1)) if background else (("", 0),):
        for name, values in (("mIoU", iou[first:]), ("mAcc", acc[first:])):
            known = values[~np.isnan(values)]
            flat[prefix + name] = float(known.mean()) if len(known) else float("nan")
        flat[f"{prefix}aAcc"] = float(ratio(right[first:].sum(), true[first:].sum(), np.nan))
    return SegmentationNumbers(iou, acc, flat)
