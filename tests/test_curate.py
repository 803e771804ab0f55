"""main_curate.py on a pool whose flaws are known."""

import contextlib
import csv
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, run_command
from PIL import Image, ImageFilter

import main_curate
from curation.copies import Aligner, CopyFinder, as_pairs, choose_keepers, unordered
from curation.filters import read_prompts
from curation.index import (
    Index,
    measure_image,
    open_sources,
    parse_box,
    perceptual_hash,
    read_rows,
    sharpness,
)  # fmt: skip
from curation.kmeans import Embedded, Rows, build_tree, plan_levels
from curation.sample import judge, sample_tree
from curation.stages import Stages
from datasets.path_list import list_images
from demo.pool import POOL
from tools import pack
from util.dist import Parts
from util.errors import InputError

CPU = torch.device("cpu")
COLUMNS = {"identity": "pid", "camera": "camid", "box": "box"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curate") / "pool"
    POOL.write(folder, num_images=240, size=64, processes=1)
    return folder


def flags(pool: Path, teacher_files, output: Path, *more: str) -> list[str]:
    config, weights = teacher_files
    words = f"--pool demo={pool}/photos --exclude bench={pool}/benchmark --output {output} --device cpu"
    words += f" --clip_model {config} --clip_pretrained {weights} --target_size 60 --num_workers 1"
    # embeddings of random weights are all alike: only hashes may decide here
    words += " --near_cosine 0.9999 --leak_cosine 0.9999 --min_side 40 --levels 30 6 --resampling 2"
    return [*words.split(), *more]


def curate(words: list[str]) -> dict:
    return main_curate.main(main_curate.get_args_parser().parse_args(words))


@pytest.fixture(scope="module")
def curated(pool, teacher_files, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("curated") / "out"
    return output, curate(flags(pool, teacher_files, output))


def removed(output: Path) -> dict[str, dict]:
    found = {}
    for stage in main_curate.DROPS:
        with open(output / f"{stage}.csv", newline="") as opened:
            found |= {row["path"]: row | {"stage": stage} for row in csv.DictReader(opened)}
    return found


def truth_of(pool: Path) -> dict[str, dict]:
    with open(pool / "truth.csv", newline="") as opened:
        return {str((pool / row["path"]).absolute()): row for row in csv.DictReader(opened)}


def origin(truth: dict, pool: Path, path: str) -> str:
    """Copies of copies lead to one picture; a track is one thing."""
    row = truth[path]
    if not row["of"] or row["kind"].startswith("leak"):
        return path
    return origin(truth, pool, str((pool / row["of"]).absolute()))


def test_planted_flaws_are_found(pool, curated):
    output, _ = curated
    truth, gone = truth_of(pool), removed(output)
    paths = {
        kind: [p for p, row in truth.items() if row["kind"] == kind] for kind in {r["kind"] for r in truth.values()}
    }
    for kind in ("corrupt", "small", "aspect", "exposure", "leak_exact"):
        stage = "leaks" if kind == "leak_exact" else "quality"
        assert paths[kind] and all(gone[path]["stage"] == stage for path in paths[kind]), kind
    for kind, share in (("exact_copy", 1), ("pixel_copy", 1), ("near_copy", 0.8)):
        found = [p in gone or str((pool / truth[p]["of"]).absolute()) in gone for p in paths[kind]]
        assert np.mean(found) >= share, kind
    copies = [(path, row["of"]) for path, row in gone.items() if row["stage"] == "duplicates" and row["of"]]
    assert np.mean([origin(truth, pool, a) == origin(truth, pool, b) for a, b in copies]) >= 0.95


def test_the_manifest_is_what_was_chosen(pool, curated):
    output, counts = curated
    paths = list_images(output)  # the folder itself is a --data_path
    assert paths.sha256() == list_images(output / "manifest.csv").sha256()
    selection = np.load(output / "selection.npy")
    assert len(paths) == 60 == len(selection) == len(np.unique(selection))
    index_rows = list(read_rows(output / "index.csv"))
    with open(output / "manifest.csv", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["path"] for row in rows] == [index_rows[i]["path"] for i in selection]
    assert not {row["path"] for row in rows} & set(removed(output))
    assert set(rows[0]) >= {"source", "sha256", "width", "height", "cluster1", "cluster2", "distance"}
    # clusters in the manifest are those of the arrays on disk
    (tree,) = (output / "clusters").glob("*/all")
    indices, offsets = np.load(tree / "indices1.npy"), np.load(tree / "offsets1.npy")
    tree_rows = np.load(tree / "rows.npy")
    for number, row in list(zip(selection, rows))[:10]:
        j = int(row["cluster1"])
        assert number in tree_rows[indices[offsets[j] : offsets[j + 1]]]
    # water-filling over the top clusters: none that was cut is two below another
    top = Counter(row["cluster2"] for row in rows)
    assert len(top) == 6 and sum(top.values()) == 60
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg") > 60
    for text in ("unreadable", "same file", "near copy", "60 of 240 images", "How even is it?"):
        assert text in page, text
    written = json.loads((output / "curation.json").read_text())
    assert written["stages"]["sample"]["counts"]["images"] == 60 and written["evidence"] == counts["evidence"]


def test_stages_are_not_done_again_and_later_settings_keep_earlier_work(pool, teacher_files, curated, capsys):
    output, _ = curated
    before = (output / "manifest.csv").read_bytes()
    curate(flags(pool, teacher_files, output))
    said = capsys.readouterr().out
    assert said.count("done before") == 8 and (output / "manifest.csv").read_bytes() == before
    other = curate(flags(pool, teacher_files, output, "--target_size", "40"))
    said = capsys.readouterr().out
    assert said.count("done before") == 7 and other["sample"]["images"] == 40
    assert len(list_images(output / "manifest.csv")) == 40
    curate(flags(pool, teacher_files, output))
    assert (output / "manifest.csv").read_bytes() == before


def test_broken_off_at_any_write_the_manifest_is_the_same(pool, teacher_files, curated, tmp_path, monkeypatch):
    """The n-th run breaks off at its n-th rename of a finished file, until one gets through; the index has parts."""
    words = flags(pool, teacher_files, tmp_path / "out")
    rename, left, interrupted = os.replace, 0, []

    def breaking(source, target):
        nonlocal left
        left -= 1
        if left == 0:
            interrupted.append(Path(target).name)
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr("util.files.os.replace", breaking)
    monkeypatch.setattr("curation.index.PART_IMAGES", 100)
    done = set()
    for n in range(1, 30):
        left = n
        with contextlib.suppress(KeyboardInterrupt):
            curate(words)
            break
        (tmp_path / "out" / ".part_9.npz.123.tmp").write_text("what a kill -9 left")
        records = [*(tmp_path / "out" / "stages").glob("*.json"), *(tmp_path / "out" / "index.parts").glob("part*")]
        stamps = {(file.name, file.stat().st_mtime_ns) for file in records}
        assert {stamp for stamp in done if (tmp_path / "out" / "stages" / stamp[0]).is_file()} <= stamps
        done = stamps
    assert len(interrupted) >= 6 and left > 0
    for name in ("manifest.csv", "index.csv", "thumbnails.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (curated[0] / name).read_bytes()
    thumbnails = np.load(tmp_path / "out" / "thumbnails.npy")
    for number, row in enumerate(read_rows(tmp_path / "out" / "index.csv")):
        assert bool(thumbnails[number].any()) == (not row["problem"])
        if not row["problem"]:
            assert perceptual_hash(thumbnails[number]) == row["phash"]


def test_two_ranks_choose_the_same(pool, teacher_files, curated, tmp_path):
    words = flags(pool, teacher_files, tmp_path / "out")
    done = run_command(command("main_curate.py", *words, processes=2))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "manifest.csv").read_bytes() == (curated[0] / "manifest.csv").read_bytes()


def test_packed_and_boxed_images_get_files_of_their_own(pool, teacher_files, tmp_path):
    flags_of = pack.get_args_parser().parse_args
    clean = [p for p, row in truth_of(pool).items() if row["kind"] == "clean"]
    (tmp_path / "clean.txt").write_text("\n".join(clean[:40]))
    pack.main(flags_of(["--data_path", str(tmp_path / "clean.txt"), "--output", str(tmp_path / "packed")]))
    with open(tmp_path / "boxed.csv", "w") as opened:
        opened.write(
            "path,box,pid,camid\n" + "".join(f"{p},10 5 60 50,{i % 5},0\n" for i, p in enumerate(clean[40:80]))
        )
    words = f"--pool packed={tmp_path}/packed boxed={tmp_path}/boxed.csv --output {tmp_path}/out --device cpu"
    words += f" --clip_model {teacher_files[0]} --clip_pretrained {teacher_files[1]} --target_size 20"
    words += " --num_workers 1 --min_side 20 --levels 6 --resampling 1 --stratify source"
    words += " --box_margin 0 --track_cap 3 --near_cosine 1 --near_bits 0 --near_agreement 1"
    counts = curate(words.split())
    assert counts["sample"] == {"images": 20, "from packed": 10, "from boxed": 10, "written files": 20}
    assert counts["duplicates"]["beyond the cap of its identity and camera (images)"] >= 20
    paths = list_images(tmp_path / "out" / "manifest.csv")
    sizes = {Image.open(paths[i]).size for i in range(20)}
    assert (50, 45) in sizes and any(size != (50, 45) for size in sizes)


def test_bad_input_has_one_sentence(pool, teacher_files, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "test_only.csv").write_text("path,split\na.jpg,test\n")
    (tmp_path / "prompts.json").write_text("{}")
    (tmp_path / "gone.csv").write_text("path\na.jpg\nb.jpg\n")
    (tmp_path / "text.csv").write_text("path\ntext.csv\n")
    (tmp_path / "with_train" / "train").mkdir(parents=True)
    for more, message in (
        (["--pool", "photos"], "write NAME=PATH"),
        (["--exclude", f"b={tmp_path}/gone.csv"], "none of the first 2 images"),
        (["--exclude", f"b={tmp_path}/with_train"], "holds a folder train/"),
        (["--exclude", f"b={tmp_path}/text.csv"], "--exclude b: none of its 1 images can be read"),
        (["--pool", f"demo={pool}/photos"], "given twice"),
        (["--pool", f"a={tmp_path}/nothing"], "does not exist"),
        (["--pool", f"a={empty}"], "it is empty"),
        (["--pool", f"a={tmp_path}/test_only.csv"], "all 1 rows are validation or test rows"),
        (["--identity_column", "plate"], "no manifest of --pool or --exclude has values in it"),
        (["--near_bits", "-1"], "must not be negative"),
        (["--vehicle_filter", "--vehicle_prompts", f"{tmp_path}/prompts.json"], "vehicle"),
        (["--target_size", "5000"], "the pools hold 240 images"),
        (["--target_size", "239"], "images are left"),
        (["--levels", "10", "20"], "level 2 makes 20 clusters of 10"),
        (["--min_side", "1000"], "no image is left to choose from"),
    ):
        with pytest.raises(InputError, match=message):
            curate([*flags(pool, teacher_files, tmp_path / "out"), *more])


def test_boxes():
    assert parse_box("10, 20 30;40", 100, 100, 0) == (10, 20, 30, 40)
    assert parse_box("[10 20 30 40]", 35, 100, 0.5) == (0, 10, 35, 50)
    for text in ("1 2 3", "200 200 300 300", "a b c d"):
        with pytest.raises(ValueError):
            parse_box(text, 100, 100, 0)


def test_manifest_rows_of_the_other_split_stay_out(pool, tmp_path):
    paths = list(truth_of(pool))[:9]
    lines = [f"{p},{s}" for p, s in zip(paths, ("train", "val", " Test_easy ") * 3)]
    (tmp_path / "cars.csv").write_text("path,split\n" + "\n".join(lines))
    images = open_sources([f"cars={tmp_path}/cars.csv"], [f"cars={tmp_path}/cars.csv"], COLUMNS)
    assert [len(source.paths) for source in images.sources] == [3, 6]
    assert [source.left_out for source in images.sources] == [6, 3]
    assert images.name(0) == paths[0] and images.name(3) == paths[1]


def test_a_stage_that_failed_or_was_done_again_redoes_what_follows(tmp_path):
    def fail(_):
        raise InputError("no")

    done = []

    def run(stages, name, version=1):
        stages.run(name, {"v": version}, lambda _: done.append(name) or {"n": 1})

    for _ in range(2):
        stages = Stages(tmp_path)
        for name in ("index", "embed", "sample"):
            run(stages, name)
        (tmp_path / "stages" / "embed.json").unlink()
    assert done == ["index", "embed", "sample", "embed", "sample"]
    run(Stages(tmp_path), "embed")
    with pytest.raises(InputError):
        Stages(tmp_path).run("embed", {"v": 2}, fail)
    run(Stages(tmp_path), "embed")  # the record of the run before does not vouch for what the failed one left
    assert done[5:] == ["embed", "embed"]


def test_ranks_that_look_at_different_moments_leave_no_part_out(tmp_path, monkeypatch):
    monkeypatch.setattr("util.dist.barrier", lambda: None)
    monkeypatch.setattr("util.dist.get_world_size", lambda: 2)
    done = set()
    for rank in (0, 1):
        monkeypatch.setattr("util.dist.get_rank", lambda rank=rank: rank)
        parts = Parts(tmp_path / "p", {"job": 1}, "work", 50, 10, ".txt")
        done |= set(parts.todo)
        if rank == 0:  # rank 1 comes when this one has begun
            parts.file(parts.todo[0]).write_text("done")
    assert done == {0, 10, 20, 30, 40}


def test_tiny_and_empty_domains(tmp_path):
    for count in (1, 2, 3):
        (k,) = plan_levels(count, None)
        assert k == 1 or k < count
    assert plan_levels(7, [5000, 500, 5], clip=True) == [5] and plan_levels(3, [5000, 500], clip=True) == [1]
    assert plan_levels(2_000_000, None) == [50_000, 5_000, 500]
    x = np.random.default_rng(0).standard_normal((1, 4)).astype(np.float32)
    tree = build_tree(Rows(x, CPU), [1], tmp_path, SimpleNamespace(seed=0, resampling=2))
    assert sample_tree(tree, 1, seed=0).tolist() == [0]


@pytest.mark.parametrize("bits", [0, 3, 7])
def test_candidates_are_near_hashes_and_nearest_embeddings(monkeypatch, bits):
    rng = np.random.default_rng(bits)
    base, x = rng.integers(0, 2**64, 600, dtype=np.uint64), rng.standard_normal((600, 16)).astype(np.float32)
    x[300:400] = x[:100] + 0.05 * rng.standard_normal((100, 16))
    for i in range(300):
        base[300 + i] = base[i]
        for bit in rng.choice(64, i % 10, replace=False):
            base[300 + i] ^= np.uint64(1) << np.uint64(bit)
    rows, (upper, lower) = np.arange(600), np.triu_indices(600, 1)
    near = np.bitwise_count(base[upper] ^ base[lower]) <= bits
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    alike = (unit @ unit.T)[upper, lower] >= 0.97
    copies = finder(fake_index(600, phash=base), x, noise_aligner(600), bits=bits)
    monkeypatch.setattr("curation.copies.CANDIDATE_COSINE", 0.97)
    for at_a_time, all_with_all, near_cells in ((2**24, 600, 0), (10_000, 600, 0), (2**24, 500, 10), (2**24, 500, 3)):
        for name, value in (("NUMBERS_AT_A_TIME", at_a_time), ("ALL_WITH_ALL", all_with_all), ("CELL_IMAGES", 60)):
            monkeypatch.setattr(f"curation.copies.{name}", value)
        monkeypatch.setattr("curation.copies.NEAR_CELLS", near_cells)
        (hashed, _), (nearest, both_ways) = (unordered(pairs) for pairs in copies.candidates(rows, rows))
        found = set(zip(nearest["first"], nearest["second"])) & set(zip(upper[alike], lower[alike]))
        if near_cells == 3:  # of 10
            assert 0.95 * alike.sum() <= len(found) == len(nearest)
        else:
            assert len(found) == len(nearest) == alike.sum() >= 95 and both_ways.all()
            assert set(zip(hashed["first"], hashed["second"])) == set(zip(upper[near], lower[near]))
    found, _ = copies.candidates(rows[:300], rows[300:])
    assert set(zip(found["first"], found["second"] + 300)) == {
        (a, b) for a, b in zip(upper[near], lower[near]) if a < 300 <= b
    }


def test_what_goes_is_alike_to_what_stays():
    chain = as_pairs(np.arange(9), np.arange(1, 10), np.linspace(0.9, 0.99, 9))
    of, value = choose_keepers(np.arange(10), chain, cap=4)
    assert of.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert value[1::2] == pytest.approx(chain["value"][::2]) and (value[::2] == 1).all()
    of, _ = choose_keepers(np.array([5, *range(5), *range(6, 10)]), chain, cap=4)
    assert of.tolist() == [0, 0, 2, 2, 5, 5, 5, 7, 7, 9]
    wheel = as_pairs(np.zeros(9, np.int64), np.arange(1, 10), np.linspace(0.9, 0.99, 9))
    of, _ = choose_keepers(np.arange(10), wheel, cap=4)  # the most alike three go
    assert np.flatnonzero(of == 0).tolist() == [0, 7, 8, 9] and len(set(of.tolist())) == 7
    assert choose_keepers(np.arange(10), np.concatenate([wheel, wheel]), cap=4)[0].tolist() == of.tolist()


def noise_aligner(n: int, *groups: tuple[int, ...]) -> Aligner:
    """Thumbnails that have nothing in common, but for groups that are the same."""
    thumbnails = np.random.default_rng(3).integers(0, 256, (n, 32, 32), dtype=np.uint8)
    for first, *others in groups:
        thumbnails[others] = thumbnails[first]
    return Aligner(thumbnails, CPU)


def small(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX))


def test_alignment_undoes_crops_and_mirrors_and_tells_vehicles_apart(pool):
    clean = [path for path, row in truth_of(pool).items() if row["kind"] == "clean"][:24]
    rng, originals, crops = np.random.default_rng(0), [], []
    for number, path in enumerate(clean):
        picture = Image.open(path)
        width, height = (round(side * rng.uniform(0.88, 0.98)) for side in picture.size)
        left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
        crop = picture.crop((left, top, left + width, top + height))
        originals.append(small(picture))
        crops.append(small(crop if number % 3 else crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    aligner, n = Aligner(np.stack(originals + crops), CPU), np.arange(24)
    copies, others = aligner.agreement(n, n + 24), aligner.agreement(n, 24 + (n + 1) % 24)
    assert copies == pytest.approx(aligner.agreement(n + 24, n), abs=1e-4) and np.median(copies) > 0.93
    assert (copies >= 0.88).mean() >= 0.9 and others.max() < 0.88 and np.median(others) < 0.5


def test_one_colour_agrees_with_nothing():
    ramp = np.arange(1024).reshape(32, 32) / 4
    thumbnails = np.stack([np.full((32, 32), 90), np.full((32, 32), 90), ramp]).astype(np.uint8)
    found = Aligner(thumbnails, CPU).agreement(np.array([0, 0, 2]), np.array([1, 2, 2]))
    assert found[:2].tolist() == [0, 0] and found[2] > 0.99


def test_another_object_before_the_same_background_is_no_copy():
    rng = np.random.default_rng(0)
    wall = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).resize((32, 32)))
    pictures = [wall.copy() for _ in range(3)]
    for picture in pictures[1:]:  # the middle, 44% of the area
        patch = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((21, 21))
        picture[5:26, 5:26] = np.asarray(patch)
    pictures.append((pictures[1] * 0.85 + 10).astype(np.uint8))
    found = Aligner(np.stack(pictures), CPU).agreement(np.array([1, 1, 0]), np.array([2, 3, 1]))
    assert found[0] < 0.7 and found[1] > 0.97 and found[2] < 0.7


def test_cells_show_what_clusters_of_equal_size_hide():
    """900 images in a crowd, 100 spread widely: a draw of 100 from the crowd is not even."""
    rng = np.random.default_rng(0)
    crowd = np.array([1.0] + [0.0] * 15) + 0.05 * rng.standard_normal((900, 16))
    x = np.concatenate([crowd, rng.standard_normal((100, 16))]).astype(np.float32)
    rows = np.arange(1000)
    chosen = np.concatenate([rows[:900:18], rows[900::2]])
    numbers, sizes = judge(Embedded(x, rows), {"all": rows}, chosen, CPU, seed=0)
    assert 45 <= len(sizes["pool"]) <= 55 and sizes["selection"].sum() == sizes["random"].sum() == 100
    assert numbers["selection"]["effective"] > 2 * numbers["random"]["effective"]
    assert numbers["selection"]["coverage"] > numbers["random"]["coverage"]
    halves = {"a": rows[:900], "b": rows[900:]}
    numbers, sizes = judge(Embedded(x, rows), halves, rows[850:950], CPU, seed=0)
    assert len(sizes["pool"]) > 45 and sizes["random"].sum() == 100
    assert sizes["random"][-10:].sum() == pytest.approx(sizes["selection"][-10:].sum(), abs=8)


def fake_index(n: int, **columns) -> Index:
    values = dict(
        sources=["a"], source=np.zeros(n, np.int32), excluded=np.zeros(n, bool), width=np.full(n, 100),
        height=np.full(n, 100), box=np.zeros((n, 4), np.int32),
        file_hash=np.arange(2 * n, dtype=np.uint64).reshape(n, 2),
        pixel_hash=np.arange(2 * n, dtype=np.uint64).reshape(n, 2),
        phash=np.random.default_rng(0).integers(0, 2**64, n, dtype=np.uint64),
        brightness=np.full(n, 100.0), contrast=np.full(n, 50.0), sharpness=np.full(n, 50.0),
        identity=np.full(n, -1), camera=np.full(n, -1), readable=np.ones(n, bool),
    )  # fmt: skip
    return Index(**(values | columns))


def finder(index: Index, x: np.ndarray, aligner: Aligner, bits=6, cosine=0.97, agreement=0.88) -> CopyFinder:
    return CopyFinder(index, Embedded(x, np.arange(len(x))), aligner, bits, cosine, agreement)


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((n, 32)).astype(np.float32)


def test_the_largest_copy_stays_and_copies_of_leaks_go(tmp_path):
    n = 8
    phash = np.random.default_rng(1).integers(0, 2**64, n, dtype=np.uint64)
    phash[1], phash[2], phash[5] = phash[0], phash[0], phash[4]
    index = fake_index(n, phash=phash, width=np.array([100, 400, 100, 100, 100, 100, 100, 100]))
    x, rows = noise(n), np.arange(n)
    x[1], x[2], x[5] = x[0], x[0], x[4]
    copies = finder(index, x, noise_aligner(n, (0, 1, 2), (4, 5)))
    removal = copies.duplicates(rows[rows != 4], np.array([4]), group_cap=16, track_cap=4)
    assert removal.rows.tolist() == [0, 2, 5] and removal.of[removal.rows].tolist() == [1, 1, 4]
    counts = {"removed": 3, "copy of a leaked picture (agreement)": 1, "near copy (agreement)": 2}
    assert removal.save(tmp_path, "duplicates", str) == counts


def test_copies_of_a_leak_go_beyond_the_cap_of_groups():
    rows = np.arange(40)
    index = fake_index(40, phash=np.full(40, 12345, dtype=np.uint64))
    copies = finder(index, np.ones((40, 8), dtype=np.float32), noise_aligner(40, tuple(rows)))
    assert copies.duplicates(rows[1:], rows[:1], group_cap=16, track_cap=4).rows.tolist() == list(range(1, 40))


def test_frames_of_a_track_are_spread():
    rows = np.arange(40)
    index = fake_index(40, identity=np.where(rows < 30, 7, -1), camera=np.zeros(40, np.int32))
    copies = finder(index, noise(40), noise_aligner(40), bits=0, cosine=1.0, agreement=1.0)
    left = np.setdiff1d(rows, copies.duplicates(rows, rows[:0], group_cap=16, track_cap=3).rows)
    assert (left < 30).sum() == 3 and (left >= 30).sum() == 10
    assert np.diff(left[:3]).min() >= 9


def test_hash_and_sharpness_measure_what_they_say(pool):
    path = next(p for p, row in truth_of(pool).items() if row["kind"] == "clean")
    image = Image.open(path).convert("L")
    smaller = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC)

    def hash_of(picture: Image.Image) -> int:
        return int(perceptual_hash(np.asarray(picture.resize((32, 32), Image.Resampling.BOX))), 16)

    apart = (hash_of(image) ^ hash_of(smaller)).bit_count()
    turned = (hash_of(image) ^ hash_of(image.transpose(Image.Transpose.ROTATE_90))).bit_count()
    assert apart <= 6 < 16 <= turned
    values = np.asarray(image, dtype=np.float32)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(4)), dtype=np.float32)
    assert sharpness(blurred) < 0.3 * sharpness(values)


