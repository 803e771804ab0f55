"""Attribute recognition: VTB, trained and scored."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from datasets.attr import Attribute, AttributeData, AttributeTrainImages, read_attribute_set
from datasets.items import WholeImages
from datasets.transforms import PadCropErase
from description.canonical import slot_of, with_articles
from engine_finetune import Predictions
from finetune.task import Task
from metrics.attr import attribute_metrics, attribute_rows, constant_answer, group_top1
from models_vit import VisionTransformer
from models_vtb import VTB, attribute_loss
from reports.attr import AttributeTest, write_attr_report
from util.dist import gather_rows
from util.errors import InputError
from util.files import file_sha256, write_atomic

# by what a column holds (description.canonical), else by whether it holds words
SENTENCES = {
    "colour": "a photo of a {value} vehicle.",
    "body": "a photo of a {value}.",
    "make": "a photo of a {value}.",
    "view": "a photo of a vehicle, {value} view.",
    "words": "a photo of a vehicle, {column} {value}.",
    "yes": "a photo of a vehicle, {column}.",
}


@dataclass(frozen=True)
class AttributeStats:
    """What a model keeps of the set that it has learned from.

    set: its name. vectors_from: where the text vectors come from. rates: [A] float64, share of true training
    images. constant: [A] bool, the best answer without looking, by the training labels.
    """

    set: str
    attributes: tuple[Attribute, ...]
    vectors_from: str
    rates: np.ndarray
    constant: np.ndarray

    @classmethod
    def from_config(cls, config: dict) -> "AttributeStats":
        attributes = tuple(Attribute(*pair) for pair in config["attributes"])
        constant = np.array(config["constant"], dtype=bool)
        return cls(config["set"], attributes, config["vectors_from"], np.array(config["rates"]), constant)

    @property
    def names(self) -> list[str]:
        return [attribute.name for attribute in self.attributes]

    @property
    def groups(self) -> dict[str, list[int]]:
        """Columns of words: {name: places of its values among the attributes}."""
        found: dict[str, list[int]] = {}
        for place, attribute in enumerate(self.attributes):
            if attribute.value:
                found.setdefault(attribute.column, []).append(place)
        return found


class Attr(Task):
    """VTB on a set with attributes; its text vectors are among its weights, so that scoring needs no teacher."""

    kind = "CGD-MAE VTB"

    def read(self, config: dict | None) -> AttributeData:
        args = self.args
        if config is None and args.global_batch < 2:
            raise InputError("--batch_size 1: the batch norm of the logits needs 2 images at least")
        more = {"binary": args.attr_columns, "categorical": args.attr_categories}
        if config is not None:
            more = {"known": AttributeStats.from_config(config).attributes, "need_train": False}
        data = read_attribute_set(args.data_path, args.attr_format, test_split=args.attr_split, **more)
        if config is None and args.attr_vectors:  # what is wrong with them shows before weights are fetched
            vectors_of_file(Path(args.attr_vectors), len(data.attributes))
        return data

    def describe(self, encoder: VisionTransformer) -> dict:
        data = self.data
        self.vectors, source = text_vectors(self.args, data.attributes, encoder.embed_dim)
        return {
            "text_dim": self.vectors.shape[1], "set": data.name, "attributes": [list(a) for a in data.attributes],
            "vectors_from": source, "rates": data.train.rates().tolist(),
            "constant": constant_answer(data.train.labels).tolist(),
        }  # fmt: skip

    @staticmethod
    def model_from(encoder: VisionTransformer, config: dict) -> VTB:
        return VTB(encoder, torch.zeros(len(config["attributes"]), config["text_dim"]))

    def prepare(self) -> None:
        self.model.attr_vectors.copy_(self.vectors)
        self.rates = torch.tensor(self.config["rates"], dtype=torch.float32, device=self.device)

    def items(self) -> AttributeTrainImages:
        augment = PadCropErase(self.args.img_size, erase=0.0)
        return AttributeTrainImages(self.data.train, augment, self.args.seed)

    def facts(self) -> dict:
        more = {"num_classes": len(self.data.attributes), "text_vectors": self.config["vectors_from"]}
        return super().facts() | more

    def model_line(self) -> str:
        model, source = self.model, self.config["vectors_from"]
        line = f"VTB: {model.num_attributes} attributes, {model.base.num_patches} patches, text vectors: {source}"
        if source.startswith("random"):
            line += (
                "\n  THE TEXT VECTORS ARE RANDOM: no text is used; --clip_pretrained openai takes those of the "
                "teacher, --attr_vectors FILE your own"
            )
        return line

    def loss(self, wrapped: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """`attribute_loss` of the whole batch of all ranks, and the accuracy as in scoring."""
        attr_logits, labels = wrapped(batch["imgs"]), gather_rows(batch["labels"])
        true, said = labels == 1, (attr_logits.sigmoid() > self.args.attr_threshold) & (labels >= 0)
        both, either = (true & said).sum(dim=1), (true | said).sum(dim=1)
        accuracy = (both / either.clamp_min(1)).mean()
        return {"loss": attribute_loss(attr_logits, labels, self.rates), "accuracy": accuracy}

    def answers(self, is_over: bool) -> Predictions | None:
        test = self.data.test
        images = WholeImages(test.paths, np.arange(len(test)), self.model.base.img_size)
        return self.predict(lambda imgs, _: self.model(imgs).sigmoid(), images)

    def score(self, found: Predictions, is_over: bool) -> tuple[dict, list[str], list[str]]:
        """Numbers beside those of a constant answer; once training `is_over` the table of the attributes."""
        stats, threshold = AttributeStats.from_config(self.config), self.args.attr_threshold
        probs, labels = found.values.numpy(), self.data.test.labels[found.rows]
        metrics = all_metrics(probs, labels, stats, threshold)
        less = f"/{len(found.unreadable)}-unreadable-left-out" if found.unreadable else ""
        count = len(stats.attributes)
        protocol = f"{self.data.name}{less} ({count} attributes, true above {threshold:g}, F1 averaged over images)"
        names = [name for name in metrics if f"constant_{name}" in metrics]
        told = [f"{name} {100 * metrics[name]:.2f} [{100 * metrics[f'constant_{name}']:.2f}]" for name in names]
        lines = [protocol, f"  text vectors: {stats.vectors_from}", f"  {'  '.join(told)}  [constant answer]"]
        if is_over:
            self.rows = attribute_rows(probs, labels, stats.names, stats.rates, threshold)
            write_rows(Path(self.args.output_dir) / "attributes.csv", self.rows)
        numbers = metrics | {"images": len(probs), "protocol": protocol, "text_vectors": stats.vectors_from}
        return numbers, lines, found.unreadable

    def report(self, found: Predictions, numbers: dict, folder: Path, facts: dict) -> list[Path]:
        data, file, stats = self.data, folder / "report.html", AttributeStats.from_config(self.config)
        facts |= {"text vectors": stats.vectors_from}
        probs, labels = found.values.numpy(), data.test.labels[found.rows]
        test = AttributeTest(stats, data.test.paths, found.rows, probs, labels, self.args.attr_threshold)
        write_attr_report(file, facts, numbers, self.rows, test)
        return [file]


def all_metrics(probs: np.ndarray, labels: np.ndarray, stats: AttributeStats, threshold: float) -> dict[str, float]:
    """`attribute_metrics`, of a constant answer as `constant_...`, and of each column of words top-1; what is
    not defined is left out."""

    def of(said: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        tops = {f"top1_{name}": group_top1(scores, labels, places) for name, places in stats.groups.items()}
        return attribute_metrics(said, labels) | tops

    metrics = of(probs > threshold, probs)
    beside = of(np.broadcast_to(stats.constant, labels.shape), np.broadcast_to(stats.rates, labels.shape))
    metrics |= {f"constant_{name}": value for name, value in beside.items()}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def write_rows(file: Path, rows: list[dict]) -> None:
    """The table of the attributes as CSV; an empty cell: not defined."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({k: "" if v == "nan" else v for k, v in plain.items()})
    write_atomic(file, lambda opened: opened.write(text.getvalue().encode()))


