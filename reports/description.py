"""The page of a description run: every kept and removed text, with the images that ground it."""

from collections import Counter
from pathlib import Path

from datasets.images import UNREADABLE, open_rgb
from datasets.path_list import PathList
from reports.page import Html, Page, facts_table, folded, jpeg_uri, table, tag

THUMBNAIL = 80  # px, longer side


def write_description_report(
    file: Path, title: str, metrics: dict, lists: dict[str, list[dict]], paths: PathList | None, shown: int
) -> None:
    """Write the page.

    Args:
        metrics: the numbers of the run.
        lists: "kept" and "removed", rows with `text`, `kind` and, where known, `usage`, `gap`, `images` (indices into
            `paths`, best first); removed ones also `reason` and `detail`.
        paths: the images, or None when nothing was grounded.
        shown: texts that get pictures, spread evenly over each list.
    """
    page, pictures = Page(title), Backgrounds(paths)
    page.section("Numbers")
    page.add(facts_table({name.replace("_", " "): value for name, value in metrics.items()}))
    counts = Counter(row["reason"] for row in lists["removed"])
    page.note("Removed: ", ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "none", ".")
    for name, key, columns in (("kept", "kind", ("usage", "gap")), ("removed", "reason", ("usage", "gap", "detail"))):
        page.section(f"{name.capitalize()} texts")
        for group in sorted({row[key] for row in lists[name]}):
            rows = [row for row in lists[name] if row[key] == group]
            some = max(1, shown * len(rows) // max(len(lists[name]), 1))
            page.add(folded(f"{group}: {len(rows)}", _table(rows, columns, pictures, some), len(rows) <= 30))
    page.style = pictures.style()
    page.write(file)


class Backgrounds:
    """Pictures that are stored once, however many texts they ground: backgrounds of CSS classes."""

    def __init__(self, paths: PathList | None):
        self.paths, self.uris = paths, {}

    def one(self, index: int) -> Html:
        if index not in self.uris:
            try:
                self.uris[index] = jpeg_uri(open_rgb(self.paths[index]), THUMBNAIL, quality=70)
            except UNREADABLE:
                return Html()  # it was readable when it was embedded; the report does without
        name = self.paths.relative(index)
        return tag("span", kind=f"t i{index}", title=name, role="img", aria_label=name)

    def style(self) -> str:
        return "".join(f".i{index}{{background-image:url({uri})}}\n" for index, uri in self.uris.items())


def _table(rows: list[dict], columns: tuple[str, ...], pictures: Backgrounds, shown: int) -> Html:
    columns = [name for name in columns if any(name in row for row in rows)]
    chosen = {len(rows) * i // shown for i in range(shown)} if pictures.paths is not None else set()
    lines = []
    for number, row in enumerate(rows):
        images = row.get("images", []) if number in chosen else []
        cells = [row["text"], *(_short(row.get(name, "")) for name in columns)]
        lines.append([*cells, tag("td", *map(pictures.one, images))])
    return table(["text", *columns, "nearest images" if chosen else ""], lines)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
