"""The page of a re-identification test: what was found first, and how far off it was."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from datasets.reid import ReidImages
from metrics.reid import FeatureSet, Protocol, ShownQueries, scores
from reports.page import BREAK, MARKS, Html, Page, Pictures, cards, join, mark, percent, tag

CMC_RANKS, SHOWN, TOPK = 50, 12, 10  # queries a section, counted gallery images a list
SECTIONS = {
    "worst": ("Worst queries", "Those of the lowest average precision (AP)."),
    "random": ("Random queries", "Drawn from all scored queries."),
}
LEGEND = (
    "Beside each query its gallery images, from the highest cosine on, with their counted ranks. ",
    mark("right"), ", solid green frame: the same vehicle. ", mark("wrong"), ", dashed red: another. ",
    mark("junk"), ", dotted grey: left out by the protocol, as this vehicle under the query's own camera or the "
    "query's own file. Behind the dots stands the first right one, where it comes later.",
)  # fmt: skip


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
    pictures: Pictures = field(default_factory=Pictures)

    def who(self, images: ReidImages, row: int) -> list[str]:
        pid, camid = int(images.pids[row]), int(images.camids[row])
        return [f"pid {self.pid_names[pid] if pid >= 0 else 'unknown'}", *([f"camid {camid}"] if camid >= 0 else [])]

    def card(self, images: ReidImages, row: int, alt: str, *words: object, kind: str = "") -> Html:
        return self.pictures.card(images.paths[row], images.paths.relative(row), *words, kind=kind, alt=alt)


def write_reid_report(file: Path, facts: dict[str, object], test: ReidTest, device="cpu") -> None:
    """Write the page; it takes the time of two more `evaluate`. device: computes the cosines."""
    query = FeatureSet.of(test.query_features, test.query)
    gallery = FeatureSet.of(test.gallery_features, test.gallery)
    shown = ShownQueries(test.protocol, query, gallery, SHOWN, 0, device)
    articles = {row: article(shown, test, row) for row in shown.similar}
    page = Page(f"Re-identification: {test.protocol.name}", test.protocol.line(), tiles(test.metrics), facts)
    ap = shown.ap[~np.isnan(shown.ap)]
    page.section(
        "Ranking",
        f"{len(query.pids):,} queries against {len(gallery.pids):,} gallery images, "
        f"{len(shown.ap) - len(ap):,} of the queries without a match, which are not scored",
        f". This is one draw; the numbers above are means of {test.protocol.draws}." if test.protocol.draws else ".",
    )
    if len(ap):
        last = min(CMC_RANKS, len(gallery.pids))
        page.first_k("CMC", list(scores(shown.ranks, tuple(range(1, last + 1))).values())[1 : last + 1])
        low = f"AP: median {percent(np.median(ap))} %; {(ap < 0.1).sum():,} of {len(ap):,} queries are below 10 %."
        page.add(tag("p", low))
    lost = len(test.pictures.lost)
    page.add(tag("p", *LEGEND, tag("b", f" {lost} of the pictures cannot be opened.", kind="wrong") if lost else ""))
    for name, (title, words) in SECTIONS.items():
        page.section(title, words)
        page.add(*(articles[row] for row in shown.chosen[name].tolist()))
    page.write(file)


def article(shown: ShownQueries, test: ReidTest, row: int) -> Html:
    """Who the query is, its numbers, its picture, and beside it what was found."""
    who = ", ".join(test.who(test.query, row))
    hits = shown.ranks.hits[slice(*shown.ranks.offsets[row : row + 2])]
    words = f"AP {100 * shown.ap[row]:.1f} %, {len(hits):,} matches, at ranks {hits[0]:,} to {hits[-1]:,}"
    own = [test.card(test.query, row, f"query, {who}", tag("b", "query"))]
    found = [found_card(test, *hit) for hit in shown.cards(row, TOPK)]
    return tag("article", tag("h3", who, tag("span", words)), tag("div", cards(own, "own"), cards(found), kind="list"))


def found_card(test: ReidTest, row: int, rank: int, kind: str, cosine: float) -> Html:
    words, who = f"rank {rank:,}" if rank else "not counted", test.who(test.gallery, row)
    alt, below = ", ".join([MARKS[kind], words, *who]), join(BREAK, [mark(kind), words, f"cos {cosine:.3f}", *who])
    return test.card(test.gallery, row, alt, below, kind=kind + " later" * (rank > TOPK))


def tiles(metrics: dict[str, float]) -> dict[str, str]:
    """The numbers as text; those of [0, 1] in %, a standard deviation beside its mean."""
    found = {}
    for name, value in metrics.items():
        is_share = re.fullmatch(r"mAP|mINP|R\d+", name) is not None
        spread = f" ± {100 * metrics[f'{name}_std']:.2f}" if f"{name}_std" in metrics else ""
        if not name.endswith("_std"):
            found[name.replace("_", " ")] = f"{100 * value:.2f} %{spread}" if is_share else f"{value:,.6g}"
    return found
