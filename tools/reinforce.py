"""Store the teacher's embedding of every view that training will draw, once, instead of running it in every epoch.

    python -m tools.reinforce --data_path PHOTOS --views 10 --output cache
    python main_pretrain.py --data_path PHOTOS --teacher_cache cache ...

Under torchrun the ranks share the work. A build that was stopped goes on where it was.
"""

import argparse
from pathlib import Path

from util.cli import Parser, add_teacher_flags, check_numbers, parse_input_size, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.reinforce", __doc__)
    add, views = parser.add_argument, "the training crops, or one vector of the whole image (default crop)"
    add("--data_path", required=True, help="folder or manifest, as for main_pretrain.py")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all)")
    add("--output", required=True, help="folder of the cache")
    add("--views", default=10, type=int, help="views an image, K; epoch e uses e mod K (default 10)")
    add("--teacher_view", default="crop", choices=("crop", "full"), help=views)
    add("--input_size", default="224", help="pixels of the student: one side, or H,W (default 224)")
    add("--crop_min", default=0.2, type=float, help="smallest crop, fraction of area (default 0.2)")
    add("--seed", default=0, type=int, help="seed of the training run (default 0)")
    add_teacher_flags(add)
    add("--text_bank", default=None, help="texts to encode beside (default: built-in vocabulary)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes per rank (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"), help="precision on CUDA (default auto)")
    add("--compile", action="store_true", help="torch.compile the teacher (default off)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from datasets.items import PretrainDataset, WholeImages
from datasets.path_list import list_images, printable
from datasets.teacher import HEADER, SHARD_IMAGES, VOCABULARY, read_shard, save_bank, shard_file, shards, write_shard
from models_teacher import FrozenTeacher, build_bank, load_teacher
from util.cli import Progress
from util.dist import claim, get_rank, get_world_size, init_worker, launch, print_main
from util.errors import InputError
from util.files import file_sha256
from util.precision import pick_precision


def main(args) -> dict:
    check_numbers(args, at_least_one="views")
    return launch(args.device, args.output, partial(build, args))


def open_cache(args, device: torch.device) -> tuple[dict, Callable]:
    """(header, `embed(view, indices)`, which yields ([n, D_t] float32, problems) batch by batch)."""
    size, is_full = parse_input_size(args.input_size), args.teacher_view == "full"
    amp_dtype = pick_precision(args.amp if device.type == "cuda" else "none", device)[0]
    paths, folder = list_images(args.data_path, args.split), Path(args.output)
    texts = Path(args.text_bank) if args.text_bank else VOCABULARY
    if not texts.exists():
        raise InputError(f"--text_bank {texts} does not exist")
    clip, tokenizer, identity = load_teacher(args)
    clip.to(device)
    header = {"kind": "cgd-mae teacher cache", "teacher": asdict(identity), "views": 1 if is_full else args.views}
    header |= {"teacher_view": args.teacher_view, "seed": args.seed, "crop_min": args.crop_min}
    header |= {"input_size": list(size), "images_sha": paths.sha256(), "images": len(paths)}
    header |= {"text_bank": file_sha256(texts / "bank.npy" if texts.is_dir() else texts)}
    claim(folder / HEADER, header, "cache")
    bank = folder / "text_bank.safetensors"
    if get_rank() == 0 and not bank.is_file():  # encoded once: another machine would give other last bits
        save_bank(bank, *build_bank(args.text_bank, clip, tokenizer, identity)[:2], identity)
    teacher = FrozenTeacher(clip, identity, amp_dtype or torch.float32).to(device)
    if args.compile:
        teacher.compile()
    crops = PretrainDataset(paths, size, 1, seed=args.seed, min_area=args.crop_min)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers, "worker_init_fn": init_worker}

    def embed(view: int, indices: np.ndarray):
        if is_full:
            found = ((imgs, bad) for imgs, _, bad in DataLoader(WholeImages(paths, indices, teacher.size), **loading))
        else:
            items = [(view, index) for index in indices.tolist()]
            found = ((batch["imgs"], batch["problem"]) for batch in DataLoader(crops, sampler=items, **loading))
        for imgs, problems in found:
            embeddings = teacher(imgs.to(device, non_blocking=True)).cpu()
            if not embeddings.isfinite().all():
                raise InputError("the teacher gives numbers that are not finite: check its weights, or use --amp none")
            yield embeddings, problems

    return header, embed


def build(args, device: torch.device) -> dict:
    """Compute what is missing, shard by shard; the ranks take turns. Rows of unreadable images stay zero, and are tried
    again when the same command runs again."""
    (header, embed), folder = open_cache(args, device), Path(args.output)
    images, views, width = header["images"], header["views"], header["teacher"]["embed_dim"]
    size, started, bad = images * views * width * 2, time.perf_counter(), set()
    print_main(f"{images} images x {views} views x {width} float16 = {size / 1e9:.3f} GB in {folder}")
    # shared out before looking what is there: ranks that look at different moments must not disagree
    mine, written = shards(header)[get_rank() :: get_world_size()], 0
    total = sum(min(SHARD_IMAGES, images - first) for _, first in mine)
    progress = Progress("teacher", total, shown=get_rank() == 0)
    for view, first in mine:
        rows = np.zeros((min(SHARD_IMAGES, images - first), width), np.float16)
        if shard_file(folder, view, first).is_file():
            try:
                rows = read_shard(folder, header, view, first)
            except InputError as error:
                print(f"made again: {error}")
        indices, done = np.flatnonzero(~rows.any(axis=1)), 0
        progress.update(progress.done + len(rows) - len(indices))
        for embeddings, problems in embed(view, first + indices):
            good = [i for i, problem in enumerate(problems) if not problem]
            rows[indices[done:][good]] = embeddings[good].half().numpy()
            bad.update(filter(None, problems))
            done += len(embeddings)
            progress.update(progress.done + len(embeddings))
        if done:
            write_shard(folder, view, first, rows)
        written += done
    progress.close()
    for problem in sorted(bad):
        print(f"unreadable, without an embedding until this command runs again: {printable(problem)}")
    if get_rank():
        return {}
    seconds = time.perf_counter() - started
    result = {"images": images, "views": views, "written": written, "unreadable": len(bad), "bytes": size}
    return result | {"seconds": seconds, "images_per_s": written / max(seconds, 1e-9)}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
