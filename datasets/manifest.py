"""What to train on: a folder or a manifest -> a list of image paths."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets.path_list import PACK_HEADER, PackedImages, PathList
from datasets.tables import TABLE_ENDINGS, iterate_table, split_name
from util.errors import InputError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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
    found: list[str] = []
    others: Counter[str] = Counter()
    for parent, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(files):
            ending = os.path.splitext(name)[1].lower()
            if ending in IMAGE_ENDINGS:
                found.append(os.path.relpath(os.path.join(parent, name), root))
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
    if not any(os.path.exists(paths[index]) for index in first):
        raise InputError(
            f"none of the first {len(first)} images of {manifest} exists, for example {paths[0]}: paths in a manifest "
            "are relative to the manifest's own folder"
        )