def test_damaged_files_are_made_again(pool, teacher_files, curated, tmp_path, capsys):
    """A flipped byte, a cut file, a removed one: the stage that made it is done again, and the list is the same."""
    output = Path(shutil.copytree(curated[0], tmp_path / "out"))
    (tree,) = (output / "clusters").glob("*/all")
    names = ["index.csv", "thumbnails.npy", "leaks.npz", "embeddings.npy", "selection.npy", "stages/embed.json"]
    for number, file in enumerate([output / name for name in names] + [tree / "parents1.npy"]):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 64
        file.write_bytes(b"" if number == 6 else b"[" * 9000 if number == 5 else data if number % 2 else data[:-9])
        curate(flags(pool, teacher_files, output))
        said = capsys.readouterr().out
        assert "done again, for its files have changed or are gone" in said, file
        assert (output / "manifest.csv").read_bytes() == (curated[0] / "manifest.csv").read_bytes()
    step = next(tree.glob("level1_step01.npz"))
    step.write_bytes(step.read_bytes()[:-50])
    (output / "stages" / "cluster.json").unlink()
    curate(flags(pool, teacher_files, output))
    assert "level1_step01.npz is damaged" in capsys.readouterr().out
    assert (output / "manifest.csv").read_bytes() == (curated[0] / "manifest.csv").read_bytes()


