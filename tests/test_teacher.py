"""The frozen teacher, its text bank and its stored embeddings."""

import json
import shutil
import socket
import sys
from dataclasses import asdict

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import command, parse, read_log, run_command, small_flags
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import main_pretrain
import models_teacher
from datasets.items import PretrainDataset
from datasets.path_list import list_images
from datasets.teacher import TeacherCache, TeacherIdentity, read_encoded, save_bank, write_shard
from datasets.transforms import whole_image
from models_teacher import FrozenTeacher, build_bank, encode_texts, load_clip
from tools import reinforce
from util.checkpoint import read_checkpoint
from util.errors import InputError
from util.files import write_json


@pytest.fixture(scope="module")
def clip(teacher_files):
    return load_clip(str(teacher_files[0]), str(teacher_files[1]))


def test_any_size_goes_in_and_frozen_it_stays(clip):
    model, _, identity = clip
    teacher = FrozenTeacher(model, identity, torch.float32)
    assert teacher(torch.zeros(2, 3, 50, 70, dtype=torch.uint8)).shape == (2, identity.embed_dim)
    assert identity.tau == pytest.approx(1 / model.logit_scale.exp().item())
    teacher.train()
    assert not teacher.clip.visual.training and not any(p.requires_grad for p in teacher.parameters())


SMALL_TEXT = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
SMALL = {  # one of each family of open_clip's, shrunk: (its config, what is smaller)
    "ViT-B-32": {"layers": 1, "width": 32, "head_width": 16, "image_size": 64},
    "RN50": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64},
    "convnext_base": {"timm_model_name": "convnext_atto", "image_size": 64},
    "EVA02-B-16": {"timm_model_name": "eva02_tiny_patch14_224"},
    "ViT-B-16-SigLIP": {},
    "ViT-B-32-SigLIP2-256": {},
    "coca_ViT-B-32": {"layers": 1, "width": 32, "head_width": 16, "image_size": 64, "attn_pooler_heads": 2},
    "MobileCLIP-S1": {"timm_model_name": "fastvit_mci0"},
    "PE-Core-T-16-384": {},
}
VIEWS = [*((name, "shortest") for name in SMALL), ("ViT-B-32", "longest"), ("ViT-B-32", "squash")]


@pytest.mark.parametrize("name, resize", VIEWS)
def test_every_family_sees_what_open_clip_shows_it(tmp_path, name, resize):
    config = open_clip.get_model_config(name)
    config["vision_cfg"] |= SMALL[name]
    config["text_cfg"] = SMALL_TEXT
    if "multimodal_cfg" in config:
        config |= {"multimodal_cfg": SMALL_TEXT | {"attn_pooler_heads": 2}, "embed_dim": 32}
    (tmp_path / "Small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Small.json")
    tag = open_clip.get_pretrained_cfg(name, open_clip.list_pretrained_tags_by_model(name)[0])
    shown = {k: tag[k] for k in ("mean", "std", "interpolation")} | {"resize_mode": resize}
    model = open_clip.create_model("Small", pretrained_text=False, force_preprocess_cfg=shown).eval()
    identity = models_teacher.TeacherIdentity("Small", "", 0, 1.0)
    preprocess = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), False)
    draws = (np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 95), (77, 51)))
    pictures = [Image.fromarray(draw).resize((3 * draw.shape[1], 3 * draw.shape[0])) for draw in draws]
    with torch.no_grad():
        wanted = F.normalize(model.encode_image(torch.stack([preprocess(picture) for picture in pictures])), dim=1)
    teacher = FrozenTeacher(model, identity, torch.float32)
    found = teacher(torch.stack([whole_image(picture, teacher.size) for picture in pictures]))
    assert torch.allclose(found, wanted, atol=1e-5), (found - wanted).abs().max()


