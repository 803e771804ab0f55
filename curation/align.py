"""Are two pictures one photo, but for a crop, a mirror, light or compression? Thumbnails, laid over each
other.

Global descriptors cannot tell: cropping a few percent moves a quarter of the bits of a perceptual hash, and
to CLIP another car of the model is as near as the crop. Pixels that coincide once a crop is undone can; they
are compared tile by tile, for another car before the same wall has most of its pixels in common.
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
STEPS = (0.025, 0.0125, 0.00625)  # of side and centre in the refinement, fractions of the side
TILE = 8  # px of a tile of the thumbnail
TEXTURE = 4.0  # deviation of grey values from which a tile has something to compare
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


def _tiles_agree(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[p] the lower quartile of the correlations of the tiles of [p, 32, 32] that have texture in x or y."""

    def tiles(imgs):
        n = SIDE // TILE
        return imgs.reshape(-1, n, TILE, n, TILE).transpose(2, 3).reshape(len(imgs), n * n, TILE * TILE)

    x, y = tiles(x), tiles(y)
    alike = (_unit(x) * _unit(y)).sum(dim=-1)
    alike[torch.maximum(x.std(dim=-1), y.std(dim=-1)) < TEXTURE] = torch.nan
    return alike.nanquantile(0.25, dim=1).nan_to_num(0.0)


class Aligner:
    """thumbnails: [N, 32, 32] uint8 grey, may be a memory map."""

    def __init__(self, thumbnails: np.ndarray, device: torch.device):
        self.thumbnails, self.device = thumbnails, device
        self.windows = torch.tensor(_windows(), device=device)
        self.resampling = _resampling().to(device)
        moves = list(itertools.product((-1.0, 0.0, 1.0), repeat=2))
        self.moves = torch.tensor(moves, device=device)  # [9, 2] of side and centre
        self.line = (torch.arange(SIDE, device=device) + 0.5) / SIDE - 0.5

    def agreement(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """How well the pictures of each pair agree once one of them is cut and mirrored to fit the other:
        the correlation that three quarters of the tiles with texture reach at least.

        Args:
            first, second: [P] int64 rows of the thumbnails.
        Returns:
            [P] float32, 0 to 1; 0 where they do not even roughly fit.
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
        ways = [(a, b), (b, a), (a.flip(-1), b), (b, a.flip(-1))]  # which is cut, and which is whole
        score = torch.zeros(len(ways), len(a), device=self.device)
        window = torch.zeros(len(ways), len(a), dtype=torch.long, device=self.device)
        for way, (cut, whole) in enumerate(ways):
            plain = (_unit(cut.flatten(1)) * _unit(whole.flatten(1))).sum(dim=1)
            tried = (plain >= WORTH_TRYING).nonzero()[:, 0]
            if len(tried):
                score[way, tried], window[way, tried] = self._coarse(cut[tried], whole[tried])
        best, way = score.max(dim=0)
        result = torch.zeros(len(a), device=self.device)
        for number, (cut, whole) in enumerate(ways):
            good = ((way == number) & (best >= WORTH_REFINING)).nonzero()[:, 0]
            for some in good.split(BLOCK // 8) if len(good) else ():
                view = self._refine(cut[some], whole[some], window[number, some])
                result[some] = _tiles_agree(view, whole[some]).clamp_min(0)
        return result

    def _coarse(self, cut: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([p] correlation, [p] int64 which of the windows (y, x) it is), at COARSE px."""
        r = self.resampling
        columns = torch.einsum("pij,xwj->pxiw", cut, r)
        views = torch.einsum("yhi,pxiw->pyxhw", r, columns).flatten(3).flatten(1, 2)
        target = _unit(F.avg_pool2d(whole, SIDE // COARSE).flatten(1))
        return torch.einsum("pvd,pd->pv", _unit(views), target).max(dim=1)

    def _refine(self, cut: torch.Tensor, whole: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """[p, 32, 32] the window after its edges were moved in ever smaller steps to fit better."""
        y, x = self.windows[window // len(self.windows)], self.windows[window % len(self.windows)]
        place = torch.stack([x[:, 0], x[:, 1] + x[:, 0] / 2, y[:, 0], y[:, 1] + y[:, 0] / 2], dim=1)
        target = _unit(whole.flatten(1))
        for step in STEPS:
            for axis in (0, 2):  # x, then y
                tried = place[:, None].repeat(1, len(self.moves), 1)
                tried[..., axis : axis + 2] += self.moves * step
                score = torch.einsum("pmd,pd->pm", _unit(self._cut(cut, tried)), target)
                place = tried[torch.arange(len(tried), device=self.device), score.argmax(dim=1)]
        return self._cut(cut, place[:, None]).view_as(whole)

    def _cut(self, imgs: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[p, m, 1024] windows of [p, 32, 32]; place: [p, m, 4] side and centre in x, then in y."""
        p, m = place.shape[:2]
        x = (place[..., 0:1] * self.line + place[..., 1:2]) * 2 - 1
        y = (place[..., 2:3] * self.line + place[..., 3:4]) * 2 - 1
        grid = torch.stack([x[:, :, None].expand(-1, -1, SIDE, -1), y[:, :, :, None].expand(-1, -1, -1, SIDE)], dim=-1)
        views = F.grid_sample(
            imgs[:, None], grid.reshape(p, m * SIDE, SIDE, 2), padding_mode="border", align_corners=False
        )
        return views.reshape(p, m, SIDE * SIDE)
