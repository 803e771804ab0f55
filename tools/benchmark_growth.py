"""Time and memory of every stage before training, for longer and longer lists of images.

    python -m tools.benchmark_growth --images 10000 100000 1000000

A thousand small JPEGs are listed again and again. Stages, each in a process of its own: `manifest` (read a
CSV of N rows), `pack` (tools.pack), `start` (open the packed set, shuffle an epoch, first batch from two
workers; what a worker holds for itself is in worker_mb), `cache` (tools.reinforce, whole-image view, a
miniature teacher with random weights). Linear stages keep their microseconds an image.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from datasets.manifest import list_images
from datasets.pretrain import EpochBatches, PretrainDataset, build_loader
from tools import pack, reinforce
from util.checkpoint import write_torch
from util.cli import Parser, run_tool
from util.errors import InputError
from util.files import write_json
from util.stop import init_worker

STAGES = ("manifest", "pack", "start", "cache")
TEACHER = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.benchmark_growth", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--images", nargs="+", default=[10_000, 100_000], type=int, metavar="N",
        help="lengths of the list (default 10000 100000)")
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="NAME",
        help=f"of {', '.join(STAGES)}; start and cache need pack (default all)")
    add("--folder", default=None, help="where to work (default: a temporary folder)")
    add("--output", default="benchmark_growth.json", help="file (default benchmark_growth.json)")
    # fmt: on
    return parser


def main(args) -> dict:
    if min(args.images) < 1000:
        raise InputError(f"--images {min(args.images)}: at least 1000")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_pictures(folder / "pictures")
        rows = [row for count in sorted(args.images) for row in measure(count, folder, args.stages)]
    return {"torch": torch.__version__, "rows": rows}


def measure(count: int, folder: Path, stages: list[str]) -> list[dict]:
    """One row a stage, for a list of `count` images."""
    with open(folder / f"list{count}.csv", "w") as opened:
        opened.write("path,split\n")
        opened.writelines(f"pictures/{i % 1000:04d}.jpg,train\n" for i in range(count))
    rows = []
    for stage in (name for name in STAGES if name in stages):
        context = multiprocessing.get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=run_stage, args=(stage, count, folder, send))
        process.start()
        row = {"images": count, "stage": stage} | receive.recv()
        process.join()
        row["us_per_image"] = row["seconds"] / count * 1e6
        rows.append(row)
        worker = f"  worker {row['worker_mb']:.0f} MB" if "worker_mb" in row else ""
        print(
            f"{count:9d}  {stage:8s}  {row['seconds']:9.2f} s  {row['us_per_image']:8.1f} us an image  "
            f"peak {row['peak_mb']:6.0f} MB{worker}",
            flush=True,
        )
    return rows


def run_stage(stage: str, count: int, folder: Path, send) -> None:
    """In a process of its own: sends {"seconds", "peak_mb", perhaps "worker_mb"}."""
    multiprocessing.set_start_method("fork", force=True)  # as in a run; this process itself was spawned
    packed = folder / f"packed{count}"
    started = time.perf_counter()
    more = {}
    if stage == "manifest":
        list_images(folder / f"list{count}.csv", "train")
    elif stage == "pack":
        flags = ["--data_path", str(folder / f"list{count}.csv"), "--output", str(packed)]
        pack.main(pack.get_args_parser().parse_args(flags))
    elif stage == "start":
        more["worker_mb"] = start(packed)
    else:
        config, weights = make_teacher(folder)
        texts = folder / "texts.txt"
        texts.write_text("a car\na van\n")
        flags = f"--data_path {packed} --output {folder}/cache{count} --teacher_view full --input_size 32"
        flags += f" --clip_model {config} --clip_pretrained {weights} --text_bank {texts} --batch_size 512"
        reinforce.main(reinforce.get_args_parser().parse_args(flags.split()))
    seconds = time.perf_counter() - started
    send.send({"seconds": seconds, "peak_mb": status_mb("self", "VmHWM"), **more})


def start(packed: Path) -> float:
    """Everything a run does with its list before the first batch is there; MB private to a worker."""
    paths = list_images(packed)
    paths.sha256()
    dataset = PretrainDataset(paths, (32, 32), 4, seed=0, min_area=0.2)
    batches = EpochBatches(len(paths), 64, 0, 1, 0)
    loader = build_loader(dataset, batches, 2, False, init_worker)
    first = iter(loader)
    for _ in range(8):
        next(first)
    worker = multiprocessing.active_children()[0].pid
    rollup = Path(f"/proc/{worker}/smaps_rollup").read_text()
    return int(rollup.split("Private_Dirty:")[1].split()[0]) / 1e3


def status_mb(pid: str, field: str) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{field}:")[1].split()[0]) / 1e3


def make_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(1000):
        small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        small.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.jpg", quality=80)


def make_teacher(folder: Path) -> tuple[Path, Path]:
    config, weights = folder / "GrowthClip.json", folder / "growth.pt"
    write_json(config, TEACHER)
    open_clip.add_model_config(config)
    write_torch(weights, open_clip.create_model("GrowthClip").state_dict())
    return config, weights


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output))
