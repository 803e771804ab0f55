"""Attribute recognition: VTB, trained and scored."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.attr import Attribute, AttributeData, read_attribute_set
from datasets.items import LabelledItems, WholeImages
from datasets.transforms import PadCropErase
from description.texts import slot_of, with_articles
from engine_finetune import Predictions
from finetune.task import Task
from metrics.attr import attribute_metrics, attribute_rows, constant_answer, group_top1
from models_vit import VisionTransformer
from models_vtb import VTB, attribute_loss
from reports.attr import AttributeTest, write_attr_report
from util.dist import gather_rows
from util.errors import InputError
from util.files import file_sha256, write_atomic

# by what a column holds (description.texts), else by whether it holds words
SENTENCES = {
    "colour": "a photo of a {value} vehicle.",
    "body": "a photo of a {value}.",
    "make": "a photo of a {value}.",
    "view": "a photo of a vehicle, {value} view.",
    "words": "a photo of a vehicle, {column} {value}.",
    "yes": "a photo of a vehicle, {column}.",
}


class AttributeStats:
    """What a model keeps, in its config, of the set that it has learned from: its name, its attributes, rates [A]
    float64 (share of true training images), constant [A] bool (the best answer without looking, by the training
    labels). groups: columns of words, {name: places of its values among the attributes}."""

    def __init__(self, config: dict):
        self.set, self.attributes = config["set"], tuple(Attribute(*pair) for pair in config["attributes"])
        self.rates, self.constant = np.array(config["rates"]), np.array(config["constant"], dtype=bool)
        self.names = [attribute.name for attribute in self.attributes]
        self.groups: dict[str, list[int]] = {}
        for place, attribute in enumerate(self.attributes):
            if attribute.value:
                self.groups.setdefault(attribute.column, []).append(place)


class Attr(Task):
    """VTB on a set with attributes; its text vectors are among its weights, so that scoring needs no teacher."""

    kind = "CGD-MAE VTB"

    def read(self, config: dict | None) -> AttributeData:
        args = self.args
        if config is None and args.global_batch < 2:
            raise InputError("--batch_size 1: the batch norm of the logits needs 2 images at least")
        if args.smoothing or args.attr_vectors and args.clip_pretrained:
            raise InputError("drop --smoothing, or one of --attr_vectors and --clip_pretrained: one source is enough")
        more = {"binary": args.attr_columns, "categorical": args.attr_categories}
        if config is not None:
            more = {"known": AttributeStats(config).attributes, "need_train": False}
        data = read_attribute_set(args.data_path, args.attr_format, test_split=args.attr_split, **more)
        if config is None and args.attr_vectors:  # before weights are fetched
            vectors_of_file(Path(args.attr_vectors), len(data.attributes))
        return data

    def describe(self, encoder: VisionTransformer) -> dict:
        data = self.data
        self.vectors, source = text_vectors(self.args, data.attributes, encoder.embed_dim)
        known = {"set": data.name, "attributes": [list(a) for a in data.attributes]}
        known |= {"rates": data.train.rates().tolist(), "constant": constant_answer(data.train.labels).tolist()}
        sizes = {"text_dim": self.vectors.shape[1], "num_classes": len(data.attributes)}
        return known | sizes | {"text_vectors": source}

    @staticmethod
    def model_from(encoder: VisionTransformer, config: dict) -> VTB:
        return VTB(encoder, torch.zeros(len(config["attributes"]), config["text_dim"]))

    def prepare(self) -> None:
        self.model.attr_vectors.copy_(self.vectors)
        self.rates = torch.tensor(self.config["rates"], dtype=torch.float32, device=self.device)

    def items(self) -> LabelledItems:
        return LabelledItems(self.data.train, PadCropErase(self.args.img_size, erase=0.0), self.args.seed)

    def model_line(self) -> str:
        model, source = self.model, self.config["text_vectors"]
        line = f"VTB: {model.num_attributes} attributes, {model.base.num_patches} patches, text vectors: {source}"
        if source.startswith("random"):
            line += "\n  THE TEXT VECTORS ARE RANDOM: no text is used; give --clip_pretrained openai or --attr_vectors"
        return line

    def loss(self, wrapped: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """`attribute_loss` of the whole batch of all ranks, and the accuracy as in scoring."""
        attr_logits, labels = wrapped(batch["imgs"]), gather_rows(batch["labels"])
        true, said = labels == 1, (attr_logits.sigmoid() > self.args.attr_threshold) & (labels >= 0)
        accuracy = ((true & said).sum(dim=1) / (true | said).sum(dim=1).clamp_min(1)).mean()
        return {"loss": attribute_loss(attr_logits, labels, self.rates), "accuracy": accuracy}

    def answers(self) -> Predictions | None:
        test = self.data.test
        images = WholeImages(test.paths, np.arange(len(test)), self.model.base.img_size)
        return self.predict(lambda imgs, _: self.model(imgs).sigmoid(), images)

    def score(self, found: Predictions) -> tuple[dict, list[str], list[str]]:
        """Numbers beside those of a constant answer, and the table of the attributes."""
        stats, threshold, images = AttributeStats(self.config), self.args.attr_threshold, self.data.test
        self.test = AttributeTest(stats, images.take(found.rows), found.values.numpy(), threshold)
        probs, labels = self.test.probs, self.test.images.labels
        metrics = all_metrics(probs, labels, stats, threshold)
        less = f"/{len(found.unreadable)}-unreadable-left-out" if found.unreadable else ""
        rule = f"{len(stats.attributes)} attributes, true above {threshold:g}, F1 averaged over images"
        names = [name for name in metrics if f"constant_{name}" in metrics]
        told = [f"{name} {100 * metrics[name]:.2f} [{100 * metrics[f'constant_{name}']:.2f}]" for name in names]
        metrics |= {"images": len(probs), "protocol": f"{self.data.name}{less} ({rule})"}
        metrics["text_vectors"] = self.config["text_vectors"]
        self.rows = rows = attribute_rows(probs, labels, stats.names, stats.rates, threshold)
        text = io.StringIO(newline="")  # an empty cell: not defined
        cells = [["" if x != x else f"{x:.6g}" if isinstance(x, float) else x for x in row.values()] for row in rows]
        csv.writer(text, lineterminator="\n").writerows([rows[0], *cells])
        file = Path(self.args.output_dir) / "attributes.csv"
        write_atomic(file, lambda opened: opened.write(text.getvalue().encode()))
        lines = [metrics["protocol"], f"  text vectors: {metrics['text_vectors']}"]
        return metrics, [*lines, f"  {'  '.join(told)}  [constant answer]"], found.unreadable

    def report(self, found: Predictions, numbers: dict, folder: Path, facts: dict) -> list[Path]:
        facts |= {"text vectors": numbers["text_vectors"]}
        write_attr_report(folder / "report.html", facts, numbers, self.rows, self.test)
        return [folder / "report.html"]


def all_metrics(probs: np.ndarray, labels: np.ndarray, stats: AttributeStats, threshold: float) -> dict[str, float]:
    """`attribute_metrics`, of a constant answer as `constant_...`, and of each column of words top-1; what is
    not defined is left out."""
    metrics, constant = {}, np.broadcast_to(stats.constant, labels.shape)
    rates = np.broadcast_to(stats.rates, labels.shape)
    for prefix, said, scores in (("", probs > threshold, probs), ("constant_", constant, rates)):
        tops = {f"top1_{name}": group_top1(scores, labels, places) for name, places in stats.groups.items()}
        metrics |= {prefix + name: value for name, value in (attribute_metrics(said, labels) | tops).items()}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def sentence(attribute: Attribute) -> str:
    """("colour", "yellow") -> "a photo of a yellow vehicle."."""
    column, value = (text.replace("_", " ").strip() for text in attribute)
    slot = slot_of(attribute.column) if value else "yes"
    return with_articles(SENTENCES.get(slot, SENTENCES["words"]).format(column=column, value=value))


def text_vectors(args, attributes: tuple[Attribute, ...], dim: int) -> tuple[torch.Tensor, str]:
    """The vectors that the flags ask for, [A, D_t] float32 on the CPU (random: as wide as the encoder, `dim`, by the
    run's seed), and where they come from: it belongs beside every number, as other vectors give other numbers."""
    if args.attr_vectors:
        return vectors_of_file(Path(args.attr_vectors), len(attributes))
    if args.clip_pretrained:
        return vectors_of_clip(args.clip_model, args.clip_pretrained, [sentence(a) for a in attributes])
    return orthogonal_vectors(len(attributes), dim, args.seed), "random orthogonal: no text"


def vectors_of_file(file: Path, count: int) -> tuple[torch.Tensor, str]:
    """An array [A, D_t] in a .npy."""
    try:
        vectors = torch.from_numpy(np.load(file, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise InputError(f"--attr_vectors {file} is no array of numbers in a .npy: {str(error)[:120]}") from error
    if vectors.ndim != 2 or len(vectors) != count or not torch.isfinite(vectors).all():
        what = f"{file} has the shape {tuple(vectors.shape)}, and {count} attributes need finite numbers ({count}, D)"
        raise InputError(f"--attr_vectors {what}: one row an attribute, in the order that the header of a run prints")
    return vectors, f"{file.name}, sha256 {file_sha256(file)[:16]}"


def vectors_of_clip(clip_model: str, clip_pretrained: str, sentences: list[str]) -> tuple[torch.Tensor, str]:
    """The text tower's answers, unit rows; InputError as `load_clip`, or where a sentence is too long."""
    from models_teacher import check_tokens, encode_texts, load_clip  # open_clip takes seconds to import

    clip, tokenizer, identity = load_clip(clip_model, clip_pretrained, [0.5] * 3, [0.5] * 3)  # no pixel is looked at
    check_tokens(tokenizer, sentences, clip.context_length)
    source = f"text tower of {identity.model}, weights {identity.weights_sha256[:16]}"
    return encode_texts(clip, tokenizer, sentences), source


def orthogonal_vectors(count: int, dim: int, seed: int) -> torch.Tensor:
    """[A, max(A, dim)] float32: unit rows at right angles, which say which attribute is which and no more."""
    normal = np.random.default_rng(seed).standard_normal((max(count, dim), count))
    return torch.from_numpy(np.linalg.qr(normal)[0].T.astype(np.float32).copy())
