"""Are two pictures one photo, but for a crop, a mirror, light or compression? Thumbnails, laid over each
other.

Global descriptors cannot tell: cropping a few percent moves a quarter of the bits of a perceptual hash, and
to CLIP another car of the model is as near as the crop. Pixels that coincide once a crop is undone can.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from curation.measure import SIDE

COARSE = 16  # px for the first search
SCALES = (1.0, 0.95, 0.9)  # of a window's side, in each direction, at the start, middle and end
WORTH_TRYING = 0.3  # correlation without moving anything; two photos of cars have 0.2, crops 0.45 at least
WORTH_REFINING = 0.8  # correlation of the best window
STEPS = (0.025, 0.0125, 0.00625)  # of scale and centre in the refinement, fractions of the side
BLOCK = 2048  # pairs at a time


def _windows() -> list[tuple[float, float]]:
    """(side, start) of the windows along one axis, fractions."""
    return [(s, place * (1 - s)) for s in SCALES for place in ((0.0,) if s == 1 else (0.0, 0.5, 1.0))]


def _resampling() -> torch.Tensor:
    """[windows, COARSE, SIDE] float32: each window of a line of SIDE px, averaged to COARSE px."""
    edges = np.arange(SIDE)
    matrices = []
    for side, start in _windows():
        low = (start + side * np.arange(COARSE) / COARSE)[:, None] * SIDE
        high = low + side * SIDE / COARSE
        covered = np.minimum(high, edges + 1) - np.maximum(low, edges)
        covered = covered.clip(0)
        matrices.append(covered / covered.sum(axis=1, keepdims=True))
    return torch.from_numpy(np.stack(matrices)).float()


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Mean 0 and length 1 along the last axis: products are correlations. A plain picture becomes zeros."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-3)


class Aligner:
    """thumbnails: [N, 32, 32] uint8 grey, may be a memory map."""

    def __init__(self, thumbnails: np.ndarray, device: torch.device):
        self.thumbnails, self.device = thumbnails, device
        self.windows = torch.tensor(_windows(), device=device)
        self.resampling = _resampling().to(device)
        moves = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=4)), device=device)
        self.moves = moves  # [81, 4] of scale and centre, x and y
        self.line = (torch.arange(SIDE, device=device) + 0.5) / SIDE - 0.5

    def correlate(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Correlation of the pixels of each pair, once the better of the two is cut and mirrored to fit.

        Args:
            first, second: [P] int64 rows of the thumbnails.
        Returns:
            [P] float32, -1 to 1. Pairs that do not begin to fit keep a rough, lower value.
        """
        result = np.empty(len(first), dtype=np.float32)
        for start in range(0, len(first), BLOCK):
            part = slice(start, start + BLOCK)
            result[part] = self._block(first[part], second[part]).cpu().numpy()
        return result

    def _load(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.thumbnails[rows])).to(self.device).float()

    def _block(self, first: np.ndarray, second: np.ndarray) -> torch.Tensor:
        a, b = self._load(first), self._load(second)
        best = torch.full((len(a),), -1.0, device=self.device)
        for mirrored in (False, True):
            x = a.flip(-1) if mirrored else a
            for whole, cut in ((b, x), (x, b)):
                best = torch.maximum(best, self._fit(cut, whole))
        return best

    def _fit(self, cut: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """[p] the best correlation of a window of `cut` with all of `whole`, both [p, 32, 32]."""
        best = (_unit(cut.flatten(1)) * _unit(whole.flatten(1))).sum(dim=1)
        tried = (best >= WORTH_TRYING).nonzero()[:, 0]
        if not len(tried):
            return best
        score, window = self._coarse(cut[tried], whole[tried])
        best[tried] = torch.maximum(best[tried], score)
        good = score >= WORTH_REFINING
        if good.any():
            tried, window = tried[good], window[good]
            best[tried] = torch.maximum(best[tried], self._refine(cut[tried], whole[tried], window))
        return best

    def _coarse(self, cut: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([p] correlation, [p] int64 which of the windows (y, x) it is), at COARSE px."""
        r = self.resampling
        columns = torch.einsum("pij,xwj->pxiw", cut, r)
        views = torch.einsum("yhi,pxiw->pyxhw", r, columns).flatten(3).flatten(1, 2)
        target = _unit(F.avg_pool2d(whole, SIDE // COARSE).flatten(1))
        return torch.einsum("pvd,pd->pv", _unit(views), target).max(dim=1)

    def _refine(self, cut: torch.Tensor, whole: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """[p] the correlation after moving the edges of the window in ever smaller steps."""
        y, x = self.windows[window // len(self.windows)], self.windows[window % len(self.windows)]
        place = torch.stack([x[:, 0], x[:, 1] + x[:, 0] / 2, y[:, 0], y[:, 1] + y[:, 0] / 2], dim=1)
        best = torch.full((len(cut),), -1.0, device=self.device)
        target = _unit(whole.flatten(1))
        for step in STEPS:
            for start in range(0, len(cut), BLOCK // 8):
                part = slice(start, start + BLOCK // 8)
                tried = place[part, None] + self.moves * step
                score = torch.einsum("pmd,pd->pm", _unit(self._cut(cut[part], tried)), target[part])
                value, move = score.max(dim=1)
                place[part] = tried[torch.arange(len(move), device=self.device), move]
                best[part] = torch.maximum(best[part], value)
        return best

    def _cut(self, imgs: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[p, m, 1024] windows of [p, 32, 32]; place: [p, m, 4] side and centre in x, then in y."""
        p, m = place.shape[:2]
        x = (place[..., 0:1] * self.line + place[..., 1:2]) * 2 - 1
        y = (place[..., 2:3] * self.line + place[..., 3:4]) * 2 - 1
        grid = torch.stack(
            [x[:, :, None].expand(-1, -1, SIDE, -1), y[:, :, :, None].expand(-1, -1, -1, SIDE)], dim=-1
        )
        views = F.grid_sample(
            imgs[:, None], grid.reshape(p, m * SIDE, SIDE, 2), padding_mode="border", align_corners=False
        )
        return views.reshape(p, m, SIDE * SIDE)
