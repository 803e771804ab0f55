"""Visual grounding: which texts do the images know? Only unpaired embeddings are compared."""

import math
from types import SimpleNamespace

import torch

HUB_FAIR = 5  # a hub is used at least this many times as often as an average text of its rank list


class Grounding(SimpleNamespace):
    """What grounding found for T texts.

    usage: [T] int64, images that have the text among their nearest; corrected: the same after the correction of hubs;
    gap: [T] float32, mean cosine advantage over the generic prompt on the images of `usage` (NaN: none); limit: [T]
    float32, share of images above which the text is a hub; best_images: [T, m] int64, nearest first; reasons: ""
    (kept), "ungrounded", "hub" or "generic".
    """


@torch.no_grad()
def ground(
    images: torch.Tensor, texts: torch.Tensor, generic: torch.Tensor, kinds: torch.Tensor, tau: float, rule,
    show: int = 4, block: int = 1024,
) -> Grounding:  # fmt: skip
    """Judge every text by the images.

    Each image takes its `topk` nearest texts of every kind, by cosine, but at most a tenth of the kind's texts. A text
    is removed, in this order, if

    - fewer than `n_min` images take it (ungrounded);
    - more than `hub_share` of the images and more than five times the fair share would take it even after the
      correction of hubs (hub);
    - on the images that take it, its cosine exceeds the generic prompt's by less than `margin` on average (generic).

    Args:
        images: V [N, D] float32 unit rows; texts: U [T, D]; generic: [D], unit.
        kinds: [T] int64, number of the kind within which a text is ranked. tau: the teacher's temperature.
        rule: has topk, n_min, hub_share and margin, as the flags.
        show: m of `best_images`. block: images at a time; memory is a few times block x T x 4 bytes.
    """
    N, T = len(images), len(texts)
    # the correction of hubs (Smith et al., 2017): cosines minus tau log of the sum of exp(cosine / tau) over the images
    shift = torch.full((T,), -math.inf)
    for part in images.split(block):
        shift = torch.logaddexp(shift, (part @ texts.T / tau).logsumexp(dim=0))
    usage, corrected = torch.zeros(2, T, dtype=torch.int64)
    gap, limit, best = torch.zeros(T, dtype=torch.float64), torch.zeros(T), torch.full((T, min(show, N)), -math.inf)
    best_images = torch.zeros(T, min(show, N), dtype=torch.int64)
    for start in range(0, N, block):
        cosine = images[start : start + block] @ texts.T  # [b, T]
        advantage = cosine - (images[start : start + block] @ generic)[:, None]
        for kind in kinds.unique():
            ids = torch.nonzero(kinds == kind).flatten()
            k = min(rule.topk, -(-len(ids) // 10))
            limit[ids] = max(rule.hub_share, HUB_FAIR * k / len(ids))
            chosen = ids[cosine[:, ids].topk(k, dim=1).indices]  # [b, k]
            usage += torch.bincount(chosen.flatten(), minlength=T)
            gap.index_add_(0, chosen.flatten(), advantage.gather(1, chosen).flatten().double())
            chosen = ids[(cosine[:, ids] - tau * shift[ids]).topk(k, dim=1).indices]
            corrected += torch.bincount(chosen.flatten(), minlength=T)
        numbers = torch.arange(start, start + len(cosine)).expand(T, -1)
        best, order = torch.cat([best, cosine.T], dim=1).topk(best.shape[1], dim=1)
        best_images = torch.cat([best_images, numbers], dim=1).gather(1, order)
    gap = (gap / usage).float()
    wrong = [("ungrounded", usage < rule.n_min), ("hub", corrected > limit * N), ("generic", ~(gap >= rule.margin))]
    reasons = [next((name for name, of in wrong if of[j]), "") for j in range(T)]
    found = {"usage": usage, "corrected": corrected, "gap": gap, "limit": limit, "best_images": best_images}
    return Grounding(**found, reasons=reasons)


@torch.no_grad()
def bank_statistics(images: torch.Tensor, texts: torch.Tensor, kept: torch.Tensor, tau: float, block: int = 1024):
    """Tell how the kept texts serve the images, by plain cosine as in training.

    Args:
        images: [N, D]; texts: [T, D], unit rows; kept: [T] bool; tau: temperature of the softmax.
    Returns:
        coverage: share of images whose nearest text of all is kept; usage_entropy: entropy of the kept
        texts' shares as nearest text, over log of their number; teacher_entropy: mean entropy of
        softmax(V U^T / tau) over the kept texts, over the same: near 0 is a hard label, near 1 says nothing.
    """
    covered, entropy, count = 0, 0.0, int(kept.sum())
    nearest = torch.zeros(count, dtype=torch.float64)
    for part in images.split(block):
        cosine = part @ texts.T
        covered += int(kept[cosine.argmax(dim=1)].sum())
        logits = cosine[:, kept] / tau
        nearest += torch.bincount(logits.argmax(dim=1), minlength=count)
        entropy += torch.special.entr(logits.double().softmax(dim=1)).sum().item()
    usage, scale = torch.special.entr(nearest / nearest.sum()).sum().item(), math.log(max(count, 2))
    return {
        "coverage": covered / len(images),
        "usage_entropy": usage / scale,
        "teacher_entropy": entropy / len(images) / scale,
    }


@torch.no_grad()
def near_duplicates(texts: torch.Tensor, lengths: list[int], threshold: float, block: int = 512) -> dict[int, int]:
    """De-duplicate greedily in the text space, shorter texts first.

    Args:
        texts: [T, D] float32 unit rows; lengths: characters of each; threshold: cosine above which the later text goes.
    Returns:
        {index of a removed text: index of the kept text it is nearest to}.
    """
    order = sorted(range(len(texts)), key=lambda i: (lengths[i], i))
    texts, kept, removed = texts[order], torch.zeros(len(order), dtype=torch.bool), {}
    for start in range(0, len(order), block):
        cosine = texts[start : start + block] @ texts[: start + block].T
        for place, row in enumerate(cosine, start):
            value, nearest = row.where(kept[: len(row)], -2).max(dim=0)
            if value > threshold:
                removed[order[place]] = order[nearest]
            else:
                kept[place] = True
    return removed
