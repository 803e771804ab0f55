"""Store the teacher's embedding of every view that training will draw, once, instead of running the
teacher in every epoch.

    python -m tools.reinforce --data_path PHOTOS --views 10 --output cache
    python main_pretrain.py --data_path PHOTOS --teacher_cache cache ...

Under torchrun the ranks share the work. A build that was stopped goes on where it was.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.manifest import list_images
from datasets.pretrain import PretrainDataset
from datasets.teacher_cache import HEADER, SHARD_IMAGES, TeacherCache, cache_header, shard_file, shard_files
from datasets.text_bank import is_encoded, load_bank, read_encoded, read_texts, save_bank
from models_teacher import FrozenTeacher, build_bank, load_clip
from util.cli import Parser, parse_input_size, run_tool
from util.dist import end_distributed, get_rank, get_world_size, init_distributed, pick_device, print_main
from util.errors import InputError
from util.files import write_atomic
from util.parallel import claim
from util.precision import pick_amp_dtype
from util.progress import Progress
from util.stop import init_worker


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.reinforce", __doc__)
    add = parser.add_argument
    add("--data_path", required=True, help="folder or manifest, as for main_pretrain.py")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all)")
    add("--output", required=True, help="folder of the cache")
    add("--views", default=10, type=int, help="views an image, K; epoch e uses e mod K (default 10)")
    add(
        "--teacher_view",
        default="crop",
        choices=("crop", "full"),
        help="the training crops, or one vector of the whole image (default crop)",
    )
    add("--input_size", default="224", help="pixels of the student: one side, or H,W (default 224)")
    add("--crop_min", default=0.2, type=float, help="smallest crop, fraction of area (default 0.2)")
    add("--seed", default=0, type=int, help="seed of the training run (default 0)")
    add("--clip_model", default="ViT-L-14", help="open_clip name or JSON config (default ViT-L-14)")
    add("--clip_pretrained", default="openai", help="open_clip tag or weight file (default openai)")
    add("--text_bank", default=None, help="texts to encode beside (default: built-in vocabulary)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes per rank (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "none"),
        help="precision of the teacher on CUDA (default auto)",
    )
    add("--compile", action="store_true", help="torch.compile the teacher (default off)")
    add(
        "--verify",
        default=0,
        type=int,
        metavar="N",
        help="recompute N entries of a finished cache and compare (default 0: build)",
    )
    return parser


class OneView(Dataset):
    """Items [first, last) of one view: what the teacher sees, as uint8."""

    def __init__(self, source: PretrainDataset, view: int, indices):
        self.source, self.view, self.indices = source, view, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int):
        sample = self.source[self.view, int(self.indices[item])]
        return sample.get("teacher_imgs", sample["imgs"]), sample["problem"]


def embed_view(teacher, source: PretrainDataset, view: int, indices, args, device, progress=None):
    """-> ([len(indices), D_t] float32, list of problems)."""
    loader = DataLoader(
        OneView(source, view, indices), args.batch_size, num_workers=args.num_workers, worker_init_fn=init_worker
    )
    rows, problems = [], []
    for imgs, problem in loader:
        rows.append(teacher(imgs.to(device, non_blocking=True)).cpu())
        problems += [p for p in problem if p]
        if progress:
            progress(len(imgs))
    return torch.cat(rows), problems


def main(args) -> dict:
    device = pick_device(args.device)
    init_distributed(device, timeout_s=600)
    try:
        result = build_or_verify(args, device)
        return result if get_rank() == 0 else {}
    finally:
        end_distributed()


def build_or_verify(args, device) -> dict:
    if args.views < 1:
        raise InputError(f"--views {args.views}: must be at least 1")
    if args.teacher_view == "full":
        args.views = 1
    size = parse_input_size(args.input_size)
    amp_dtype = pick_amp_dtype(args.amp, device)[0] if device.type == "cuda" else None
    clip, tokenizer, identity = load_clip(args.clip_model, args.clip_pretrained)
    clip.to(device)
    paths = list_images(args.data_path, args.split)
    header = cache_header(
        asdict(identity),
        args.views,
        teacher_view=args.teacher_view,
        seed=args.seed,
        crop_min=args.crop_min,
        input_size=list(size),
        images_sha=paths.sha256(),
        images=len(paths),
    )
    folder = Path(args.output)
    claim(folder / HEADER, header, "cache")
    bank_file = folder / "text_bank.safetensors"
    if get_rank() == 0 and not bank_file.is_file():
        bank, texts, _ = build_bank(args.text_bank, clip, tokenizer, identity)
        save_bank(bank_file, bank, texts, identity)
    elif get_rank() == 0 and args.text_bank and not same_bank(bank_file, Path(args.text_bank), identity):
        raise InputError(
            f"{bank_file} holds another bank than --text_bank {args.text_bank}: delete it to have this one "
            "taken, or choose another --output"
        )
    teacher = FrozenTeacher(clip, identity, amp_dtype or torch.float32).to(device)
    if args.compile:
        teacher.compile()
    source = PretrainDataset(
        paths,
        size,
        1,
        seed=args.seed,
        min_area=args.crop_min,
        teacher_size=teacher.size if args.teacher_view == "full" else None,
    )
    if args.verify:
        return verify(args, folder, teacher, source, device)
    return build(args, folder, header, teacher, source, device)


def same_bank(kept: Path, given: Path, identity) -> bool:
    """Whether an encoded bank came from `given`: by its texts, and by its numbers where they are given, too.
    Nothing is encoded again, which on another machine would give other last bits."""
    bank, texts = load_bank(kept, identity)
    if is_encoded(given):
        other, other_texts, _ = read_encoded(given, identity)
        return texts == other_texts and torch.equal(bank, other)
    return texts == read_texts(given)


def build(args, folder: Path, header: dict, teacher, source: PretrainDataset, device) -> dict:
    images, views = header["images"], header["views"]
    size = images * views * header["teacher"]["embed_dim"] * 2
    print_main(
        f"{images} images x {views} views x {header['teacher']['embed_dim']} float16 = {size / 1e9:.3f} GB in {folder}"
    )
    shards = -(-images // SHARD_IMAGES)
    jobs = [(v, s) for v in range(views) for s in range(shards)]
    # shared out before looking what is there: ranks that look at different moments must not disagree
    todo = [job for job in jobs[get_rank() :: get_world_size()] if not shard_file(folder, *job).is_file()]
    total = sum(min(SHARD_IMAGES, images - s * SHARD_IMAGES) for _, s in todo)
    progress = Progress("teacher", total, shown=get_rank() == 0)
    started, done, bad = time.perf_counter(), 0, set()
    last_line = started

    def count(n: int):
        nonlocal done, last_line
        done += n
        if time.perf_counter() - last_line > 10 or done == total:
            last_line = time.perf_counter()
            progress.update(done, f"{done / (last_line - started):.0f} img/s")

    for view, shard in todo:
        indices = np.arange(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, images))
        rows, problems = embed_view(teacher, source, view, indices, args, device, count)
        bad |= set(problems)
        values = rows.half().numpy()
        write_atomic(shard_file(folder, view, shard), lambda f, v=values: np.save(f, v))
    progress.close()
    for problem in sorted(bad):
        print(f"unreadable, the next image stands in: {problem}")
    seconds = time.perf_counter() - started
    return {
        "images": images,
        "views": views,
        "written": done,
        "unreadable": len(bad),
        "bytes": size,
        "seconds": seconds,
        "images_per_s": done / max(seconds, 1e-9),
        "files": len(shard_files(folder, header)),
    }


def verify(args, folder: Path, teacher, source: PretrainDataset, device) -> dict:
    cache = TeacherCache(folder)
    rng = np.random.Generator(np.random.Philox(key=[args.seed, args.verify]))
    smallest = 1.0
    for view in range(cache.num_views):
        indices = rng.integers(0, len(source), -(-args.verify // cache.num_views))
        rows, _ = embed_view(teacher, source, view, indices, args, device)
        stored = torch.stack([cache.read(view, int(i)) for i in indices]).float()
        smallest = min(smallest, (rows * stored).sum(dim=1).min().item())
    if smallest < 0.999:
        raise InputError(
            f"{folder} fails: an entry has cosine {smallest:.4f} to its recomputation "
            "(0.999 is needed); remove it and build it again"
        )
    return {"verified": args.verify, "smallest_cosine": smallest}


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
