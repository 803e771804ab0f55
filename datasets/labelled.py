"""Images with a class: an ImageFolder tree with train/ and val/, or a table with columns."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.manifest import list_images, read_manifest
from datasets.path_list import PathList
from util.errors import InputError


@dataclass(frozen=True)
class LabelledImages:
    """Images, their class numbers [n] int64 (into `classes`) and the rows of each split."""

    paths: PathList
    labels: np.ndarray
    classes: list[str]
    splits: dict[str, np.ndarray]


def list_labelled(data_path: str | Path, label_column: str = "label") -> LabelledImages:
    """Read a table (.csv, .tsv, .jsonl with `path`, `split` and `label_column`) or a folder with
    `train/CLASS/...` and `val/CLASS/...`.

    Raises:
        InputError: columns, split or classes are missing.
    """
    data_path = Path(data_path)
    if data_path.is_dir():
        rows, root = _folder_rows(data_path), data_path
        label_column = "label"
    elif data_path.exists():
        rows, root = read_manifest(data_path), data_path.parent
    else:
        raise InputError(f"--data_path {data_path} does not exist: give a folder or a table")
    for column in ("split", label_column):
        if column not in rows[0]:
            raise InputError(
                f"{data_path} has no column '{column}': it has {', '.join(rows[0])}"
                + ("; choose one with --label_column" if column == label_column else "")
            )
    classes = sorted({row[label_column] for row in rows})
    if len(classes) < 2:
        raise InputError(f"{data_path}: all rows have the same '{label_column}', nothing to tell apart")
    number = {name: i for i, name in enumerate(classes)}
    split = np.array([row["split"] for row in rows])
    splits = {name: np.flatnonzero(split == name) for name in ("train", "val")}
    for name, found in splits.items():
        if not len(found):
            has = ", ".join(sorted(set(split)))
            raise InputError(f"{data_path} has no row with split '{name}': it has {has}")
    labels = np.array([number[row[label_column]] for row in rows], dtype=np.int64)
    return LabelledImages(PathList(root, [row["path"] for row in rows]), labels, classes, splits)


def _folder_rows(folder: Path) -> list[dict[str, str]]:
    rows = []
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise InputError(f"{folder} has no folder {split}/: an ImageFolder needs train/ and val/")
        paths = list_images(folder / split)
        for index in range(len(paths)):
            relative = Path(paths.relative(index))
            if len(relative.parts) < 2:
                raise InputError(f"{folder / split / relative} lies in no class folder")
            rows.append({"path": f"{split}/{relative}", "split": split, "label": relative.parts[0]})
    return rows
