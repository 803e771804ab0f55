"""Reconstruction panels of given images as one PNG.

python -m tools.visualize a.jpg b.jpg --checkpoint output_dir/checkpoint-last.pth --output panels.png
"""

import argparse
from pathlib import Path

from util.cli import Parser, check_numbers, run_tool
from util.names import MAE_MODELS


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.visualize", __doc__)
    add = parser.add_argument
    # fmt: off
    add("images", nargs="+", help="image files, or one folder or manifest (its first --count images)")
    add("--checkpoint", required=True, help="checkpoint with a decoder: checkpoint-*.pth of a run, or "
        "facebook's mae_visualize_*.pth or *_full.pth with --model")
    add("--model", default=None, choices=list(MAE_MODELS), metavar="NAME",
        help="architecture, for files without a config (default: the file's)")
    add("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=None,
        help="the file was trained with per-patch normalisation (default: the file's config)")
    add("--mask_ratio", default=0.75, type=float, help="fraction of patches removed (default 0.75)")
    add("--count", default=8, type=int, help="images taken of a folder or manifest (default 8)")
    add("--seed", default=0, type=int, help="seed of the masks (default 0)")
    add("--output", default="panels.png", help="PNG to write (default panels.png)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import torch

from datasets.images import Unreadable, open_rgb
from datasets.path_list import printable
from datasets.transforms import whole_image
from models_mae import count_kept, load_autoencoder
from reports.panels import draw_reconstructions
from tools.search import open_queries
from util.errors import InputError
from util.fetch import fetch
from util.files import make_folder, write_atomic


def main(args) -> dict:
    check_numbers(args, at_least_one="count", positive="mask_ratio", not_negative="seed")
    paths, imgs = open_queries(args.images), []
    files = [paths[i] for i in range(min(args.count, len(paths)) if len(args.images) == 1 else len(paths))]
    make_folder(Path(args.output).parent)
    args.checkpoint = str(fetch(args.checkpoint))
    model = load_autoencoder(args.checkpoint, args.model, args.norm_pix_loss)
    count_kept(model.num_patches, args.mask_ratio)
    for file in files:
        try:
            imgs.append(whole_image(open_rgb(file), model.img_size))
        except Unreadable as error:
            print(f"unreadable, left out: {printable(str(file))}: {error}")
    if not imgs:
        raise InputError(f"none of the {len(files)} given images could be read")
    title = Path(args.checkpoint).name
    sheet, columns = draw_reconstructions(model, torch.stack(imgs), args.mask_ratio, args.seed, title)
    error = (columns[:, 0].float() - columns[:, 3].float()).square().mean().item()
    write_atomic(args.output, lambda opened: sheet.save(opened, format="PNG"))
    return {"images": len(imgs), "unreadable": len(files) - len(imgs), "mse_255": error, "output": args.output}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output).with_suffix(".metrics.json"))
