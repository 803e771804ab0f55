"""What to train on: a folder, a manifest or a packed set (made by tools.pack) -> a list of images that costs a few
arrays, however long."""

import bisect
import contextlib
import hashlib
import io
import os
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from datasets.images import IMAGE_ENDINGS, Cut, Unreadable, boxed, upright_size
from datasets.tables import iterate_table, split_folder, split_name
from util.dist import print_main
from util.errors import InputError
from util.files import read_array, read_json

HEIC, HIDDEN = (".heic", ".heif"), ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # the latter: folders that systems make
PACK_HEADER = "pack.json"
LENGTH, CRC = 1, 2  # columns of a shard's index; column 0 is the offset


def printable(name: str) -> str:
    """A name for tables, messages and pictures, on one line: bytes that are not UTF-8 become \\xNN, control characters
    \\n, \\x1b ..."""
    given = ((c, chr(ord(c) - 0xDC00) if "\udc80" <= c <= "\udcff" else c) for c in name)  # as `os.fsdecode` has them
    return "".join(c if c.isprintable() else byte.encode("unicode_escape").decode() for c, byte in given)


class PathList:
    """Paths in one contiguous buffer: a million paths are two arrays, shared by forked workers; boxes: [n, 4] int32,
    left, upper, right, lower in px of the upright picture, zeros: the whole; None: there are none."""

    boxes: np.ndarray | None = None

    def __init__(self, root: Path, paths: Iterable[str | Cut]):
        """Paths are relative to `root` or absolute."""
        encoded, boxes = [], array("i")
        for path in paths:
            encoded.append(os.fsencode(path))
            boxes.extend(path.box if isinstance(path, Cut) else (0, 0, 0, 0))
        if (boxes := np.array(boxes, dtype=np.int32).reshape(-1, 4)).any():
            self.boxes = boxes
        self.root = Path(root)
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def take(self, rows: np.ndarray) -> "PathList":
        """Some of the paths, in the order of `rows`."""
        return PathList(self.root, map(self.entry, rows.tolist()))

    def __len__(self) -> int:
        return len(self.ends)

    def relative(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.bytes[start : self.ends[index]].tobytes())

    def entry(self, index: int) -> str | Cut:
        """The relative path, with its box where it has one."""
        return boxed(self.relative(index), None if self.boxes is None else self.boxes[index].tolist())

    def __getitem__(self, index: int) -> Path | Cut:
        return boxed(self.root / self.relative(index), None if self.boxes is None else self.boxes[index].tolist())

    def stamp(self, index: int) -> str:
        """What tells a changed file: size and time of its last change; '' where it is not there."""
        with contextlib.suppress(OSError, ValueError):
            found = os.stat(self[index])
            return f"{found.st_size}-{found.st_mtime_ns}"
        return ""

    def sha256(self) -> str:
        """Identity of the list: the relative paths, their order and boxes, not the root."""
        boxes = b"" if self.boxes is None else self.boxes.tobytes()
        return hashlib.sha256(self.ends.tobytes() + self.bytes.tobytes() + boxes).hexdigest()


class PackedImages(PathList):
    """The images of a packed set by the names they had. Files: `pack.json` (what it was made from), `shard<k>.bin`
    (encoded images, one after another), `shard<k>.npy` ([n, 3] int64: offset and length in bytes, CRC-32), `names.npy`
    (uint8, the names) and `name_ends.npy` (int64)."""

    def __init__(self, folder: str | Path):
        self.root, again = Path(folder), "remove it and run python -m tools.pack again"
        count = read_json(self.root / PACK_HEADER, again).get("shards", 0)
        files = [shard_file(self.root, k) for k in range(count if isinstance(count, int) else 0)]
        if not all(file.is_file() for file in (*files, self.root / "names.npy")):
            what = "is an unfinished packed set: run the same python -m tools.pack command again to complete it"
            raise InputError(f"--data_path {self.root} {what}")
        self.bytes = read_array(self.root / "names.npy", again)
        self.ends = np.array(read_array(self.root / "name_ends.npy", again))
        indices = [np.array(read_array(file.with_suffix(".npy"), again)).reshape(-1, 3) for file in files]
        for file, index in zip(files, indices):
            wanted, size = int(index[:, LENGTH].sum()), file.stat().st_size
            if size != wanted:
                raise InputError(f"{file} has {size} bytes where its index says {wanted}: it is damaged; {again}")
        self._index = np.concatenate([np.zeros((0, 3), np.int64), *indices])
        if not len(self._index) or len(self.ends) != len(self._index):
            raise InputError(f"--data_path {self.root} is damaged (its lists of names and images differ): {again}")
        self._shard_ends = np.cumsum([len(index) for index in indices]).tolist()

    def read(self, index: int) -> bytes:
        """The encoded image; raises `Unreadable` where its checksum is wrong."""
        offset, length, crc = self._index[index].tolist()
        file = shard_file(self.root, bisect.bisect_right(self._shard_ends, index))
        with open(file, "rb") as opened:
            data = os.pread(opened.fileno(), length, offset)
        if zlib.crc32(data) != crc:
            raise Unreadable(f"checksum differs in {file.name} at byte {offset}")
        return data

    def __getitem__(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.read(index))

    def stamp(self, index: int) -> str:
        return "-".join(map(str, self._index[index, LENGTH:].tolist()))

    def sha256(self) -> str:
        """Identity of the list: names, order and encoded bytes (by their checksums)."""
        return hashlib.sha256(super().sha256().encode() + self._index[:, CRC].tobytes()).hexdigest()


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard{shard:05d}.bin"


