"""Settings of a pre-training run: what contradicts, what follows from flags and data, what is printed."""

from datasets.samplers import EpochBatches
from models_mae import count_kept
from models_vit import ENCODER_SIZES, check_img_size
from util.cli import parse_input_size
from util.dist import get_world_size, is_main_process
from util.errors import InputError
from util.parallel import default_workers


def check_args(args) -> None:
    """Contradictions among flags, before anything is loaded; fills derived values.

    Raises:
        InputError: one sentence on the first contradiction.
    """
    args.img_size = parse_input_size(args.input_size)
    patch_size = ENCODER_SIZES[args.model.split("_")[2]][3]
    rows, columns = check_img_size(args.img_size, patch_size)
    count_kept(rows * columns, args.mask_ratio)
    for name in ("batch_size", "accum_iter", "epochs", "print_freq", "save_freq", "max_bad_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in (
        "blr",
        "min_lr",
        "warmup_epochs",
        "weight_decay",
        "clip_grad",
        "sim_weight",
        "kl_weight",
        "max_bad_ratio",
        "seed",
        "vis_epochs",
        "start_epoch",
        "keep_checkpoints",
        "distill_hidden",
        "profile",
    ):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} {getattr(args, name)}: must not be negative")
    if not 0 < args.crop_min <= 1:
        raise InputError(f"--crop_min {args.crop_min}: must be in (0, 1]")
    if args.kl_tau is not None and args.kl_tau <= 0:
        raise InputError(f"--kl_tau {args.kl_tau}: must be positive")
    if args.warmup_epochs > args.epochs:
        raise InputError(
            f"--warmup_epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}: the learning "
            f"rate would never reach its value; use --warmup_epochs {max(args.epochs // 10, 1)}"
        )
    if args.start_epoch >= args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    if args.resume and args.init:
        raise InputError("--resume continues a run and --init starts one: give only one of them")
    if args.resume and args.start_epoch:
        raise InputError("--start_epoch is for fresh runs: --resume takes the epoch from the checkpoint")
    for name in ("text_bank", "teacher_cache"):
        if args.no_distill and getattr(args, name):
            raise InputError(f"--{name} has no use with --no_distill: drop one of them")
    if not args.no_distill and args.sim_weight == 0 and args.kl_weight == 0:
        raise InputError("--sim_weight 0 and --kl_weight 0 leave nothing to distil: use --no_distill")
    args.weights = {}
    if not args.no_distill:
        terms = {"sim": args.sim_weight, "kl": args.kl_weight}
        args.weights = {name: weight for name, weight in terms.items() if weight}


def resolve(args, paths, batches: EpochBatches) -> dict:
    """Everything derived from flags and data, as plain values; refuses runs that could not learn."""
    global_batch = args.batch_size * get_world_size()
    if batches.batches_per_epoch < 1:
        raise InputError(
            f"{len(paths)} images do not fill one batch of {global_batch} (--batch_size "
            f"{args.batch_size} x {get_world_size()} processes): lower --batch_size to at most "
            f"{max(len(paths) // get_world_size(), 1)}"
        )
    if args.accum_iter > batches.batches_per_epoch:
        raise InputError(
            f"--accum_iter {args.accum_iter} is more than the {batches.batches_per_epoch} batches of an "
            f"epoch ({len(paths)} images, {global_batch} a batch), so the effective batch would never "
            f"be reached: use --accum_iter {batches.batches_per_epoch} or less"
        )
    args.effective_batch = global_batch * args.accum_iter
    if args.lr is None:
        args.lr = args.blr * args.effective_batch / 256
    if args.micro_batch is None:
        args.micro_batch = args.batch_size if args.device == "cuda" else min(args.batch_size, 32)
    if args.num_workers is None:
        args.num_workers = default_workers()
    updates = -(-batches.batches_per_epoch // args.accum_iter)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()} | {
        "world_size": get_world_size(),
        "global_batch": global_batch,
        "images": len(paths),
        "images_sha": paths.sha256(),
        "updates_per_epoch": updates,
    }


def print_header(args, facts: dict, lines: list[str]) -> None:
    """What this run is going to do, before it does it (rank 0)."""
    if not is_main_process():
        return
    is_scaled = args.lr == args.blr * args.effective_batch / 256
    origin = f" = blr {args.blr:g} x {args.effective_batch} / 256" if is_scaled else " (--lr)"
    updates = facts["updates_per_epoch"]
    print(
        f"effective batch: {args.effective_batch} = {args.batch_size} x {facts['world_size']} processes x "
        f"{args.accum_iter} accumulated; lr {args.lr:.4g}{origin}\n"
        f"images: {facts['images']} in {args.data_path}; {updates} updates an epoch, "
        f"{updates * args.epochs} in {args.epochs} epochs, {args.warmup_epochs:g} of warm-up\n"
        f"teacher: {facts['teacher']}"
    )
    if not args.no_distill:
        use = "" if args.kl_weight else ", logged only: --kl_weight is 0"
        print(
            f"text bank: {facts['text_bank_used']}{use}\n"
            f"distillation: context {args.context}, sim x {args.sim_weight:g}, kl x {args.kl_weight:g} at "
            f"tau {facts['tau']:.4g}, the teacher sees the {args.teacher_view}"
        )
    print("\n".join(lines), flush=True)
