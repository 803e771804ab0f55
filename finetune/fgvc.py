"""Fine-grained classes: TransFG and its baseline, from flags to a task that can be trained and scored."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from datasets.eval_images import CenterCrops
from datasets.fgvc import CropFlipAugment, FgvcData, FgvcTrainImages, read_fgvc, renumber_classes
from datasets.samplers import epoch_batches
from finetune.encoder import build_encoder, check_trained
from finetune.fgvc_model import KIND, fgvc_config, load_fgvc
from finetune.predict import predict, write_unreadable
from finetune.task import Task
from metrics.fgvc import class_scores
from models_transfg import TransFG, TransFGConfig, contrastive_loss
from reports.fgvc import Answers, write_fgvc_report
from util.dist import gather_rows, is_main_process, print_main, wait_for_main
from util.errors import InputError
from util.optim import build_finetune_optimizer, cosine_lr
from util.precision import scoring

RECIPE = {  # TransFG's of StanfordCars: 500 of its 10,000 steps of 16 images are warm-up
    "input_size": "448", "drop_path": 0.1, "batch_size": 16, "epochs": 20, "warmup_epochs": 1.0,
    "opt": "sgd", "min_lr_ratio": 0.0, "warmup_lr_ratio": 0.0, "bias_lr_factor": 1.0,
    "head_lr_factor": 1.0, "weight_decay": 0.0, "clip_grad": 1.0, "smoothing": 0.0,
}  # fmt: skip
FIXED = ("parts", "contrastive_weight", "contrastive_margin", "auto_augment", "resize")
RESIZE = 600 / 448  # side of the picture / side of the crop


def default_lr(args) -> float:
    """Learning rate at the recipe's batch."""
    return 2.5e-4 if args.opt == "adamw" else 0.03


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this task."""
    # fmt: off
    add = parser.add_argument_group("fine-grained classes (--task fgvc)").add_argument
    add("--label_column", default="label", help="column of a table that holds the class (default label)")
    add("--parts", default="on", choices=("on", "off"),
        help="TransFG's part selection; off: the ViT baseline (default on)")
    add("--contrastive_weight", default=None, type=float,
        help="weight of the contrastive loss (default 1, with --parts off 0)")
    add("--contrastive_margin", default=0.4, type=float,
        help="cosine up to which other classes cost nothing (default 0.4)")
    add("--resize", default=None, type=int,
        help="px of both sides of a picture before the crop of --input_size (default its 600/448)")
    add("--auto_augment", action=argparse.BooleanOptionalAction, default=True,
        help="AutoAugment's policy for ImageNet after crop and flip (default on)")
    # fmt: on


def check(args) -> None:
    """Contradictions among the flags of this task; fills derived values.

    Raises:
        InputError: one sentence on the first.
    """
    if args.contrastive_weight is None:
        args.contrastive_weight = 1.0 if args.parts == "on" else 0.0
    if args.contrastive_weight < 0:
        raise InputError(f"--contrastive_weight {args.contrastive_weight}: must not be negative")
    if "contrastive_margin" in args.given and not args.contrastive_weight:
        raise InputError(
            f"--contrastive_margin {args.contrastive_margin} without the contrastive loss: drop it, or set "
            "--contrastive_weight"
        )
    if "label_column" in args.given and Path(args.data_path).is_dir():
        raise InputError(
            f"--label_column {args.label_column}: {args.data_path} is a folder, whose layout names the classes: drop it"
        )
    if not -1 <= args.contrastive_margin < 1:
        raise InputError(f"--contrastive_margin {args.contrastive_margin}: a cosine, from -1 to below 1")
    if args.resize is not None and args.resize < max(args.img_size) and not args.eval:
        raise InputError(
            f"--resize {args.resize} px leaves no crop of {args.img_size[0]} x {args.img_size[1]}: give at "
            f"least {max(args.img_size)}"
        )


def resized(img_size: tuple[int, int], resize: int | None) -> tuple[int, int]:
    """(H, W) in px of a picture before the crop."""
    return (resize, resize) if resize else tuple(round(side * RESIZE) for side in img_size)


def build(args, device: torch.device, amp_dtype) -> Task:
    """Data, model, optimiser and losses of a training run."""
    data = read_fgvc(args.data_path, args.label_column)
    batches = epoch_batches(len(data.train), args.batch_size, args.seed)
    torch.manual_seed(args.seed)
    encoder, report = build_encoder(args)
    depth, size = len(encoder.blocks), resized(args.img_size, args.resize)
    config = TransFGConfig(parts=args.parts == "on")
    model = TransFG(encoder, len(data.classes), config).to(device)
    optimizer = build_finetune_optimizer(
        model, depth, args.opt, args.lr, args.weight_decay,
        layer_decay=args.layer_decay, bias_lr_factor=args.bias_lr_factor, head_lr_factor=args.head_lr_factor,
    )  # fmt: skip
    augment = CropFlipAugment(args.img_size, size, auto_augment=args.auto_augment)
    names = ("ce", "contrastive", "accuracy") if args.contrastive_weight else ("ce", "accuracy")
    return Task(
        model,
        optimizer,
        FgvcTrainImages(data.train, augment, args.seed),
        batches,
        loss=lambda wrapped, batch: fgvc_loss(wrapped, batch, args),
        shown=lambda values: [f"{name} {values[name]:.4f}" for name in names],
        lr=lambda epoch: learning_rate(epoch, args),
        evaluate=lambda is_over: score(model, data, size, args, amp_dtype, is_over),
        config=fgvc_config(encoder, config, data.classes, size),
        facts={"images": len(data.train), "images_sha": data.sha256(), "num_classes": len(data.classes)},
        header=header_lines(args, data, model, augment, report),
    )


def learning_rate(epoch: float, args) -> float:
    """Linear from --warmup_lr_ratio, then half a cosine to --min_lr_ratio; changes with every update."""
    if epoch < args.warmup_epochs:
        first = args.lr * args.warmup_lr_ratio
        return first + (args.lr - first) * epoch / args.warmup_epochs
    return cosine_lr(epoch, args.lr, args.lr * args.min_lr_ratio, args.warmup_epochs, args.epochs)


def header_lines(args, data: FgvcData, model: TransFG, augment: CropFlipAugment, report: str) -> list[str]:
    """What is printed before the start."""
    encoder = model.base
    used = len(data.train) // args.global_batch * args.global_batch
    return [
        f"data: {args.data_path} as {data.name}",
        *(f"  {note}" for note in data.notes),
        f"  an epoch: {used // args.global_batch} batches of {args.global_batch}, {used} of "
        f"{len(data.train)} images, others each time",
        f"  pictures: {augment.resize[0]} x {augment.resize[1]} px, random crops of {augment.size[0]} x "
        f"{augment.size[1]}, {'AutoAugment' if augment.auto_augment else 'no AutoAugment'}",
        f"encoder: {report}",
        f"TransFG: {len(data.classes)} classes, {encoder.num_patches} patches ({encoder.grid_size[0]} x "
        f"{encoder.grid_size[1]}, stride {encoder.stride}), {parts_line(model)}",
    ]


def parts_line(model: TransFG) -> str:
    """What numbers of different settings must not be compared without."""
    heads = model.base.blocks[0].attn.num_heads
    return f"{heads} parts after {len(model.base.blocks)} blocks" if model.config.parts else "no parts"


def fgvc_loss(wrapped: nn.Module, batch: dict, args) -> dict[str, torch.Tensor]:
    """Cross-entropy (over this rank's images; DDP averages) + weight * contrastive loss over the images of
    all ranks; scalars, and the share of images whose class is named."""
    logits, features = wrapped(batch["imgs"])
    labels = batch["labels"]
    terms = {"ce": F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)}
    terms["loss"] = terms["ce"]
    if args.contrastive_weight:
        terms["contrastive"] = contrastive_loss(gather_rows(features), gather_rows(labels), args.contrastive_margin)
        terms["loss"] = terms["ce"] + args.contrastive_weight * terms["contrastive"]
    terms["accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
    return terms


def evaluate_file(args, device: torch.device, amp_dtype) -> dict:
    """`--eval`: score a trained model.

    Raises:
        InputError: a file of another kind, flags that would change the model, classes that it does not know.
    """
    check_trained(args, KIND, ("parts",))
    model, config, report = load_fgvc(args.resume, device)
    if args.resize is not None and args.resize < max(model.base.img_size):
        raise InputError(
            f"--resize {args.resize} px leaves no crop of the {model.base.img_size[0]} x "
            f"{model.base.img_size[1]} px that {args.resume} was trained with"
        )
    data = read_fgvc(args.data_path, args.label_column, need_train=False)
    data = renumber_classes(data, config["classes"], args.resume)
    print_main(f"data: {args.data_path} as {data.name}", *(f"  {note}" for note in data.notes))
    print_main(f"model {args.resume}:\n{report}\n{parts_line(model)}")
    size = resized(model.base.img_size, args.resize) if args.resize else tuple(config["resize"])
    return score(model, data, size, args, amp_dtype)


def score(model: TransFG, data: FgvcData, resize: tuple[int, int], args, amp_dtype, is_over: bool = True) -> dict:
    """The test images once each: numbers printed beside their protocol. Products are not rounded to TF32."""
    try:
        with scoring(model):
            return score_as_is(model, data, resize, args, amp_dtype, is_over)
    finally:
        wait_for_main()


def score_as_is(model: TransFG, data: FgvcData, resize: tuple[int, int], args, amp_dtype, is_over: bool) -> dict:
    device = model.base.pos_embed.device
    found = predict(
        lambda imgs, _: model(imgs)[0],
        CenterCrops(data.test.paths, model.base.img_size, resize),
        device,
        "test images",
        width=len(data.classes),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        amp_dtype=amp_dtype,
    )
    if not is_main_process():
        return {}
    folder = Path(args.output_dir)
    write_unreadable(found.unreadable, folder)
    images = data.test.take(found.rows)
    scores = class_scores(found.values, torch.from_numpy(images.labels))
    protocol = protocol_line(data, model, resize, len(found.unreadable))
    print("\n".join([protocol, result_line(scores.numbers)]), flush=True)
    if args.report and is_over:
        weights = args.resume if args.eval else folder / "model.pth"
        facts = {"set": args.data_path, "weights": weights, "seed": args.seed, "model": parts_line(model)}
        crops = CenterCrops(images.paths, model.base.img_size, resize)
        patches = model.base.grid_size[1], model.base.stride, model.base.patch_size
        parts = part_finder(model, amp_dtype)
        answers = Answers(images, data.classes, found.values, scores, lambda row: crops[row][0], parts, patches)
        write_fgvc_report(folder / "report.html", protocol, facts, answers, args.seed)
        print(f"report: {folder / 'report.html'}")
    return scores.numbers | {"protocol": protocol, "parts": parts_line(model)}


def part_finder(model: TransFG, amp_dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """[n, 3, H, W] uint8 -> [n, h] int64 part patches; None for a model without parts."""

    @torch.inference_mode()
    def find(imgs: torch.Tensor) -> torch.Tensor:
        device = model.base.pos_embed.device
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            return model.features(imgs.to(device))[1]

    return find if model.config.parts else None


def protocol_line(data: FgvcData, model: TransFG, resize: tuple[int, int], unreadable: int) -> str:
    """The rule by which the numbers were made."""
    gone = f", {unreadable} unreadable left out" if unreadable else ""
    return (
        f"{data.name}: {len(data.test)} test images of {len(data.classes)} classes{gone}; whole picture to "
        f"{resize[0]} x {resize[1]} px, centre crop {model.base.img_size[0]} x {model.base.img_size[1]}"
    )


def result_line(numbers: dict[str, float]) -> str:
    shown = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean per class", "majority": "majority"}
    return "  " + "  ".join(f"{title} {100 * numbers[name]:.2f}" for name, title in shown.items())
