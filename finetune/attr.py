"""Attribute recognition: VTB, from flags to a task that can be trained and scored."""

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
from datasets.samplers import epoch_batches
from datasets.transforms import PadCropErase
from description.canonical import slot_of, with_articles
from engine_finetune import Predictions, Task, evaluation, predict, write_unreadable
from finetune.encoder import Trained, build_encoder, build_optimizer, transreid_schedule
from metrics.attr import attribute_metrics, attribute_rows, constant_answer, group_top1
from models_vit import VisionTransformer
from models_vtb import VTB, attribute_loss
from reports.attr import AttributeTest, write_attr_report
from util.dist import gather_rows, print_main
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
    def of(cls, data: AttributeData, vectors_from: str) -> "AttributeStats":
        constant = constant_answer(data.train.labels)
        return cls(data.name, data.attributes, vectors_from, data.train.rates(), constant)

    @classmethod
    def from_config(cls, config: dict) -> "AttributeStats":
        return cls(
            config["set"], tuple(Attribute(*pair) for pair in config["attributes"]), config["vectors_from"],
            np.array(config["rates"]), np.array(config["constant"], dtype=bool),
        )  # fmt: skip

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


def build(args, device: torch.device, amp_dtype) -> Task:
    """Data, model, optimiser and loss of a training run.

    Raises:
        InputError: see `read_attribute_set`, `text_vectors`, `build_encoder`; or a batch of one image.
    """
    if args.global_batch < 2:
        raise InputError("--batch_size 1: the batch norm of the logits needs 2 images at least")
    data = read_attribute_set(
        args.data_path, args.attr_format,
        binary=args.attr_columns, categorical=args.attr_categories, test_split=args.attr_split,
    )  # fmt: skip
    batches = epoch_batches(len(data.train), args.batch_size, args.seed)
    torch.manual_seed(args.seed)
    encoder, report = build_encoder(args)
    vectors, source = text_vectors(args, data.attributes, encoder.embed_dim)
    model = VTB(encoder, vectors).to(device)
    stats = AttributeStats.of(data, source)
    rates = torch.tensor(stats.rates, dtype=torch.float32, device=device)
    return Task(
        model,
        build_optimizer(model, len(encoder.blocks), args),
        AttributeTrainImages(data.train, PadCropErase(args.img_size, erase=0.0), args.seed),
        batches,
        loss=lambda wrapped, batch: attr_loss(wrapped, batch, rates, args.attr_threshold),
        shown=("accuracy",),
        lr=transreid_schedule(args),
        evaluate=lambda is_over: score(model, stats, data, args, amp_dtype, is_over),
        config=attr_config(encoder, stats, vectors.shape[1]),
        facts={
            "images": len(data.train), "images_sha": data.sha256(), "num_classes": len(data.attributes),
            "text_vectors": source,
        },
        header=header_lines(args, data, model, stats, report),
    )  # fmt: skip


def attr_config(encoder: VisionTransformer, stats: AttributeStats, text_dim: int) -> dict:
    """What builds the model again, and what it has learned, as plain values."""
    return {
        "kind": "CGD-MAE VTB", "task": "attr", **encoder.settings(), "text_dim": text_dim, "set": stats.set,
        "attributes": [list(attribute) for attribute in stats.attributes], "vectors_from": stats.vectors_from,
        "rates": stats.rates.tolist(), "constant": stats.constant.tolist(),
    }  # fmt: skip


def model_from(encoder: VisionTransformer, config: dict) -> VTB:
    """The model that `attr_config` describes; its text vectors are among its weights."""
    return VTB(encoder, torch.zeros(len(config["attributes"]), config["text_dim"]))


def header_lines(args, data: AttributeData, model: VTB, stats: AttributeStats, report: str) -> list[str]:
    """What is printed before the start."""
    encoder = model.base
    lines = [
        f"data: {args.data_path} as {data.name}",
        *(f"  {note}" for note in data.notes),
        f"encoder: {report}",
        f"VTB: {model.num_attributes} attributes, {encoder.num_patches} patches ({encoder.grid_size[0]} x "
        f"{encoder.grid_size[1]}) at {encoder.img_size[0]} x {encoder.img_size[1]} px, text vectors of "
        f"{model.attr_vectors.shape[1]} numbers: {stats.vectors_from}",
    ]
    if not args.attr_vectors and not args.clip_pretrained:
        lines.append(
            "  THE TEXT VECTORS ARE RANDOM: no text is used; --clip_pretrained openai takes those of the "
            "teacher, --attr_vectors FILE your own"
        )
    return lines


def attr_loss(wrapped: nn.Module, batch: dict, rates: torch.Tensor, threshold: float) -> dict[str, torch.Tensor]:
    """`attribute_loss` of the whole batch of all ranks, and the accuracy as in scoring."""
    attr_logits = wrapped(batch["imgs"])
    labels = gather_rows(batch["labels"])
    true, said = labels == 1, (attr_logits.sigmoid() > threshold) & (labels >= 0)
    both, either = (true & said).sum(dim=1), (true | said).sum(dim=1)
    return {"loss": attribute_loss(attr_logits, labels, rates), "accuracy": (both / either.clamp_min(1)).mean()}