@pytest.mark.parametrize("name", ["../../x", "a/b", "<b>x", "line\nbreak", "..", "ä" * 300, "\udcff", "/etc", "-rf"])
def test_names_of_pools_are_safe(pool, name, capsys):
    (source,) = open_sources([f"{name}={pool}/photos"], [], COLUMNS).sources
    assert re.fullmatch(r"[\w+][\w.+ -]{0,59}", source.name) and len(source.name.encode()) < 255
    assert f"it is called {source.name} here" in capsys.readouterr().out
    (plain,) = open_sources([f"street cars-2.0={pool}/photos"], [], COLUMNS).sources
    assert plain.name == "street cars-2.0"


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"vehicle": ' + "9" * 5000, "[]", '{"vehicle": "car", "other": ["x"]}',
    '{"vehicle": [], "other": ["x"]}',
    '{"vehicle": ["\\\\ud800"], "other": ["x"]}', '{"vehicle": [1], "other": ["x"]}', b"\xff\xfe",
])  # fmt: skip
def test_odd_prompts_get_a_sentence(text, tmp_path):
    (tmp_path / "p.json").write_bytes(text if isinstance(text, bytes) else text.replace("\\\\u", "\\u").encode())
    with pytest.raises(InputError, match=r"p\.json is .*vehicle"):
        read_prompts(tmp_path / "p.json")


def test_odd_manifests_get_a_sentence_and_odd_boxes_are_listed(pool, tmp_path):
    """Every line is a table by itself: a sentence, or rows that are read or listed as unreadable."""
    path = json.dumps(str(next((pool / "photos").rglob("*.jpg"))))
    lines = [
        f'{{"path": {path}, "box": {box}}}'
        for box in ('"nan nan nan nan"', '"1e999 0 5 5"', "[[[1]]]", "{}", "-1", '"٣ 0 50 50"')
    ]
    lines += [f'{{"path": {path}, "pid": "\\ud800"}}', '{"path": "\\ud800.jpg"}', '{"path": "a\\u0000b"}', "[" * 9000]
    for line in lines:
        (tmp_path / "m.jsonl").write_text(line)
        try:
            images = open_sources([f"a={tmp_path}/m.jsonl"], [], COLUMNS)
        except InputError:
            continue
        row, _ = measure_image(images, 0, 0.05)
        assert len(row) == 16 and "Traceback" not in row[-1]
