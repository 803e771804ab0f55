"""Re-identification sets in their published layouts, or anyone's own as one CSV: who, seen by which camera.

Layouts: VeRi-776, VehicleID V1.0, VERI-Wild (old and new lists), and a table with the columns path, pid,
split (train, query, gallery) and, where known, camid and viewid.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from datasets.items import TrainItems
from datasets.manifest import check_first_exist
from datasets.path_list import PathList
from datasets.tables import PUBLISHED, cell, iterate_table, published_note
from datasets.transforms import PadCropErase
from util.errors import InputError

UNKNOWN = -1
SIGNS = {  # files and folders by which a layout is recognised
    "image_train": "veri776", "train_test_split/test_list_800.txt": "vehicleid", "attribute/img2vid.txt": "vehicleid",
    "train_test_split/train_list.txt": "veriwild", "train_test_split/train_list_start0.txt": "veriwild",
}  # fmt: skip
VERI_VIEWS = tuple("01234567")
VERI_NAME = re.compile(r"(-?\d+)_c(\d+)")


@dataclass(frozen=True)
class ReidImages:
    """paths; pids, camids, viewids: [n] int64. pids are numbers of the set's `pid_names`; -1: unknown."""

    paths: PathList
    pids: np.ndarray
    camids: np.ndarray
    viewids: np.ndarray

    def __len__(self) -> int:
        return len(self.pids)

    def take(self, rows: np.ndarray) -> "ReidImages":
        """Some of the images, in the order of `rows`."""
        return ReidImages(self.paths.take(rows), self.pids[rows], self.camids[rows], self.viewids[rows])

    def has_cameras(self) -> bool:
        return bool((self.camids >= 0).all())


class ReidTrainImages(TrainItems):
    """Item (epoch, slot, index) -> imgs [3, H, W] uint8, erase [5] int64, pids, camids, viewids int64 scalars, problem
    ('' or what was wrong with the file; then another image of the vehicle stands in)."""

    def __init__(self, images: ReidImages, augment: PadCropErase, seed: int):
        super().__init__(images.paths, augment.size, seed)
        self.images, self.augment = images, augment

    def stand_ins(self, index: int) -> Iterable[int]:
        return np.flatnonzero(self.images.pids == self.images.pids[index]).tolist()

    def sample(self, content, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        ids = {name: torch.tensor(getattr(self.images, name)[index]) for name in ("pids", "camids", "viewids")}
        return self.augment(content, rng) | ids


@dataclass(frozen=True)
class ReidData:
    """One set: what is trained on, and what is tested on.

    train: pids counted from 0 in sorted order of the names, so that they are class numbers.
    tests: name -> (query, gallery); VehicleID's tests are (images, None): the protocol draws the gallery.
    pid_names: of all identities; the first `classes` are those of train. notes: what was found, one sentence
    each; they belong into the run's header.
    """

    name: str
    train: ReidImages
    tests: dict[str, tuple[ReidImages, ReidImages | None]]
    pid_names: list[str]
    classes: int
    notes: list[str] = field(default_factory=list)
    camera_names: list[str] | None = None  # where camids are numbers of these, and not the published ones
    view_names: list[str] | None = None

    def cameras(self) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """{test: (camids of the query, of the gallery; None: the protocol draws it)}."""
        return {
            test: (query.camids, None if gallery is None else gallery.camids)
            for test, (query, gallery) in self.tests.items()
        }

    def sha256(self) -> str:
        """Identity of what is trained on: paths, order and labels."""
        digest = hashlib.sha256(self.train.paths.sha256().encode())
        for ids in (self.train.pids, self.train.camids, self.train.viewids):
            digest.update(np.ascontiguousarray(ids).tobytes())
        return digest.hexdigest()


def read_reid(path: str | Path, format: str = "auto", need_train: bool = True) -> ReidData:
    """Read a set and check it.

    Args:
        path: folder of a published set, or a table (.csv .tsv .jsonl).
        format: veri776, vehicleid, veriwild, table, or auto: by the files that are there.
        need_train: False: the part to train on may be missing.
    Raises:
        InputError: nothing there, no such layout, a list that is missing or damaged, images that are listed
        but not there, a test in which no query can be answered.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"--data_path {path} does not exist: give the folder of a set, or a table")
    format = _detect(path) if format == "auto" else format
    data = READERS[format](path, need_train)
    if need_train and not len(data.train):
        raise InputError(f"{path}: no training image is listed")
    for images in _all_images(data).values():
        if len(images):
            check_first_exist(images.paths, Path(images.paths.root))
    notes = [*data.notes, *_compare_counts(data), *_check_tests(data)]
    return replace(data, notes=notes)


def _detect(path: Path) -> str:
    if path.is_file():
        return "table"
    for sign, name in SIGNS.items():
        if (path / sign).exists():
            return name
    raise InputError(
        f"{path} has no layout that is known: VeRi-776 has image_train/, VehicleID train_test_split/test_list_800.txt, "
        "VERI-Wild train_test_split/train_list.txt; or give a table with the columns path, pid, split"
    )


Row = tuple[str, str, int, int]  # path, identity, camera, view


def build(
    name: str, root: Path, train: list[Row], tests: dict[str, tuple[list[Row], list[Row] | None]], notes
) -> ReidData:
    """Number the identities: those of train first, in sorted order, then the others."""
    known = sorted({row[1] for row in train}, key=_by_number)
    others = {row[1] for pair in tests.values() for rows in pair if rows for row in rows} - set(known)
    names = known + sorted(others, key=_by_number)
    number = {pid: i for i, pid in enumerate(names)}

    def images(rows: list[Row]) -> ReidImages:
        columns = (np.array([row[i] for row in rows], dtype=np.int64) for i in (2, 3))
        pids = np.array([number[row[1]] for row in rows], dtype=np.int64)
        return ReidImages(PathList(root, (row[0] for row in rows)), pids, *columns)

    found = {
        key: (images(first), images(second) if second is not None else None) for key, (first, second) in tests.items()
    }
    return ReidData(name, images(train), found, names, len(known), list(notes))


def _by_number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (1 << 62, name)


def _lines(file: Path) -> list[str]:
    """Lines of a list that are not empty; InputError if there is none."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"the list {file} is missing: unpack the set again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason}): unpack the set again") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"the list {file} is empty: unpack the set again")
    return lines


