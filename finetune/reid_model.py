"""Re-identification models on disk: written by main_finetune.py, read by its --eval and by tools.search."""

from dataclasses import asdict
from pathlib import Path

import torch

from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import load_weights, read_checkpoint
from util.pretrained import read_config

KIND = "CGD-MAE TransReID"


def reid_config(encoder: VisionTransformer, num_classes: int, config: TransReIDConfig) -> dict:
    """What builds the model again, as plain values."""
    return {"kind": KIND, **encoder.settings(), "num_classes": num_classes, "reid": asdict(config)}


def load_reid(
    file: str | Path,
    device: torch.device | str = "cpu",
    *,
    img_size: tuple[int, int] | None = None,
    fused_attn: bool = True,
) -> tuple[TransReID, str]:
    """A model to search with: one that main_finetune.py trained, or any encoder, whose class token is the
    feature then.

    Args:
        img_size: (H, W) for plain encoders (default: the file's); a trained model keeps its own.
    Returns:
        The model in eval mode, and what was loaded.
    Raises:
        InputError: see `load_encoder`; or another `img_size` than the trained model's.
    """
    content = read_checkpoint(file)
    config = content.get("config") or read_config(file)
    if config.get("kind") != KIND:
        encoder, report = load_encoder(file, img_size, device, fused_attn)
        return TransReID(encoder, 1, TransReIDConfig()).to(device).eval(), report
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mean", "std", "stride",
             "pre_norm", "quick_gelu")  # fmt: skip
    encoder = VisionTransformer(**{name: config[name] for name in names}, fused_attn=fused_attn)
    model = TransReID(encoder, config["num_classes"], TransReIDConfig(**config["reid"]))
    report = load_weights(model, content["model"], file, needed="all")
    return model.to(device).eval(), report
