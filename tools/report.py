"""What a pre-training run has learned: one page (curves, reconstructions, kNN before and after), or given images.

    python -m tools.report run RUN_DIR --data_path labels.csv --label_column body colour
    python -m tools.report images a.jpg b.jpg --checkpoint output_dir/checkpoint-last.pth --output panels.png

run: "before" is the same architecture with its initial weights; writes RUN_DIR/report.html, which needs no other file.
images: each beside what is kept of it, its reconstruction, and both in one.
"""

import argparse
import json
from pathlib import Path

from util.cli import Parser, check_numbers, run_tool
from util.errors import MAE_MODELS


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.report", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = verbs.add_parser("run", help="the page of a finished run", description=__doc__).add_argument
    add("run_dir", help="output folder of main_pretrain.py")
    add("--data_path", required=True, help="labelled images: folder with train/ and val/, or a table")
    add("--label_column", nargs="+", default=["label"], help="label columns of a table (default label)")
    add("--read_out", default="mean", choices=("mean", "cls"), help="feature (default mean)")
    add = verbs.add_parser("images", help="reconstructions, as one PNG", description=__doc__).add_argument
    add("images", nargs="+", help="image files, or one folder or manifest (its first --count images)")
    add("--checkpoint", required=True, help="of a run, or facebook's *_full.pth, *_visualize_*.pth with --model")
    add("--model", default=None, choices=MAE_MODELS, help="for files that do not say it (default: the file's)")
    add("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=None, help="as trained (default: the file's)")
    add("--mask_ratio", default=0.75, type=float, help="fraction of patches removed (default 0.75)")
    add("--count", default=8, type=int, help="images taken of a folder or manifest (default 8)")
    add("--seed", default=0, type=int, help="seed of the masks (default 0)")
    add("--output", default="panels.png", help="PNG to write (default panels.png)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import torch

from datasets.fgvc import list_labelled
from datasets.images import Unreadable, open_rgb
from datasets.path_list import printable
from datasets.transforms import whole_image
from main_linprobe import probe, probe_features
from models_mae import MODELS, count_kept, load_autoencoder
from models_vit import load_encoder
from reports.run import draw_reconstructions, write_run_report
from tools.search import open_queries
from util.errors import InputError
from util.fetch import fetch
from util.files import make_folder, write_atomic

KNN = argparse.Namespace(protocol=("knn",), k=20)


def knn_accuracy(model, tables: dict, read_out: str) -> tuple[dict[str, float], dict[str, float]]:
    """({column: top-1 of kNN on the validation images}, {column: top-1 of the commonest class of training})."""
    paths = next(iter(tables.values())).paths
    features, problems = probe_features(model, paths, {"batch_size": 128, "num_workers": 2})
    if problems:
        raise InputError(f"{len(problems)} images could not be read, first {paths[min(problems)]}: remove them")
    found = {column: probe(KNN, features[read_out], table, None) for column, table in tables.items()}
    return {c: of["knn"]["top1"] for c, of in found.items()}, {c: of["majority"][""] for c, of in found.items()}


def report_run(args) -> dict:
    run_dir = Path(args.run_dir)
    tables = {column: list_labelled(args.data_path, column) for column in args.label_column}
    for name in ("encoder.safetensors", "log.txt", "args.json"):
        if not (run_dir / name).is_file():
            raise InputError(f"{run_dir / name} does not exist: give the output folder of a finished main_pretrain.py")
    try:
        log = [dict(json.loads(line)) for line in (run_dir / "log.txt").read_text().splitlines()]
        settings = dict(json.loads((run_dir / "args.json").read_text()))
        torch.manual_seed(settings["seed"])
        initial = MODELS[settings["model"]](img_size=tuple(settings["img_size"])).eval()  # before the first update
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"log.txt or args.json in {run_dir} is damaged: {error!r}") from error
    before, majority = knn_accuracy(initial, tables, args.read_out)
    after, _ = knn_accuracy(load_encoder(run_dir / "encoder.safetensors"), tables, args.read_out)
    knn = {"majority": majority, "before": before, "after": after}
    write_run_report(run_dir / "report.html", log, settings, knn)
    metrics = {f"knn_{column}_{name}": value for name, of in knn.items() for column, value in of.items()}
    return metrics | {"report": str(run_dir / "report.html")}


def report_images(args) -> dict:
    check_numbers(args, at_least_one="count", positive="mask_ratio", not_negative="seed")
    paths, imgs = open_queries(args.images), []
    files = [paths[i] for i in range(min(args.count, len(paths)) if len(args.images) == 1 else len(paths))]
    make_folder(Path(args.output).parent)
    checkpoint = fetch(args.checkpoint)
    model = load_autoencoder(checkpoint, args.model, args.norm_pix_loss)
    count_kept(model.num_patches, args.mask_ratio)
    for file in files:
        try:
            imgs.append(whole_image(open_rgb(file), model.img_size))
        except Unreadable as error:
            print(f"unreadable, left out: {printable(str(file))}: {error}")
    if not imgs:
        raise InputError(f"none of the {len(files)} given images could be read")
    sheet, columns = draw_reconstructions(model, torch.stack(imgs), args.mask_ratio, args.seed, checkpoint.name)
    error = (columns[:, 0].float() - columns[:, 3].float()).square().mean().item()
    write_atomic(args.output, lambda opened: sheet.save(opened, format="PNG"))
    return {"images": len(imgs), "unreadable": len(files) - len(imgs), "mse_255": error, "output": args.output}


def main(args) -> dict:
    return report_run(args) if args.verb == "run" else report_images(args)


if __name__ == "__main__":
    of_run = ARGS.verb == "run"
    file = Path(ARGS.run_dir) / "report_metrics.json" if of_run else Path(ARGS.output).with_suffix(".metrics.json")
    run_tool(main, ARGS, file)
