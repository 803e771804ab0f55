"""What a downstream task is: read a set, build a model on an encoder, train, score, show it; models from files."""

import importlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Sampler

from datasets.samplers import EpochBatches
from engine_finetune import predict
from finetune.flags import TASKS
from models_vit import CLIP_STATS, IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, encoder_from, load_encoder
from util.checkpoint import load_weights, read_checkpoint, weights_sha256
from util.dist import get_rank, get_world_size, is_main_process, print_main, wait_for_main
from util.errors import ENCODER_MODELS, ENCODER_SIZES, InputError
from util.fetch import fetch
from util.files import write_atomic
from util.optim import build_finetune_optimizer, transreid_lr
from util.precision import scoring
from util.pretrained import read_config, recognise

PIXEL_STATS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3), "clip": CLIP_STATS}
ENCODER_SETTINGS = "img_size patch_size embed_dim depth num_heads mean std stride pre_norm quick_gelu".split()


class Task:
    """A task on a set. finetune/reid.py has `Reid`, and so on; `task_to_train` and `task_to_score` call, in this order:

        read(config)                 the set, with `name`, `notes`, and to train `train` and `sha256()`; to score
                                     a model (config: what built it, else None) numbered as that knows it
        describe(encoder)            plain values that `model_from` needs besides the encoder
        model_from(encoder, config)  the model, static; its `base` is the encoder
        prepare()                    what only training needs of the model
        items()                      training images: a Dataset; `order()` says which make up a batch

    Then the loop calls `loss(model or its DDP wrapper, batch)` -> terms, scalars, of which "loss" is descended. At the
    end `evaluate` calls `answers()` on all ranks: what the model says of all test images; on rank 0 `score(answers)` ->
    numbers, lines to print, `path<tab>reason` of unreadable ones; `report(answers, numbers, folder, facts)` -> pages.
    """

    kind = ""  # of its models, in their files
    shown: tuple[str, ...] = ("accuracy",)  # terms that a log line shows
    schedule = staticmethod(transreid_lr)  # (epoch, peak, first rate, last rate, epochs of warm-up, epochs)
    alone: dict | None = None  # config to score an encoder before any training; None: the task cannot

    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        self.data = self.model = self.batches = self.dataset = self.optimizer = None
        self.config = {}

    def order(self) -> Sampler:
        args, ranks = self.args, (get_rank(), get_world_size())
        return EpochBatches(len(self.data.train), args.batch_size, *ranks, args.seed)

    def prepare(self) -> None:
        pass

    def facts(self) -> dict:
        """What a continued run must share."""
        facts = {"images": len(self.data.train), "images_sha": self.data.sha256()}
        return facts | {name: self.config.get(name) for name in ("num_classes", "text_vectors")}

    def lr(self, epoch: float, peak: float = 1.0) -> float:
        """The learning rate at a fractional epoch; peak: factor of the highest, not of first and last."""
        args = self.args
        first, last = args.lr * args.warmup_lr_ratio, args.lr * args.min_lr_ratio
        return self.schedule(epoch, peak * args.lr, first, last, args.warmup_epochs, args.epochs)

    def data_lines(self) -> list[str]:
        return [f"data: {self.args.data_path} as {self.data.name}", *(f"  {note}" for note in self.data.notes)]

    def model_line(self) -> str:
        """The settings to print beside a result: numbers made with different ones must not be compared."""
        return self.kind

    @property
    def loading(self) -> dict[str, int]:
        return {"batch_size": self.args.batch_size, "num_workers": self.args.num_workers}

    def predict(self, encode, images):
        return predict(encode, images, self.device, "test images", **self.loading)

    def evaluate(self) -> dict:
        """All test images in float32 without TF32: numbers on rank 0, printed beside their protocol, and the page.
        Afterwards all ranks wait for rank 0."""
        try:
            with scoring(self.model):
                found = self.answers()
                return self.tell(found) if is_main_process() else {}
        finally:
            wait_for_main()

    def tell(self, found) -> dict:
        """Score the answers on rank 0: print, list unreadable images, write the page."""
        args, folder = self.args, Path(self.args.output_dir)
        numbers, lines, unreadable = self.score(found)
        if unreadable:
            file, text = folder / "unreadable_test_images.txt", "".join(f"{line}\n" for line in unreadable)
            write_atomic(file, lambda opened: opened.write(text.encode(errors="surrogateescape")))
            lines.append(f"{len(unreadable)} test images cannot be read: {file} lists them")
        print("\n".join(lines), flush=True)
        weights = (args.resume or args.finetune) if args.eval else folder / "model.pth"
        facts = {"set": args.data_path, "weights": weights, "seed": args.seed}
        if args.before:  # the first three numbers that both have
            earlier = json.loads(Path(args.before).read_text())
            both = [name for name, value in numbers.items() if isinstance(value, float) and name in earlier][:3]
            told = (f"{name} {100 * earlier[name]:.1f} before, {100 * numbers[name]:.1f} after" for name in both)
            facts["before and after"] = ", ".join(told)
            print(facts["before and after"])
        for file in self.report(found, numbers, folder, facts) if args.report else ():
            print(f"report: {file}")
        return numbers


