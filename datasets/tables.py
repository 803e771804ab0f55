"""Tables (.csv .tsv .jsonl .txt), one reader for all; labelled images; the counts of published sets."""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from datasets.items import TrainItems
from datasets.path_list import PathList
from util.errors import InputError

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".txt")
PUBLISHED = {  # images, identities and classes as published; another count is said, not refused
    "veri776": {"train": 37_778, "train identities": 575, "query": 1678, "gallery": 11_579, "test": 11_579},
    "vehicleid": {
        "train": 113_346, "train identities": 13_164,
        "test_800": 6493, "test_1600": 13_377, "test_2400": 19_777,
    },
    "veriwild": {
        "train": 277_797, "train identities": 30_671, "query_3000": 3000, "gallery_3000": 38_861,
        "query_5000": 5000, "gallery_5000": 64_389, "query_10000": 10_000, "gallery_10000": 128_517,
    },
    "StanfordCars": {"training images": 8144, "test images": 8041, "classes": 196},
}  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """Images, and what is known of each: the other fields, arrays [n, ...], where there are any; -1: unknown."""

    paths: PathList

    def __len__(self) -> int:
        return len(self.paths)

    def arrays(self) -> dict[str, np.ndarray]:
        found = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: values for name, values in found.items() if values is not None}

    def take(self, rows: np.ndarray):
        """Some of the images, in the order of `rows`."""
        return replace(self, paths=self.paths.take(rows), **{name: v[rows] for name, v in self.arrays().items()})

    def sha256(self, *names: str) -> str:
        """Identity of paths, order and labels, and of the names of the labels."""
        digest = hashlib.sha256((self.paths.sha256() + "\0".join(names)).encode())
        for values in self.arrays().values():
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


class LabelledItems(TrainItems):
    """Item -> what `augment` makes of an image: `imgs` [3, H, W] uint8, and more; its labels as int64, by name."""

    def __init__(self, images: Labelled, augment, seed: int):
        super().__init__(images.paths, getattr(augment, "resize", augment.size), seed)
        self.images, self.augment = images, augment

    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        shown = self.augment(content, rng)
        labels = {k: torch.as_tensor(v[index], dtype=torch.int64) for k, v in self.images.arrays().items()}
        return (shown if isinstance(shown, dict) else {"imgs": shown}) | labels


def iterate_table(file: str | Path, needed: tuple[str, ...] = (), advice: str = "", key: str = "path") -> Iterator:
    """The rows of a table as dicts, one at a time: a million rows are never in memory together. All have a `key`.

    Args:
        needed: columns that must be there, besides `key`. advice: what to say where one is not. key: "" for none.
    Raises:
        InputError: unknown ending, no such column, a broken or empty row, no rows.
    """
    file, count = Path(file), 0
    if file.suffix.lower() not in TABLE_ENDINGS:
        raise InputError(f"{file} is neither a folder nor a manifest: manifests end in {', '.join(TABLE_ENDINGS)}")
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            for count, row in enumerate(_rows(file, opened, key), 1):
                missing = [column for column in needed if column not in row] if count == 1 else ()
                if missing:
                    raise InputError(f"{file} has no column '{missing[0]}': it has {', '.join(row)}{advice}")
                yield row
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    if not count:
        raise InputError(f"{file} lists no image: it has no row")


def _rows(file: Path, opened, key: str) -> Iterator[dict[str, str]]:
    ending = file.suffix.lower()
    if ending == ".txt":
        yield from ({"path": line.strip()} for line in opened if line.strip())
        return
    if ending == ".jsonl":
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{file}, line {number} is not JSON: {error.msg}") from error
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number} is not a JSON object: write one a line")
            if key and not (isinstance(row.get(key), str) and row[key]):
                raise InputError(f"{file}, line {number} has no text under the key '{key}'")
            yield row
        return
    reader = csv.DictReader(opened, delimiter="\t" if ending == ".tsv" else ",")
    if key and key not in (reader.fieldnames or []):
        header = ", ".join(reader.fieldnames or ["nothing"])
        raise InputError(f"{file} has no column '{key}': its first line holds {header}")
    for row in reader:
        if key and not row[key]:
            raise InputError(f"{file}, line {reader.line_num}: the column '{key}' is empty")
        if None in row or None in row.values():
            raise InputError(f"{file}, line {reader.line_num} has another number of fields than the first line")
        yield row


def cell(row: dict, column: str) -> str:
    """A value of a table as text, see `known`."""
    return known(row.get(column))


def known(value) -> str:
    """A value as text; '' where it says that nothing is known: no value, NaN, or -1, by which sets mark junk. pandas
    writes 1 as 1.0 where other cells of the column are empty."""
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", "" if value is None else str(value).strip(), flags=re.ASCII)
    return "" if text.lower() in ("-1", "nan", "null", "<na>") else text


def published_note(counts: dict[str, int], name: str) -> str:
    """How counts differ from those of PUBLISHED[name]; what is not there does not count as different."""
    published = PUBLISHED[name].items()
    if all(counts.get(what, 0) < n / 2 for what, n in published if what in counts):
        return "smaller than the published set"
    other = [f"{what} {counts[what]:,} instead of {n:,}" for what, n in published if counts.get(what, n) != n]
    return f"other counts than published: {', '.join(other)}" if other else "all counts as published"
