"""Judge frozen features of an encoder: kNN or a linear classifier on labelled images.

    python main_linprobe.py --checkpoint output_dir/encoder.pth --data_path labels.csv \\
        --label_column make --protocol knn
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from datasets.labelled import list_labelled
from engine_extract import extract_features
from models_vit import load_encoder
from util.dist import pick_device
from util.errors import InputError
from util.precision import pick_amp_dtype, pick_fused_attention
from util.probe import knn_predict, linear_predict, topk_accuracy
from util.progress import Progress
from util.resolve import parse_input_size
from util.tool import run_tool, tool_parser

PROTOCOLS = ("knn", "linear")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("main_linprobe.py", add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("features").add_argument
    add("--checkpoint", required=True, help="encoder: ours or facebook's MAE, .pth or .safetensors")
    add("--input_size", default=None, help="pixels: one side, or H,W (default: the checkpoint's)")
    add(
        "--pool",
        nargs="+",
        default=["mean"],
        choices=("mean", "cls"),
        help="which feature: mean of patch tokens, class token (default mean)",
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data_path",
        required=True,
        help="folder with train/CLASS and val/CLASS, or a table with columns path, split and a label",
    )
    add("--label_column", nargs="+", default=["label"], help="label columns of a table (default label)")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", nargs="+", default=["knn"], choices=PROTOCOLS, help="(default knn)")
    add("--k", default=20, type=int, help="neighbours (default 20)")
    add("--temperature", default=0.07, type=float, help="of the kNN vote (default 0.07)")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=None, help="folder for metrics.json (default: beside the checkpoint)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"), help="precision (default auto)")
    return parser


def main(args) -> dict[str, float]:
    """Returns e.g. {"knn_mean_make_top1": 0.12, ...}, shares in [0, 1]."""
    device = pick_device(args.device)
    amp_dtype, _ = pick_amp_dtype(args.amp, device)
    size = parse_input_size(args.input_size) if args.input_size else None
    model, report = load_encoder(args.checkpoint, size, device, pick_fused_attention(device, amp_dtype))
    print(f"encoder {args.checkpoint}:\n{report}", flush=True)
    tables = {column: list_labelled(args.data_path, column) for column in args.label_column}
    paths = next(iter(tables.values())).paths
    progress = Progress("features", len(paths))
    features, problems = extract_features(
        model,
        paths,
        tuple(args.pool),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        amp_dtype=amp_dtype,
        progress=progress.update,
    )
    progress.close()
    for index, problem in problems.items():
        print(f"unreadable, left out: {paths[index]}: {problem}")
    if len(problems) == len(paths):
        raise InputError(f"none of the {len(paths)} images of {args.data_path} could be read")
    readable = ~np.isin(np.arange(len(paths)), list(problems))
    metrics: dict[str, float] = {"unreadable": len(problems)}
    for column, table in tables.items():
        for pool in args.pool:
            metrics |= probe(features[pool], table, readable, args, f"{pool}_{column}", device)
    return metrics


def probe(features, table, readable, args, name: str, device) -> dict[str, float]:
    rows = {split: ids[readable[ids]] for split, ids in table.splits.items()}
    x = {split: torch.from_numpy(features[ids]).to(device) for split, ids in rows.items()}
    y = {split: torch.from_numpy(table.labels[ids]).to(device) for split, ids in rows.items()}
    num_classes = len(table.classes)
    metrics = {}
    if "knn" in args.protocol:
        scores = knn_predict(x["train"], y["train"], x["val"], num_classes, args.k, args.temperature)
        metrics |= {f"knn_{name}_top{k}": topk_accuracy(scores, y["val"], k) for k in (1, 5)}
    if "linear" in args.protocol:
        scores, l2 = linear_predict(x["train"], y["train"], x["val"], num_classes)
        metrics |= {f"linear_{name}_top{k}": topk_accuracy(scores, y["val"], k) for k in (1, 5)}
        metrics[f"linear_{name}_l2"] = l2
    majority = torch.bincount(y["train"], minlength=num_classes).argmax()
    return metrics | {f"majority_{name}": (y["val"] == majority).float().mean().item()}


def metrics_file(args) -> Path:
    folder = Path(args.output_dir) if args.output_dir else Path(args.checkpoint).parent / "linprobe"
    return folder / "metrics.json"


if __name__ == "__main__":
    run_tool(tool_parser("main_linprobe.py", __doc__, parents=[get_args_parser()]), main, metrics_file)
