"""Re-identification sets, who was seen by which camera: VeRi-776, VehicleID V1.0, VERI-Wild (old and new lists), and a
table with the columns path, pid, split (train, query, gallery) and, where known, camid, viewid and track."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np

from datasets.images import boxed
from datasets.items import Labelled, LabelledItems
from datasets.path_list import PathList, check_first_exist
from datasets.tables import PUBLISHED, cell, iterate_table, known, moment, published_note
from util.errors import InputError
from util.files import file_sha256

UNKNOWN = -1
VERI_NAME = "0001_c001_...jpg, vehicle and camera (where names hold no identity, give a table: path, pid, split, camid)"
SIGNS = {  # files and folders by which a layout is recognised
    "image_train": "veri776", "train_test_split/test_list_800.txt": "vehicleid", "attribute/img2vid.txt": "vehicleid",
    "train_test_split/train_list.txt": "veriwild", "train_test_split/train_list_start0.txt": "veriwild",
}  # fmt: skip


@dataclass(frozen=True)
class ReidImages(Labelled):
    """pids, camids, viewids: [n] int64. pids are numbers of the set's `pid_names`; -1: unknown. Of a test, [n] int64:
    files, equal for images of one file, by place or by content (a query never meets its own); tracks, equal for
    images of one tracklet, or None."""

    pids: np.ndarray
    camids: np.ndarray
    viewids: np.ndarray
    tracks: np.ndarray | None = None
    files: np.ndarray | None = None


class ReidTrainImages(LabelledItems):
    """Item (epoch, slot, index) -> imgs [3, H, W] uint8, erase [5] int64, pids, camids, viewids int64 scalars, problem
    ('' or what was wrong with the file; then another image of the vehicle stands in)."""

    def stand_ins(self, index: int) -> Iterable[int]:
        return np.flatnonzero(self.images.pids == self.images.pids[index]).tolist()


@dataclass(frozen=True)
class ReidData:
    """train: pids counted from 0 in sorted order of the names, so that they are class numbers. tests: name -> (query,
    gallery); VehicleID's tests are (images, None): the protocol draws the gallery. pid_names: of all identities; the
    first `classes` are those of train. notes: what was found, one sentence each, for the run's header."""

    name: str
    train: ReidImages
    tests: dict[str, tuple[ReidImages, ReidImages | None]]
    pid_names: list[str]
    classes: int
    notes: list[str] = field(default_factory=list)
    camera_names: list[str] | None = None  # where camids are numbers of these, and not the published ones
    view_names: list[str] | None = None
    track_names: list[str] | None = None

    def sha256(self) -> str:
        """Identity of what is trained on: paths, order and labels."""
        return self.train.sha256()


def read_reid(path: str | Path, format: str = "auto", need_train: bool = True) -> ReidData:
    """Read a set and check it: images that are there, tests that can be answered. path: folder of a published set, or a
    table (.csv .tsv .jsonl). format: veri776, vehicleid, veriwild, table, or auto: by the files that are there.
    need_train: False: the part to train on may be missing."""
    path = Path(path)
    if format == "auto":
        found = next((SIGNS[sign] for sign in SIGNS if (path / sign).exists()), "none")
        format = found if path.is_dir() else "table"
    if format == "none":
        signs = ", ".join(f"{name} {sign}" for sign, name in SIGNS.items())
        raise InputError(f"{path} has no layout that is known ({signs}): give a table with path, pid, split")
    data = READERS[format](path, need_train)
    if need_train and not len(data.train):
        raise InputError(f"{path}: no training image is listed")
    parts = {"train": data.train}
    for test, (query, gallery) in data.tests.items():
        ending = "" if test == "test" else f"_{test}"
        parts |= {f"test{ending}": query} if gallery is None else {f"query{ending}": query, f"gallery{ending}": gallery}
    for images in filter(len, parts.values()):
        check_first_exist(images.paths, path)
    counts = {name: len(images) for name, images in parts.items()} | {"train identities": data.classes}
    notes = [*data.notes, ", ".join(f"{name} {count:,}" for name, count in counts.items())]
    notes += [published_note(counts, data.name)] if data.name in PUBLISHED else []
    data = replace(data, tests={name: _number_files(*pair) for name, pair in data.tests.items()})
    if data.track_names:
        data = replace(data, tests={name: _fill_tracks(*pair, data.track_names) for name, pair in data.tests.items()})
    for name, (query, gallery) in data.tests.items():
        notes += [f"test {name}: {note}" for note in _check_test(name, data, query, gallery)]
    return replace(data, notes=notes)


