"""PartImageNet's vehicles, from either of its releases, as image and mask folders for --task seg.

    python -m tools.convert_partimagenet --input PartImageNet_OOD --output parts --label_space car_parts

Release "_OOD" (COCO json with polygons): its splits share no class, so each class is split anew, 85% train,
5% val, 10% test, unless --no-resplit. Release "_Seg" (PNG masks): its splits are kept. What is left out is
counted and printed, file by file in OUTPUT/conversion.json. The output appears whole or not at all.
"""

import argparse
import json
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.images import UNREADABLE, is_turned, why_unreadable
from datasets.manifest import IMAGE_ENDINGS
from datasets.partimagenet import BACKGROUND_ID, KINDS, NUM_IDS, PARTS, kind_of, part_names
from datasets.polygons import fill_polygon
from datasets.seg import SPLITS, open_mask, read_parts
from demo.folder import holds_set, write_folder
from demo.vehicle import demo_rng
from metrics.seg import IGNORE
from util.cli import Parser, run_tool
from util.errors import InputError

TEST_SHARE, VAL_SHARE = 0.10, 0.05  # about those of the release "_Seg"
SYNSET = re.compile(r"n\d{8}")


@dataclass
class Found:
    """rows: one a picture: source (its file), split, synset, name, and mask (a file) or polygons (a list of
    (id, polygons)). left_out: {why: names}. counts: of what was dropped inside pictures."""

    rows: list[dict] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter = field(default_factory=Counter)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.convert_partimagenet", __doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, help="folder of the release")
    add("--output", type=Path, required=True, help="folder to write")
    add("--release", default="auto", choices=("auto", "ood", "seg"), help="which it is (default auto)")
    add("--label_space", default="vehicle_parts", choices=tuple(KINDS),
        help="whose parts become classes; only their pictures are kept (default vehicle_parts)")  # fmt: skip
    add("--resplit", action=argparse.BooleanOptionalAction, default=None,
        help="split each class anew (default: on for ood, off for seg)")  # fmt: skip
    add("--seed", default=0, type=int, help="seed of the new splits (default 0)")
    add("--link", action="store_true", help="link the images instead of copying them (default off)")
    add("--processes", default=None, type=int, help="workers (default: one a core)")
    return parser


