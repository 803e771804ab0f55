"""The flags of fine-tuning: recipes, each task's own flags, and what contradicts what. Free of torch.

The default of a flag stands here once. argparse gets None, so that what the user has said can be told from what nobody
has, and `check_args` fills in the rest.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from util.cli import check_numbers, parse_input_size
from util.errors import InputError
from util.names import ENCODER_MODELS, REID_FORMATS

BY_RECIPE = object()  # the default of a common flag that each task's recipe sets
PIXEL_STATS = ("checkpoint", "imagenet", "half", "clip")
SEG_MODES = ("slide", "whole")
# what shapes an encoder: a trained model has its own
ENCODER_FLAGS = ("model", "input_size", "stride", "drop_path", "pixel_stats", "pos_resize", "quick_gelu")


@dataclass(frozen=True)
class Flag:
    """default: what `check_args` fills in. help: without the default, where its value says it. how: of argparse."""

    name: str
    default: object
    help: str
    how: dict


def flag(name: str, default: object, help: str, **how) -> Flag:
    """A flag; its type and action follow from the default, unless that is None."""
    if default is False:
        how["action"] = "store_true"
    elif default is True:
        how["action"] = argparse.BooleanOptionalAction
    elif isinstance(default, int | float):
        how["type"] = type(default)
    return Flag(name, default, help, how)


@dataclass(frozen=True)
class TaskFlags:
    """What the command line knows of a task.

    title: of its group in --help. recipe: of the common flags. default_lr: learning rate at the recipe's batch.
    flags: its own. check: (args, names that the user has said) -> InputError on a contradiction.
    fixed: its own flags that must not change on --resume. of_the_model: those that --eval refuses, since a trained
    model has its own. encoder_alone: how --eval scores an encoder that was not trained for the task ("": it cannot).
    """

    title: str
    recipe: dict
    default_lr: Callable[[argparse.Namespace], float]
    flags: list[Flag] = field(default_factory=list)
    check: Callable[[argparse.Namespace, set[str]], None] = lambda args, said: None
    fixed: tuple[str, ...] = ()
    of_the_model: tuple[str, ...] = ()
    encoder_alone: str = ""


# fmt: off
COMMON = {
    "encoder": [
        flag("finetune", "",
            "weights of MAE, CGD-MAE, VehicleMAE, timm, Hugging Face, DINO, MoCo v3, CLIP, TransReID: a file, a name "
            "of `python -m tools.checkpoint list`, or an address (default none)"),
        flag("model", None, f"one of {', '.join(ENCODER_MODELS)}, to start from random weights (default: the file's)",
            choices=list(ENCODER_MODELS), metavar="NAME"),
        flag("input_size", BY_RECIPE, "pixels: one side, or H,W"),
        flag("stride", None, "px from patch to patch; 12: they overlap (default: the patch)", type=int),
        flag("drop_path", BY_RECIPE, "chance to skip the last block, growing linearly from 0", type=float),
        flag("pixel_stats", "checkpoint",
            "mean and std of pixels: the file's, ImageNet's, 0.5 as in TransReID, CLIP's (default checkpoint; where it "
            "says nothing CLIP's for CLIP, ImageNet's for others)", choices=PIXEL_STATS),
        flag("pos_resize", "bicubic", "how the position table is resized", choices=("bicubic", "bilinear")),
        flag("quick_gelu", False, "OpenAI's CLIP was trained with it"),
    ],
    "optimisation": [
        flag("batch_size", BY_RECIPE, "images per process", type=int),
        flag("epochs", BY_RECIPE, "length of the schedule in epochs", type=int),
        flag("warmup_epochs", BY_RECIPE, "epochs of linear warm-up", type=float),
        flag("opt", BY_RECIPE, "optimiser; momentum of sgd 0.9", choices=("sgd", "adamw")),
        flag("lr", None,
            "learning rate (default: the recipe's times all ranks' batch / the recipe's; docs/FINETUNE.md)",
            type=float),
        flag("min_lr_ratio", BY_RECIPE, "last learning rate / --lr", type=float),
        flag("warmup_lr_ratio", BY_RECIPE, "first learning rate / --lr", type=float),
        flag("bias_lr_factor", BY_RECIPE, "learning rate of biases / --lr", type=float),
        flag("head_lr_factor", BY_RECIPE, "learning rate of what is not the encoder's / --lr", type=float),
        flag("layer_decay", 1.0, "learning rate of a layer / the next one's"),
        flag("weight_decay", BY_RECIPE, "weight decay", type=float),
        flag("clip_grad", BY_RECIPE, "largest gradient norm, 0 for none", type=float),
        flag("smoothing", BY_RECIPE, "label smoothing", type=float),
    ],
    "data": [
        flag("data_path", None, "folder of the set, or a table; docs/FINETUNE.md has the layouts", required=True),
        flag("max_bad_ratio", 0.01, "stop above this fraction of unreadable training images"),
    ],
    "evaluation": [
        flag("eval", False, "score --resume FILE, or the encoder --finetune"),
        flag("eval_every", 0, "epochs between evaluations, 0: after the last only; they choose nothing"),
        flag("report", False, "write report.html: numbers, curves and pictures"),
    ],
}


def check_reid(args, said: set[str]) -> None:
    check_numbers(args, not_negative="id_weight triplet_weight center_weight sie_weight protocol_seed")
    if args.id_weight == args.triplet_weight == 0:
        raise InputError("--id_weight 0 and --triplet_weight 0 leave nothing to learn: set one of them")
    if not 0 <= args.erase <= 1 or not 0 <= args.rerank_lambda <= 1:
        raise InputError("--erase and --rerank_lambda are shares: give numbers from 0 to 1")
    if args.num_instances < 2 or args.rerank_k1 < 1 or args.rerank_k2 < 1:
        raise InputError("--num_instances must be at least 2, --rerank_k1 and --rerank_k2 at least 1")


REID = TaskFlags(
    title="re-identification",
    recipe={  # TransReID's
        "input_size": "256", "drop_path": 0.1, "batch_size": 64, "epochs": 120, "warmup_epochs": 5.0,
        "opt": "sgd", "min_lr_ratio": 0.002, "warmup_lr_ratio": 0.01, "bias_lr_factor": 2.0,
        "head_lr_factor": 1.0, "weight_decay": 1e-4, "clip_grad": 0.0, "smoothing": 0.0,
    },
    default_lr=lambda args: 5e-4 if args.opt == "adamw" else 0.01 if args.jpm else 0.008,
    flags=[
        flag("format", "auto", "layout of --data_path (default auto: by the files that are there)",
            choices=REID_FORMATS),
        flag("num_instances", 4, "K, images of a vehicle in a batch"),
        flag("jpm", False, "jigsaw patch module: four local branches"),
        flag("jpm_shift", 8, "patches are rolled by this less one"),
        flag("sie_camera", False, "side information: camera embedding"),
        flag("sie_view", False, "side information: view embedding"),
        flag("sie_weight", 3.0, "lambda of the embedding"),
        flag("id_weight", 1.0, "weight of the identity loss"),
        flag("triplet_weight", 1.0, "weight of the triplet loss"),
        flag("center_weight", 0.0,
            "weight of the centre loss of the global feature; Luo et al. take 5e-4 (default 0: off)"),
        flag("erase", 0.5, "chance that a rectangle is erased"),
        flag("tests", None, "which tests of the set, for example 800 1600 2400 (default: all)",
            nargs="+", metavar="NAME"),
        flag("keep_same_camera", False, "score the variant that keeps same-camera matches; under another name"),
        flag("protocol_seed", 0, "seed of VehicleID's ten draws"),
        flag("rerank", False, "also score after k-reciprocal re-ranking"),
        flag("rerank_k1", 20, "neighbours that may be reciprocal"),
        flag("rerank_k2", 6, "neighbours averaged over"),
        flag("rerank_lambda", 0.3, "share of the first distance"),
    ],
    check=check_reid,
    fixed=("num_instances", "jpm", "jpm_shift", "sie_camera", "sie_view", "sie_weight", "id_weight", "triplet_weight",
        "center_weight", "erase"),
    of_the_model=("jpm", "jpm_shift", "sie_camera", "sie_view", "sie_weight"),
    encoder_alone="its class token is the feature then",
)


def check_attr(args, said: set[str]) -> None:
    if not 0 < args.attr_threshold < 1:
        raise InputError(f"--attr_threshold {args.attr_threshold}: must be between 0 and 1")
    if args.attr_vectors and args.clip_pretrained:
        raise InputError("--attr_vectors and --clip_pretrained both give the text vectors: drop one of them")
    if args.smoothing:
        raise InputError(f"--smoothing {args.smoothing}: attributes are learned without it, drop it")
    if "clip_model" in said and not args.clip_pretrained and not args.eval:
        raise InputError(f"--clip_model {args.clip_model} needs its weights: give --clip_pretrained too")


ATTR = TaskFlags(
    title="attributes",
    recipe={  # VTB's
        "input_size": "224", "drop_path": 0.1, "batch_size": 128, "epochs": 20, "warmup_epochs": 5.0,
        "opt": "sgd", "min_lr_ratio": 0.002, "warmup_lr_ratio": 0.01, "bias_lr_factor": 1.0,
        "head_lr_factor": 1.0, "weight_decay": 1e-4, "clip_grad": 0.0, "smoothing": 0.0,
    },
    default_lr=lambda args: 5e-4 if args.opt == "adamw" else 8e-3,
    flags=[
        flag("attr_format", "auto", "layout of --data_path (default auto: a folder is VeRi-776, a file a table)",
            choices=("auto", "veri776", "table")),
        flag("attr_columns", None,
            "columns of a table that hold 0 or 1 (default: all but path and split; with --attr_categories none)",
            nargs="+", metavar="NAME"),
        flag("attr_categories", None, "columns of a table that hold words, an attribute a word (default none)",
            nargs="+", metavar="NAME"),
        flag("attr_split", "test", "value of the column split to test on"),
        flag("attr_threshold", 0.45, "probability above which an attribute is said to be true (default 0.45, VTB's)"),
        flag("attr_vectors", "", "text vectors [A, D] as .npy or .safetensors, a row an attribute (default none)"),
        flag("clip_pretrained", "",
            "take the text vectors from CLIP: open_clip tag, or a weight file .pt .bin .safetensors (default none: "
            "random orthogonal vectors)"),
        flag("clip_model", "ViT-L-14", "open_clip name or path of an open_clip JSON config"),
    ],
    check=check_attr,
    fixed=("text_vectors",),
    of_the_model=("attr_columns", "attr_categories", "attr_vectors", "clip_model", "clip_pretrained"),
)


def check_fgvc(args, said: set[str]) -> None:
    if args.contrastive_weight is None:
        args.contrastive_weight = 1.0 if args.parts == "on" else 0.0
    check_numbers(args, not_negative="contrastive_weight")
    if "contrastive_margin" in said and not args.contrastive_weight:
        raise InputError(
            f"--contrastive_margin {args.contrastive_margin} without the contrastive loss: drop it, or set "
            "--contrastive_weight"
        )
    if "label_column" in said and Path(args.data_path).is_dir():
        raise InputError(
            f"--label_column {args.label_column}: {args.data_path} is a folder, whose layout names the classes: drop it"
        )
    if not -1 <= args.contrastive_margin < 1:
        raise InputError(f"--contrastive_margin {args.contrastive_margin}: a cosine, from -1 to below 1")
    if args.resize is not None and args.resize < max(args.img_size) and not args.eval:
        raise InputError(
            f"--resize {args.resize} px leaves no crop of {args.img_size[0]} x {args.img_size[1]}: give at "
            f"least {max(args.img_size)}"
        )


FGVC = TaskFlags(
    title="fine-grained classes",
    recipe={  # TransFG's of StanfordCars: 500 of its 10,000 steps of 16 images are warm-up
        "input_size": "448", "drop_path": 0.1, "batch_size": 16, "epochs": 20, "warmup_epochs": 1.0,
        "opt": "sgd", "min_lr_ratio": 0.0, "warmup_lr_ratio": 0.0, "bias_lr_factor": 1.0,
        "head_lr_factor": 1.0, "weight_decay": 0.0, "clip_grad": 1.0, "smoothing": 0.0,
    },
    default_lr=lambda args: 2.5e-4 if args.opt == "adamw" else 0.03,
    flags=[
        flag("label_column", "label", "column of a table that holds the class"),
        flag("parts", "on", "TransFG's part selection; off: the ViT baseline", choices=("on", "off")),
        flag("contrastive_weight", None, "weight of the contrastive loss (default 1, with --parts off 0)", type=float),
        flag("contrastive_margin", 0.4, "cosine up to which other classes cost nothing"),
        flag("resize", None, "px of both sides of a picture before the crop of --input_size (default its 600/448)",
            type=int),
        flag("auto_augment", True, "AutoAugment's policy for ImageNet after crop and flip"),
    ],
    check=check_fgvc,
    fixed=("parts", "contrastive_weight", "contrastive_margin", "auto_augment", "resize"),
    of_the_model=("parts",),
)


def check_seg(args, said: set[str]) -> None:
    check_numbers(args, not_negative="aux_weight")
    if args.seg_split == "train" and not args.eval:
        raise InputError("--seg_split train would score what is trained on: choose val or test")
    low, high = args.resize_range
    if not 0 < low <= high <= 10:
        raise InputError(f"--resize_range {low:g} {high:g}: give two factors above 0, the smaller one first")


SEG = TaskFlags(
    title="part segmentation",
    recipe={  # SETR's for ADE20K, without dropout; 20,000 updates of 16 are 320,000 / images epochs
        "input_size": "512", "drop_path": 0.0, "batch_size": 16, "epochs": 100, "warmup_epochs": 0.0,
        "opt": "sgd", "min_lr_ratio": 0.1, "warmup_lr_ratio": 0.0, "bias_lr_factor": 1.0,
        "head_lr_factor": 10.0, "weight_decay": 0.0, "clip_grad": 0.0, "smoothing": 0.0,
    },
    default_lr=lambda args: 1e-4 if args.opt == "adamw" else 1e-3,
    flags=[
        flag("label_space", "own",
            "which classes: those of the set's classes.json, or PartImageNet's parts of these vehicles, all else being "
            "background", choices=("own", "car_parts", "car_bicycle", "vehicle_parts")),
        flag("decoder", "pup", "SETR's decoder", choices=("naive", "pup", "mla")),
        flag("aux_weight", 0.4, "weight of each auxiliary head's loss, 0: there are none"),
        flag("resize_range", [0.5, 2.0],
            "training images are resized by a random factor of this range; 1: short side = crop", nargs=2, type=float,
            metavar=("MIN", "MAX")),
        flag("distort", True, "random brightness, contrast, saturation, hue in training"),
        flag("seg_eval", "slide", "score by sliding windows, or by the whole image resized to --input_size",
            choices=SEG_MODES),
        flag("seg_split", "auto", "which split is scored (default auto: test, where there is none val)",
            choices=("auto", "train", "val", "test")),
    ],
    check=check_seg,
    fixed=("label_space", "decoder", "aux_weight", "resize_range", "distort"),
    of_the_model=("label_space", "decoder", "aux_weight"),
)
# fmt: on

TASKS = {"reid": REID, "attr": ATTR, "fgvc": FGVC, "seg": SEG}  # flag of a task: the file in finetune/ that learns it


class ChooseTask(argparse.Action):
    """Keep the task, and take the flags of the others out of the --help that follows."""

    def __init__(self, *words, own: dict[str, list[argparse.Action]], **how):
        super().__init__(*words, **how)
        self.own = own

    def __call__(self, parser, namespace, task, option=None):
        namespace.task = task
        for action in (action for other, actions in self.own.items() if other != task for action in actions):
            action.help = argparse.SUPPRESS


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """--task, the common flags, and those of each task in a group of its own."""
    own: dict[str, list[argparse.Action]] = {}
    parser.add_argument("--task", required=True, choices=list(TASKS), action=ChooseTask, own=own, help="what to learn")
    for title, flags in COMMON.items():
        add_group(parser, title, flags)
    for task, about in TASKS.items():
        own[task] = add_group(parser, f"{about.title} (--task {task})", about.flags)


def add_group(parser: argparse.ArgumentParser, title: str, flags: list[Flag]) -> list[argparse.Action]:
    group = parser.add_argument_group(title)
    return [group.add_argument(f"--{f.name}", default=None, help=help_of(f), **f.how) for f in flags]


def help_of(f: Flag) -> str:
    """ "images per process (default reid 64, attr 128, fgvc 16, seg 16)"."""
    if "(default" in f.help or f.how.get("required"):
        return f.help
    if f.default is BY_RECIPE:
        shown = ", ".join(f"{task} {about.recipe[f.name]}" for task, about in TASKS.items())
    elif isinstance(f.default, bool):
        shown = "on" if f.default else "off"
    else:
        values = f.default if isinstance(f.default, list) else [f.default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return f"{f.help} (default {shown})"


def fill_defaults(args) -> set[str]:
    """Give each flag that nobody has said its default; flags of other tasks leave `args`, and `args.given` names those
    that say how the run is done, for tables of results.

    Returns:
        The names of the flags that the user has said.
    Raises:
        InputError: a flag of another task.
    """
    said = {name for name, value in vars(args).items() if value is not None}
    about = TASKS[args.task]
    flags = [*(f for flags in COMMON.values() for f in flags), *about.flags]
    args.given = [f.name for f in flags if f.name in said] + ["amp"] * (args.amp != "auto")
    for f in flags:
        if getattr(args, f.name) is None:
            setattr(args, f.name, about.recipe[f.name] if f.default is BY_RECIPE else f.default)
    own = {f.name for f in about.flags}
    for task, other in TASKS.items():
        for name in [f.name for f in other.flags if f.name not in own and hasattr(args, f.name)]:
            if name in said:
                raise InputError(f"--{name} belongs to --task {task}: drop it for --task {args.task}")
            delattr(args, name)
    return said


def check_args(args) -> None:
    """Find contradictions among flags before anything is loaded; fill defaults and derived values.

    Raises:
        InputError: one sentence on the first contradiction.
    """
    said = fill_defaults(args)
    args.img_size = parse_input_size(args.input_size)
    check_numbers(
        args,
        at_least_one="batch_size epochs print_freq save_freq max_bad_steps",
        not_negative="warmup_epochs weight_decay clip_grad max_bad_ratio seed eval_every keep_checkpoints "
        "min_lr_ratio warmup_lr_ratio bias_lr_factor head_lr_factor num_workers",
        positive="lr",
    )
    for name in ("drop_path", "smoothing"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be in [0, 1)")
    if not 0 < args.layer_decay <= 1:
        raise InputError(f"--layer_decay {args.layer_decay}: must be in (0, 1]")
    if args.warmup_epochs >= args.epochs:
        raise InputError(
            f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}: use "
            f"--warmup_epochs {args.epochs // 10}"
        )
    TASKS[args.task].check(args, said)
    if args.eval:
        check_eval(args, said)
    if args.output_dir is None:
        model = Path(args.resume or args.finetune)
        evaluated = model.parent / f"eval_{Path(args.data_path).stem}"
        args.output_dir = str(evaluated) if args.eval else f"runs/{args.task}"
    args.accum_iter = 1


def check_eval(args, said: set[str]) -> None:
    """Refuse what --eval cannot score, and flags that would change the model."""
    if bool(args.resume) == bool(args.finetune):
        raise InputError("--eval scores one model: give --resume MODEL, or --finetune ENCODER as it is")
    if args.resume == "auto":
        raise InputError("--eval --resume auto: name the file, for example --resume runs/veri/model.pth")
    about = TASKS[args.task]
    for name in about.of_the_model + (ENCODER_FLAGS if args.resume else ()):
        if name in said and (args.resume or about.encoder_alone):  # else it is the file that is refused
            raise InputError(f"--{name} would change the model that --eval scores: drop it")
