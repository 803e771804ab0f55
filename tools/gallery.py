"""An index that lives: pictures by path, what a table says of them, and their embeddings, in a folder that several
processes may read while one writes.

index.json holds what the embeddings depend on, the names of the segments and which of their rows are removed. A segment
is never changed: `embeddings` [n, D] float16 of unit length and `rows`, a JSON object a line, in one .npz whose own
checksums tell damage. A change writes new segments first and then replaces index.json, so that it is there wholly or
not at all.
"""

import contextlib
import json
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from datasets.images import Unreadable, boxed
from datasets.path_list import PACK_HEADER, PackedImages, PathList
from datasets.tables import TABLE_ENDINGS, iterate_table, moment
from util.cli import Progress
from util.dist import claim
from util.errors import InputError
from util.files import ZIP_ERRORS, read_json, write_atomic

SEGMENT_BYTES, SEGMENT_ROWS = 1 << 26, 1 << 16  # of embeddings in a segment, at most
SMALL_SEGMENTS = 64  # more that are not half full are joined
BLOCK_NUMBERS = 1 << 22  # of the gallery and of cosines, held at a time; more are slower
SIGNS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
NUMBER = re.compile(r"[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[-+]?\d{1,2})?", re.ASCII | re.IGNORECASE)
CURE = "remove the folder and add its pictures again"


class Changed(Exception):
    """A writer joined segments while they were read: open the index again."""


class Condition:
    """COLUMN=VALUE, also != < <= > >=: numbers are compared as numbers, ISO times as times (UTC where they name no
    zone), all else as text. A picture without a value meets no condition."""

    def __init__(self, words: str):
        found = re.fullmatch(r"\s*([^=!<>]+?)\s*(!=|<=|>=|=|<|>)\s*([^=!<>\s].*?)\s*", words, re.DOTALL)
        if not found:
            raise InputError(f"--where {words[:80]!r}: give COLUMN=VALUE, or one of != < <= > >= between them")
        self.words, self.column, self.sign, self.text = words, *found.groups()
        self.kind, self.value = typed(self.text)
        self.odd = 0  # values that have no order beside this one

    def holds(self, text: str | None) -> bool:
        if text is None:
            return False
        kind, value = (self.kind, text) if self.kind == "text" else typed(text)
        if kind == self.kind:
            return SIGNS[self.sign](value, self.value)
        self.odd += self.sign not in ("=", "!=")
        return self.sign == "!="


def typed(text: str) -> tuple[str, int | float | str]:
    """("number", "time" or "text", value)"""
    if NUMBER.fullmatch(text):
        return "number", float(text) if re.search("[.eE]", text) else int(text)
    when = moment(text) if ":" in text or "-" in text else None
    return ("text", text) if when is None else ("time", when)


def as_text(value) -> str | None:
    """A cell as it is kept; None where nothing is known."""
    text = value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)
    return None if text.lower() in ("", "nan") else text


def read_columns(source: str | Path) -> list[str] | None:
    """What a table says of each picture beside its path, as JSON objects of texts; None: it is no table, or says
    nothing."""
    source = Path(source)
    file = source / "manifest.csv" if (source / "curation.json").is_file() else source  # as `list_images` reads it
    if file.suffix.lower() not in TABLE_ENDINGS[:-1] or not file.is_file():
        return None
    columns = []
    for row in iterate_table(file):
        cells = {name: as_text(value) for name, value in row.items() if name and name != "path"}
        columns.append(json.dumps({name: text for name, text in cells.items() if text is not None}))
    return columns if any(text != "{}" for text in columns) else None


def name_of(images: PathList, number: int) -> str:
    """A picture's name in an index: its absolute path, with #BOX where it has one; of a packed set PACK:NAME."""
    if isinstance(images, PackedImages):
        return f"{os.path.realpath(images.root)}:{images.relative(number)}"
    picture = images[number]
    return os.path.abspath(picture) + str(picture)[len(os.fspath(picture)) :]  # and its box


@cache
def open_pack(folder: str) -> tuple[PackedImages, dict[str, int]]:
    pack = PackedImages(folder)
    return pack, {pack.relative(number): number for number in range(len(pack))}


