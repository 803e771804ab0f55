"""PartImageNet's vehicles, from either of its releases, as image and mask folders for --task seg.

    python -m tools.convert_partimagenet --input PartImageNet_OOD --output parts --label_space car_parts

Release "_OOD" (COCO json with polygons): its splits share no class, so each class is split anew, 85% train,
5% val, 10% test, unless --no-resplit. Release "_Seg" (PNG masks): its splits are kept. What is left out is
counted and printed, file by file in OUTPUT/conversion.json. The output appears whole or not at all.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool

SPACES = ("car_parts", "car_bicycle", "vehicle_parts")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.convert_partimagenet", __doc__)
    add, anew = parser.add_argument, argparse.BooleanOptionalAction
    add("--input", type=Path, required=True, help="folder of the release")
    add("--output", type=Path, required=True, help="folder to write")
    add("--label_space", default="vehicle_parts", choices=SPACES, help="whose parts to keep (default vehicle_parts)")
    add("--resplit", action=anew, default=None, help="split each class anew (default: on for ood, off for seg)")
    add("--seed", default=0, type=int, help="seed of the new splits (default 0)")
    add("--link", action="store_true", help="link the images instead of copying them (default off)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from PIL import Image

from datasets.images import IMAGE_ENDINGS, Unreadable, is_turned, open_image
from datasets.seg import BACKGROUND_ID, IGNORE, KINDS, PARTS, SPLITS, open_mask, part_names
from util.errors import InputError

FIELDS = {
    "annotations": {"image_id": int, "category_id": int},
    "images": {"id": int, "file_name": str, "width": int, "height": int},
}
FAR = 100_000  # px: a point that is farther away is no point of a picture
NUM_IDS = 40  # 0 to 23 are parts of animals, 38 and 39 of bottles
TEST_SHARE, VAL_SHARE = 0.10, 0.05  # about those of the release "_Seg"
SYNSETS = {
    "Car": (
        "n02701002 n02814533 n02930766 n03100240 n03417042 n03444034 n03445924 n03594945 n03670208 n03769881 "
        "n03770679 n03977966 n04037443 n04065272 n04146614 n04252225 n04285008 n04465501 n04487081"
    ).split(),
    "Bicycle": "n02835271 n03785016 n03791053 n03792782 n04482393 n04509417".split(),
    "Boat": "n03947888 n04147183 n04483307 n04612504".split(),
    "Aeroplane": "n02690373 n04552348".split(),
}
KIND_OF = {synset: kind for kind, synsets in SYNSETS.items() for synset in synsets}


def main(args) -> dict:
    """Convert; returns the counts of conversion.json."""
    source, output, space = args.input.absolute(), args.output.absolute(), args.label_space
    if not source.is_dir():
        raise InputError(f"--input {source} is no folder: give the folder of PartImageNet")
    jsons = {file.stem: file for folder in ("annotations", ".") for file in (source / folder).glob("*.json")}
    jsons = {split: jsons[split] for split in SPLITS if split in jsons}
    if not jsons and not (source / "annotations" / "train").is_dir():
        raise InputError(
            f'{source} is neither release of PartImageNet: "_OOD" has train.json, val.json, test.json, '
            '"_Seg" has images/train and annotations/train; name the folder that holds them'
        )
    resplit = bool(jsons) if args.resplit is None else args.resplit
    settings = {"input": str(source), "release": "ood" if jsons else "seg", "label_space": space}
    settings |= {"resplit": args.seed if resplit else None}
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        report = output / "conversion.json"
        result = json.loads(report.read_text()) if report.is_file() else {}
        if {name: result.get(name) for name in settings} == settings:
            print(f"{output} already holds this conversion: left as it is", flush=True)
            return result
        raise InputError(f"{output} exists and does not hold this conversion: name another output or remove it first.")
    rows, left_out, dropped = [], defaultdict(list), Counter()
    for row in read_ood(source, jsons) if jsons else read_seg(source):
        if KIND_OF.get(row["name"][:9]) not in KINDS[space]:
            dropped["pictures of something else"] += 1
        elif why := problem(row, dropped):
            left_out[why].append(f"{row['split']}/{row['name']}")
        else:
            rows.append(row | {"synset": row["name"][:9]})
    if not rows:
        reasons = ", ".join(f"{len(names)} x {why}" for why, names in left_out.items()) or "nothing, it has none"
        raise InputError(f"{source} has no picture of {', '.join(KINDS[space])} that can be used; left out: {reasons}")
    if resplit:
        split_anew(rows, args.seed)
    kinds = {split: Counter(KIND_OF[row["synset"]] for row in rows if row["split"] == split) for split in SPLITS}
    pictures = {split: dict(sorted(counts.items())) for split, counts in kinds.items()}
    result = settings | {"pictures": pictures, "synsets": len({row["synset"] for row in rows})}
    result |= {"dropped": dict(sorted((+dropped).items())), "left_out": dict(left_out)}
    write_set(output, rows, result, args.link)
    print(f"written: {json.dumps(pictures)}, dropped: {json.dumps(result['dropped'])}", flush=True)
    for why, names in left_out.items():
        print(f"left out: {len(names)} ({why}), first {names[0]}")
    return result


def read_ood(source: Path, jsons: dict[str, Path]) -> Iterator[dict]:
    """The release "_OOD": COCO json; the folder of an image is the first nine characters of its name."""
    for split, file in jsons.items():
        content = read_coco(file)
        annotations: dict[int, list] = defaultdict(list)
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        root = next((p for p in (source / split, source / "images" / split) if p.is_dir()), source / split)
        for image in content["images"]:
            name, drawn = Path(image["file_name"]).name, annotations[image["id"]]
            picture = next((p for p in (root / name[:9] / name, root / name) if p.is_file()), root / name)
            size = (image["width"], image["height"])
            yield {"split": split, "name": name, "source": picture, "size": size, "annotations": drawn}


def read_seg(source: Path) -> Iterator[dict]:
    """The release "_Seg": PNG masks whose value 40 is the background."""
    for split in SPLITS:
        folder, masks = source / "images" / split, source / "annotations" / split
        for picture in sorted(folder.rglob("*")):
            if picture.suffix.lower() in IMAGE_ENDINGS:
                mask = masks / picture.relative_to(folder).with_suffix(".png")
                yield {"split": split, "name": picture.name, "source": picture, "mask": mask}


def read_coco(file: Path) -> dict:
    """A json of COCO's form whose ids of parts are those of the release; InputError where it is not."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {int(c["id"]): f"{c.get('supercategory', '')} {c['name']}" for c in content.get("categories", ())}
        for entry, kinds in FIELDS.items():
            for row in content[entry]:
                if wrong := [name for name, kind in kinds.items() if type(row.get(name)) is not kind]:
                    raise ValueError(f"one of its {entry} has {wrong[0]} {str(row.get(wrong[0]))[:40]!r}")
        ids = {annotation["category_id"] for annotation in content["annotations"]}
        if strange := ids - set(range(NUM_IDS)):
            raise ValueError(f"category_id {min(strange)}, but ids go from 0 to {NUM_IDS - 1}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is no COCO json of PartImageNet: {type(error).__name__} {error}") from error
    for number, part in (pair for parts in PARTS.values() for pair in parts.items()):
        places = [i for i, name in names.items() if re.sub("[^a-z]+", " ", name.lower()).endswith(part.lower())]
        if places and number not in places:
            wrong = f"calls category {places[0]} '{part}', which is {number} in the release (ids 0 to {NUM_IDS - 1})"
            raise InputError(f"{file} {wrong}: give the release's own json")
    return content


