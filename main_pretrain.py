"""Pre-train CGD-MAE: masked autoencoding plus global-context distillation from a frozen CLIP.

    torchrun --nproc_per_node=2 main_pretrain.py --batch_size 256 --model mae_vit_base_patch16 \\
        --mask_ratio 0.75 --epochs 400 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \\
        --accum_iter 8 --norm_pix_loss --data_path PHOTOS

One process runs with plain `python main_pretrain.py ...`.
"""

import argparse
from pathlib import Path

from util.cli import Parser, add_run_flags, add_teacher_flags, check_numbers, parse_input_size, run_tool
from util.errors import CONTEXTS, ENCODER_SIZES, MAE_MODELS, TEACHER_NORMS

CLIP_MODEL = "ViT-L-14"
RECIPES = {  # paper: MAE's defaults; small: docs/RESULTS.md, its epochs make SMALL_UPDATES
    "paper": {
        "model": "mae_vit_base_patch16", "input_size": "224", "batch_size": 64, "epochs": 400, "blr": 1e-3,
        "crop_min": 0.2, "norm_pix_loss": False, "teacher_view": "crop", "teacher_norm": "none",
    },
    "small": {
        "model": "mae_vit_tiny_patch16", "input_size": "128", "batch_size": 32, "epochs": 30, "blr": 2e-3,
        "crop_min": 0.8, "norm_pix_loss": True, "teacher_view": "full", "teacher_norm": "whiten",
    },
}  # fmt: skip
FEW_IMAGES, FEW_UPDATES, SMALL_UPDATES, USELESS_UPDATES = 50_000, 3_000, 4_500, 300


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("main_pretrain.py", __doc__)
    add = parser.add_argument
    paper, small = RECIPES["paper"], RECIPES["small"]

    def by_recipe(name: str) -> str:
        return f"(default {paper[name]}; recipe small: {small[name]})"

    # fmt: off
    add("--recipe", default="auto", choices=("auto", *RECIPES), help=f"what flags default to: small below "
        f"{FEW_IMAGES:,} images or {FEW_UPDATES:,} updates; paper: as in MAE (default auto)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default=None, choices=list(MAE_MODELS), metavar="NAME",
        help=f"one of {', '.join(MAE_MODELS)} {by_recipe('model')}")
    add("--input_size", default=None, help=f"pixels: one side, or H,W {by_recipe('input_size')}")
    add("--mask_ratio", default=0.75, type=float, help="fraction of patches removed (default 0.75)")
    add("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=None,
        help="score pixels normalised per patch (default off; recipe small: on)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", default=None, type=int,
        help="images per process and batch (default 64; recipe small: 32 over all processes)")
    add("--micro_batch", default=None, type=int, help="images in memory at once, same result (default all; CPU: 32)")
    add("--accum_iter", default=1, type=int, help="batches per update (default 1)")
    add("--epochs", default=None, type=int, help="length of the schedule in epochs (default 400; recipe small: at "
        f"least 30, more for {SMALL_UPDATES:,} updates)")
    add("--start_epoch", default=0, type=int, help="first epoch of a fresh run (default 0)")
    add("--warmup_epochs", default=None, type=float, help="of lr and distillation (default: --epochs / 10, at most 40)")
    add("--opt", default="adamw", choices=("adamw", "muon"), help="muon: for the blocks' matrices (default adamw)")
    add("--lr", default=None, type=float, help="learning rate (default: from --blr)")
    add("--blr", default=None, type=float, help=f"lr = blr * effective batch / 256 {by_recipe('blr')}")
    add("--min_lr", default=0.0, type=float, help="learning rate at the end (default 0)")
    add("--weight_decay", default=0.05, type=float, help="AdamW weight decay (default 0.05)")
    add("--clip_grad", default=0.0, type=float, help="largest gradient norm, 0 for none (default 0)")

    add = parser.add_argument_group("distillation").add_argument
    add("--no_distill", action="store_true", help="plain MAE, no teacher (default off)")
    add("--context", default="attention", choices=CONTEXTS, help="the student's global token (default attention)")
    add("--sim_weight", default=8.0, type=float, help="weight of 1 - cosine (default 8)")
    add("--kl_weight", default=0.0, type=float, help="weight of the KL over the text bank (default 0: only logged)")
    add("--kl_tau", default=None, type=float, help="temperature of both softmaxes (default: the teacher's own)")
    add("--distill_hidden", default=0, type=int, help="width of a hidden layer in the projection (default 0: none)")
    add_teacher_flags(add)
    add("--text_bank", default=None,
        help="texts .txt .jsonl, or encoded .safetensors or folder of main_describe.py (default: built-in vocabulary)")
    add("--teacher_cache", default=None, help="folder of tools.reinforce, in place of a teacher (default none)")
    add("--teacher_view", default=None, choices=("crop", "full"),
        help=f"student's crop, or whole image once {by_recipe('teacher_view')}")
    add("--teacher_norm", default=None, choices=TEACHER_NORMS,
        help=f"its embeddings as they are, or whitened {by_recipe('teacher_norm')}")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="data/automobile1m", help="folder or manifest .csv .jsonl (default data/automobile1m)")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all rows)")
    add("--crop_min", default=None, type=float, help=f"smallest crop, fraction of area {by_recipe('crop_min')}")
    add("--max_bad_ratio", default=0.01, type=float, help="stop above this share of unreadable images (default 0.01)")
    add_run_flags(parser, output_dir="./output_dir")
    add = parser.add_argument_group("only here").add_argument
    add("--init", default="", help="start from: file, address, name of `tools.checkpoint list` (default none)")
    add("--vis_epochs", default=20, type=int, help="epochs between reconstructions, 0 for none (default 20)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import datetime
import hashlib
import math
import time

import torch
from torch.utils.tensorboard import SummaryWriter

from datasets.items import PretrainDataset, build_loader
from datasets.path_list import PathList, list_images
from datasets.samplers import EpochBatches
from datasets.teacher import HEADER, TeacherCache, hash_texts, is_encoded, read_texts, save_bank
from engine_pretrain import PretrainRun, train_one_epoch, trivial_distillation
from models_mae import MODELS, count_kept
from models_teacher import FrozenTeacher, build_bank, load_teacher, teacher_name
from models_vit import patch_grid
from reports.run import save_panels
from tools import reinforce
from util.checkpoint import load_weights, read_checkpoint
from util.dist import barrier, get_rank, get_world_size, init_worker, is_main_process, launch, print_main, wrap_ddp
from util.errors import InputError
from util.fetch import fetch
from util.files import read_json, write_json
from util.loop import StopGuard, end_epoch, epoch_record
from util.optim import MuonAdamW, build_adamw
from util.precision import default_workers, machine_facts, pick_precision
from util.run_files import RunFiles, previous_settings, refuse_used_folder

FIXED_ON_RESUME = (  # what makes a continuation another run; --allow_change NAME lets one through
    "model input_size norm_pix_loss mask_ratio context distill_hidden no_distill teacher text_bank_sha images_sha "
    "effective_batch opt epochs warmup_epochs lr min_lr weight_decay clip_grad sim_weight kl_weight tau crop_min "
    "crop_views teacher_view teacher_norm seed"
).split()


def check_given(args) -> None:
    """`check_args` on the flags as they were given, before there are images to count."""
    check_args(argparse.Namespace(**{n: RECIPES["paper"].get(n) if v is None else v for n, v in vars(args).items()}))


def check_args(args) -> None:
    """Find contradictions among flags before anything is loaded; fill derived values."""
    args.img_size = parse_input_size(args.input_size)
    rows, columns = patch_grid(args.img_size, ENCODER_SIZES[MAE_MODELS[args.model]][3])
    count_kept(rows * columns, args.mask_ratio)
    not_negative = "lr blr min_lr warmup_epochs weight_decay clip_grad sim_weight kl_weight max_bad_ratio vis_epochs"
    check_numbers(
        args, at_least_one="batch_size accum_iter epochs micro_batch", positive="kl_tau",
        not_negative=f"{not_negative} start_epoch distill_hidden",
    )  # fmt: skip
    if args.warmup_epochs is None:
        args.warmup_epochs = previous_settings(args).get("warmup_epochs", min(40, args.epochs / 10))
    weights = {"sim": args.sim_weight, "kl": args.kl_weight}
    args.weights = {name: weight for name, weight in weights.items() if weight and not args.no_distill}
    if not 0 < args.crop_min <= 1:
        raise InputError(f"--crop_min {args.crop_min}: must be in (0, 1]")
    if args.warmup_epochs > args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}: lower it")
    if args.start_epoch >= args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    if args.resume and (args.init or args.start_epoch):
        raise InputError("--resume goes on with a run, --init and --start_epoch start one: give only one of them")
    if args.no_distill and (args.text_bank or args.teacher_cache):
        raise InputError("--text_bank and --teacher_cache have no use with --no_distill: drop one of them")
    if not args.no_distill and not args.weights:
        raise InputError("--sim_weight 0 and --kl_weight 0 leave nothing to distil: use --no_distill")
    if args.teacher_norm != "none":
        if args.kl_weight:
            raise InputError(
                f"--kl_weight compares with texts, which --teacher_norm {args.teacher_norm} leaves: drop one"
            )
        if args.teacher_view == "crop" and not args.teacher_cache:
            cure = "add --teacher_view full or --teacher_cache"
            raise InputError(f"--teacher_norm {args.teacher_norm} needs the embeddings of all images: {cure}")


