"""Images with a class: an ImageFolder tree with train/ and val/, or a table with columns."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.manifest import cell, list_images, read_manifest
from datasets.path_list import PathList
from util.errors import InputError


@dataclass(frozen=True)
class LabelledImages:
    """Images, their class numbers [n] int64 (into `classes`; -1: none given) and the rows of each split that
    have one; unlabelled: how many of train and val have none and are left out."""

    paths: PathList
    labels: np.ndarray
    classes: list[str]
    splits: dict[str, np.ndarray]
    unlabelled: int = 0


def list_labelled(
    data_path: str | Path, label_column: str = "label", held_out: tuple[str, ...] = ("val",), need_train: bool = True
) -> LabelledImages:
    """Read a table (.csv, .tsv, .jsonl with `path`, `split` and `label_column`) or a folder with
    `train/CLASS/...` and `val/CLASS/...`.

    Args:
        held_out: names of the split to test on; the first that is there is read.
        need_train: whether a split `train` must be there.
    Raises:
        InputError: columns, split or classes are missing.
    """
    data_path = Path(data_path)
    if data_path.is_dir():
        rows, root = _folder_rows(data_path, held_out, need_train), data_path
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
    named = [cell(row, label_column) for row in rows]
    classes = sorted({name for name in named if name})
    if len(classes) < 2:
        raise InputError(f"{data_path}: all rows have the same '{label_column}', nothing to tell apart")
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(name, -1) for name in named], dtype=np.int64)
    split = np.array([cell(row, "split") for row in rows])
    test = next((name for name in held_out if name in split), held_out[0])
    splits = {name: np.flatnonzero((split == name) & (labels >= 0)) for name in ("train", test)}
    for name, found in splits.items():
        if not len(found) and (need_train or name == test):
            has = ", ".join(sorted(set(split)))
            raise InputError(f"{data_path} has no row with split '{name}' and a '{label_column}': it has {has}")
    unlabelled = int((np.isin(split, list(splits)) & (labels < 0)).sum())
    return LabelledImages(PathList(root, [row["path"] for row in rows]), labels, classes, splits, unlabelled)


def _folder_rows(folder: Path, held_out: tuple[str, ...], need_train: bool) -> list[dict[str, str]]:
    rows = []
    test = next((name for name in held_out if (folder / name).is_dir()), held_out[0])
    for split in ("train", test):
        if not (folder / split).is_dir():
            if split == "train" and not need_train:
                continue
            raise InputError(f"{folder} has no folder {split}/: an ImageFolder needs train/ and {test}/")
        paths = list_images(folder / split)
        for index in range(len(paths)):
            relative = Path(paths.relative(index))
            if len(relative.parts) < 2:
                raise InputError(f"{folder / split / relative} lies in no class folder")
            rows.append({"path": f"{split}/{relative}", "split": split, "label": relative.parts[0]})
    return rows
