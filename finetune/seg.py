"""Part segmentation: SETR, trained and scored."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from datasets.seg import PartsAugment, PartsData, PartsTestItems, PartsTrainItems, at_size, read_parts
from datasets.tables import split_folder
from engine_finetune import merged
from finetune.task import Task
from metrics.seg import confusion_matrix, segmentation_numbers
from models_setr import SETR, SETRConfig, setr_loss, synchronized
from models_vit import VisionTransformer
from reports.page import percent
from reports.seg import SegTest, write_seg_report
from util.cli import Progress
from util.dist import get_rank, get_world_size, init_worker, is_main_process
from util.errors import InputError
from util.optim import poly_lr


class Seg(Task):
    """SETR on a set with masks."""

    kind = "CGD-MAE SETR"
    shown = ("main", "accuracy")
    schedule = staticmethod(poly_lr)

    def read(self, config: dict | None) -> PartsData:
        path, self.split = self.args.data_path, self.args.seg_split
        if self.split == "auto":
            self.split = "test" if split_folder(Path(path) / "images", "test").is_dir() else "val"
        data = read_parts(path, (self.split,) if config else ("train", self.split))
        if config and list(data.space.names) != config["classes"]:
            there, here = (", ".join(names)[:120] for names in (config["classes"], data.space.names))
            what = f"{self.args.resume} knows the classes {there}, and {path} has {here}"
            raise InputError(f"{what}: give a set of the same classes")
        return data

    def describe(self, encoder: VisionTransformer) -> dict:
        space, decoder = self.data.space, {"decoder": self.args.decoder, "aux": self.args.aux_weight > 0}
        return {"num_classes": len(space.names), **decoder, "label_space": space.name, "classes": list(space.names)}

    @staticmethod
    def model_from(encoder: VisionTransformer, config: dict) -> SETR:
        return SETR(encoder, SETRConfig(config["num_classes"], config["decoder"], config["aux"]))

    def prepare(self) -> None:
        self.model = synchronized(self.model, self.device)

    def items(self) -> PartsTrainItems:
        args, data = self.args, self.data
        fill = tuple(round(255 * x) for x in self.model.base.pixel_mean.flatten().tolist())  # 0 once it is normalised
        augment = PartsAugment(args.img_size, fill, tuple(args.resize_range), distort=args.distort)
        return PartsTrainItems(data.train, augment, args.seed)

    def model_line(self) -> str:
        config, (rows, columns) = self.model.config, self.model.base.grid_size
        heads = "auxiliary heads" if config.aux else "no auxiliary heads"
        return f"SETR-{config.decoder}: {config.num_classes} classes, {rows} x {columns} patches, {heads}"

    def loss(self, wrapped: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        return setr_loss(wrapped(batch["imgs"]), batch["masks"], self.args.aux_weight, self.args.smoothing)

    def answers(self) -> SegTest:
        return evaluate_parts(self.model, self.data, self.split, **self.loading)

    def score(self, found: SegTest) -> tuple[dict, list[str], list[str]]:
        """In percent, by class and over all; None for what cannot be told, since JSON knows no NaN."""
        space, gone = self.data.space, len(found.unreadable)
        numbers = segmentation_numbers(found.each.sum(axis=0), space.background)
        protocol = (
            f"parts/{space.name}/{self.split} ({len(space.names)} classes, {len(found.rows)} images"
            f"{f', {gone} unreadable left out' if gone else ''}; sliding windows of "
            "{} x {} px, by 2/3 of a side, logits averaged; one confusion matrix at the images' sizes, no flips, no "
            "multiple scales)".format(*self.model.base.img_size)
        )
        each, shown = list(zip(space.names, *numbers[:2])), partial(percent, missing="absent")
        lines = [protocol, f"  {'IoU':>7s} {'Acc':>7s}"]
        lines += [f"  {shown(iou):>7s} {shown(acc):>7s}  {name}" for name, iou, acc in each]
        lines.append("  " + "  ".join(f"{name} {shown(value)}" for name, value in numbers.flat.items()))
        flat = numbers.flat | {f"IoU_{name}": float(iou) for name, iou, _ in each}
        flat |= {f"Acc_{name}": float(acc) for name, _, acc in each}
        flat = {name: None if math.isnan(value) else value for name, value in flat.items()}
        return flat | {"images": len(found.rows), "unreadable": gone, "protocol": protocol}, lines, found.unreadable

    def report(self, found: SegTest, numbers: dict, folder: Path, facts: dict) -> list[Path]:
        facts |= {"model": self.model_line()}
        write_seg_report(folder / "report.html", numbers["protocol"], facts, self.data.space, found, self.look_at)
        return [folder / "report.html"]

    @torch.inference_mode()
    def look_at(self, row: int) -> tuple:
        """An image of the split, its truth and the model's answer, [h, w] uint8 classes at its size."""
        picture, truth = self.data.splits[self.split].open(row)
        size = model_size(picture.size, self.model.base.img_size)
        answer = predict_mask(self.model, at_size(picture, size).to(self.device), truth.shape, 16)
        return picture, truth, answer.cpu().numpy().astype(np.uint8)


