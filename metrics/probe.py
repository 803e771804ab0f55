"""How good frozen features are: nearest neighbours, class means of a few images, a linear classifier. Shapes: train
[M, D] float, train_labels [M] int64, queries [Q, D] float, scores [Q, num_classes]."""

import numpy as np
import torch
import torch.nn.functional as F

L2_GRID = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)  # strongest first: each fit starts from the one before
HELD_OUT_ROWS = 20_000  # its sampling error is 0.35 points at most


def knn_predict(train, train_labels, queries, num_classes: int, k: int = 20, temperature: float = 0.07) -> torch.Tensor:
    """Votes of the k nearest by cosine, each with weight exp(cos / temperature) (Wu et al., 2018)."""
    train, queries = F.normalize(train.float(), dim=1), F.normalize(queries.float(), dim=1)
    votes = []
    for block in queries.split(1024):  # never the full Q x M matrix
        cosine, nearest = (block @ train.T).topk(min(k, len(train)), dim=1)
        weight = ((cosine - 1) / temperature).exp()
        vote = torch.zeros(len(block), num_classes, device=block.device)
        votes.append(vote.scatter_add_(1, train_labels[nearest], weight))
    return torch.cat(votes)


def linear_fit(features, labels, num_classes: int, l2: float, steps: int = 60, start=None) -> torch.Tensor:
    """Multinomial logistic regression, full batch, L-BFGS -> [D + 1, num_classes] float32, the last row is the bias.
    features: [M, D] float32, standardised; l2: weight of the mean squared weights; start: what another `l2` gave."""
    x = F.pad(features, (0, 1), value=1.0)
    weight = (
        torch.zeros(x.shape[1], num_classes, device=x.device) if start is None else start.clone()
    ).requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight, labels) + l2 * weight[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def linear_predict(train, train_labels, queries, num_classes: int) -> tuple[torch.Tensor, float]:
    """Linear probe -> (logits, its L2 weight of `L2_GRID`, chosen by five-fold cross-validation; folds beyond
    `HELD_OUT_ROWS` are left out). One fold of a small set would choose by chance."""
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0).clamp_min(1e-6)
    train, queries = (train - mean) / std, (queries - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    folds, right, seen = order.tensor_split(5), [0] * len(L2_GRID), 0
    for number, held in enumerate(folds):
        kept = torch.cat([*folds[:number], *folds[number + 1 :]])
        weight = None
        for i, l2 in enumerate(L2_GRID):
            weight = linear_fit(train[kept], train_labels[kept], num_classes, l2, steps=20, start=weight)
            guess = (F.pad(train[held], (0, 1), value=1.0) @ weight).argmax(dim=1)
            right[i] += (guess == train_labels[held]).sum().item()
        if (seen := seen + len(held)) >= HELD_OUT_ROWS:
            break
    best = L2_GRID[right.index(max(right))]
    return F.pad(queries, (0, 1), value=1.0) @ linear_fit(train, train_labels, num_classes, best), best


def draw_shots(labels: np.ndarray, shots: int, seed: int, draw: int) -> np.ndarray:
    """A few rows of each class, all of one that has fewer: [m] int64, ascending. A function of (seed, draw, labels);
    those of fewer shots are among those of more."""
    order = np.random.default_rng((seed, draw)).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(first, counts)
    return np.sort(by_class[place < shots])


def class_mean_predict(train, train_labels, queries, num_classes: int) -> torch.Tensor:
    """Cosines with the mean of each class's unit vectors, -inf for classes without an image (SimpleShot's L2N; Wang et
    al., 2019, arXiv 1911.04623)."""
    train, queries = F.normalize(train.float(), dim=1), F.normalize(queries.float(), dim=1)
    sums = torch.zeros(num_classes, train.shape[1], device=train.device).index_add_(0, train_labels, train)
    empty = torch.bincount(train_labels, minlength=num_classes) == 0
    return (queries @ F.normalize(sums, dim=1).T).masked_fill(empty, -torch.inf)


def topk_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Share of rows whose label is among the k highest scores, in [0, 1]."""
    k = min(k, scores.shape[1])
    return (scores.topk(k, dim=1).indices == labels[:, None]).any(dim=1).float().mean().item()