Row = tuple  # path or `Cut`, identity, camera, view, and in tests track
JUNK = ("-1 are left out", "0000 are left out", "0000 in the gallery are distractors")  # images of vehicle ...


def _build(name: str, root: Path, train: list[Row], tests: dict[str, tuple[list[Row], ...]], notes) -> ReidData:
    """Leave junk out, number the identities, those of train first; the gallery of a test of one list is drawn."""
    counts: Counter[str] = Counter()

    def usable(rows: list[Row], in_gallery: bool = False) -> Iterator[Row]:
        """Without images of no vehicle; Market-1501's 0000 is no vehicle either, but a distractor in the gallery."""
        for row in rows:
            is_0000 = not row[1].strip("0") and re.match(r"0+_c\d", Path(row[0]).name)
            what = JUNK[0] if not row[1] else JUNK[1 + in_gallery] if is_0000 else ""
            counts[what] += 1
            if what in ("", JUNK[2]):
                yield row

    train = list(usable(train))
    tests = {test: [list(usable(rows, i == 1)) for i, rows in enumerate(pair)] for test, pair in tests.items()}
    rows = [*train, *(row for pair in tests.values() for part in pair for row in part)]
    notes += [f"{counts[what]} images of vehicle {what}" for what in JUNK if counts[what]]
    unseen = sum(row[3] < 0 for row in rows)
    if 0 < unseen < len(rows):
        notes.append(f"{unseen} images have no viewpoint: kept, with an unknown one")
    trained = {row[1] for row in train}
    names = sorted({row[1] for row in rows}, key=lambda name: (name not in trained, _by_number(name)))
    number = {pid: i for i, pid in enumerate(names)}

    def images(rows: list[Row]) -> ReidImages:
        paths, pids, *sides = zip(*rows) if rows else [()] * 4
        ids = ([number[pid] for pid in pids], *sides)
        return ReidImages(PathList(root, paths), *(np.array(part, np.int64) for part in ids))

    found = {test: (*map(images, pair), None)[:2] for test, pair in tests.items()}
    return ReidData(name, images(train), found, names, len(trained), notes)


def _by_number(name: str) -> tuple[int, str]:
    is_number = name.isascii() and name.isdigit() and len(name) < 19
    return (int(name), name) if is_number else (1 << 62, name)


def _lines(file: Path, pattern: str, example: str, lines: Iterable[str] | None = None) -> Iterator[tuple[str, ...]]:
    """The groups of `pattern` in every line of a list, or of these `lines`, which must look like `example`."""
    lines = (row["path"] for row in iterate_table(file)) if lines is None else lines
    for number, line in enumerate(lines, 1):
        found = re.fullmatch(pattern, line, re.ASCII)
        if found is None:
            raise InputError(f"{file}, line {number} is '{line[:60]}', not like {example}")
        yield found.groups()


