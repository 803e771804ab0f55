"""The flags of fine-tuning: recipes, each task's own flags, and what contradicts what. Free of torch.

The default of a flag stands here once. argparse gets None, so that what the user has said can be told from what nobody
has, and `check_args` fills in the rest.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from util.cli import check_numbers, parse_input_size
from util.errors import ENCODER_MODELS, OPEN_SCORES, REID_FORMATS, InputError


class Flag:
    """A flag. default: what `check_args` fills in; type and action follow from it, unless it is None. within: the
    interval of its numbers. help: without the default, where its value says it. how: of argparse."""

    def __init__(self, name: str, default: object, help: str, within: str = "", **how):
        self.name, self.default, self.help, self.within, self.how = name, default, help, within, how
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif isinstance(default, int | float):
            how["type"] = type(default)

    def check(self, value) -> None:
        """Refuse numbers outside the interval."""
        if self.within and value is not None:
            low, high = map(float, self.within[1:-1].split(","))
            for x in value if isinstance(value, list) else [value]:
                if not low <= x <= high or x == low and "(" in self.within or x == high and ")" in self.within:
                    raise InputError(f"--{self.name} {x}: must be in {self.within}")


@dataclass(frozen=True)
class TaskFlags:
    """What the command line knows of a task.

    title: of its group in --help. recipe: defaults of the common flags where they differ. default_lr: learning rate at
    the recipe's batch. model, training, scoring: its own flags; the first two must not change on --resume, and --eval
    refuses the first, since a trained model has its own.
    """

    title: str
    recipe: dict
    default_lr: Callable[[argparse.Namespace], float]
    model: tuple[Flag, ...] = ()
    training: tuple[Flag, ...] = ()
    scoring: tuple[Flag, ...] = ()

    @property
    def flags(self) -> tuple[Flag, ...]:
        return (*self.model, *self.training, *self.scoring)

    def default_of(self, f: Flag) -> object:
        return self.recipe.get(f.name, f.default)


# fmt: off
COMMON = {
    "encoder": [
        Flag("finetune", "",
            "weights of MAE, CGD-MAE, VehicleMAE, timm, Hugging Face, DINO, MoCo v3, CLIP, TransReID: a file, a name "
            "of `python -m tools.checkpoint list`, or an address (default none)"),
        Flag("model", None, f"{', '.join(ENCODER_MODELS)}: start from random weights (default: the file's)",
            choices=list(ENCODER_MODELS), metavar="NAME"),
        Flag("input_size", "224", "pixels: one side, or H,W"),
        Flag("stride", None, "px from patch to patch; 12: they overlap (default: the patch)", "[1, inf)", type=int),
        Flag("drop_path", 0.1, "chance to skip the last block, growing linearly from 0", "[0, 1)"),
        Flag("pixel_stats", "checkpoint",
            "mean and std of pixels: the file's (else CLIP's for CLIP, ImageNet's for others), ImageNet's, 0.5, CLIP's",
            choices=("checkpoint", "imagenet", "half", "clip")),
        Flag("pos_resize", "bicubic", "how the position table is resized", choices=("bicubic", "bilinear")),
        Flag("quick_gelu", False, "OpenAI's CLIP was trained with it"),
    ],
    "optimisation": [
        Flag("batch_size", 64, "images per process", "[1, inf)"),
        Flag("epochs", 20, "length of the schedule in epochs", "[1, inf)"),
        Flag("warmup_epochs", 1.0, "epochs of linear warm-up", "[0, inf)"),
        Flag("opt", "sgd", "optimiser; momentum of sgd 0.9", choices=("sgd", "adamw")),
        Flag("lr", None, "learning rate (default: the recipe's, in proportion to the batch)", "(0, inf)", type=float),
        Flag("min_lr_ratio", 0.0, "last learning rate / --lr", "[0, inf)"),
        Flag("warmup_lr_ratio", 0.0, "first learning rate / --lr", "[0, inf)"),
        Flag("bias_lr_factor", 1.0, "learning rate of biases / --lr", "[0, inf)"),
        Flag("head_lr_factor", 1.0, "learning rate of what is not the encoder's / --lr", "[0, inf)"),
        Flag("layer_decay", 1.0, "learning rate of a layer / the next one's", "(0, 1]"),
        Flag("weight_decay", 0.0, "weight decay", "[0, inf)"),
        Flag("clip_grad", 0.0, "largest gradient norm, 0 for none", "[0, inf)"),
        Flag("smoothing", 0.0, "label smoothing", "[0, 1)"),
    ],
    "data": [
        Flag("data_path", None, "folder of the set, or a table (docs/FINETUNE.md links each layout)", required=True),
        Flag("max_bad_ratio", 0.01, "stop above this fraction of unreadable training images", "[0, 1]"),
    ],
    "evaluation": [
        Flag("eval", False, "score --resume FILE, or the encoder --finetune"),
        Flag("report", False, "write report.html: numbers, curves and pictures"),
        Flag("before", "", "metrics.json of an earlier scoring, to show beside this one (default none)"),
    ],
}


REID = TaskFlags(
    title="re-identification",  # TransReID's recipe
    recipe={"input_size": "256", "batch_size": 64, "epochs": 120, "warmup_epochs": 5.0, "min_lr_ratio": 0.002,
            "warmup_lr_ratio": 0.01, "bias_lr_factor": 2.0, "weight_decay": 1e-4},
    default_lr=lambda args: 5e-4 if args.opt == "adamw" else 0.01 if args.jpm else 0.008,
    model=(
        Flag("jpm", False, "jigsaw patch module: four local branches"),
        Flag("jpm_shift", 8, "patches are rolled by this less one", "[1, inf)"),
        Flag("sie_camera", False, "side information: camera embedding"),
        Flag("sie_view", False, "side information: view embedding"),
        Flag("sie_weight", 3.0, "lambda of the embedding", "[0, inf)"),
    ),
    training=(
        Flag("num_instances", 4, "K, images of a vehicle in a batch", "[2, inf)"),
        Flag("id_weight", 1.0, "weight of the identity loss", "[0, inf)"),
        Flag("triplet_weight", 1.0, "weight of the triplet loss", "[0, inf)"),
        Flag("erase", 0.5, "chance that a rectangle is erased", "[0, 1]"),
    ),
    scoring=(
        Flag("format", "auto", "layout of --data_path, by default by its files", choices=REID_FORMATS),
        Flag("tests", None, "tests of the set, for example 800 1600 2400 (default: all)", nargs="+", metavar="NAME"),
        Flag("keep_same_camera", False, "score the variant that keeps same-camera matches; under another name"),
        Flag("protocol_seed", 0, "seed of VehicleID's ten draws", "[0, inf)"),
        Flag("track_pool", "mean", "feature of a track: mean of unit vectors, the same weighted by sharpness, or the "
            "image nearest to all others", choices=("mean", "quality", "medoid")),
        Flag("rerank", False, "also score after k-reciprocal re-ranking"),
        Flag("rerank_k1", 20, "neighbours that may be reciprocal", "[1, inf)"),
        Flag("rerank_k2", 6, "neighbours averaged over", "[1, inf)"),
        Flag("rerank_lambda", 0.3, "share of the first distance", "[0, 1]"),
        Flag("expand", None,
            "also score with features expanded by their neighbours: aqe or alpha for queries, dba for gallery images "
            "(default none)", nargs="+", choices=("aqe", "alpha", "dba")),
        Flag("expand_k", 10, "nearest gallery images that are taken up", "[1, inf)"),
        Flag("expand_alpha", 3.0, "alpha and dba: the weights are cosines to this power", "[0, inf)"),
        Flag("whiten", False, "also score whitened features, fitted on the train images (without any: the gallery)"),
        Flag("open_set", False, "also score queries whose vehicle is not there, and write open_set.safetensors"),
        Flag("far", 0.01, "--open_set: largest share of unknown queries that may be accepted", "(0, 1)"),
        Flag("open_score", "cosine", "--open_set: what is compared with the threshold", choices=OPEN_SCORES),
    ),
)
ATTR = TaskFlags(
    title="attributes",  # VTB's recipe
    recipe={"batch_size": 128, "warmup_epochs": 5.0, "min_lr_ratio": 0.002, "warmup_lr_ratio": 0.01,
            "weight_decay": 1e-4},
    default_lr=lambda args: 5e-4 if args.opt == "adamw" else 8e-3,
    model=(
        Flag("attr_columns", None, "columns of 0 and 1 (default: all, with --attr_categories none)", nargs="+"),
        Flag("attr_categories", None, "columns that hold words, an attribute a word (default none)", nargs="+"),
        Flag("attr_vectors", "", "text vectors [A, D] as .npy, a row an attribute (default none)"),
        Flag("clip_pretrained", "", "text vectors from CLIP: open_clip tag, or weights (default none: random vectors)"),
        Flag("clip_model", "ViT-L-14", "open_clip name or path of an open_clip JSON config"),
    ),
    scoring=(
        Flag("attr_format", "auto", "a folder is VeRi-776, a file a table", choices=("auto", "veri776", "table")),
        Flag("attr_split", "test", "value of the column split to test on"),
        Flag("attr_threshold", 0.45, "probability above which an attribute is true; 0.45: VTB's", "(0, 1)"),
    ),
)
FGVC = TaskFlags(
    title="fine-grained classes",  # TransFG's recipe of StanfordCars: 500 of its 10,000 steps of 16 images are warm-up
    recipe={"input_size": "448", "batch_size": 16, "clip_grad": 1.0},
    default_lr=lambda args: 2.5e-4 if args.opt == "adamw" else 0.03,
    model=(Flag("parts", "on", "TransFG's part selection; off: the ViT baseline", choices=("on", "off")),),
    training=(
        Flag("contrastive_weight", 1.0, "weight of the contrastive loss; --parts off has none", "[0, inf)"),
        Flag("contrastive_margin", 0.4, "cosine up to which other classes cost nothing", "[-1, 1)"),
        Flag("resize", None, "px of both sides before the crop (default 600/448 of it)", "[1, inf)", type=int),
        Flag("auto_augment", True, "AutoAugment's policy for ImageNet after crop and flip"),
    ),
    scoring=(Flag("label_column", "label", "column of a table that holds the class"),),
)
SEG = TaskFlags(
    title="part segmentation",  # SETR's recipe of ADE20K, without dropout: 20,000 updates of 16
    recipe={"input_size": "512", "drop_path": 0.0, "batch_size": 16, "epochs": 100, "warmup_epochs": 0.0,
            "min_lr_ratio": 0.1, "head_lr_factor": 10.0, "pos_resize": "bilinear"},
    default_lr=lambda args: 1e-4 if args.opt == "adamw" else 1e-3,
    model=(
        Flag("decoder", "pup", "SETR's decoder", choices=("naive", "pup", "mla")),
        Flag("aux_weight", 0.4, "weight of each auxiliary head's loss, 0: there are none", "[0, inf)"),
    ),
    training=(
        Flag("resize_range", [0.5, 2.0], "random factor of training images; 1: short side = crop (default 0.5 2)",
            "(0, 10]", nargs=2, type=float, metavar=("MIN", "MAX")),
        Flag("distort", True, "random brightness, contrast, saturation, hue in training"),
    ),
    scoring=(Flag("seg_split", "auto", "the split to score; auto: test, else val", choices=("auto", "val", "test")),),
)
# fmt: on

TASKS = {"reid": REID, "attr": ATTR, "fgvc": FGVC, "seg": SEG}  # finetune/NAME.py learns --task NAME


class ChooseTask(argparse.Action):
    """Keep the task, and take the flags of the others, `own`, out of the --help that follows."""

    own: dict[str, list[argparse.Action]]

    def __call__(self, parser, namespace, task, option=None):
        namespace.task = task
        for action in (action for other, actions in self.own.items() if other != task for action in actions):
            action.help = argparse.SUPPRESS


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """--task, the common flags, and those of each task in a group of its own."""

    def add_group(title: str, flags) -> list[argparse.Action]:
        add = parser.add_argument_group(title).add_argument
        return [add(f"--{f.name}", default=None, help=help_of(f), **f.how) for f in flags]

    choose = parser.add_argument("--task", required=True, choices=list(TASKS), action=ChooseTask, help="what to learn")
    for title, flags in COMMON.items():
        add_group(title, flags)
    choose.own = {task: add_group(f"{of.title} (--task {task})", of.flags) for task, of in TASKS.items()}


def help_of(f: Flag) -> str:
    """ "images per process (default reid 64, attr 128, fgvc 16, seg 16)"."""
    if "(default" in f.help or f.how.get("required"):
        return f.help
    shown = ", ".join(f"{task} {about.default_of(f)}" for task, about in TASKS.items())
    if not any(f.name in about.recipe for about in TASKS.values()):
        shown = {True: "on", False: "off"}[f.default] if isinstance(f.default, bool) else f.default
    return f"{f.help} (default {shown})"


def fixed_flags(task: str) -> list[str]:
    """Names of the flags that make a continuation another run."""
    common = [*COMMON["encoder"][2:], *COMMON["optimisation"][1:]]  # all but --finetune, --model, --batch_size
    return [f.name for f in (*common, *TASKS[task].model, *TASKS[task].training)]


def fill_defaults(args) -> set[str]:
    """Give each flag that nobody has said its default; flags of other tasks leave `args`, and `args.given` names those
    that say how the run is done, for tables of results. Returns the names of the flags that the user has said."""
    said, about = {name for name, value in vars(args).items() if value is not None}, TASKS[args.task]
    flags = [*(f for flags in COMMON.values() for f in flags), *about.flags]
    args.given = [f.name for f in flags if f.name in said] + ["amp"] * (args.amp != "auto")
    for f in flags:
        if f.name not in said:
            setattr(args, f.name, about.default_of(f))
        f.check(getattr(args, f.name))
    for task, other in TASKS.items():
        for f in (f for f in other.flags if f not in about.flags):
            if f.name in said:
                raise InputError(f"--{f.name} belongs to --task {task}: drop it for --task {args.task}")
            delattr(args, f.name)
    return said


def check_args(args) -> None:
    """Find contradictions among flags before anything is loaded; fill defaults and derived values."""
    said, about = fill_defaults(args), TASKS[args.task]
    args.img_size, args.accum_iter = parse_input_size(args.input_size), 1
    check_numbers(args)
    epochs = about.recipe.get("epochs", 20)
    if "warmup_epochs" not in said and args.epochs < epochs:  # as much of a shorter run
        args.warmup_epochs *= args.epochs / epochs
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}: lower it")
    if args.eval:
        if bool(args.resume) == bool(args.finetune) or args.resume == "auto":
            raise InputError("--eval scores one model: give --resume MODEL, or --finetune ENCODER as it is")
        for f in (*about.model, *(COMMON["encoder"][1:] if args.resume else ())):  # all but --finetune
            if f.name in said:
                raise InputError(f"--{f.name} would change the model that --eval scores: drop it")
    elif bool(args.finetune) == bool(args.model):
        raise InputError("give --finetune FILE to start from an encoder, or --model NAME to start from random weights")
    if args.output_dir is None:
        evaluated = Path(args.resume or args.finetune).parent / f"eval_{Path(args.data_path).stem}"
        args.output_dir = str(evaluated) if args.eval else f"runs/{args.task}"