def read_veri(root: Path, need_train: bool) -> ReidData:
    """VeRi-776: image_{train,query,test}/ with names VVVV_cCCC_TTTTTTTT_K.jpg, name_*.txt where they exist, and the
    views of keypoint_{train,test}.txt if someone has put them there."""
    views: dict[str, int] = {}
    for file in (root / "keypoint_train.txt", root / "keypoint_test.txt"):
        for number, line in enumerate(_lines(file) if file.is_file() else (), 1):
            words = line.split()
            if words[-1] not in VERI_VIEWS:
                raise InputError(f"{file}, line {number} ends with '{words[-1][:20]}', not with a view 0 to 7")
            views[words[0].rsplit("/", 1)[-1]] = int(words[-1])
    parts: dict[str, list[Row]] = {}
    junk = 0
    for part in ("train", "query", "test"):
        names, folder = root / f"name_{part}.txt", root / f"image_{part}"
        if names.is_file():
            listed = _lines(names)
        elif folder.is_dir():
            listed = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".jpg")
        elif part == "train" and not need_train:
            listed = []
        else:
            raise InputError(f"{root} has neither name_{part}.txt nor image_{part}/: unpack VeRi-776 again")
        parts[part] = []
        for name in listed:
            found = VERI_NAME.match(name)
            if found is None:
                raise InputError(f"{folder / name}: a VeRi-776 name begins like 0001_c001_")
            if int(found[1]) < 0:  # derived sets mark junk so
                junk += 1
                continue
            parts[part].append((f"image_{part}/{name}", found[1], int(found[2]) - 1, views.get(name, UNKNOWN)))
    notes = [f"{junk} images of vehicle -1 are left out"] if junk else []
    if views:
        without = sum(row[3] < 0 for rows in parts.values() for row in rows)
        notes.append(f"{without} images have no viewpoint: kept, with an unknown one")
    return build("veri776", root, parts["train"], {"test": (parts["query"], parts["test"])}, notes)


