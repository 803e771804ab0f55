"""Fine-grained classes: TransFG and its baseline, trained and scored."""

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
from models_transfg import TransFG, contrastive_loss
from models_vit import VisionTransformer
from reports.fgvc import Answers, write_fgvc_report
from util.dist import gather_rows
from util.errors import InputError
from util.optim import cosine_lr

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
        parts, classes = self.args.parts == "on", self.data.classes
        return {"fgvc": {"parts": parts}, "classes": classes, "num_classes": len(classes), "resize": resize}

    @staticmethod
    def model_from(encoder: VisionTransformer, config: dict) -> TransFG:
        return TransFG(encoder, len(config["classes"]), config["fgvc"]["parts"])

    def items(self) -> LabelledItems:
        augment = CropFlipAugment(self.args.img_size, self.resize, auto_augment=self.args.auto_augment)
        return LabelledItems(self.data.train, augment, self.args.seed)

    def model_line(self) -> str:
        base = self.model.base
        return f"TransFG: {len(self.config['classes'])} classes, {base.num_patches} patches, {self.parts_line()}"

    def parts_line(self) -> str:
        """What numbers of different settings must not be compared without."""
        blocks = self.model.base.blocks
        return f"{blocks[0].attn.num_heads} parts after {len(blocks)} blocks" if self.model.parts else "no parts"

    def loss(self, wrapped: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Cross-entropy (over this rank's images; DDP averages) + weight * contrastive loss over the images of
        all ranks, where there are parts; scalars, and the share of images whose class is named."""
        args, labels = self.args, batch["labels"]
        logits, features = wrapped(batch["imgs"])
        ce = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
        terms = {"ce": ce, "loss": ce, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}
        if args.contrastive_weight and args.parts == "on":
            terms["contrastive"] = contrastive_loss(gather_rows(features), gather_rows(labels), args.contrastive_margin)
            terms["loss"] = ce + args.contrastive_weight * terms["contrastive"]
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
        shown = ("top1", "top5", "mean_class_accuracy", "majority")
        line = "  " + "  ".join(f"{name} {100 * numbers[name]:.2f}" for name in shown)
        return numbers, [protocol, line], found.unreadable

    def report(self, found: Predictions, numbers: dict, folder: Path, facts: dict) -> list[Path]:
        answers = Answers(self.data.test.take(found.rows), self.data.classes, found.values, self.scores)
        facts |= {"model": self.parts_line()}
        write_fgvc_report(folder / "report.html", numbers["protocol"], facts, answers)
        return [folder / "report.html"]
