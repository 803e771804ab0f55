"""What the text tokens of VTB start from: one fixed vector an attribute."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from datasets.attr import Attribute
from description.canonical import slot_of, with_articles
from util.errors import InputError

# by what a column holds (description.canonical), else by whether it holds words
SENTENCES = {
    "colour": "a photo of a {value} vehicle.",
    "body": "a photo of a {value}.",
    "make": "a photo of a {value}.",
    "view": "a photo of a vehicle, {value} view.",
    "words": "a photo of a vehicle, {column} {value}.",
    "yes": "a photo of a vehicle, {column}.",
}


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
        InputError: missing, damaged, of another shape, or with numbers that are not finite.
    """
    if not file.is_file():
        raise InputError(f"--attr_vectors {file} does not exist: give a .npy or .safetensors, or drop the flag")
    try:
        if file.suffix == ".safetensors":
            found = list(load_file(file).values())
            if len(found) != 1:
                raise InputError(f"--attr_vectors {file} holds {len(found)} tensors: keep the one that is meant")
            vectors = found[0]
        else:
            vectors = torch.from_numpy(np.load(file, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, EOFError, SafetensorError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"--attr_vectors {file} is no .npy and no .safetensors of numbers: {reason}") from error
    if vectors.ndim != 2 or len(vectors) != count or not vectors.shape[1]:
        raise InputError(
            f"--attr_vectors {file} has the shape {tuple(vectors.shape)}, and {count} attributes need "
            f"({count}, D): one row an attribute, in the order that the header of a run prints"
        )
    if not torch.isfinite(vectors.float()).all():
        raise InputError(f"--attr_vectors {file} holds numbers that are not finite: make it again")
    return vectors.float(), f"{file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


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