def read_veri(root: Path, need_train: bool) -> ReidData:
    """VeRi-776: image_{train,query,test}/ with names VVVV_cCCC_TTTTTTTT_K.jpg, name_*.txt where they exist, and the
    views of keypoint_{train,test}.txt if someone has put them there."""
    views: dict[str, int] = {}
    for file in filter(Path.is_file, (root / "keypoint_train.txt", root / "keypoint_test.txt")):
        found = _lines(file, r"(?:\S*/)?(\S+) (?:.* )?([0-7])", "'image_train/NAME ... VIEW', a view 0 to 7")
        views |= {name: int(view) for name, view in found}
    parts: dict[str, list[Row]] = {}
    for part in ("train", "query", "test"):
        names, folder, listed = root / f"name_{part}.txt", root / f"image_{part}", None
        if not names.is_file():
            if not folder.is_dir() and (part != "train" or need_train):
                raise InputError(f"{root} has neither name_{part}.txt nor image_{part}/: unpack VeRi-776 again")
            files = folder.iterdir() if folder.is_dir() else ()
            listed = sorted(file.name for file in files if file.suffix.lower() == ".jpg")
        found = _lines(names if listed is None else folder, r"((-?\d+)_c(\d{1,9})\D.*)", VERI_NAME, listed)
        parts[part] = [
            (f"{folder.name}/{name}", known(pid), int(c) - 1, views.get(name, UNKNOWN)) for name, pid, c in found
        ]
    return _build("veri776", root, parts["train"], {"test": (parts["query"], parts["test"])}, [])


def read_vehicleid(root: Path, need_train: bool) -> ReidData:
    """VehicleID: image/NNNNNNN.jpg; train_test_split/{train_list,test_list_N}.txt with lines `name id`; no cameras."""
    folder = root / "train_test_split"

    def rows(name: str) -> list[Row]:
        found = _lines(folder / name, r"(\S+?)(?:\.jpg)?\s+(\S+)", "'name id'")
        return [(f"image/{image}.jpg", known(pid), UNKNOWN, UNKNOWN) for image, pid in found]

    endings = (file.stem.rsplit("_", 1)[1] for file in folder.glob("test_list_*.txt"))
    sizes = sorted(int(ending) for ending in endings if re.fullmatch("[0-9]{1,9}", ending))
    if not sizes:
        raise InputError(f"{folder} has no test_list_800.txt or the like: unpack VehicleID again")
    tests = {str(size): (rows(f"test_list_{size}.txt"),) for size in sizes}
    has_train = need_train or (folder / "train_list.txt").is_file()
    return _build("vehicleid", root, rows("train_list.txt") if has_train else [], tests, [])


def read_veriwild(root: Path, need_train: bool) -> ReidData:
    """VERI-Wild: images/VVVVV/NNNNNN.jpg and train_test_split/ in the old style (`00001/000001`, cameras in
    vehicle_info.txt, whose first line may be a header) or the new one (`00001/000001.jpg label camera`)."""
    folder = root / "train_test_split"
    info, cameras = folder / "vehicle_info.txt", {}
    if info.is_file():
        lines = [row["path"] for row in iterate_table(info)]
        is_header = not re.search(r";\s*\d+\b", lines[0])
        pattern, example = r"(?:.*/)?([^/;]+);\s*(\d{1,9})\b.*", "'id/image;camera;...'"
        cameras = dict(_lines(info, pattern, example, lines[is_header:]))

    def rows(*names: str) -> list[Row]:
        """Of the first of these lists that is there."""
        file = next((folder / name for name in names if (folder / name).is_file()), folder / names[-1])
        pattern, found = r"((\S+?)/\S+?)(?:\.jpg)?(?:\s+\S+\s+(\d{1,9}))?", []
        for image, vehicle, camera in _lines(file, pattern, "'00001/000001' or '00001/000001.jpg label camera'"):
            camera = camera or cameras.get(image.rsplit("/", 1)[-1])
            if camera is None:
                raise InputError(f"{file}: vehicle_info.txt has no camera for {image}: unpack VERI-Wild again")
            found.append((f"images/{image}.jpg", vehicle, int(camera), UNKNOWN))
        return found

    tests, notes, lists = {}, [], ("train_list_start0.txt", "train_list.txt")
    for size in ("3000", "5000", "10000"):
        if any(folder.glob(f"test_{size}*")):
            query = rows(f"test_{size}_id_query.txt", f"test_{size}_query.txt")
            everything, asked = rows(f"test_{size}_id.txt", f"test_{size}.txt"), {row[0] for row in query}
            tests[size] = query, [row for row in everything if row[0] not in asked]
            if gone := len(everything) - len(tests[size][1]):
                notes.append(f"test {size}: {gone} images of the test list are queries and left its gallery")
    if not tests:
        raise InputError(f"{folder} has no test_3000, test_5000 or test_10000 list: unpack VERI-Wild again")
    has_train = need_train or any((folder / name).is_file() for name in lists)
    return _build("veriwild", root, rows(*lists) if has_train else [], tests, notes)


