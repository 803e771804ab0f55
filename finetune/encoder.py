"""An encoder to start from, a task with its model, and trained models from their files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from finetune.flags import TASKS
from finetune.task import Task, task_class
from models_vit import CLIP_STATS, IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, encoder_from, load_encoder
from util.checkpoint import load_weights, read_checkpoint, weights_sha256
from util.dist import print_main
from util.errors import InputError
from util.fetch import fetch
from util.names import ENCODER_MODELS, ENCODER_SIZES
from util.optim import build_finetune_optimizer
from util.pretrained import read_config, recognise

PIXEL_STATS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3), "clip": CLIP_STATS}
ENCODER_SETTINGS = "img_size patch_size embed_dim depth num_heads mean std stride pre_norm quick_gelu".split()


def build_encoder(args) -> tuple[VisionTransformer, str]:
    """The encoder that --finetune, --model and the flags of its group ask for, and what was loaded;
    `args.weights_sha256` is set to the identity of its tensors, or to "random"."""
    width, depth, heads, patch = ENCODER_SIZES[ENCODER_MODELS[args.model]] if args.model else (0, 0, 0, 0)
    shape = {name: getattr(args, name) for name in ("stride", "drop_path", "quick_gelu")}
    if args.finetune:
        args.finetune = str(fetch(args.finetune))
        encoder = load_encoder(args.finetune, args.img_size, pos_resize=args.pos_resize, fc_norm=False, **shape)
        found = (encoder.embed_dim, len(encoder.blocks), encoder.patch_size)
        if args.model and found != (width, depth, patch):
            raise InputError(
                f"--finetune {args.finetune} is {found[0]} wide with {found[1]} blocks and {found[2]} px "
                f"patches, --model {args.model} is not: drop --model"
            )
        report = f"{args.finetune}\n{encoder.report}"
        args.weights_sha256 = weights_sha256(args.finetune)
    else:
        encoder = VisionTransformer(args.img_size, patch, width, depth, heads, **shape)
        report = f"{args.model} with random weights, seed {args.seed}"
        args.weights_sha256 = "random"
    if args.pixel_stats != "checkpoint":
        encoder.set_pixel_stats(*PIXEL_STATS[args.pixel_stats])
    mean, std = (stat.flatten().tolist() for stat in (encoder.pixel_mean, encoder.pixel_std))
    encoder.grad_checkpoint = args.grad_checkpoint
    report += "\n  pixels: mean {:.3g} {:.3g} {:.3g}, std {:.3g} {:.3g} {:.3g}".format(*mean, *std)
    return encoder.train(), report


def task_to_train(args, device: torch.device) -> Task:
    """The task of the flags with a new model. The set comes first: what is wrong with it shows before weights are
    fetched."""
    task = task_class(args.task)(args, device)
    task.data = task.read(None)
    task.batches = task.order()
    torch.manual_seed(args.seed)
    encoder, report = build_encoder(args)
    depth = len(encoder.blocks)
    task.config = {"kind": task.kind, "task": args.task, **encoder.settings(), **task.describe(encoder)}
    task.model = task.model_from(encoder, task.config)
    task.prepare()
    task.model.to(device)
    factors = {name: getattr(args, name) for name in ("layer_decay", "bias_lr_factor", "head_lr_factor")}
    task.optimizer = build_finetune_optimizer(task.model, depth, args.opt, args.lr, args.weight_decay, **factors)
    task.dataset = task.items()
    task.header = [*task.data_lines(), task.epoch_line(), f"encoder: {report}", task.model_line()]
    return task


def task_to_score(args, device: torch.device) -> Task:
    """What --eval scores: --resume, a model of the task, or --finetune, an encoder as it is."""
    file, task, how = args.resume or args.finetune, task_class(args.task)(args, device), TASKS[args.task].encoder_alone
    if args.finetune and not how:
        raise InputError(
            f"--eval --finetune {file}: an encoder has no answers for --task {args.task} before it is "
            "trained; give --resume the model.pth of a run"
        )
    content = read_checkpoint(file) if args.resume else {}
    config = read_config(file, content) if args.resume else {}
    found = config.get("task", "")
    if args.resume and found != args.task:
        is_what = f"a {config['kind']}" if found else "no model of main_finetune.py"
        encoder = f"use --finetune {file} ({how})" if how and not found else ""
        raise InputError(f"{file} is {is_what}: {encoder or f'give the model.pth of a run with --task {args.task}'}")
    task.config = config or task.alone
    task.data = task.read(task.config)
    if args.resume:
        trained = _trained(file, content, config, device)
        task.model, report = trained.model, trained.report
    else:
        file = fetch(file)
        if read_config(file, read_checkpoint(file)).get("task"):
            raise InputError(f"{file} is a model of main_finetune.py: use --resume {file}")
        encoder, report = build_encoder(args)
        task.model = task.model_from(encoder, task.config).to(device)
    print_main(*task.data_lines(), f"model {file}:\n{report}", task.model_line())
    return task


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
    """A model that main_finetune.py has trained, or any encoder; img_size: (H, W) for plain encoders (default: the
    file's)."""
    content = read_checkpoint(file)
    config = read_config(file, content)
    if config.get("task") not in TASKS:
        encoder = encoder_from(recognise(content, file), file, img_size).to(device)
        return Trained("", encoder, config, encoder.report)
    own = tuple(config["img_size"])
    if img_size is not None and tuple(img_size) != own:
        raise InputError(f"{file} was trained at {own[0]} x {own[1]} px: leave --input_size out")
    return _trained(file, content, config, device)


def _trained(file: str | Path, content: dict, config: dict, device: torch.device | str) -> Trained:
    """With its encoder by the config, and the weights of all of it."""
    encoder = VisionTransformer(**{name: config[name] for name in ENCODER_SETTINGS})
    model = task_class(config["task"]).model_from(encoder, config)
    report = load_weights(model, content["model"], file, needed="all")
    return Trained(config["task"], model.to(device).eval(), config, report)