def read_vehicleid(root: Path, need_train: bool) -> ReidData:
    """VehicleID: image/NNNNNNN.jpg; train_test_split/{train_list,test_list_N}.txt with lines `name id`; no cameras."""
    folder = root / "train_test_split"

    def rows(file: Path) -> list[Row]:
        found = []
        for number, line in enumerate(_lines(file), 1):
            words = line.split()
            if len(words) != 2:
                raise InputError(f"{file}, line {number} is '{line[:60]}', not 'name id'")
            found.append((f"image/{words[0].removesuffix('.jpg')}.jpg", words[1], UNKNOWN, UNKNOWN))
        return found

    endings = (f.stem.rsplit("_", 1)[1] for f in folder.glob("test_list_*.txt"))
    sizes = sorted(int(ending) for ending in endings if ending.isdigit())
    if not sizes:
        raise InputError(f"{folder} has no test_list_800.txt or the like: unpack VehicleID again")
    tests = {str(size): (rows(folder / f"test_list_{size}.txt"), None) for size in sizes}
    has_train = need_train or (folder / "train_list.txt").is_file()
    return build("vehicleid", root, rows(folder / "train_list.txt") if has_train else [], tests, [])


def read_veriwild(root: Path, need_train: bool) -> ReidData:
    """VERI-Wild: images/VVVVV/NNNNNN.jpg and train_test_split/ in the old style (`00001/000001`, cameras in
    vehicle_info.txt) or the new one (`00001/000001.jpg label camera`); the first line of vehicle_info.txt may
    be a header or not."""
    folder = root / "train_test_split"
    cameras: dict[str, int] = {}  # of the old style, read when it is met

    def rows(*names: str) -> list[Row]:
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise InputError(f"{folder} has none of {', '.join(names)}: unpack VERI-Wild again")
        found = []
        for number, line in enumerate(_lines(file), 1):
            words = line.split()
            image = words[0].removesuffix(".jpg")
            vehicle, slash, _ = image.partition("/")
            if not slash or len(words) not in (1, 3) or (len(words) == 3 and not words[2].isdigit()):
                raise InputError(
                    f"{file}, line {number} is '{line[:60]}', neither '00001/000001' nor "
                    "'00001/000001.jpg label camera'"
                )
            if len(words) == 1 and not cameras:
                cameras.update(_wild_cameras(folder / "vehicle_info.txt"))
            camera = int(words[2]) if len(words) == 3 else cameras.get(image.rsplit("/", 1)[-1])
            if camera is None:
                raise InputError(f"{file}, line {number}: vehicle_info.txt has no camera for {image}")
            found.append((f"images/{image}.jpg", vehicle, camera, UNKNOWN))
        return found

    tests: dict[str, tuple[list[Row], list[Row]]] = {}
    notes = []
    for size in ("3000", "5000", "10000"):
        try:
            query = rows(f"test_{size}_id_query.txt", f"test_{size}_query.txt")
            everything = rows(f"test_{size}_id.txt", f"test_{size}.txt")
        except InputError:
            if any(folder.glob(f"test_{size}*")):
                raise
            continue
        asked = {row[0] for row in query}
        gallery = [row for row in everything if row[0] not in asked]
        if len(gallery) < len(everything):
            gone = len(everything) - len(gallery)
            notes.append(f"test {size}: {gone} images of the test list are queries and left its gallery")
        tests[size] = (query, gallery)
    if not tests:
        raise InputError(f"{folder} has no test_3000, test_5000 or test_10000 list: unpack VERI-Wild again")
    lists = ("train_list_start0.txt", "train_list.txt")
    has_train = need_train or any((folder / name).is_file() for name in lists)
    return build("veriwild", root, rows(*lists) if has_train else [], tests, notes)


def _wild_cameras(file: Path) -> dict[str, int]:
    """Image number -> camera."""
    cameras = {}
    for number, line in enumerate(_lines(file), 1):
        words = line.split(";")
        if len(words) > 1 and words[1].strip().isdigit():
            cameras[words[0].rsplit("/", 1)[-1]] = int(words[1])
        elif number > 1:  # the first may be a header
            raise InputError(f"{file}, line {number} is '{line[:60]}', not 'id/image;camera;...'")
    return cameras