def read_table(file: Path, need_train: bool = True) -> ReidData:
    """Columns path, pid, split (train, query, gallery), where they are known camid, viewid, track, time, frame; rows
    with a test_name are a test of their own."""
    parts: dict[tuple[str, str], list[tuple]] = {("", "train"): []}
    needed, owner = ("path", "pid", "split"), {}
    for count, row in enumerate(iterate_table(file, needed, ": a table for --task reid has path, pid, split"), 1):
        path, pid, split, *sides = (cell(row, column) for column in (*needed, "camid", "viewid", "track"))
        if (split := split.lower()) not in ("train", "query", "gallery"):
            raise InputError(f"{file}, row {count}: split '{split}' is none of train, query, gallery")
        test = "" if split == "train" else cell(row, "test_name") or "test"
        if not re.fullmatch(r"[\w=.-]*", test):
            raise InputError(f"{file}, row {count}: test_name '{test[:60]}': use letters, digits, and = . - _ alone")
        for column in ("time", "frame"):
            if (text := cell(row, column)) and moment(text) is None:
                what = f"{file}, row {count}: {column} '{text[:40]}' is neither a number nor an ISO time"
                raise InputError(f"{what} (2026-03-01T12:30:00): correct it, or leave it empty")
        if pid and (track := sides[-1]) and owner.setdefault(track, (pid, sides[0])) != (pid, sides[0]):
            seen = " and ".join(" by camera ".join(filter(None, who)) for who in (owner[track], (pid, sides[0])))
            what = f"{file}, row {count}: track '{track}' shows vehicle {seen}"
            raise InputError(f"{what}: a track is one vehicle seen by one camera, give each a name of its own")
        parts.setdefault((test, split), []).append((boxed(path, row.get("box")), pid, *sides))
    tests = sorted({test for test, _ in parts} - {""}) or ["test"]
    if empty := [key for key in product(tests, ("query", "gallery")) if key not in parts]:
        of = f" of test '{empty[0][0]}'" if tests != ["test"] else ""
        raise InputError(f"{file} has no row with split '{empty[0][1]}'{of}: a test needs query and gallery")
    rows = [row for part in parts.values() for row in part]
    # numbered in sorted order: the order of the rows must not matter to a model that has learned the numbers
    tested = [row for (_, split), part in parts.items() if split != "train" for row in part]
    columns = [(2, rows), (3, rows), (4, tested)]  # nothing is learned of tracks
    names = [sorted({row[place] for row in of} - {""}, key=_by_number) for place, of in columns]
    if names[0] and (blank := sum(not row[2] for row in rows if row[1])):
        raise InputError(f"{file}: {blank} of {len(rows)} rows have no camid; fill it in, or drop the column")
    numbers = [{"": UNKNOWN} | {name: i for i, name in enumerate(listed)} for listed in names]

    def numbered(*key: str) -> list[Row]:
        used = numbers[: 2 + (key[1] != "train" and bool(names[2]))]
        return [(path, pid, *(number[text] for number, text in zip(used, sides))) for path, pid, *sides in parts[key]]

    notes = [] if names[0] else ["no cameras: the same-camera filter and the camera embedding are off"]
    pairs = {test: (numbered(test, "query"), numbered(test, "gallery")) for test in tests}
    data = _build("table", file.parent, numbered("", "train"), pairs, notes)
    return replace(data, camera_names=names[0] or None, view_names=names[1] or None, track_names=names[2] or None)


READERS = {"veri776": read_veri, "vehicleid": read_vehicleid, "veriwild": read_veriwild, "table": read_table}