def task_class(name: str) -> type[Task]:
    """`Reid` of finetune/reid.py, and so on."""
    return getattr(importlib.import_module(f"{__package__}.{name}"), name.capitalize())


def build_encoder(args) -> tuple[VisionTransformer, str]:
    """The encoder that --finetune or --model and the flags of its group ask for, and what was loaded;
    `args.weights_sha256` is set to the identity of its tensors, or to "random"."""
    shape = {name: getattr(args, name) for name in ("stride", "drop_path", "quick_gelu")}
    if args.finetune:
        args.finetune = str(fetch(args.finetune))
        encoder = load_encoder(args.finetune, args.img_size, pos_resize=args.pos_resize, fc_norm=False, **shape)
        report, args.weights_sha256 = f"{args.finetune}\n{encoder.report}", weights_sha256(args.finetune)
    else:
        width, depth, heads, patch = ENCODER_SIZES[ENCODER_MODELS[args.model]]
        encoder = VisionTransformer(args.img_size, patch, width, depth, heads, **shape)
        report, args.weights_sha256 = f"{args.model} with random weights, seed {args.seed}", "random"
    if args.pixel_stats != "checkpoint":
        encoder.set_pixel_stats(*PIXEL_STATS[args.pixel_stats])
    encoder.grad_checkpoint = args.grad_checkpoint
    stats = (*encoder.pixel_mean.flatten(), *encoder.pixel_std.flatten())
    return encoder.train(), report + "\n  pixels: mean {:.3g} {:.3g} {:.3g}, std {:.3g} {:.3g} {:.3g}".format(*stats)


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
    epoch = f"  an epoch: {task.batches.batches_per_epoch} updates of {args.global_batch} images"
    print_main(*task.data_lines(), epoch, f"encoder: {report}", task.model_line())
    return task


def task_to_score(args, device: torch.device) -> Task:
    """What --eval scores: --resume, a model of the task, or --finetune, an encoder as it is."""
    task = task_class(args.task)(args, device)
    if args.resume:
        found = load_model(args.resume, device)
        if found.task != args.task:
            what = f"a {found.config['kind']}" if found.task else "no model of main_finetune.py"
            raise InputError(f"{args.resume} is {what}: give the model.pth of a run with --task {args.task}")
        task.config, task.data, task.model, report = found.config, task.read(found.config), found.model, found.report
    elif task.alone is None:
        raise InputError(f"--eval --finetune: an encoder has no answers for --task {args.task} before it is trained")
    else:
        task.config, task.data = task.alone, task.read(task.alone)
        encoder, report = build_encoder(args)
        if read_config(args.finetune, read_checkpoint(args.finetune)).get("task"):
            raise InputError(f"{args.finetune} is a model of main_finetune.py: use --resume {args.finetune}")
        task.model = task.model_from(encoder, task.config).to(device)
    print_main(*task.data_lines(), f"model {args.resume or args.finetune}:\n{report}", task.model_line())
    return task


class Trained(NamedTuple):
    """A model from a file, in eval mode, and what was loaded."""

    task: str  # what it was trained for, "" for a plain encoder
    model: nn.Module
    config: dict  # what builds it again, and the names that it has learned
    report: str


def load_model(file: str | Path, device: torch.device | str = "cpu", img_size=None) -> Trained:
    """A model that main_finetune.py has trained, or any encoder; img_size: its (H, W), default the file's."""
    content = read_checkpoint(file)
    config = read_config(file, content)
    if config.get("task") not in TASKS:
        encoder = encoder_from(recognise(content, file), file, img_size).to(device)
        return Trained("", encoder, config, encoder.report)
    own = tuple(config["img_size"])
    if img_size is not None and tuple(img_size) != own:
        raise InputError(f"{file} was trained at {own[0]} x {own[1]} px: leave --input_size out")
    encoder = VisionTransformer(**{name: config[name] for name in ENCODER_SETTINGS})
    model = task_class(config["task"]).model_from(encoder, config)
    report = load_weights(model, content["model"], file, needed="all")
    return Trained(config["task"], model.to(device).eval(), config, report)
