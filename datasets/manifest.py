"""What to train on: a folder or a manifest -> a list of image paths."""

import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from datasets.images import IMAGE_ENDINGS
from datasets.path_list import PACK_HEADER, PackedImages, PathList, printable
from datasets.tables import TABLE_ENDINGS, iterate_table, split_name
from util.dist import print_main
from util.errors import InputError

HEIC, HIDDEN = (".heic", ".heif"), ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # the latter: folders of systems


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
        endings = ", ".join(TABLE_ENDINGS)
        raise InputError(f"--data_path {data_path} does not exist: give a folder of images or a manifest ({endings})")
    if is_curated(data_path):
        data_path = data_path / "manifest.csv"
    if data_path.is_dir():
        if split is not None:
            raise InputError(
                f"--split {split} needs a manifest with a column 'split', but --data_path {data_path} is a folder or a "
                "packed set: point --data_path at the sub-folder, or pack this split alone (tools.pack --split)"
            )
        return PackedImages(data_path) if (data_path / PACK_HEADER).is_file() else _list_folder(data_path)
    found: set[str | None] = set()

    def chosen() -> Iterator[str]:
        for row in iterate_table(data_path):
            found.add(row.get("split"))
            if split is None or row.get("split") == split_name(split):
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


def _list_folder(folder: Path) -> PathList:
    root = folder / "train" if (folder / "train").is_dir() else folder
    found, passed = walk_images(root)
    seen = ", ".join(f"{what} ({count:,})" for what, count in passed.most_common(12))
    if not found:
        endings = " ".join(IMAGE_ENDINGS)
        raise InputError(
            f"no image under {printable(str(root))} ({endings}); passed over: {seen or 'nothing, it is empty'}"
        )
    if passed:
        print_main(f"{printable(str(root))}: {len(found):,} images; passed over: {seen}")
    return PathList(root, found)


def walk_images(root: Path) -> tuple[list[str], Counter[str]]:
    """(pictures below a folder, relative to it; how much of what was passed over: files by ending, hidden files and
    folders, what is no regular file, folders that cannot be read). A folder is read once, by its real path: links to
    folders come last."""
    found: list[str] = []
    passed: Counter[str] = Counter()
    todo, links = [("", os.path.realpath(root))], deque()
    seen = set(map(str, Path(todo[0][1]).parents))  # a link to what holds the root would list its neighbours
    while todo or links:
        folder, real = todo.pop() if todo else links.popleft()
        if real in seen:
            passed["links to folders that are read already"] += 1
            continue
        seen.add(real)
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            passed[f"folders that cannot be read: {error.strerror}"] += 1
            continue
        below = []
        for entry in entries:
            relative, ending = os.path.join(folder, entry.name), os.path.splitext(entry.name)[1].lower()
            is_folder = entry.is_dir()
            if entry.name.startswith(".") or entry.name in HIDDEN:
                passed["hidden folders" if is_folder else "hidden files"] += 1
            elif is_folder and entry.is_symlink():
                links.append((relative, os.path.realpath(entry.path)))
            elif is_folder:
                below.append((relative, os.path.join(real, entry.name)))
            elif ending not in IMAGE_ENDINGS:
                passed[f"{ending or 'no ending'}{', which needs a plug-in' * (ending in HEIC)}"] += 1
            elif entry.is_file():
                found.append(relative)
            else:
                passed["no regular files"] += 1
        todo += reversed(below)
    return found, passed


def check_first_exist(paths: PathList, manifest: Path) -> None:
    """A manifest moved away from its images is found now, not image by image."""
    first = range(min(len(paths), 50))
    if not any(os.path.exists(paths[index]) for index in first):
        raise InputError(
            f"none of the first {len(first)} images of {manifest} exists, for example {paths[0]}: paths in a manifest "
            "are relative to the manifest's own folder"
        )
