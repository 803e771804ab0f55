"""The encoder of a downstream task: from a file of weights, random, or of a trained model."""

from models_vit import CLIP_STATS, ENCODER_SIZES, IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, load_encoder
from util.checkpoint import read_checkpoint
from util.errors import InputError
from util.files import file_sha256
from util.pretrained import read_config

# what shapes an encoder: a trained model has its own
ENCODER_FLAGS = ("model", "input_size", "stride", "drop_path", "pixel_stats", "pos_resize", "quick_gelu")
PIXEL_STATS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3), "clip": CLIP_STATS}


def encoder_models() -> dict[str, tuple[int, int, int, int]]:
    """{"vit_base_patch16": (width, blocks, heads, patch), ...}."""
    return {f"vit_{name}_patch{size[3]}": size for name, size in ENCODER_SIZES.items()}


def build_encoder(args) -> tuple[VisionTransformer, str]:
    """The encoder that --finetune, --model and the flags of its group ask for, and what was loaded;
    `args.weights_sha256` is set to the hash of the file, or to "random".

    Raises:
        InputError: neither a file nor a model is named, the file holds another model, or it cannot be loaded.
    """
    if not args.finetune:
        if not args.model:
            raise InputError(
                "give --finetune FILE (the encoder to start from), or --model vit_base_patch16 to start from "
                "random weights"
            )
        width, depth, heads, patch = encoder_models()[args.model]
        encoder = VisionTransformer(
            args.img_size,
            patch,
            width,
            depth,
            heads,
            drop_path=args.drop_path,
            stride=args.stride,
            quick_gelu=args.quick_gelu,
        )
        report = f"{args.model} with random weights, seed {args.seed}"
        args.weights_sha256 = "random"
    else:
        encoder = load_encoder(
            args.finetune,
            args.img_size,
            stride=args.stride,
            drop_path=args.drop_path,
            quick_gelu=args.quick_gelu,
            pos_resize=args.pos_resize,
        )
        found = (encoder.embed_dim, len(encoder.blocks), encoder.patch_size)
        if args.model:
            width, depth, _, patch = encoder_models()[args.model]
            if found != (width, depth, patch):
                raise InputError(
                    f"--finetune {args.finetune} is {found[0]} wide with {found[1]} blocks and {found[2]} px "
                    f"patches, --model {args.model} is not: drop --model"
                )
        report = f"{args.finetune}\n{encoder.report}"
        args.weights_sha256 = file_sha256(args.finetune)
    if args.pixel_stats != "checkpoint":
        encoder.set_pixel_stats(*PIXEL_STATS[args.pixel_stats])
    mean, std = (stat.flatten().tolist() for stat in (encoder.pixel_mean, encoder.pixel_std))
    encoder.grad_checkpoint = args.grad_checkpoint
    encoder.train()
    report += "\n  pixels: mean {:.3g} {:.3g} {:.3g}, std {:.3g} {:.3g} {:.3g}".format(*mean, *std)
    return encoder, report


def encoder_of(config: dict) -> VisionTransformer:
    """The encoder of a trained model by the config in its file, with weights still to be loaded."""
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mean", "std", "stride",
             "pre_norm", "quick_gelu")  # fmt: skip
    return VisionTransformer(**{name: config[name] for name in names})


def check_trained(args, kind: str, model_flags: tuple[str, ...], encoder_alone: str = "") -> None:
    """Whether --eval was given what it can score: --resume a model of this `kind`, without flags that would
    change it; or, where a task scores an `encoder_alone` (words that say how), --finetune an encoder.

    Raises:
        InputError: a file of the other kind, or such a flag.
    """
    file = args.resume or args.finetune
    found = read_config(file, read_checkpoint(file)).get("kind", "")
    if found == "CGD-MAE encoder" or found.startswith("encoder of "):  # the header of an encoder.safetensors
        found = ""
    if args.resume and found != kind:
        other = f"use --finetune {file} ({encoder_alone})" if encoder_alone and not found else (
            f"give the model.pth of a run with --task {args.task}"
        )  # fmt: skip
        is_what = f"a {found}" if found else "no model of main_finetune.py"
        raise InputError(f"{file} is {is_what}: {other}")
    if args.finetune and found:
        raise InputError(f"{file} is a model of main_finetune.py: use --resume {file}")
    if args.finetune and not encoder_alone:
        raise InputError(
            f"--eval --finetune {file}: an encoder has no answers for --task {args.task} before it is "
            "trained; give --resume the model.pth of a run"
        )
    own = model_flags + (ENCODER_FLAGS if args.resume else ())
    fixed = [name for name in args.given if name in own]
    if fixed:
        raise InputError(f"--{fixed[0]} would change the model that --eval scores: drop it")
