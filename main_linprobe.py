"""Judge the frozen features of an encoder: which read-out carries what, by several protocols.

    python main_linprobe.py --checkpoint output_dir/encoder.pth --data_path labels.csv \\
        --label_column make --protocol knn linear mae fewshot --read_out cls mean
    python main_linprobe.py --checkpoint output_dir/checkpoint-last.pth --data_path VeRi --protocol reid
"""

import argparse
import os
from pathlib import Path

from util.cli import Parser, check_numbers, parse_input_size, run_tool
from util.errors import REID_FORMATS, InputError


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("main_linprobe.py", __doc__)
    # fmt: off
    add = parser.add_argument_group("features").add_argument
    add("--checkpoint", required=True, help="any encoder that main_finetune.py takes; for context a checkpoint-*.pth")
    add("--input_size", default=None, help="pixels: one side, or H,W (default: the checkpoint's)")
    add("--read_out", nargs="+", default=["mean"], choices=("cls", "mean", "context", "layers"), help="class token, "
        "mean of patch tokens, projected global context, both tokens of every block (default mean)")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of train/CLASS and val/CLASS, a table with labels, or a reid set")
    add("--label_column", nargs="+", default=["label"], help="label columns of a table (default label)")
    add("--format", default="auto", choices=REID_FORMATS, help="layout of a reid set (default auto: by its files)")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", nargs="+", default=["knn"], choices=("knn", "linear", "mae", "fewshot", "reid"), help="nearest "
        "neighbours; logistic fit; MAE's recipe; a few images a class; search for the same vehicle (default knn)")
    add("--k", default=20, type=int, help="neighbours (default 20)")
    add("--shots", nargs="+", default=[1, 5, 10], type=int, help="fewshot: images a class (default 1 5 10)")
    add("--draws", default=10, type=int, help="fewshot: how often they are drawn (default 10)")
    add = parser.add_argument_group("MAE's recipe (--protocol mae)").add_argument
    add("--views", default="stored", choices=("stored", "crop"), help="whole images once, or crops (default stored)")
    add("--epochs", default=90, type=int, help="length of the schedule in epochs (default 90)")
    add("--warmup_epochs", default=10.0, type=float, help="epochs of linear warm-up (default 10)")
    add("--blr", default=0.1, type=float, help="learning rate for a batch of 256 (default 0.1)")
    add("--probe_batch", default=16384, type=int, help="images an update, at most all there are (default 16384)")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=None, help="folder of metrics.json (default: linprobe beside --checkpoint)")
    add("--seed", default=0, type=int, help="seed of heads, order, crops, draws (default 0)")
    add("--batch_size", default=128, type=int, help="images through the encoder at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    # fmt: on
    return parser


def check_args(args) -> None:
    """Contradictions among flags, before anything is loaded."""
    ones = "k draws epochs probe_batch batch_size"
    check_numbers(args, at_least_one=ones, positive="blr", not_negative="seed num_workers warmup_epochs")
    if min(args.shots) < 1:
        raise InputError(f"--shots {min(args.shots)}: must be at least 1")
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs")
    if "reid" in args.protocol and len(args.protocol) > 1:
        raise InputError("--protocol reid reads other sets: call it alone")
    if args.views == "crop" and "mae" not in args.protocol:
        raise InputError("--views crop is for --protocol mae: add it, or drop it")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("main_linprobe.py works in one process: do not use torchrun")


def metrics_file(args) -> Path:
    return Path(args.output_dir or Path(args.checkpoint).parent / "linprobe") / "metrics.json"


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from datasets.fgvc import LabelledImages, list_labelled
from datasets.items import PretrainDataset, WholeImages
from datasets.path_list import printable
from datasets.reid import read_reid
from datasets.samplers import EpochBatches
from engine_extract import extract_features
from engine_linprobe import ReadOuts, SearchReadOuts, crop_batches, load_read_outs, stored_batches, train_heads
from finetune.reid import evaluate_reid, summary
from metrics.fgvc import class_scores
from metrics.probe import class_mean_predict, draw_shots, knn_predict, linear_predict, topk_accuracy
from metrics.reid import FeatureSet, evaluate, protocols_of
from reports.run import Scores, mean_attribute_accuracy, score_table
from util.cli import Progress
from util.dist import pick_device
from util.fetch import fetch
from util.files import make_folder
from util.precision import scoring


def main(args) -> dict[str, float | str]:
    """Returns e.g. {"knn_mean_make_top1": 0.12, ...}, shares in [0, 1]."""
    check_args(args)
    device = pick_device(args.device)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    if "reid" in args.protocol:  # the data are read before the weights are fetched
        data, judge = read_reid(args.data_path, args.format, need_train=False), judge_search
        print(f"data: {args.data_path} as {data.name}", *(f"  {note}" for note in data.notes), sep="\n")
    else:
        data, judge = {column: list_labelled(args.data_path, column) for column in args.label_column}, judge_labels
    make_folder(metrics_file(args).parent)
    args.checkpoint = str(fetch(args.checkpoint))
    size = parse_input_size(args.input_size) if args.input_size else None
    read_outs, report = load_read_outs(args.checkpoint, args.read_out, size, device)
    print(f"encoder {args.checkpoint}:\n{report}", flush=True)
    with scoring(read_outs):
        facts, scores = judge(args, data, read_outs, loading)
    print(score_table(scores))
    return facts | {"_".join(filter(None, key)): value for key, value in scores.items()}


def judge_search(args, data, read_outs: ReadOuts, loading: dict) -> tuple[dict, Scores]:
    """Each read-out as the feature of a search, by the protocol that `main_finetune.py --eval` uses; beside it
    features that know nothing: normal noise."""
    model = SearchReadOuts(read_outs)
    rules = protocols_of(data.name, data.tests, seed=args.seed)
    results = evaluate_reid(model, data, rules, **loading, columns=model.columns)
    print("\n".join(dict.fromkeys(result.protocol.line() for result in results.values())), flush=True)
    flat, _, unreadable = summary(results)
    facts, scores = {"unreadable": len(unreadable)} | {f"reid_{name}": value for name, value in flat.items()}, {}
    for key, (rule, metrics, *sides, _) in results.items():
        draw, sets = np.random.default_rng(args.seed).standard_normal, [side.images for side in sides if side]
        noise = [FeatureSet.of(torch.from_numpy(draw((len(images), 16), np.float32)), images) for images in sets]
        read_out, test = key.split(" ", 1)
        for protocol, numbers in (("reid", metrics), ("random", evaluate(rule, *noise))):
            for metric in ("mAP", "R1", "R5"):
                scores[protocol, read_out, "" if test == "test" else test, metric] = numbers[metric]
    return facts, scores


def judge_labels(args, tables: dict, read_outs: ReadOuts, loading: dict) -> tuple[dict, Scores]:
    """Every protocol on every read-out and label column; features are extracted once."""
    features, problems = probe_features(read_outs, next(iter(tables.values())).paths, loading)
    for column, table in tables.items():
        if table.unlabelled:
            print(f"{table.unlabelled} rows have no {column} and are left out of its numbers")
        splits = {split: rows[~np.isin(rows, list(problems))] for split, rows in table.splits.items()}
        if len(splits["train"]) < 2 or not len(splits["val"]):
            raise InputError(f"{args.data_path}: too few train and val images with a {column} can be read")
        tables[column] = replace(table, splits=splits)
    facts, heads, scores = {"unreadable": len(problems)}, {}, {}
    if "mae" in args.protocol:
        heads = train_mae_heads(args, read_outs, features, tables, loading)
        facts["mae_blr"] = args.blr
    for column, table in tables.items():
        for read_out, values in features.items():
            for protocol, numbers in probe(args, values, table, heads.get((read_out, column))).items():
                scores |= {(protocol, read_out, column, metric): value for metric, value in numbers.items()}
    return facts, scores | mean_attribute_accuracy(scores)


def probe_features(model, paths, loading: dict) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """({read-out: [n, D] float32 on the model's device}, {index: problem}) of one pass over all images."""
    device = next(model.parameters()).device
    images, progress = WholeImages(paths, np.arange(len(paths)), model.img_size), Progress("features", len(paths))
    features, problems = extract_features(lambda imgs, _: model.encode(imgs), images, device, progress, **loading)
    progress.close()
    for index, problem in problems.items():
        print(f"unreadable, left out: {printable(paths.relative(index))}: {problem}")
    for name, values in features.items():
        if not np.isfinite(np.delete(values, list(problems), axis=0)).all():
            raise InputError(f"the feature {name} is not finite: the model has diverged")
    return {name: torch.from_numpy(values).to(device) for name, values in features.items()}, problems


def train_mae_heads(args, read_outs: ReadOuts, features: dict, tables: dict, loading: dict) -> dict:
    """The heads of MAE's recipe, {(read-out, column): head}."""
    train = np.unique(np.concatenate([table.splits["train"] for table in tables.values()]))
    order = EpochBatches(len(train), min(args.probe_batch, len(train)), 0, 1, args.seed)
    if args.views == "stored":
        batches = partial(stored_batches, order=order, rows=train, features=features)
    else:
        chosen = next(iter(tables.values())).paths.take(train)
        images = PretrainDataset(chosen, read_outs.img_size, 0, seed=args.seed, min_area=0.08, clip_crops=True)
        batches = partial(crop_batches, order=order, rows=train, images=images, read_outs=read_outs, **loading)
    size = order.batch_size
    labels = {name: (torch.from_numpy(table.labels), len(table.classes)) for name, table in tables.items()}
    print(f"MAE's recipe: {args.epochs} epochs, batch {size}, lr {args.blr * size / 256:.4g} = blr x {size} / 256")
    return train_heads(batches, order, read_outs.widths, labels, args, next(read_outs.parameters()).device)


def probe(args, features: torch.Tensor, table: LabelledImages, head) -> dict[str, dict[str, float]]:
    """All protocols on one read-out [n, D] and one label column: {protocol: {metric: value}}."""
    rows = {split: torch.from_numpy(rows) for split, rows in table.splits.items()}
    x = {split: features[of.to(features.device)] for split, of in rows.items()}
    y = {split: torch.from_numpy(table.labels)[of].to(features.device) for split, of in rows.items()}
    task, found = (x["train"], y["train"], x["val"], len(table.classes)), {}

    def numbers(scores: torch.Tensor) -> dict[str, float]:
        values = {f"top{k}": topk_accuracy(scores, y["val"], k) for k in (1, 5)}
        if table.classes == ["0", "1"]:  # (TPR + TNR) / 2, whose mean over attributes is mA
            values["balanced"] = class_scores(scores, y["val"]).numbers["mean_class_accuracy"]
        return values

    if "knn" in args.protocol:
        found["knn"] = numbers(knn_predict(*task, args.k))
    if "linear" in args.protocol:
        logits, l2 = linear_predict(*task)
        nll = torch.nn.functional.cross_entropy(logits, y["val"]).item()  # nats
        found["linear"] = numbers(logits) | {"nll": nll, "l2": l2}
    if head is not None:
        found[f"mae_{args.views}"] = numbers(head(x["val"]))
    for shots in args.shots if "fewshot" in args.protocol else ():
        some = (draw_shots(y["train"].cpu().numpy(), shots, args.seed, draw) for draw in range(args.draws))
        draws = [numbers(class_mean_predict(x["train"][of], y["train"][of], *task[2:])) for of in some]
        values = {metric: np.array([draw[metric] for draw in draws]) for metric in draws[0]}
        found[f"fewshot{shots}"] = {metric: float(of.mean()) for metric, of in values.items()}
        found[f"fewshot{shots}"] |= {f"{metric}_std": float(of.std()) for metric, of in values.items()}
    guess = torch.bincount(y["train"], minlength=len(table.classes)).argmax()
    return found | {"majority": {"": (y["val"] == guess).float().mean().item()}}


if __name__ == "__main__":
    run_tool(main, ARGS, metrics_file(ARGS))
