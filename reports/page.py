"""The shell of every report: one HTML page that needs no other file and no network."""

import html
from pathlib import Path
from string import Template
from typing import NamedTuple

from datasets.images import UNREADABLE, open_reduced, why_unreadable
from datasets.path_list import PathList, printable
from datasets.transforms import jpeg_reduction
from reports.thumbnail import jpeg_uri
from util.files import write_atomic

THUMB = 144  # px, longer side of the embedded pictures
MARKS = {  # name and drawing: not every font has check marks
    "right": ("right", "M1 6.5 4.5 10 11 2"),
    "wrong": ("wrong", "M2 2 10 10M10 2 2 10"),
    "junk": ("same camera", "M1 6a5 5 0 1 0 10 0a5 5 0 1 0-10 0M2.5 9.5l7-7"),
}
PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


class Section(NamedTuple):
    """id: of links to it. title: text. body: HTML. linked: whether the navigation shows it."""

    id: str
    title: str
    body: str
    linked: bool = True


def write_page(
    file: Path,
    title: str,
    intro: str,
    tiles: dict[str, str],
    facts: dict[str, object],
    sections: list[Section],
    style: str = "",
) -> None:
    """Write the page.

    Args:
        title: text. intro: HTML below it: the protocol.
        tiles: numbers in large type, text by name. facts: what belongs to the numbers: weights, commit, seed.
        style: CSS of this kind of report. Classes `right` and `wrong` frame pictures, `<ol><li>` puts them
            side by side, `charts` holds figures of reports.svg.
    Raises:
        InputError: the file cannot be written.
    """
    text = html.escape
    page = PAGE.substitute(
        title=text(title),
        style=style,
        symbols='<svg width="0" height="0" style="position:absolute" aria-hidden="true">'
        + "".join(
            f'<symbol id="{name}" viewBox="0 0 12 12"><path d="{path}" fill="none" stroke="currentColor" '
            'stroke-width="2.2"/></symbol>'
            for name, (_, path) in MARKS.items()
        )
        + "</svg>",
        intro=intro,
        tiles="".join(f"<div>{text(name)}<b>{text(value)}</b></div>" for name, value in tiles.items()),
        facts="".join(f"<tr><th>{text(k)}</th><td>{text(str(v))}</td></tr>" for k, v in facts.items()),
        links="".join(f'<a href="#{s.id}">{text(s.title)}</a>' for s in sections if s.linked),
        sections="".join(f'<h2 id="{s.id}">{text(s.title)}</h2>{s.body}' for s in sections),
    )
    write_atomic(file, lambda opened: opened.write(page.encode("utf-8", "replace")))


def mark(name: str) -> str:
    """ "right", "wrong" or "same camera" with its drawing."""
    drawing = f'<svg class="mark" aria-hidden="true"><use href="#{name}"/></svg>'
    return f'<b class="{name}">{drawing} {MARKS[name][0]}</b>'


class Pictures:
    """Pictures of files as HTML, each read once; `lost`: {file that cannot be opened: why}."""

    def __init__(self):
        self.uris: dict[Path, str] = {}
        self.lost: dict[Path, str] = {}

    def one(self, paths: PathList, row: int, alt: str) -> str:
        """The picture, or a box that says that there is none. alt: HTML."""
        file, name = paths[row], html.escape(printable(paths.relative(row)))
        if file not in self.uris and file not in self.lost:
            try:
                image, _ = open_reduced(file, lambda w, h: jpeg_reduction((0, 0, w, h), (THUMB, THUMB)))
                self.uris[file] = jpeg_uri(image, THUMB)
            except UNREADABLE as error:
                self.lost[file] = html.escape(printable(why_unreadable(error)))
        if file in self.lost:
            return f'<div class="gone" title="{self.lost[file]}">{name} cannot be opened</div>'
        return f'<img src="{self.uris[file]}" alt="{alt}" title="{name}">'
