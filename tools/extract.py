"""Images -> embeddings: OUTPUT.npy (float32, rows in input order) and OUTPUT.csv (path, problem, box if there are any).

    python -m tools.extract --checkpoint output_dir/encoder.pth --data_path PHOTOS --output features

Under torchrun the ranks share the work; a run that was stopped goes on where it was. Rows of unreadable
images are NaN and named in the table.
"""

import argparse
from pathlib import Path

from util.cli import Parser, parse_input_size, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.extract", __doc__)
    add, read_outs = parser.add_argument, ("mean", "cls", "tokens")
    add("--checkpoint", required=True, help="encoder: what main_finetune.py --finetune takes")
    add("--data_path", required=True, help="folder or manifest, as for main_pretrain.py")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all)")
    add("--output", required=True, help="name of the files to write, without ending")
    add("--read_out", default="mean", choices=read_outs, help="mean and tokens: of the patches (default mean)")
    add("--input_size", default=None, help="pixels: one side, or H,W (default: the checkpoint's)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes per rank (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--amp", default="none", choices=("auto", "bf16", "fp16", "none"), help="precision (default none: fp32)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

from functools import partial

import numpy as np

from datasets.items import WholeImages
from datasets.path_list import list_images, printable
from engine_extract import extract_to_file
from models_vit import load_encoder
from util.checkpoint import weights_sha256
from util.dist import launch, print_main
from util.fetch import fetch
from util.files import write_csv
from util.precision import pick_precision


def main(args) -> dict:
    return launch(args.device, None, partial(extract, args))  # `extract_to_file` locks the output


def extract(args, device) -> dict:
    output, args.checkpoint = Path(args.output.removesuffix(".npy")), str(fetch(args.checkpoint))
    amp_dtype, _ = pick_precision(args.amp, device)
    model = load_encoder(args.checkpoint, parse_input_size(args.input_size) if args.input_size else None, device)
    print_main(f"encoder {args.checkpoint}:\n{model.report}")
    paths = list_images(args.data_path, args.split)
    job = {"checkpoint_sha256": weights_sha256(args.checkpoint), "images_sha256": paths.sha256(), "images": len(paths)}
    job |= {"read_out": args.read_out, "img_size": list(model.img_size), "amp": str(amp_dtype)}
    images = WholeImages(paths, np.arange(len(paths)), model.img_size)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers, "amp_dtype": amp_dtype}
    result = extract_to_file(lambda imgs: model.encode(imgs)[args.read_out], images, device, output, job, **loading)
    if result is None:
        return {}
    shape, problems = result
    rows = [["path", "problem"], *([printable(paths.relative(i)), problems.get(i, "")] for i in range(len(paths)))]
    for row, box in zip(rows, [["box"], *paths.boxes.tolist()] if paths.boxes is not None else []):
        row.append(" ".join(map(str, box)) if any(box) else "")
    write_csv(output.with_name(output.name + ".csv"), rows)
    return {"images": len(paths), "unreadable": len(problems), "shape": list(shape), "read_out": args.read_out}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output).with_suffix(".metrics.json"))
