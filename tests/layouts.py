"""Published sets as they lie on disk, small and drawn: what readers and converters are tried on."""

import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.seg import BACKGROUND_ID, PARTS, part_names
from demo import reid as demo_reid
from demo.draw import BODIES, MAKES, render
from demo.scene import VIEWS, demo_rng

VERI_COLOURS = ("yellow", "orange", "green", "gray", "red", "blue", "white", "golden", "brown", "black")
VERI_TYPES = ("sedan", "suv", "van", "hatchback", "mpv", "pickup", "bus", "truck", "estate")
# our word -> VeRi's where they differ; VeRi files silver under gray, and nothing drawn is golden
VERI_WORDS = {"grey": "gray", "silver": "gray", "coupe": "sedan", "wagon": "estate", "minivan": "mpv"}
VERI_VIEWS = {  # VeRi's view seen from the left and from the right; 0 front, 1 rear, 2 left, 5 right
    "left side": (2, 2), "right side": (5, 5), "front": (0, 0), "rear": (1, 1),
    "front three-quarter": (3, 6), "rear three-quarter": (4, 7),
}  # fmt: skip


def write_demo_reid(folder: Path, layout: str, train_ids=6, test_ids=6, images_per_id=7, size=16, **more):
    """veri776 (as demo.reid, and its label files) or vehicleid, whose every fourth test vehicle has two pictures."""
    rows = demo_reid.plan(train_ids, test_ids, images_per_id, 0)
    if layout == "veri776":
        sizes = {"train_ids": train_ids, "test_ids": test_ids, "images_per_id": images_per_id, "size": size}
        demo_reid.VERI.write(folder, **sizes, **more)
        for part, root in (("train", "TrainingImages"), ("test", "TestingImages")):
            listed = [row for row in rows if row["path"].startswith(f"image_{part}")]
            (folder / f"{part}_label.xml").write_text(veri_labels(root, listed), encoding="gb2312")
            points = [f"VeRi/{row['path']} {'-1 ' * 40}{veri_view(row)}" for row in listed]
            # the last training image has no line, as some have none in the published list
            write_lines(folder / f"keypoint_{part}.txt", points[: len(points) - (part == "train")])
        return
    tests = sorted({row["number"] for row in rows if row["split"] != "train"})
    rows = [row for row in rows if row["number"] not in tests[3::4] or row["shot"] < 2]
    (folder / "image").mkdir(parents=True)
    for count, row in enumerate(rows, 1):
        row["name"] = f"{count:07}"
        picture = render(0, row["pid"], row["camid"], row["viewid"], row["shot"], size)
        picture.save(folder / "image" / f"{count:07}.jpg")
    half, most = len(tests) // 2, 3 * len(tests) // 4  # no test holds another
    chosen = {"test_list_800": [tests[-1], *tests[: half - 1]], "test_list_1600": tests[-most:]}
    chosen |= {"test_list_2400": tests[:-1], "train_list": {row["number"] for row in rows} - set(tests)}
    for name, numbers in chosen.items():
        listed = (f"{row['name']} {row['number']}" for row in rows if row["number"] in numbers)
        write_lines(folder / "train_test_split" / f"{name}.txt", listed)


def veri_view(row: dict, seed: int = 0) -> int:
    """0..7 as in VeRi: the scene opens its stream with the side from which a three-quarter view is taken."""
    is_right = demo_rng(seed, "shot", row["pid"], row["camid"], row["viewid"], row["shot"]).choice((-1, 1)) > 0
    return VERI_VIEWS[VIEWS[row["viewid"]]][int(is_right)]


def write_lines(file: Path, lines) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def veri_labels(root: str, rows: list[dict]) -> str:
    lines = ['<?xml version="1.0" encoding="gb2312"?>', f'<{root} Version="1.0">', f'<Items number="{len(rows)}">']
    for row in rows:
        colour, body = (VERI_WORDS.get(row[key], row[key]) for key in ("colour", "body"))
        codes = f'colorID="{VERI_COLOURS.index(colour) + 1}" typeID="{VERI_TYPES.index(body) + 1}"'
        who = f'imageName="{Path(row["path"]).name}" vehicleID="{row["number"]:04}" cameraID="c{row["camera"]:03}"'
        lines.append(f"<Item {who} {codes}/>")
    return "\n".join([*lines, "</Items>", f"</{root}>"]) + "\n"


