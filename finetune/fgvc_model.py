"""Models of fine-grained classes on disk: written by main_finetune.py, read by its --eval."""

from dataclasses import asdict
from pathlib import Path

import torch

from finetune.encoder import encoder_of
from models_transfg import TransFG, TransFGConfig
from models_vit import VisionTransformer
from util.checkpoint import load_weights, read_checkpoint
from util.pretrained import read_config

KIND = "CGD-MAE TransFG"


def fgvc_config(encoder: VisionTransformer, config: TransFGConfig, classes: list[str], resize: tuple[int, int]) -> dict:
    """What builds the model again, the names of its classes, and (H, W) in px that a picture has before its
    centre is cut out, as plain values."""
    return {
        "kind": KIND, **encoder.settings(), "fgvc": asdict(config), "classes": classes,
        "resize": list(resize),
    }  # fmt: skip


def load_fgvc(file: str | Path, device: torch.device | str = "cpu") -> tuple[TransFG, dict, str]:
    """A model that main_finetune.py trained.

    Returns:
        The model in eval mode, its config (`fgvc_config`), and what was loaded.
    Raises:
        InputError: a damaged file, or weights of another model.
    """
    content = read_checkpoint(file)
    config = read_config(file, content)
    encoder = encoder_of(config)
    model = TransFG(encoder, len(config["classes"]), TransFGConfig(**config["fgvc"]))
    report = load_weights(model, content["model"], file, needed="all")
    return model.to(device).eval(), config, report
