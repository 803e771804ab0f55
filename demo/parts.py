"""Drawn cars and bicycles with masks of their parts, without gated data: as image and mask folders, and as
PartImageNet publishes them.

Pictures are those of demo/render.py and demo/bicycle.py; a vehicle is in one split only.
Sizes are odd, some upright. Of each split the first picture is half as large, the second mask has a border
without labels (not as polygons), the third mask a palette; some views show no mirrors.

    python -m demo.parts --output demo_parts --release canonical
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import contourpy
import numpy as np
from PIL import Image

from datasets.seg import BACKGROUND_ID, PARTS, part_names
from demo.bicycle import render_bicycle
from demo.folder import demo_parser, holds_set, run_demo, write_folder
from demo.others import draw_other
from demo.render import render_parts
from demo.vehicle import BODIES, CAMERAS, VIEWS, demo_rng
from metrics.seg import IGNORE
from util.errors import InputError

VERSION = 1  # raise when the pictures change
RELEASES = ("canonical", "seg", "ood")
SHAPES = ((1.25, 1.0), (1.0, 1.0), (1.0, 1.2), (1.37, 0.93), (0.93, 1.11))  # width and height / size
SPLITS = {"train": 7, "val": 1, "test": 2}  # of ten vehicles
BODY_SYNSETS = dict(
    zip(BODIES, "n03670208 n04037443 n03594945 n02701002 n03770679 n04285008 n02814533 n03417042 n04146614 "
        "n03769881".split())
)  # fmt: skip
BICYCLE_SYNSETS = ("n03792782", "n02835271")
OTHER_SYNSET, OTHER_PART = "n01443537", 20  # a fish: what a converter must leave out
OOD_SPLITS = {"n03594945": "val", "n04146614": "test", "n02835271": "test"}  # of synsets; the others train


def plan(num_images: int, size: int, bicycles: float, seed: int) -> list[dict]:
    """One row a picture: kind (Car, Bicycle, other), pid, camid, viewid, shot, split, synset, name, size
    (width, height) in px, and border, palette: whether its mask has them."""
    rows, seen = [], dict.fromkeys(SPLITS, 0)
    order = [split for split, share in SPLITS.items() for _ in range(share)]
    for number in range(num_images):
        kind = "Bicycle" if int((number + 1) * bicycles) > int(number * bicycles) else "Car"
        pid, shot = divmod(number, 3)
        rng = demo_rng(seed, "parts", number)
        split = order[(pid + pid // len(order)) % len(order)]
        body = list(BODIES)[pid % len(BODIES)]
        synset = BICYCLE_SYNSETS[pid % 2] if kind == "Bicycle" else BODY_SYNSETS[body]
        place, scale = seen[split], size / 2 if seen[split] == 0 else size
        seen[split] += 1
        width, height = (max(16, round(side * scale)) for side in SHAPES[place % len(SHAPES)])
        views = len(VIEWS)
        rows.append({
            "kind": kind, "pid": pid, "camid": int(rng.integers(len(CAMERAS))),
            "viewid": int(rng.permutation(views)[shot % views]), "shot": shot, "split": split,
            "synset": synset, "name": f"{synset}_{number + 1}", "size": (width, height),
            "border": place == 1, "palette": place == 2,
        })  # fmt: skip
    for split in SPLITS:
        number = len(rows) + 1
        rows.append({
            "kind": "other", "pid": number, "camid": 0, "viewid": 0, "shot": 0, "split": split,
            "synset": OTHER_SYNSET, "name": f"{OTHER_SYNSET}_{number}", "size": (size, size),
            "border": False, "palette": False,
        })  # fmt: skip
    return rows


def draw(row: dict, seed: int) -> tuple[Image.Image, np.ndarray]:
    """Picture and mask, [H, W] uint8 in PartImageNet's ids (255: no label)."""
    if row["kind"] == "other":
        picture = draw_other("flower", seed, row["pid"], row["size"][0])
        mask = np.full(picture.size[::-1], BACKGROUND_ID, dtype=np.uint8)
        mask[len(mask) // 4 : len(mask) // 2, len(mask) // 4 :] = OTHER_PART
        return picture, mask
    render = render_bicycle if row["kind"] == "Bicycle" else render_parts
    ids = (row[name] for name in ("pid", "camid", "viewid", "shot"))
    picture, mask = render(seed, *ids, row["size"])
    if row["border"]:
        mask[:2], mask[-2:], mask[:, :2], mask[:, -2:] = (IGNORE,) * 4
    return picture, mask


def save_mask(mask: np.ndarray, file: Path, palette: bool) -> None:
    """As PNG of mode L, or P with a colour for each value."""
    image = Image.fromarray(mask)
    if palette:
        image = Image.fromarray(mask, "P")
        image.putpalette(demo_rng("palette").integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(file)


def canonical_values(mask: np.ndarray) -> np.ndarray:
    """PartImageNet's ids -> places in the list of classes of car_bicycle, the background being 0."""
    table = np.arange(256, dtype=np.uint8)
    table[BACKGROUND_ID] = 0
    ids = [number for kind in ("Car", "Bicycle") for number in PARTS[kind]]
    table[ids] = np.arange(1, len(ids) + 1)
    return table[mask]


def _write_pair(row: dict, folder: Path, release: str, seed: int) -> None:
    """The picture of a row, and its mask where the release has masks."""
    picture, mask = draw(row, seed)
    picture.save(folder / row["path"], format="JPEG", quality=90)
    if release == "ood":  # its polygons are made from them afterwards
        file = folder / "masks" / f"{row['name']}.png"
        file.parent.mkdir(exist_ok=True)
        return save_mask(mask, file, False)
    values = canonical_values(mask) if release == "canonical" else mask
    file = folder / "annotations" / row["split"] / f"{row['name']}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_mask(values, file, row["palette"])
    if release == "seg":
        whole = file.parent.with_name(f"{row['split']}_whole") / file.name
        whole.parent.mkdir(exist_ok=True)
        save_mask(np.where(mask == BACKGROUND_ID, 158, 0).astype(np.uint8), whole, False)  # 158: no object
        size = {"height": mask.shape[0], "width": mask.shape[1]}
        file.with_suffix(".json").write_text(json.dumps(size))


def outlines(mask: np.ndarray) -> list[list[float]]:
    """The outer rings of a bool mask [H, W] as COCO polygons, [x, y, x, y, ...] in px; they hold the centres
    of exactly its pixels, but for holes, which COCO's polygons do not know."""
    padded = np.pad(mask, 1).astype(float)
    found = []
    for ring in contourpy.contour_generator(z=padded).lines(0.5):
        x, y = ring[:, 0], ring[:, 1]
        if (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0:
            found.append((ring[:-1] - 0.5).round(2).ravel().tolist())
    return found


def coco(rows: list[dict], masks: Path) -> dict:
    """The annotations of a split as in the release "_OOD": a car's body lies over its tyres and mirrors; the
    first annotation has a polygon of two points besides.

    Args:
        masks: folder with NAME.png in PartImageNet's ids.
    """
    content = {"images": [], "annotations": []}
    content["categories"] = [
        {"id": number, "name": name, "supercategory": kind}
        for kind, parts in PARTS.items() for number, name in parts.items()
    ] + [{"id": OTHER_PART, "name": "Fish Body", "supercategory": "Fish"}]  # fmt: skip
    for image_id, row in enumerate(rows, 1):
        mask = np.asarray(Image.open(masks / f"{row['name']}.png"))
        height, width = mask.shape
        content["images"].append({"id": image_id, "file_name": f"{row['name']}.JPEG", "height": height, "width": width})
        for number in np.unique(mask[mask != BACKGROUND_ID]).tolist():
            is_body = row["kind"] == "Car" and number == min(PARTS["Car"])
            region = mask != BACKGROUND_ID if is_body else mask == number
            polygons = outlines(region)
            if not content["annotations"]:
                polygons.append([1.0, 1.0, 9.0, 9.0])
            ys, xs = np.nonzero(region)
            left, top = int(xs.min()), int(ys.min())
            box = [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": number,
                    "segmentation": polygons, "bbox": box, "area": int(region.sum()), "iscrowd": 0,
                }
            )  # fmt: skip
    return content


def write_demo_parts(
    output: Path,
    release: str,
    num_images: int = 600,
    size: int = 128,
    bicycles: float = 0.2,
    seed: int = 0,
    processes: int | None = None,
) -> dict:
    """Write the set into a new folder; one that already holds this very set is left as it is.

    Args:
        release: canonical (datasets/seg.py), seg or ood (PartImageNet's two releases, whose splits share
            all classes, or none; both have a few pictures of something else).
        num_images: pictures of vehicles. size: side in px, about. bicycles: their share, 0 to 1.
        processes: number of workers, None: one per core. They change the speed only.
    Returns:
        images by split, and written.
    Raises:
        InputError: a setting that is out of range, or an `output` that holds something else.
    """
    output = Path(output).absolute()
    if release not in RELEASES or num_images < 30 or size < 32 or not 0 <= bicycles <= 1:
        raise InputError(
            f"release must be one of {', '.join(RELEASES)}, num_images 30 or more, size 32 or more and "
            f"bicycles in [0, 1], got {release}, {num_images}, {size} and {bicycles:g}"
        )
    rows = plan(num_images, size, bicycles, seed)
    if release == "canonical":
        rows = [row for row in rows if row["kind"] != "other"]
    for row in rows:
        if release == "ood":
            row["border"] = False
            row["split"] = OOD_SPLITS.get(row["synset"], row["split"] if row["kind"] == "other" else "train")
            row["path"] = f"{row['split']}/{row['synset']}/{row['name']}.JPEG"
        else:
            row["path"] = f"images/{row['split']}/{row['name']}.JPEG"
    by_split = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    counts = {split: len(part) for split, part in by_split.items()}
    settings = {"release": release, "num_images": num_images, "size": size, "bicycles": bicycles}
    about = json.dumps({**settings, "seed": seed, "version": VERSION}) + "\n"
    if holds_set(output, "demo_parts.json", about, "set of parts"):
        return {**counts, "written": False}

    def finish(folder: Path) -> None:
        if release == "canonical":
            classes = {"classes": ["background", *part_names("car_bicycle")], "ignore": IGNORE}
            (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
        if release == "ood":
            for split, part in by_split.items():
                (folder / f"{split}.json").write_text(json.dumps(coco(part, folder / "masks")))
            shutil.rmtree(folder / "masks")
        (folder / "demo_parts.json").write_text(about)

    write_folder(output, rows, partial(_write_pair, release=release, seed=seed), processes, finish)
    return {**counts, "written": True}


def main():
    parser = demo_parser(
        "demo_parts",
        "Write drawn cars and bicycles with masks of their parts.",
        128,
        "side of a picture in pixels, about",
    )
    add = parser.add_argument
    add("--release", choices=RELEASES, required=True, default=argparse.SUPPRESS, help="layout; no default")
    add("--num_images", type=int, default=600, help="pictures of vehicles")
    add("--bicycles", type=float, default=0.2, help="share of bicycles, 0 to 1")
    run_demo(parser, write_demo_parts)


if __name__ == "__main__":
    main()
