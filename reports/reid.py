"""The page of a re-identification test: what was found first, and how far off it was."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.reid import ReidImages
from metrics.open_set import SPLITS, Answers, measured_far
from metrics.reid import FeatureSet, Protocol, ShownQueries, draw_gallery, scores
from reports.page import BREAK, MARKS, Html, Page, Pictures, cards, join, mark, new_axes, percent, tag

CMC_RANKS, SHOWN, TOPK = 50, 12, 10  # queries a section, counted gallery images a list
SECTIONS = {"worst": "Those of the lowest average precision (AP).", "random": "Drawn from all scored queries."}
LEGEND = (
    "Beside each query its gallery images, from the highest cosine on, with their counted ranks. ",
    mark("right"), ", solid green frame: the same vehicle. ", mark("wrong"), ", dashed red: another. ",
    mark("junk"), ", dotted grey: left out by the protocol, as this vehicle under the query's own camera or the "
    "query's own file. Behind the dots stands the first right one, where it comes later.",
)  # fmt: skip


class ReidFeatures(NamedTuple):
    """Images that could be read, [n, D] float32 of them on the CPU, and of the others `path<tab>reason`. quality: [n]
    weights of the images in their tracks, where there are any."""

    images: ReidImages
    values: torch.Tensor
    unreadable: list[str]
    quality: torch.Tensor | None = None


class ReidTest(NamedTuple):
    """One test of a set: its protocol, the numbers of `evaluate`, what they were made from, and those of each query
    (`Ranks.by_query`); gallery None: drawn from the query's images."""

    protocol: Protocol
    metrics: dict[str, float]
    query: ReidFeatures
    gallery: ReidFeatures | None
    by_query: dict[str, np.ndarray]


def write_reid_report(
    file: Path,
    facts: dict[str, object],
    test: ReidTest,
    pid_names: list[str],
    device="cpu",
    answers: Answers | None = None,
    track_names: list[str] | None = None,
) -> None:
    """Write the page; it takes the time of two more `evaluate`. pid_names, track_names: of all pids and tracks; device:
    computes the cosines; of drawn galleries the first is shown. answers: of the same queries, to a gallery with and
    without their vehicle."""
    protocol, sides = test.protocol, [side[:2] for side in (test.query, test.gallery) if side]
    if len(sides) == 1:
        (images, values), (kept, asked) = sides[0], draw_gallery(sides[0][0].pids, protocol.seed, 0)
        sides = [(images.take(rows), values[rows]) for rows in (asked, kept)]
    query, gallery = (FeatureSet.of(values, images) for images, values in sides)
    ranking = ShownQueries(protocol, query, gallery, SHOWN, 0, device)
    articles = Articles(ranking, *(images for images, _ in sides), pid_names, track_names or [])
    tiles = {}
    for name, value in test.metrics.items():
        spread = f" ± {100 * test.metrics[f'{name}_std']:.2f}" if f"{name}_std" in test.metrics else ""
        if f"{name}_low" in test.metrics:
            spread = " ({:.1f} to {:.1f})".format(*(100 * test.metrics[f"{name}_{end}"] for end in ("low", "high")))
        shown = f"{value:,.6g}" if name.startswith("queries") else f"{100 * value:.2f} %{spread}"
        tiles |= {} if name.endswith(("_std", "_low", "_high")) else {name.replace("_", " "): shown}
    page = Page(f"Re-identification: {protocol.name}", protocol.line(), tiles, facts)
    ap = ranking.ap[~np.isnan(ranking.ap)]
    page.section(
        "Ranking",
        f"{len(query.pids):,} queries against {len(gallery.pids):,} gallery images, "
        f"{len(ranking.ap) - len(ap):,} of the queries without a match, which are not scored",
        f". This is one draw; the numbers above are means of {protocol.draws}." if protocol.draws else ".",
        " What is ranked are whole tracks; each shows its first image." if "/track-to-track" in protocol.name else "",
    )
    if len(ap):
        last = min(CMC_RANKS, len(gallery.pids))
        page.first_k("CMC", list(scores(ranking.ranks, tuple(range(1, last + 1))).values())[1 : last + 1])
        low = f"AP: median {percent(np.median(ap))} %; {(ap < 0.1).sum():,} of {len(ap):,} queries are below 10 %."
        page.add(tag("p", low))
    if answers:
        add_unknown(page, answers)
    shown = {name: [articles.one(row) for row in rows.tolist()] for name, rows in ranking.chosen.items()}
    lost = len(articles.pictures.lost)
    page.add(tag("p", *LEGEND, tag("b", f" {lost} of the pictures cannot be opened.", kind="wrong") if lost else ""))
    for name, words in SECTIONS.items():
        page.section(f"{name.capitalize()} queries", words)
        page.add(*shown[name])
    page.write(file)


