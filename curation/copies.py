"""Copies of one picture within the pool, and copies of benchmark pictures.

Perceptual hashes and embeddings only propose pairs: CLIP puts another car of the same model as near as a crop of the
photo. Only the pixels tell, once the crop is undone. They are compared tile by tile, since another car before the same
wall agrees in most tiles.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from curation.filters import Removals
from curation.index import SIDE, Index
from curation.kmeans import Embedded, Rows, assign_block, kmeans, members_by_cluster, step_rng

PAIR = np.dtype([("first", np.int64), ("second", np.int64), ("value", np.float32)])  # alike images, and how alike
ALL_WITH_ALL = 20_000  # images that are compared with all others; beyond, with those of the nearest cells
CELL_IMAGES, NEAR_CELLS = 1000, 16  # images in a cell on average, and how many cells an image is compared with
NUMBERS_AT_A_TIME = 2**24  # cosines and hash distances held at a time
NEIGHBOURS = 8  # nearest embeddings that are candidates
CANDIDATE_COSINE = 0.65  # of the nearest embeddings, those at least so alike are laid over each other
FLOOR = 0.8  # agreement below which neither hash nor embedding is believed: plain backgrounds share hashes

COARSE = 16  # px for the first search
# (side, start) of the windows along one axis, fractions: at the start, in the middle and at the end
WINDOWS = [(1.0, 0.0)] + [(side, place * (1 - side)) for side in (0.95, 0.9) for place in (0.0, 0.5, 1.0)]
WORTH_TRYING = 0.3  # correlation without moving anything; two photos of cars have 0.2, crops 0.45 at least
WORTH_REFINING = 0.8  # correlation of the best window
STEPS = (0.025, 0.0125, 0.00625)  # of side and centre in the refinement, fractions of the side
TILE = 8  # px of a tile of the thumbnail
TEXTURE = 4.0  # deviation of grey values from which a tile has something to compare
BLOCK = 2048  # pairs at a time


def as_pairs(first, second, value=0) -> np.ndarray:
    """Arrays [P] -> [P] `PAIR`."""
    pairs = np.empty(len(first), PAIR)
    pairs["first"], pairs["second"], pairs["value"] = first, second, value
    return pairs


def unordered(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take pairs within one set once each, first < second, and tell [P] bool whether they hold in both directions."""
    low, high = np.minimum(pairs["first"], pairs["second"]), np.maximum(pairs["first"], pairs["second"])
    _, place, counts = np.unique(low * (high.max(initial=0) + 1) + high, return_index=True, return_counts=True)
    return as_pairs(low, high, pairs["value"])[place], counts == 2


def neighbourhoods(data: np.ndarray, queries: np.ndarray, base: np.ndarray, device: torch.device) -> Iterator[tuple]:
    """Yield (places in `queries`, places in `base`) to compare: all with all, or, of a large base, each cell of k-means
    with the cells around it.

    Args:
        data: [N, D] embeddings; queries, base: int64 rows of it.
    """
    if len(base) <= ALL_WITH_ALL:
        yield np.arange(len(queries)), np.arange(len(base))
        return
    rows, rng, k = Rows(data, device, base, unit=True), step_rng(0, 5000), len(base) // CELL_IMAGES
    some = np.sort(rng.choice(len(base), min(len(base), 100 * k), replace=False))
    centres = kmeans(rows.subset(some), k, iterations=5, rng=rng).centroids
    around = (centres @ centres.t()).topk(min(NEAR_CELLS, k), dim=1).indices.tolist()

    def cells_of(rows: Rows) -> list[np.ndarray]:
        nearest = np.concatenate([assign_block(x, centres, unit=True)[0].cpu().numpy() for _, x in rows.chunks()])
        places, offsets = members_by_cluster(nearest, k)
        return np.split(places, offsets[1:-1])

    theirs, ours = cells_of(rows), cells_of(Rows(data, device, queries, True))
    for cell, places in enumerate(ours):
        yield places, np.concatenate([theirs[near] for near in around[cell]])


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Mean 0 and length 1 along the last axis: products are correlations. A plain picture becomes zeros."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-3)


