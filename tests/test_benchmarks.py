"""Test splits recognised by name: the known folders, no false alarm, and lists; the recipe of Automobile1M."""

import sys

from conftest import ROOT, refuses, run_command, run_main

import main_curate
import main_describe
from datasets import benchmarks

KNOWN = {
    "/data/VeRi/image_query/0002_c002_00030600_0.jpg": "VeRi-776",
    "pool/veri-776/IMAGE_TEST/a.jpg": "VeRi-776",
    "D:\\data\\VeRi\\image_test\\a.jpg": "VeRi-776",
    "stanford_cars/cars_test/00001.jpg": "StanfordCars",
    "x/VRIC/gallery_images/1.jpg": "VRIC",
    "AIC21_Track2_ReID/image_query/000345.jpg": "CityFlow-ReID",
    "CityFlowV2-ReID/image_test/000345.jpg": "CityFlow-ReID",
    "PartImageNet/images/val/n02814533_1.JPEG": "PartImageNet",
    "ü/cars_test/a\nb.jpg": "StanfordCars",
}
UNKNOWN = """
mytest/car.jpg test/car.jpg image_test/car.jpg cars_test.jpg my_cars_test/1.jpg cars_testing/1.jpg
VeRi/image_train/0001_c001_00016450_0.jpg notVeRi/image_test/1.jpg VeRi/image_test_notes.jpg cars_train/00001.jpg
AIC20_ReID_Simulation/image_train/1.jpg CityFlow/a-ReID/image_test/1.jpg PartImageNet/images/train/n02814533_1.JPEG
"""


def test_test_images_are_recognised_by_their_folders():
    for path, name in [*KNOWN.items(), *((path, None) for path in ["", *UNKNOWN.split()])]:
        assert benchmarks.benchmark_of(path) == name, path
    for name, facts in benchmarks.load_benchmarks().items():
        assert set(facts) == {"folders", "lists", "image", "test_images", "licence", "note"}, name
        assert set(facts["image"]) <= set(facts["lists"]) <= {"test", "train"}
        for folder in facts["folders"]:
            assert folder.endswith("/") and benchmarks.benchmark_of(folder.replace("*", "V2") + "1.jpg") == name
        assert not any("train" in folder.lower() for folder in facts["folders"])


def test_lists_become_paths(tmp_path):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    for name, words in (("VehicleID", "test_list_800.txt"), ("StanfordCars", "StanfordCars has no test list")):
        refuses(words, benchmarks.read_split, name, tmp_path)
    write("train_test_split/test_list_800.txt", "0000012 7\n0000013 7\n")
    write("train_test_split/test_list_1600.txt", "0000013 7\n0000014 9\n\n")
    test = benchmarks.read_split("VehicleID", tmp_path)
    assert test == ["image/0000012.jpg", "image/0000013.jpg", "image/0000014.jpg"]
    for line in ("00001/000001", "00001/000001.jpg 0 12"):  # old and new lists name the same image
        write("train_list.txt", line + "\n")
        assert benchmarks.read_split("VERI-Wild", tmp_path, "train") == ["images/00001/000001.jpg"]
    write("train_list.txt", "\n")
    refuses("empty", benchmarks.read_split, "VehicleID", tmp_path, "train")
    write("name_query.txt", "a.jpg\n")
    words = f"--name VeRi-776 --root {tmp_path} --output {tmp_path}/exclude.txt"
    assert run_main(benchmarks, *words.split())["images"] == 1
    assert (tmp_path / "exclude.txt").read_text() == f"{tmp_path / 'image_test' / 'a.jpg'}\n"


def test_the_recipe_names_what_is_missing_and_prints_its_commands(tmp_path):
    """scripts/automobile1m.sh on an empty folder: one line a source, then it stops."""
    recipe = ["bash", str(ROOT / "scripts/automobile1m.sh"), str(tmp_path)]
    done = run_command(recipe)
    assert done.returncode == 2 and done.stdout.count("skipped") >= 10 and "VeRi" in done.stdout
    assert "no source" in done.stderr and not list(tmp_path.iterdir())
    for folder in ("web", "StanfordCars/cars_train", "StanfordCars/cars_test"):
        (tmp_path / folder).mkdir(parents=True)
    done = run_command(["env", "DRY_RUN=1", "ATTRIBUTES=makes.csv", f"PYTHON={sys.executable}", *recipe])
    assert done.returncode == 0, done.stderr
    for part in ("--pool web=", "--pool stanford_cars=", "--exclude stanford_cars=", "main_describe.py"):
        assert part in done.stdout
    assert "cars_test" in done.stdout.split("--exclude stanford_cars=")[1].split()[0]
    assert "--text_bank data/automobile1m/texts --kl_weight" in done.stdout  # at weight 0 it would be idle
    for name, module in (("main_curate.py", main_curate), ("main_describe.py", main_describe)):
        words = next(line for line in done.stdout.splitlines() if name in line).split(f"{name} ")[1].split()
        assert module.get_args_parser().parse_args(words).output.startswith("data/automobile1m")
