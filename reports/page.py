"""The page of every report: one HTML file that needs no other file and no network."""

import base64
import html
import io
import re
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from datasets.images import UNREADABLE, open_rgb, why_unreadable
from util.files import write_atomic

THUMB = 144  # px, longer side of the embedded pictures
MARKS = {"right": "right", "wrong": "wrong", "junk": "same camera"}  # page.html has their drawings: fonts lack some
SHELL = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
INK = "#010203"  # in figures; the page puts its own colour of text there, so that it suits light and dark
matplotlib.rcParams.update(
    dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    | {"axes.facecolor": "none", "legend.facecolor": "none", "axes.grid": True, "grid.color": "#8884", "font.size": 9}
    | {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False}
    | {"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False}  # names may hold a "$"
)


class Html(str):
    """Text that is HTML already; any other is escaped where it becomes part of one."""


def html_of(content: object) -> Html:
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. Content and attributes are escaped; `kind` is its class; attributes that are empty are left out."""
    given = "".join(
        f' {"class" if key == "kind" else key.replace("_", "-")}="{html_of(value)}"'
        for key, value in attributes.items()
        if value != "" or key == "alt"
    )
    inside = "".join(map(html_of, content))
    return Html(f"<{name}{given}>{inside}" + ("" if name in ("img", "br") else f"</{name}>"))


BREAK = tag("br")


def join(between: object, parts) -> Html:
    return Html(html_of(between).join(map(html_of, parts)))


def mark(kind: str, words: str = "") -> Html:
    """ "right", "wrong" or "same camera" with its drawing."""
    drawing = Html(f'<svg class="mark" aria-hidden="true"><use href="#{kind}"/></svg>')
    return tag("b", drawing, " ", words or MARKS[kind], kind=kind)


def percent(share: float, digits: int = 1, sign: str = "", missing: str = "-") -> str:
    """A share of [0, 1] in percent; NaN: `missing`."""
    return missing if np.isnan(share) else f"{100 * share:.{digits}f}{sign}"


def jpeg_uri(picture: Image.Image, side: int = THUMB, quality: int = 75) -> str:
    """An RGB picture as a data URI, shrunk to at most `side` px where it is larger."""
    data, small = io.BytesIO(), picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    small.save(data, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def image(picture: Image.Image, alt: str, side: int = THUMB) -> Html:
    return tag("img", src=jpeg_uri(picture, side, 85), alt=alt)


class Pictures:
    """Pictures of files as HTML, each read once; lost: {file that cannot be opened: why}."""

    def __init__(self):
        self.uris: dict[tuple, str] = {}
        self.lost: dict[Path, str] = {}

    def one(self, file: Path, name: str, alt: str = "", box: tuple[int, ...] | None = None) -> Html:
        """The picture, or what lies in the box (left, top, right, bottom); or words that there is none."""
        if (file, box) not in self.uris and file not in self.lost:
            try:
                picture = open_rgb(file)
                self.uris[file, box] = jpeg_uri(picture.crop(box) if box else picture)
            except UNREADABLE as error:
                self.lost[file] = why_unreadable(error)
        if file in self.lost:
            return tag("div", name, " cannot be opened", kind="gone", title=self.lost[file])
        return tag("img", src=self.uris[file, box], alt=alt, title=name)


def card(picture: Html, *words: object, kind: str = "") -> Html:
    """A picture of a row of pictures, with words below; kind: right, wrong or junk frames it."""
    return tag("li", picture, *words, kind=kind)


def cards(items: list[Html], kind: str = "", empty: str = "None.") -> Html:
    """Pictures side by side."""
    return tag("ol", *items, kind=kind) if items else tag("p", empty)


def table(head: list, rows: list[list], kind: str = "") -> Html:
    """A table that scrolls by itself where it is too wide; numbers to the right; a cell may be a `td` of its own."""

    def cell(content: object) -> Html:
        if isinstance(content, Html) and content.startswith("<t"):
            return content
        return tag("td", content, kind="n" if re.match(r"[-\d.,]+( %| x|$| <)|absent", str(content)) else "")

    first = tag("thead", tag("tr", *(tag("th", name) for name in head))) if head else Html()
    lines = (tag("tr", *map(cell, row)) for row in rows)
    return tag("div", tag("table", first, *lines, kind=kind), kind="scroll")


def facts_table(values: dict[str, object]) -> Html:
    """A row a value."""
    texts = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
    return tag("table", *(tag("tr", tag("th", name), tag("td", text)) for name, text in texts.items()), kind="facts")


def folded(title: str, content: Html, is_open: bool = False) -> Html:
    """Content behind a click on its title."""
    return tag("details", tag("summary", title), content, open="open" * is_open)


def confusion_table(names: list[str], counts: np.ndarray, as_shares: bool = False) -> Html:
    """Rows: what is true, columns: the answers; shaded by the share of the row, and the right share at its end.

    Args:
        counts: [K, K] integers. as_shares: show % of the row instead of counts.
    """
    rows = []
    for i, row in enumerate(counts.tolist()):
        total, cells = sum(row), [tag("th", names[i])]
        for j, count in enumerate(row):
            share = count / max(total, 1)
            text = percent(share) if as_shares and count and total else f"{count:,}" if count or as_shares else ""
            colour = "23,128,61" if i == j else "194,38,29"
            shade = f"background:rgba({colour},{0.6 * share:.2f})"
            cells.append(tag("td", tag("b", text) if i == j else text if total else "", style=shade, kind="n"))
        rows.append([*cells, percent(row[i] / total) if total else "-"])
    return table(["truth \\ answer", *names, "right, %"], rows, "matrix")


def new_axes(x_title: str, y_title: str, size: tuple[float, float] = (4.2, 2.6)) -> Axes:
    """Axes of a figure of their own, which `Page.figure` takes; size: inches."""
    axes = Figure(size, layout="constrained").subplots()
    axes.set(xlabel=x_title, ylabel=y_title)
    return axes


def png_bytes(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, dpi=110, facecolor="white")
    return data.getvalue()


def inline_svg(figure: Figure, words: str) -> Html:
    """A figure as an element of the page, in its colours; words: for those who do not see it."""
    data = io.StringIO()
    figure.savefig(data, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root, inside = re.search(r"(<svg.*?>)(.*)</svg>", data.getvalue(), re.S).groups()
    inside = re.sub(r' id="\w+_\d+"', "", inside).replace(INK, "currentColor")
    box = re.search(r'viewBox="[^"]*"', root)[0]
    return Html(f'<svg {box} role="img" aria-label="{html_of(words)}">{inside}</svg>')


class Page:
    """A page that grows section by section; content that is not `Html` is escaped.

    Args:
        protocol: the line that belongs to the numbers.
        tiles: numbers in large type, text by name. facts: what belongs to them: weights, commit, seed.
        style: CSS of this page alone.
    """

    def __init__(
        self, title: str, protocol: str = "", tiles: dict | None = None, facts: dict | None = None, style: str = ""
    ):
        self.title, self.style, self.tiles, self.facts = title, style, tiles or {}, facts or {}
        self.intro = tag("p", tag("code", protocol)) if protocol else Html()
        self.links: list[Html] = []
        self.body: list[Html] = []

    def section(self, title: str, *words: object) -> None:
        """Begin a section, with a paragraph of words."""
        name = re.sub(r"\W+", "-", title.lower()).strip("-")
        self.links.append(tag("a", title, href=f"#{name}"))
        self.add(tag("h2", title, id=name), *([tag("p", *words)] if words else []))

    def add(self, *content: object) -> None:
        self.body.extend(map(html_of, content))

    def note(self, *words: object) -> None:
        self.add(tag("p", *words))

    def figure(self, title: str, axes: Axes, caption: str = "", kind: str = "chart") -> None:
        """A drawing of matplotlib; several fit in a row; kind: "chart", "chart large" or "chart wide"."""
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend()
        drawing = inline_svg(axes.figure, f"{title}: {caption}")
        self.add(tag("figure", tag("h3", title), drawing, tag("figcaption", caption), kind=kind))

    def histogram(self, title: str, shares: np.ndarray, x_title: str, y_title: str, caption: str) -> None:
        """How often shares of [0, 1] occur, in %."""
        axes = new_axes(f"{x_title}, %", y_title)
        axes.hist(100 * shares, 20, range=(0, 100))
        self.figure(title, axes, caption)

    def shares(self, title: str, edges: np.ndarray, parts: dict, titles: tuple[str, str], caption: str) -> None:
        """Histograms of two sets, each in % of its own; parts: {name: (values, how often each occurs)}."""
        axes = new_axes(titles[0], f"% of the {titles[1]}")
        for (name, (values, counts)), kind in zip(parts.items(), ("stepfilled", "step")):
            weights = 100 * counts / max(counts.sum(), 1)
            axes.hist(
                values.clip(*edges[[0, -1]]), edges, weights=weights, histtype=kind, alpha=0.7, lw=1.5, label=name
            )
        self.figure(title, axes, caption)

    def first_k(self, title: str, shares: list[float], y_title: str, words: str) -> None:
        """What share of [0, 1] has its right answer among the first 1, 2, ... k."""
        axes = new_axes("k", f"% of the {y_title}")
        axes.plot(range(1, len(shares) + 1), [100 * share for share in shares])
        axes.locator_params(axis="x", integer=True)
        some = ", ".join(f"{k}: {percent(shares[k - 1])} %" for k in (1, 2, 5, 10, 20, 50) if k <= len(shares))
        self.figure(title, axes, f"{words} {some}.")

    def rank_lists(self, lists: list[tuple]) -> None:
        """Of each (title, words, own cards, found cards) an article: what was asked, beside it what was found."""
        for title, words, own, found in lists:
            beside = tag("div", cards(own, "own"), cards(found), kind="list")
            self.add(tag("article", tag("h3", title, tag("span", words)), beside))
        if not lists:
            self.note("None.")

    def write(self, file: Path) -> None:
        """Write the page atomically."""
        text = SHELL.substitute(
            title=html_of(self.title),
            style=self.style,
            intro=self.intro,
            tiles="".join(tag("div", name, tag("b", value)) for name, value in self.tiles.items()),
            facts=facts_table(self.facts),
            links="".join(self.links),
            sections="\n".join(self.body),
        )
        write_atomic(file, lambda opened: opened.write(text.encode("utf-8", "backslashreplace")))