def read_table(file: Path, need_train: bool = True) -> ReidData:
    """Columns path, pid, split (train, query, gallery), and camid and viewid where they are known."""
    listed: dict[str, list[tuple[str, str, str, str]]] = {"train": [], "query": [], "gallery": []}
    blank: Counter[str] = Counter()
    count = 0
    for count, row in enumerate(iterate_table(file), 1):
        for column in ("path", "pid", "split"):
            if not cell(row, column):
                raise InputError(f"{file}, row {count} has no '{column}': the columns are path, pid, split")
        split = cell(row, "split").lower()
        if split not in listed:
            raise InputError(f"{file}, row {count}: split '{row['split']}' is none of {', '.join(listed)}")
        ids = ["" if cell(row, column) == "-1" else cell(row, column) for column in ("camid", "viewid")]
        blank.update(column for column, text in zip(("camid", "viewid"), ids) if not text)
        listed[split].append((cell(row, "path"), cell(row, "pid"), *ids))
    rows = [row for part in listed.values() for row in part]
    # numbered in sorted order: the order of the rows must not matter to a model that has learned the numbers
    cameras, views = (
        {name: i for i, name in enumerate(sorted({row[k] for row in rows if row[k]}, key=_by_number))} for k in (2, 3)
    )
    parts = {
        split: [(p, pid, cameras.get(c, UNKNOWN), views.get(v, UNKNOWN)) for p, pid, c, v in part]
        for split, part in listed.items()
    }
    notes = []
    if cameras and blank["camid"]:
        raise InputError(
            f"{file}: {blank['camid']} of {count} rows have no camid; fill it in, or remove the column: "
            "then the same-camera filter is off"
        )
    if not cameras:
        notes.append("no cameras: the same-camera filter and the camera embedding are off")
    for split in ("query", "gallery"):
        if not parts[split]:
            raise InputError(f"{file} has no row with split '{split}': a test needs query and gallery")
    tests = {"test": (parts["query"], parts["gallery"])}
    data = build("table", file.parent, parts["train"], tests, notes)
    return replace(data, camera_names=list(cameras) or None, view_names=list(views) or None)


READERS = {"veri776": read_veri, "vehicleid": read_vehicleid, "veriwild": read_veriwild, "table": read_table}


def _all_images(data: ReidData) -> dict[str, ReidImages]:
    found = {"train": data.train}
    for test, (query, gallery) in data.tests.items():
        ending = "" if test == "test" else f"_{test}"
        if gallery is None:
            found[f"test{ending}"] = query
        else:
            found |= {f"query{ending}": query, f"gallery{ending}": gallery}
    return found


def _compare_counts(data: ReidData) -> list[str]:
    """Counts, and how they differ from the published ones."""
    counts = {name: len(images) for name, images in _all_images(data).items()} | {"train identities": data.classes}
    lines = [", ".join(f"{name} {count:,}" for name, count in counts.items())]
    if data.name in PUBLISHED:
        lines.append(published_note(counts, data.name))
    return lines


def _check_tests(data: ReidData) -> list[str]:
    """Queries that nothing can answer: counted, and refused where they are all.

    Raises:
        InputError: a test in which no query has a match, with the reason.
    """
    notes = []
    for name, (query, gallery) in data.tests.items():
        shared = np.intersect1d(query.pids, np.arange(data.classes))
        if len(shared):
            example = data.pid_names[shared[0]]
            notes.append(f"test {name}: {len(shared)} of its identities are trained on, e.g. {example}")
        if gallery is None:
            alone = int((np.unique(query.pids, return_counts=True)[1] < 2).sum())
            if alone:
                notes.append(f"test {name}: {alone} identities have one image and can only be distractors")
            continue
        missing = ~np.isin(query.pids, gallery.pids)
        cameras: dict[int, set[int]] = {}
        for pid, camid in zip(gallery.pids.tolist(), gallery.camids.tolist()):
            cameras.setdefault(pid, set()).add(camid)
        asked = zip(query.pids.tolist(), query.camids.tolist())
        only_same = np.array([camid >= 0 and cameras.get(pid) == {camid} for pid, camid in asked])
        if missing.all() or (missing | only_same).all():
            raise InputError(
                f"test {name}: of {len(query)} queries {int(missing.sum())} are of vehicles missing from the "
                f"gallery and {int(only_same.sum())} have matches of their own camera only, which do not "
                "count; fix the column camid, or remove it to count them"
            )
        if missing.any() or only_same.any():
            notes.append(
                f"test {name}: {int(missing.sum())} queries have no match in the gallery and "
                f"{int(only_same.sum())} only from their own camera: they are not scored"
            )
    return notes
