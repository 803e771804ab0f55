"""Finished runs become the paper's tables: what stands where, what is left out and why."""

import json
import re
import subprocess
import tarfile

import pytest
import torch
from conftest import ROOT, parse
from layouts import write_demo_reid

import main_finetune
from models_vit import VisionTransformer
from tools import results_table
from util.checkpoint import weights_sha256
from util.errors import InputError
from util.run_files import code_commit

A, B = "a" * 64, "b" * 64
VERI = "veri776 (same-camera matches removed, cosine, no re-ranking) #2ef7f79a"


def write_run(folder, metrics: dict, commit="c" * 40, **changed):
    """A run's folder as main_finetune.py leaves it; `changed` are args, None removes one."""
    args = {
        "task": "reid", "seed": 0, "weights_sha256": A, "finetune": "out/cgd/encoder.pth", "epochs": 3,
        "images": 37_778, "num_classes": 575, "images_sha": "1", "data_path": "/data/VeRi", "lr": 0.01,
        "output_dir": str(folder), "batch_size": 64, "global_batch": 64, "jpm": True, "attr_threshold": 0.45,
        "given": ["jpm", "output_dir", "lr"],
    }  # fmt: skip
    args = {name: value for name, value in (args | changed).items() if value is not None}
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "env.json").write_text(json.dumps({"torch": "2", "commit": commit}))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = [{"train_loss": 1.0, "epoch": 2}, {f"test_{k}": v for k, v in metrics.items()} | {"epoch": 2}]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def veri(mAP: float, queries=1678, gallery=11_579, protocol=VERI) -> dict:
    return {"mAP": mAP, "R1": mAP + 0.1, "R5": 0.99, "queries": queries, "gallery": gallery,
            "protocol": protocol}  # fmt: skip


def table(tmp_path, *more) -> tuple[str, dict]:
    words = [str(tmp_path / "runs"), "--output", str(tmp_path / "results.md"), *more]
    counts = results_table.main(results_table.get_args_parser().parse_args(words))
    return (tmp_path / "results.md").read_text(), counts


def section(text: str, heading: str) -> str:
    """The table under the heading that begins so."""
    return next(part for part in text.split("\n## ")[1:] if part.startswith(heading))


