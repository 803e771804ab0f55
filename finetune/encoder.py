"""Models of the downstream tasks: an encoder to start from, its optimiser, and trained models from their files."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from finetune.flags import TASKS
from models_vit import CLIP_STATS, IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, encoder_from, load_encoder
from util.checkpoint import load_weights, read_checkpoint
from util.errors import InputError
from util.files import file_sha256
from util.names import ENCODER_MODELS, ENCODER_SIZES
from util.optim import build_finetune_optimizer, transreid_lr
from util.pretrained import read_config, recognise

PIXEL_STATS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3), "clip": CLIP_STATS}


def build_encoder(args) -> tuple[VisionTransformer, str]:
    """The encoder that --finetune, --model and the flags of its group ask for, and what was loaded;
    `args.weights_sha256` is set to the hash of the file, or to "random".

    Raises:
        InputError: neither a file nor a model is named, the file holds another model, or it cannot be loaded.
    """
    if not args.finetune and not args.model:
        raise InputError(
            "give --finetune FILE (the encoder to start from), or --model vit_base_patch16 to start from random weights"
        )
    width, depth, heads, patch = ENCODER_SIZES[ENCODER_MODELS[args.model]] if args.model else (0, 0, 0, 0)
    shape = {name: getattr(args, name) for name in ("stride", "drop_path", "quick_gelu")}
    if args.finetune:
        encoder = load_encoder(args.finetune, args.img_size, pos_resize=args.pos_resize, **shape)
        found = (encoder.embed_dim, len(encoder.blocks), encoder.patch_size)
        if args.model and found != (width, depth, patch):
            raise InputError(
                f"--finetune {args.finetune} is {found[0]} wide with {found[1]} blocks and {found[2]} px "
                f"patches, --model {args.model} is not: drop --model"
            )
        report = f"{args.finetune}\n{encoder.report}"
        args.weights_sha256 = file_sha256(args.finetune)
    else:
        encoder = VisionTransformer(args.img_size, patch, width, depth, heads, **shape)
        report = f"{args.model} with random weights, seed {args.seed}"
        args.weights_sha256 = "random"
    if args.pixel_stats != "checkpoint":
        encoder.set_pixel_stats(*PIXEL_STATS[args.pixel_stats])
    mean, std = (stat.flatten().tolist() for stat in (encoder.pixel_mean, encoder.pixel_std))
    encoder.grad_checkpoint = args.grad_checkpoint
    encoder.train()
    report += "\n  pixels: mean {:.3g} {:.3g} {:.3g}, std {:.3g} {:.3g} {:.3g}".format(*mean, *std)
    return encoder, report


def build_optimizer(model: nn.Module, depth: int, args) -> torch.optim.Optimizer:
    """The optimiser that the flags ask for; `depth`: blocks of the encoder before a task took some away."""
    factors = {name: getattr(args, name) for name in ("layer_decay", "bias_lr_factor", "head_lr_factor")}
    return build_finetune_optimizer(model, depth, args.opt, args.lr, args.weight_decay, **factors)


def transreid_schedule(args) -> Callable[[float], float]:
    """TransReID's learning rate, constant within an epoch."""
    first, last = args.lr * args.warmup_lr_ratio, args.lr * args.min_lr_ratio
    return lambda epoch: transreid_lr(math.floor(epoch) + 1, args.lr, first, last, args.warmup_epochs, args.epochs)


def task_module(task: str) -> ModuleType:
    """The file of a task: `build`, `evaluate` and `model_from`."""
    return importlib.import_module(f"finetune.{task}")


@dataclass(frozen=True)
class Trained:
    """A model from a file, in eval mode. task: what it was trained for, "" for a plain encoder. config: what builds it
    again, and the names that it has learned. report: what was loaded."""

    task: str
    model: nn.Module
    config: dict
    report: str


def load_model(
    file: str | Path, device: torch.device | str = "cpu", img_size: tuple[int, int] | None = None
) -> Trained:
    """A model that main_finetune.py has trained, or any encoder.

    Args:
        img_size: (H, W) for plain encoders (default: the file's).
    Raises:
        InputError: see `load_encoder`; or another `img_size` than that of a trained model.
    """
    content = read_checkpoint(file)
    config = read_config(file, content)
    if config.get("task") in TASKS:
        own = tuple(config["img_size"])
        if img_size is not None and tuple(img_size) != own:
            raise InputError(f"{file} was trained at {own[0]} x {own[1]} px: leave --input_size out")
        return _trained(file, content, config, device)
    encoder = encoder_from(recognise(content, file), file, img_size).to(device)
    return Trained("", encoder, config, encoder.report)


def load_scored(args, device: torch.device) -> Trained | None:
    """What --eval scores: --resume, a model of the task; None where --finetune names an encoder, which the task builds.

    Raises:
        InputError: a file of another kind.
    """
    file, how = args.resume or args.finetune, TASKS[args.task].encoder_alone
    content = read_checkpoint(file)
    config = read_config(file, content)
    found = config.get("task", "")
    if args.resume and found != args.task:
        other = f"use --finetune {file} ({how})" if how and not found else (
            f"give the model.pth of a run with --task {args.task}"
        )  # fmt: skip
        is_what = f"a {config['kind']}" if found else "no model of main_finetune.py"
        raise InputError(f"{file} is {is_what}: {other}")
    if args.finetune and found:
        raise InputError(f"{file} is a model of main_finetune.py: use --resume {file}")
    if args.finetune and not how:
        raise InputError(
            f"--eval --finetune {file}: an encoder has no answers for --task {args.task} before it is "
            "trained; give --resume the model.pth of a run"
        )
    return _trained(file, content, config, device) if args.resume else None


def _trained(file: str | Path, content: dict, config: dict, device: torch.device | str) -> Trained:
    """With its encoder by the config, and the weights of all of it."""
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mean", "std", "stride",
             "pre_norm", "quick_gelu")  # fmt: skip
    encoder = VisionTransformer(**{name: config[name] for name in names})
    model = task_module(config["task"]).model_from(encoder, config)
    report = load_weights(model, content["model"], file, needed="all")
    return Trained(config["task"], model.to(device).eval(), config, report)