def take_recipe(args, images: int) -> None:
    """Give every flag that was not given its recipe's value; `args.recipe` becomes its name."""
    world = get_world_size()
    before = previous_settings(args)  # a run that goes on keeps its recipe; until November 2026 there was one only
    if args.recipe == "auto" and before:
        args.recipe = before.get("recipe", "paper")
    given = {name: getattr(args, name) for name in RECIPES["paper"] if getattr(args, name) is not None}
    paper = RECIPES["paper"] | given
    updates = images // (paper["batch_size"] * world) // args.accum_iter * paper["epochs"]
    if args.recipe == "auto":
        args.recipe = "small" if images < FEW_IMAGES or updates < FEW_UPDATES else "paper"
    values = dict(RECIPES[args.recipe])
    if args.recipe == "small":
        values["input_size"] = RECIPES["paper" if args.model else "small"]["input_size"]
        values["batch_size"] = max(min(values["batch_size"], images) // world, 1)
        batch = (given.get("batch_size") or values["batch_size"]) * world * args.accum_iter
        wanted = math.ceil(SMALL_UPDATES / max(images // batch, 1))
        values["epochs"] = min(max(values["epochs"], wanted), RECIPES["paper"]["epochs"])
    if args.teacher_cache and (cache := Path(args.teacher_cache) / HEADER).is_file():
        values["teacher_view"] = read_json(cache, "build it again with python -m tools.reinforce")["teacher_view"]
    if args.no_distill or args.kl_weight or (args.teacher_view == "crop" and not args.teacher_cache):
        values["teacher_norm"] = "none"
    args.by_recipe = {name: value for name, value in values.items() if name not in given}
    vars(args).update(args.by_recipe)


def resolve(args, paths) -> dict:
    """Everything derived from flags and data, as plain values; refuses runs that could not learn."""
    world, images = get_world_size(), len(paths)
    global_batch = args.batch_size * world
    batches = images // global_batch
    if batches < 1:
        cure = f"lower --batch_size to at most {max(images // world, 1)}"
        raise InputError(f"{images} images do not fill one batch of {global_batch} on {world} processes: {cure}")
    if args.accum_iter > batches:
        words = f"an epoch of {images} images has {batches} batches: use --accum_iter {batches} or less"
        raise InputError(f"--accum_iter {args.accum_iter} would never reach its effective batch, {words}")
    args.effective_batch = global_batch * args.accum_iter
    args.lr = args.blr * args.effective_batch / 256 if args.lr is None else args.lr
    if not math.isfinite(args.lr):
        raise InputError(f"--blr {args.blr:g} times the batch is no number any more: lower it")
    if args.micro_batch is None:
        args.micro_batch = args.batch_size if args.device == "cuda" else min(args.batch_size, 32)
    args.num_workers = default_workers() if args.num_workers is None else args.num_workers
    facts = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}
    facts |= {"world_size": world, "global_batch": global_batch, "images": images, "images_sha": paths.sha256()}
    return facts | {"updates_per_epoch": -(-batches // args.accum_iter)}


def header(args, facts: dict) -> list[str]:
    """What this run is going to do, before it does it."""
    is_scaled = args.lr == args.blr * args.effective_batch / 256
    origin = f" = blr {args.blr:g} x {args.effective_batch} / 256" if is_scaled else " (--lr)"
    updates, batch = facts["updates_per_epoch"], f"{args.batch_size} x {facts['world_size']} processes"
    lines = [
        f"recipe {args.recipe}: " + (", ".join(f"{n} {v}" for n, v in args.by_recipe.items()) or "all flags given")
    ]
    lines += [
        f"effective batch: {args.effective_batch} = {batch} x {args.accum_iter} accumulated; lr {args.lr:.4g}{origin}",
        f"images: {facts['images']} in {args.data_path}; {updates} updates an epoch, {updates * args.epochs} in "
        f"{args.epochs} epochs, {args.warmup_epochs:g} of warm-up",
    ]
    if (total := updates * args.epochs) < FEW_UPDATES:
        promise = "no more than of random weights" if total < USELESS_UPDATES else "features below those of a full run"
        lines.append(f"note: {total} updates: expect {promise}; lower --batch_size, or raise --epochs")
    lines.append(f"teacher: {facts['teacher']}")
    if args.no_distill:
        return lines
    weights = f"sim x {args.sim_weight:g}, kl x {args.kl_weight:g} at tau {facts['tau']:.4g}"
    if args.teacher_norm == "none":
        unused = "" if args.kl_weight else ", logged only: --kl_weight is 0"
        lines.append(f"text bank: {facts['text_bank_used']}{unused}")
    else:
        weights = f"sim x {args.sim_weight:g}, --teacher_norm {args.teacher_norm}"
    seen = {"crop": "student's crop", "full": "whole image"}[args.teacher_view]
    return [*lines, f"distillation: context {args.context}, {weights}, the teacher sees the {seen}"]


def main(args) -> dict[str, float]:
    """Run the training that `args` describe; returns the last epoch's numbers on rank 0."""
    check_given(args)
    return launch(args.device, args.output_dir, lambda device: train(args, device), args.dist_timeout)


def train(args, device: torch.device) -> dict[str, float]:
    started = time.time()
    args.device = device.type
    if not args.resume:
        refuse_used_folder(args.output_dir)
    run = build_run(args, device)
    files, writer = run.files, None
    if is_main_process():
        files.start(run.epoch)
        if run.text_bank:
            save_bank(run.output_dir / "text_bank.safetensors", *run.text_bank)
        writer = SummaryWriter(args.log_dir or run.output_dir, purge_step=run.epoch * 1000 + 1)  # finished epochs stay
    run.guard = StopGuard(lambda: files.save(run), is_main_process())
    record = files.last_record()  # of a run that is resumed and finished already
    with run.guard:
        while run.epoch < args.epochs:
            train_one_epoch(run, args)
            record = finish_epoch(run, args, writer)
    if not is_main_process():
        return {}
    files.export("encoder", run.bare)
    write_json(run.output_dir / "metrics.json", record)
    writer.close()
    duration = datetime.timedelta(seconds=int(time.time() - started))
    print(f"done in {duration}: {run.output_dir / 'encoder.pth'} holds the encoder")
    return record


def build_run(args, device: torch.device) -> PretrainRun:
    """Everything of a run that is ready to start or to go on; prints the header."""
    amp_dtype, precision = pick_precision(args.amp, device, previous_settings(args).get("precision", ""))
    facts, paths = check_files(args)
    cache = open_teacher_cache(args, device)
    if cache:  # its embeddings are of these crops of these images, or of none here
        wanted = {name: facts[name] for name in ("teacher_view", "seed", "crop_min", "images_sha")}
        cache.check(wanted | {"input_size": facts["img_size"]})
    teacher, distill, known, text_bank = build_teacher(args, device, amp_dtype, cache)
    facts |= known | machine_facts(amp_dtype)
    facts["crop_views"] = 0 if cache is None or cache.is_full else cache.num_views  # 0: new crops each epoch
    print_main(*header(args, facts))

    torch.manual_seed(args.seed)  # here: building a teacher has drawn random numbers, and one seed means one model
    bare = MODELS[args.model](img_size=args.img_size, norm_pix_loss=args.norm_pix_loss, distill=distill)
    bare.grad_checkpoint = args.grad_checkpoint
    if args.init:
        report = load_weights(bare, read_checkpoint(args.init)["model"], args.init, needed="encoder")
        print_main(f"weights from {args.init}:\n{report}")
    bare.to(device)
    settings = {name: facts[name] for name in ("model", "norm_pix_loss", "mask_ratio")}
    config = {"kind": "CGD-MAE encoder"} | settings | bare.settings()
    files = RunFiles(args, facts, config, FIXED_ON_RESUME, "--init")
    how = {"seed": args.seed, "min_area": args.crop_min, "teacher_cache": cache}
    dataset = PretrainDataset(paths, args.img_size, bare.num_patches, **how)
    batches = EpochBatches(len(paths), args.batch_size, get_rank(), get_world_size(), args.seed)
    loader = build_loader(dataset, batches, args.num_workers, args.pin_mem and device.type == "cuda", init_worker)
    optimizer = (MuonAdamW if args.opt == "muon" else build_adamw)(bare, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    more = {"epoch": args.start_epoch, "teacher": teacher, "text_bank": text_bank}
    run = PretrainRun(bare, bare, optimizer, scaler, loader, device, amp_dtype, files, **more)
    decision = files.resume(run, args.resume, args.allow_change)  # before DDP, which sends rank 0's weights to all
    if args.compile:
        for block in [*bare.blocks, *bare.decoder_blocks]:
            block.compile()  # one compilation serves all blocks of a shape: seconds, not minutes
        if teacher:
            teacher.compile()
    if get_world_size() > 1:
        run.model = wrap_ddp(bare, device, one_backward=args.accum_iter == 1 and args.micro_batch >= args.batch_size)
    workers = f"{facts['threads']} threads and {args.num_workers} data workers a rank"
    print_main(f"precision: {precision}; device: {device}; {workers}", f"start: {decision}")
    return run


def check_files(args) -> tuple[dict, PathList]:
    """(facts, images) after all that flags name was found, before a teacher is fetched."""
    paths = list_images(args.data_path, args.split)
    take_recipe(args, len(paths))
    check_args(args)
    facts = resolve(args, paths)
    args.init = str(fetch(args.init)) if args.init else ""
    for name, given in (("resume", args.resume), ("text_bank", args.text_bank)):
        if given and given != "auto" and not Path(given).exists():
            raise InputError(f"--{name} {given} does not exist: give a file that is there")
    if args.text_bank and not is_encoded(Path(args.text_bank)):
        read_texts(Path(args.text_bank))
    return facts, paths


def open_teacher_cache(args, device: torch.device) -> TeacherCache | None:
    """The cache that was given, or that a teacher of whole images fills at the start, once, beside the checkpoints."""
    if args.teacher_cache or args.no_distill or args.teacher_view == "crop":
        return TeacherCache(args.teacher_cache) if args.teacher_cache else None
    folder = Path(args.output_dir) / "teacher_cache"
    reinforce.build(argparse.Namespace(**vars(args) | {"output": str(folder), "views": 1, "batch_size": 128}), device)
    barrier()
    return TeacherCache(folder)


def build_teacher(args, device: torch.device, amp_dtype, cache: TeacherCache | None):
    """-> (teacher or None, keyword arguments of the distillation head or None, facts, what `save_bank` wants)."""
    if args.no_distill:
        return None, None, {"teacher": "none (plain MAE)"}, None
    teacher = None
    if cache:
        identity = cache.identity
        if args.teacher_cache and args.clip_model != CLIP_MODEL and teacher_name(args.clip_model) != identity.model:
            words = f"{args.teacher_cache} was made by {identity.model}: drop it, or make another by tools.reinforce"
            raise InputError(f"--clip_model {args.clip_model}: the --teacher_cache {words}")
        bank, texts, source = cache.bank(args.text_bank)
    else:
        clip, tokenizer, identity = load_teacher(args)
        clip.to(device)
        bank, texts, source = build_bank(args.text_bank, clip, tokenizer, identity)
        dtype = amp_dtype if device.type == "cuda" and amp_dtype else torch.float32
        teacher = FrozenTeacher(clip, identity, dtype).to(device)
    tau = args.kl_tau or identity.tau
    # what a continuation must share: texts, whose embeddings differ by device in last bits; else the numbers of a file
    is_file = cache or (args.text_bank and is_encoded(Path(args.text_bank)))
    sha = hashlib.sha256(bank.numpy().tobytes()).hexdigest() if is_file else hash_texts(texts)
    named = f"{identity.model} {identity.weights_sha256[:16]}"
    facts = {"teacher": named, "text_bank_used": source, "text_bank_sha": sha[:16], "tau": tau}
    distill = {"context": args.context, "bank": bank, "tau": tau, "hidden": args.distill_hidden}
    distill["target"] = None if args.teacher_norm == "none" else cache.whitening()
    return teacher, distill, facts, (bank, texts, identity)


def finish_epoch(run: PretrainRun, args, writer) -> dict[str, float]:
    """Log the epoch, move on to the next and save."""
    record, finished = epoch_record(run, args), run.epoch
    losses = {f"train_{name}": f"train_loss_{name}" for name in ("pixel", "sim", "kl")}
    record = {losses.get(name, name): value for name, value in record.items()}
    if "train_loss_sim" in record:
        record["train_cos"] = 1 - record["train_loss_sim"]
        record |= {f"train_{name}": value for name, value in trivial_distillation(*run.meter.read()).items()}
    end_epoch(run, record, ["loss", "pixel", "cos", "kl"], writer, scale=1000)
    if is_main_process() and args.vis_epochs and (run.epoch == args.epochs or run.epoch % args.vis_epochs == 0):
        panel = save_panels(run.bare, run.loader.dataset, run, finished, args.mask_ratio)
        writer.add_image("reconstruction", panel, run.epoch * 1000, dataformats="HWC")
    return record


if __name__ == "__main__":
    run_tool(main, ARGS, None)
