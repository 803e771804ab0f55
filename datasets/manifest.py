"""What to train on: a folder or a manifest -> a list of image paths."""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from util.errors import InputError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MANIFEST_ENDINGS = (".csv", ".tsv", ".jsonl", ".txt")


class PathList:
    """Paths in one contiguous buffer: a million paths are two arrays, shared by forked workers."""

    def __init__(self, root: Path, paths: Iterable[str]):
        """Paths are relative to `root` or absolute."""
        encoded = [os.fsencode(path) for path in paths]
        self.root = Path(root)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def relative(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())

    def __getitem__(self, index: int) -> Path:
        return self.root / self.relative(index)

    def sha256(self) -> str:
        """Identity of the list: the relative paths and their order, not the root."""
        digest = hashlib.sha256(self._ends.tobytes())
        digest.update(self._bytes.tobytes())
        return digest.hexdigest()


def list_images(data_path: str | Path, split: str | None = None) -> PathList:
    """All images of a folder (recursively; its `train/` if there is one) or of a manifest.

    Args:
        data_path: a folder, or a .csv/.tsv (column `path`), .jsonl (key `path`) or .txt (one a
            line) whose paths are absolute or relative to the file.
        split: keep the rows whose column `split` has this value (manifests with columns only).
    Raises:
        InputError: nothing there, no image, no such column or split.
    """
    data_path = Path(data_path)
    if not data_path.exists():
        raise InputError(
            f"--data_path {data_path} does not exist: give a folder of images or a manifest "
            f"({', '.join(MANIFEST_ENDINGS)})"
        )
    if data_path.is_dir():
        if split is not None:
            raise InputError(
                f"--split {split} needs a manifest with a column 'split', but --data_path {data_path} "
                "is a folder: point --data_path at the sub-folder instead"
            )
        return _list_folder(data_path)
    rows = read_manifest(data_path)
    if split is not None:
        found = Counter(row.get("split") for row in rows)
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            known = ", ".join(sorted(str(name) for name in found if name)) or "no column 'split'"
            raise InputError(f"{data_path} has no row with split '{split}': it has {known}")
    paths = PathList(data_path.parent, [row["path"] for row in rows])
    _check_first_exist(paths, data_path)
    return paths


def read_manifest(file: str | Path) -> list[dict[str, str]]:
    """Rows of a manifest as dicts that all have a non-empty `path`.

    Raises:
        InputError: unknown ending, no column `path`, a broken or empty row, no rows.
    """
    file = Path(file)
    ending = file.suffix.lower()
    if ending not in MANIFEST_ENDINGS:
        raise InputError(
            f"{file} is neither a folder nor a manifest: manifests end in {', '.join(MANIFEST_ENDINGS)}"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    if ending == ".txt":
        rows = [{"path": line.strip()} for line in text.splitlines() if line.strip()]
    elif ending == ".jsonl":
        rows = [_read_json_row(file, number, line) for number, line in _numbered_lines(text)]
    else:
        reader = csv.DictReader(text.splitlines(), delimiter="\t" if ending == ".tsv" else ",")
        if "path" not in (reader.fieldnames or []):
            header = ", ".join(reader.fieldnames or ["nothing"])
            raise InputError(f"{file} has no column 'path': its first line holds {header}")
        rows = []
        for row in reader:
            if not row["path"]:
                raise InputError(f"{file}, line {reader.line_num}: the column 'path' is empty")
            rows.append(row)
    if not rows:
        raise InputError(f"{file} lists no image: it has no row")
    return rows


def _numbered_lines(text: str):
    return ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())


def _read_json_row(file: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {number} is not JSON: {error.msg}") from error
    if not isinstance(row, dict) or not row.get("path"):
        raise InputError(f"{file}, line {number} has no key 'path': write one JSON object a line")
    return row


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


def _check_first_exist(paths: PathList, manifest: Path) -> None:
    """A manifest moved away from its images is found now, not image by image."""
    first = range(min(len(paths), 50))
    if not any(paths[index].exists() for index in first):
        raise InputError(
            f"none of the first {len(first)} images of {manifest} exists, for example {paths[0]}: "
            "paths in a manifest are relative to the manifest's own folder"
        )
