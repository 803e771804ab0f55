"""Fine-tune a pre-trained encoder on a task and score it, or score what is there.

    torchrun --nproc_per_node=1 main_finetune.py --task reid --data_path VeRi \\
        --finetune output_dir/encoder.pth --jpm --sie_camera --output_dir runs/veri
    python main_finetune.py --task reid --eval --resume runs/veri/model.pth --data_path VeRi --report

One process runs with plain `python main_finetune.py ...`.
"""

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_finetune import FinetuneRun, train_one_epoch
from finetune import attr, fgvc, reid, seg
from finetune.encoder import PIXEL_STATS, encoder_models
from util.cli import Parser, add_run_flags, parse_input_size
from util.dist import get_world_size, is_main_process, launch, print_main, wrap_ddp
from util.errors import InputError, run_or_explain
from util.fetch import fetch
from util.files import write_json
from util.loop import epoch_record, next_epoch, start_profiler
from util.parallel import default_workers
from util.precision import pick_precision
from util.run_files import RunFiles, refuse_used_folder
from util.stop import StopGuard, init_worker

TASKS = {"reid": reid, "attr": attr, "fgvc": fgvc, "seg": seg}
FIXED_ON_RESUME = (
    "task input_size stride drop_path finetune weights_sha256 pixel_stats quick_gelu images_sha num_classes "
    "global_batch epochs warmup_epochs lr min_lr_ratio warmup_lr_ratio weight_decay opt layer_decay "
    "bias_lr_factor head_lr_factor smoothing clip_grad seed"
).split()
NOT_NEGATIVE = (
    "warmup_epochs weight_decay clip_grad max_bad_ratio seed eval_every keep_checkpoints min_lr_ratio "
    "warmup_lr_ratio bias_lr_factor head_lr_factor"
).split()


