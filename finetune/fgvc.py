"""Fine-grained classes: TransFG and its baseline, trained and scored."""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from datasets.fgvc import FgvcData, FgvcTrainImages, read_fgvc, renumber_classes
from datasets.items import CenterCrops
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


class Fgvc(Task):
    """TransFG on a set with classes."""

    kind = "CGD-MAE TransFG"

    @property
    def shown(self) -> tuple[str, ...]:
        return ("ce", "contrastive", "accuracy") if self.args.contrastive_weight else ("ce", "accuracy")

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
        return {"fgvc": config, "classes": self.data.classes, "resize": resize}

    @staticmethod
    def model_from(encoder: VisionTransformer, config: dict) -> TransFG:
        return TransFG(encoder, len(config["classes"]), TransFGConfig(**config["fgvc"]))

    def items(self) -> FgvcTrainImages:
        augment = CropFlipAugment(self.args.img_size, self.resize, auto_augment=self.args.auto_augment)
        return FgvcTrainImages(self.data.train, augment, self.args.seed)

    def facts(self) -> dict:
        return super().facts() | {"num_classes": len(self.data.classes)}

    def lr(self, epoch: float, peak: float = 1.0) -> float:
        """Linear from --warmup_lr_ratio, then half a cosine to --min_lr_ratio; changes with every update."""
        args, top = self.args, peak * self.args.lr
        first, last = args.lr * args.warmup_lr_ratio, args.lr * args.min_lr_ratio
        if epoch < args.warmup_epochs:
            return first + (top - first) * epoch / args.warmup_epochs
        return cosine_lr(epoch, top, last, args.warmup_epochs, args.epochs)

    def model_line(self) -> str:
        base = self.model.base
        return f"TransFG: {len(self.config['classes'])} classes, {base.num_patches} patches, {self.parts_line()}"

    def parts_line(self) -> str:
        """What numbers of different settings must not be compared without."""
        blocks = self.model.base.blocks
        parts = self.model.config.parts
        return f"{blocks[0].attn.num_heads} parts after {len(blocks)} blocks" if parts else "no parts"

    def loss(self, wrapped: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Cross-entropy (over this rank's images; DDP averages) + weight * contrastive loss over the images of
        all ranks; scalars, and the share of images whose class is named."""
        args, labels = self.args, batch["labels"]
        logits, features = wrapped(batch["imgs"])
        terms = {"ce": F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)}
        terms["loss"] = terms["ce"]
        if args.contrastive_weight:
            terms["contrastive"] = contrastive_loss(gather_rows(features), gather_rows(labels), args.contrastive_margin)
            terms["loss"] = terms["ce"] + args.contrastive_weight * terms["contrastive"]
        terms["accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
        return terms

    def answers(self, is_over: bool) -> Predictions | None:
        images = CenterCrops(self.data.test.paths, self.model.base.img_size, self.resize)
        return self.predict(lambda imgs, _: self.model(imgs)[0], images)

    def score(self, found: Predictions, is_over: bool) -> tuple[dict, list[str], list[str]]:
        data, numbers = self.data, self.class_scores(found).numbers
        gone = f", {len(found.unreadable)} unreadable left out" if found.unreadable else ""
        protocol = (
            f"{data.name}: {len(data.test)} test images of {len(data.classes)} classes{gone}; whole picture to "
            "{} x {} px, centre crop {} x {}".format(*self.resize, *self.model.base.img_size)
        )
        line = "  " + "  ".join(f"{name} {100 * numbers[name]:.2f}" for name in SHOWN)
        return numbers | {"protocol": protocol, "parts": self.parts_line()}, [protocol, line], found.unreadable

    def class_scores(self, found: Predictions):
        return class_scores(found.values, torch.from_numpy(self.data.test.labels[found.rows]))

    def report(self, found: Predictions, numbers: dict, folder: Path, facts: dict) -> list[Path]:
        images, file = self.data.test.take(found.rows), folder / "report.html"
        answers = Answers(images, self.data.classes, found.values, self.class_scores(found))
        write_fgvc_report(file, numbers["protocol"], facts | {"model": self.parts_line()}, answers)
        return [file]
