"""Part segmentation: SETR, from flags to a task that can be trained and scored."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from datasets.samplers import epoch_batches
from datasets.seg import (
    LabelSpace,
    PartsAugment,
    PartsData,
    PartsSplit,
    PartsTestItems,
    PartsTrainItems,
    open_pair,
    read_parts,
    shown_to_model,
)
from engine_finetune import Task, evaluation, merged, write_unreadable
from finetune.encoder import Trained, build_encoder, build_optimizer
from metrics.seg import SegmentationNumbers, confusion_matrix, segmentation_numbers
from models_setr import SETR, SETRConfig, setr_loss, synchronized
from models_vit import VisionTransformer
from reports.seg import SegTest, write_seg_report
from util.dist import get_rank, get_world_size, is_main_process, print_main
from util.errors import InputError
from util.optim import poly_lr
from util.progress import Progress
from util.stop import init_worker


@dataclass(frozen=True)
class PartsResult:
    """confusion: [K, K] int64 of the whole split. rows: [n] int64 of the images that could be read;
    each: [n, K, K] int64, theirs. unreadable: `path<tab>reason` of the others."""

    confusion: np.ndarray
    rows: np.ndarray
    each: np.ndarray
    unreadable: list[str]


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
    first, last = args.lr * args.warmup_lr_ratio, args.lr * args.min_lr_ratio
    return Task(
        model,
        build_optimizer(model, depth, args),
        PartsTrainItems(train, data.space, augmentation(args, model), args.seed),
        batches,
        loss=lambda wrapped, batch: setr_loss(wrapped(batch["imgs"]), batch["masks"], args.aux_weight, args.smoothing),
        shown=("main", "accuracy"),
        lr=lambda epoch: poly_lr(epoch, args.lr, first, last, args.warmup_epochs, args.epochs),
        evaluate=lambda is_over: score(model, data, test, args, amp_dtype, is_over),
        config={
            "kind": "CGD-MAE SETR", "task": "seg", **encoder.settings(), "num_classes": len(data.space.names),
            "decoder": args.decoder, "aux": model.config.aux, "label_space": data.space.name,
            "classes": list(data.space.names),
        },
        facts={"images": len(train), "images_sha": data.sha256("train"), "num_classes": len(data.space.names)},
        header=[
            f"data: {args.data_path}, label space {data.space.name}",
            *(f"  {note}" for note in data.notes),
            f"  an epoch: {batches.batches_per_epoch} updates, all {batches.batches_per_epoch * args.epochs}",
            f"encoder: {report}",
            model_line(model),
        ],
    )  # fmt: skip


def model_from(encoder: VisionTransformer, config: dict) -> SETR:
    """The model that a run's config describes."""
    return SETR(encoder, SETRConfig(config["num_classes"], config["decoder"], config["aux"]))


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


def evaluate(found: Trained, args, device: torch.device, amp_dtype) -> dict:
    """Score a trained model.

    Raises:
        InputError: a set with other classes.
    """
    model, config, test = found.model, found.config, scored_split(args)
    data = read_parts(args.data_path, config["label_space"], (test,))
    if list(data.space.names) != config["classes"]:
        raise InputError(
            f"{args.resume} knows the classes {', '.join(config['classes'])[:120]}, and {args.data_path} has "
            f"{', '.join(data.space.names)[:120]}: give a set of the same classes"
        )
    print_main(f"data: {args.data_path}, label space {data.space.name}", *(f"  {n}" for n in data.notes))
    print_main(f"model {args.resume}:\n{found.report}\n{model_line(model)}")
    return score(model, data, test, args, amp_dtype)


def score(model: SETR, data: PartsData, split: str, args, amp_dtype, is_over: bool = True) -> dict:
    """The numbers of a split on rank 0, printed beside their protocol, and the report where asked for once
    training `is_over`."""
    part, folder = data.splits[split], Path(args.output_dir)
    with evaluation(model):
        result = evaluate_parts(
            model, part, data.space, args.seg_eval,
            batch_size=args.batch_size, num_workers=args.num_workers, amp_dtype=amp_dtype,
        )  # fmt: skip
        if not is_main_process():
            return {}
        numbers = segmentation_numbers(result.confusion, data.space.background)
        protocol = protocol_line(model, data, split, args.seg_eval, result)
        write_unreadable(result.unreadable, folder)
        print("\n".join([protocol, *number_lines(numbers, data)]), flush=True)
        if args.report and is_over:
            weights = args.resume if args.eval else folder / "model.pth"
            about = {"set": args.data_path, "weights": weights, "model": model_line(model), "seed": args.seed}
            look = partial(look_at, model, part, data.space, args.seg_eval, amp_dtype)
            test = SegTest(data.space, part.images, result.rows, result.each, look)
            write_seg_report(folder / "report.html", protocol, about, test)
            print(f"report: {folder / 'report.html'}")
        return flat_metrics(numbers, data, result) | {"protocol": protocol}


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


