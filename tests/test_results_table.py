"""Finished runs become the paper's tables: what stands where, what is left out and why."""

import json
import re
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, refuses, run_finetune, run_main
from layouts import write_demo_reid

from models_vit import VisionTransformer
from tools import results_table
from util.checkpoint import weights_sha256, write_safetensors
from util.run_files import code_commit

A, B = "a" * 64, "b" * 64
VERI = "veri776 (same-camera matches removed, cosine, no re-ranking) #2ef7f79a"
OURS = "**cgd/encoder.pth aaaaaaaa**"


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
    for name, content in {"args": args, "env": {"torch": "2", "commit": commit}, "metrics": metrics}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    lines = [{"train_loss": 1.0, "epoch": 2}, {f"test_{k}": v for k, v in metrics.items()} | {"epoch": 2}]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def veri(mAP: float, queries=1678, gallery=11_579, protocol=VERI) -> dict:
    return {"mAP": mAP, "R1": mAP + 0.1, "R5": 0.99, "queries": queries, "gallery": gallery, "protocol": protocol}


def table(tmp_path) -> tuple[str, dict]:
    counts = run_main(results_table, tmp_path / "runs", "--output", tmp_path / "results.md")
    return (tmp_path / "results.md").read_text(), counts


def section(text: str, heading: str) -> str:
    """The table under the heading that begins so."""
    return next(part for part in text.split("\n## ")[1:] if part.startswith(heading))