def model_size(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which an image of `size` (width, height) is shown to the model: its sides keep their ratio,
    and the smaller one reaches the crop (H, W), so that both hold a window."""
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
        part = [(..., slice(y, y + crop[0]), slice(x, x + crop[1])) for y, x in corners[first : first + batch_size]]
        for window, logits in zip(part, model.predict(torch.stack([imgs[window] for window in part]))):
            total[window] += logits
            seen[window] += 1
    return total / seen


def predict_mask(model: SETR, imgs: torch.Tensor, size: tuple[int, int], batch_size: int) -> torch.Tensor | None:
    """[3, h, w] uint8 on the device, of `model_size` -> [H, W] int64 classes at `size`: logits are enlarged or shrunk,
    and the largest wins; None where they are not finite."""
    logits = sliding_logits(model, imgs, batch_size)
    large = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    return large.argmax(dim=0) if torch.isfinite(logits).all() else None


@torch.inference_mode()
def evaluate_parts(model: SETR, data: PartsData, split: str, batch_size: int, num_workers: int) -> SegTest:
    """Each image of a split at its own size, the same on every rank: the ranks share them out, each is computed once
    and alone, so that nothing is padded and the numbers are equal on any number of ranks."""
    part, classes, device = data.splits[split], len(data.space.names), model.base.pos_embed.device
    rows = list(range(get_rank(), len(part), get_world_size()))
    items = PartsTestItems(part, rows, partial(model_size, crop=model.base.img_size))
    loader = DataLoader(items, batch_size=None, num_workers=num_workers, worker_init_fn=init_worker)
    progress = Progress("test images", len(rows), shown=is_main_process())
    found: dict[int, np.ndarray | str | None] = {}  # None: the model has diverged, of which all ranks must hear
    for done, (row, imgs, masks, problem) in enumerate(loader, 1):
        found[row] = f"{part.images.relative(row)}\t{problem}"
        if not problem:
            said, masks = predict_mask(model, imgs.to(device), masks.shape, batch_size), masks.to(device)
            found[row] = None if said is None else confusion_matrix(masks, said, classes).cpu().numpy()
        progress.update(done)
    progress.close()
    found = dict(sorted(merged(found).items()))
    if diverged := [row for row, value in found.items() if value is None]:
        example = part.images.relative(diverged[0])
        raise InputError(f"{len(diverged)} answers, e.g. for {example}, are not finite: the model has diverged")
    unreadable = [value for value in found.values() if isinstance(value, str)]
    if len(unreadable) == len(part):
        raise InputError(f"none of the {len(part)} test pairs can be read, e.g. {unreadable[0]}")
    read = {row: value for row, value in found.items() if not isinstance(value, str)}
    return SegTest(part.images, np.array(list(read)), np.stack(list(read.values())), unreadable)