def evaluate(found: Trained, args, device: torch.device, amp_dtype) -> dict:
    """Score a trained model; no teacher is needed, its vectors are in the file.

    Raises:
        InputError: a set whose attributes it does not know.
    """
    stats = AttributeStats.from_config(found.config)
    data = read_attribute_set(
        args.data_path, args.attr_format, test_split=args.attr_split, known=stats.attributes, need_train=False
    )
    print_main(f"data: {args.data_path} as {data.name}", *(f"  {note}" for note in data.notes))
    print_main(f"model {args.resume}:\n{found.report}\n  text vectors: {stats.vectors_from}")
    return score(found.model, stats, data, args, amp_dtype)


def score(model: VTB, stats: AttributeStats, data: AttributeData, args, amp_dtype, is_over: bool = True) -> dict:
    """The test images: numbers printed beside those of a constant answer; the table of the attributes and the
    report once training `is_over`."""
    with evaluation(model):
        found = predict(
            lambda imgs, _: model(imgs).sigmoid(),
            WholeImages(data.test.paths, np.arange(len(data.test)), model.base.img_size),
            model.base.pos_embed.device,
            "test",
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            amp_dtype=amp_dtype,
        )
        return {} if found is None else scored(found, stats, data, args, is_over)


def scored(found: Predictions, stats: AttributeStats, data: AttributeData, args, is_over: bool) -> dict:
    """On rank 0: numbers, files and page of what was predicted."""
    folder, threshold = Path(args.output_dir), args.attr_threshold
    probs, labels = found.values.numpy(), data.test.labels[found.rows]
    write_unreadable(found.unreadable, folder)
    metrics = all_metrics(probs, labels, stats, threshold)
    rule = protocol(data.name, len(stats.attributes), threshold, len(found.unreadable))
    print(f"{rule}\n  text vectors: {stats.vectors_from}\n{result_lines(metrics)}", flush=True)
    flat = metrics | {"images": len(probs), "protocol": rule, "text_vectors": stats.vectors_from}
    if is_over:
        rows = attribute_rows(probs, labels, stats.names, stats.rates, threshold)
        write_rows(folder / "attributes.csv", rows)
        if args.report:
            weights = args.resume if args.eval else folder / "model.pth"
            facts = {"set": args.data_path, "weights": weights, "seed": args.seed}
            facts |= {"text vectors": stats.vectors_from}
            file = folder / "report.html"
            test = AttributeTest(stats, data.test.paths, found.rows, probs, labels, threshold)
            write_attr_report(file, facts, flat, rows, test)
            print(f"report: {file}")
    return flat


def protocol(name: str, attributes: int, threshold: float, unreadable: int) -> str:
    """One line to print beside the numbers."""
    less = f"/{unreadable}-unreadable-left-out" if unreadable else ""
    return f"{name}{less} ({attributes} attributes, true above {threshold:g}, F1 averaged over images)"


def all_metrics(probs: np.ndarray, labels: np.ndarray, stats: AttributeStats, threshold: float) -> dict[str, float]:
    """`attribute_metrics`, of a constant answer as `constant_...`, and of each column of words top-1; what is
    not defined is left out."""
    constant = np.broadcast_to(stats.constant, labels.shape)
    metrics = attribute_metrics(probs > threshold, labels)
    metrics |= {f"top1_{name}": group_top1(probs, labels, places) for name, places in stats.groups.items()}
    beside = attribute_metrics(constant, labels)
    commonest = np.broadcast_to(stats.rates, labels.shape)
    beside |= {f"top1_{name}": group_top1(commonest, labels, p) for name, p in stats.groups.items()}
    metrics |= {f"constant_{name}": value for name, value in beside.items()}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def result_lines(metrics: dict[str, float]) -> str:
    """The numbers in percent, a constant's in brackets."""
    names = [name for name in metrics if f"constant_{name}" in metrics]
    told = [f"{name} {100 * metrics[name]:.2f} [{100 * metrics[f'constant_{name}']:.2f}]" for name in names]
    return f"  {'  '.join(told)}  [constant answer]"


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
    """The vectors that the flags ask for.

    Args:
        args: reads attr_vectors, clip_pretrained, clip_model, seed.
        dim: width of the encoder, and of the random vectors.
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
    """An array [A, D_t] in a .npy, or the only tensor of a .safetensors.

    Raises:
        InputError: unreadable, of another shape, or with numbers that are not finite.
    """
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

    clip, tokenizer, identity = load_clip(clip_model, clip_pretrained)
    check_tokens(tokenizer, sentences, clip.context_length)
    source = f"text tower of {identity.model}, weights {identity.weights_sha256[:16]}"
    return encode_texts(clip, tokenizer, sentences), source


def orthogonal_vectors(count: int, dim: int, seed: int) -> torch.Tensor:
    """[A, max(A, dim)] float32: unit rows at right angles, which say which attribute is which and no more."""
    normal = np.random.default_rng(seed).standard_normal((max(count, dim), count))
    return torch.from_numpy(np.linalg.qr(normal)[0].T.astype(np.float32).copy())
