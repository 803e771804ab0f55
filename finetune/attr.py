"""Attribute recognition: VTB, from flags to a task that can be trained and scored."""

import argparse
import csv
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.attr import AttributeData, AttributeTrainImages, read_attribute_set
from datasets.eval_images import WholeImages
from datasets.samplers import epoch_batches
from datasets.transforms import PadCropErase
from finetune.attr_model import KIND, Known, attr_config, load_vtb
from finetune.attr_text import text_vectors
from finetune.encoder import build_encoder, check_trained
from finetune.predict import predict, write_unreadable
from finetune.task import Task
from metrics.attr import THRESHOLD, attribute_metrics, attribute_rows, group_top1
from models_vtb import VTB, attribute_loss
from reports.attr import AttributeTest, write_attr_report
from util.dist import gather_rows, print_main, wait_for_main
from util.errors import InputError
from util.files import write_atomic
from util.optim import build_finetune_optimizer, transreid_lr
from util.precision import scoring

RECIPE = {  # VTB's
    "input_size": "224", "drop_path": 0.1, "batch_size": 128, "epochs": 20, "warmup_epochs": 5.0,
    "opt": "sgd", "min_lr_ratio": 0.002, "warmup_lr_ratio": 0.01, "bias_lr_factor": 1.0,
    "head_lr_factor": 1.0, "weight_decay": 1e-4, "clip_grad": 0.0, "smoothing": 0.0,
}  # fmt: skip
FIXED = ("text_vectors",)
MODEL_FLAGS = ("attr_columns", "attr_categories", "attr_vectors", "clip_model", "clip_pretrained")
PERCENT = ("mA", "accuracy", "precision", "recall", "F1")


