"""A task that exists in docs/FINETUNE.md alone: its two files are taken from the page, and trained."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import finetune
import main_finetune
from finetune import flags
from tests.conftest import ROOT, parse


@pytest.fixture
def fifth_task(tmp_path, monkeypatch):
    """The page's files as modules of their packages, and its entry in `TASKS`."""
    page = (ROOT / "docs" / "FINETUNE.md").read_text()
    blocks = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", page, re.S)
    assert [name for name, _ in blocks] == ["datasets/years.py", "finetune/year.py", "finetune/flags.py"]
    for (name, text), package in zip(blocks, (datasets, finetune)):
        file = tmp_path / "code" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
    exec(blocks[2][1], dict(vars(flags)))
    yield
    del flags.TASKS["year"]
    for name in ("finetune.year", "datasets.years"):
        sys.modules.pop(name, None)


@pytest.fixture
def years(tmp_path):
    """Brighter pictures are newer."""
    rng, rows = np.random.default_rng(0), ["path,year,split"]
    for index in range(48):
        pixels = np.clip(rng.normal(40 + 4 * index, 10, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,{1980 + index},{'val' if index % 3 == 0 else 'train'}")
    (tmp_path / "years.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "years.csv"


def test_the_page_s_fifth_task_trains_resumes_and_scores(fifth_task, years, tmp_path):
    torch.manual_seed(0)
    words = ["--task", "year", "--data_path", str(years), "--device", "cpu", "--num_workers", "0"]
    new = ["--model", "vit_tiny_patch16", "--input_size", "32", "--batch_size", "16", "--warmup_epochs", "1"]

    def run(*more):
        return main_finetune.main(parse(main_finetune.get_args_parser(), [*words, *more]))

    out = str(tmp_path / "run")
    found = run(*new, "--epochs", "12", "--lr", "1e-3", "--output_dir", out)
    assert found["mean_years_off"] < 8  # the middle year is 12 off
    again = run("--eval", "--resume", f"{out}/model.pth", "--batch_size", "16")
    assert again == found
    torch.load(f"{out}/model.pth", weights_only=True)
    with pytest.raises(ValueError, match="an encoder has no answers for --task year before it is trained"):
        run("--eval", "--finetune", f"{out}/model.pth")
    with pytest.raises(ValueError, match="--year_beta belongs to --task year"):
        more = ["--task", "reid", "--data_path", "x", "--model", "vit_tiny_patch16", "--year_beta", "2"]
        main_finetune.main(parse(main_finetune.get_args_parser(), more))  # also what the default is
    assert run(*new, "--epochs", "12", "--lr", "1e-3", "--output_dir", out, "--resume", "auto") == found
    with pytest.raises(ValueError, match="year_beta"):
        run(*new, "--epochs", "12", "--lr", "1e-3", "--output_dir", out, "--resume", "auto", "--year_beta", "1")
