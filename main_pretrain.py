"""Pre-train CGD-MAE: masked autoencoding plus global-context distillation from a frozen CLIP.

    torchrun --nproc_per_node=2 main_pretrain.py --batch_size 256 --model mae_vit_base_patch16 \\
        --mask_ratio 0.75 --epochs 400 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \\
        --accum_iter 8 --norm_pix_loss --data_path PHOTOS

One process runs with plain `python main_pretrain.py ...`.
"""

import argparse
import contextlib
import datetime
import hashlib
import inspect
import json
import os
import platform
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from datasets.manifest import list_images
from datasets.pretrain import EpochBatches, PretrainDataset, build_loader
from datasets.teacher_cache import TeacherCache
from datasets.text_bank import build_bank, save_bank
from engine_pretrain import PretrainRun, train_one_epoch
from models_mae import CONTEXTS, MODELS, count_kept
from models_teacher import FrozenTeacher, load_clip
from models_vit import ENCODER_SIZES, check_img_size
from util.checkpoint import write_json
from util.dist import (
    agree,
    barrier,
    end_distributed,
    get_rank,
    get_world_size,
    init_distributed,
    is_main_process,
    pick_device,
)
from util.errors import InputError, run_or_explain
from util.meter import Meter, means, trivial_distillation
from util.optim import build_adamw
from util.panels import save_panels
from util.precision import pick_amp_dtype, pick_fused_attention
from util.resolve import parse_input_size
from util.resume import RunFiles, initialise_from
from util.stop import StopGuard, end_with_launcher, init_worker, run_lock


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("main_pretrain.py", add_help=False, allow_abbrev=False)
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--model", default="mae_vit_base_patch16", choices=list(MODELS), metavar="NAME",
        help=f"one of {', '.join(MODELS)} (default mae_vit_base_patch16)")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--mask_ratio", default=0.75, type=float, help="fraction of patches removed (default 0.75)")
    add("--norm_pix_loss", action="store_true",
        help="score pixels normalised per patch (default off, as in MAE)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", default=64, type=int, help="images per process and micro-batch (default 64)")
    add("--micro_batch", default=None, type=int,
        help="images in memory at once, same result (default: --batch_size on CUDA, at most 32 on CPU)")
    add("--accum_iter", default=1, type=int, help="micro-batches per update (default 1)")
    add("--epochs", default=400, type=int, help="length of the schedule in epochs (default 400)")
    add("--start_epoch", default=0, type=int, help="first epoch of a fresh run (default 0)")
    add("--warmup_epochs", default=40, type=float,
        help="epochs of linear warm-up of learning rate and distillation weights (default 40)")
    add("--lr", default=None, type=float, help="learning rate (default: from --blr)")
    add("--blr", default=1e-3, type=float, help="lr = blr * effective batch / 256 (default 1e-3)")
    add("--min_lr", default=0.0, type=float, help="learning rate at the end (default 0)")
    add("--weight_decay", default=0.05, type=float, help="AdamW weight decay (default 0.05)")
    add("--clip_grad", default=0.0, type=float, help="largest gradient norm, 0 for none (default 0)")

    add = parser.add_argument_group("distillation").add_argument
    add("--no_distill", action="store_true", help="plain MAE, no teacher (default off)")
    add("--context", default="attention", choices=CONTEXTS,
        help="the student's global token (default attention)")
    add("--sim_weight", default=2.0, type=float, help="weight of 1 - cosine (default 2)")
    add("--kl_weight", default=0.05, type=float, help="weight of the KL over the text bank (default 0.05)")
    add("--kl_tau", default=None, type=float,
        help="temperature of both softmaxes (default: the teacher's own, 1/exp(logit_scale))")
    add("--distill_hidden", default=0, type=int,
        help="width of a hidden layer in the projection, 0 for a linear one (default 0)")
    add("--clip_model", default="ViT-L-14",
        help="open_clip name or path of an open_clip JSON config (default ViT-L-14)")
    add("--clip_pretrained", default="openai",
        help="open_clip tag, or a weight file .pt .bin .safetensors (default openai)")
    add("--text_bank", default=None,
        help="texts .txt or .jsonl, or an encoded bank .safetensors (default: built-in vocabulary)")
    add("--teacher_cache", default=None,
        help="folder of tools.reinforce: stored embeddings, no teacher runs (default none)")
    add("--teacher_view", default="crop", choices=("crop", "full"),
        help="what the teacher sees: the student's crop or the whole image (default crop)")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="data/automobile1m",
        help="folder or manifest .csv .tsv .jsonl .txt (default data/automobile1m)")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all rows)")
    add("--crop_min", default=0.2, type=float, help="smallest crop, fraction of area (default 0.2)")
    add("--max_bad_ratio", default=0.01, type=float,
        help="stop above this fraction of unreadable images (default 0.01)")
    add("--num_workers", default=None, type=int,
        help="data processes per rank (default: cores / ranks on this machine, at most 10)")
    add("--pin_mem", action=argparse.BooleanOptionalAction, default=True,
        help="pinned host memory for CUDA (default on)")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./output_dir", help="folder of the run (default ./output_dir)")
    add("--log_dir", default=None, help="folder for TensorBoard (default: the output folder)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"),
        help="precision (default auto: by device)")
    add("--compile", action="store_true", help="torch.compile student and teacher (default off)")
    add("--seed", default=0, type=int, help="seed of weights, order, crops and masks (default 0)")
    add("--print_freq", default=20, type=int, help="updates between log lines (default 20)")
    add("--vis_epochs", default=20, type=int,
        help="epochs between reconstruction panels, 0 for none (default 20)")
    add("--max_bad_steps", default=10, type=int,
        help="stop after this many non-finite updates in a row (default 10)")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--resume", default="", help="checkpoint to continue exactly, or auto (default: fresh start)")
    add("--allow_change", nargs="+", default=[], metavar="NAME",
        help="settings that may differ from the resumed run's (default none)")
    add("--init", default="", help="weights to start a new run from, .pth or .safetensors (default: random)")
    add("--save_freq", default=20, type=int, help="epochs between checkpoint-<epoch>.pth (default 20)")
    add("--save_minutes", default=15.0, type=float,
        help="minutes between saves of checkpoint-last.pth (default 15)")
    add("--keep_checkpoints", default=3, type=int, help="how many checkpoint-<epoch>.pth stay (default 3)")

    add = parser.add_argument_group("launch (torchrun sets these; accepted and unused)").add_argument
    for name in ("--local_rank", "--local-rank", "--world_size", "--dist_url"):
        add(name, help=argparse.SUPPRESS)
    add("--dist_on_itp", action="store_true", help=argparse.SUPPRESS)
    add("--dist_timeout", default=600.0, type=float,
        help="seconds to wait for missing ranks and stuck collectives (default 600)")
    # fmt: on
    return parser


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