def sentence(attribute: Attribute) -> str:
    """("colour", "yellow") -> "a photo of a yellow vehicle."."""
    column, value = (text.replace("_", " ").strip() for text in attribute)
    slot = slot_of(attribute.column) if value else "yes"
    return with_articles(SENTENCES.get(slot, SENTENCES["words"]).format(column=column, value=value))


def text_vectors(args, attributes: tuple[Attribute, ...], dim: int) -> tuple[torch.Tensor, str]:
    """The vectors that the flags ask for; dim: width of the encoder, and of the random vectors.

    Returns:
        [A, D_t] float32 on the CPU, and where they come from: it belongs beside every number, as other
        vectors give other numbers.
    """
    if args.attr_vectors:
        return vectors_of_file(Path(args.attr_vectors), len(attributes))
    if args.clip_pretrained:
        return vectors_of_clip(args.clip_model, args.clip_pretrained, [sentence(a) for a in attributes])
    # their seed is the run's: not in the name, which is part of a recipe
    return orthogonal_vectors(len(attributes), dim, args.seed), "random orthogonal: no text"


def vectors_of_file(file: Path, count: int) -> tuple[torch.Tensor, str]:
    """An array [A, D_t] in a .npy, or the only tensor of a .safetensors."""
    try:
        if file.suffix == ".safetensors":
            (vectors,) = load_file(file).values()
        else:
            vectors = torch.from_numpy(np.load(file, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"--attr_vectors {file}: give a .npy, or a .safetensors of one tensor: {reason}") from error
    vectors = vectors.float()
    if vectors.ndim != 2 or len(vectors) != count or not torch.isfinite(vectors).all():
        raise InputError(
            f"--attr_vectors {file} has the shape {tuple(vectors.shape)}, and {count} attributes need finite numbers "
            f"({count}, D): one row an attribute, in the order that the header of a run prints"
        )
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
