"""The page of a curation: what was removed and why, how even the sample is, and pictures of all of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reports.page import Html, Page, Pictures, card, cards, join, mark, new_axes, table, tag

PAIRS_SHOWN, EXAMPLES_SHOWN, CLUSTERS_SHOWN, MEMBERS_SHOWN, NAMES_SHOWN = 12, 10, 24, 12, 20
EVIDENCE = {
    "entropy": "entropy of the images over the cells (1: all equal)",
    "gini": "Gini coefficient (0: all equal)",
    "effective": "effective number of cells",
    "coverage": "cells with at least one image",
    "tail_coverage": "of the rarest tenth of cells, those with at least one image",
    "top_share": "share of the images in the largest 1% of cells",
}
COPIES = (
    "Removed picture, then the one that stands for it, with their agreement: the correlation that three quarters of "
    "the tiles of the picture reach, once a crop or mirror is undone. From the least to the most alike: if the first "
    "pairs are not the same photo, raise --near_agreement and --near_cosine or lower --near_bits."
)


@dataclass(frozen=True)
class Curated:
    """A finished curation; rows number the N images of all sources.

    images: row -> file, with `name(row)`. index: its `sources`, `source` [N], `excluded` [N], `box` [N, 4].
    removals: by stage, in their order: `rows`, `reason` (into `reasons`), `of` and `value`, all [n]. left, selection:
    rows that no stage removed, rows that were chosen. clusters: {domain: (rows, the cluster of each)}.
    evidence: {set: {number}}; sizes: {set: [cells] images}. settings: all flags.
    """

    images: Callable[[int], Path]
    index: object
    removals: dict
    left: np.ndarray
    selection: np.ndarray
    clusters: dict[str, tuple[np.ndarray, np.ndarray]]
    evidence: dict[str, dict[str, float]]
    sizes: dict[str, np.ndarray]
    settings: dict
    pictures: Pictures = field(default_factory=Pictures)

    def card(self, row: int, kind: str, *words: object) -> Html:
        """The picture of a row; its box is cut out as in training."""
        box, name = self.index.box[row].tolist(), self.images.name(row)
        picture = self.pictures.one(self.images[row], name, name, tuple(box) if box[2] > 0 else None)
        return card(picture, *words, kind=kind)


def write_curation_report(file: Path, found: Curated) -> None:
    """Write the page."""
    pool = int((~found.index.excluded).sum())
    page = Page(f"Curation: {len(found.selection):,} of {pool:,} images")
    page.section("What was removed")
    page.add(funnel(found, pool), tag("h3", "By source"), source_table(found))
    page.section(
        "How even is it?",
        "Counted over cells of equal radius in the space of embeddings, which had no part in the choice. (Clusters of "
        "k-means would hold about equally many images each and make any draw look even.) pool: all images that could "
        "be chosen; random: a random draw of the sample's size, with as many images of each source where sources are "
        "kept apart; selection: the curated sample. Curation has worked where the selection is more even than the "
        "random draw and reaches more of the rare cells.",
    )
    rows = [[title, *(f"{row[name]:.4g}" for row in found.evidence.values())] for name, title in EVIDENCE.items()]
    page.add(table(["", *found.evidence], rows))
    draw_sizes(page, found.sizes)
    page.section("Clusters", "From the largest to the smallest. Green frame: chosen. Click a picture to enlarge it.")
    page.add(mosaic(found))
    page.section("Copies within the pool", COPIES)
    page.add(removed_pairs(found, "duplicates"))
    page.section("Benchmark pictures in the pool")
    page.add(removed_pairs(found, "leaks"))
    page.section("Other removals", "With the value that was measured, from the smallest to the largest.")
    page.add(removed_examples(found))
    page.section("Settings")
    page.add(tag("pre", json.dumps(found.settings, indent=1)))
    page.write(file)


def funnel(found: Curated, pool: int) -> Html:
    """Bars of how many images are left after each stage, and why the others left."""
    rows, left = [("in the pools", pool, "")], pool
    for name, removal in found.removals.items():
        left -= int((~found.index.excluded[removal.rows]).sum())
        counts = zip(removal.reasons, np.bincount(removal.reason, minlength=len(removal.reasons)).tolist())
        rows.append((f"after {name}", left, "; ".join(f"{reason} {count:,}" for reason, count in counts if count)))
    rows.append(("chosen", len(found.selection), ""))
    bars = [tag("span", kind="bar", style=f"width:{200 * count / max(pool, 1):.0f}px") for _, count, _ in rows]
    return table([], [[name, f"{count:,}", bar, why] for (name, count, why), bar in zip(rows, bars)])


def source_table(found: Curated) -> Html:
    index, rows = found.index, []
    for number, name in enumerate(index.sources):
        pool = int(((index.source == number) & ~index.excluded).sum())
        left, chosen = (int((index.source[rows] == number).sum()) for rows in (found.left, found.selection))
        if pool:
            share = f"{100 * chosen / len(found.selection):.1f} %"
            rows.append([name, f"{pool:,}", f"{left:,}", f"{chosen:,}", share])
    return table(["source", "in the pool", "left", "chosen", "share"], rows)


def draw_sizes(page: Page, sizes: dict[str, np.ndarray]) -> None:
    """Cell sizes, largest first, of each set relative to its mean; logarithmic upwards."""
    axes = new_axes("cells, from the largest to the smallest, %", "images, of the set's mean", size=(7.2, 2.8))
    for name, values in sizes.items():
        ordered = np.sort(values)[::-1] / max(values.mean(), 1e-9)
        axes.plot(np.linspace(0, 100, len(ordered)), ordered.clip(0.03, 30), label=name)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_yticks([0.1, 1, 10], ["0.1 x", "1 x", "10 x"])
    words = (
        "Images in a cell, from the largest to the smallest, relative to each set's mean. A flat line is an even set."
    )
    page.figure("Sizes of the cells", axes, words, "chart wide")


def mosaic(found: Curated) -> Html:
    """Of clusters from the largest to the smallest some images that were chosen, and some that were left out."""
    blocks = []
    for number, (domain, (rows, cluster_of)) in enumerate(found.clusters.items()):
        sizes, rng = np.bincount(cluster_of), np.random.default_rng([number, 5000])
        order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
        count = min(len(order), max(1, CLUSTERS_SHOWN // len(found.clusters)))
        for cluster in order[np.linspace(0, len(order) - 1, count).astype(int)].tolist():
            members = rows[cluster_of == cluster]
            kept, items = np.isin(members, found.selection), []
            for wanted, kind in ((members[kept], "right"), (members[~kept], "")):
                some = rng.choice(wanted, min(len(wanted), MEMBERS_SHOWN // 2), replace=False)
                items += [found.card(row, kind) for row in np.sort(some).tolist()]
            name = f"{domain}, " * (len(found.clusters) > 1)
            title = f"{name}cluster {cluster}: {kept.sum():,} of {len(members):,}"
            blocks.append(tag("div", tag("h3", title), cards(items)))
    return tag("div", *blocks, kind="row")


def by_reason(removal, has_other: bool, wanted: int):
    """(reason, [k] places in the removal, some of them from the smallest to the largest value) of each reason with
    (or without) an image that stands for the removed one."""
    for number, reason in enumerate(removal.reasons):
        mine = np.flatnonzero((removal.reason == number) & ((removal.of >= 0) == has_other))
        if len(mine):
            mine = mine[np.argsort(removal.value[mine], kind="stable")]
            yield reason, mine, mine[np.unique(np.linspace(0, len(mine) - 1, wanted).astype(int))].tolist()


def removed_pairs(found: Curated, stage: str) -> Html:
    """For each reason a few removed images beside what stands for them, from the least to the most alike."""
    blocks, removal = [], found.removals[stage]
    for reason, mine, some in by_reason(removal, True, PAIRS_SHOWN):
        pairs = [
            cards([found.card(removal.rows[k], "wrong", mark("wrong", "removed")),
                   found.card(removal.of[k], "right", f"{removal.value[k]:.3f}")])
            for k in some
        ]  # fmt: skip
        blocks += [tag("h3", f"{reason}: {len(mine):,}"), tag("div", *pairs, kind="row")]
    return join("", blocks or [tag("p", "None.")])


def removed_examples(found: Curated) -> Html:
    """For each reason without a counterpart a few images; of unreadable ones the names."""
    blocks = []
    for removal in found.removals.values():
        for reason, mine, some in by_reason(removal, False, EXAMPLES_SHOWN):
            if reason == "unreadable":
                names = (found.images.name(int(row)) for row in removal.rows[mine][:NAMES_SHOWN])
                shown = tag("ul", *(tag("li", name) for name in names))
            else:
                shown = cards([found.card(removal.rows[k], "", f"{removal.value[k]:.3g}") for k in some])
            blocks += [tag("h3", f"{reason}: {len(mine):,}"), shown]
    return join("", blocks or [tag("p", "None.")])
