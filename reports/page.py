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
from matplotlib.text import Text
from PIL import Image

from datasets.images import Unreadable, open_rgb
from datasets.path_list import printable
from util.files import write_atomic

FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # has letters that Pillow's own lacks
THUMB = 144  # px, longer side of the embedded pictures
MARKS = {"right": "right", "wrong": "wrong", "junk": "left out"}  # page.html has their drawings: fonts lack some
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
    shown = content if isinstance(content, Html) else html.escape("\n".join(map(printable, str(content).split("\n"))))
    return Html(shown)


def join(between: object, parts) -> Html:
    return Html(html_of(between).join(map(html_of, parts)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. Content and attributes are escaped; `kind` is its class; attributes that are empty are left out."""
    kept = {key.replace("kind", "class"): value for key, value in attributes.items() if value != "" or key == "alt"}
    given = "".join(f' {key}="{html_of(value)}"' for key, value in kept.items())
    return Html(f"<{name}{given}>{join('', content)}" + ("" if name in ("img", "br") else f"</{name}>"))


BREAK = tag("br")


def mark(kind: str, words: str = "") -> Html:
    """ "right", "wrong" or "same camera" with its drawing."""
    drawing = Html(f'<svg class="mark" aria-hidden="true"><use href="#{kind}"/></svg>')
    return tag("b", drawing, " ", words or MARKS[kind], kind=kind)


def percent(share: float, sign: str = "", missing: str = "-") -> str:
    """A share of [0, 1] in percent; NaN: `missing`."""
    return missing if np.isnan(share) else f"{100 * share:.2f}{sign}"


def image(picture: Image.Image, alt: str, side: int = THUMB, title: str = "") -> Html:
    """An RGB picture inside the page, shrunk to at most `side` px where it is larger."""
    data, small = io.BytesIO(), picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    small.save(data, "JPEG", quality=80)
    uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return tag("img", src=uri, alt=alt, title=title)


class Pictures:
    """Pictures of files as HTML, each read once; lost: {file that cannot be opened: why}."""

    def __init__(self, side: int = THUMB):
        self.side, self.found, self.lost = side, {}, {}

    def one(self, file: Path, name: str, alt: str = "", box: tuple[int, ...] | None = None) -> Html:
        """The picture, or what lies in the box (left, top, right, bottom); or words that there is none."""
        try:
            if file not in self.lost and (file, alt, box) not in self.found:
                picture = open_rgb(file)
                self.found[file, alt, box] = image(picture.crop(box) if box else picture, alt, self.side, name)
        except Unreadable as error:
            self.lost[file] = str(error)
        gone = tag("div", name, " cannot be opened", kind="gone", title=self.lost.get(file, ""))
        return gone if file in self.lost else self.found[file, alt, box]

    def card(self, file: Path, name: str, *words: object, kind: str = "", alt: str = "", box=None) -> Html:
        """The picture in a row of pictures, with words below; kind: right, wrong or junk frames it."""
        return tag("li", self.one(file, name, alt, box), *words, kind=kind)


def cards(items: list[Html], kind: str = "") -> Html:
    return tag("ol", *items, kind=kind) if items else tag("p", "None.")


def table(head: list, rows: list[list], kind: str = "") -> Html:
    """A table that scrolls by itself where it is too wide; numbers to the right; a cell may be a `td` of its own."""

    def cell(content: object) -> Html:
        content = f"{content:.4g}" if isinstance(content, float) else content
        kind = "n" if re.match(r"[-\d.,]+( %| x|$| \[)|absent", str(content)) else ""
        return content if isinstance(content, Html) and content.startswith("<t") else tag("td", content, kind=kind)

    first = tag("thead", tag("tr", *(tag("th", name) for name in head))) if head else ""
    return tag("div", tag("table", first, *(tag("tr", *map(cell, row)) for row in rows), kind=kind), kind="scroll")


def worst_table(head: list, rows: list[list], shown: int = 15) -> Html:
    """A table of classes, the worst first; those after `shown` are behind a click."""
    more = tag("details", tag("summary", f"{len(rows) - shown:,} more"), table(head, rows[shown:]))
    return join("", [table(head, rows[:shown]), more if len(rows) > shown else ""])


def facts_table(values: dict[str, object]) -> Html:
    return table([], [[tag("th", name), value] for name, value in values.items()], "facts")


def confusion_table(names: list[str], counts: np.ndarray) -> Html:
    """[K, K] integers, rows: what is true, columns: the answers, in % of the row and shaded by it."""
    rows = []
    for i, row in enumerate(counts / counts.sum(axis=1, keepdims=True).clip(1)):
        cells = [tag("th", names[i])]
        for j, share in enumerate(row.tolist()):
            text = percent(share) if share else "0" * bool(row.any())
            shade = f"background:rgba({'23,128,61' if i == j else '194,38,29'},{0.6 * share:.2f})"
            cells.append(tag("td", tag("b", text) if i == j else text, style=shade, kind="n"))
        rows.append([*cells, f"{counts[i].sum():,}"])
    return table(["truth \\ answer, %", *names, "all"], rows, "matrix")


def new_axes(x_title: str, y_title: str) -> Axes:
    """Axes of a figure of their own, which `Page.figure` takes."""
    axes = Figure((4.2, 2.6), layout="constrained").subplots()
    axes.set(xlabel=x_title, ylabel=y_title)
    return axes


class Page:
    """A page that grows section by section; content that is not `Html` is escaped. protocol: the line that belongs to
    the numbers; tiles: numbers in large type, text by name; facts: what belongs to them: weights, commit, seed."""

    def __init__(self, title: str, protocol: str = "", tiles: dict | None = None, facts: dict | None = None):
        self.title, self.tiles, self.facts = title, tiles or {}, facts or {}
        self.intro = tag("p", tag("code", protocol)) if protocol else ""
        self.links, self.body = [], []

    def section(self, title: str, *words: object) -> None:
        name = re.sub(r"\W+", "-", title.lower()).strip("-")
        self.links.append(tag("a", title, href=f"#{name}"))
        self.add(tag("h2", title, id=name), tag("p", *words) if words else "")

    def add(self, *content: object) -> None:
        self.body.extend(map(html_of, content))

    def figure(self, title: str, axes: Axes, caption: str = "") -> None:
        """A drawing of matplotlib as a part of the page, in its colours; several fit in a row."""
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend()
        for text in axes.figure.findobj(Text):
            text.set_text(printable(text.get_text()))  # matplotlib cannot draw every name
        data, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        axes.figure.savefig(data, format="svg", transparent=True, metadata=nothing)
        box, inside = re.search(r'<svg.*?(viewBox="[^"]*").*?>(.*)</svg>', data.getvalue(), re.S).groups()
        inside = re.sub(r' id="\w+_\d+"', "", inside).replace(INK, "currentColor")
        words = html_of(f"{title}: {caption}")  # for those who do not see it
        drawing = Html(f'<svg {box} role="img" aria-label="{words}">{inside}</svg>')
        self.add(tag("figure", tag("h3", title), drawing, tag("figcaption", caption), kind="chart"))

    def first_k(self, title: str, right: list[float]) -> None:
        """What share of [0, 1] has its right answer among the first 1, 2, ... k."""
        axes = new_axes("k", "%")
        axes.plot(range(1, len(right) + 1), [100 * share for share in right])
        some = ", ".join(f"{k}: {percent(right[k - 1])} %" for k in (1, 2, 5, 10, 20, 50) if k <= len(right))
        self.figure(title, axes, f"A right one among the first {some}.")

    def write(self, file: Path) -> None:
        tiles = join("", (tag("div", name, tag("b", value)) for name, value in self.tiles.items()))
        shown = {"title": html_of(self.title), "intro": self.intro, "tiles": tiles, "facts": facts_table(self.facts)}
        text = SHELL.substitute(shown, links=join("", self.links), sections=join("\n", self.body))
        write_atomic(file, lambda opened: opened.write(text.encode("utf-8", "backslashreplace")))
