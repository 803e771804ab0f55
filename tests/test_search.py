"""tools.search: what is found, what is kept on disk, what is refused."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image

import engine_extract
from datasets.images import open_rgb
from datasets.transforms import whole_image
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer
from tools import pack, search
from util.cli import run_tool
from util.errors import InputError


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


def flags(*words: object) -> list[str]:
    return [*map(str, words), "--device", "cpu", "--num_workers", "0", "--batch_size", "4"]


def run(*words: object) -> dict:
    return search.main(search.get_args_parser().parse_args(flags(*words)))


def results(output: Path) -> list[dict]:
    return json.loads((output / "results.json").read_text())


def names(entry: dict) -> list[str]:
    return [Path(hit["path"]).name for hit in entry["results"]]


def no_embedding(monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the gallery is embedded again")

    monkeypatch.setattr(search, "extract_to_file", refuse)


def slow_search(query: np.ndarray, rows: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    """By sorting Python tuples, one pair at a time."""
    lists = []
    for q in query.astype(np.float64):
        pairs = []
        for number, row in enumerate(rows.astype(np.float64)):
            if not np.isnan(row).any():
                cosine = np.float32(sum(q * row) / (sum(q * q) * sum(row * row)) ** 0.5)
                pairs.append((-cosine, number))
        lists.append([(-cosine, number) for cosine, number in sorted(pairs)[:k]])
    return lists


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """[41, 6] float16: many equal and unreadable rows, also whole runs of them."""
    values = np.random.default_rng(0).normal(size=(41, 6)).astype(np.float16)
    values[[3, 17, 18, 40]] = values[9]
    values[20:33] = values[2]
    values[[0, 8, 9 + 2, 35, 36, 37]] = np.nan
    return values


@pytest.mark.parametrize("block_numbers", [1, 113, 10**6])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_the_best_are_those_of_a_slow_search(rows, block_numbers, k):
    query = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    query[0], query[1] = rows[9], rows[2]
    cosines, found = search.search_rows(torch.from_numpy(query), rows, k, block_numbers)
    assert cosines.shape == found.shape == (4, min(k, 41))
    for values, numbers, expected in zip(cosines, found, slow_search(query, rows, k)):
        kept = np.isfinite(values)
        assert kept.sum() == len(expected) and kept[: len(expected)].all()
        assert numbers[kept].tolist() == [number for _, number in expected]
        assert np.allclose(values[kept], [cosine for cosine, _ in expected], atol=1e-7)


def test_embed_once_search_after(encoders, gallery, tmp_path, monkeypatch, capsys):
    output, query = tmp_path / "out", gallery / "a" / "0003.png"
    (tmp_path / "lost.png").write_bytes(b"broken")
    words = [query, tmp_path / "lost.png", gallery / "b" / "0000.png", "--gallery", gallery]
    words += ["--checkpoint", encoders[0], "--topk", "20"]
    numbers = run(*words, "--output", output)
    assert numbers["queries"] == 3 and numbers["unreadable_queries"] == 1 and numbers["same_file"] == 2
    assert numbers["gallery"] == numbers["embedded"] == 13 and numbers["unreadable"] == 1
    said = capsys.readouterr().out
    assert said.count("lost.png is left out: Unid") == 1 and "(same file)" in said and "a/0007.png: Unid" in said
    assert "13 images under" in said and "1 of them unreadable" in said

    first, lost, second = results(output)
    assert lost["problem"].startswith("UnidentifiedImageError") and lost["results"] == []
    assert names(first)[:2] == ["0003.png", "0005.png"] and len(first["results"]) == 12
    assert [hit["same_file"] for hit in first["results"]] == [True] + [False] * 11
    assert second["results"][0]["path"] == str(gallery / "b" / "0000.png")
    assert "0007.png" not in names(first) + names(second)
    assert [hit["rank"] for hit in first["results"]] == list(range(1, 13))
    files = [gallery / "a" / f"{i:04d}.png" for i in range(12) if i != 7]
    imgs = torch.stack([whole_image(open_rgb(file), (32, 32)) for file in files])
    with torch.no_grad():
        cls = tiny(0).encode(imgs)["cls"]
    cosines = dict(zip(map(str, files), torch.cosine_similarity(cls[3:4], cls).tolist()))
    for hit in first["results"]:
        assert hit["cosine"] == pytest.approx(cosines.get(hit["path"], hit["cosine"]), abs=1e-3)

    index = tmp_path / "out.index"
    kept = np.load(index / "embeddings.npy", allow_pickle=False)
    assert kept.dtype == np.float16 and np.isnan(kept[7]).all()
    assert np.allclose(np.linalg.norm(np.delete(kept, 7, 0).astype(np.float32), axis=1), 1, atol=1e-3)
    assert sorted(file.name for file in index.iterdir()) == ["embeddings.npy", "index.json"]
    picture = Image.open(output / "results.png")
    assert picture.width > 12 * search.TILE and picture.height < 3 * (search.TILE + 48)

    no_embedding(monkeypatch)
    again = run(*words, "--output", tmp_path / "other", "--index", index)
    assert again["embedded"] == 0 and results(tmp_path / "other") == [first, lost, second]
    without = run(*words[:1], *words[3:-1], "3", "--output", output, "--exclude_self")
    assert (
        without["same_file"] == 0
        and len(results(output)[0]["results"]) == 3
        and names(results(output)[0])[0] == "0005.png"
    )


def test_names_of_any_kind(encoders, tmp_path, capsys, monkeypatch):
    folder = os.fsencode(write_pictures(tmp_path / "odd", 1))
    names = b"\xc3\xa4 \xff line\nbreak <script> -dash \x1b[31m '\""
    for name in [*names.split(b" "), 251 * b"a"]:
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


def test_another_job_is_refused(encoders, gallery, tmp_path, monkeypatch):
    query, index = gallery / "a" / "0001.png", tmp_path / "index"
    words = [query, "--output", tmp_path / "out", "--gallery", gallery, "--index", index]
    own = [*words, "--checkpoint", encoders[0]]
    run(*own)
    no_embedding(monkeypatch)
    kept = (index / "embeddings.npy").read_bytes()
    for more, differs in (
        ([*words, "--checkpoint", encoders[1]], "checkpoint_sha256"),
        ([*own, "--input_size", "48"], "img_size"),
        ([*own, "--read_out", "mean"], "read_out"),
    ):
        with pytest.raises(InputError, match=f"its {differs} differ"):
            run(*more)
    arrays = kept[:-9], b"", b"\x93NUMPY\x01\0\x02\0((", kept[:-2] + b"\x00\x7c"  # the last number: infinite
    odd = [("embeddings.npy", content) for content in arrays]
    for name, content in [*odd, *(("index.json", content) for content in (b"{", b"[1]", b"\xff", b"[" * 99_999))]:
        whole = (index / name).read_bytes()
        (index / name).write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            run(*own)
        (index / name).write_bytes(whole)
    (gallery / "a" / "0002.png").unlink()
    with pytest.raises(InputError, match="its images_sha256, images differ"):
        run(*own)
    assert (index / "embeddings.npy").read_bytes() == kept


def test_a_stopped_index_goes_on(encoders, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_extract, "PART_IMAGES", 4)
    words = [gallery / "a" / "0001.png", "--gallery", gallery, "--checkpoint", encoders[0]]
    run(*words, "--output", tmp_path / "straight")
    words += ["--output", tmp_path / "broken"]
    real, seen, last = search.load_embedder, [], 3

    def load(*arguments):
        embed, size = real(*arguments)

        def counting(imgs):
            if len(seen) == last:
                raise KeyboardInterrupt
            seen.append(len(imgs))
            return embed(imgs)

        return counting, size

    monkeypatch.setattr(search, "load_embedder", load)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert len(list((tmp_path / "broken.index" / "embeddings.parts").glob("part_*.npy"))) == 2
    last = 99
    with pytest.raises(InputError, match="its checkpoint_sha256 differ"):
        run(*words[:4], encoders[1], *words[5:])
    seen = []
    assert run(*words)["embedded"] == 13 and seen == [1, 4, 1]
    for name in ("embeddings.npy", "index.json"):
        assert (tmp_path / "broken.index" / name).read_bytes() == (tmp_path / "straight.index" / name).read_bytes()
    assert results(tmp_path / "broken") == results(tmp_path / "straight")


def save_reid(file: Path, **config) -> TransReID:
    encoder, config = tiny(3), TransReIDConfig(**config)
    known = {"num_classes": 5, "reid": asdict(config), "set": "veri776", "camera_names": None, "view_names": None}
    description = {"kind": "test", "task": "reid", **encoder.settings(), **known}
    model = TransReID(encoder, 5, config).eval()
    torch.save({"model": model.state_dict(), "config": description}, file)
    return model


def test_reid_models(gallery, tmp_path):
    file = tmp_path / "reid.pth"
    words = [gallery / "a", "--gallery", gallery, "--checkpoint", file, "--output", tmp_path / "out"]
    for config in ({"cameras": 3}, {"views": 2}):
        save_reid(file, **config)
        with pytest.raises(InputError, match="trained without --sie_camera and --sie_view"):
            run(*words)
    model = save_reid(file, jpm=True, shift=2, parts=2)
    with pytest.raises(InputError, match="trained at 32 x 32 px: leave --input_size out"):
        run(*words, "--input_size", "48")
    with pytest.raises(InputError, match="--read_out mean: .* of its own"):
        run(*words, "--read_out", "mean")
    assert not (tmp_path / "out.index").exists()
    assert run(*words, "--topk", "1")["queries"] == 12
    kept = np.load(tmp_path / "out.index" / "embeddings.npy").astype(np.float32)
    imgs = whole_image(open_rgb(gallery / "a" / "0004.png"), (32, 32))[None]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode(imgs), dim=1)[0]
    assert kept.shape == (13, 3 * 192) and np.allclose(kept[4], expected, atol=1e-3)
    found = {Path(entry["query"]).name: names(entry) for entry in results(tmp_path / "out")}
    assert found["0007.png"] == [] and found["0005.png"] == ["0003.png"] and found["0009.png"] == ["0009.png"]


def test_mean_of_the_patches_of_a_packed_set(encoders, gallery, tmp_path):
    packed, table = tmp_path / "packed", tmp_path / "queries.txt"
    pack.main(pack.get_args_parser().parse_args(["--data_path", str(gallery), "--output", str(packed)]))
    table.write_text(f"{gallery}/a/0001.png\n{gallery}/b/0000.png\n")
    words = ["--checkpoint", encoders[0], "--output", tmp_path / "out", "--topk", "2"]
    words += ["--read_out", "mean", "--input_size", "48,32"]
    run(table, "--gallery", packed, *words)
    assert run(packed, "--gallery", packed, *words)["same_file"] == 12
    assert results(tmp_path / "out")[1]["results"][0]["path"] == f"{packed}:a/0001.png"
    moved = packed.rename(tmp_path / "moved")
    assert run(table, "--gallery", moved, *words)["embedded"] == 0
    assert results(tmp_path / "out")[0]["results"][0]["path"] == f"{moved}:a/0001.png"


def test_mistakes_end_in_a_sentence(encoders, gallery, tmp_path, monkeypatch, capsys):
    query, common = gallery / "a" / "0001.png", ["--gallery", gallery, "--checkpoint", encoders[0]]
    common += ["--output", tmp_path / "out"]
    for words, sentence in (
        ([query, *common, "--topk", "0"], "--topk 0: must be at least 1"),
        ([query, *common, "--gallery", tmp_path / "no"], "--gallery .*no does not exist"),
        ([gallery / "a" / "0007.png", *common], "none of the 1 queries could be read"),
        ([query, tmp_path / "no.png", *common, "--checkpoint", "no.pth"], "no.png does not exist"),
        ([query, *common, "--output", query, "--checkpoint", "no.pth"], "0001.png cannot be written to"),
    ):
        with pytest.raises(InputError, match=sentence):
            run(*words)
        assert not (tmp_path / "out.index").exists()
    monkeypatch.setattr(sys, "argv", ["search", *flags(tmp_path / "no.png", *common)])
    with pytest.raises(SystemExit) as stopped:
        args = search.get_args_parser().parse_args()
        run_tool(search.main, args, Path(args.output) / "metrics.json")
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")