def split_box(name: str) -> tuple[str, tuple[int, ...] | None]:
    """A name in an index -> the file's, and the box in it."""
    found = re.fullmatch(r"(.*)#(-?\d+),(-?\d+),(-?\d+),(-?\d+)", name, re.DOTALL)
    return (found[1], tuple(map(int, found.groups()[1:]))) if found and not os.path.lexists(name) else (name, None)


def open_named(name: str):
    """What `open_rgb` reads, by the name in an index."""
    for colon in re.finditer(":", name) if not os.path.exists(name) else ():
        folder, inside = name[: colon.start()], name[colon.end() :]
        if os.path.isfile(os.path.join(folder, PACK_HEADER)):
            pack, numbers = open_pack(folder)
            if inside not in numbers:
                raise Unreadable(f"it is no longer in {folder}")
            return pack[numbers[inside]]
    file, box = split_box(name)
    return boxed(Path(file), box)


def search_rows(query: torch.Tensor, blocks: Iterable[tuple], k: int, total: int = 0) -> tuple:
    """The rows most similar to each query [Q, D]: cosines [Q, min(k, M)] float32, descending, ties in the order of the
    rows, -inf: there are no more; and their numbers. blocks: (numbers [n], rows [n, D] float), read once; rows with NaN
    are never found. Products are float64, rounded to float32: equal rows have equal cosines, whatever their block.
    """
    q = F.normalize(query.double(), dim=1)
    values, found = q.new_empty((len(q), 0), dtype=torch.float32), q.new_empty((len(q), 0), dtype=torch.int64)
    progress = Progress("searched", total, shown=total > SEGMENT_ROWS)
    for numbers, rows in blocks:
        g = torch.from_numpy(rows).to(q.device).float().double()  # in two steps: straight is half as fast
        cosines = (q @ g.t() / torch.linalg.vector_norm(g, dim=1).clamp_min(1e-12)).float().nan_to_num_(nan=-torch.inf)
        cosines = torch.cat([values, cosines], dim=1)
        numbers = torch.cat([found, torch.from_numpy(numbers).to(q.device).expand(len(q), -1)], dim=1)
        kept = min(k, cosines.shape[1])
        least = cosines.topk(kept, dim=1).values[:, -1:]
        ahead, equal = cosines > least, cosines == least
        chosen = ahead | (equal & (equal.cumsum(dim=1) <= kept - ahead.sum(dim=1, keepdim=True)))  # of ties the first
        values, found = cosines[chosen].view(-1, kept), numbers[chosen].view(-1, kept)
        progress.update(progress.done + len(g))
    progress.close()
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values.cpu().numpy(), found.gather(1, order).cpu().numpy()


