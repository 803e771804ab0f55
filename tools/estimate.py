"""Hours and memory of a whole recipe, from 30 steps of it. Takes the flags of main_pretrain.py.

    python -m tools.estimate --data_path PHOTOS --batch_size 256 --epochs 400 --accum_iter 8 --norm_pix_loss

A step is one piece of --micro_batch images through the real data path, teacher and student; the optimiser is
timed apart and counted once an update. The first fifth of the steps is not counted. Nothing is saved but
OUTPUT_DIR/estimate/metrics.json.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from engine_pretrain import forward_backward, to_device
from main_pretrain import build_run, get_args_parser
from util.cli import Parser, run_tool
from util.dist import end_distributed, get_world_size, init_distributed, is_main_process, pick_device
from util.errors import InputError
from util.loop import apply_update
from util.meter import peak_gigabytes
from util.progress import Progress
from util.settings import check_args
from util.stop import hear_no_deaths_at_exit


def get_estimate_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.estimate", __doc__, parents=[get_args_parser()])
    parser.add_argument("--steps", default=30, type=int, help="steps to run (default 30)")
    return parser


def main(args) -> dict:
    if args.steps < 5:
        raise InputError(f"--steps {args.steps}: at least 5 are needed to see past the start")
    check_args(args)
    device = pick_device(args.device)
    args.device = device.type
    hear_no_deaths_at_exit()
    init_distributed(device, args.dist_timeout)
    try:
        result = estimate(args, device)
    finally:
        end_distributed()
    return result if is_main_process() else {}


def estimate(recipe, device: torch.device) -> dict:
    args = copy.copy(recipe)
    args.output_dir = str(Path(recipe.output_dir) / "estimate")
    args.micro_batch = recipe.micro_batch or (
        recipe.batch_size if device.type == "cuda" else min(recipe.batch_size, 32)
    )
    args.batch_size, args.accum_iter, args.resume = args.micro_batch, 1, ""
    run, _, facts, lines = build_run(args, device)
    run.model.train()
    skipped, spent = args.steps // 5, {"data": 0.0, "pieces": 0.0, "update": 0.0}
    progress = Progress("steps", args.steps, shown=is_main_process())
    watch = QuietWatch()
    clock = stopwatch(device)
    next(clock)
    for step, batch in enumerate(islice(endless(run), args.steps)):
        data = next(clock)
        terms = forward_backward(run, to_device(run, batch), args, True, args.weights, 1.0, watch)
        pieces = next(clock)
        apply_update(run, args, [terms], [], watch, args.lr, step + 1)
        update = next(clock)
        if step >= skipped:
            for name, seconds in (("data", data), ("pieces", pieces), ("update", update)):
                spent[name] += seconds / (args.steps - skipped)
        progress.update(step + 1)
    progress.close()
    world = get_world_size()
    pieces_an_update = recipe.batch_size * recipe.accum_iter / args.micro_batch
    seconds = spent["data"] + spent["pieces"] + spent["update"] / pieces_an_update
    images_per_s = args.micro_batch * world / seconds
    hours = facts["images"] * recipe.epochs / images_per_s / 3600
    result = {
        "images_per_s": images_per_s,
        "hours": hours,
        "epoch_minutes": hours / recipe.epochs * 60,
        "peak_gigabytes": peak_gigabytes(device),
        "data_wait": spent["data"] / seconds,
        "micro_batch": args.micro_batch,
        "images": facts["images"],
        "epochs": recipe.epochs,
        "world_size": world,
    }
    if is_main_process():
        print("\n".join(lines))
        print(
            f"{recipe.epochs} epochs of {facts['images']} images at {images_per_s:.4g} images/s: "
            f"{hours:.3g} hours ({result['epoch_minutes']:.3g} minutes an epoch), "
            f"{result['peak_gigabytes']:.3g} GB a process with --micro_batch {args.micro_batch}, "
            f"{result['data_wait']:.0%} of the time waiting for images"
        )
    return result


def endless(run) -> Iterator[dict]:
    """Batches of epoch after epoch."""
    epoch = 0
    while True:
        run.loader.batch_sampler.set_epoch(epoch)
        yield from run.loader
        epoch += 1


def stopwatch(device: torch.device) -> Iterator[float]:
    """Seconds since the last `next`, with the device's work done."""
    last = time.perf_counter()
    while True:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        yield now - last
        last = now


class QuietWatch:
    """Stands where the training loop looks at its numbers."""

    def piece(self, images: int, total: int) -> None: ...

    def add(self, *update) -> None: ...


if __name__ == "__main__":
    ARGS = get_estimate_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output_dir) / "estimate" / "metrics.json")
