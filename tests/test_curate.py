"""main_curate.py on a pool whose flaws are known."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, run_command
from PIL import Image

import main_curate
from curation.copies import Aligner, CopyFinder, as_pairs, choose_keepers, unordered
from curation.filters import read_prompts
from curation.index import COLUMNS, Index, measure_image, open_sources, parse_box, perceptual_hash, read_rows
from curation.kmeans import Embedded, Rows, build_tree, plan_levels
from curation.sample import judge, sample_tree
from curation.stages import Stages
from datasets.path_list import list_images
from demo.pool import POOL
from tools import pack
from util.dist import Parts
from util.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curate") / "pool"
    POOL.write(folder, num_images=240, size=64, processes=1)
    return folder


@pytest.fixture(scope="module")
def truth(pool) -> dict[str, dict]:
    return {str((pool / row["path"]).absolute()): row for row in read_rows(pool / "truth.csv")}


def flags(pool: Path, teacher_files, output: Path, *more: str) -> list[str]:
    words = f"--pool demo={pool}/photos --exclude bench={pool}/benchmark --output {output} --device cpu"
    words += " --clip_model {} --clip_pretrained {} --target_size 60 --num_workers 1".format(*teacher_files)
    # embeddings of random weights are all alike: only hashes may decide here
    words += " --near_cosine 0.9999 --leak_cosine 0.9999 --min_side 40 --levels 30 6 --resampling 2"
    return [*words.split(), *more]


def curate(words: list[str]) -> dict:
    return main_curate.main(main_curate.get_args_parser().parse_args(words))


@pytest.fixture(scope="module")
def curated(pool, teacher_files, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("curated") / "out"
    return output, curate(flags(pool, teacher_files, output))


def same_manifest(output: Path, curated) -> bool:
    return (output / "manifest.csv").read_bytes() == (curated[0] / "manifest.csv").read_bytes()


def removed(output: Path) -> dict[str, dict]:
    rows = ((stage, row) for stage in main_curate.DROPS for row in read_rows(output / f"{stage}.csv"))
    return {row["path"]: row | {"stage": stage} for stage, row in rows}


def test_planted_flaws_are_found(pool, truth, curated):
    gone, paths = removed(curated[0]), {}
    for path, row in truth.items():
        paths.setdefault(row["kind"], []).append(path)

    def of(path: str) -> str:
        return str((pool / truth[path]["of"]).absolute())

    def origin(path: str) -> str:
        """Copies of copies lead to one picture; a track is one thing."""
        return origin(of(path)) if truth[path]["of"] and truth[path]["kind"][:4] != "leak" else path

    for kind in ("corrupt", "small", "aspect", "exposure", "leak_exact"):
        stage = "leaks" if kind == "leak_exact" else "quality"
        assert all(gone[path]["stage"] == stage for path in paths[kind]), kind
    for kind, share in (("exact_copy", 1), ("pixel_copy", 1), ("near_copy", 0.8)):
        assert np.mean([path in gone or of(path) in gone for path in paths[kind]]) >= share, kind
    copies = [(path, row["of"]) for path, row in gone.items() if row["stage"] == "duplicates" and row["of"]]
    assert np.mean([origin(a) == origin(b) for a, b in copies]) >= 0.95


def test_the_manifest_is_what_was_chosen(curated):
    output, counts = curated
    paths, selection = list_images(output), np.load(output / "selection.npy")  # the folder itself is a --data_path
    index_rows, rows = (list(read_rows(output / f"{name}.csv")) for name in ("index", "manifest"))
    assert len(paths) == 60 == len(selection) == len(np.unique(selection))
    assert [row["path"] for row in rows] == [index_rows[i]["path"] for i in selection]
    assert not {row["path"] for row in rows} & set(removed(output))
    assert set(rows[0]) >= {"source", "sha256", "width", "height", "cluster1", "cluster2", "distance"}
    # clusters in the manifest are those of the arrays on disk
    (tree,) = (output / "clusters").glob("*/all")
    indices, offsets, tree_rows = (np.load(tree / f"{name}.npy") for name in ("indices1", "offsets1", "rows"))
    for number, row in list(zip(selection, rows))[:10]:
        members = slice(*offsets[int(row["cluster1"]) :][:2])
        assert number in tree_rows[indices[members]]
    page, written = (output / "report.html").read_text(), json.loads((output / "curation.json").read_text())
    assert len({row["cluster2"] for row in rows}) == 6 and page.count("data:image/jpeg") > 60
    for text in ("unreadable", "same file", "near copy", "60 of 240 images", "How even is it?"):
        assert text in page, text
    assert written["stages"]["sample"]["counts"]["images"] == 60 and written["evidence"] == counts["evidence"]


def test_stages_are_not_done_again_and_later_settings_keep_earlier_work(pool, teacher_files, curated, capsys):
    output, before = curated[0], (curated[0] / "manifest.csv").read_bytes()
    for size, done in ((60, 8), (40, 7), (60, 7)):
        counts = curate(flags(pool, teacher_files, output, "--target_size", str(size)))
        assert capsys.readouterr().out.count("done before") == done
        assert counts["sample"]["images"] == size == len(list_images(output / "manifest.csv"))
    assert (output / "manifest.csv").read_bytes() == before


def test_broken_off_at_any_write_the_manifest_is_the_same(pool, teacher_files, curated, tmp_path, monkeypatch):
    """The n-th run breaks off at its n-th rename of a finished file, until one gets through; the index has parts."""
    output, rename, left, interrupted = tmp_path / "out", os.replace, 0, []

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
            curate(flags(pool, teacher_files, output))
            break
        (output / ".part_9.npz.123.tmp").write_text("what a kill -9 left")
        records = [*(output / "stages").glob("*.json"), *(output / "index.parts").glob("part*")]
        stamps = {(file.name, file.stat().st_mtime_ns) for file in records}
        assert {stamp for stamp in done if (output / "stages" / stamp[0]).is_file()} <= stamps
        done = stamps
    assert len(interrupted) >= 6 and left > 0
    for name in ("manifest.csv", "index.csv", "thumbnails.npy"):
        assert (output / name).read_bytes() == (curated[0] / name).read_bytes()
    for thumbnail, row in zip(np.load(output / "thumbnails.npy"), read_rows(output / "index.csv")):
        assert bool(thumbnail.any()) == (not row["problem"])
        assert row["problem"] or perceptual_hash(thumbnail) == row["phash"]


def test_two_ranks_choose_the_same(pool, teacher_files, curated, tmp_path):
    done = run_command(command("main_curate.py", *flags(pool, teacher_files, tmp_path / "out"), processes=2))
    assert done.returncode == 0, done.stderr
    assert same_manifest(tmp_path / "out", curated)


def test_damaged_files_are_made_again(pool, teacher_files, curated, tmp_path, capsys):
    """A flipped byte, a cut file, an empty one: the stage that made it is done again, and the list is the same."""
    output = Path(shutil.copytree(curated[0], tmp_path / "out"))
    tree = next((output / "clusters").glob("*/all")).relative_to(output)
    for name, damage in (
        ("index.csv", lambda data: data[:-9]), ("embeddings.npy", lambda data: data[:-1] + bytes([data[-1] ^ 64])),
        ("leaks.npz", lambda data: data[:-9]), ("stages/embed.json", lambda data: b"[" * 9000),
        (tree / "parents1.npy", lambda data: b""), (tree / "level1_step01.npz", lambda data: data[:-50]),
    ):  # fmt: skip
        (output / name).write_bytes(damage((output / name).read_bytes()))
        said = "done again, for its files have changed or are gone"
        if "step" in str(name):  # no stage vouches for a step
            (output / "stages" / "cluster.json").unlink()
            said = "level1_step01.npz is damaged"
        curate(flags(pool, teacher_files, output))
        assert said in capsys.readouterr().out and same_manifest(output, curated), name


def test_packed_and_boxed_images_get_files_of_their_own(truth, teacher_files, tmp_path):
    clean = [p for p, row in truth.items() if row["kind"] == "clean"]
    (tmp_path / "clean.txt").write_text("\n".join(clean[:40]))
    words = f"--data_path {tmp_path}/clean.txt --output {tmp_path}/packed"
    pack.main(pack.get_args_parser().parse_args(words.split()))
    rows = [f"{p},10 5 60 50,{i % 5},0\n" for i, p in enumerate(clean[40:80])]
    (tmp_path / "boxed.csv").write_text("path,box,pid,camid\n" + "".join(rows))
    words = f"--pool packed={tmp_path}/packed boxed={tmp_path}/boxed.csv --output {tmp_path}/out --device cpu"
    words += " --clip_model {} --clip_pretrained {} --target_size 20 --num_workers 1".format(*teacher_files)
    words += " --min_side 20 --levels 6 --resampling 1 --stratify source"
    words += " --box_margin 0 --track_cap 3 --near_cosine 1 --near_bits 0 --near_agreement 1"
    counts = curate(words.split())
    assert counts["sample"] == {"images": 20, "from packed": 10, "from boxed": 10, "written files": 20}
    assert counts["duplicates"]["beyond the cap of its identity and camera (images)"] >= 20
    paths = list_images(tmp_path / "out" / "manifest.csv")
    sizes = {Image.open(paths[i]).size for i in range(20)}
    assert (50, 45) in sizes and any(size != (50, 45) for size in sizes)


@pytest.mark.parametrize("more, message", [
    ("--pool photos", "write NAME=PATH"), ("--exclude b=TMP/gone.csv", "none of the first 2 images"),
    ("--exclude b=TMP/with_train", "holds a folder train/"), ("--pool demo=POOL/photos", "given twice"),
    ("--exclude b=TMP/text.csv", "--exclude b: none of its 1 images can be read"),
    ("--pool a=TMP/nothing", "does not exist"), ("--pool a=TMP/empty", "it is empty"),
    ("--pool a=TMP/test_only.csv", "all 1 rows are validation or test rows"),
    ("--identity_column plate", "no manifest of --pool or --exclude has values in it"),
    ("--near_bits -1", "--near_bits -1: must"), ("--vehicle_filter --vehicle_prompts TMP/prompts.json", "vehicle"),
    ("--target_size 5000", "the pools hold 240 images"), ("--target_size 239", "images are left"),
    ("--levels 10 20", "level 2 makes 20 clusters of 10"), ("--min_side 1000", "no image is left to choose from"),
])  # fmt: skip
def test_bad_input_has_one_sentence(pool, teacher_files, curated, tmp_path, more, message):
    for folder in ("empty", "with_train/train"):
        (tmp_path / folder).mkdir(parents=True)
    texts = {"test_only.csv": "path,split\na.jpg,test\n", "prompts.json": "{}", "gone.csv": "path\na.jpg\nb.jpg\n"}
    for name, text in (texts | {"text.csv": "path\ntext.csv\n"}).items():
        (tmp_path / name).write_text(text)
    output = Path(shutil.copytree(curated[0], tmp_path / "out"))
    with pytest.raises(InputError, match=message):
        more = more.replace("TMP", str(tmp_path)).replace("POOL", str(pool))
        curate(flags(pool, teacher_files, output, *more.split()))


def test_manifest_rows_of_the_other_split_stay_out(truth, tmp_path):
    paths = list(truth)[:9]
    lines = [f"{p},{s}" for p, s in zip(paths, ("train", "val", " Test_easy ") * 3)]
    (tmp_path / "cars.csv").write_text("path,split\n" + "\n".join(lines))
    images = open_sources([f"cars={tmp_path}/cars.csv"], [f"cars={tmp_path}/cars.csv"], COLUMNS)
    assert [(len(source.paths), source.left_out) for source in images.sources] == [(3, 6), (6, 3)]
    assert images.name(0) == paths[0] and images.name(3) == paths[1]


def test_a_stage_that_failed_or_was_done_again_redoes_what_follows(tmp_path):
    done = []

    def run(*names, settings=None, work=lambda name: done.append(name) or {"n": 1}):
        stages = Stages(tmp_path)
        for name in names:
            stages.run(name, {"v": settings}, lambda _, name=name: work(name))

    for _ in range(2):
        run("index", "embed", "sample")
        (tmp_path / "stages" / "embed.json").unlink()
    assert done == ["index", "embed", "sample", "embed", "sample"]
    run("embed")
    with pytest.raises(ZeroDivisionError):
        run("embed", settings=2, work=lambda name: 1 / 0)
    run("embed")  # the record of the run before does not vouch for what the failed one left
    assert done[5:] == ["embed", "embed"]


def test_ranks_that_look_at_different_moments_leave_no_part_out(tmp_path, monkeypatch):
    monkeypatch.setattr("util.dist.barrier", lambda: None)
    monkeypatch.setattr("util.dist.get_world_size", lambda: 2)
    done = set()
    for rank in (0, 1):
        monkeypatch.setattr("util.dist.get_rank", lambda rank=rank: rank)
        parts = Parts(tmp_path / "p", {"job": 1}, "work", 50, 10, ".txt")
        done |= set(parts.todo)
        parts.file(parts.todo[0]).write_text("done")  # rank 1 comes when rank 0 has begun
    assert done == {0, 10, 20, 30, 40}


def test_tiny_and_empty_domains(tmp_path):
    assert [plan_levels(count, None) for count in (1, 2, 3)] == [[1], [1], [2]]
    assert plan_levels(7, [5000, 500, 5], clip=True) == [5] and plan_levels(3, [5000, 500], clip=True) == [1]
    assert plan_levels(2_000_000, None) == [50_000, 5_000, 500]
    tree = build_tree(Rows(np.ones((1, 4), np.float32), CPU), [1], tmp_path, SimpleNamespace(seed=0, resampling=2))
    assert sample_tree(tree, 1, seed=0).tolist() == [0]


def fake_finder(x: np.ndarray, *groups, bits=6, cosine=0.97, agreement=0.88, **columns) -> CopyFinder:
    """Of an index of len(x) images whose thumbnails have nothing in common, but for groups that are the same."""
    n, rng = len(x), np.random.default_rng(3)
    thumbnails, hashes = rng.integers(0, 256, (n, 32, 32), dtype=np.uint8), np.arange(2 * n, dtype=np.uint64)
    for first, *others in groups:
        thumbnails[others] = thumbnails[first]
    index = dict(sources=["a"], source=np.zeros(n, np.int32), excluded=np.zeros(n, bool), readable=np.ones(n, bool))
    index |= dict(width=np.full(n, 100), height=np.full(n, 100), box=np.zeros((n, 4), np.int32))
    index |= dict(file_hash=hashes.reshape(n, 2), pixel_hash=hashes.reshape(n, 2), identity=np.full(n, -1))
    index |= dict(camera=np.full(n, -1), phash=rng.integers(0, 2**64, n, dtype=np.uint64))
    aligner, embedded = Aligner(thumbnails, CPU), Embedded(x, np.arange(n))
    return CopyFinder(Index(**(index | columns)), embedded, aligner, bits, cosine, agreement)


@pytest.mark.parametrize("bits", [0, 7])
def test_candidates_are_near_hashes_and_nearest_embeddings(monkeypatch, bits):
    rng, rows, (upper, lower) = np.random.default_rng(bits), np.arange(600), np.triu_indices(600, 1)
    base, x = rng.integers(0, 2**64, 600, dtype=np.uint64), rng.standard_normal((600, 16)).astype(np.float32)
    x[300:400] = x[:100] + 0.05 * rng.standard_normal((100, 16))
    flipped = [sum(1 << int(bit) for bit in rng.choice(64, i % 10, replace=False)) for i in range(300)]
    base[300:] = base[:300] ^ np.array(flipped, dtype=np.uint64)
    near = np.bitwise_count(base[upper] ^ base[lower]) <= bits
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    alike = (unit @ unit.T)[upper, lower] >= 0.97
    copies, names = fake_finder(x, bits=bits, phash=base), "CANDIDATE_COSINE CELL_IMAGES NUMBERS_AT_A_TIME ALL_WITH_ALL"
    names = [*names.split(), "NEAR_CELLS"]
    for at_a_time, all_with_all, near_cells in ((10_000, 600, 0), (2**24, 500, 10), (2**24, 500, 3)):
        for name, value in zip(names, (0.97, 60, at_a_time, all_with_all, near_cells)):
            monkeypatch.setattr(f"curation.copies.{name}", value)
        (hashed, _), (nearest, both_ways) = (unordered(pairs) for pairs in copies.candidates(rows, rows))
        found = set(zip(nearest["first"], nearest["second"])) & set(zip(upper[alike], lower[alike]))
        if near_cells == 3:  # of 10
            assert 0.95 * alike.sum() <= len(found) == len(nearest)
        else:
            assert len(found) == len(nearest) == alike.sum() >= 95 and both_ways.all()
            assert set(zip(hashed["first"], hashed["second"])) == set(zip(upper[near], lower[near]))
    found, _ = copies.candidates(rows[:300], rows[300:])
    pairs = {(a, b) for a, b in zip(upper[near], lower[near]) if a < 300 <= b}
    assert set(zip(found["first"], found["second"] + 300)) == pairs


def test_what_goes_is_alike_to_what_stays():
    chain = as_pairs(np.arange(9), np.arange(1, 10), np.linspace(0.9, 0.99, 9))
    of, value = choose_keepers(np.arange(10), chain, cap=4)
    assert of.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8] and (value[::2] == 1).all()
    assert value[1::2] == pytest.approx(chain["value"][::2])
    of, _ = choose_keepers(np.array([5, *range(5), *range(6, 10)]), chain, cap=4)
    assert of.tolist() == [0, 0, 2, 2, 5, 5, 5, 7, 7, 9]
    wheel = as_pairs(np.zeros(9, np.int64), np.arange(1, 10), np.linspace(0.9, 0.99, 9))
    for pairs in (wheel, np.concatenate([wheel, wheel])):  # the most alike three go
        assert choose_keepers(np.arange(10), pairs, cap=4)[0].tolist() == [0, *range(1, 7), 0, 0, 0]


def test_the_largest_copy_stays_and_copies_of_leaks_go(tmp_path):
    phash, x = np.random.default_rng(1).integers(0, 2**64, 8, dtype=np.uint64), np.eye(40, dtype=np.float32)
    rows, different = np.arange(8), x.copy()
    for copy, of in ((1, 0), (2, 0), (5, 4)):
        phash[copy], x[copy] = phash[of], x[of]
    copies = fake_finder(x[:8], (0, 1, 2), (4, 5), phash=phash, width=np.where(rows == 1, 400, 100))
    removal = copies.duplicates(rows[rows != 4], np.array([4]), group_cap=16, track_cap=4)
    assert removal.rows.tolist() == [0, 2, 5] and removal.of[removal.rows].tolist() == [1, 1, 4]
    counts = {"removed": 3, "copy of a leaked picture (agreement)": 1, "near copy (agreement)": 2}
    assert removal.save(tmp_path, "duplicates", str) == counts
    # all copies of a leak go, beyond the cap of groups
    copies = fake_finder(np.ones((8, 8), np.float32), tuple(rows), phash=np.full(8, 12345, dtype=np.uint64))
    assert copies.duplicates(rows[1:], rows[:1], group_cap=2, track_cap=4).rows.tolist() == list(range(1, 8))
    # frames of a track that stay are spread
    rows = np.arange(40)
    known = {"identity": np.where(rows < 30, 7, -1), "camera": np.zeros(40, np.int32)}
    copies = fake_finder(different, bits=0, cosine=1.0, agreement=1.0, **known)
    left = np.setdiff1d(rows, copies.duplicates(rows, rows[:0], group_cap=16, track_cap=3).rows)
    assert (left < 30).sum() == 3 and (left >= 30).sum() == 10 and np.diff(left[:3]).min() >= 9


def test_alignment_undoes_crops_and_mirrors_and_tells_vehicles_apart(truth):
    rng, originals, crops, n = np.random.default_rng(0), [], [], np.arange(24)

    def small(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX))

    for number, path in enumerate([path for path, row in truth.items() if row["kind"] == "clean"][:24]):
        picture = Image.open(path)
        width, height = (round(side * rng.uniform(0.88, 0.98)) for side in picture.size)
        left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
        crop = picture.crop((left, top, left + width, top + height))
        originals.append(small(picture))
        crops.append(small(crop if number % 3 else crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    aligner = Aligner(np.stack(originals + crops), CPU)
    copies, others = aligner.agreement(n, n + 24), aligner.agreement(n, 24 + (n + 1) % 24)
    assert copies == pytest.approx(aligner.agreement(n + 24, n), abs=1e-4) and np.median(copies) > 0.93
    assert (copies >= 0.88).mean() >= 0.9 and others.max() < 0.88 and np.median(others) < 0.5


def test_one_colour_agrees_with_nothing_and_another_object_before_the_same_wall_is_no_copy():
    rng = np.random.default_rng(0)
    wall = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).resize((32, 32)))
    pictures = [wall.copy() for _ in range(3)]
    for picture in pictures[1:]:  # the middle, 44% of the area
        patch = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((21, 21))
        picture[5:26, 5:26] = np.asarray(patch)
    plain, ramp = np.full((32, 32), 90), np.arange(1024).reshape(32, 32) / 4
    pictures = np.stack([*pictures, pictures[1] * 0.85 + 10, plain, plain, ramp]).astype(np.uint8)
    found = Aligner(pictures, CPU).agreement(np.array([1, 1, 0, 4, 4, 6]), np.array([2, 3, 1, 5, 6, 6]))
    assert found[0] < 0.7 and found[1] > 0.97 and found[2] < 0.7
    assert found[3:5].tolist() == [0, 0] and found[5] > 0.99


def test_cells_show_what_clusters_of_equal_size_hide():
    """900 images in a crowd, 100 spread widely: a draw of 100 from the crowd is not even."""
    rng, rows = np.random.default_rng(0), np.arange(1000)
    crowd = np.array([1.0] + [0.0] * 15) + 0.05 * rng.standard_normal((900, 16))
    x = Embedded(np.concatenate([crowd, rng.standard_normal((100, 16))]).astype(np.float32), rows)
    numbers, sizes = judge(x, {"all": rows}, np.concatenate([rows[:900:18], rows[900::2]]), CPU, seed=0)
    assert 45 <= len(sizes["pool"]) <= 55 and sizes["selection"].sum() == sizes["random"].sum() == 100
    assert numbers["selection"]["effective"] > 2 * numbers["random"]["effective"]
    assert numbers["selection"]["coverage"] > numbers["random"]["coverage"]


@pytest.mark.parametrize("name", ["../../x", "a/b", "<b>x", "line\nbreak", "..", "ä" * 300, "\udcff", "/etc", "-rf"])
def test_names_of_pools_are_safe(pool, name, capsys):
    (source,) = open_sources([f"{name}={pool}/photos"], [], COLUMNS).sources
    assert re.fullmatch(r"[\w+][\w.+ -]{0,59}", source.name) and len(source.name.encode()) < 255
    assert f"it is called {source.name} here" in capsys.readouterr().out
    assert open_sources([f"street cars-2.0={pool}/photos"], [], COLUMNS).sources[0].name == "street cars-2.0"


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"vehicle": ' + "9" * 5000, "[]", '{"vehicle": "car", "other": ["x"]}', b"\xff\xfe",
    '{"vehicle": [], "other": ["x"]}', r'{"vehicle": ["\ud800"], "other": ["x"]}', '{"vehicle": [1], "other": ["x"]}',
])  # fmt: skip
def test_odd_prompts_get_a_sentence(text, tmp_path):
    (tmp_path / "p.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"p\.json is .*vehicle"):
        read_prompts(tmp_path / "p.json")


def test_odd_manifests_get_a_sentence_and_odd_boxes_are_listed(pool, tmp_path):
    """Every line is a table by itself: a sentence, or rows that are read or listed as unreadable."""
    assert parse_box("10, 20 30;40", 100, 100, 0) == (10, 20, 30, 40)
    assert parse_box("[10 20 30 40]", 35, 100, 0.5) == (0, 10, 35, 50)
    path, boxes = json.dumps(str(next((pool / "photos").rglob("*.jpg")))), ['"1 2 3"', '"a b c d"', '"200 200 300 300"']
    boxes += ['"nan nan nan nan"', '"1e999 0 5 5"', "[[[1]]]", "{}", "-1", '"٣ 0 50 50"']
    lines = [f'{{"path": {path}, "box": {box}}}' for box in boxes] + [f'{{"path": {path}, "pid": "\\ud800"}}']
    for number, line in enumerate([*lines, '{"path": "\\ud800.jpg"}', '{"path": "a\\u0000b"}', "[" * 9000]):
        (tmp_path / "m.jsonl").write_text(line)
        with contextlib.suppress(InputError):
            row, _ = measure_image(open_sources([f"a={tmp_path}/m.jsonl"], [], COLUMNS), 0, 0.05)
            assert len(row) == 16 and (row[-1] or number > 5) and "Traceback" not in row[-1]
