"""tools.search: what is found, what is kept on disk, what is refused; two runs that write to one place."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, refuses, run_command, run_main, write_pictures
from filelock import FileLock
from PIL import Image

import engine_extract
from datasets.images import open_rgb
from datasets.transforms import whole_image
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer
from tools import extract, pack, search
from tools.gallery import Gallery, search_rows


def tiny(seed: int) -> VisionTransformer:
    """Random weights, large enough that pictures differ."""
    torch.manual_seed(seed)
    model = VisionTransformer((32, 32), 16, 192, 1, 3)
    for block in model.blocks:
        torch.nn.init.normal_(block.mlp.fc2.weight, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("encoders")
    for seed in (0, 1):
        torch.save({"model": tiny(seed).state_dict()}, folder / f"{seed}.pth")
    return [folder / "0.pth", folder / "1.pth"]


@pytest.fixture
def gallery(tmp_path) -> Path:
    """13 pictures in two folders: 0005 is a copy of 0003, 0007 is broken."""
    folder = write_pictures(tmp_path / "gallery" / "a", 12).parent
    write_pictures(folder / "b", 1, seed=1)
    (folder / "a" / "0005.png").write_bytes((folder / "a" / "0003.png").read_bytes())
    (folder / "a" / "0007.png").write_bytes(b"broken")
    return folder


def run(*words: object, tool=search) -> dict:
    return run_main(tool, *words, "--device", "cpu", "--num_workers", "0", "--batch_size", "4")


def results(output: Path) -> list[dict]:
    return json.loads((output / "results.json").read_text())


def names(entry: dict) -> list[str]:
    return [Path(hit["path"]).name for hit in entry["results"]]


@pytest.mark.parametrize("block_numbers", [1, 113, 10**6])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_the_best_are_those_of_a_slow_search(block_numbers, k):
    rows = np.random.default_rng(0).normal(size=(41, 6)).astype(np.float16)
    rows[[3, 17, 18, 40]] = rows[9]  # many equal and unreadable rows, also whole runs of them
    rows[20:33] = rows[2]
    rows[[0, 8, 9 + 2, 35, 36, 37]] = np.nan
    query = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    query[0], query[1] = rows[9], rows[2]
    step = max(1, block_numbers // 10)
    blocks = [(np.arange(start, min(start + step, 41)), rows[start : start + step]) for start in range(0, 41, step)]
    cosines, found = search_rows(torch.from_numpy(query), blocks, k)
    assert cosines.shape == found.shape == (4, min(k, 41))
    for q, values, numbers in zip(query.astype(np.float64), cosines, found):
        pairs = [(-np.float32(q @ row / ((q @ q) * (row @ row)) ** 0.5), n) for n, row in enumerate(rows.astype(float))]
        expected, kept = sorted(pair for pair in pairs if np.isfinite(pair[0]))[:k], np.isfinite(values)
        assert kept.sum() == len(expected) and kept[: len(expected)].all()
        assert numbers[kept].tolist() == [number for _, number in expected]
        assert np.allclose(values[kept], [-cosine for cosine, _ in expected], atol=1e-7)


def test_embed_once_search_after(encoders, gallery, tmp_path, monkeypatch, capsys):
    output, query = tmp_path / "out", gallery / "a" / "0003.png"
    (tmp_path / "lost.png").write_bytes(b"broken")
    words = [query, tmp_path / "lost.png", gallery / "b" / "0000.png", "--gallery", gallery]
    words += ["--checkpoint", encoders[0], "--topk", "20"]
    counts = run(*words, "--output", output)
    assert counts["queries"] == 3 and counts["unreadable_queries"] == 1 and counts["same_file"] == 2
    assert counts["gallery"] == counts["embedded"] == 12 and counts["unreadable"] == 1
    said = capsys.readouterr().out
    for part in ("lost.png is left out: Unid", "(same file)", "a/0007.png: Unid", "13 images, 0 there", "1 unreadable"):
        assert part in said

    first, lost, second = results(output)
    assert lost["problem"].startswith("UnidentifiedImageError") and lost["results"] == []
    assert names(first)[:2] == ["0003.png", "0005.png"] and len(first["results"]) == 12
    assert [hit["same_file"] for hit in first["results"]] == [True] + [False] * 11
    assert second["results"][0]["path"] == str(gallery / "b" / "0000.png")
    assert "0007.png" not in names(first) + names(second)
    assert [hit["rank"] for hit in first["results"]] == list(range(1, 13))
    files = [gallery / "a" / f"{i:04d}.png" for i in range(12) if i != 7]
    with torch.no_grad():
        cls = tiny(0).encode(torch.stack([whole_image(open_rgb(file), (32, 32)) for file in files]))["cls"]
    cosines = dict(zip(map(str, files), torch.cosine_similarity(cls[3:4], cls).tolist()))
    for hit in first["results"]:
        assert hit["cosine"] == pytest.approx(cosines.get(hit["path"], hit["cosine"]), abs=1e-3)

    index = tmp_path / "out.index"
    kept = Gallery(index).features(range(12))
    assert kept.dtype == np.float16 and np.allclose(np.linalg.norm(kept.astype(np.float32), axis=1), 1, atol=1e-3)
    assert {file.name for file in index.iterdir()} <= {"index.json", "segment-00000000.npz", ".lock"}
    picture = Image.open(output / "results.png")
    assert picture.width > 12 * search.TILE and picture.height < 3 * (search.TILE + 48)

    seen, real = [], search.extract_to_file
    monkeypatch.setattr(
        search, "extract_to_file", lambda e, images, **k: seen.append(len(images)) or real(e, images, **k)
    )
    again = run(*words, "--output", tmp_path / "other", "--index", index)  # the unreadable one is tried again
    assert again["embedded"] == 0 and seen == [1] and results(tmp_path / "other") == [first, lost, second]
    without = run(query, *words[3:-1], "3", "--output", output, "--exclude_self")
    assert without["same_file"] == 0 and names(results(output)[0])[0] == "0005.png"
    assert len(results(output)[0]["results"]) == 3

    own = [*words, "--output", output, "--index", index]  # another job is refused, and damage
    refuses("its checkpoint_sha256 differ", run, *own, "--checkpoint", encoders[1])
    refuses("its img_size differ", run, *own, "--input_size", "48")
    refuses("its read_out differ", run, *own, "--read_out", "mean")
    (gallery / "a" / "0002.png").unlink()  # it stays in the index until it is removed
    assert run(*own)["gallery"] == 12 and names(results(output)[0]) == names(first)
    for content in (b"{", b"[" * 99_999):
        (index / "index.json").write_bytes(content)
        refuses("damaged", run, *own)


def test_names_of_any_kind(encoders, tmp_path, capsys, monkeypatch):
    folder = os.fsencode(write_pictures(tmp_path / "odd", 1))
    odd = b"\xc3\xa4 \xff line\nbreak <script> -dash \x1b[31m '\""
    for name in [*odd.split(b" "), 251 * b"a"]:
        shutil.copy(os.path.join(folder, b"0000.png"), os.path.join(folder, name + b".png"))
    drawn, real = [], search.ImageDraw.ImageDraw.text
    monkeypatch.setattr(search.ImageDraw.ImageDraw, "text", lambda *a, **k: drawn.append(a[2]) or real(*a, **k))
    output = tmp_path / "out"
    found = run(tmp_path / "odd", "--gallery", tmp_path / "odd", "--checkpoint", encoders[0], "--output", output)
    assert found["queries"] == found["same_file"] == 9 and len(results(output)) == 9
    said = capsys.readouterr().out
    for shown in ("ä.png", "\\xff.png", "line\\nbreak.png", "<script>.png", "\\x1b[31m.png"):
        assert f"{shown}:\n" in said and any(text.endswith(f"\n{shown}") for text in drawn)
    assert "\x1b" not in said and search.FONT.name == "DejaVuSans.ttf"


def test_a_stopped_index_goes_on(encoders, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_extract, "PART_IMAGES", 4)
    words = [gallery / "a" / "0001.png", "--gallery", gallery, "--checkpoint", encoders[0]]
    run(*words, "--output", tmp_path / "straight")
    words, seen, real = [*words, "--output", tmp_path / "broken"], [], VisionTransformer.encode

    def encode(model, imgs):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(imgs))
        return real(model, imgs)

    monkeypatch.setattr(VisionTransformer, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert Gallery(tmp_path / "broken.index").count == 7  # of two parts, one picture is unreadable
    seen.clear()
    refuses("its checkpoint_sha256 differ", run, *words[:4], encoders[1], *words[5:])
    seen[:] = [0] * 9
    assert run(*words)["embedded"] == 5 and seen[9:] == [1, 4, 2]
    kept, straight = (
        {row["path"]: index.features([number])[0] for number, row in index.scan()}
        for index in (Gallery(tmp_path / "broken.index"), Gallery(tmp_path / "straight.index"))
    )
    assert kept.keys() == straight.keys() and len(kept) == 12
    assert all(np.allclose(kept[path], straight[path], atol=1e-3) for path in kept)  # other batches, rounding


@pytest.mark.parametrize("tool, place", [(extract, "x.parts"), (search, "x"), (search, "x.index")])
def test_the_second_of_two_runs_is_told_so(encoders, gallery, tmp_path, monkeypatch, tool, place):
    where, real = ["--data_path", gallery] if tool is extract else [gallery, "--gallery", gallery], FileLock.acquire
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(FileLock, "acquire", lambda lock, timeout=0: real(lock, timeout=min(timeout, 0.1)))
    given = [*where, "--checkpoint", encoders[0], "--output", tmp_path / "x"]
    with FileLock(tmp_path / place / ".lock"):
        refuses(f"{place} .*another run is writing", run, *given, tool=tool)


def save_reid(file: Path, **config) -> TransReID:
    encoder, config = tiny(3), TransReIDConfig(**config)
    known = {"num_classes": 5, "reid": vars(config), "set": "veri776", "camera_names": None, "view_names": None}
    description = {"kind": "test", "task": "reid", **encoder.settings(), **known}
    model = TransReID(encoder, 5, config).eval()
    torch.save({"model": model.state_dict(), "config": description}, file)
    return model


def test_reid_models(gallery, tmp_path):
    file = tmp_path / "reid.pth"
    words = [gallery / "a", "--gallery", gallery, "--checkpoint", file, "--output", tmp_path / "out"]
    for config in ({"cameras": 3}, {"views": 2}):
        save_reid(file, **config)
        refuses("trained without --sie_camera and --sie_view", run, *words)
    model = save_reid(file, jpm=True, shift=2, parts=2)
    refuses("trained at 32 x 32 px: leave --input_size out", run, *words, "--input_size", "48")
    refuses("--read_out mean: .* of its own", run, *words, "--read_out", "mean")
    assert not (tmp_path / "out.index").exists()
    assert run(*words, "--topk", "1")["queries"] == 12
    with torch.no_grad():
        expected = model.encode(whole_image(open_rgb(gallery / "a" / "0004.png"), (32, 32))[None])[0]
    kept = Gallery(tmp_path / "out.index").features(range(12)).astype(np.float32)
    assert kept.shape == (12, 3 * 192) and np.allclose(kept[4], expected / expected.norm(), atol=1e-3)
    found = {Path(entry["query"]).name: names(entry) for entry in results(tmp_path / "out")}
    assert found["0007.png"] == [] and found["0005.png"] == ["0003.png"] and found["0009.png"] == ["0009.png"]


def test_mean_of_the_patches_of_a_packed_set(encoders, gallery, tmp_path):
    packed, table = tmp_path / "packed", tmp_path / "queries.txt"
    run_main(pack, "--data_path", gallery, "--output", packed)
    table.write_text(f"{gallery}/a/0001.png\n{gallery}/b/0000.png\n")
    words = ["--checkpoint", encoders[0], "--output", tmp_path / "out", "--topk", "2"]
    words += ["--read_out", "mean", "--input_size", "48,32"]
    run(table, "--gallery", packed, *words)
    assert run(packed, "--gallery", packed, *words)["same_file"] == 12
    assert results(tmp_path / "out")[1]["results"][0]["path"] == f"{packed}:a/0001.png"
    assert run(table, "--gallery", packed, *words)["already"] == 12
    moved = packed.rename(tmp_path / "moved")  # another place, other names
    gone = run("--remove", packed, "--index", tmp_path / "out.index", "--output", tmp_path / "r")
    assert (gone["removed"], gone["gallery"]) == (12, 0)
    assert run(table, "--gallery", moved, *words)["embedded"] == 12
    assert results(tmp_path / "out")[0]["results"][0]["path"] == f"{moved}:a/0001.png"
    assert np.ptp(np.asarray(Image.open(tmp_path / "out" / "results.png").convert("L"))[40:90, 150:250]) > 0


def test_mistakes_end_in_a_sentence(encoders, gallery, tmp_path):
    query, common = gallery / "a" / "0001.png", ["--gallery", gallery, "--checkpoint", encoders[0]]
    common += ["--output", tmp_path / "out"]
    refuses("--topk 0: must be at least 1", run, query, *common, "--topk", "0")
    refuses("--gallery .*no does not exist", run, query, *common, "--gallery", tmp_path / "no")
    refuses("none of the 1 queries could be read", run, gallery / "a" / "0007.png", *common)
    refuses("no.png does not exist", run, query, tmp_path / "no.png", *common, "--checkpoint", "no.pth")
    refuses("0001.png cannot be written to", run, query, *common, "--output", query, "--checkpoint", "no.pth")
    assert not (tmp_path / "out.index").exists()


def test_two_ranks_share_what_is_added(encoders, gallery, tmp_path):
    words = ["-m", "tools.search", "--gallery", gallery, "--checkpoint", encoders[0], "--device", "cpu"]
    words += ["--num_workers", "0", "--output", tmp_path / "out"]
    done = run_command(command(*map(str, words), processes=2))
    assert done.returncode == 0 and "added: 12 of 13, the index holds 12" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["embedded"] == 12
