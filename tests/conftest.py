"""Inputs that tests make for themselves: pictures, a miniature teacher, ready-made arguments."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from util.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
CLIP_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_pictures(folder: Path, count: int, size=(48, 40), seed=0) -> Path:
    """Smooth random pictures, so that there is something to predict."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:04d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 40)


@pytest.fixture(scope="session")
def teacher_files(tmp_path_factory) -> tuple[Path, Path]:
    """(config, weights) of a miniature open_clip model with random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    config, weights = folder / "MiniClip-test.json", folder / "weights.pt"
    config.write_text(json.dumps(CLIP_CONFIG))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("MiniClip-test").state_dict(), weights)
    return config, weights


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("a red car\na blue bus\na white van\na black truck\na green tram\n")
    return file


def small_flags(data: Path, output: Path, *more: str) -> list[str]:
    """Flags of a run of seconds: 40 pictures at 32 px, tiny model, CPU."""
    return (
        f"--data_path {data} --output_dir {output} --model mae_vit_tiny_patch16 --input_size 32 "
        "--batch_size 8 --epochs 2 --warmup_epochs 1 --norm_pix_loss --num_workers 0 --print_freq 1 "
        "--device cpu --amp none --vis_epochs 0 --recipe paper"
    ).split() + list(more)


def parse(parser: argparse.ArgumentParser, flags: list[str]):
    return parser.parse_args(flags)


def run_main(program, *words) -> dict:
    """`python PROGRAM WORDS` in this process."""
    return program.main(program.get_args_parser().parse_args([*map(str, words)]))


def refuses(message: str, use, *given, **more) -> None:
    """`use` ends in an InputError that says `message`."""
    with pytest.raises(InputError, match=message):
        use(*given, **more)


def run_finetune(words: list[str]) -> dict:
    """`python main_finetune.py WORDS` in this process."""
    import main_finetune

    return main_finetune.main(main_finetune.get_args_parser().parse_args(words))


def command(*words: str, processes: int = 1) -> list[str]:
    """`python main_x.py ...` or the same under torchrun on a free port."""
    if processes == 1:
        return [sys.executable, *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={processes}", *words]


def run_command(words: list[str], timeout: float = 300) -> subprocess.CompletedProcess:
    """Run what `command` has made: in processes that need not import torch again."""
    if words[0] != sys.executable or words[1] == "-c":
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    words, processes = words[1:], 1
    if words[:2] == ["-m", "torch.distributed.run"]:
        processes, words = int(words[3].partition("=")[2]), words[4:]
    return forked.run(words, processes, timeout)


def read_log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
