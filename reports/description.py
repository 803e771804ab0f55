"""The page of a description run: every kept and removed text, with the images that ground it."""

import html
from collections import Counter

from datasets.images import UNREADABLE, open_rgb
from reports.thumbnail import jpeg_uri

THUMBNAIL = 80  # px, longer side
STYLE = f"""body{{font:15px/1.5 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;width:100%}}td,th{{padding:.15em .8em;border-bottom:1px solid #ddd;
text-align:left}}
.t{{display:inline-block;width:{THUMBNAIL}px;height:{THUMBNAIL}px;margin-right:3px;background-size:contain;
background-repeat:no-repeat;background-position:center}}
summary{{font-weight:bold;cursor:pointer;padding:.3em 0}}"""


def page(title: str, metrics: dict, kept: list[dict], removed: list[dict], paths, shown: int) -> str:
    """One self-contained HTML page.

    Args:
        metrics: the numbers of the run.
        kept, removed: rows with `text`, `kind` and, where known, `usage`, `gap`, `images` (indices into
            `paths`, best first); removed ones also `reason` and `detail`.
        paths: the images, or None when nothing was grounded.
        shown: texts that get pictures, spread evenly over each list.
    """
    pictures: dict[int, str] = {}
    parts = [_numbers(metrics), _removals(removed), "<h2>Kept texts</h2>"]
    for kind, rows in _grouped(kept, "kind"):
        some = max(1, shown * len(rows) // max(len(kept), 1))
        table = _table(rows, ("usage", "gap"), paths, pictures, some)
        parts.append(_folded(f"{kind}: {len(rows)}", table, len(rows) <= 30))
    parts.append("<h2>Removed texts</h2>")
    for reason, rows in _grouped(removed, "reason"):
        some = max(1, shown * len(rows) // max(len(removed), 1))
        table = _table(rows, ("usage", "gap", "detail"), paths, pictures, some)
        parts.append(_folded(f"{reason}: {len(rows)}", table, len(rows) <= 30))
    classes = "".join(f".i{i}{{background-image:url({uri})}}\n" for i, uri in pictures.items())
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{STYLE}\n{classes}</style></head><body><h1>{name}</h1>{''.join(parts)}</body></html>\n"
    )


def _numbers(metrics: dict) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(k.replace('_', ' '))}</td><td>{html.escape(_short(v))}</td></tr>"
        for k, v in metrics.items()
    )
    return f"<h2>Numbers</h2><table>{rows}</table>"


def _removals(removed: list[dict]) -> str:
    counts = Counter(row["reason"] for row in removed)
    return "<p>Removed: " + (", ".join(f"{n} {r}" for r, n in counts.most_common()) or "none") + ".</p>"


def _grouped(rows: list[dict], key: str) -> list[tuple[str, list[dict]]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return sorted(groups.items())


def _folded(title: str, table: str, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>{table}</details>"


def _table(rows: list[dict], columns, paths, pictures: dict[int, str], shown: int) -> str:
    columns = [c for c in columns if any(c in row for row in rows)]
    with_pictures = {len(rows) * i // shown for i in range(shown)} if paths is not None else set()
    lines = []
    for number, row in enumerate(rows):
        cells = [row["text"], *(_short(row.get(c, "")) for c in columns)]
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        images = row.get("images", []) if number in with_pictures else []
        spans = "".join(_picture(i, paths, pictures) for i in images)
        lines.append(f"<tr>{line}<td>{spans}</td></tr>")
    heads = "".join(f"<th>{c}</th>" for c in ("text", *columns, "nearest images" if with_pictures else ""))
    return f"<table><tr>{heads}</tr>{''.join(lines)}</table>"


def _picture(index: int, paths, pictures: dict[int, str]) -> str:
    """A span whose picture is stored once, however many texts it grounds."""
    if index not in pictures:
        try:
            image = open_rgb(paths[index])
        except UNREADABLE:
            return ""  # it was readable when it was embedded; the report does without
        pictures[index] = jpeg_uri(image, THUMBNAIL, quality=70)
    return f'<span class="t i{index}" title="{html.escape(str(paths.relative(index)))}"></span>'


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