def main(args) -> dict[str, float]:
    """Run the training that `args` describe; returns the last epoch's numbers."""
    started = time.time()
    check_args(args)
    device = pick_device(args.device)
    args.device = device.type
    end_with_launcher()
    init_distributed(device, args.dist_timeout)
    try:
        lock = run_lock(Path(args.output_dir)) if is_main_process() else contextlib.nullcontext()
        with lock:
            return train(args, device, started)
    finally:
        end_distributed()


def train(args, device: torch.device, started: float) -> dict[str, float]:
    torch.set_float32_matmul_precision("high")
    amp_dtype, amp_reason = pick_amp_dtype(args.amp, device)
    output_dir = Path(args.output_dir)

    cache = TeacherCache(args.teacher_cache) if args.teacher_cache else None
    teacher, distill, teacher_facts = build_teacher(args, device, amp_dtype, output_dir, cache)
    paths = list_images(args.data_path, args.split)
    if cache:
        cache.check(
            {
                "teacher_view": args.teacher_view,
                "seed": args.seed,
                "crop_min": args.crop_min,
                "input_size": list(args.img_size),
                "images_sha": paths.sha256(),
            }
        )
    batches = EpochBatches(len(paths), args.batch_size, get_rank(), get_world_size(), args.seed)
    facts = resolve(args, paths, batches) | teacher_facts

    torch.manual_seed(args.seed)
    fused = pick_fused_attention(device, amp_dtype)
    config = {
        "model": args.model,
        "img_size": list(args.img_size),
        "norm_pix_loss": args.norm_pix_loss,
        "kind": "CGD-MAE encoder",
        "mask_ratio": args.mask_ratio,
    }
    bare = MODELS[args.model](
        img_size=args.img_size, norm_pix_loss=args.norm_pix_loss, fused_attn=fused, distill=distill
    )
    config |= {"mean": bare.pixel_mean.flatten().tolist(), "std": bare.pixel_std.flatten().tolist()}
    init_report = initialise_from(bare, args.init) if args.init else ""
    bare.to(device)
    optimizer = build_adamw(bare, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    files = RunFiles(output_dir, facts, config, args.save_minutes, args.keep_checkpoints)

    dataset = PretrainDataset(
        paths,
        args.img_size,
        bare.num_patches,
        seed=args.seed,
        min_area=args.crop_min,
        teacher_size=teacher.size if teacher and args.teacher_view == "full" else None,
        teacher_cache=cache,
    )
    loader = build_loader(
        dataset, batches, args.num_workers, args.pin_mem and device.type == "cuda", init_worker
    )
    run = PretrainRun(
        bare,
        bare,
        teacher,
        optimizer,
        scaler,
        loader,
        device,
        amp_dtype,
        guard=None,
        output_dir=output_dir,
        save_if_due=files.save_if_due,
        epoch=args.start_epoch,
    )
    barrier()  # rank 0 holds the folder now: nobody else writes to what is read here
    decision = files.resume(run, args.resume, args.allow_change)
    if not agree((run.epoch, run.batches_done)):
        raise InputError(
            f"the ranks did not find the same checkpoint in {output_dir} (rank {get_rank()}: {decision}): "
            "put --output_dir on a file system that all nodes share"
        )
    if args.compile:
        for block in [*bare.blocks, *bare.decoder_blocks]:
            block.compile()  # one compilation serves all blocks of a shape: seconds, not minutes
        if teacher:
            teacher.compile()
    if get_world_size() > 1:
        run.model = wrap_ddp(bare, device)
    print_header(
        args,
        facts,
        init_report,
        [
            f"precision: {amp_reason}; attention: {'fused' if fused else 'explicit'}; device: {device}; "
            f"{args.num_workers} data workers a rank",
            f"start: {decision}",
        ],
    )
    if is_main_process():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "args.json", facts)
        write_json(output_dir / "env.json", environment())
        files.cut_log(run.epoch)
    writer = None
    if is_main_process():
        writer = SummaryWriter(args.log_dir or output_dir, purge_step=run.epoch * 1000)
    run.guard = StopGuard(lambda: files.save(run), is_main_process())
    record: dict[str, float] = {}
    with run.guard:
        while run.epoch < args.epochs:
            train_one_epoch(run, args)
            record = finish_epoch(run, args, files, writer)
    if is_main_process():
        files.export_encoder(bare)
        writer.close()
        write_json(output_dir / "metrics.json", record)
        print(json.dumps(record))
        print(
            f"done in {datetime.timedelta(seconds=int(time.time() - started))}: "
            f"{output_dir / 'encoder.pth'} holds the encoder"
        )
    return record


