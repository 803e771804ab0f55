"""The page of a re-identification test: what was found first, how far off it was, what was looked at."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

from datasets.images import open_rgb
from datasets.reid import ReidImages
from datasets.transforms import whole_image
from metrics.reid import BINS, Card, FeatureSet, Protocol, Ranking, scores
from models_transreid import TransReID
from reports.page import BREAK, MARKS, THUMB, Html, Page, Pictures, card, image, join, mark, tag
from reports.panels import heat_picture, reid_rollout

CMC_RANKS = 50
SECTIONS = {
    "worst": ("Worst queries", "Those of the lowest average precision (AP)."),
    "best": ("Best queries", "Those of the highest AP, among equals those with most matches; different "
             "vehicles as far as there are any."),
    "random": ("Random queries", "Drawn from all scored queries, seed {seed}."),
}  # fmt: skip


@dataclass(frozen=True)
class ReidTest:
    """What was scored: metrics are those of `evaluate`; where the protocol draws galleries, query and gallery are one
    of the draws. Features: [Q, D], [G, D] float, in the order of the images. pid_names: of all pids."""

    protocol: Protocol
    metrics: dict[str, float]
    query: ReidImages
    query_features: torch.Tensor
    gallery: ReidImages
    gallery_features: torch.Tensor
    pid_names: list[str]


def write_reid_report(
    file: Path,
    facts: dict[str, object],
    test: ReidTest,
    model: TransReID | None = None,
    shown: int = 12,
    topk: int = 10,
    seed: int = 0,
) -> None:
    """Write the page; it takes the time of two more `evaluate`.

    Args:
        model: draws roll-outs of the queries shown, and cosines are computed on its device (None: neither).
        shown: queries a section. topk: counted gallery images a list. seed: of the random draw.
    Raises:
        ValueError: features that do not fit the images or are not finite; a protocol with re-ranking.
    """
    for images, x in ((test.query, test.query_features), (test.gallery, test.gallery_features)):
        if len(images) != len(x) or not torch.isfinite(x).all():
            raise ValueError(f"{len(images)} images, {len(x)} features, which must all be finite")
    if test.protocol.rerank:
        raise ValueError(f"the page shows lists by cosine, and {test.protocol.name} ranks otherwise")
    device = torch.device("cpu") if model is None else model.base.pos_embed.device
    query = FeatureSet(test.query_features, test.query.pids, test.query.camids)
    gallery = FeatureSet(test.gallery_features, test.gallery.pids, test.gallery.camids)
    ranking = Ranking(test.protocol, query, gallery, shown, seed, device)
    lists = Lists(ranking, test, topk, model)
    drawn = {row: lists.one(row) for row in ranking.similar}
    page = Page(f"Re-identification: {test.protocol.name}", test.protocol.line(), tiles(test.metrics), facts)
    page.section("Ranking", summary(ranking))
    draw_curves(page, ranking)
    page.note(legend(test.protocol, topk, model is not None, len(lists.pictures.lost)))
    for name, (title, words) in SECTIONS.items():
        page.section(title, words.format(seed=seed))
        page.rank_lists([drawn[row] for row in ranking.chosen[name].tolist()])
    page.write(file)


class Lists:
    """Ranked lists as HTML."""

    def __init__(self, ranking: Ranking, test: ReidTest, topk: int, model: TransReID | None):
        self.ranking, self.test, self.topk, self.model = ranking, test, topk, model
        self.pictures = Pictures()

    def one(self, row: int) -> tuple[str, str, list[Html], list[Html]]:
        """Who the query is, its numbers, the query with its roll-out, and what was found."""
        ranking, who = self.ranking, ", ".join(self.who(self.test.query, row))
        hits = ranking.ranks.hits[slice(*ranking.ranks.offsets[row : row + 2])]
        where = f"1 match, at rank {hits[0]:,}"
        if len(hits) > 1:
            where = f"{len(hits):,} matches, at ranks {hits[0]:,} to {hits[-1]:,}"
        own = [card(self.picture(self.test.query, row, f"query, {who}"), tag("b", "query")), *self.rollout(row)]
        found = [self.found(hit) for hit in ranking.cards(row, self.topk)]
        return who, f"AP {100 * ranking.ap[row]:.1f} %, {where}", own, found

    def rollout(self, row: int) -> list[Html]:
        """The query under its roll-out, if there is a model and the file can be opened."""
        query = self.test.query
        if self.model is None or query.paths[row] in self.pictures.lost:
            return []
        picture = open_rgb(query.paths[row])
        ids = (torch.from_numpy(x[[row]]) for x in (query.camids, query.viewids))
        heat = reid_rollout(self.model, whole_image(picture, self.model.base.img_size)[None], *ids)[0]
        drawn = heat_picture(ImageOps.contain(picture, (THUMB, THUMB)), heat)
        return [card(image(drawn, "roll-out of the query"), tag("b", "roll-out"))]

    def found(self, hit: Card) -> Html:
        rank = f"rank {hit.rank:,}" if hit.rank else "not counted"
        who = self.who(self.test.gallery, hit.row)
        picture = self.picture(self.test.gallery, hit.row, ", ".join([MARKS[hit.mark], rank, *who]))
        words = join(BREAK, [mark(hit.mark), rank, f"cos {hit.cosine:.3f}", *who])
        return card(picture, words, kind=hit.mark + " later" * (hit.rank > self.topk))

    def who(self, images: ReidImages, row: int) -> list[str]:
        pid, camid = int(images.pids[row]), int(images.camids[row])
        return [
            f"pid {self.test.pid_names[pid] if pid >= 0 else 'unknown'}",
            *([f"camid {camid}"] if camid >= 0 else []),
        ]

    def picture(self, images: ReidImages, row: int, alt: str) -> Html:
        return self.pictures.one(images.paths[row], images.paths.relative(row), alt)


def tiles(metrics: dict[str, float]) -> dict[str, str]:
    """The numbers as text; those of [0, 1] in %, a standard deviation beside its mean."""
    found = {}
    for name, value in metrics.items():
        if name.endswith("_std") and name[:-4] in metrics:
            continue
        is_share = re.match(r"(mAP|mINP|R\d+)", name) is not None
        text = f"{100 * value:.2f} %" if is_share else f"{value:,.6g}"
        if is_share and f"{name}_std" in metrics:
            text += f" ± {100 * metrics[f'{name}_std']:.2f}"
        found[name.replace("_", " ")] = "none" if math.isnan(value) else text
    return found


def summary(ranking: Ranking) -> str:
    """What the lists and curves are of."""
    ap = ranking.ap[~np.isnan(ranking.ap)]
    text = f"{len(ranking.query.pids):,} queries against {len(ranking.gallery.pids):,} gallery images"
    text += f": mAP {100 * ap.mean():.2f} %." if len(ap) else ". No query has a match: there is nothing to draw."
    if len(ap) < len(ranking.ap):
        text += f" {len(ranking.ap) - len(ap):,} queries have no match; they are not scored and not shown."
    if ranking.protocol.draws:
        text += f" This is one draw of the gallery; the numbers above are means of {ranking.protocol.draws}."
    return text


def draw_curves(page: Page, ranking: Ranking) -> None:
    """CMC, AP and cosines."""
    ap = ranking.ap[~np.isnan(ranking.ap)]
    if not len(ap):
        return
    last = min(CMC_RANKS, len(ranking.gallery.pids))
    found = scores(ranking.ranks, tuple(range(1, last + 1)))
    cmc = [found[f"R{k}"] for k in range(1, last + 1)]
    page.first_k("CMC", cmc, "queries", "Queries with a match in the first k.")
    caption = f"Median {100 * np.median(ap):.1f} %; {(ap < 0.1).sum():,} of {len(ap):,} queries are below 10 %."
    page.histogram("AP of the queries", ap, "AP", "queries", caption)
    if ranking.others.any():
        draw_cosines(page, ranking)


def draw_cosines(page: Page, ranking: Ranking) -> None:
    """Both histograms over the range that holds all but a two-thousandth at either end of each."""
    pairs = {"same vehicle": ranking.true, "different vehicles": ranking.others}
    above = [np.append(np.cumsum(x[::-1])[::-1], 0) / x.sum() for x in pairs.values()]  # share from a bin on
    inside = np.flatnonzero(np.any([(x > 5e-4) & (x <= 1 - 5e-4) for x in above], axis=0))
    low, high = (inside[0] - 1, inside[-1] + 1) if inside.size else (0, BINS)
    width = math.ceil((high - low) / min(50, max(10, math.isqrt(int(ranking.true.sum())))))
    edges, centres = np.arange(low, high + width, width) * 2 / BINS - 1, (np.arange(BINS) + 0.5) * 2 / BINS - 1
    cut = int(np.argmax(above[1] <= 1e-3))
    caption = (
        f"{ranking.true.sum():,} pairs of one vehicle, {ranking.others.sum():,} of different ones. "
        f"A cosine of {2 * cut / BINS - 1:.3f} is reached by at most 1 in 1,000 of the different ones and by "
        f"{100 * above[0][cut]:.1f} % of the same."
    )
    parts = {name: (centres, x) for name, x in pairs.items()}
    page.shares("Cosine of query and gallery", edges, parts, ("cosine", "pairs"), caption)


def legend(protocol: Protocol, topk: int, with_rollouts: bool, lost: int) -> Html:
    parts = [
        "Beside each query its gallery images, from the highest cosine on, with their counted ranks. ",
        mark("right"), ", solid green frame: the same vehicle. ", mark("wrong"), ", dashed red: another. ",
    ]  # fmt: skip
    if protocol.remove_same_camera:
        parts += [
            mark("junk"),
            ", dotted grey frame: the same vehicle seen by the query's own camera, which the protocol does not "
            f"count; it stands where it would be; at most {topk} a list are shown. ",
        ]
    parts.append(f"Behind the dots stands the first right one, if it comes after rank {topk}. ")
    if with_rollouts:
        parts.append(
            "Roll-out of attention (Abnar and Zuidema, 2020): from the patch that reaches the class token "
            "least (black) to the one that does most (light yellow), each picture for itself. "
        )
    if lost:
        parts.append(tag("b", f"{lost:,} of the pictures cannot be opened.", kind="wrong"))
    return join("", parts)