def default_lr(args) -> float:
    """Learning rate at the recipe's batch."""
    return 5e-4 if args.opt == "adamw" else 8e-3


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this task."""
    # fmt: off
    add = parser.add_argument_group("attributes (--task attr)").add_argument
    add("--attr_format", default="auto", choices=("auto", "veri776", "table"),
        help="layout of --data_path (default auto: a folder is VeRi-776, a file a table)")
    add("--attr_columns", nargs="+", default=None, metavar="NAME",
        help="columns of a table that hold 0 or 1 (default: all but path and split; with --attr_categories "
        "none)")
    add("--attr_categories", nargs="+", default=None, metavar="NAME",
        help="columns of a table that hold words, an attribute a word (default none)")
    add("--attr_split", default="test", help="value of the column split to test on (default test)")
    add("--attr_threshold", default=THRESHOLD, type=float,
        help=f"probability above which an attribute is said to be true (default {THRESHOLD}, VTB's)")
    add("--attr_vectors", default="",
        help="text vectors [A, D] as .npy or .safetensors, a row an attribute (default none)")
    add("--clip_pretrained", default="",
        help="take the text vectors from CLIP: open_clip tag, or a weight file .pt .bin .safetensors "
        "(default none: random orthogonal vectors)")
    add("--clip_model", default="ViT-L-14",
        help="open_clip name or path of an open_clip JSON config (default ViT-L-14)")
    # fmt: on


def check(args) -> None:
    """Contradictions among the flags of this task.

    Raises:
        InputError: one sentence on the first.
    """
    if not 0 < args.attr_threshold < 1:
        raise InputError(f"--attr_threshold {args.attr_threshold}: must be between 0 and 1")
    if args.attr_vectors and args.clip_pretrained:
        raise InputError("--attr_vectors and --clip_pretrained both give the text vectors: drop one of them")
    if args.smoothing:
        raise InputError(f"--smoothing {args.smoothing}: attributes are learned without it, drop it")
    if "clip_model" in args.given and not args.clip_pretrained and not args.eval:
        raise InputError(f"--clip_model {args.clip_model} needs its weights: give --clip_pretrained too")


def build(args, device: torch.device, amp_dtype) -> Task:
    """Data, model, optimiser and loss of a training run.

    Raises:
        InputError: see `read_attribute_set`, `text_vectors`, `build_encoder`; or a batch of one image.
    """
    if args.global_batch < 2:
        raise InputError("--batch_size 1: the batch norm of the logits needs 2 images at least")
    data = read_attribute_set(
        args.data_path, args.attr_format,
        binary=args.attr_columns, categorical=args.attr_categories, test_split=args.attr_split,
    )  # fmt: skip
    batches = epoch_batches(len(data.train), args.batch_size, args.seed)
    torch.manual_seed(args.seed)
    encoder, report = build_encoder(args)
    vectors, source = text_vectors(args, data.attributes, encoder.embed_dim)
    model = VTB(encoder, vectors).to(device)
    optimizer = build_finetune_optimizer(
        model, len(encoder.blocks), args.opt, args.lr, args.weight_decay,
        layer_decay=args.layer_decay, bias_lr_factor=args.bias_lr_factor, head_lr_factor=args.head_lr_factor,
    )  # fmt: skip
    known = Known.of(data, source)
    rates = torch.tensor(known.rates, dtype=torch.float32, device=device)

    def lr(epoch: float) -> float:
        first, last = args.lr * args.warmup_lr_ratio, args.lr * args.min_lr_ratio
        return transreid_lr(math.floor(epoch) + 1, args.lr, first, last, args.warmup_epochs, args.epochs)

    return Task(
        model,
        optimizer,
        AttributeTrainImages(data.train, PadCropErase(args.img_size, erase=0.0), args.seed),
        batches,
        loss=lambda wrapped, batch: attr_loss(wrapped, batch, rates, args.attr_threshold),
        shown=lambda values: [f"accuracy {values['accuracy']:.4f}"],
        lr=lr,
        evaluate=lambda is_over: score(model, known, data, args, amp_dtype, is_over),
        config=attr_config(encoder, known, vectors.shape[1]),
        facts={
            "images": len(data.train), "images_sha": data.sha256(), "num_classes": len(data.attributes),
            "text_vectors": source,
        },
        header=header_lines(args, data, model, known, report),
    )  # fmt: skip


def header_lines(args, data: AttributeData, model: VTB, known: Known, report: str) -> list[str]:
    """What is printed before the start."""
    encoder = model.base
    lines = [
        f"data: {args.data_path} as {data.name}",
        *(f"  {note}" for note in data.notes),
        f"encoder: {report}",
        f"VTB: {model.num_attributes} attributes, {encoder.num_patches} patches ({encoder.grid_size[0]} x "
        f"{encoder.grid_size[1]}) at {encoder.img_size[0]} x {encoder.img_size[1]} px, text vectors of "
        f"{model.attr_vectors.shape[1]} numbers: {known.vectors_from}",
    ]
    if not args.attr_vectors and not args.clip_pretrained:
        lines.append(
            "  THE TEXT VECTORS ARE RANDOM: no text is used; --clip_pretrained openai takes those of the "
            "teacher, --attr_vectors FILE your own"
        )
    return lines


def attr_loss(wrapped: nn.Module, batch: dict, rates: torch.Tensor, threshold: float) -> dict[str, torch.Tensor]:
    """`attribute_loss` of the whole batch of all ranks, and the accuracy as in scoring."""
    attr_logits = wrapped(batch["imgs"])
    labels = gather_rows(batch["labels"])
    true, said = labels == 1, (attr_logits.sigmoid() > threshold) & (labels >= 0)
    both, either = (true & said).sum(dim=1), (true | said).sum(dim=1)
    return {"loss": attribute_loss(attr_logits, labels, rates), "accuracy": (both / either.clamp_min(1)).mean()}


def evaluate_file(args, device: torch.device, amp_dtype) -> dict:
    """`--eval`: score a trained model; no teacher is needed, its vectors are in the file.

    Raises:
        InputError: a file of another kind, flags that would change the model, or a set whose attributes it
            does not know.
    """
    check_trained(args, KIND, MODEL_FLAGS)
    model, known, report = load_vtb(args.resume, device)
    data = read_attribute_set(
        args.data_path, args.attr_format, test_split=args.attr_split, known=known.attributes, need_train=False
    )
    print_main(f"data: {args.data_path} as {data.name}", *(f"  {note}" for note in data.notes))
    print_main(f"model {args.resume}:\n{report}\n  text vectors: {known.vectors_from}")
    return score(model, known, data, args, amp_dtype)


def score(model: VTB, known: Known, data: AttributeData, args, amp_dtype, is_over: bool = True) -> dict:
    """The test images: numbers printed beside those of a constant answer; the table of the attributes and the
    report once training `is_over`. Products are not rounded to TF32."""
    device = model.base.pos_embed.device
    try:
        with scoring(model):
            found = predict(
                lambda imgs, _: model(imgs).sigmoid(),
                WholeImages(data.test.paths, np.arange(len(data.test)), model.base.img_size),
                device,
                "test",
                width=model.num_attributes,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                amp_dtype=amp_dtype,
            )
            return {} if found is None else scored(found, known, data, args, is_over)
    finally:
        wait_for_main()


def scored(found, known: Known, data: AttributeData, args, is_over: bool) -> dict:
    """On rank 0: numbers, files and page of what was predicted."""
    folder, threshold = Path(args.output_dir), args.attr_threshold
    probs, labels = found.values.numpy(), data.test.labels[found.rows]
    write_unreadable(found.unreadable, folder)
    metrics = all_metrics(probs, labels, known, threshold)
    rule = protocol(data.name, len(known.attributes), threshold, len(found.unreadable))
    print(f"{rule}\n  text vectors: {known.vectors_from}\n{result_lines(metrics)}", flush=True)
    flat = metrics | {"images": len(probs), "protocol": rule, "text_vectors": known.vectors_from}
    if is_over:
        rows = attribute_rows(probs, labels, known.names, known.rates, threshold)
        write_rows(folder / "attributes.csv", rows)
        if args.report:
            weights = args.resume if args.eval else folder / "model.pth"
            facts = {"set": args.data_path, "weights": weights, "seed": args.seed}
            facts |= {"text vectors": known.vectors_from}
            file = folder / "report.html"
            test = AttributeTest(known, data.test.paths, found.rows, probs, labels, threshold)
            write_attr_report(file, facts, flat, rows, test)
            print(f"report: {file}")
    return flat


def protocol(name: str, attributes: int, threshold: float, unreadable: int) -> str:
    """One line to print beside the numbers."""
    less = f"/{unreadable}-unreadable-left-out" if unreadable else ""
    return f"{name}{less} ({attributes} attributes, true above {threshold:g}, F1 averaged over images)"


def all_metrics(probs: np.ndarray, labels: np.ndarray, known: Known, threshold: float) -> dict[str, float]:
    """`attribute_metrics`, of a constant answer as `constant_...`, and of each column of words top-1; what is
    not defined is left out."""
    constant = np.broadcast_to(known.constant, labels.shape)
    metrics = attribute_metrics(probs > threshold, labels)
    metrics |= {f"top1_{name}": group_top1(probs, labels, places) for name, places in known.groups.items()}
    beside = attribute_metrics(constant, labels)
    commonest = np.broadcast_to(known.rates, labels.shape)
    beside |= {f"top1_{name}": group_top1(commonest, labels, p) for name, p in known.groups.items()}
    metrics |= {f"constant_{name}": value for name, value in beside.items()}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def result_lines(metrics: dict[str, float]) -> str:
    """The numbers in percent, a constant's in brackets."""
    names = [name for name in metrics if f"constant_{name}" in metrics]
    told = [f"{name} {100 * metrics[name]:.2f} [{100 * metrics[f'constant_{name}']:.2f}]" for name in names]
    return f"  {'  '.join(told)}  [constant answer]"


def write_rows(file: Path, rows: list[dict]) -> None:
    """The table of the attributes as CSV; an empty cell: not defined."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({k: "" if v == "nan" else v for k, v in plain.items()})
    write_atomic(file, lambda opened: opened.write(text.getvalue().encode()))