def add_unknown(page: Page, answers: Answers) -> None:
    """How well queries whose vehicle is not there are told from the others, and what a promise is worth."""
    page.section(
        "Unknown vehicles",
        f"{len(answers.known):,} queries with their vehicle in the gallery, and {len(answers.unknown):,} without it: ",
        "each is asked once more of a gallery that lacks its vehicle. What scores above a threshold is accepted.",
    )
    axes = new_axes("score of the best image", "share of the queries, %")
    low, high = min(answers.known.min(), answers.unknown.min()), max(answers.known.max(), answers.unknown.max())
    for name, values in (("vehicle is there", answers.known), ("vehicle is not there", answers.unknown)):
        counts, edges = np.histogram(values, 24, (low, high))
        axes.stairs(100 * counts / len(values), edges, label=name)
    page.figure("Scores", axes, "The further apart, the better.")
    fars = np.array([0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
    measured = 100 * measured_far(answers, fars)
    axes = new_axes("promised FAR, %", "measured FAR, %")
    axes.plot([0, 30], [0, 30], linestyle=":", color="grey", label="as promised")
    axes.plot(100 * fars, measured.mean(axis=1), marker="o", label="measured, mean")
    axes.fill_between(100 * fars, *np.quantile(measured, (0.1, 0.9), axis=1), alpha=0.25, label="8 of 10 splits")
    words = (
        f"On vehicles not used to choose the threshold, {SPLITS} random halves; 0 where a half is too small to promise."
    )
    page.figure("Promised and measured false accepts", axes, words)


class Articles:
    """Queries beside what was found."""

    def __init__(self, ranking: ShownQueries, query: ReidImages, gallery: ReidImages, *names: list[str]):
        self.ranking, self.query, self.gallery = ranking, query, gallery
        self.pid_names, self.track_names = names
        self.pictures = Pictures()

    def one(self, row: int) -> Html:
        """Who the query is, its numbers, its picture, and beside it what was found."""
        who, ranks = ", ".join(self.who(self.query, row)), self.ranking.ranks
        hits = ranks.hits[slice(*ranks.offsets[row : row + 2])]
        words = f"AP {100 * self.ranking.ap[row]:.1f} %, {len(hits):,} matches, at ranks {hits[0]:,} to {hits[-1]:,}"
        own = cards([self.card(self.query, row, f"query, {who}", tag("b", "query"))], "own")
        found = cards([self.found(*hit) for hit in self.ranking.cards(row, TOPK)])
        return tag("article", tag("h3", who, tag("span", words)), tag("div", own, found, kind="list"))

    def found(self, row: int, rank: int, kind: str, cosine: float) -> Html:
        words, who = f"rank {rank:,}" if rank else "not counted", self.who(self.gallery, row)
        alt, below = ", ".join([MARKS[kind], words, *who]), join(BREAK, [mark(kind), words, f"cos {cosine:.3f}", *who])
        return self.card(self.gallery, row, alt, below, kind=kind + " later" * (rank > TOPK))

    def who(self, images: ReidImages, row: int) -> list[str]:
        pid, camid, names = int(images.pids[row]), int(images.camids[row]), self.track_names
        who = [f"pid {self.pid_names[pid] if pid >= 0 else 'unknown'}", *([f"camid {camid}"] if camid >= 0 else [])]
        is_tracked = images.tracks is not None and images.tracks[row] < len(names)
        return [*who, f"track {names[images.tracks[row]]}"] if is_tracked else who

    def card(self, images: ReidImages, row: int, alt: str, *words: object, kind: str = "") -> Html:
        return self.pictures.card(images.paths[row], images.paths.relative(row), *words, kind=kind, alt=alt)