def _tiles_agree(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[p] the lower quartile of the correlations of the tiles of [p, 32, 32] that have texture in x or y."""
    x, y = (imgs.unfold(1, TILE, TILE).unfold(2, TILE, TILE).flatten(3).flatten(1, 2) for imgs in (x, y))
    alike = (_unit(x) * _unit(y)).sum(dim=-1)
    alike[torch.maximum(x.std(dim=-1), y.std(dim=-1)) < TEXTURE] = torch.nan
    return alike.nanquantile(0.25, dim=1).nan_to_num(0.0)


class Aligner:
    """Lays two thumbnails over each other: are they one photo, but for a crop, a mirror, light or compression?

    thumbnails: [N, 32, 32] uint8 grey, may be a memory map."""

    def __init__(self, thumbnails: np.ndarray, device: torch.device):
        self.thumbnails, self.device = thumbnails, device
        self.windows = torch.tensor(WINDOWS, device=device)
        self.moves = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=2)), device=device)  # side and centre
        edges, (side, start) = np.arange(SIDE), np.array(WINDOWS).T[:, :, None]
        low = (start + side * np.arange(COARSE) / COARSE)[:, :, None] * SIDE
        covered = (np.minimum(low + side[:, :, None] * SIDE / COARSE, edges + 1) - np.maximum(low, edges)).clip(0)
        # [windows, COARSE, SIDE]: each window of a line of SIDE px, averaged to COARSE px
        self.resampling = torch.from_numpy(covered / covered.sum(axis=2, keepdims=True)).float().to(device)
        self.line = (torch.arange(SIDE, device=device) + 0.5) / SIDE - 0.5

    def agreement(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """How well the pictures of each pair [P] agree once one of them is cut and mirrored to fit the other: the
        correlation that three quarters of the tiles with texture reach, [P] float32; 0 where they do not nearly fit."""
        found = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(first), BLOCK):
            pair = (self.thumbnails[rows[start : start + BLOCK]] for rows in (first, second))
            found.append(self._block(*(torch.from_numpy(x).to(self.device).float() for x in pair)).cpu().numpy())
        return np.concatenate(found)

    def _block(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
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
        """Find ([p] correlation, [p] int64 which of the windows (y, x) it is), at COARSE px."""
        columns = torch.einsum("pij,xwj->pxiw", cut, self.resampling)
        views = torch.einsum("yhi,pxiw->pyxhw", self.resampling, columns).flatten(3).flatten(1, 2)
        target = _unit(F.avg_pool2d(whole, SIDE // COARSE).flatten(1))
        return torch.einsum("pvd,pd->pv", _unit(views), target).max(dim=1)

    def _refine(self, cut: torch.Tensor, whole: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """Move the edges of the window in ever smaller steps to fit better -> [p, 32, 32]."""
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
        """Cut [p, m, 1024] windows of [p, 32, 32]; place: [p, m, 4] side and centre in x, then in y."""
        p, m = place.shape[:2]
        x, y = ((place[..., i : i + 1] * self.line + place[..., i + 1 : i + 2]) * 2 - 1 for i in (0, 2))
        grid = torch.stack([x[:, :, None].expand(-1, -1, SIDE, -1), y[:, :, :, None].expand(-1, -1, -1, SIDE)], dim=-1)
        grid = grid.reshape(p, m * SIDE, SIDE, 2)
        views = F.grid_sample(imgs[:, None], grid, padding_mode="border", align_corners=False)
        return views.reshape(p, m, SIDE * SIDE)


@dataclass(frozen=True)
class CopyFinder:
    """Finds near copies: the agreement of their pixels is at least `agreement`; or it is at least 0.8 and their hashes
    differ in at most `bits`, or their embeddings have at least `cosine` and are among each other's nearest."""

    index: Index
    embedded: Embedded
    aligner: Aligner
    bits: int
    cosine: float
    agreement: float

    def candidates(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find pairs of places in two lists of index rows that may be copies: hashes that differ in at most `bits`
        bits; and of the eight nearest embeddings of each of `first` those alike enough (value: the cosine)."""
        data, device = self.embedded.data, self.aligner.device
        places, hashes = (self.embedded.place(first), self.embedded.place(second)), self.index.phash
        hashed, alike = [as_pairs([], [])], [as_pairs([], [])]

        def unit(rows: np.ndarray) -> torch.Tensor:
            return F.normalize(torch.from_numpy(data[rows]).to(device).float(), dim=1)

        for queries, base in neighbourhoods(data, *places, device):
            step, y = max(1, NUMBERS_AT_A_TIME // max(len(base), 1)), unit(places[1][base])
            for mine in np.split(queries, range(step, len(queries), step)) if len(base) else ():
                same = first[mine, None] == second[base]
                near = np.bitwise_count(hashes[first[mine], None] ^ hashes[second[base]]) <= self.bits
                row, column = np.nonzero(near & ~same)
                hashed.append(as_pairs(mine[row], base[column]))
                similar = unit(places[0][mine]) @ y.t()
                similar[torch.from_numpy(same).to(device)] = -2
                value, place = similar.topk(min(NEIGHBOURS, len(base)), dim=1)
                row, rank = (value >= min(CANDIDATE_COSINE, self.cosine)).nonzero(as_tuple=True)
                column, value, row = (x.cpu().numpy() for x in (place[row, rank], value[row, rank], row))
                alike.append(as_pairs(mine[row], base[column], value))
        return np.concatenate(hashed), np.concatenate(alike)

    def near_pairs(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Find near copies between two lists of index rows (or within one, given twice); value: their agreement."""
        hashed, alike = self.candidates(first, second)
        both_ways = np.ones(len(alike), dtype=bool)
        if first is second:
            (hashed, _), (alike, both_ways) = unordered(hashed), unordered(alike)
        near = (alike["value"] >= self.cosine) & both_ways
        for pairs in (hashed, alike):
            pairs["value"] = self.aligner.agreement(first[pairs["first"]], second[pairs["second"]])
        near = (alike["value"] >= self.agreement) | (near & (alike["value"] >= FLOOR))
        return np.concatenate([hashed[hashed["value"] >= FLOOR], alike[near]])

    def leaks(self, alive: np.ndarray, benchmark_of: Callable[[int], str | None]) -> Removals:
        """Remove pool rows ([n] int64) that are a picture of an excluded source, by bytes, pixels or nearly; and rows
        whose path says that they are a test image of a known benchmark (`benchmark_of`: row -> which, if any)."""
        index, out = self.index, Removals(len(self.index))
        for row in alive.tolist():
            if name := benchmark_of(row):
                out.add(f"{name}: in a folder of its test images", np.array([row]))
        excluded = np.flatnonzero(index.excluded & index.readable)
        both = np.concatenate([excluded, alive])  # so that the first of equal ones is an excluded one

        def add(reason: str, rows: np.ndarray, of: np.ndarray, value: np.ndarray) -> None:
            for number in np.unique(index.source[of]):
                mine = index.source[of] == number
                out.add(f"{index.sources[number]}: {reason}", rows[mine], of[mine], value[mine])

        for reason, keys in (("same file", index.file_hash), ("same pixels", index.pixel_hash)):
            of = both[_first_of_each(keys[both])][len(excluded) :]
            hit = index.excluded[of]
            add(reason, alive[hit], of[hit], np.ones(hit.sum()))
        rest = out.left_of(alive)
        pairs = _best_of_each(self.near_pairs(rest, excluded))
        add("near (agreement)", rest[pairs["first"]], excluded[pairs["second"]], pairs["value"])
        return out

    def duplicates(self, alive: np.ndarray, leaked: np.ndarray, group_cap: int, track_cap: int) -> Removals:
        """Remove copies within the pool: the largest picture stays, and those that are no direct copies of one that
        stays; of each (identity, camera) at most `track_cap` stay.

        Args:
            alive, leaked: int64 pool rows, ascending. Near copies of a leaked picture go with it, beyond any cap.
            group_cap: images that one picture may stand for.
        """
        index, out = self.index, Removals(len(self.index))
        keys = np.concatenate([index.file_hash, index.box.astype(np.uint64)], axis=1)
        for reason, values in (("same file", keys), ("same pixels", index.pixel_hash)):
            rest = out.left_of(alive)
            first = rest[_first_of_each(values[rest])]
            out.add(reason, rest[first != rest], first[first != rest], 1.0)
        rest = np.sort(np.concatenate([out.left_of(alive), leaked]))
        pairs = self.near_pairs(rest, rest)
        is_leaked = np.isin(rest, leaked)
        hits = both_directions(pairs)
        hits = _best_of_each(hits[~is_leaked[hits["first"]] & is_leaked[hits["second"]]])
        out.add("copy of a leaked picture (agreement)", rest[hits["first"]], rest[hits["second"]], hits["value"])
        inside = ~is_leaked
        inside[hits["first"]] = False
        largest_first = np.lexsort((rest, -index.width[rest].astype(np.int64) * index.height[rest]))
        of, likeness = choose_keepers(largest_first, pairs[inside[pairs["first"]] & inside[pairs["second"]]], group_cap)
        gone = of != np.arange(len(rest))
        out.add("near copy (agreement)", rest[gone], rest[of[gone]], likeness[gone])
        surplus = beyond_tracks(index, out.left_of(alive), track_cap)
        out.add("beyond the cap of its identity and camera (images)", surplus, value=track_cap)
        return out


def _first_of_each(keys: np.ndarray) -> np.ndarray:
    """[n, m] -> [n] int64, the first row that equals each row."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _best_of_each(pairs: np.ndarray) -> np.ndarray:
    """The pair of the largest value of each `first`."""
    pairs = pairs[np.lexsort((-pairs["value"], pairs["first"]))]
    return pairs[np.unique(pairs["first"], return_index=True)[1]]


def both_directions(pairs: np.ndarray) -> np.ndarray:
    return np.concatenate([pairs, as_pairs(pairs["second"], pairs["first"], pairs["value"])])


def choose_keepers(order: np.ndarray, pairs: np.ndarray, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose which images stay: whatever goes is itself alike to the one that stays for it, so that a chain of small
    steps (a surveillance track) does not end as one image.

    Args:
        order: [n] int64, images in order of preference: one stays unless an earlier one that stays stands for it.
        cap: images that one may stand for, itself counted, the most alike first.
    Returns:
        [n] int64, the image that stands for each (itself if it stays), and [n] float32, the value of that pair.
    """
    keeper, value, free = np.arange(len(order)), np.ones(len(order), np.float32), np.ones(len(order), dtype=bool)
    pairs = both_directions(pairs)
    pairs = pairs[np.lexsort((pairs["second"], -pairs["value"], pairs["first"]))]
    offsets = np.searchsorted(pairs["first"], np.arange(len(order) + 1))
    for image in order[np.diff(offsets)[order] > 0].tolist():
        if free[image]:
            free[image] = False
            near = pairs[offsets[image] : offsets[image + 1]]
            near = near[free[near["second"]]]
            near = near[np.unique(near["second"], return_index=True)[1]]  # a pair may have been found twice
            near = near[np.argsort(-near["value"], kind="stable")[: cap - 1]]
            keeper[near["second"]], value[near["second"]], free[near["second"]] = image, near["value"], False
    return keeper, value


def beyond_tracks(index: Index, rows: np.ndarray, cap: int) -> np.ndarray:
    """Return those of `rows` that go so that at most `cap` of each (identity, camera) stay, evenly spaced."""
    known = rows[(index.identity[rows] >= 0) & (index.camera[rows] >= 0)]
    tracks: dict[tuple, list[int]] = {}
    for row, *track in zip(known.tolist(), index.identity[known].tolist(), index.camera[known].tolist()):
        tracks.setdefault(tuple(track), []).append(row)
    gone = [rows[:0]]
    for frames in tracks.values():
        kept = min(len(frames), cap)
        gone.append(np.delete(frames, -(-np.arange(kept) * len(frames) // kept)))  # each begins an equal stretch
    return np.sort(np.concatenate(gone))