def test_a_tokenizer_without_transformers_says_what_to_install(teacher_files, tmp_path, monkeypatch):
    config = json.loads(teacher_files[0].read_text())
    config["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP2"
    (tmp_path / "Gemma.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="^the tokenizer of .*Gemma.json .*pip install transformers"):
        load_clip(str(tmp_path / "Gemma.json"), str(teacher_files[1]))


def test_files_need_no_network_and_missing_weights_say_how_to_supply_them(teacher_files, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    model, tokenizer, _ = load_clip(*map(str, teacher_files))
    assert encode_texts(model, tokenizer, ["a car", "a van"]).shape == (2, 24)
    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    supply = r"\(1\) .*\(2\) .*\(3\) --clip_model ViT-L-14-quickgelu --clip_pretrained /path/to[^\n]*$"
    with pytest.raises(InputError, match=supply):
        load_clip("ViT-L-14", "openai")


class Archive(torch.nn.Module):
    """Names at the top and three numbers beside the weights, as in OpenAI's archives."""

    def __init__(self, clip):
        super().__init__()
        for name, part in [*clip.named_children(), *clip.named_parameters(recurse=False)]:
            setattr(self, name, part)
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(32))

    def forward(self, x):
        return self.visual(x)


@pytest.mark.parametrize("quick", [False, True])
def test_a_torchscript_archive_is_read_with_its_activation(teacher_files, tmp_path, quick):
    theirs = open_clip.create_model("MiniClip-test", force_quick_gelu=quick).eval()
    torch.jit.trace(Archive(theirs), torch.zeros(1, 3, 32, 32), check_trace=False).save(tmp_path / "ViT.pt")
    torch.save(torch.jit.load(tmp_path / "ViT.pt").state_dict(), tmp_path / "state.pt")
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name in ("ViT.pt", "state.pt"):
        clip, _, identity = load_clip(str(teacher_files[0]), str(tmp_path / name))
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in clip.state_dict().items())
    teacher = FrozenTeacher(load_clip(str(teacher_files[0]), str(tmp_path / "ViT.pt"))[0], identity, torch.float32)
    wanted = F.normalize(theirs.encode_image((imgs / 255 - teacher.mean) / teacher.std), dim=1)
    assert torch.allclose(teacher(imgs), wanted, atol=1e-6)
    assert read_checkpoint(tmp_path / "ViT.pt")["quick_gelu"] == quick


def test_mean_and_std_are_read_or_asked_for(teacher_files, tmp_path):
    """Of the folder, beside the file, of the tags that agree; else never OpenAI's without a word."""
    model_cfg, folder = json.loads(teacher_files[0].read_text()), tmp_path / "hub"
    folder.mkdir()
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_pytorch_model.bin").write_bytes(teacher_files[1].read_bytes())
    file, bare = str(folder / "open_clip_pytorch_model.bin"), str(teacher_files[0])
    for model, weights, mean, std in (
        (str(folder), "openai", 0.5, 0.25), (f"local-dir:{folder}", file, 0.5, 0.25),
        (str(folder / "open_clip_config.json"), file, 0.5, 0.25), (bare, file, 0.5, 0.25),
        (bare, str(teacher_files[1]), 0.48145466, 0.26862954),
    ):  # fmt: skip
        teacher = FrozenTeacher(*load_clip(model, weights)[::2], torch.float32)
        assert teacher.mean.flatten()[0] == pytest.approx(mean) and teacher.std.flatten()[0] == pytest.approx(std)
        assert teacher.size.resize_mode == ("squash" if mean == 0.5 else "shortest")
    said = load_clip(bare, str(teacher_files[1]), [0.1, 0.2, 0.3], [0.9] * 3)
    assert FrozenTeacher(said[0], said[2], torch.float32).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    for name, mean in (("ViT-B-16-SigLIP", [0.5] * 3), ("ViT-L-14", None)):  # tags that agree, tags that differ
        known, words = models_teacher._preprocessing(name, {}, {}, teacher_files[1], {})
        assert list(known.get("mean") or []) == (mean or []), words
    with pytest.raises(InputError, match="the .* tags of ViT-L-14 differ: give --clip_mean and --clip_std"):
        load_clip("ViT-L-14", str(teacher_files[1]))
    with pytest.raises(InputError, match="--clip_std 0.0 0.0 0.0: give three positive numbers"):
        load_clip(bare, str(teacher_files[1]), [0.5] * 3, [0.0] * 3)


@pytest.mark.parametrize("model, pretrained, message", [
    ("ViT-L-14", "no_such_tag", "neither a file nor a tag of ViT-L-14"), ("no/such.json", "x.pt", "does not exist"),
    ("ViT-L-99", "openai", "similar: ViT-L-14"), ("ours", "w.pt", "do not load into"),
])  # fmt: skip
def test_wrong_teachers(teacher_files, tmp_path, monkeypatch, model, pretrained, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.proj": torch.zeros(2, 2)}, "w.pt")
    with pytest.raises(InputError, match=message):
        load_clip(str(teacher_files[0]) if model == "ours" else model, pretrained)


def test_bank_files(clip, texts_file, tmp_path):
    model, tokenizer, identity = clip
    bank, texts, _ = build_bank(str(texts_file), model, tokenizer, identity)
    assert bank.shape == (5, 24) and torch.allclose(bank.norm(dim=1), torch.ones(5), atol=1e-5)
    save_bank(tmp_path / "bank.safetensors", bank, texts, identity)
    again, same_texts, _ = read_encoded(tmp_path / "bank.safetensors", identity)
    assert torch.equal(bank, again) and texts == same_texts
    (tmp_path / "one.txt").write_text("a car\na car\n")
    (tmp_path / "bad.jsonl").write_text('{"caption": "x"}\n')
    stranger = identity.__class__("other", "0" * 64, 24, 0.07)
    for name, whose, message in (
        ("bank.safetensors", stranger, "made by teacher MiniClip-test"), ("one.txt", identity, "holds 1 texts"),
        ("bad.jsonl", identity, "no column 'text': it has caption"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            build_bank(str(tmp_path / name), model, tokenizer, whose)


def test_the_same_weights_with_another_activation_are_another_teacher(clip, teacher_files, tmp_path):
    config = json.loads(teacher_files[0].read_text())
    for name, more in (("same", {}), ("quick", {"quick_gelu": True})):
        file = tmp_path / f"MiniClip-{name}.json"
        file.write_text(json.dumps(config | more))
        found = load_clip(str(file), str(teacher_files[1]))[2].weights_sha256
        assert (found == clip[2].weights_sha256) == (name == "same")


def rebuild(words: str, *elsewhere) -> dict:
    """tools.reinforce in this process, with the same words but for some paths."""
    for old, new in elsewhere:
        words = words.replace(f" {old}", f" {new}")
    return reinforce.main(parse(reinforce.get_args_parser(), words.split()))


@pytest.fixture(scope="module")
def cache(pictures, teacher_files, texts_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "crops"
    words = f"--data_path {pictures} --output {folder} --views 3 --input_size 32 --device cpu --num_workers 0"
    words += f" --clip_model {teacher_files[0]} --clip_pretrained {teacher_files[1]} --text_bank {texts_file}"
    rebuild(words)
    return folder, words


@pytest.mark.parametrize("processes", [1, 2])
def test_cache_stands_in_for_the_teacher(cache, pictures, teacher_files, texts_file, tmp_path, processes):
    """Three epochs on three stored views follow the online run within fp16 storage."""
    online, stored = tmp_path / "online", tmp_path / "stored"
    teacher = f"--clip_model {teacher_files[0]} --clip_pretrained {teacher_files[1]} --text_bank {texts_file}"
    more = f"--blr 0.02 --epochs 3 --batch_size {8 // processes} --kl_weight 0.05"
    for out, flags in ((online, teacher), (stored, f"--teacher_cache {cache[0]}")):
        words = small_flags(pictures, out, *flags.split(), *more.split())
        done = run_command(command("main_pretrain.py", *words, processes=processes))
        assert done.returncode == 0, done.stderr
    assert len(read_log(online)) == 3
    for a, b in zip(read_log(online), read_log(stored), strict=True):
        for key in ("train_loss", "train_loss_sim", "train_loss_kl", "train_cos_baseline"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key  # fp16 moves a small term


def test_whitened_embeddings_vary_alike_in_all_directions(tmp_path):
    """Numbers by numpy's covariance: 200 rows in 3 of 4 directions, one unreadable; small ones are not blown up."""
    rows = np.random.default_rng(0).standard_normal((200, 4)) * [1, 0.3, 0.1, 1e-3] + [3, 0, 0, 0]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    rows[7] = 0
    teacher = asdict(TeacherIdentity("x", "y", 4, 1.0))
    write_json(tmp_path / "cache.json", {"teacher": teacher, "teacher_view": "full", "views": 1, "images": 200})
    write_shard(tmp_path, 0, 0, rows)
    cache, seen = TeacherCache(tmp_path), np.delete(rows, 7, axis=0).astype(np.float64)
    mean, scale = cache.whitening()
    assert np.allclose(mean, seen.mean(axis=0), atol=1e-6)
    variance = np.linalg.eigvalsh(np.cov(seen.T, bias=True))
    got = np.linalg.eigvalsh(np.cov(((seen - mean.numpy()) @ scale.numpy()).T, bias=True))
    assert np.allclose(got, np.sort(variance / (variance + 0.1 * variance.mean())), atol=1e-4)
    assert got[-1] > 0.9 and got[0] < 0.1 and torch.allclose(scale, scale.T, atol=1e-4)


def test_cache_is_checked_and_resumed(cache, pictures, texts_file, tmp_path):
    folder, words = cache
    wrong = {"--seed 1": "seed 0 in the cache, 1 here", "--clip_model ViT-B-32": "ViT-B-32: .* made by MiniClip-test"}
    for more, message in wrong.items():
        flags = small_flags(pictures, tmp_path / "run", "--teacher_cache", str(folder), *more.split())
        with pytest.raises(InputError, match=message):
            main_pretrain.main(parse(main_pretrain.get_args_parser(), flags))
    lost = next(folder.glob("view001*.npy"))
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(InputError, match="unfinished: 1 of 3"):
        TeacherCache(folder)
    rebuild(words)
    assert lost.read_bytes() == kept
    (tmp_path / "texts.txt").write_text("a red car\na blue car\n")
    with pytest.raises(InputError, match="seed differ"):
        rebuild(f"{words} --seed 5")
    with pytest.raises(InputError, match="its text_bank differ"):
        rebuild(words, (texts_file, tmp_path / "texts.txt"))


@pytest.mark.parametrize("name, spoil, message", [
    ("view000_shard00000.npy", lambda data: data[:140] + bytes([data[140] ^ 64]) + data[141:], "its checksum differs"),
    ("view000_shard00000.npy", lambda data: data[:-2] + b"\x00\x7e", "its checksum differs"),
    ("view001_shard00000.npy", lambda data: data[:-100], "is damaged"),
    ("view001_shard00000.npy", lambda data: b"", "is damaged"),
    ("view002_shard00000.json", lambda data: b"{", "is damaged"),
    ("cache.json", lambda data: data[:30], "cache.json is damaged"),
    ("cache.json", lambda data: b"[" * 100_000, "cache.json is damaged"),
])  # fmt: skip
def test_damage_of_a_cache_is_named_and_cured(cache, tmp_path, name, spoil, message):
    folder = tmp_path / "cache"
    shutil.copytree(cache[0], folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(spoil(whole))
    with pytest.raises(InputError, match=message):
        TeacherCache(folder)
    if name != "cache.json":
        rebuild(cache[1], (cache[0], folder))
        TeacherCache(folder)
        assert (folder / name).read_bytes() == whole


def test_a_picture_that_was_away_gets_its_own_embedding_later(cache, pictures, tmp_path, capsys):
    """Until then training passes it over, by name, and shows its neighbour with the neighbour's embedding."""
    photos, folder = tmp_path / "photos", tmp_path / "cache"
    shutil.copytree(pictures, photos)
    kept = (photos / "0004.png").read_bytes()
    (photos / "0004.png").write_bytes(b"")
    elsewhere = (cache[0], folder), (pictures, photos)
    rebuild(cache[1], *elsewhere)
    said = "unreadable, without an embedding until this command runs again: 0004.png"
    assert said in capsys.readouterr().out
    (photos / "0004.png").write_bytes(kept)
    settings = {"seed": 0, "min_area": 0.2, "teacher_cache": TeacherCache(folder)}
    dataset = PretrainDataset(list_images(photos), (32, 32), 4, **settings)
    item, neighbour = dataset[0, 4], dataset[0, 5]
    assert "no embedding in the teacher cache" in item["problem"] and torch.equal(item["imgs"], neighbour["imgs"])
    assert torch.equal(item["teacher_embed"], neighbour["teacher_embed"])
    assert rebuild(cache[1], *elsewhere)["written"] == 3
    for view in range(3):
        name = f"view{view:03d}_shard00000.npy"
        assert np.abs(np.load(folder / name) - np.load(cache[0] / name)).max() < 1e-3