# StanfordCars

BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
CAR_FOLDERS = {"transfg": "car/", "torchvision": "stanford_cars/", "annos": ""}


def write_demo_cars(folder: Path, layout: str, classes: int, train: int, test: int, size: int) -> None:
    """The layouts of TransFG, of torchvision and of cars_annos.mat; of each class one vehicle."""
    pairs = itertools.islice(itertools.product(BODIES, list(MAKES)[:4]), classes)
    names, base = sorted(f"{make} {body.title()} 2012" for body, make in pairs), folder / CAR_FOLDERS[layout]
    rows = {"train": [], "test": []}
    for i in range(classes * (train + test)):
        split, k = ("train", i) if i < classes * train else ("test", i - classes * train)
        name = f"car_ims/{i + 1:06}.jpg" if layout == "annos" else f"cars_{split}/{k + 1:05}.jpg"
        picture = render(0, i % classes, i // classes % 8, i // classes % 6, i, (size, size * 3 // 4))
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(base / name)
        row = dict(zip(BOX, (1, 1, size, size * 3 // 4))) | {"class": i % classes + 1}
        more = {"relative_im_path": name} | row | {"test": int(split == "test")}
        rows[split].append(more if layout == "annos" else row | {"fname": Path(name).name})
    if layout == "annos":
        write_mat(folder / "cars_annos.mat", {"annotations": rows["train"] + rows["test"], "class_names": names})
        return
    (base / "devkit").mkdir()
    write_mat(base / "devkit/cars_train_annos.mat", {"annotations": rows["train"]})
    write_mat(base / "cars_test_annos_withlabels.mat", {"annotations": rows["test"]})
    write_mat(base / "devkit/cars_meta.mat", {"class_names": names})


def write_mat(file: Path, variables: dict[str, list[str] | list[dict[str, int | str]]]) -> None:
    """Texts as row cell arrays, dicts as row struct arrays, whole numbers as uint8 or uint16, as published."""
    from scipy.io import savemat

    content = {}
    for name, values in variables.items():
        content[name] = np.array(values, dtype=object)[None]
        if not isinstance(values[0], str):
            content[name] = np.empty((1, len(values)), dtype=[(field, object) for field in values[0]])
            for i, row in enumerate(values):
                cells = (v if isinstance(v, str) else np.array(v, np.min_scalar_type(v)) for v in row.values())
                content[name][0, i] = tuple(cells)
    savemat(file, content)


# PartImageNet

SYNSETS = "n03670208 n04037443 n03594945 n02701002 n03770679 n04285008 n02814533 n03417042 n04146614 n03769881"
BODY_SYNSETS = dict(zip(BODIES, SYNSETS.split()))
FISH, FISH_PART = "n01443537", 20  # what a converter must leave out
OOD_SPLITS = {"n03594945": "val", "n04146614": "test", "n02835271": "test"}  # of synsets; the others train


def write_demo_parts(folder: Path, release: str, num_images: int = 30, size: int = 40) -> None:
    """Cars and bicycles with masks: canonical (as datasets/seg.py reads them), or PartImageNet's releases seg and ood,
    with a fish in each split. Of each split the first picture is half as large, the mask of the second has a border
    without labels (not as polygons), that of the third a palette."""
    rows, seen = [], {"train": 0, "val": 0, "test": 0}
    for i in range(num_images + 3 * (release != "canonical")):
        pid, shot = divmod(i, 3)
        kind = "fish" if i >= num_images else "Bicycle" if i % 5 == 4 else "Car"
        split = [*seen][i - num_images] if kind == "fish" else (*["train"] * 7, "val", "test", "test")[pid % 10]
        body = list(BODIES)[pid % 10]
        synset = {"fish": FISH, "Car": BODY_SYNSETS[body], "Bicycle": ("n03792782", "n02835271")[pid % 2]}[kind]
        sides = ((1.25, 1.0), (1.0, 1.0), (1.0, 1.2), (1.37, 0.93), (0.93, 1.11))[seen[split] % 5]
        row = {"kind": kind, "name": f"{synset}_{i + 1}", "pid": pid, "shot": shot, "place": seen[split]}
        row["size"] = tuple(max(16, round(side * size / (2 if seen[split] == 0 else 1))) for side in sides)
        seen[split] += 1
        row["split"] = OOD_SPLITS.get(synset, split if kind == "fish" else "train") if release == "ood" else split
        rows.append(row)
        _write_pair(folder, release, row, synset)
    if release == "canonical":
        classes = {"classes": ["background", *part_names("car_bicycle")], "ignore": 255}
        (folder / "classes.json").write_text(json.dumps(classes))
    if release == "ood":
        for split in seen:
            (folder / f"{split}.json").write_text(json.dumps(coco([row for row in rows if row["split"] == split])))


def _write_pair(folder: Path, release: str, row: dict, synset: str) -> None:
    picture, mask = draw_pair(row)
    inner = f"{row['split']}/{synset}" if release == "ood" else f"images/{row['split']}"
    file = folder / inner / f"{row['name']}{'.jpg' if release == 'canonical' else '.JPEG'}"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, "JPEG")
    if release == "ood":
        return
    if row["place"] == 1:
        mask[:2], mask[-2:], mask[:, :2], mask[:, -2:] = (255,) * 4
    if release == "canonical":  # ids become places in the list of classes
        table, ids = np.arange(256, dtype=np.uint8), [number for kind in ("Car", "Bicycle") for number in PARTS[kind]]
        table[[BACKGROUND_ID, *ids]] = np.arange(len(ids) + 1)
        mask = table[mask]
    file = folder / "annotations" / row["split"] / f"{row['name']}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if row["place"] == 2:
        image = Image.fromarray(mask, "P")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(file)
    if release == "seg":
        whole = file.parent.with_name(f"{row['split']}_whole") / file.name
        whole.parent.mkdir(exist_ok=True)
        Image.fromarray(np.where(mask == BACKGROUND_ID, 158, 0).astype(np.uint8)).save(whole)  # 158: no object


# rectangles of each part, in tenths of the picture: left, upper, right, lower
DRAWN = {
    "Car": {24: (1, 3, 9, 8), 25: (2, 7, 4, 9), 26: (7, 2, 8, 4)},
    "Bicycle": {30: (1, 6, 4, 9), 27: (3, 3, 7, 5), 29: (2, 2, 4, 3), 28: (7, 1, 8, 4)},
    "fish": {FISH_PART: (1, 4, 9, 6)},
}


def draw_pair(row: dict) -> tuple[Image.Image, np.ndarray]:
    """Picture and mask, [H, W] uint8 in PartImageNet's ids: boxes of different colours, a little moved."""
    rng, size = np.random.default_rng([row["pid"], row["shot"]]), row["size"]
    pixels = rng.integers(140, 200, (*size[::-1], 3), dtype=np.uint8)
    mask, moved = np.full(size[::-1], BACKGROUND_ID, np.uint8), rng.uniform(-0.9, 0.9, 2)
    for part, box in DRAWN[row["kind"]].items():
        box = [round((x + moved[i % 2]) * size[i % 2] / 10) for i, x in enumerate(box)]
        place = slice(box[1], box[3]), slice(box[0], box[2])
        mask[place], pixels[place] = part, (9 * (part - 17), 30 * (part % 7), 250 - 6 * part)
        row.setdefault("polygons", {})[part] = [float(box[i]) for i in (0, 1, 2, 1, 2, 3, 0, 3)]
    return Image.fromarray(pixels), mask


def coco(rows: list[dict]) -> dict:
    """The annotations of a split as in the release "_OOD": a car's body lies over its tyres and mirrors; the first
    annotation has a polygon of two points besides."""
    categories = [{"id": i, "name": name} for parts in PARTS.values() for i, name in parts.items()]
    content = {"images": [], "annotations": [], "categories": [*categories, {"id": FISH_PART, "name": "Fish Body"}]}
    for image_id, row in enumerate(rows, 1):
        image = {"id": image_id, "file_name": f"{row['name']}.JPEG", "height": row["size"][1], "width": row["size"][0]}
        content["images"].append(image)
        for part, polygon in row["polygons"].items():
            polygons = [polygon] if content["annotations"] else [polygon, [1.0, 1.0, 9.0, 9.0]]
            annotation = {"id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": part}
            content["annotations"].append(annotation | {"segmentation": polygons, "iscrowd": 0})
    return content