def _number_files(query: ReidImages, gallery: ReidImages | None) -> tuple[ReidImages, ReidImages | None]:
    """A test with the numbers of its files: links lead to one file, and so do copies under one identity; what lies in
    two boxes of one file is two."""
    parts = [part for part in (query, gallery) if part is not None]
    every = [(os.path.realpath(part.paths[row]), pid) for part in parts for row, pid in enumerate(part.pids.tolist())]
    sizes = {pair: os.path.getsize(pair[0]) if os.path.isfile(pair[0]) else 0 for pair in every}
    times = Counter((pid, size) for (_, pid), size in sizes.items())
    copied = {path for (path, pid), size in sizes.items() if size and times[pid, size] > 1 and os.access(path, os.R_OK)}
    contents = {path: file_sha256(path) for path in copied}
    boxes = [part.paths.boxes if part.paths.boxes is not None else np.zeros((len(part), 4), int) for part in parts]
    names = (f"{contents.get(path, path)}#{box}" for (path, _), box in zip(every, np.concatenate(boxes).tolist()))
    files = np.unique([*names], return_inverse=True)[1]
    return (*(replace(p, files=rows) for p, rows in zip(parts, np.split(files, [len(query)]))), None)[:2]


def _fill_tracks(query: ReidImages, gallery: ReidImages, names: list[str]) -> tuple[ReidImages, ReidImages]:
    """A test in which each image has a track: that of its file, or one of its own."""
    files, tracks = (np.concatenate([getattr(part, ids) for part in (query, gallery)]) for ids in ("files", "tracks"))
    of_file = np.full(files.max() + 1, UNKNOWN)
    of_file[files[tracks >= 0]] = tracks[tracks >= 0]
    filled = np.where(of_file[files] >= 0, of_file[files], len(names) + files)
    if len(bad := np.flatnonzero((tracks >= 0) & (tracks != filled))):
        row, both = bad[0], f"'{names[tracks[bad[0]]]}' and '{names[filled[bad[0]]]}'"
        paths = query.paths[row] if row < len(query) else gallery.paths[row - len(query)]
        raise InputError(f"{paths} lies in the tracks {both}: a picture, or box, belongs to one; correct 'track'")
    return tuple(replace(p, tracks=rows) for p, rows in zip((query, gallery), np.split(filled, [len(query)])))


def _check_test(name: str, data: ReidData, query: ReidImages, gallery: ReidImages | None) -> Iterator[str]:
    """What a test's numbers cannot tell; InputError where nothing can answer any query."""
    if len(shared := np.intersect1d(query.pids, np.arange(data.classes))):
        yield f"{len(shared)} of its identities are trained on, e.g. {data.pid_names[shared[0]]}"
    if gallery is None:
        if alone := int((np.unique(query.pids, return_counts=True)[1] < 2).sum()):
            yield f"{alone} identities have one image and can only be distractors"
        if twice := len(query) - len(np.unique(query.files)):
            yield f"{twice} images are there a second time: where one is a query, the other does not count"
        return
    if both := int(np.isin(query.files, gallery.files).sum()):
        yield f"{both} queries lie in the gallery too, by path or content: none meets its own file"

    def count(*names: str) -> np.ndarray:
        """[Q] gallery images that are equal to a query in these."""
        images = Counter(zip(*(getattr(gallery, name).tolist() for name in names)))
        return np.array([images[key] for key in zip(*(getattr(query, name).tolist() for name in names))], np.int64)

    matches = count("pids") - count("pids", "files")
    elsewhere = matches - count("pids", "camids") + count("pids", "camids", "files")
    missing = int((matches == 0).sum())
    only_same = int(((matches > 0) & (elsewhere == 0) & (query.camids >= 0)).sum())
    if missing + only_same == len(query):
        counts = f"{missing} are of vehicles missing from the gallery and {only_same} have their own camera only"
        raise InputError(f"test {name}: of {len(query)} queries {counts}: correct pid, split and camid, or drop camid")
    if missing or only_same:
        yield f"{missing} queries have no match in the gallery and {only_same} only from their own camera: not scored"