def main(args) -> dict:
    """Convert; returns the counts of conversion.json."""
    source, output = args.input.absolute(), args.output.absolute()
    if not source.is_dir():
        raise InputError(f"--input {source} is no folder: give the folder of PartImageNet")
    release = args.release if args.release != "auto" else which_release(source)
    resplit = release == "ood" if args.resplit is None else args.resplit
    settings = {"input": str(source), "release": release, "label_space": args.label_space}
    settings |= {"resplit": args.seed if resplit else None}
    about = json.dumps(settings, indent=1) + "\n"
    if holds_set(output, "source.json", about, "conversion"):
        print(f"{output} already holds this conversion: left as it is", flush=True)
        return json.loads((output / "conversion.json").read_text())
    found = (read_ood if release == "ood" else read_seg)(source, args.label_space)
    if not found.rows:
        raise InputError(
            f"{source} has no picture of {', '.join(KINDS[args.label_space])} that can be used; left out: "
            f"{_reasons(found) or 'nothing, it holds no such picture'}"
        )
    if resplit:
        split_anew(found.rows, args.seed)
    for row in found.rows:
        row["path"] = f"images/{row['split']}/{row['name']}"
    result = {**settings, **summary(found)}

    def finish(folder: Path) -> None:
        classes = {"classes": ["background", *part_names(args.label_space)], "ignore": IGNORE}
        (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
        (folder / "conversion.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "source.json").write_text(about)

    job = partial(write_pair, space=args.label_space, link=args.link)
    write_folder(output, found.rows, job, args.processes, finish)
    report(result, output)
    return result


def which_release(source: Path) -> str:
    """ood or seg, by the files that are there.

    Raises:
        InputError: neither.
    """
    if any(file.is_file() for file in json_files(source).values()):
        return "ood"
    if (source / "annotations" / "train").is_dir():
        return "seg"
    raise InputError(
        f'{source} is neither release of PartImageNet: "_OOD" has train.json, val.json, test.json, '
        '"_Seg" has images/train and annotations/train; name the folder that holds them'
    )


def json_files(source: Path) -> dict[str, Path]:
    """{split: its json}, beside the images or in annotations/."""
    found = {}
    for split in SPLITS:
        beside = source / f"{split}.json"
        found[split] = beside if beside.is_file() else source / "annotations" / f"{split}.json"
    return found


def read_ood(source: Path, space: str) -> Found:
    """The release "_OOD": COCO json; the folder of an image is the first nine characters of its name."""
    found = Found()
    for split, file in json_files(source).items():
        if not file.is_file():
            continue
        content = read_coco(file)
        polygons: dict[int, list] = defaultdict(list)
        for annotation in content["annotations"]:
            polygons[annotation["image_id"]].append(annotation)
        root = next((p for p in (source / split, source / "images" / split) if p.is_dir()), source / split)
        for image in content["images"]:
            name = Path(image["file_name"]).name
            kind = kind_of(name[:9])
            if kind not in KINDS[space]:
                found.counts["pictures of something else"] += 1
                continue
            picture = next((p for p in (root / name[:9] / name, root / name) if p.is_file()), None)
            why = size_problem(picture, (image["width"], image["height"])) if picture else "no such file"
            if why:
                found.left_out[why].append(f"{split}/{name}")
                continue
            drawn = usable(polygons[image["id"]], found.counts)
            if not drawn:  # all background would teach that there is no vehicle
                found.left_out["no annotation that can be drawn"].append(f"{split}/{name}")
                continue
            found.rows.append(
                {
                    "source": picture, "split": split, "synset": name[:9], "name": name,
                    "size": (image["width"], image["height"]), "polygons": drawn,
                }
            )  # fmt: skip
    return found


def read_coco(file: Path) -> dict:
    """A json of COCO's form whose ids of parts are those of the release.

    Raises:
        InputError: it is not, or counts from another number.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {c["id"]: f"{c.get('supercategory', '')} {c['name']}" for c in content.get("categories", ())}
        for image in content["images"]:
            image["id"], image["file_name"], image["width"], image["height"]  # noqa: B018
        for annotation in content["annotations"]:
            if not 0 <= int(annotation["category_id"]) < NUM_IDS:
                raise ValueError(f"category_id {annotation['category_id']}, but ids go to {NUM_IDS - 1}")
            annotation["image_id"]  # noqa: B018
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no COCO json of PartImageNet: {type(error).__name__} {error}") from error
    for parts in PARTS.values():
        for number, part in parts.items():
            places = [i for i, name in names.items() if _letters(name).endswith(_letters(part))]
            if places and number not in places:
                raise InputError(
                    f"{file} calls category {places[0]} '{part}', which is {number} in the release (ids 0 "
                    f"to {NUM_IDS - 1}): give the release's own json"
                )
    return content


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def usable(annotations: list[dict], counts: Counter) -> list[tuple[int, list]]:
    """(id, polygons) of an image's annotations; what cannot be drawn is counted."""
    found = []
    for annotation in annotations:
        polygons = annotation.get("segmentation")
        if not isinstance(polygons, list):
            counts["annotations without polygons"] += 1
            continue
        whole = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
        counts["polygons of fewer than 3 points"] += len(polygons) - len(whole)
        if whole:
            found.append((int(annotation["category_id"]), whole))
        else:
            counts["annotations without a usable polygon"] += 1
    return found


def read_seg(source: Path, space: str) -> Found:
    """The release "_Seg": PNG masks whose value 40 is the background."""
    found = Found()
    for split in SPLITS:
        folder, masks = source / "images" / split, source / "annotations" / split
        for picture in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if picture.suffix.lower() not in IMAGE_ENDINGS:
                continue
            name = picture.name
            if not SYNSET.match(name):
                found.left_out["the name does not begin with a synset"].append(f"{split}/{name}")
            elif kind_of(name[:9]) not in KINDS[space]:
                found.counts["pictures of something else"] += 1
            else:
                mask = masks / picture.relative_to(folder).with_suffix(".png")
                why = mask_problem(picture, mask)
                if why:
                    found.left_out[why].append(f"{split}/{name}")
                else:
                    row = {"source": picture, "split": split, "synset": name[:9], "name": name, "mask": mask}
                    found.rows.append(row)
    return found


def size_problem(picture: Path, size: tuple[int, int]) -> str:
    """'' or why a picture cannot carry a mask of this (width, height)."""
    try:
        with Image.open(picture) as image:
            sizes = {image.size, image.size[::-1]} if is_turned(image) else {image.size}
    except UNREADABLE as error:
        return f"the image cannot be read ({why_unreadable(error)[:60]})"
    return "" if size in sizes else "image and mask differ in size"


def mask_problem(picture: Path, file: Path) -> str:
    """'' or why a pair cannot be used.

    Raises:
        InputError: values that the release does not have.
    """
    if not file.is_file():
        return "no mask"
    try:
        mask = open_mask(file)
    except UNREADABLE as error:
        return f"the mask cannot be read ({why_unreadable(error)[:60]})"
    strange = [value for value in np.unique(mask).tolist() if NUM_IDS < value != IGNORE]
    if strange:
        raise InputError(
            f"{file} has the value {strange[0]}: masks of parts hold 0 to {NUM_IDS - 1}, {BACKGROUND_ID} for "
            f"the background, {IGNORE} for none (folders *_whole hold objects, not parts)"
        )
    return size_problem(picture, mask.shape[::-1])


def split_anew(rows: list[dict], seed: int) -> None:
    """10% of each synset's pictures to test, 5% to val, at least one each where there are three; in place."""
    by_synset = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["name"]):
        by_synset[row["synset"]].append(row)
    for synset, part in by_synset.items():
        order = demo_rng("resplit", seed, synset).permutation(len(part))
        few = int(len(part) >= 3)
        test, val = (max(few, round(share * len(part))) for share in (TEST_SHARE, VAL_SHARE))
        for place, index in enumerate(order.tolist()):
            part[index]["split"] = "test" if place < test else "val" if place < test + val else "train"


def summary(found: Found) -> dict:
    """Counts of what is there and of what is not."""
    pictures = {
        split: dict(sorted(Counter(kind_of(r["synset"]) for r in found.rows if r["split"] == split).items()))
        for split in SPLITS
    }
    synsets = len({row["synset"] for row in found.rows})
    return {
        "pictures": pictures,
        "synsets": synsets,
        "dropped": {name: count for name, count in sorted(found.counts.items()) if count},
        "left_out": dict(found.left_out),
    }


def _reasons(found: Found) -> str:
    return ", ".join(f"{len(names)} x {why}" for why, names in found.left_out.items())


def label_table(space: str) -> np.ndarray:
    """[256] uint8: PartImageNet's ids -> classes of a label space; other parts are background."""
    table = np.zeros(256, dtype=np.uint8)
    ids = [number for kind in KINDS[space] for number in PARTS[kind]]
    table[ids] = np.arange(1, len(ids) + 1)
    table[IGNORE] = IGNORE
    return table


def draw_polygons(polygons: list[tuple[int, list]], size: tuple[int, int]) -> np.ndarray:
    """[H, W] uint8 ids: the largest region first, so that small parts lie on top.

    Args:
        polygons: (id, polygons) of each annotation. size: (width, height) in px.
    """
    width, height = size
    regions = []
    for number, rings in polygons:
        region = np.zeros((height, width), dtype=bool)
        for ring in rings:
            region |= fill_polygon(ring, height, width)
        regions.append((number, region))
    mask = np.full((height, width), BACKGROUND_ID, dtype=np.uint8)
    for number, region in sorted(regions, key=lambda pair: -int(pair[1].sum())):
        mask[region] = number
    return mask


def write_pair(row: dict, folder: Path, space: str, link: bool) -> None:
    """The picture, copied or linked, and its mask."""
    mask = open_mask(row["mask"]) if "mask" in row else draw_polygons(row["polygons"], row["size"])
    if link:
        (folder / row["path"]).symlink_to(row["source"])
    else:
        shutil.copyfile(row["source"], folder / row["path"])
    file = (folder / "annotations" / row["split"] / row["name"]).with_suffix(".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label_table(space)[mask]).save(file)


def report(result: dict, output: Path) -> None:
    """Print what was written and what was not."""
    for split, kinds in result["pictures"].items():
        print(f"{split}: " + (", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"))
    for what, count in result["dropped"].items():
        print(f"dropped: {count} {what}")
    for why, names in result["left_out"].items():
        print(f"left out: {len(names)} ({why}), first {names[0]}")
    written = tuple(split for split, kinds in result["pictures"].items() if kinds)
    print("\n".join(read_parts(output, "own", written).notes), flush=True)


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, ARGS.output / "conversion.json")