def problem(row: dict, dropped: Counter) -> str:
    """'' or why a picture cannot be used; its annotations become `polygons`, a list of (id, polygons)."""
    file, what, values = row["source"], "image", []
    try:
        image = open_image(file, decode=False)
        sizes = {image.size, image.size[::-1]} if is_turned(image) else {image.size}
        if "mask" in row:
            file, what = row["mask"], "mask"
            mask = open_mask(file)
            row["size"], values = mask.shape[::-1], np.unique(mask).tolist()
    except Unreadable as error:
        if not file.is_file():
            return "no mask" if what == "mask" else "no such file"
        return f"the {what} cannot be read ({str(error)[:60]})"
    if strange := [value for value in values if NUM_IDS < value != IGNORE]:
        meant = f"0 to {NUM_IDS - 1}, {BACKGROUND_ID} for the background, {IGNORE} for none"
        raise InputError(f"{file} has the value {strange[0]}: masks of parts hold {meant}, folders *_whole others")
    if row["size"] not in sizes:
        return "image and mask differ in size"
    if "mask" in row:
        return ""
    row["polygons"] = []
    for annotation in row.pop("annotations"):
        polygons = annotation.get("segmentation")
        polygons = polygons if isinstance(polygons, list) else []  # run-length codes are of crowds
        whole = [ring for ring in polygons if isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0]
        near = [ring for ring in whole if all(type(x) in (int, float) and abs(x) <= FAR for x in ring)]
        dropped["polygons of fewer than 3 points"] += len(polygons) - len(whole)
        dropped["polygons with NaN, texts or points far away"] += len(whole) - len(near)
        dropped["annotations without a usable polygon"] += not near
        row["polygons"] += [(annotation["category_id"], near)] if near else []
    # all background would teach that there is no vehicle
    return "" if row["polygons"] else "no annotation that can be drawn"


