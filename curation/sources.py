"""Where a pool comes from: named folders, manifests and packed sets as one numbered list of images."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.path_list import PackedImages, PathList, check_first_exist, list_images, printable
from datasets.tables import cell, iterate_table
from util.dist import print_main
from util.errors import InputError

TEST_SPLITS = ("val", "dev", "test", "query", "gallery", "probe")  # beginnings of a split's name
COLUMNS = {"identity": "pid", "camera": "camid", "box": "box"}  # what a manifest may say of an image: default column


@dataclass
class Source:
    """One `--pool` or `--exclude`. role: "pool" or "exclude"; columns: texts of a manifest's columns by their meaning;
    left_out: rows that the manifest's column `split` puts on the other side."""

    name: str
    role: str
    paths: PathList | PackedImages
    columns: dict[str, PathList] = field(default_factory=dict)
    left_out: int = 0


class JoinedImages:
    """The images of all sources under running numbers; item i is what `open_rgb` opens."""

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self.ends = np.cumsum([len(source.paths) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, number: int) -> tuple[Source, int]:
        """Return the source and the place in it."""
        source = int(np.searchsorted(self.ends, number, side="right"))
        return self.sources[source], number - (int(self.ends[source - 1]) if source else 0)

    def __getitem__(self, number: int):
        source, index = self.locate(number)
        return source.paths[index]

    def text(self, number: int, column: str) -> str:
        """Return a manifest's value, or ''."""
        source, index = self.locate(number)
        return source.columns[column].relative(index) if column in source.columns else ""

    def name(self, number: int) -> str:
        """Return the absolute path of a file; for a packed image the folder and the name it had."""
        source, index = self.locate(number)
        return str(Path(source.paths.root).absolute() / source.paths.relative(index))

    def fingerprint(self) -> list[list[str]]:
        """Identify what the sources list, in their order: rows of the index are numbered by it."""
        return [
            [source.role, source.name, str(Path(source.paths.root).absolute()), source.paths.sha256()]
            + [f"{name} {source.columns[name].sha256()}" for name in sorted(source.columns)]
            for source in self.sources
        ]


def open_sources(pools: list[str], excludes: list[str], column_names: dict[str, str]) -> JoinedImages:
    """Read `NAME=PATH` flags.

    Of a manifest with a column `split`, a pool takes all rows but validation and test ones, and an exclusion all rows
    but `train`; so one labels.csv can be given to both.

    Args:
        column_names: the manifests' columns of the meanings `identity`, `camera` and `box`.
    """
    sources: list[Source] = []
    for role, specs in (("pool", pools), ("exclude", excludes)):
        for spec in specs:
            name, _, path = spec.partition("=")
            if not name or not path:
                raise InputError(f"--{role} {spec}: write NAME=PATH, for example cars=/data/cars")
            given, name = name, re.sub(r"[^\w.+ -]", "_", name).lstrip(". -")[:60].rstrip() or "_"
            if given != name:  # names become folders, columns and headings
                print_main(f"--{role} {printable(given)!r}: it is called {name} here")
            if any(other.name == name and other.role == role for other in sources):
                raise InputError(f"--{role} {name} is given twice: choose another name for {path}")
            sources.append(_open(name, role, Path(path), column_names))
    for column, name in column_names.items():
        if name != COLUMNS[column] and not any(column in source.columns for source in sources):
            raise InputError(f"--{column}_column {name}: no manifest of --pool or --exclude has values in it")
    return JoinedImages(sources)


def _open(name: str, role: str, path: Path, column_names: dict[str, str]) -> Source:
    if not path.exists():
        raise InputError(f"--{role} {name}={path} does not exist: give a folder, a manifest or a packed set")
    if path.is_dir():
        if role == "exclude" and (path / "train").is_dir():
            raise InputError(f"--exclude {name}={path} holds a folder train/: give the folder of its test images")
        return Source(name, role, list_images(path))
    rows, left_out = [], 0
    for row in iterate_table(path):
        split = cell(row, "split").lower()
        if split.startswith(TEST_SPLITS) if role == "pool" else split == "train":
            left_out += 1
        else:
            if isinstance(box := row.get(column_names["box"]), list):
                row[column_names["box"]] = " ".join(map(str, box))
            rows.append([row["path"], *(cell(row, column) for column in column_names.values())])
    if not rows:
        side = "validation or test" if role == "pool" else "training"
        raise InputError(f"--{role} {name}={path}: all {left_out} rows are {side} rows by their column 'split'")
    files, *texts = zip(*rows)
    check_first_exist(paths := PathList(path.parent, files), path)
    columns = {column: PathList(Path(), values) for column, values in zip(column_names, texts) if any(values)}
    return Source(name, role, paths, columns, left_out)
