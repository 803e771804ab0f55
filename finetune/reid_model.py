"""Re-identification models on disk: written by main_finetune.py, read by its --eval and by tools.search."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from datasets.reid import UNKNOWN, ReidData, ReidImages
from finetune.encoder import encoder_of
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import load_weights, read_checkpoint
from util.errors import InputError
from util.pretrained import read_config

KIND = "CGD-MAE TransReID"


def reid_config(encoder: VisionTransformer, data: ReidData, config: TransReIDConfig) -> dict:
    """What builds the model again, and whose cameras and views it knows, as plain values."""
    return {
        "kind": KIND, **encoder.settings(), "num_classes": data.classes, "reid": asdict(config),
        "set": data.name, "camera_names": data.camera_names, "view_names": data.view_names,
    }  # fmt: skip


def in_the_models_numbers(data: ReidData, config: dict, file: str | Path) -> ReidData:
    """A set with cameras and views numbered as a model with side information has learned them.

    Raises:
        InputError: the model has learned those of another set, or not all of these.
    """
    reid = config.get("reid", {})
    if not reid.get("cameras") and not reid.get("views"):
        return data
    if data.name != config["set"]:
        raise InputError(
            f"{file} was trained with side information, the cameras or views of {config['set']}, and means "
            f"nothing on {data.name}: train without --sie_camera and --sie_view to search across sets"
        )
    maps = {}
    for ids, column, what in (("camids", "camera_names", "cameras"), ("viewids", "view_names", "views")):
        here, there = getattr(data, column), config[column]
        if not reid[what] or not here or here == there:
            continue
        missing = [name for name in here if name not in there]
        if missing:
            raise InputError(
                f"{file} knows the {what} {', '.join(there)[:80]}, not {missing[0]}: it was trained with "
                "side information on another table"
            )
        maps[ids] = np.array([there.index(name) for name in here] + [UNKNOWN])  # the last is for -1

    def renumbered(images: ReidImages | None) -> ReidImages | None:
        new = {ids: numbers[getattr(images, ids)] for ids, numbers in maps.items()} if images else {}
        return replace(images, **new) if images else None

    tests = {name: tuple(renumbered(part) for part in pair) for name, pair in data.tests.items()}
    return replace(data, train=renumbered(data.train), tests=tests)


def load_reid(
    file: str | Path, device: torch.device | str = "cpu", *, img_size: tuple[int, int] | None = None
) -> tuple[TransReID, dict, str]:
    """A model to search with: one that main_finetune.py trained, or any encoder, whose class token is the
    feature then.

    Args:
        img_size: (H, W) for plain encoders (default: the file's).
    Returns:
        The model in eval mode, its config (`reid_config`; empty for a plain encoder), and what was loaded.
    Raises:
        InputError: see `load_encoder`; or another `img_size` than that of a trained model.
    """
    content = read_checkpoint(file)
    config = read_config(file, content)
    if config.get("kind") != KIND:
        encoder = load_encoder(file, img_size, device)
        return TransReID(encoder, 1, TransReIDConfig()).to(device).eval(), {}, encoder.report
    own = tuple(config["img_size"])
    if img_size is not None and tuple(img_size) != own:
        raise InputError(f"{file} was trained at {own[0]} x {own[1]} px: leave --input_size out")
    encoder = encoder_of(config)
    model = TransReID(encoder, config["num_classes"], TransReIDConfig(**config["reid"]))
    report = load_weights(model, content["model"], file, needed="all")
    return model.to(device).eval(), config, report
