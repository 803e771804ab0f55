"""report.html: what was removed and why, how even the sample is, and pictures of all of it, in one file."""

import html
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from curation.cluster import load_tree
from curation.hierarchy import step_rng
from curation.removal import load_removal
from datasets.images import UNREADABLE, open_rgb
from reports.thumbnail import jpeg_uri
from util.files import write_atomic

THUMB = 96  # px
PAIRS_SHOWN, EXAMPLES_SHOWN, CLUSTERS_SHOWN, MEMBERS_SHOWN = 12, 10, 24, 12
PAGE = Path(__file__).with_name("curation.html")


class Thumbnails:
    """Pictures of index rows as data URIs; boxes are cut out as in training."""

    def __init__(self, images, index):
        self.images, self.index = images, index

    def uri(self, row: int) -> str:
        try:
            image = open_rgb(self.images[row])
            if self.index.box[row, 2] > 0:
                image = image.crop(tuple(self.index.box[row].tolist()))
        except UNREADABLE:
            image = Image.new("RGB", (THUMB, THUMB), "#b33")
        tile = ImageOps.pad(image, (THUMB, THUMB), Image.Resampling.BICUBIC, color="#eee")
        return jpeg_uri(tile, THUMB, quality=72)

    def figure(self, row: int, caption: str = "", kind: str = "") -> str:
        name = self.images.name(row)
        words = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        return f'<figure class="{kind}"><img src="{self.uri(row)}" title="{html.escape(name)}" alt="">{words}</figure>'


def write_report(run, counts: dict, sizes: dict[str, np.ndarray]) -> None:
    """Draw the page of a finished `Curation`.

    Args:
        counts: of every stage, and "evidence" of `judge`. sizes: cluster sizes of `judge`.
    """
    pictures = Thumbnails(run.images, run.index)
    selection = np.load(run.folder / "selection.npy")
    parts = {
        "TITLE": f"{counts['sample']['images']:,} of {int((~run.index.excluded).sum()):,} images",
        "FUNNEL": funnel(run, counts),
        "EVIDENCE": evidence_table(counts["evidence"]),
        "CURVES": size_curves(sizes),
        "SOURCES": source_table(run, selection),
        "MOSAIC": mosaic(run, selection, pictures),
        "COPIES": removed_pairs(run, "duplicates", pictures),
        "LEAKS": removed_pairs(run, "leaks", pictures),
        "REMOVED": removed_examples(run, pictures),
        "SETTINGS": html.escape(json.dumps(vars(run.args), indent=1)),
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    write_atomic(run.folder / "report.html", lambda f: f.write(page.encode("utf-8", "replace")))


def funnel(run, counts: dict) -> str:
    """Bars of how many images are left after each stage, and why the others left."""
    total = left = int((~run.index.excluded).sum())
    rows = [("in the pools", left, "")]
    for name in ("quality", "vehicle", "leaks", "duplicates"):
        removal = load_removal(run.folder, name)
        gone = int((~run.index.excluded[removal.rows]).sum())
        if not gone and name == "vehicle" and not run.args.vehicle_filter:
            continue
        left -= gone
        why = "; ".join(f"{reason} {count:,}" for reason, count in removal.counts().items())
        rows.append((f"after {name}", left, why))
    rows.append(("chosen", counts["sample"]["images"], ""))
    return "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{value:,}</td><td class="bar"><div style="width:'
        f'{100 * value / max(total, 1):.2f}%"></div></td><td>{html.escape(why)}</td></tr>'
        for name, value, why in rows
    )


def evidence_table(evidence: dict[str, dict[str, float]]) -> str:
    """One row a number, one column a set."""
    titles = {
        "entropy": "entropy of the images over the cells (1: all equal)",
        "gini": "Gini coefficient (0: all equal)",
        "effective": "effective number of cells",
        "coverage": "cells with at least one image",
        "tail_coverage": "of the rarest tenth of cells, those with at least one image",
        "top_share": "share of the images in the largest 1% of cells",
    }
    head = "".join(f"<th>{name}</th>" for name in evidence)
    body = "".join(
        f"<tr><td>{title}</td>" + "".join(f'<td class="n">{row[name]:.4g}</td>' for row in evidence.values()) + "</tr>"
        for name, title in titles.items()
    )
    return f"<tr><th></th>{head}</tr>{body}"


