"""The data path of one core: MAE's transform pipeline, ours, ours on a packed set and, with --against, another
checkout's, in one run.

    python -m benchmarks.data --data_path PHOTOS

`mae` is written from the paper's recipe with torchvision (Sec. 4 and A.1): decode, RandomResizedCrop(0.2..1, bicubic),
flip, float32, normalise. `ours` is the training data set itself, masks included; `packed` the same on a packed set
(tools.pack). CPU seconds an image, one thread.
"""

import argparse
from pathlib import Path

from util.cli import Parser, parse_input_size, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.data", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--data_path", required=True, help="folder or manifest, as for main_pretrain.py")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--images", default=512, type=int, help="images a turn, spread over the list (default 512)")
    add("--rounds", default=5, type=int, help="turns of each variant (default 5)")
    add("--against", default="", metavar="FOLDER", help="another checkout to time beside this one (default none)")
    add("--output", default="benchmark_data.json", help="file of the numbers (default benchmark_data.json)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import tempfile
import time

import numpy as np
from PIL import Image
from torchvision import transforms

from benchmarks.turns import read_images, take_turns, timed
from datasets.manifest import list_images
from tools import pack


def main(args) -> dict:
    paths, size = list_images(args.data_path), parse_input_size(args.input_size)
    order = np.linspace(0, len(paths), min(args.images, len(paths)), endpoint=False).astype(int)
    files = [Path(paths[i]).resolve() for i in order]
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        listed, packed = f"{folder}/list.txt", f"{folder}/packed"
        Path(listed).write_text("\n".join(map(str, files)))
        pack.main(pack.get_args_parser().parse_args(["--data_path", listed, "--output", packed]))
        work = {"data_path": listed, "input_size": size, "images": len(files)}

        def mae() -> list:
            return [transform(Image.open(file).convert("RGB")) for file in files]

        mae_turn = timed(mae, count=len(files), clock=time.process_time)
        variants = {"mae": mae_turn, "packed": read_images(work | {"data_path": packed})}
        return take_turns(variants, read_images, work, args) | {"data_path": args.data_path}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output))