class Gallery:
    """The pictures of an index, as they were when it was opened. Numbers of rows count through the segments, removed
    rows too; they hold until `tidy`. Who changes it holds the folder's lock."""

    def __init__(self, folder: Path):
        self.folder, self.file = Path(folder), Path(folder) / "index.json"
        if (self.folder / "embeddings.npy").is_file():
            cure = "remove it, and the same --gallery embeds its pictures again"
            raise InputError(f"{folder} is an index of an older version, which takes no additions: {cure}")
        if not self.file.is_file():
            raise InputError(f"{folder} holds no index: give --gallery PHOTOS to make one, or the right --index")
        self.about = read_json(self.file, CURE)
        self.about.setdefault("segments", [])  # until the first pictures are added
        try:
            self.segments = [(str(s["file"]), np.zeros(s["rows"], dtype=bool)) for s in self.about["segments"]]
            for (_, removed), entry in zip(self.segments, self.about["segments"]):
                removed[entry["removed"]] = True
            self.next = int(self.about.setdefault("next", 0))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{self.file} is damaged ({error!r}): {CURE}") from error
        self.ends = np.cumsum([0, *(len(removed) for _, removed in self.segments)])
        self.count = sum(int((~removed).sum()) for _, removed in self.segments)

    def _read(self, segment: int, what: str) -> np.ndarray:
        file = self.folder / self.segments[segment][0]
        try:
            with np.load(file, allow_pickle=False) as stored:
                values = stored[what]
            if what == "embeddings" and (values.ndim != 2 or len(values) != len(self.segments[segment][1])):
                raise ValueError(f"{values.shape}, {len(self.segments[segment][1])} rows expected")
            return values
        except ZIP_ERRORS as error:
            if isinstance(error, FileNotFoundError) and read_json(self.file, CURE) != self.about:
                raise Changed from error
            raise InputError(f"{file} is damaged ({error}): {CURE}") from error

    def _lines(self, segment: int) -> list[bytes]:
        lines = self._read(segment, "rows").tobytes().split(b"\n")
        if len(lines) != len(self.segments[segment][1]):
            raise InputError(f"{self.folder / self.segments[segment][0]} is damaged ({len(lines)} rows): {CURE}")
        return lines

    def scan(self) -> Iterator[tuple[int, dict]]:
        """(number, {path, stamp, columns}) of each picture."""
        for segment, (_, removed) in enumerate(self.segments):
            lines, start = self._lines(segment), int(self.ends[segment])
            for row in np.flatnonzero(~removed).tolist():
                yield start + row, json.loads(lines[row])

    def _by_segment(self, numbers: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
        """(segment, rows in it), in order."""
        places = ((int(np.searchsorted(self.ends, n, side="right")) - 1, n) for n in sorted(numbers))
        for segment, group in groupby(places, operator.itemgetter(0)):
            yield segment, [number - int(self.ends[segment]) for _, number in group]

    def rows(self, numbers: Iterable[int]) -> dict[int, dict]:
        found = {}
        for segment, rows in self._by_segment(numbers):
            lines = self._lines(segment)
            found |= {int(self.ends[segment]) + row: json.loads(lines[row]) for row in rows}
        return found

    def features(self, numbers: Iterable[int]) -> np.ndarray:
        """[n, D] float16, in the order of the numbers, which ascend."""
        return np.concatenate([self._read(segment, "embeddings")[rows] for segment, rows in self._by_segment(numbers)])

    def _chosen(self, conditions: list[Condition]) -> list[np.ndarray]:
        """Which rows of each segment are there and meet all conditions."""
        if not conditions:
            return [~removed for _, removed in self.segments]
        chosen = np.zeros(self.ends[-1], dtype=bool)
        chosen[[number for number, _ in choose(self, conditions)]] = True
        return np.split(chosen, self.ends[1:-1])

    def search(self, query: torch.Tensor, k: int, conditions: list[Condition]) -> tuple[np.ndarray, np.ndarray, int]:
        """(cosines, numbers of `search_rows` among the pictures that meet all conditions, how many these are)."""
        chosen = self._chosen(conditions)

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for segment, kept in enumerate(chosen):
                if not (rows := np.flatnonzero(kept)).size:
                    continue
                values = self._read(segment, "embeddings")
                step = max(1, BLOCK_NUMBERS // (len(query) + values.shape[1]))
                for start in range(0, len(rows), step):
                    own = rows[start : start + step]
                    yield own + self.ends[segment], values[own]

        total = sum(int(kept.sum()) for kept in chosen)
        return *search_rows(query, blocks(), k, total), total

    def commit(self, rows: list[dict], features: np.ndarray | None, gone: Iterable[int] = ()) -> None:
        """Add rows with their `features` [n, D] and remove others, in one step that is on disk when this returns."""
        for segment, dead in self._by_segment(gone):
            self.segments[segment][1][dead] = True
        step = segment_rows(features.shape[1]) if rows else 1
        lines = [json.dumps(row).encode() for row in rows]
        for start in range(0, len(rows), step):
            self._write(lines[start : start + step], features[start : start + step])
        self._replace()

    def _write(self, lines: list[bytes], features: np.ndarray) -> None:
        name, self.next = f"segment-{self.next:08d}.npz", self.next + 1  # a name is never used twice
        parts = {"rows": np.frombuffer(b"\n".join(lines), np.uint8), "embeddings": features.astype(np.float16)}
        write_atomic(self.folder / name, lambda opened: np.savez(opened, **parts))
        self.about["width"] = features.shape[1]
        self.segments.append((name, np.zeros(len(lines), dtype=bool)))

    def _replace(self) -> None:
        dead = [np.flatnonzero(removed).tolist() for _, removed in self.segments]
        kept = [{"file": name, "rows": len(of), "removed": gone} for (name, of), gone in zip(self.segments, dead)]
        text = json.dumps(self.about | {"next": self.next, "segments": kept})
        write_atomic(self.file, lambda opened: opened.write(text.encode()))
        self.__init__(self.folder)

    def tidy(self) -> None:
        """Write anew what is removed to more than half, and join many small segments; readers open the index again."""
        live = [int((~removed).sum()) for _, removed in self.segments]
        chosen = {i for i, (_, removed) in enumerate(self.segments) if 2 * live[i] < len(removed)}
        limit = segment_rows(self.about.get("width", 1))
        small = {i for i, count in enumerate(live) if 2 * count < limit}
        if chosen := chosen | (small if len(small) > SMALL_SEGMENTS else set()):
            lines, parts = [], []
            for i in sorted(chosen):
                kept, own = np.flatnonzero(~self.segments[i][1]), self._lines(i)
                if lines and len(lines) + len(kept) > limit:
                    self._write(lines, np.concatenate(parts))
                    lines, parts = [], []
                lines += [own[row] for row in kept]
                parts.append(self._read(i, "embeddings")[kept])
            if lines:
                self._write(lines, np.concatenate(parts))
            self.segments = [segment for i, segment in enumerate(self.segments) if i not in chosen]
            self._replace()
        self.sweep()

    def sweep(self) -> None:
        """Delete what no list names: segments that were joined, and what a killed writer left."""
        named = {name for name, _ in self.segments}
        for file in [*self.folder.glob("segment-*.npz"), *self.folder.glob(".*.tmp"), *self.folder.glob("adding*.npy")]:
            if file.name not in named:
                file.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "adding.parts", ignore_errors=True)


def segment_rows(width: int) -> int:
    return max(1, min(SEGMENT_ROWS, SEGMENT_BYTES // (2 * width)))


def choose(index, conditions: list[Condition]) -> Iterator[tuple[int, dict]]:
    """(number, row) of the pictures that meet all conditions; a column that no picture has is refused."""
    names = {"path"}
    for number, row in index.scan():
        cells = row["columns"] | {"path": row["path"]}
        names |= cells.keys()
        if all([condition.holds(cells.get(condition.column)) for condition in conditions]):
            yield number, row
    for condition in conditions:
        if condition.column not in names:
            known = ", ".join(sorted(names))
            raise InputError(
                f"--where {condition.words}: no picture has a column '{condition.column}', there is {known}"
            )
        if condition.odd:
            what = f"{condition.odd} pictures have a {condition.column} that is no {condition.kind} and are left out"
            print(f"--where {condition.words}: {what}")


def compare(index, images: PathList, columns: list[str] | None) -> tuple[list[int], dict, dict, dict[str, int]]:
    """What is to be done to add pictures: (numbers to embed, {number: (row that an embedding replaces, its columns)},
    {number: row of which the columns alone are new}, counts). The same picture: the same name and stamp."""
    names: dict[str, int] = {}
    for number in range(len(images)):
        names.setdefault(name_of(images, number), number)
    todo, old, renamed = set(names.values()), {}, {}
    for at, row in index.scan():
        if (number := names.get(row["path"])) is None:
            continue
        if row["stamp"] != images.stamp(number):
            old[number] = at, row["columns"]
            continue
        todo.discard(number)
        if columns and columns[number] != json.dumps(row["columns"]):
            renamed[number] = at
    counts = {"already": len(names) - len(todo), "columns_changed": len(renamed), "twice": len(images) - len(names)}
    return sorted(todo), old, renamed, counts


def make_row(images: PathList, columns: list[str] | None, number: int, old: dict) -> dict:
    """What an index keeps of a picture; the columns it had stay where `columns` says nothing."""
    cells = json.loads(columns[number]) if columns else old.get(number, (0, {}))[1]
    return {"path": name_of(images, number), "stamp": images.stamp(number), "columns": cells}


def latest(job: Callable[[], tuple]):
    """What a reader does, from the start again where a writer joined segments meanwhile."""
    while True:
        with contextlib.suppress(Changed):
            return job()


def claim_index(folder: Path, header: dict) -> None:
    """Make an index, or see that the one there is of the same encoder."""
    if not (folder / "embeddings.npy").is_file():  # `Gallery` refuses it
        is_new = not (folder / "index.json").is_file()
        first = {"layout": 2, "engine": "exact"} if is_new else {"layout": 2}
        claim(folder / "index.json", first | header, "search index")