def column(part: str, start: str, title: str, row: int = 0) -> str:
    """A cell of a row that begins with `start`."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return [line for line in lines if line[0].startswith(start)][row][lines[0].index(title)]


def test_seeds_become_a_mean_beside_published_rows(tmp_path):
    for seed, value in enumerate((0.80, 0.82, 0.87)):
        folder = tmp_path / "runs" / "cgd" / str(seed)
        write_run(folder, veri(value), seed=seed, num_workers=seed, batch_size=64 >> seed)
    write_run(tmp_path / "runs" / "mae", veri(0.7), weights_sha256=B, finetune="out/mae/encoder.pth")
    write_run(tmp_path / "runs" / "none", veri(0.3), weights_sha256="random", finetune="", model="vit_b")
    text, counts = table(tmp_path)
    assert counts["runs"] == 5 and counts["rows"] == 3 and counts["left_out"] == 0
    part = section(text, "reid veri776\n")
    assert column(part, "**cgd/encoder.pth aaaaaaaa**", "mAP") == "**83.0 ± 3.6 (3 seeds)**"
    assert column(part, "**cgd/encoder.pth aaaaaaaa**", "R1") == "**93.0 ± 3.6 (3 seeds)**"
    assert column(part, "**mae/encoder.pth bbbbbbbb**", "mAP") == "**70.0 (1 seed)**"
    assert column(part, "**random weights**", "mAP") == "**30.0 (1 seed)**"
    assert column(part, "VehicleMAE, Autobot1M", "mAP") == "85.6"
    assert part.index("VehicleMAE, Autobot1M") < part.index("**cgd/encoder.pth aaaaaaaa**")
    assert "CGD-MAE" not in section(text, "reid vehicleid/800")
    behind, recipe = (column(part, "**cgd/encoder.pth aaaaaaaa**", title) for title in ("from", "recipe"))
    assert behind.count(f"commit {'c' * 12}") == 3 and "seed 2" in behind
    assert recipe.startswith("jpm, lr 0.01 (") and f"weights {A[:16]}" in recipe
    assert recipe.split(";")[0] == column(part, "**mae/", "recipe").split(";")[0]  # one recipe, other weights


def test_other_sets_never_stand_beside_published_numbers(tmp_path):
    """Nor other rules on the published one."""
    cases = {
        "drawn": (veri(0.11, 200, 640), {"images": 960, "num_classes": 60, "data_path": "/data/demo_veri"}),
        "few": (veri(0.12, 1677), {}),
        "gallery": (veri(0.13, gallery=11_000), {}),
        "train": (veri(0.14), {"images": 37_000}),
        "kept": (veri(0.15, protocol=VERI.replace("veri776", "veri776/same-camera-kept")), {}),
        "lost": (veri(0.16, protocol=VERI.replace("veri776", "veri776/2-unreadable-left-out")), {}),
    }
    for seed, (name, (metrics, changed)) in enumerate(cases.items(), 1):
        write_run(tmp_path / "runs" / name, metrics, seed=seed, **changed)
    write_run(tmp_path / "runs" / "true", veri(0.8) | {f"reranked_{k}": v for k, v in veri(0.88).items()})
    text, counts = table(tmp_path)
    assert counts["runs"] == 7 and counts["left_out"] == 0
    assert section(text, "reid veri776\n").count("**cgd/encoder.pth aaaaaaaa**") == 1 and "80.0 (1 seed)" in text
    others = [part for part in text.split("\n## ") if ", as veri776" in part.splitlines()[0]]
    assert len(others) == 6 and all(any(f"**{10 + i}.0 (1 seed)**" in part for part in others) for i in range(1, 7))
    assert "88.0 (" not in text  # re-ranked: another protocol
    assert f"reid demo_veri, as {VERI}; train 960, classes 60, test 200, gallery 640;" in text
    assert "train 37,778, classes 575, test 1,677, gallery 11,579" in text


def test_every_task_has_its_table(tmp_path):
    sizes = {"800": 5693.0, "1600": 11_777.0, "2400": 17_377.0}
    vehicleid = {
        f"{size}_{name}": value
        for size, queries in sizes.items()
        for name, value in {"mAP": 0.9, "R1": 0.85, "R5": 0.97, "R1_std": 0.1, "queries": queries,
                            "protocol": f"vehicleid/{size} (1 gallery image a vehicle, 10 draws)"}.items()
    }  # fmt: skip
    runs = tmp_path / "runs"
    write_run(runs / "id", vehicleid, images=113_346, num_classes=13_164)
    attr = {"mA": 0.9, "accuracy": 0.8, "F1": 0.85, "constant_mA": 0.5, "images": 11_579,
            "protocol": "veri776 (19 attributes, true above 0.45, F1 averaged over images)"}  # fmt: skip
    write_run(runs / "attr", attr, task="attr", num_classes=19)
    write_run(runs / "attr5", attr | {"mA": 0.91}, task="attr", num_classes=19, attr_threshold=0.5)
    cars = {"top1": 0.92, "mean_class_accuracy": 0.91, "majority": 0.01, "images": 8041,
            "protocol": "StanfordCars: 8041 test images of 196 classes; whole picture"}  # fmt: skip
    write_run(runs / "cars", cars, task="fgvc", images=8144, num_classes=196)
    seg = {"mIoU": 0.7, "mAcc": 0.8, "aAcc": 0.9, "parts_mIoU": None, "parts_mAcc": 0.6, "images": 99,
           "protocol": "parts/car_parts/test (4 classes, 99 images; the whole image)"}  # fmt: skip
    write_run(runs / "seg", seg, task="seg", images=500, num_classes=4)
    text, counts = table(tmp_path)
    assert counts["left_out"] == 0 and counts["rows"] == 7
    wanted = {f"reid vehicleid/{size}\n": ("R1", "85.0") for size in sizes}
    wanted |= {"attr veri776\n": ("mA", "90.00"), "fgvc StanfordCars\n": ("top-1", "92.0")}
    for heading, (title, value) in wanted.items():
        assert column(section(text, heading), "**cgd/encoder.pth aaaaaaaa**", title) == f"**{value} (1 seed)**"
    part = section(text, "seg PartImageNet vehicles\n")
    assert "**" not in part and column(part, "VehicleMAE, Autobot1M", "mIoU") == "73.29"
    assert "| **70.00 (1 seed)** | **80.00 (1 seed)** | **90.00 (1 seed)** | **60.00 (1 seed)** |" in text
    other = next(part for part in text.split("\n## ") if "91.00 (1 seed)" in part)
    assert column(other, "**cgd", "mA of a constant") == "**50.00 (1 seed)**" and "VehicleMAE" not in other


def test_recipes_are_kept_apart(tmp_path):
    write_run(tmp_path / "runs" / "a", veri(0.80))
    write_run(tmp_path / "runs" / "b", veri(0.81), lr=0.02)
    write_run(tmp_path / "runs" / "c", veri(0.90), seed=1, lr=0.02, finetune="elsewhere/encoder.pth")
    text, counts = table(tmp_path)
    found = {column(section(text, "reid veri776\n"), "**cgd/encoder.pth aaaaaaaa**", "mAP", row) for row in (0, 1)}
    assert counts["rows"] == 2 and found == {"**80.0 (1 seed)**", "**85.5 ± 6.4 (2 seeds)**"}


def test_what_lacks_its_origin_is_listed_and_not_printed(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "good", veri(0.80))
    write_run(runs / "twice", veri(0.41))
    write_run(runs / "no_seed", veri(0.42), seed=None)
    write_run(runs / "no_hash", veri(0.43), weights_sha256=None)
    write_run(runs / "no_commit", veri(0.44), commit="unknown")
    write_run(runs / "other_tool", veri(0.45), task=None)
    (write_run(runs / "no_env", veri(0.46)) / "env.json").unlink()
    (write_run(runs / "running", veri(0.47)) / "metrics.json").unlink()
    (write_run(runs / "cut", veri(0.48)) / "metrics.json").write_text('{"mAP": 0.4')
    write_run(runs / "longer", veri(0.49), epochs=4)
    (write_run(runs / "moved", veri(0.51)) / "metrics.json").write_text(json.dumps(veri(0.52)))
    write_run(runs / "empty", {"R1": 0.5, "protocol": VERI})
    (runs / "scored").mkdir()
    (runs / "scored" / "metrics.json").write_text(json.dumps(veri(0.53)))
    odd = {"bytes": b"\xff", "empty line": b"\n", "list": b"[1]\n", "deep": b"[" * 100_000, "digits": b"9" * 5000}
    for name, content in odd.items():
        (write_run(runs / name, veri(0.54)) / "log.txt").write_bytes(content)
    text, counts = table(tmp_path)
    assert counts["runs"] == 1 and counts["left_out"] == 12 + len(odd)
    reasons = {
        "twice": "the same config, weights and seed as", "no_seed": "no seed", "no_hash": "no weights_sha256",
        "no_commit": "no commit", "other_tool": "not a run of main_finetune.py", "no_env": "no commit",
        "running": "the run has not ended", "cut": "metrics.json cannot be read",
        "longer": "does not end with the numbers of metrics.json after 4 epochs",
        "moved": "does not end with the numbers", "empty": "does not end with the numbers",
        "scored": "no args.json",
    } | dict.fromkeys(odd, "log.txt cannot be read")  # fmt: skip
    for name, reason in reasons.items():
        assert reason in column(section(text, "Left out"), f"`{runs / name}`", "reason"), name
    assert not re.search(r"(4\d|5[1-4])\.0 \(1 seed\)", text)


@pytest.mark.parametrize(
    "words, message",
    [
        ("nowhere --output x.md", "no args.json and no metrics.json in or below nowhere"),
        ("{runs} --output x.txt", "ends in .md"),
        ("{runs}/empty --output x.md", "no args.json and no metrics.json in or below"),
    ],
)
def test_refusals(tmp_path, words, message):
    runs = tmp_path / "runs"
    write_run(runs / "good", veri(0.8))
    (runs / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        results_table.main(results_table.get_args_parser().parse_args(words.format(runs=runs).split()))


def test_counts_of_the_published_sets():
    assert results_table.SIZES["reid veriwild/10000"] == (277_797, 30_671, 10_000, 128_517)
    assert results_table.SIZES["reid vehicleid/1600"] == (113_346, 13_164, 11_777, None)
    assert len(results_table.SIZES) == 9


def test_the_commit_of_a_checkout_of_an_archive_and_of_neither(tmp_path):
    (tmp_path / "util").mkdir()
    assert code_commit(tmp_path) == "unknown"
    for written, commit in ((f"{'d' * 40}\n", "d" * 40), ("$Format:%H$\n", "unknown")):
        (tmp_path / "util" / "commit.txt").write_text(written)
        assert code_commit(tmp_path) == commit
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    (tmp_path / "util" / "commit.txt").write_text((ROOT / "util" / "commit.txt").read_text())
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = code_commit(tmp_path)
    assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")
    subprocess.run([*git, "archive", "HEAD", "-o", str(tmp_path / "code.tar")], check=True)
    with tarfile.open(tmp_path / "code.tar") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert code_commit(tmp_path / "unpacked") == commit
    (tmp_path / "util" / "commit.txt").write_text("changed")
    assert code_commit(tmp_path) == f"{commit} + changes"


def test_runs_of_main_finetune_say_what_the_table_needs(tmp_path):
    """Real runs of two seeds: one row of the drawn set, with the hash of the weights and the commit."""
    write_demo_reid(tmp_path / "set", "veri776", train_ids=5, test_ids=5, images_per_id=6, size=32, processes=1)
    weights = tmp_path / "weights" / "encoder.pth"
    weights.parent.mkdir()
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 2, 3).state_dict()}, weights)
    found = []
    for seed in (0, 1):
        words = f"--task reid --data_path {tmp_path / 'set'} --finetune {weights} --input_size 32 --epochs 1"
        words += f" --warmup_epochs 0 --batch_size 8 --num_workers 0 --device cpu --amp none --seed {seed}"
        words += f" --output_dir {tmp_path / 'runs' / str(seed)} --opt adamw --lr 1e-3"
        found.append(main_finetune.main(parse(main_finetune.get_args_parser(), words.split())))
    (tmp_path / "runs" / "notes.txt").write_text("not a run")
    assert json.loads((tmp_path / "runs" / "0" / "env.json").read_text())["commit"] == code_commit()
    if code_commit() == "unknown":
        pytest.skip("no git checkout: such runs are left out")
    text, counts = table(tmp_path)
    assert counts["runs"] == 2 and counts["rows"] == 1
    part = section(text, "reid set, as veri776 (")
    assert "train 30, classes 5," in part.splitlines()[0]
    recipe = column(part, "**", "recipe")
    assert weights_sha256(weights)[:16] in recipe
    assert recipe.startswith("input_size 32, epochs 1, warmup_epochs 0.0, opt adamw, lr 0.001, amp none (")
    mean = 50 * (found[0]["mAP"] + found[1]["mAP"])
    assert f"| **{mean:.1f} ± " in part and "(2 seeds)" in text
