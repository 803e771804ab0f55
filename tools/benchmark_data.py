"""The data path, side by side: images per second and core of MAE's transform pipeline and of ours.

    python -m tools.benchmark_data --data_path PHOTOS
    python -m tools.benchmark_data --data_path PHOTOS --large 64    # also big photos, tiled from these

`mae` is written from the paper's recipe with torchvision: decode, RandomResizedCrop(0.2..1, bicubic), flip,
float32, normalise. `ours` is the training data set itself, masks included; `packed` the same on a packed set
(tools.pack). One process, one thread; the variants take turns image block by image block and are timed in CPU
seconds, so other work on the machine disturbs all of them alike. Medians over the rounds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from datasets.images import open_rgb
from datasets.manifest import list_images
from datasets.path_list import PathList
from datasets.pretrain import PretrainDataset
from tools import pack
from util.cli import Parser, parse_input_size, run_tool
from util.errors import InputError


def get_args_parser():
    parser = Parser("tools.benchmark_data", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--data_path", required=True, help="folder or manifest, as for main_pretrain.py")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all)")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--images", default=512, type=int, help="images a round, spread over the list (default 512)")
    add("--rounds", default=5, type=int, help="rounds; medians are reported (default 5)")
    add("--large", default=0, type=int,
        help="also time this many photos of 1024 x 768 to 2048 x 1536 px, tiled from the images (default 0)")
    add("--output", default="benchmark_data.json", help="file of the numbers (default benchmark_data.json)")
    # fmt: on
    return parser


def main(args) -> dict:
    if args.images < 1 or args.rounds < 1:
        raise InputError(f"--images {args.images} and --rounds {args.rounds}: must be at least 1")
    torch.set_num_threads(1)
    size = parse_input_size(args.input_size)
    paths = list_images(args.data_path, args.split)
    order = np.linspace(0, len(paths), min(args.images, len(paths)), endpoint=False).astype(int)
    chosen = PathList(Path("."), [str(paths[i]) for i in order])
    with tempfile.TemporaryDirectory() as name:
        sets = {"given": chosen}
        if args.large:
            sets["large"] = tile_photos(chosen, args.large, Path(name) / "large")
        rows = [row for title, images in sets.items() for row in compare(title, images, size, args, Path(name))]
    for row in rows:
        print(
            f"{row['set']:6s} {row['variant']:7s} {row['images_per_s']:8.1f} images/s/core  "
            f"{row['ratio']:5.2f} x mae  (spread {row['spread']:.0%}, {row['kilobytes']:.0f} kB an image)"
        )
    return {"input_size": list(size), "torch": torch.__version__, "rows": rows}


def compare(title: str, images: PathList, size: tuple[int, int], args, folder: Path) -> list[dict]:
    """One row a variant, `mae` first."""
    output = folder / f"{title}_packed"
    listed = folder / f"{title}.txt"
    listed.write_text("\n".join(str(images[i].resolve()) for i in range(len(images))))
    pack.main(pack.get_args_parser().parse_args(["--data_path", str(listed), "--output", str(output)]))
    packed = list_images(output)
    if len(packed) != len(images):
        raise InputError(f"{len(images) - len(packed)} of the images cannot be read: {output}/bad_images.txt")
    mae = mae_transform(size)
    patches = size[0] * size[1] // 256
    ours = PretrainDataset(images, size, patches, seed=0, min_area=0.2)
    ours_packed = PretrainDataset(packed, size, patches, seed=0, min_area=0.2)

    def read_mae(_, index: int):
        with open(images[index], "rb") as opened:
            return mae(Image.open(opened).convert("RGB"))

    variants = {
        "mae": read_mae,
        "ours": lambda epoch, index: ours[epoch, index],
        "packed": lambda epoch, index: ours_packed[epoch, index],
    }
    seconds = {name: [] for name in variants}
    for index in range(0, len(images), max(len(images) // 16, 1)):  # files into the page cache, code warm
        for read in variants.values():
            read(0, index)
    for epoch in range(args.rounds):
        spent = dict.fromkeys(variants, 0.0)
        for first in range(0, len(images), 32):
            for name, read in variants.items():
                started = time.process_time()
                for index in range(first, min(first + 32, len(images))):
                    read(epoch, index)
                spent[name] += time.process_time() - started
        for name in variants:
            seconds[name].append(spent[name])
    base = statistics.median(seconds["mae"])
    bytes_of = {"mae": sum(images[i].stat().st_size for i in range(len(images)))}
    bytes_of |= {"ours": bytes_of["mae"], "packed": sum(len(packed.read(i)) for i in range(len(packed)))}
    return [
        {
            "set": title,
            "variant": name,
            "images_per_s": len(images) / statistics.median(times),
            "ratio": base / statistics.median(times),
            "spread": (max(times) - min(times)) / statistics.median(times),
            "kilobytes": bytes_of[name] / len(images) / 1e3,
        }
        for name, times in seconds.items()
    ]


def mae_transform(size: tuple[int, int]) -> transforms.Compose:
    """MAE, Sec. 4 and A.1: random resized crop and flip only; float32 tensors with ImageNet's statistics."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def tile_photos(images: PathList, count: int, folder: Path) -> PathList:
    """Big JPEGs with the detail of real photos: tiles of 512 x 384 px, one photo each."""
    folder.mkdir(parents=True)
    names = []
    for k in range(count):
        columns, rows = ((2, 2), (3, 3), (4, 4))[k % 3]
        sheet = Image.new("RGB", (512 * columns, 384 * rows))
        for tile in range(columns * rows):
            photo = open_rgb(images[(k * 7 + tile) % len(images)]).resize((512, 384), Image.Resampling.BICUBIC)
            sheet.paste(photo, (tile % columns * 512, tile // columns * 384))
        names.append(f"{k:05d}.jpg")
        sheet.save(folder / names[-1], quality=92)
    return PathList(folder, names)


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output))
