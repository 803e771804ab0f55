"""The page of a description run: every kept and removed text, with the images that ground it."""

from pathlib import Path

from datasets.path_list import PathList
from reports.page import Page, Pictures, facts_table, table, tag


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
