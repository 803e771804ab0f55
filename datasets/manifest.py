"""What to train on: a folder or a manifest -> a list of image paths."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets.packed import PackedImages, is_packed
from datasets.path_list import PathList
from util.errors import InputError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MANIFEST_ENDINGS = (".csv", ".tsv", ".jsonl", ".txt")


def list_images(data_path: str | Path, split: str | None = None) -> PathList | PackedImages:
    """All images of a folder (recursively; its `train/` if there is one), a manifest, a packed or curated set.

    Args:
        data_path: a folder, or a .csv/.tsv (column `path`), .jsonl (key `path`) or .txt (one a line) whose paths are
            absolute or relative to the file.
        split: keep the rows whose column `split` has this value (manifests with columns only).
    Raises:
        InputError: nothing there, no image, no such column or split.
    """
    data_path = Path(data_path)
    if not data_path.exists():
        endings = ", ".join(MANIFEST_ENDINGS)
        raise InputError(f"--data_path {data_path} does not exist: give a folder of images or a manifest ({endings})")
    if is_packed(data_path):
        if split is not None:
            raise InputError(
                f"--split {split}: the packed set {data_path} has no splits; drop --split, or pack this one alone with "
                f"python -m tools.pack --split {split}"
            )
        return PackedImages(data_path)
    if is_curated(data_path):
        data_path = data_path / "manifest.csv"
    if data_path.is_dir():
        if split is not None:
            raise InputError(
                f"--split {split} needs a manifest with a column 'split', but --data_path {data_path} is a folder: "
                "point --data_path at the sub-folder instead"
            )
        return _list_folder(data_path)
    found: set[str | None] = set()

    def chosen() -> Iterator[str]:
        for row in iterate_manifest(data_path):
            found.add(row.get("split"))
            if split is None or row.get("split") == split:
                yield row["path"]

    paths = PathList(data_path.parent, chosen())
    if not len(paths):
        known = ", ".join(sorted(str(name) for name in found if name)) or "no column 'split'"
        raise InputError(f"{data_path} has no row with split '{split}': it has {known}")
    check_first_exist(paths, data_path)
    return paths


def is_curated(folder: Path) -> bool:
    """Whether a folder is the output of main_curate.py, whose images are those of its manifest.csv."""
    return (folder / "curation.json").is_file() and (folder / "manifest.csv").is_file()


def read_manifest(file: str | Path) -> list[dict[str, str]]:
    """Rows of a manifest as dicts that all have a non-empty `path`; raises as `iterate_manifest`."""
    return list(iterate_manifest(file))


def iterate_manifest(file: str | Path) -> Iterator[dict[str, str]]:
    """The rows of a manifest, one at a time: a million rows are never in memory together.

    Raises:
        InputError: unknown ending, no column `path`, a broken or empty row, no rows.
    """
    file = Path(file)
    ending = file.suffix.lower()
    if ending not in MANIFEST_ENDINGS:
        raise InputError(f"{file} is neither a folder nor a manifest: manifests end in {', '.join(MANIFEST_ENDINGS)}")
    count = 0
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            for row in _rows(file, ending, opened):
                count += 1
                yield row
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    if not count:
        raise InputError(f"{file} lists no image: it has no row")


def _rows(file: Path, ending: str, opened) -> Iterator[dict[str, str]]:
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
            if not isinstance(row, dict) or not isinstance(row.get("path"), str) or not row["path"]:
                raise InputError(
                    f"{file}, line {number} has no text under the key 'path': write one JSON object a line"
                )
            yield row
        return
    reader = csv.DictReader(opened, delimiter="\t" if ending == ".tsv" else ",")
    if "path" not in (reader.fieldnames or []):
        header = ", ".join(reader.fieldnames or ["nothing"])
        raise InputError(f"{file} has no column 'path': its first line holds {header}")
    for row in reader:
        if not row["path"]:
            raise InputError(f"{file}, line {reader.line_num}: the column 'path' is empty")
        yield row


def cell(row: dict, column: str) -> str:
    """A value of a table as text; '' where there is none (0 is a value)."""
    value = row.get(column)
    return "" if value is None else str(value).strip()


def published_note(counts: dict[str, int], published: dict[str, int]) -> str:
    """How counts differ from the published ones; what is not there does not count as different."""
    other = [f"{name} {counts[name]:,} instead of {n:,}" for name, n in published.items() if counts.get(name, n) != n]
    return f"other counts than published: {', '.join(other)}" if other else "all counts as published"


def _list_folder(folder: Path) -> PathList:
    root = folder / "train" if (folder / "train").is_dir() else folder
    found: list[str] = []
    others: Counter[str] = Counter()
    for parent, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        relative = os.path.relpath(parent, root)
        for name in sorted(files):
            ending = os.path.splitext(name)[1].lower()
            if ending in IMAGE_ENDINGS:
                found.append(os.path.normpath(os.path.join(relative, name)))
            else:
                others[ending or "no ending"] += 1
    if not found:
        seen = ", ".join(f"{ending} ({count})" for ending, count in others.most_common(5))
        raise InputError(
            f"no image under {root} (looked for {' '.join(IMAGE_ENDINGS)} in all sub-folders); "
            + (f"{others.total()} files had other endings: {seen}" if others else "it is empty")
        )
    return PathList(root, found)


def check_first_exist(paths: PathList, manifest: Path) -> None:
    """A manifest moved away from its images is found now, not image by image."""
    first = range(min(len(paths), 50))
    if not any(paths[index].exists() for index in first):
        raise InputError(
            f"none of the first {len(first)} images of {manifest} exists, for example {paths[0]}: "
            "paths in a manifest are relative to the manifest's own folder"
        )
