"""The walks of docs/ONE_IMAGE.md and docs/WALKS.md: what they name is called, in that order, at most 20 a walk."""

import importlib
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT, small_flags
from layouts import write_demo_reid

import main_curate
import main_finetune
import main_pretrain
from demo.pool import POOL
from tools import checkpoint
from util import dist

NAMED = r"`([\w/]+\.py): ([\w.]+)`"
SECTIONS = (ROOT / "docs" / "WALKS.md").read_text().split("\n## ")
WALKS = {"image": (ROOT / "docs" / "ONE_IMAGE.md").read_text()}
WALKS |= {name: text for name, text in zip(("query", "pool", "checkpoint"), SECTIONS[1:])}


class InProcess:
    """A pool of processes that works here, where it is seen."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, chunk):
        done = function(chunk)
        return SimpleNamespace(result=lambda: done)


def make_run(name, tmp_path, pictures, teacher_files, monkeypatch):
    """Make what the walk needs; what then calls its functions."""
    config, weights = teacher_files
    clip = f"--clip_model {config} --clip_pretrained {weights}"
    timm_file = tmp_path / "timm.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=64).state_dict(), timm_file)
    if name == "image":
        program, words = main_pretrain, small_flags(pictures, tmp_path / "run", *clip.split())
    if name == "query":
        write_demo_reid(tmp_path / "veri", "veri776", train_ids=5, test_ids=5, images_per_id=6, processes=1)
        words = f"--task reid --eval --data_path {tmp_path}/veri --finetune {timm_file} --input_size 64"
        program, words = main_finetune, f"{words} --num_workers 0 --output_dir {tmp_path}/eval --device cpu".split()
    if name == "pool":
        POOL.write(tmp_path / "pool", num_images=100, size=48, processes=1)
        words = f"--pool a={tmp_path}/pool/photos --exclude b={tmp_path}/pool/benchmark --output {tmp_path}/data {clip}"
        words += " --target_size 20 --min_side 20 --levels 8 3 --resampling 1 --num_workers 0 --device cpu"
        program, words = main_curate, f"{words} --near_cosine 0.9999 --leak_cosine 0.9999".split()
        monkeypatch.setattr("curation.index.worker_pool", lambda workers, for_all: InProcess())
        monkeypatch.setattr(dist, "_shared", (main_curate.open_sources([words[1]], [words[3]], {}), 0.0))
    if name == "checkpoint":
        program, words = checkpoint, f"convert {timm_file} --to mae --output {tmp_path}/mae.pth".split()
    args = program.get_args_parser().parse_args(words)
    return lambda: program.main(args)


def called(run) -> list:
    """Code of all functions that `run` calls, in the order of their first calls."""
    seen = {}
    sys.setprofile(lambda frame, event, _: seen.setdefault(frame.f_code, None) if event == "call" else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return list(seen)


def code_of(file: str, name: str):
    found = importlib.import_module(file[:-3].replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.unwrap(found).__code__


@pytest.mark.parametrize("name", WALKS)
def test_walks_name_what_is_called_in_its_order(name, tmp_path, pictures, teacher_files, monkeypatch):
    named = re.findall(NAMED, WALKS[name])
    assert 6 <= len(named) <= 20
    codes = called(make_run(name, tmp_path, pictures, teacher_files, monkeypatch))
    place = {file_and_name: codes.index(code_of(*file_and_name)) for file_and_name in named}
    assert list(place) == sorted(place, key=place.get), sorted(place.items(), key=lambda item: item[1])
