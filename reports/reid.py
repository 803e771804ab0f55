"""One page about a re-identification test: what was found first, how far off it was, what was looked at."""

import html
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from datasets.images import UNREADABLE, open_rgb
from datasets.path_list import printable
from datasets.reid import ReidImages
from datasets.transforms import whole_image
from metrics.protocols import Protocol
from metrics.ranking import Card, Ranking
from metrics.reid import cosine_blocks
from reports.page import MARKS, THUMB, Pictures, Section, mark, write_page
from reports.reid_charts import charts
from reports.rollout import Rollout, heat_picture
from reports.thumbnail import jpeg_uri

ROLLOUT_BATCH = 8
SECTIONS = {
    "worst": ("Worst queries", "Those of the lowest average precision (AP)."),
    "best": ("Best queries", "Those of the highest AP, among equals those with most matches; different "
             "vehicles as far as there are any."),
    "random": ("Random queries", "Drawn from all scored queries, seed {seed}."),
}  # fmt: skip
STYLE = """.list{display:flex;gap:16px;padding:0;margin:0}.own{flex:none}.heat img{border-color:#ccc}
.later{margin-left:20px;position:relative}.later::before{content:'...';position:absolute;left:-17px;top:2em}
.junk img,.junk .gone{border:3px dotted #777}.junk img{opacity:.6}"""


class Lists:
    """Ranked lists as HTML."""

    def __init__(self, ranking: Ranking, pid_names: list[str], topk: int, heats: dict[int, Image.Image]):
        self.ranking, self.pid_names, self.topk, self.heats = ranking, pid_names, topk, heats
        self.pictures = Pictures()

    def section(self, name: str, seed: int) -> Section:
        title, words = SECTIONS[name]
        lists = "".join(self.one(row) for row in self.ranking.chosen[name].tolist())
        return Section(name, title, f"<p>{words.format(seed=seed)}</p>{lists or '<p>None.</p>'}")

    def one(self, row: int) -> str:
        """The query, its roll-out, and its cards."""
        ranking, who = self.ranking, self.who(self.ranking.query, row)
        hits = ranking.ranks.hits[slice(*ranking.ranks.offsets[row : row + 2])]
        where = f"1 match, at rank {hits[0]:,}"
        if len(hits) > 1:
            where = f"{len(hits):,} matches, at ranks {hits[0]:,} to {hits[-1]:,}"
        picture = self.picture(ranking.query, row, f"query, {who}")
        own = f"<li>{picture}<b>query</b></li>"
        if row in self.heats:
            uri = jpeg_uri(self.heats[row], THUMB)
            own += f'<li class="heat"><img src="{uri}" alt="roll-out of the query"><b>roll-out</b></li>'
        cards = "".join(self.card(card) for card in ranking.cards(row, self.topk))
        return (
            f"<article><h3>{who}<span>AP {100 * ranking.ap[row]:.1f} %, {where}</span></h3>"
            f'<div class="list"><ol class="own">{own}</ol><ol>{cards}</ol></div></article>'
        )

    def card(self, card: Card) -> str:
        which, word = (self.ranking.gallery, card.row), MARKS[card.mark][0]
        rank = f"rank {card.rank:,}" if card.rank else "not counted"
        picture = self.picture(*which, f"{word}, {rank}, {self.who(*which)}")
        words = f"{mark(card.mark)}<br>{rank}<br>cos {card.cosine:.3f}<br>{self.who(*which, '<br>')}"
        later = " later" if card.rank > self.topk else ""
        return f'<li class="{card.mark}{later}">{picture}{words}</li>'

    def who(self, images: ReidImages, row: int, between: str = ", ") -> str:
        pid, camid = int(images.pids[row]), int(images.camids[row])
        name = html.escape(printable(self.pid_names[pid])) if pid >= 0 else "unknown"
        return f"pid {name}" + (f"{between}camid {camid}" if camid >= 0 else "")

    def picture(self, images: ReidImages, row: int, alt: str) -> str:
        return self.pictures.one(images.paths, row, alt)


def query_heats(
    rollout: Rollout, query: ReidImages, rows: list[int], img_size: tuple[int, int]
) -> dict[int, Image.Image]:
    """{row: the query under its roll-out, THUMB px}, without files that cannot be opened."""
    imgs, small = [], {}
    for row in rows:
        try:
            picture = open_rgb(query.paths[row])
        except UNREADABLE:
            continue  # the list says so
        imgs.append(whole_image(picture, img_size))
        small[row] = ImageOps.contain(picture, (THUMB, THUMB))
    drawn = {}
    for start in range(0, len(imgs), ROLLOUT_BATCH):
        part = list(small)[start : start + ROLLOUT_BATCH]
        ids = (torch.from_numpy(x[part]) for x in (query.camids, query.viewids))
        heats = rollout(torch.stack(imgs[start : start + ROLLOUT_BATCH]), *ids)
        drawn |= {row: heat_picture(small[row], heat) for row, heat in zip(part, heats)}
    return drawn


