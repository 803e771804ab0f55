"""Fine-grained classes: TransFG and its baseline, trained and scored."""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from datasets.fgvc import FgvcData, read_fgvc, renumber_classes
from datasets.items import CenterCrops, LabelledItems
from datasets.transforms import CropFlipAugment
from engine_finetune import Predictions
from finetune.task import Task
from metrics.fgvc import class_scores
from models_transfg import TransFG, TransFGConfig, contrastive_loss
from models_vit import VisionTransformer
from reports.fgvc import Answers, write_fgvc_report
from util.dist import gather_rows
from util.errors import InputError
from util.optim import cosine_lr

SHOWN = ("top1", "top5", "mean_class_accuracy", "majority")
RESIZE = 600 / 448  # side of the picture / side of the crop


def warm_cosine_lr(epoch: float, lr: float, first: float, last: float, warmup: float, epochs: float) -> float:
    """Linear from `first`, then half a cosine to `last`; changes with every update."""
    return first + (lr - first) * epoch / warmup if epoch < warmup else cosine_lr(epoch, lr, last, warmup, epochs)


class Fgvc(Task):
    """TransFG on a set with classes."""

    kind = "CGD-MAE TransFG"
    shown = ("ce", "contrastive", "accuracy")
    schedule = staticmethod(warm_cosine_lr)

    @property
    def weight(self) -> float:
        """Of the contrastive loss."""
        return self.args.contrastive_weight if self.args.parts == "on" else 0.0

    @property
    def resize(self) -> tuple[int, int]:
        """(H, W) in px of a picture before the crop."""
        asked = self.args.resize
        return (asked, asked) if asked else tuple(self.config["resize"])

    def read(self, config: dict | None) -> FgvcData:
        args, (high, wide) = self.args, config["img_size"] if config else self.args.img_size
        if args.resize is not None and args.resize < max(high, wide):
            raise InputError(f"--resize {args.resize} px leaves no crop of {high} x {wide} px: give {max(high, wide)}")
        data = read_fgvc(args.data_path, args.label_column, need_train=config is None)
        return renumber_classes(data, config["classes"], args.resume) if config else data

    def describe(self, encoder: VisionTransformer) -> dict:
        resize = [self.args.resize] * 2 if self.args.resize else [round(side * RESIZE) for side in self.args.img_size]
        config = asdict(TransFGConfig(parts=self.args.parts == "on"))
        classes = self.data.classes
        return {"fgvc": config, "classes": classes, "num_classes": len(classes), "resize": resize}

    @staticmethod
    def model_from(encoder: VisionTransformer, config: dict) -> TransFG:
        return TransFG(encoder, len(config["classes"]), TransFGConfig(**config["fgvc"]))

    def items(self) -> LabelledItems:
        augment = CropFlipAugment(self.args.img_size, self.resize, auto_augment=self.args.auto_augment)
        return LabelledItems(self.data.train, augment, self.args.seed)

    def model_line(self) -> str:
        base = self.model.base
        return f"TransFG: {len(self.config['classes'])} classes, {base.num_patches} patches, {self.parts_line()}"

    def parts_line(self) -> str:
        """What numbers of different settings must not be compared without."""
        blocks = self.model.base.blocks
        return f"{blocks[0].attn.num_heads} parts after {len(blocks)} blocks" if self.model.config.parts else "no parts"

    def loss(self, wrapped: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Cross-entropy (over this rank's images; DDP averages) + weight * contrastive loss over the images of
        all ranks; scalars, and the share of images whose class is named."""
        args, labels = self.args, batch["labels"]
        logits, features = wrapped(batch["imgs"])
        terms = {"ce": F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)}
        terms["loss"] = terms["ce"]
        if self.weight:
            terms["contrastive"] = contrastive_loss(gather_rows(features), gather_rows(labels), args.contrastive_margin)
            terms["loss"] = terms["ce"] + self.weight * terms["contrastive"]
        terms["accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
        return terms

    def answers(self) -> Predictions | None:
        images = CenterCrops(self.data.test.paths, self.model.base.img_size, self.resize)
        return self.predict(lambda imgs, _: self.model(imgs)[0], images)

    def score(self, found: Predictions) -> tuple[dict, list[str], list[str]]:
        data, gone = self.data, len(found.unreadable)
        self.scores = class_scores(found.values, torch.from_numpy(data.test.labels[found.rows]))
        protocol = (
            f"{data.name}: {len(data.test)} test images of {len(data.classes)} classes"
            f"{f', {gone} unreadable left out' if gone else ''}; whole picture to "
            "{} x {} px, centre crop {} x {}".format(*self.resize, *self.model.base.img_size)
        )
        numbers = self.scores.numbers | {"protocol": protocol, "parts": self.parts_line()}
        line = "  " + "  ".join(f"{name} {100 * numbers[name]:.2f}" for name in SHOWN)
        return numbers, [protocol, line], found.unreadable

    def report(self, found: Predictions, numbers: dict, folder: Path, facts: dict) -> list[Path]:
        images = self.data.test.take(found.rows)
        answers = Answers(images, self.data.classes, found.values, self.scores)
        write_fgvc_report(folder / "report.html", numbers["protocol"], facts | {"model": self.parts_line()}, answers)
        return [folder / "report.html"]