def split_anew(rows: list[dict], seed: int) -> None:
    """10% of each synset's pictures to test, 5% to val, at least one each where there are three; in place."""
    by_synset = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["name"]):
        by_synset[row["synset"]].append(row)
    for synset, part in by_synset.items():
        key = hashlib.blake2b(f"resplit/{seed}/{synset}".encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        test, val = (max(int(len(part) >= 3), round(share * len(part))) for share in (TEST_SHARE, VAL_SHARE))
        for place, index in enumerate(rng.permutation(len(part)).tolist()):
            part[index]["split"] = "test" if place < test else "val" if place < test + val else "train"


def fill_polygon(polygon: list[float], height: int, width: int) -> np.ndarray:
    """[height, width] bool: pixels whose centre, (column + 0.5, row + 0.5), lies inside [x, y, x, y, ...] by the even-
    odd rule; it may leave the picture."""
    points, centres = np.asarray(polygon, dtype=np.float64).reshape(-1, 2), np.arange(height) + 0.5
    inside = np.zeros((height, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
        rows = np.flatnonzero((y0 <= centres) != (y1 <= centres))  # whose centres the edge passes
        crossings = x0 + (centres[rows] - y0) * (x1 - x0) / (y1 - y0)
        inside[rows] ^= np.arange(width) + 0.5 >= crossings[:, None]
    return inside


def draw_polygons(polygons: list[tuple[int, list]], size: tuple[int, int]) -> np.ndarray:
    """(id, polygons) of each annotation, (width, height) in px -> [H, W] uint8 ids, the largest region first, so that
    small parts lie on top."""
    width, height = size
    regions = [(n, np.any([fill_polygon(ring, height, width) for ring in rings], axis=0)) for n, rings in polygons]
    mask = np.full((height, width), BACKGROUND_ID, dtype=np.uint8)
    for number, region in sorted(regions, key=lambda pair: -int(pair[1].sum())):
        mask[region] = number
    return mask


def write_set(output: Path, rows: list[dict], result: dict, link: bool) -> None:
    """Pictures, copied or linked, masks and classes.json under a temporary name, then renamed."""
    space = result["label_space"]
    ids = [number for kind in KINDS[space] for number in PARTS[kind]]
    table = np.zeros(256, dtype=np.uint8)  # PartImageNet's ids -> classes; other parts are background
    table[[*ids, IGNORE]] = [*range(1, len(ids) + 1), IGNORE]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / "set"
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True)
            (folder / "annotations" / split).mkdir(parents=True)
        for row in rows:
            mask = open_mask(row["mask"]) if "mask" in row else draw_polygons(row["polygons"], row["size"])
            mask_file = (folder / "annotations" / row["split"] / row["name"]).with_suffix(".png")
            Image.fromarray(table[mask]).save(mask_file)
            (os.symlink if link else shutil.copyfile)(row["source"], folder / "images" / row["split"] / row["name"])
        classes = {"classes": ["background", *part_names(space)], "ignore": IGNORE}
        for name, content in (("classes.json", classes), ("conversion.json", result)):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")
        folder.rename(output)


if __name__ == "__main__":
    run_tool(main, ARGS, ARGS.output / "conversion.json")
