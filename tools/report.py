"""One page about a pre-training run: curves, reconstructions, kNN before and after.

    python -m tools.report RUN_DIR --data_path labels.csv --label_column body colour

"Before" is the same architecture with its initial weights. Writes RUN_DIR/report.html, which needs no other file.
"""

import argparse
import json
from pathlib import Path

from util.cli import Parser, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.report", __doc__)
    add = parser.add_argument
    # fmt: off
    add("run_dir", help="output folder of main_pretrain.py")
    add("--data_path", required=True, help="labelled images: folder with train/ and val/, or a table")
    add("--label_column", nargs="+", default=["label"], help="label columns of a table (default label)")
    add("--read_out", default="mean", choices=("mean", "cls"), help="feature (default mean)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import numpy as np
import torch

from datasets.fgvc import list_labelled
from datasets.items import WholeImages
from engine_extract import extract_features
from metrics.probe import knn_predict, topk_accuracy
from models_mae import MODELS
from models_vit import VisionTransformer, load_encoder
from reports.run import write_run_report
from util.errors import InputError
from util.progress import Progress


def initial_encoder(config: dict) -> VisionTransformer:
    """The encoder as it was before the first update."""
    torch.manual_seed(config["seed"])
    model = MODELS[config["model"]](img_size=tuple(config["img_size"]))
    return model.eval()


def knn_accuracy(model, tables: dict, read_out: str, title: str) -> dict[str, float]:
    paths = next(iter(tables.values())).paths
    progress = Progress(title, len(paths))
    images, loading = WholeImages(paths, np.arange(len(paths)), model.img_size), {"batch_size": 128, "num_workers": 2}
    features, problems = extract_features(
        lambda imgs, _: {read_out: model.encode(imgs)[read_out]}, images, torch.device("cpu"), progress, **loading
    )
    progress.close()
    if problems:
        raise InputError(f"{len(problems)} images could not be read, first {paths[min(problems)]}: remove them")
    x = torch.from_numpy(features[read_out])
    scores = {}
    for column, table in tables.items():
        y = torch.from_numpy(table.labels)
        train, val = (torch.from_numpy(table.splits[name]) for name in ("train", "val"))
        votes = knn_predict(x[train], y[train], x[val], len(table.classes))
        scores[column] = topk_accuracy(votes, y[val], 1)
    return scores


def majority_share(table) -> float:
    """What the commonest class of training gets on the validation images."""
    train, val = (torch.from_numpy(table.labels[table.splits[name]]) for name in ("train", "val"))
    return (val == train.bincount().argmax()).float().mean().item()


def main(args) -> dict:
    run_dir = Path(args.run_dir)
    encoder, log_file = run_dir / "encoder.safetensors", run_dir / "log.txt"
    for file in (encoder, log_file, run_dir / "args.json"):
        if not file.is_file():
            raise InputError(f"{file} does not exist: give the output folder of a finished main_pretrain.py")
    log = [json.loads(line) for line in log_file.read_text().splitlines()]
    settings = json.loads((run_dir / "args.json").read_text())
    tables = {column: list_labelled(args.data_path, column) for column in args.label_column}
    knn = {
        "chance": {column: majority_share(table) for column, table in tables.items()},
        "before": knn_accuracy(initial_encoder(settings), tables, args.read_out, "before"),
        "after": knn_accuracy(load_encoder(encoder), tables, args.read_out, "after"),
    }
    write_run_report(run_dir / "report.html", log, settings, knn)
    names = {"majority": "chance", "before": "before", "after": "after"}
    metrics = {f"knn_{column}_{name}": knn[key][column] for column in tables for name, key in names.items()}
    return metrics | {"report": str(run_dir / "report.html")}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.run_dir) / "report_metrics.json")
