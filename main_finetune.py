"""Fine-tune a pre-trained encoder on a task and score it, or score what is there.

    torchrun --nproc_per_node=1 main_finetune.py --task reid --data_path VeRi \\
        --finetune output_dir/encoder.pth --jpm --sie_camera --output_dir runs/veri
    python main_finetune.py --task reid --eval --resume runs/veri/model.pth --data_path VeRi --report

One process runs with plain `python main_finetune.py ...`. `--task reid --help` shows the flags of that task.
"""

import argparse

from finetune.flags import TASKS, add_task_flags, check_args, fixed_flags
from util.cli import Parser, add_run_flags, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("main_finetune.py", __doc__)
    add_task_flags(parser)
    add_run_flags(parser, None, "folder of the run (default runs/TASK; with --eval eval_SET beside the model)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import datetime
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_finetune import FinetuneRun, train_one_epoch
from finetune.task import task_to_score, task_to_train
from util.dist import get_world_size, init_worker, is_main_process, launch, print_main, wrap_ddp
from util.errors import InputError
from util.fetch import fetch, known
from util.files import write_json
from util.loop import StopGuard, end_epoch, epoch_record
from util.precision import default_workers, machine_facts, pick_precision
from util.run_files import RunFiles, previous_settings, refuse_used_folder

# with `fixed_flags`, what makes a continuation another run; --allow_change NAME lets one through
FIXED_ON_RESUME = "task finetune weights_sha256 images_sha num_classes text_vectors global_batch seed".split()


def main(args) -> dict:
    """Train and score, or with --eval only score; returns the numbers on rank 0."""
    check_args(args)
    check_files(args)
    if args.num_workers is None:
        args.num_workers = default_workers()
    job = evaluate if args.eval else train
    scored = launch(args.device, args.output_dir, lambda device: job(args, device), args.dist_timeout)
    if scored:
        write_json(Path(args.output_dir) / "metrics.json", scored)
    return scored


def check_files(args) -> None:
    """Files and names that flags give, before anything is read or downloaded."""
    if args.finetune and "://" not in args.finetune and args.finetune not in known():
        fetch(args.finetune)
    for flag in ("resume", "before", "attr_vectors", "clip_pretrained"):
        file = getattr(args, flag, "")
        is_tag = flag == "clip_pretrained" and Path(file).suffix not in (".pt", ".pth", ".bin", ".safetensors")
        if not (file == "" or is_tag or Path(file).is_file() or (flag, file) == ("resume", "auto")):
            raise InputError(f"--{flag} {file} does not exist: give a file")
    fixed = [*FIXED_ON_RESUME, *fixed_flags(args.task)]
    if unknown := sorted(set(args.allow_change) - set(fixed)):
        raise InputError(f"--allow_change {' '.join(unknown)}: choose among {', '.join(fixed)}")


def evaluate(args, device: torch.device) -> dict:
    pick_precision("none", device)
    return task_to_score(args, device).evaluate()


def train(args, device: torch.device) -> dict:
    started = time.time()
    args.device = device.type
    if not args.resume:
        refuse_used_folder(args.output_dir)
    run, writer = build_run(args, device), None
    if is_main_process():
        run.files.start(run.epoch)
        writer = SummaryWriter(args.log_dir or run.output_dir, purge_step=run.epoch + 1)
    run.guard = StopGuard(lambda: run.files.save(run), is_main_process())
    with run.guard:
        while run.epoch < args.epochs:
            train_one_epoch(run, args)
            end_epoch(run, epoch_record(run, args), ["loss", *run.task.shown], writer)
    if is_main_process():
        run.files.export("model", run.bare)
        print(f"{run.output_dir / 'model.pth'} holds the model; scoring it", flush=True)
        writer.close()
    scored = run.task.evaluate()
    record = {f"test_{name}": value for name, value in scored.items()} | {"epoch": run.epoch - 1}
    if scored and run.files.last_record() != record:  # not a second time where a finished run is scored again
        run.files.log(record)
    print_main(f"done in {datetime.timedelta(seconds=int(time.time() - started))}")
    return scored


def build_run(args, device: torch.device) -> FinetuneRun:
    """A run that is ready to start or to go on; prints the header."""
    amp_dtype, precision = pick_precision(args.amp, device, previous_settings(args).get("precision", ""))
    about = TASKS[args.task]
    args.global_batch = args.batch_size * get_world_size()
    if args.lr is None:
        args.lr = about.default_lr(args) * args.global_batch / about.recipe["batch_size"]
    task = task_to_train(args, device)
    facts = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}
    facts |= task.facts() | machine_facts(amp_dtype) | {"world_size": get_world_size()}
    files = RunFiles(args, facts, task.config, [*FIXED_ON_RESUME, *fixed_flags(args.task)], "--finetune")
    loader = DataLoader(
        task.dataset, batch_sampler=task.batches, num_workers=args.num_workers, worker_init_fn=init_worker,
        pin_memory=args.pin_mem and device.type == "cuda", persistent_workers=args.num_workers > 0,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    run = FinetuneRun(task.model, task.model, task.optimizer, scaler, loader, device, amp_dtype, files, task=task)
    decision = files.resume(run, args.resume, args.allow_change)
    if args.compile:
        for block in task.model.base.blocks:
            block.compile()
    if get_world_size() > 1:
        run.model = wrap_ddp(task.model, device, one_backward=True)
    print_main(
        f"batch {args.global_batch} ({args.batch_size} x {get_world_size()} processes), {args.opt}, lr "
        f"{args.lr:.4g}, {args.epochs} epochs, {args.warmup_epochs:g} of warm-up, seed {args.seed}",
        f"precision: {precision}; device: {device}; {facts['threads']} threads, {args.num_workers} data workers a rank",
        f"start: {decision}",
    )
    return run


if __name__ == "__main__":
    run_tool(main, ARGS, None)