def list_images(data_path: str | Path, split: str | None = None) -> PathList:
    """All images of a folder (recursively; its `train/` if there is one), a packed or curated set, or a manifest: a
    .csv/.tsv (column `path`, and boxes), .jsonl (the same as keys) or .txt (one a line), paths absolute or relative to
    the file. split: keep the rows whose column `split` has this value (manifests with columns only)."""
    data_path = Path(data_path)
    if (data_path / "curation.json").is_file() and (data_path / "manifest.csv").is_file():  # of main_curate.py
        data_path = data_path / "manifest.csv"
    if data_path.is_dir():
        if split is not None:
            what = f"needs a manifest with a column 'split', but --data_path {data_path} is a folder or a packed set"
            raise InputError(f"--split {split} {what}: give the sub-folder, or pack this split alone")
        train = split_folder(data_path, "train")
        is_packed = (data_path / PACK_HEADER).is_file()
        return PackedImages(data_path) if is_packed else list_folder(train if train.is_dir() else data_path)
    found: set[str | None] = set()

    def chosen() -> Iterator[str]:
        for row in iterate_table(data_path):
            found.add(row.get("split"))
            if split is None or row.get("split") == split_name(split):
                yield boxed(row["path"], row.get("box"))

    paths = PathList(data_path.parent, chosen())
    if not len(paths):
        known = ", ".join(sorted(str(name) for name in found if name)) or "no column 'split'"
        raise InputError(f"{data_path} has no row with split '{split}': it has {known}")
    check_first_exist(paths, data_path)
    return paths


def check_first_exist(paths: PathList, manifest: Path) -> None:
    """A manifest moved away from its images is found now, not image by image."""
    first = range(min(len(paths), 50))
    if not any(os.path.exists(paths[index]) for index in first):
        what = f"none of the first {len(first)} images of {manifest} exists, for example {paths[0]}"
        raise InputError(f"{what}: paths in a manifest are relative to the manifest's own folder")
    check_boxes(paths, manifest)


def check_boxes(paths: PathList, manifest: Path) -> None:
    """InputError where a box has no pixel of its picture, by the headers of all that have boxes; says how many boxes
    leave theirs. Pictures that cannot be read are left to who reads them."""
    if paths.boxes is None:
        return
    files = [paths.relative(index) for index in range(len(paths))]
    names = list(dict.fromkeys(files))
    with ThreadPoolExecutor(16) as pool:  # most of the time is waiting for the disk
        found = dict(zip(names, pool.map(upright_size, (paths.root / name for name in names))))
    sizes = np.array([found[name] or (1 << 31, 1 << 31) for name in files])
    if len(outside := np.flatnonzero((paths.boxes[:, :2] >= sizes).any(axis=1))):
        (name, box), (width, height) = paths.entry(outside[0]), sizes[outside[0]]
        found = ((row["path"].strip(), row.get("box")) == (name.strip(), box) for row in iterate_table(manifest))
        what = f"the box {' '.join(map(str, box))} of {printable(name)} lies outside of its {width} x {height} px"
        cure = f"correct it and {len(outside) - 1} more (px of the upright picture), or remove the rows"
        raise InputError(f"{manifest}, row {1 + [*found].index(True)}: {what}: {cure}")
    if leaving := int(((paths.boxes[:, :2] < 0) | (paths.boxes[:, 2:] > sizes)).any(axis=1).sum()):
        print_main(f"{manifest}: {leaving:,} of {len(files):,} boxes leave their pictures and are cut at the edges")


def list_folder(root: Path) -> PathList:
    """All images below a folder; says what it passed over."""
    found, passed = walk_images(root)
    seen = ", ".join(f"{what} ({count:,})" for what, count in passed.most_common(12))
    if not found:
        endings, seen = " ".join(IMAGE_ENDINGS), seen or "nothing, it is empty"
        raise InputError(f"no image under {printable(str(root))} ({endings}); passed over: {seen}")
    if passed:
        print_main(f"{printable(str(root))}: {len(found):,} images; passed over: {seen}")
    return PathList(root, found)


def walk_images(root: Path) -> tuple[list[str], Counter[str]]:
    """(pictures below a folder, relative to it; how much of what was passed over). A folder is read once, by its real
    path: links to folders come last."""
    found: list[str] = []
    passed: Counter[str] = Counter()
    todo, links = [("", os.path.realpath(root))], deque()
    seen = set(map(str, Path(todo[0][1]).parents))  # links to folders that hold the root are not followed
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
                passed["pipes, devices or dead links"] += 1
        todo += reversed(below)
    return found, passed