def tiles(metrics: dict[str, float]) -> dict[str, str]:
    """The numbers as text; those of [0, 1] in %, a standard deviation beside its mean."""
    found = {}
    for name, value in metrics.items():
        if name.endswith("_std") and name[:-4] in metrics:
            continue
        percent = re.match(r"(mAP|mINP|R\d+)", name) is not None
        text = f"{100 * value:.2f} %" if percent else f"{value:,.6g}"
        if percent and f"{name}_std" in metrics:
            text += f" ± {100 * metrics[f'{name}_std']:.2f}"
        found[name.replace("_", " ")] = "none" if math.isnan(value) else text
    return found


def write_reid_report(
    file: Path,
    title: str,
    facts: dict[str, str],
    protocol: Protocol,
    metrics: dict[str, float],
    query: ReidImages,
    query_features: torch.Tensor,
    gallery: ReidImages,
    gallery_features: torch.Tensor,
    pid_names: list[str],
    rollout: Rollout | None = None,
    img_size: tuple[int, int] | None = None,
    shown: int = 12,
    topk: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Write one HTML page that needs no other file and no network.

    It takes the time of one more `evaluate`; memory: the gallery's features once more, and a few blocks.

    Args:
        facts: what belongs to the numbers: weights, commit, seed.
        metrics: of `evaluate`; where the protocol draws galleries, query and gallery are one of the draws.
        query_features, gallery_features: [Q, D], [G, D] float, in the order of the images.
        pid_names: of all pids.
        rollout: of `reid_rollout`, drawn for the queries shown; img_size: (H, W) px of its images.
        shown: queries a section. topk: counted gallery images a list. seed: of the random draw.
        device: where cosines are computed.
    Raises:
        ValueError: lengths that differ, features that are not finite, a pid without a name, cameras that the
            protocol needs but are unknown, a protocol with re-ranking, a roll-out without img_size, shown or
            topk below 1.
        InputError: the file cannot be written.
    """
    _check(protocol, query, query_features, gallery, gallery_features, len(pid_names))
    if min(shown, topk) < 1 or (rollout is not None and img_size is None):
        raise ValueError(f"shown {shown}, topk {topk} from 1; a roll-out needs img_size, which is {img_size}")
    ranking = Ranking(protocol, query, gallery, shown, seed)
    for similar in cosine_blocks(query_features, gallery_features, torch.device(device)):
        ranking.add(similar)
    heats = query_heats(rollout, query, sorted(ranking.similar), img_size) if rollout is not None else {}
    lists = Lists(ranking, pid_names, topk, heats)
    shown_lists = [lists.section(name, seed) for name in SECTIONS]
    ranks = f'<p>{_words(ranking)}</p><div class="charts">{charts(ranking)}</div>'
    legend = f"<p>{_legend(protocol, topk, heats, lists.pictures.lost)}</p>"
    write_page(
        file,
        title,
        f"<p><code>{html.escape(protocol.line())}</code></p>",
        tiles(metrics),
        facts,
        [Section("ranking", "Ranking", ranks), Section("lists", "Ranked lists", legend, False), *shown_lists],
        STYLE,
    )


def _check(protocol, query, query_features, gallery, gallery_features, names: int) -> None:
    for what, images, x in (("query", query, query_features), ("gallery", gallery, gallery_features)):
        if len(images) != len(x) or not len(x):
            raise ValueError(f"{what}: {len(images)} images, {len(x)} features")
        if not torch.isfinite(x).all():
            raise ValueError(f"{what}: features that are not finite")
        if images.pids.max() >= names:
            raise ValueError(f"{what}: pid {images.pids.max()} has none of the {names} names")
        if protocol.remove_same_camera and not images.has_cameras():
            raise ValueError(f"{what}: {protocol.name} removes same-camera matches, but cameras are unknown")
    if protocol.rerank:
        raise ValueError(f"the page shows lists by cosine, and {protocol.name} ranks otherwise")


def _words(ranking: Ranking) -> str:
    """What the lists and curves are of."""
    ap = ranking.ap[~np.isnan(ranking.ap)]
    text = f"{len(ranking.query):,} queries against {len(ranking.gallery):,} gallery images"
    text += f": mAP {100 * ap.mean():.2f} %." if len(ap) else "."
    if len(ap) < len(ranking.ap):
        text += f" {len(ranking.ap) - len(ap):,} queries have no match; they are not scored and not shown."
    if ranking.protocol.draws:
        text += f" This is one draw of the gallery; the numbers above are means of {ranking.protocol.draws}."
    return text


def _legend(protocol: Protocol, topk: int, heats: dict, lost: dict) -> str:
    parts = [
        "Beside each query its gallery images, from the highest cosine on, with their counted ranks. "
        f"{mark('right')}, solid green frame: the same vehicle. {mark('wrong')}, dashed red frame: another."
    ]
    if protocol.remove_same_camera:
        parts.append(
            f"{mark('junk')}, dotted grey frame: the same vehicle seen by the query's own camera, which the "
            f"protocol does not count; it stands where it would be; at most {topk} a list are shown."
        )
    parts.append(f"Behind the dots stands the first right one, if it comes after rank {topk}.")
    if heats:
        parts.append(
            "Roll-out of attention (Abnar and Zuidema, 2020): from the patch that reaches the class token "
            "least (black) to the one that does most (light yellow), each picture for itself."
        )
    if lost:
        parts.append(f'<b class="wrong">{len(lost):,} of the pictures cannot be opened.</b>')
    return " ".join(parts)