def by_task(name: str) -> str:
    """ "reid 256, attr 224": the default that each task's recipe has for a flag."""
    return "default " + ", ".join(f"{task} {module.RECIPE[name]}" for task, module in TASKS.items())


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("main_finetune.py", add_help=False, allow_abbrev=False)
    # fmt: off
    parser.add_argument("--task", required=True, choices=list(TASKS), help="what to learn")

    add = parser.add_argument_group("encoder").add_argument
    add("--finetune", default="",
        help="weights of MAE, CGD-MAE, VehicleMAE, timm, Hugging Face, DINO, MoCo v3, CLIP, TransReID: a "
        "file, a name of `python -m tools.checkpoint list`, or an address (default none)")
    add("--model", default=None, choices=list(encoder_models()), metavar="NAME",
        help=f"one of {', '.join(encoder_models())}, to start from random weights (default: the file's)")
    add("--input_size", default=None, help=f"pixels: one side, or H,W ({by_task('input_size')})")
    add("--stride", default=None, type=int,
        help="px from patch to patch; 12: they overlap (default: the patch)")
    add("--drop_path", default=None, type=float,
        help=f"chance to skip the last block, growing linearly from 0 ({by_task('drop_path')})")
    add("--pixel_stats", default="checkpoint", choices=("checkpoint", *PIXEL_STATS),
        help="mean and std of pixels: the file's, ImageNet's, 0.5 as in TransReID, CLIP's (default "
        "checkpoint; where it says nothing CLIP's for CLIP, ImageNet's for others)")
    add("--pos_resize", default="bicubic", choices=("bicubic", "bilinear"),
        help="how the position table is resized (default bicubic)")
    add("--quick_gelu", action="store_true", help="OpenAI's CLIP was trained with it (default off)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", default=None, type=int, help=f"images per process ({by_task('batch_size')})")
    add("--epochs", default=None, type=int, help=f"length of the schedule in epochs ({by_task('epochs')})")
    add("--warmup_epochs", default=None, type=float,
        help=f"epochs of linear warm-up ({by_task('warmup_epochs')})")
    add("--opt", default=None, choices=("sgd", "adamw"),
        help=f"optimiser; momentum of sgd 0.9 ({by_task('opt')})")
    add("--lr", default=None, type=float,
        help="learning rate (default: the recipe's times all ranks' batch / the recipe's; docs/FINETUNE.md)")
    add("--min_lr_ratio", default=None, type=float,
        help=f"last learning rate / --lr ({by_task('min_lr_ratio')})")
    add("--warmup_lr_ratio", default=None, type=float,
        help=f"first learning rate / --lr ({by_task('warmup_lr_ratio')})")
    add("--bias_lr_factor", default=None, type=float,
        help=f"learning rate of biases / --lr ({by_task('bias_lr_factor')})")
    add("--head_lr_factor", default=None, type=float,
        help=f"learning rate of what is not the encoder's / --lr ({by_task('head_lr_factor')})")
    add("--layer_decay", default=1.0, type=float,
        help="learning rate of a layer / the next one's (default 1)")
    add("--weight_decay", default=None, type=float, help=f"weight decay ({by_task('weight_decay')})")
    add("--clip_grad", default=None, type=float,
        help=f"largest gradient norm, 0 for none ({by_task('clip_grad')})")
    add("--smoothing", default=None, type=float, help=f"label smoothing ({by_task('smoothing')})")

    for module in TASKS.values():
        module.add_flags(parser)

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of the set, or a table; docs/FINETUNE.md has the layouts")
    add("--max_bad_ratio", default=0.01, type=float,
        help="stop above this fraction of unreadable training images (default 0.01)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="score --resume FILE, or the encoder --finetune (default off)")
    add("--eval_every", default=0, type=int,
        help="epochs between evaluations, 0: after the last only; they choose nothing (default 0)")
    add("--report", action="store_true",
        help="write report.html: numbers, curves and pictures (default off)")

    add_run_flags(parser, None, "folder of the run (default runs/TASK; with --eval eval_SET beside the model)")
    # fmt: on
    return parser


def check_args(args) -> None:
    """Contradictions among flags, before anything is loaded; fills derived values.

    Raises:
        InputError: one sentence on the first contradiction.
    """
    fill_recipe(args)
    args.img_size = parse_input_size(args.input_size)
    for name in ("batch_size", "epochs", "print_freq", "save_freq", "max_bad_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in NOT_NEGATIVE:
        if getattr(args, name) < 0:
            raise InputError(f"--{name} {getattr(args, name)}: must not be negative")
    for name in ("drop_path", "smoothing"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be in [0, 1)")
    if not 0 < args.layer_decay <= 1:
        raise InputError(f"--layer_decay {args.layer_decay}: must be in (0, 1]")
    if args.lr is not None and args.lr <= 0:
        raise InputError(f"--lr {args.lr}: must be positive")
    if args.warmup_epochs >= args.epochs:
        raise InputError(
            f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}: use "
            f"--warmup_epochs {args.epochs // 10}"
        )
    if args.eval and bool(args.resume) == bool(args.finetune):
        raise InputError("--eval scores one model: give --resume MODEL, or --finetune ENCODER as it is")
    if args.eval and args.resume == "auto":
        raise InputError("--eval --resume auto: name the file, for example --resume runs/veri/model.pth")
    if args.output_dir is None:
        model = Path(args.resume or args.finetune)
        data = Path(args.data_path).stem
        args.output_dir = str(model.parent / f"eval_{data}") if args.eval else f"runs/{args.task}"
    if args.finetune:
        args.finetune = str(fetch(args.finetune))
    if args.num_workers is None:
        args.num_workers = default_workers()
    if args.num_workers < 0:
        raise InputError(f"--num_workers {args.num_workers}: must not be negative")
    args.accum_iter = 1
    TASKS[args.task].check(args)


def fill_recipe(args) -> None:
    """What no flag says is the task's recipe; `args.given` names the flags that say something.

    Raises:
        InputError: a flag of another task.
    """
    if not hasattr(args, "given"):  # not of `parse_args`: by their values
        defaults = vars(get_args_parser().parse_args(["--task", args.task, "--data_path", ""]))
        args.given = [name for name, value in vars(args).items() if value != defaults.get(name, value)]
    for task, module in TASKS.items():
        own = argparse.ArgumentParser()
        module.add_flags(own)
        for name in vars(own.parse_args([])):
            if name in args.given and task != args.task:
                raise InputError(f"--{name} belongs to --task {task}: drop it for --task {args.task}")
    for name, value in TASKS[args.task].RECIPE.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def main(args) -> dict:
    """Train and score, or with --eval only score; returns the numbers on rank 0."""
    check_args(args)
    job = evaluate if args.eval else train
    return launch(args.device, args.output_dir, lambda device: job(args, device), args.dist_timeout)


def evaluate(args, device: torch.device) -> dict:
    amp_dtype, _ = pick_precision(args.amp, device)
    return finish(args, TASKS[args.task].evaluate_file(args, device, amp_dtype))


def train(args, device: torch.device) -> dict:
    started = time.time()
    args.device = device.type
    if not args.resume:
        refuse_used_folder(args.output_dir)
    run = build_run(args, device)
    files, writer = run.files, None
    if is_main_process():
        files.start(run.epoch)
        writer = SummaryWriter(args.log_dir or run.output_dir, purge_step=run.epoch + 1)
    if args.profile:
        start_profiler(run, args.profile)
    run.guard = StopGuard(lambda: files.save(run), is_main_process())
    with run.guard:
        while run.epoch < args.epochs:
            train_one_epoch(run, args)
            finish_epoch(run, args, writer)
            if args.eval_every and run.epoch % args.eval_every == 0 and run.epoch < args.epochs:
                log_evaluation(run, run.task.evaluate(False))
    if is_main_process():
        files.export_model(run.bare)
        print(f"{run.output_dir / 'model.pth'} holds the model; scoring it", flush=True)
        writer.close()
    scored = run.task.evaluate(True)
    log_evaluation(run, scored)
    print_main(f"done in {datetime.timedelta(seconds=int(time.time() - started))}")
    return finish(args, scored)


def finish(args, scored: dict) -> dict:
    if is_main_process():
        write_json(Path(args.output_dir) / "metrics.json", scored)
        print(json.dumps(scored), flush=True)
    return scored


def build_run(args, device: torch.device) -> FinetuneRun:
    """A run that is ready to start or to go on; prints the header."""
    amp_dtype, precision = pick_precision(args.amp, device)
    module = TASKS[args.task]
    args.global_batch = args.batch_size * get_world_size()
    if args.lr is None:
        args.lr = module.default_lr(args) * args.global_batch / module.RECIPE["batch_size"]
    task = module.build(args, device, amp_dtype)
    facts = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()} | task.facts
    facts |= {"world_size": get_world_size()}
    files = RunFiles(args, facts, task.config, [*FIXED_ON_RESUME, *module.FIXED], "--finetune")
    loader = DataLoader(
        task.dataset,
        batch_sampler=task.batches,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        worker_init_fn=init_worker,
    )
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    run = FinetuneRun(task.model, task.model, task.optimizer, scaler, loader, device, amp_dtype, files, task=task)
    decision = files.resume(run, args.resume, args.allow_change)
    if args.compile:
        for block in task.model.base.blocks:
            block.compile()
    if get_world_size() > 1:
        run.model = wrap_ddp(task.model, device, one_backward=True)
    print_main(
        *task.header,
        f"batch {args.global_batch} ({args.batch_size} x {get_world_size()} processes), {args.opt}, lr "
        f"{args.lr:.4g}, {args.epochs} epochs, {args.warmup_epochs:g} of warm-up, seed {args.seed}",
        f"precision: {precision}; device: {device}; {args.num_workers} data workers a rank",
        f"start: {decision}",
    )
    return run


def finish_epoch(run: FinetuneRun, args, writer) -> None:
    """Log the epoch, move on to the next and save."""
    record = epoch_record(run, args.global_batch, run.batches_done)
    finished, is_last = run.epoch, run.epoch + 1 == args.epochs
    run.files.log(record)  # before the epoch counts as done: a resumed run drops lines of epochs it repeats
    next_epoch(run)
    if is_main_process():
        for name, value in record.items():
            writer.add_scalar(name, value, run.epoch)
        if (finished + 1) % args.save_freq == 0 or is_last:
            run.files.save_epoch(run)
        run.files.save(run)
        print(f"epoch {finished}: " + "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "epoch"), flush=True)


def log_evaluation(run: FinetuneRun, scored: dict) -> None:
    """A line of log.txt; not a second one where a finished run is scored again."""
    if not scored:
        return
    record = {f"test_{name}": value for name, value in scored.items()} | {"epoch": run.epoch - 1}
    log = run.output_dir / "log.txt"
    if not log.is_file() or json.dumps(record) not in log.read_text().splitlines():
        run.files.log(record)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; `given` names what it says, also where that is the default."""
    args = Parser("main_finetune.py", __doc__, parents=[get_args_parser()]).parse_args(words)
    silent = Parser("main_finetune.py", __doc__, parents=[get_args_parser()])
    for action in silent._actions:  # set_defaults would convert the marker to the flag's type
        action.default = argparse.SUPPRESS
    args.given = list(vars(silent.parse_args(words)))
    return args


if __name__ == "__main__":
    parsed = parse_args()
    run_or_explain(lambda: main(parsed))
