"""Part segmentation: SETR, from flags to a task that can be trained and scored."""

import argparse
import math
from functools import partial
from pathlib import Path

import torch

from datasets.samplers import epoch_batches
from datasets.seg import LABEL_SPACES, SPLITS, PartsAugment, PartsData, PartsTrainItems, read_parts
from finetune.encoder import build_encoder, check_trained, encoder_of
from finetune.predict import write_unreadable
from finetune.seg_eval import MODES, PartsResult, evaluate_parts, look_at
from finetune.task import Task
from metrics.seg import SegmentationNumbers, segmentation_numbers
from models_setr import SETR, TAPS, SETRConfig, setr_loss, synchronized
from reports.seg import SegTest, write_seg_report
from util.checkpoint import load_weights, read_checkpoint
from util.dist import is_main_process, print_main, wait_for_main
from util.errors import InputError
from util.optim import build_finetune_optimizer, poly_lr
from util.precision import scoring
from util.pretrained import read_config

KIND = "CGD-MAE SETR"
RECIPE = {  # SETR's for ADE20K, without dropout; 20,000 updates of 16 are 320,000 / images epochs
    "input_size": "512", "drop_path": 0.0, "batch_size": 16, "epochs": 100, "warmup_epochs": 0.0,
    "opt": "sgd", "min_lr_ratio": 0.1, "warmup_lr_ratio": 0.0, "bias_lr_factor": 1.0,
    "head_lr_factor": 10.0, "weight_decay": 0.0, "clip_grad": 0.0, "smoothing": 0.0,
}  # fmt: skip
FIXED = ("label_space", "decoder", "aux_weight", "resize_range", "distort")
OF_THE_MODEL = ("label_space", "decoder", "aux_weight")


