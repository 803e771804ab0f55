"""Attribute models on disk: written by main_finetune.py, read by its --eval."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.attr import Attribute, AttributeData
from finetune.encoder import encoder_of
from metrics.attr import constant_answer
from models_vit import VisionTransformer
from models_vtb import VTB
from util.checkpoint import load_weights, read_checkpoint
from util.pretrained import read_config

KIND = "CGD-MAE VTB"


@dataclass(frozen=True)
class Known:
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
    def of(cls, data: AttributeData, vectors_from: str) -> "Known":
        constant = constant_answer(data.train.labels)
        return cls(data.name, data.attributes, vectors_from, data.train.rates(), constant)

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


def attr_config(encoder: VisionTransformer, known: Known, text_dim: int) -> dict:
    """What builds the model again, and what it has learned, as plain values."""
    return {
        "kind": KIND, **encoder.settings(), "depth": len(encoder.blocks), "text_dim": text_dim,
        "set": known.set, "attributes": [list(attribute) for attribute in known.attributes],
        "vectors_from": known.vectors_from, "rates": known.rates.tolist(),
        "constant": known.constant.tolist(),
    }  # fmt: skip


def load_vtb(file: str | Path, device: torch.device | str = "cpu") -> tuple[VTB, Known, str]:
    """A model that main_finetune.py trained for attributes, in eval mode, with its text vectors.

    Returns:
        The model, what it knows, and a table of what was loaded.
    Raises:
        InputError: unreadable, or not all of a VTB's tensors.
    """
    content = read_checkpoint(file)
    config = read_config(file, content)
    attributes = tuple(Attribute(*pair) for pair in config["attributes"])
    model = VTB(encoder_of(config), torch.zeros(len(attributes), config["text_dim"]))
    report = load_weights(model, content["model"], file, needed="all")
    known = Known(
        config["set"], attributes, config["vectors_from"],
        np.array(config["rates"]), np.array(config["constant"], dtype=bool),
    )  # fmt: skip
    return model.to(device).eval(), known, report