def size_curves(sizes: dict[str, np.ndarray]) -> str:
    """Cell sizes, largest first, of each set relative to its mean; logarithmic upwards; as SVG."""
    width, height, floor, top = 720, 260, 0.03, 30.0
    colours = {"pool": "#888", "random": "#d80", "selection": "#06c"}

    def y(value: np.ndarray) -> np.ndarray:
        share = np.log(np.clip(value, floor, top) / floor) / np.log(top / floor)
        return (height - 24) * (1 - share) + 8

    lines = []
    for value in (0.1, 1, 10):
        at = float(y(np.array(value)))
        lines.append(f'<line x1="40" x2="{width}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="4" y="{at + 4:.1f}">{value:g}x</text>')
    for number, (name, values) in enumerate(sizes.items()):
        ordered = np.sort(values)[::-1] / max(values.mean(), 1e-9)
        x = np.linspace(40, width, len(ordered))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y(ordered)))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        lines.append(f'<text x="{width - 110}" y="{22 + 16 * number}" fill="{colours[name]}">{name}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(lines)}</svg>'


def source_table(run, selection: np.ndarray) -> str:
    left = run.alive()
    rows = ["<tr><th>source</th><th>in the pool</th><th>left</th><th>chosen</th><th>share</th></tr>"]
    for number, name in enumerate(run.index.sources):
        pool = (run.index.source == number) & ~run.index.excluded
        if pool.any():
            chosen = int((run.index.source[selection] == number).sum())
            still = int((run.index.source[left] == number).sum())
            numbers = (f"{int(pool.sum()):,}", f"{still:,}", f"{chosen:,}", f"{chosen / len(selection):.1%}")
            cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
            rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return "".join(rows)


def mosaic(run, selection: np.ndarray, pictures: Thumbnails) -> str:
    """Clusters from the largest to the smallest: images kept (framed) and left out."""
    blocks = []
    found = run.domains()
    for domain in found:
        tree, rows = load_tree(run.trees_folder() / domain.name)
        level = min(1, len(tree.sizes) - 1)
        clusters, sizes = tree.path()[:, level], tree.images_below(level)
        order = np.argsort(-sizes, kind="stable")
        order = order[sizes[order] > 0]
        count = min(len(order), max(1, CLUSTERS_SHOWN // len(found)))
        for cluster in order[np.linspace(0, len(order) - 1, count).astype(int)]:
            members = rows[clusters == cluster]
            kept = np.isin(members, selection)
            rng = step_rng(run.args.seed, 5000, int(cluster))
            shown = []
            for wanted, kind in ((members[kept], "kept"), (members[~kept], "left")):
                some = rng.choice(wanted, min(len(wanted), MEMBERS_SHOWN // 2), replace=False)
                shown += [pictures.figure(int(row), kind=kind) for row in np.sort(some)]
            name = f"{domain.name}, " if len(found) > 1 else ""
            blocks.append(
                f'<div class="cluster"><h3>{html.escape(name)}cluster {cluster}: {int(kept.sum()):,} of '
                f"{len(members):,}</h3>{''.join(shown)}</div>"
            )
    return "".join(blocks)


def spread(count: int, wanted: int) -> np.ndarray:
    """[<= wanted] int64 places spread over `count`."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64)) if count else np.zeros(0, int)


def removed_pairs(run, stage: str, pictures: Thumbnails) -> str:
    """For each reason a few removed images beside what stands for them, from the least to the most alike."""
    removal = load_removal(run.folder, stage)
    blocks = []
    for number, reason in enumerate(removal.reasons):
        mine = np.flatnonzero((removal.reason == number) & (removal.of >= 0))
        if not len(mine):
            continue
        mine = mine[np.argsort(removal.value[mine], kind="stable")]
        pairs = "".join(
            f'<div class="pair">{pictures.figure(int(removal.rows[k]), "removed", "left")}'
            f"{pictures.figure(int(removal.of[k]), f'{removal.value[k]:.3f}', 'kept')}</div>"
            for k in mine[spread(len(mine), PAIRS_SHOWN)]
        )
        blocks.append(f"<h3>{html.escape(reason)}: {len(mine):,}</h3>{pairs}")
    return "".join(blocks) or "<p>None.</p>"


def removed_examples(run, pictures: Thumbnails) -> str:
    """For each reason without a counterpart a few images, from the smallest to the largest value."""
    blocks = []
    for stage in ("quality", "vehicle", "leaks", "duplicates"):
        removal = load_removal(run.folder, stage)
        for number, reason in enumerate(removal.reasons):
            mine = np.flatnonzero((removal.reason == number) & (removal.of < 0))
            if not len(mine):
                continue
            if reason == "unreadable":
                names = "".join(f"<li>{html.escape(run.images.name(int(row)))}</li>" for row in removal.rows[mine][:20])
                blocks.append(f"<h3>unreadable: {len(mine):,}</h3><ul>{names}</ul>")
                continue
            mine = mine[np.argsort(removal.value[mine], kind="stable")]
            figures = "".join(
                pictures.figure(int(removal.rows[k]), f"{removal.value[k]:.3g}", "left")
                for k in mine[spread(len(mine), EXAMPLES_SHOWN)]
            )
            blocks.append(f"<h3>{html.escape(reason)}: {len(mine):,}</h3>{figures}")
    return "".join(blocks) or "<p>None.</p>"
