"""The two pages of a set like Automobile1M: a curation (what was removed and why, how even the sample is) and a run of
descriptions (every kept and removed text, with the images that ground it)."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.path_list import PathList
from reports.page import Html, Page, Pictures, cards, facts_table, mark, table, tag

SHOWN, CLUSTERS, MEMBERS = 12, 24, 6  # pictures of a reason, clusters, pictures chosen and left out of each
EVIDENCE = {
    "entropy": "entropy over the cells (1: all equal)", "gini": "Gini coefficient (0: all equal)",
    "effective": "effective number of cells", "coverage": "share of cells with an image",
    "tail_coverage": "of the rarest tenth of cells", "top_share": "share of images in the largest 1% of cells",
}  # fmt: skip
EVEN = (
    "Over cells of equal radius in the space of embeddings, which had no part in the choice. random: a random draw of "
    "the sample's size. Curation has worked where the selection is more even and reaches more of the rare cells."
)
REMOVED = (
    "From the smallest to the largest value; copies beside what stands for them, with their agreement. If the first "
    "pairs are not the same photo, raise --near_agreement and --near_cosine or lower --near_bits."
)


@dataclass(frozen=True)
class Curated:
    """A finished curation; rows number the N images of all sources.

    images: row -> file, with `name(row)`. removals: by stage: `rows`, `reason` (into `reasons`), `of` and `value`, all
    [n]. selection: rows that were chosen. clusters: {domain: (rows, the cluster of each)}. evidence: {set: {number}}.
    """

    images: Callable[[int], Path]
    index: object
    removals: dict
    selection: np.ndarray
    clusters: dict[str, tuple[np.ndarray, np.ndarray]]
    evidence: dict[str, dict[str, float]]
    settings: dict
    pictures: Pictures = field(default_factory=Pictures)

    def card(self, row: int, kind: str, *words: object) -> Html:
        """The picture of a row; its box is cut out as in training."""
        box, name = self.index.box[row].tolist(), self.images.name(row)
        box = tuple(box) if box[2] > 0 else None
        return self.pictures.card(self.images[row], name, *words, kind=kind, alt=name, box=box)


def write_curation_report(file: Path, found: Curated) -> None:
    """Write the page."""
    pool = int((~found.index.excluded).sum())
    page = Page(f"Curation: {len(found.selection):,} of {pool:,} images")
    page.section("What was removed")
    page.add(funnel(found))
    page.section("How even is it?", EVEN)
    rows = [[title, *(f"{row[name]:.4g}" for row in found.evidence.values())] for name, title in EVIDENCE.items()]
    page.add(table(["", *found.evidence], rows))
    page.section("Clusters", "From the largest to the smallest. Green frame: chosen. Click a picture to enlarge it.")
    page.add(mosaic(found))
    page.section("Removed pictures", REMOVED)
    for removal in found.removals.values():
        page.add(*removed(found, removal))
    page.section("Settings")
    page.add(tag("pre", json.dumps(found.settings, indent=1)))
    page.write(file)


def funnel(found: Curated) -> Html:
    """How many images are left after each stage, of all and of each source, and why the others left."""
    index, alive = found.index, ~found.index.excluded
    sets = [("in the pools", np.flatnonzero(alive), "")]
    for name, removal in found.removals.items():
        alive = alive & ~np.isin(np.arange(len(alive)), removal.rows)
        counts = zip(removal.reasons, np.bincount(removal.reason, minlength=len(removal.reasons)).tolist())
        why = "; ".join(f"{reason} {count:,}" for reason, count in counts if count)
        sets.append((f"after {name}", np.flatnonzero(alive), why))
    rows = []
    for name, chosen, why in [*sets, ("chosen", found.selection, "")]:
        counts = np.bincount(index.source[chosen], minlength=len(index.sources)).tolist()
        rows.append([name, f"{len(chosen):,}", *(f"{count:,}" for count in counts), why])
    return table(["", "images", *index.sources, ""], rows)


def mosaic(found: Curated) -> Html:
    """Of clusters from the largest to the smallest some images that were chosen, and some that were left out."""
    blocks = []
    for number, (domain, (rows, cluster_of)) in enumerate(found.clusters.items()):
        sizes, rng = np.bincount(cluster_of), np.random.default_rng([number, 5000])
        order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
        count = min(len(order), max(1, CLUSTERS // len(found.clusters)))
        for cluster in order[np.linspace(0, len(order) - 1, count).astype(int)].tolist():
            members = rows[cluster_of == cluster]
            kept, items = np.isin(members, found.selection), []
            for wanted, kind in ((members[kept], "right"), (members[~kept], "")):
                some = rng.choice(wanted, min(len(wanted), MEMBERS), replace=False)
                items += [found.card(row, kind) for row in np.sort(some).tolist()]
            title = f"{domain} cluster {cluster}: {kept.sum():,} of {len(members):,}"
            blocks.append(tag("div", tag("h3", title), cards(items)))
    return tag("div", *blocks, kind="row")


def removed(found: Curated, removal) -> list[Html]:
    """Of each reason a few images, beside what stands for them."""
    blocks = []
    for number, reason in enumerate(removal.reasons):
        mine, items = np.flatnonzero(removal.reason == number), []
        mine = mine[np.argsort(removal.value[mine], kind="stable")]
        some = np.unique(np.linspace(0, len(mine) - 1, min(SHOWN, len(mine))).astype(int))
        for k in mine[some].tolist():
            items.append(found.card(removal.rows[k], "wrong", mark("wrong", "removed"), f" {removal.value[k]:.3g}"))
            if removal.of[k] >= 0:
                items.append(found.card(removal.of[k], "right", mark("right", "stands for it")))
        blocks += [tag("h3", f"{reason}: {len(mine):,}"), cards(items)]
    return blocks


def write_description_report(
    file: Path, title: str, metrics: dict, lists: dict[str, list[dict]], paths: PathList | None, shown: int
) -> None:
    """Write the page.

    Args:
        lists: "kept" and "removed", rows with `text`, `kind` and, where known, `usage`, `gap`, `images` (indices into
            `paths`, best first); removed ones also `reason` and `detail`.
        paths: None when nothing was grounded. shown: texts that get pictures, spread evenly over each list.
    """
    page, pictures = Page(title), Pictures(side=80)
    page.section("Numbers")
    page.add(facts_table({name.replace("_", " "): value for name, value in metrics.items()}))
    for name, key in ("kept", "kind"), ("removed", "reason"):
        page.section(f"{name.capitalize()} texts")
        for group in sorted({row[key] for row in lists[name]}):
            rows = [row for row in lists[name] if row[key] == group]
            some = max(1, shown * len(rows) // len(lists[name]))
            chosen = {len(rows) * i // some for i in range(some)} if paths is not None else set()
            lines = [text_line(row, paths, pictures, number in chosen) for number, row in enumerate(rows)]
            content = table(["text", "usage", "gap", "detail", "nearest images"], lines)
            page.add(tag("details", tag("summary", f"{group}: {len(rows)}"), content, open="open" * (len(rows) <= 30)))
    page.write(file)


def text_line(row: dict, paths: PathList | None, pictures: Pictures, is_shown: bool) -> list[object]:
    images = [pictures.one(paths[i], paths.relative(i), row["text"]) for i in row.get("images", []) if is_shown]
    return [row["text"], *(row.get(name, "") for name in ("usage", "gap", "detail")), tag("td", *images, kind="t")]
