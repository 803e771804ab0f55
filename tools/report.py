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
from main_linprobe import probe_features
from metrics.probe import knn_predict, topk_accuracy
from models_mae import MODELS
from models_vit import load_encoder
from reports.run import write_run_report
from util.errors import InputError


def knn_accuracy(model, tables: dict, read_out: str) -> dict[str, float]:
    paths = next(iter(tables.values())).paths
    features, problems = probe_features(model, paths, {"batch_size": 128, "num_workers": 2})
    if problems:
        raise InputError(f"{len(problems)} images could not be read, first {paths[min(problems)]}: remove them")
    scores = {}
    for column, table in tables.items():
        y, x, (train, val) = torch.from_numpy(table.labels), features[read_out], map(table.splits.get, ("train", "val"))
        scores[column] = topk_accuracy(knn_predict(x[train], y[train], x[val], len(table.classes)), y[val], 1)
    return scores


def majority_share(table) -> float:
    """What the commonest class of training gets on the validation images."""
    train, val = (table.labels[table.splits[name]] for name in ("train", "val"))
    return float((val == np.bincount(train).argmax()).mean())


def main(args) -> dict:
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
    knn = {
        "chance": {column: majority_share(table) for column, table in tables.items()},
        "before": knn_accuracy(initial, tables, args.read_out),
        "after": knn_accuracy(load_encoder(run_dir / "encoder.safetensors"), tables, args.read_out),
    }
    write_run_report(run_dir / "report.html", log, settings, knn)
    names = {"chance": "majority", "before": "before", "after": "after"}
    metrics = {f"knn_{column}_{names[key]}": value for key, of in knn.items() for column, value in of.items()}
    return metrics | {"report": str(run_dir / "report.html")}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.run_dir) / "report_metrics.json")
