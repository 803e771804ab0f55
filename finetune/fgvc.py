"""Fine-grained classes: TransFG and its baseline, from flags to a task that can be trained and scored."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from datasets.fgvc import FgvcData, FgvcTrainImages, read_fgvc, renumber_classes
from datasets.items import CenterCrops
from datasets.samplers import epoch_batches
from datasets.transforms import CropFlipAugment
from engine_finetune import Task, evaluation, predict, write_unreadable
from finetune.encoder import Trained, build_encoder, build_optimizer
from metrics.fgvc import class_scores
from models_transfg import TransFG, TransFGConfig, contrastive_loss
from models_vit import VisionTransformer
from reports.fgvc import Answers, write_fgvc_report
from util.dist import gather_rows, is_main_process, print_main
from util.errors import InputError
from util.optim import cosine_lr

RESIZE = 600 / 448  # side of the picture / side of the crop


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
    augment = CropFlipAugment(args.img_size, size, auto_augment=args.auto_augment)
    return Task(
        model,
        build_optimizer(model, depth, args),
        FgvcTrainImages(data.train, augment, args.seed),
        batches,
        loss=lambda wrapped, batch: fgvc_loss(wrapped, batch, args),
        shown=("ce", "contrastive", "accuracy") if args.contrastive_weight else ("ce", "accuracy"),
        lr=lambda epoch: learning_rate(epoch, args),
        evaluate=lambda is_over: score(model, data, size, args, amp_dtype, is_over),
        config={
            "kind": "CGD-MAE TransFG", "task": "fgvc", **encoder.settings(), "fgvc": asdict(config),
            "classes": data.classes, "resize": list(size),
        },
        facts={"images": len(data.train), "images_sha": data.sha256(), "num_classes": len(data.classes)},
        header=header_lines(args, data, model, augment, report),
    )  # fmt: skip


def model_from(encoder: VisionTransformer, config: dict) -> TransFG:
    """The model that a run's config describes."""
    return TransFG(encoder, len(config["classes"]), TransFGConfig(**config["fgvc"]))


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


def evaluate(found: Trained, args, device: torch.device, amp_dtype) -> dict:
    """Score a trained model.

    Raises:
        InputError: classes that it does not know, or pictures smaller than its crop.
    """
    model, high, wide = found.model, *found.model.base.img_size
    if args.resize is not None and args.resize < max(high, wide):
        raise InputError(
            f"--resize {args.resize} px leaves no crop of the {high} x {wide} px that {args.resume} was trained with"
        )
    data = read_fgvc(args.data_path, args.label_column, need_train=False)
    data = renumber_classes(data, found.config["classes"], args.resume)
    print_main(f"data: {args.data_path} as {data.name}", *(f"  {note}" for note in data.notes))
    print_main(f"model {args.resume}:\n{found.report}\n{parts_line(model)}")
    size = resized((high, wide), args.resize) if args.resize else tuple(found.config["resize"])
    return score(model, data, size, args, amp_dtype)


def score(model: TransFG, data: FgvcData, resize: tuple[int, int], args, amp_dtype, is_over: bool = True) -> dict:
    """The test images once each: numbers printed beside their protocol, and the report once training `is_over`."""
    with evaluation(model):
        found = predict(
            lambda imgs, _: model(imgs)[0],
            CenterCrops(data.test.paths, model.base.img_size, resize),
            model.base.pos_embed.device,
            "test images",
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
            write_fgvc_report(folder / "report.html", protocol, facts, answers)
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