def wrap_ddp(bare: torch.nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP that exchanges gradients only: the buffers (pixel statistics, text bank) never change."""
    has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    never = {"forward_sync_buffers" if has_new_name else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(bare, device_ids=ids, gradient_as_bucket_view=True, **never)


def build_teacher(args, device, amp_dtype, output_dir: Path, cache: TeacherCache | None):
    """-> (teacher, keyword arguments of the distillation head, facts); (None, None, ...) for MAE,
    and no teacher but a head where a cache stands in for it."""
    if args.no_distill:
        return None, None, {"teacher": "none (plain MAE)"}
    teacher = None
    if cache:
        identity = cache.identity
        bank, texts, source = cache.bank(args.text_bank)
    else:
        clip, tokenizer, identity = load_clip(args.clip_model, args.clip_pretrained)
        clip.to(device)
        bank, texts, source = build_bank(args.text_bank, clip, tokenizer, identity)
        dtype = amp_dtype if device.type == "cuda" and amp_dtype else torch.float32
        teacher = FrozenTeacher(clip, identity, dtype).to(device)
    if is_main_process():
        save_bank(output_dir / "text_bank.safetensors", bank, texts, identity)
    tau = args.kl_tau or identity.tau
    facts = {
        "teacher": f"{identity.model} {identity.weights_sha256[:16]}",
        "text_bank_used": source,
        "text_bank_sha": hashlib.sha256(bank.numpy().tobytes()).hexdigest()[:16],
        "tau": tau,
    }
    distill = {"context": args.context, "bank": bank, "tau": tau, "hidden": args.distill_hidden}
    return teacher, distill, facts


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
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.num_workers = min(10, max(1, (os.cpu_count() or 1) // local))
    updates = -(-batches.batches_per_epoch // args.accum_iter)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()} | {
        "world_size": get_world_size(),
        "global_batch": global_batch,
        "images": len(paths),
        "images_sha": paths.sha256(),
        "updates_per_epoch": updates,
    }


def print_header(args, facts: dict, init_report: str, lines: list[str]) -> None:
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
        print(
            f"text bank: {facts['text_bank_used']}\n"
            f"distillation: context {args.context}, sim x {args.sim_weight:g}, kl x {args.kl_weight:g} at "
            f"tau {facts['tau']:.4g}, the teacher sees the {args.teacher_view}"
        )
    if init_report:
        print(f"weights from {args.init}:\n{init_report}")
    print("\n".join(lines), flush=True)


def finish_epoch(run: PretrainRun, args, files: RunFiles, writer) -> dict[str, float]:
    """Log the epoch, move on to the next and save."""
    count, sums = run.meter.read()
    values = means(count, sums) | trivial_distillation(count, sums)
    images = files.args["global_batch"] * run.batches_done
    record = {"train_lr": run.optimizer.param_groups[0]["lr"], "train_loss": values.pop("loss", float("nan"))}
    if "sim" in values:
        record["train_cos"] = 1 - values["sim"]
    bad_images = round(values.pop("bad_images", 0) * count * get_world_size())
    record |= {f"train_{'loss_' if k in ('pixel', 'sim', 'kl') else ''}{k}": v for k, v in values.items()}
    record |= {
        "images_per_s": images / max(run.seconds["total"], 1e-9),
        "data_wait": run.seconds["data"] / max(run.seconds["total"], 1e-9),
        "bad_images": bad_images,
        "skipped_updates": files.args["updates_per_epoch"] - count,
        "epoch": run.epoch,
    }
    is_main, finished, is_last = is_main_process(), run.epoch, run.epoch + 1 == args.epochs
    if is_main:  # before the epoch counts as done: a resumed run drops lines of epochs it repeats
        with open(run.output_dir / "log.txt", "a") as opened:
            opened.write(json.dumps(record) + "\n")
    with run.guard.committing():
        run.epoch, run.batches_done = finished + 1, 0
        run.meter = Meter()
        run.seconds = {"total": 0.0, "data": 0.0}
    if is_main:
        for name, value in record.items():
            writer.add_scalar(name, value, run.epoch * 1000)
        if args.vis_epochs and (is_last or run.epoch % args.vis_epochs == 0):
            panel = save_panels(run.bare, run.loader.dataset, run, finished, args.mask_ratio)
            writer.add_image("reconstruction", panel, run.epoch * 1000, dataformats="HWC")
        if finished % args.save_freq == 0 or is_last:
            files.save_epoch(run)
        files.save(run)
        summary = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "epoch")
        print(f"epoch {finished}: {summary}", flush=True)
    return record


def environment() -> dict[str, str]:
    """Versions and machine, kept beside the log."""
    import numpy
    import open_clip
    import timm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "open_clip": open_clip.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.node()}, {os.cpu_count()} cores, {device}",
    }


if __name__ == "__main__":
    parsed = argparse.ArgumentParser(
        parents=[get_args_parser()],
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    run_or_explain(lambda: main(parsed))