def column(part: str, start: str, title: str, row: int = 0) -> str:
    """A cell of a row that begins with `start`."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return [line for line in lines if line[0].startswith(start)][row][lines[0].index(title)]


def test_a_row_beats_another_on_the_same_queries(tmp_path):
    """Four points of mAP on 200 queries: sure where every query gains a little, not where it is chance; and only on the
    same queries."""
    rng = np.random.default_rng(0)
    base = rng.random(200).astype(np.float32) * 0.9
    base[3] = np.nan  # has no match
    found = {"mae": (base, "q", B), "cgd": (base + 0.04, "q", A), "same": (rng.permutation(base), "q", "d" * 64)}
    found["other"] = base - 0.3, "r", "e" * 64
    for name, (ap, queries, weights) in found.items():
        folder = write_run(tmp_path / "runs" / name, veri(float(np.nanmean(ap))), weights_sha256=weights)
        write_safetensors(folder / "queries.safetensors", {"test mAP": torch.from_numpy(ap)}, {"test": queries})
    part = section(table(tmp_path)[0], "reid veri776\n")
    lines = [line for line in part.splitlines() if line.startswith("- ")]
    assert len(lines) == 3 and not any("eeeeeeee" in line for line in lines)
    sure = next(line for line in lines if "aaaaaaaa" in line and "bbbbbbbb" in line)
    assert " beats " in sure and "mAP +4.0, 95% 4.0 to 4.0, p 0.001; 199 queries, 1 and 1 seeds" in sure
    assert "does not differ clearly" in next(line for line in lines if "dddddddd" in line and "bbbbbbbb" in line)


def test_seeds_become_a_mean_beside_published_rows(tmp_path):
    runs = tmp_path / "runs"
    for seed, value in enumerate((0.80, 0.82, 0.87)):
        write_run(runs / "cgd" / str(seed), veri(value), seed=seed, num_workers=seed, batch_size=64 >> seed)
    write_run(runs / "mae", veri(0.7), weights_sha256=B, finetune="out/mae/encoder.pth")
    write_run(runs / "none", veri(0.3), weights_sha256="random", finetune="", model="vit_b")
    write_run(runs / "other", veri(0.81), lr=0.02)  # another recipe, whose seeds lie in several places
    write_run(runs / "place", veri(0.90), seed=1, lr=0.02, finetune="elsewhere/encoder.pth")
    text, counts = table(tmp_path)
    assert counts["runs"] == 7 and counts["rows"] == 4 and counts["left_out"] == 0
    part = section(text, "reid veri776\n")
    means = [column(part, OURS, "mAP", row) for row in (0, 1)]
    assert means == ["**83.0 ± 3.6 (3 seeds)**", "**85.5 ± 6.4 (2 seeds)**"]
    assert column(part, OURS, "R1") == "**93.0 ± 3.6 (3 seeds)**"
    others = ("**mae/encoder.pth bbbbbbbb**", "**random weights**", "VehicleMAE, Autobot1M")
    assert [column(part, name, "mAP") for name in others] == ["**70.0 (1 seed)**", "**30.0 (1 seed)**", "85.6"]
    assert part.index("VehicleMAE, Autobot1M") < part.index(OURS)
    assert "CGD-MAE" not in section(text, "reid vehicleid/800")
    behind, recipe = (column(part, OURS, title) for title in ("from", "recipe"))
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
    assert section(text, "reid veri776\n").count(OURS) == 1 and "80.0 (1 seed)" in text
    others = [part for part in text.split("\n## ") if ", as veri776" in part.splitlines()[0]]
    assert len(others) == 6 and all(any(f"**{10 + i}.0 (1 seed)**" in part for part in others) for i in range(1, 7))
    assert "88.0 (" not in text  # re-ranked: another protocol
    assert f"reid demo_veri, as {VERI}; train 960, classes 60, test 200, gallery 640;" in text
    assert "train 37,778, classes 575, test 1,677, gallery 11,579" in text


def test_every_task_has_its_table(tmp_path):
    runs, vehicleid = tmp_path / "runs", {}
    for size, queries in {"800": 5693.0, "1600": 11_777.0, "2400": 17_377.0}.items():
        found = {"mAP": 0.9, "R1": 0.85, "R5": 0.97, "R1_std": 0.1, "queries": queries}
        found["protocol"] = f"vehicleid/{size} (1 gallery image a vehicle, 10 draws)"
        vehicleid |= {f"{size}_{name}": value for name, value in found.items()}
    write_run(runs / "id", vehicleid, images=113_346, num_classes=13_164)
    attr = {"mA": 0.9, "accuracy": 0.8, "F1": 0.85, "constant_mA": 0.5, "images": 11_579}
    attr["protocol"] = "veri776 (19 attributes, true above 0.45, F1 averaged over images)"
    write_run(runs / "attr", attr, task="attr", num_classes=19)
    write_run(runs / "attr5", attr | {"mA": 0.91}, task="attr", num_classes=19, attr_threshold=0.5)
    cars = {"top1": 0.92, "mean_class_accuracy": 0.91, "majority": 0.01, "images": 8041}
    cars["protocol"] = "StanfordCars: 8041 test images of 196 classes; whole picture"
    write_run(runs / "cars", cars, task="fgvc", images=8144, num_classes=196)
    seg = {"mIoU": 0.7, "mAcc": 0.8, "aAcc": 0.9, "parts_mIoU": None, "parts_mAcc": 0.6, "images": 99}
    seg["protocol"] = "parts/car_parts/test (4 classes, 99 images; the whole image)"
    write_run(runs / "seg", seg, task="seg", images=500, num_classes=4)
    text, counts = table(tmp_path)
    assert counts["left_out"] == 0 and counts["rows"] == 7
    wanted = {f"reid vehicleid/{size}\n": ("R1", "85.0") for size in (800, 1600, 2400)}
    wanted |= {"attr veri776\n": ("mA", "90.00"), "fgvc StanfordCars\n": ("top-1", "92.0")}
    for heading, (title, value) in wanted.items():
        assert column(section(text, heading), OURS, title) == f"**{value} (1 seed)**"
    part = section(text, "seg PartImageNet vehicles\n")
    assert "**" not in part and column(part, "VehicleMAE, Autobot1M", "mIoU") == "73.29"
    assert "| **70.00 (1 seed)** | **80.00 (1 seed)** | **90.00 (1 seed)** | **60.00 (1 seed)** |" in text
    other = next(part for part in text.split("\n## ") if "91.00 (1 seed)" in part)
    assert column(other, "**cgd", "mA of a constant") == "**50.00 (1 seed)**" and "VehicleMAE" not in other
    sizes = results_table.SIZES
    assert len(sizes) == 9 and sizes["reid veriwild/10000"] == (277_797, 30_671, 10_000, 128_517)


LEFT_OUT = {  # name: (what is changed in args, a file's new content or None: removed, reason)
    "twice": ({}, {}, "the same config, weights and seed as"),
    "no_seed": ({"seed": None}, {}, "no seed"),
    "no_hash": ({"weights_sha256": None}, {}, "no weights_sha256"),
    "no_commit": ({"commit": "unknown"}, {}, "no commit"),
    "other_tool": ({"task": None}, {}, "not a run of main_finetune.py"),
    "longer": ({"epochs": 4}, {}, "does not end with the numbers of metrics.json after 4 epochs"),
    "no_env": ({}, {"env.json": None}, "no commit"),
    "running": ({}, {"metrics.json": None}, "the run has not ended"),
    "cut": ({}, {"metrics.json": b'{"mAP": 0.4'}, "metrics.json cannot be read"),
    "moved": ({}, {"metrics.json": json.dumps(veri(0.52)).encode()}, "does not end with the numbers"),
    "scored": ({}, {"args.json": None}, "no args.json"),
} | {
    name: ({}, {"log.txt": content}, "log.txt cannot be read")
    for name, content in {"bytes": b"\xff", "empty": b"\n", "list": b"[1]\n", "deep": b"[" * 100_000}.items()
}  # fmt: skip


def test_what_lacks_its_origin_is_listed_and_not_printed(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "good", veri(0.80))
    for name, (changed, files, _) in LEFT_OUT.items():
        folder = write_run(runs / name, veri(0.41), **changed)
        for file, content in files.items():
            (folder / file).write_bytes(content) if content else (folder / file).unlink()
    text, counts = table(tmp_path)
    assert counts["runs"] == 1 and counts["left_out"] == len(LEFT_OUT)
    for name, (_, _, reason) in LEFT_OUT.items():
        assert reason in column(section(text, "Left out"), f"`{runs / name}`", "reason"), name
    assert not re.search(r"(4\d|5[1-4])\.0 \(1 seed\)", text)
    (runs / "none").mkdir()
    for folder in ("nowhere", runs / "none"):
        words = f"no args.json and no metrics.json in or below {folder}"
        refuses(words, run_main, results_table, folder, "--output", "x.md")
    refuses("ends in .md", run_main, results_table, runs, "--output", "x.txt")


def test_the_commit_of_a_checkout_of_an_archive_and_of_neither(tmp_path):
    (tmp_path / "util").mkdir()
    for written, commit in ((f"{'d' * 40}\n", "d" * 40), ("$Format:%H$\n", "unknown")):
        (tmp_path / "util" / "commit.txt").write_text(written)
        assert code_commit(tmp_path) == commit
    for file in (".gitattributes", "util/commit.txt"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    own = "-c user.name=a -c user.email=a@b"
    for words in ("init -q", "add .", f"{own} commit -q -m first", "archive HEAD -o code.tar"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    with tarfile.open(tmp_path / "code.tar") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert code_commit(tmp_path / "unpacked") == commit == code_commit(tmp_path)
    (tmp_path / "util" / "commit.txt").write_text("changed")
    assert code_commit(tmp_path) == f"{commit} + changes"


def test_runs_of_main_finetune_say_what_the_table_needs(tmp_path):
    """Real runs of two seeds: one row of the drawn set, with the hash of the weights and the commit."""
    write_demo_reid(tmp_path / "set", "veri776", train_ids=5, test_ids=5, images_per_id=6, size=32, processes=1)
    weights = tmp_path / "encoder.pth"
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 2, 3).state_dict()}, weights)
    words = f"--task reid --data_path {tmp_path / 'set'} --finetune {weights} --input_size 32 --epochs 1 --device cpu"
    words += " --warmup_epochs 0 --batch_size 8 --num_workers 0 --amp none --opt adamw --lr 1e-3"
    places = [f" --seed {seed} --output_dir {tmp_path / 'runs' / str(seed)}" for seed in (0, 1)]
    found = [run_finetune((words + place).split()) for place in places]
    if code_commit() == "unknown":
        pytest.skip("no git checkout: such runs are left out")
    text, counts = table(tmp_path)
    assert counts["runs"] == 2 and counts["rows"] == 1
    part = section(text, "reid set, as veri776 (")
    recipe = column(part, "**", "recipe")
    assert "train 30, classes 5," in part.splitlines()[0] and weights_sha256(weights)[:16] in recipe
    assert recipe.startswith("input_size 32, epochs 1, warmup_epochs 0.0, opt adamw, lr 0.001, amp none (")
    mean = 50 * (found[0]["mAP"] + found[1]["mAP"])
    assert f"| **{mean:.1f} ± " in part and "(2 seeds)" in text