def default_lr(args) -> float:
    """Learning rate at the recipe's batch."""
    return 1e-4 if args.opt == "adamw" else 1e-3


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this task."""
    # fmt: off
    add = parser.add_argument_group("part segmentation (--task seg)").add_argument
    add("--label_space", default="own", choices=LABEL_SPACES,
        help="which classes: those of the set's classes.json, or PartImageNet's parts of these vehicles, all "
        "else being background (default own)")
    add("--decoder", default="pup", choices=tuple(TAPS), help="SETR's decoder (default pup)")
    add("--aux_weight", default=0.4, type=float,
        help="weight of each auxiliary head's loss, 0: there are none (default 0.4)")
    add("--resize_range", default=[0.5, 2.0], nargs=2, type=float, metavar=("MIN", "MAX"),
        help="training images are resized by a random factor of this range; 1: short side = crop (default "
        "0.5 2)")
    add("--distort", action=argparse.BooleanOptionalAction, default=True,
        help="random brightness, contrast, saturation, hue in training (default on)")
    add("--seg_eval", default="slide", choices=MODES,
        help="score by sliding windows, or by the whole image resized to --input_size (default slide)")
    add("--seg_split", default="auto", choices=("auto", *SPLITS),
        help="which split is scored (default auto: test, where there is none val)")
    # fmt: on


def check(args) -> None:
    """Contradictions among the flags of this task.

    Raises:
        InputError: one sentence on the first.
    """
    if args.aux_weight < 0:
        raise InputError(f"--aux_weight {args.aux_weight}: must not be negative")
    if args.seg_split == "train" and not args.eval:
        raise InputError("--seg_split train would score what is trained on: choose val or test")
    low, high = args.resize_range
    if not 0 < low <= high <= 10:
        raise InputError(f"--resize_range {low:g} {high:g}: give two factors above 0, the smaller one first")


def build(args, device: torch.device, amp_dtype) -> Task:
    """Data, model, optimiser and loss of a training run."""
    test = scored_split(args)
    data = read_parts(args.data_path, args.label_space, ("train", test))
    train = data.splits["train"]
    batches = epoch_batches(len(train), args.batch_size, args.seed)
    torch.manual_seed(args.seed)
    encoder, report = build_encoder(args)
    depth = len(encoder.blocks)
    model = SETR(encoder, SETRConfig(len(data.space.names), args.decoder, args.aux_weight > 0))
    model = synchronized(model.to(device), device)
    optimizer = build_finetune_optimizer(
        model, depth, args.opt, args.lr, args.weight_decay,
        layer_decay=args.layer_decay, bias_lr_factor=args.bias_lr_factor, head_lr_factor=args.head_lr_factor,
    )  # fmt: skip
    first, last = args.lr * args.warmup_lr_ratio, args.lr * args.min_lr_ratio
    return Task(
        model,
        optimizer,
        PartsTrainItems(train, data.space, augmentation(args, model), args.seed),
        batches,
        loss=lambda wrapped, batch: setr_loss(
            wrapped(batch["imgs"]), batch["masks"], args.aux_weight, args.smoothing
        ),
        shown=lambda values: [f"{name} {values[name]:.4f}" for name in ("main", "accuracy")],
        lr=lambda epoch: poly_lr(epoch, args.lr, first, last, args.warmup_epochs, args.epochs),
        evaluate=lambda is_over: score(model, data, test, args, amp_dtype, is_over),
        config={
            "kind": KIND, **encoder.settings(), "num_classes": len(data.space.names), "decoder": args.decoder,
            "aux": model.config.aux, "label_space": data.space.name, "classes": list(data.space.names),
        },
        facts={
            "images": len(train), "images_sha": data.sha256("train"), "num_classes": len(data.space.names),
        },
        header=[
            f"data: {args.data_path}, label space {data.space.name}",
            *(f"  {note}" for note in data.notes),
            f"  an epoch: {batches.batches_per_epoch} updates, all {batches.batches_per_epoch * args.epochs}",
            f"encoder: {report}",
            model_line(model),
        ],
    )  # fmt: skip


def augmentation(args, model: SETR) -> PartsAugment:
    """Padding has the mean colour, which is zero after normalisation."""
    fill = tuple(round(255 * value) for value in model.base.pixel_mean.flatten().tolist())
    return PartsAugment(args.img_size, fill, tuple(args.resize_range), distort=args.distort)


def model_line(model: SETR) -> str:
    rows, columns = model.base.grid_size
    return (
        f"SETR-{model.config.decoder}: {model.config.num_classes} classes, {rows} x {columns} patches, "
        f"blocks {', '.join(map(str, model.taps))} of 0 to {len(model.base.blocks) - 1}, "
        f"{'auxiliary heads' if model.config.aux else 'no auxiliary heads'}"
    )


def scored_split(args) -> str:
    """The split that --seg_split means."""
    if args.seg_split != "auto":
        return args.seg_split
    return "test" if (Path(args.data_path) / "images" / "test").is_dir() else "val"


def load_setr(file: str | Path, device: torch.device | str = "cpu"):
    """A model that main_finetune.py trained: (SETR in eval mode, its config, what was loaded).

    Raises:
        InputError: unreadable, or tensors are missing.
    """
    content = read_checkpoint(file)
    config = read_config(file, content)
    encoder = encoder_of(config)
    model = SETR(encoder, SETRConfig(config["num_classes"], config["decoder"], config["aux"]))
    report = load_weights(model, content["model"], file, needed="all")
    return model.to(device).eval(), config, report


def evaluate_file(args, device: torch.device, amp_dtype) -> dict:
    """`--eval`: score a trained model.

    Raises:
        InputError: another file, flags that would change the model, or a set with other classes.
    """
    check_trained(args, KIND, OF_THE_MODEL)
    model, config, report = load_setr(args.resume, device)
    test = scored_split(args)
    data = read_parts(args.data_path, config["label_space"], (test,))
    if list(data.space.names) != config["classes"]:
        raise InputError(
            f"{args.resume} knows the classes {', '.join(config['classes'])[:120]}, and {args.data_path} has "
            f"{', '.join(data.space.names)[:120]}: give a set of the same classes"
        )
    print_main(f"data: {args.data_path}, label space {data.space.name}", *(f"  {n}" for n in data.notes))
    print_main(f"model {args.resume}:\n{report}\n{model_line(model)}")
    return score(model, data, test, args, amp_dtype)


def score(model: SETR, data: PartsData, split: str, args, amp_dtype, is_over: bool = True) -> dict:
    """The numbers of a split on rank 0, printed beside their protocol, and the report where asked for once
    training `is_over`. Products are not rounded to TF32."""
    try:
        with scoring(model):
            result = evaluate_parts(
                model, data.splits[split], data.space, args.seg_eval,
                batch_size=args.batch_size, num_workers=args.num_workers, amp_dtype=amp_dtype,
            )  # fmt: skip
            if not is_main_process():
                return {}
            numbers = segmentation_numbers(result.confusion, data.space.background)
            protocol = protocol_line(model, data, split, args.seg_eval, result)
            write_unreadable(result.unreadable, Path(args.output_dir))
            print("\n".join([protocol, *number_lines(numbers, data)]), flush=True)
            if args.report and is_over:
                file = Path(args.output_dir) / "report.html"
                weights = args.resume if args.eval else Path(args.output_dir) / "model.pth"
                about = {"set": args.data_path, "weights": weights, "model": model_line(model), "seed": args.seed}
                part = data.splits[split]
                look = partial(look_at, model, part, data.space, args.seg_eval, amp_dtype)
                test = SegTest(data.space, part.images, result.rows, result.each, look)
                write_seg_report(file, protocol, about, test)
                print(f"report: {file}")
            return flat_metrics(numbers, data, result) | {"protocol": protocol}
    finally:
        wait_for_main()


def protocol_line(model: SETR, data: PartsData, split: str, mode: str, result: PartsResult) -> str:
    """What the numbers belong to."""
    height, width = model.base.img_size
    how = f"sliding windows of {height} x {width} px, by 2/3 of a side, logits averaged"
    if mode == "whole":
        how = f"the whole image at {height} x {width} px"
    gone = f", {len(result.unreadable)} unreadable left out" if result.unreadable else ""
    return (
        f"parts/{data.space.name}/{split} ({len(data.space.names)} classes, {len(result.rows)} images{gone}; "
        f"{how}; one confusion matrix at the images' sizes, no flips, no multiple scales)"
    )


def number_lines(numbers: SegmentationNumbers, data: PartsData) -> list[str]:
    """The numbers in percent, by class and over all."""
    lines = [f"  {'IoU':>7s} {'Acc':>7s}"]
    for name, iou, acc in zip(data.space.names, numbers.iou.tolist(), numbers.acc.tolist()):
        lines.append(f"  {percent(iou):>7s} {percent(acc):>7s}  {name}")
    means = [f"{name} {percent(value)}" for name, value in numbers.flat.items()]
    return [*lines, "  " + "  ".join(means)]


def percent(value: float) -> str:
    return "absent" if math.isnan(value) else f"{100 * value:.2f}"


def flat_metrics(numbers: SegmentationNumbers, data: PartsData, result: PartsResult) -> dict:
    """For metrics.json; None for what cannot be told, since JSON knows no NaN."""
    flat = dict(numbers.flat)
    for kind, values in (("IoU", numbers.iou), ("Acc", numbers.acc)):
        flat |= {f"{kind}_{name}": value for name, value in zip(data.space.names, values.tolist())}
    flat = {name: None if math.isnan(value) else value for name, value in flat.items()}
    return flat | {"images": len(result.rows), "unreadable": len(result.unreadable)}