def model_size(size: tuple[int, int], crop: tuple[int, int], mode: str) -> tuple[int, int]:
    """(width, height) at which an image is shown to the model. slide: its sides keep their ratio, and the
    smaller one reaches the crop, so that both hold a window; whole: the crop's.

    Args:
        size: (width, height) of the image. crop: (H, W).
    """
    if mode == "whole":
        return crop[1], crop[0]
    factor = max(crop[1] / size[0], crop[0] / size[1])
    return max(crop[1], round(factor * size[0])), max(crop[0], round(factor * size[1]))


def window_starts(length: int, crop: int) -> list[int]:
    """Where windows of `crop` px begin: every 2/3 of a window (341 of 512), the last at the very end."""
    stride = max(1, 2 * crop // 3)
    return [min(i * stride, length - crop) for i in range(math.ceil((length - crop) / stride) + 1)]


def sliding_logits(model: SETR, imgs: torch.Tensor, batch_size: int) -> torch.Tensor:
    """[3, h, w] uint8 on the device, h and w no smaller than the crop -> [K, h, w] float32: means of the
    logits of all windows over each pixel."""
    crop, (high, wide) = model.base.img_size, imgs.shape[1:]
    corners = [(y, x) for y in window_starts(high, crop[0]) for x in window_starts(wide, crop[1])]
    total = torch.zeros(model.config.num_classes, high, wide, device=imgs.device)
    seen = torch.zeros(high, wide, device=imgs.device)
    for first in range(0, len(corners), batch_size):
        part = corners[first : first + batch_size]
        windows = torch.stack([imgs[:, y : y + crop[0], x : x + crop[1]] for y, x in part])
        for (y, x), logits in zip(part, model.predict(windows).float()):
            total[:, y : y + crop[0], x : x + crop[1]] += logits
            seen[y : y + crop[0], x : x + crop[1]] += 1
    return total / seen


def predict_mask(
    model: SETR, imgs: torch.Tensor, size: tuple[int, int], batch_size: int, amp_dtype=None
) -> torch.Tensor:
    """[3, h, w] uint8 on the device, of `model_size` -> [H, W] int64 classes at `size`: logits are enlarged
    or shrunk, and the largest wins.

    Raises:
        FloatingPointError: logits that are not finite.
    """
    with torch.autocast(imgs.device.type, amp_dtype, enabled=amp_dtype is not None):
        logits = sliding_logits(model, imgs, batch_size)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("logits that are not finite")
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].argmax(dim=0)


@torch.inference_mode()
def evaluate_parts(
    model: SETR,
    part: PartsSplit,
    space: LabelSpace,
    mode: str,
    *,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None = None,
) -> PartsResult:
    """One confusion matrix of a split at the images' own sizes, the same on every rank.

    The ranks share out the images; each is computed once and alone, so that nothing is padded and the numbers
    are equal on any number of ranks.

    Raises:
        InputError: not one pair can be read, or the model answers with numbers that are not finite.
    """
    rows = list(range(get_rank(), len(part), get_world_size()))
    device = model.base.pos_embed.device
    resized = partial(model_size, crop=model.base.img_size, mode=mode)
    loader = DataLoader(
        PartsTestItems(part, space, rows, resized), batch_size=None, num_workers=num_workers, worker_init_fn=init_worker
    )
    progress = Progress(f"{mode}: test images", len(rows), shown=is_main_process())
    found: dict[int, torch.Tensor | str] = {}
    for done, (row, imgs, masks, problem) in enumerate(loader, 1):
        row = int(row)
        if problem:
            found[row] = f"{part.images.relative(row)}\t{problem}"
        else:
            masks = masks.to(device)
            try:
                predicted = predict_mask(model, imgs.to(device), masks.shape, batch_size, amp_dtype)
                found[row] = confusion_matrix(masks, predicted, len(space.names)).cpu()
            except FloatingPointError:
                found[row] = "!"  # all ranks must hear of it
        progress.update(done)
    progress.close()
    return _joined(merged(found), part)


@torch.inference_mode()
def look_at(model: SETR, part: PartsSplit, space: LabelSpace, mode: str, amp_dtype, row: int) -> tuple:
    """An image of the split, its truth and the model's answer, [h, w] uint8 classes at its size."""
    picture, mask = open_pair(part.images[row], part.masks[row])
    truth, crop = space.table[mask], model.base.img_size
    imgs = shown_to_model(picture, model_size(picture.size, crop, mode)).to(model.base.pos_embed.device)
    answer = predict_mask(model, imgs, truth.shape, 16, amp_dtype)
    return picture, truth, answer.cpu().numpy().astype(np.uint8)


def _joined(found: dict[int, torch.Tensor | str], part: PartsSplit) -> PartsResult:
    diverged = [row for row, value in found.items() if isinstance(value, str) and value == "!"]
    if diverged:
        raise InputError(
            f"the answers for {len(diverged)} test images, e.g. {part.images.relative(min(diverged))}, are "
            "not finite: the model has diverged, or needs --amp none"
        )
    unreadable = [value for _, value in sorted(found.items()) if isinstance(value, str)]
    rows = [row for row, value in sorted(found.items()) if not isinstance(value, str)]
    if not rows:
        raise InputError(f"none of the {len(part)} test pairs can be read, e.g. {unreadable[0]}")
    each = np.stack([found[row].numpy() for row in rows])
    return PartsResult(each.sum(axis=0), np.array(rows), each, unreadable)
