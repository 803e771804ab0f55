"""Files of weights: features in three lines, references, inspection without running, release, ONNX."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, run_command, small_flags, write_pictures
from PIL import Image

import models_vit
from checkpoints.inspection import inspect_file, table
from checkpoints.onnx_file import export_onnx
from checkpoints.reference import TOLERANCE, compare, reference_images, reference_of
from checkpoints.release import push, release
from checkpoints.verification import verify_file
from datasets.transforms import whole_image
from models_mae import MODELS, load_autoencoder
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import read_checkpoint, write_safetensors, write_torch
from util.checksums import check_sums, kind_of_sums
from util.errors import InputError

SIZE = (32, 48)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return VisionTransformer(SIZE, 16, 192, 2, 3, fused_attn=False).eval()


@pytest.fixture(scope="module")
def encoder_file(encoder, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    header = {"config": json.dumps({"kind": "CGD-MAE encoder", **encoder.settings()})}
    write_safetensors(file, encoder.state_dict(), header | {"reference": json.dumps(reference_of(encoder))})
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return sorted(write_pictures(tmp_path_factory.mktemp("photos"), 5, seed=3).iterdir())


# features in three lines


def test_every_kind_of_picture_gives_the_same_features(encoder_file, photos, tmp_path):
    encoder = load_encoder(encoder_file)
    images = [Image.open(photo).convert("RGB") for photo in photos]
    found = encoder.embed_images(images)
    D, L = 192, 6
    assert {k: tuple(v.shape) for k, v in found.items()} == {"cls": (5, D), "mean": (5, D), "tokens": (5, L, D)}
    by_hand = encoder.encode(torch.stack([whole_image(image, SIZE) for image in images]))
    uint8 = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    for other in (
        by_hand,
        encoder.embed_images(photos),
        encoder.embed_images([str(photo) for photo in photos], batch_size=2),
        encoder.embed_images(uint8),
        encoder.embed_images([photos[0], images[1], uint8[2], images[3].convert("RGBA"), images[4]]),
    ):
        assert all(torch.allclose(found[name], other[name], atol=1e-5) for name in found)
    assert torch.equal(encoder.embed_images(images[0])["cls"][0], encoder.embed_images(photos[0])["cls"][0])
    assert list(encoder.embed_images(images, read_outs=("mean",))) == ["mean"]
    turned = images[0].transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to see it upright"
    turned.save(tmp_path / "turned.png", exif=exif)
    again = encoder.embed_images([Image.open(tmp_path / "turned.png"), tmp_path / "turned.png"])["cls"]
    assert torch.allclose(again, found["cls"][[0, 0]], atol=1e-5)


def test_features_are_deterministic_also_in_training_mode(encoder_file, photos):
    encoder = load_encoder(encoder_file, drop_path=0.5)
    before = encoder.embed_images(photos)["cls"]
    encoder.train()
    assert torch.equal(encoder.embed_images(photos)["cls"], before) and encoder.training
    assert not before.requires_grad and before.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.embed_images(photos)["cls"], before)


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "no picture"),
        ([np.zeros((4, 4, 3))], "picture 0 is a ndarray"),
        ([torch.zeros(3, 8, 8)], "picture 0 is a torch.float32 tensor"),
        (["absent.jpg"], "picture 0 .absent.jpg. cannot be read"),
    ],
)
def test_what_is_no_picture_is_named(encoder_file, images, message):
    with pytest.raises(InputError, match=message):
        load_encoder(encoder_file).embed_images(images)
    with pytest.raises(InputError, match="read_outs 'cl'"):
        load_encoder(encoder_file).embed_images([Image.new("RGB", (9, 9))], read_outs=("cl",))


# references


def test_a_run_exports_a_reference_that_verifies(pictures, tmp_path):
    out = tmp_path / "run"
    done = run_command(command("main_pretrain.py", *small_flags(pictures, out, "--no_distill")))
    assert done.returncode == 0, done.stderr
    result = verify_file(out / "encoder.safetensors")
    assert result["verdict"] == "the same features as when it was written"
    assert result["cls_difference"] < 1e-5 and result["checksums"] == "crc32 of header and tensors"
    assert "no reference" in verify_file(out / "encoder.pth")["verdict"]
    facts = inspect_file(out / "checkpoint-last.pth")
    assert facts["progress"] == {"finished_epochs": 2} and facts["args"]["model"] == "mae_vit_tiny_patch16"
    assert "pre-training" in facts["kind"] and "decoder 128 wide, 8 blocks" in facts["architecture"]
    assert 0 < facts["losses"]["loss"] < 10 and facts["parts"]["decoder_blocks.*"][0] == 96
    released = release(out, tmp_path / "released", name="small", licence="Apache-2.0")
    assert released["verdict"] == "the same features as when it was written"
    as_a_newcomer(tmp_path / "released", out, pictures)
    again = release(out, tmp_path / "released", name="small", licence="MIT", data_card=ROOT / "CITATION.cff")
    assert "LICENSE" not in again["files"] and "--licence_file" in again["licence_text"]
    assert "without teacher" in (tmp_path / "released" / "README.md").read_text()
    assert (tmp_path / "released" / "DATA_CARD.md").read_text() == (ROOT / "CITATION.cff").read_text()
    for folder, name, message in (
        (out, tmp_path, "which is no file of a release"),
        (tmp_path, tmp_path / "x", "is no run of main_pretrain.py"),
        (out, ROOT / "LICENSE", "is a file"),
        (out, "/proc/nowhere/x", "cannot write the release"),
    ):
        with pytest.raises(InputError, match=message):
            release(folder, name, name="small", licence="MIT")
    with pytest.raises(InputError, match="--pictures absent.jpg cannot be read"):
        release(out, tmp_path / "x", name="small", licence="MIT", pictures=("absent.jpg",))
    assert not (tmp_path / "x").exists()
    (tmp_path / "released" / "thesis.tex").write_text("years of work")
    before = {file: file.read_bytes() for file in (tmp_path / "released").iterdir()}
    with pytest.raises(InputError, match="thesis.tex, which is no file of a release"):
        release(out, tmp_path / "released", name="small", licence="MIT")
    assert before == {file: file.read_bytes() for file in (tmp_path / "released").iterdir()}
    unfinished = tmp_path / "unfinished"
    shutil.copytree(out, unfinished)
    settings = json.loads((out / "args.json").read_text()) | {"epochs": 9}
    (unfinished / "args.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has finished 2 of 9 epochs"):
        release(unfinished, tmp_path / "x", name="small", licence="MIT")


def as_a_newcomer(folder, run, pictures):
    """The released files do what the card says."""
    wanted = {"README.md", "DATA_CARD.md", "LICENSE", "SHA256SUMS", "config.json", "encoder.pth"}
    wanted |= {"encoder.safetensors", "full.pth", "full.safetensors", "reconstruction.png"}
    assert {file.name for file in folder.iterdir()} == wanted
    photos = sorted(pictures.iterdir())[:3]
    files = [folder / name for name in ("encoder.safetensors", "encoder.pth", "full.pth")]
    features = [load_encoder(file).embed_images(photos)["cls"] for file in (*files, run / "encoder.pth")]
    assert all(torch.equal(features[0], other) for other in features)
    assert set(torch.load(folder / "encoder.pth", weights_only=True)) == {"model"}
    full = load_autoencoder(folder / "full.safetensors")
    assert torch.equal(full.decoder_pred.weight, load_autoencoder(run / "checkpoint-last.pth").decoder_pred.weight)
    facts = inspect_file(folder / "encoder.safetensors")
    assert facts["licence"] == "Apache-2.0" and "40 images" in facts["data"]
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == wanted - {"SHA256SUMS"} and sums["encoder.safetensors"] == facts["sha256"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0") and "| epochs | 2 |" in card and str(run) not in card
    assert str(pictures.parent) not in (folder / "DATA_CARD.md").read_text()
    assert Image.open(folder / "reconstruction.png").size[0] > 300


@pytest.mark.parametrize("fault", ["statistics", "filter", "crop", "weight", "nan"])
def test_a_reference_finds_faults(encoder, encoder_file, fault, monkeypatch):
    loaded = load_encoder(encoder_file)
    reference = reference_of(encoder)
    assert max(compare(reference, loaded, "x").values()) < 1e-5
    if fault == "statistics":
        loaded.set_pixel_stats((0.5,) * 3, (0.5,) * 3)
    elif fault == "filter":
        monkeypatch.setattr(models_vit, "whole_image", lambda image, size: nearest(image, size))
    elif fault == "crop":
        monkeypatch.setattr(
            models_vit, "whole_image", lambda image, size: whole_image(image.crop((8, 8, *image.size)), size)
        )
    elif fault == "weight":
        loaded.blocks[1].mlp.fc2.weight.data = loaded.blocks[1].mlp.fc2.weight.data.flip(0)
    else:
        loaded.blocks[1].mlp.fc1.weight.data[0, 0] = torch.nan
    assert not max(compare(reference, loaded, "x").values()) <= TOLERANCE


def nearest(image, size):
    return torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.NEAREST))).permute(2, 0, 1)


def test_reference_pictures_are_the_same_everywhere():
    import hashlib

    digest = hashlib.sha256(b"".join(image.tobytes() for image in reference_images())).hexdigest()
    assert digest == PICTURES_SHA256, "another version would call every released file damaged"


PICTURES_SHA256 = "8beddca171fb1c1f03d2b6f3d02198066c0c6670f559c00d68f303bd9e5e5bcf"


# damage


def test_damage_is_named(encoder, encoder_file, tmp_path):
    torch.save({"model": encoder.state_dict()}, tmp_path / "e.pth")
    for file in (tmp_path / "e.pth", encoder_file):
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 4
        flipped, cut = tmp_path / f"flipped{file.suffix}", tmp_path / f"cut{file.suffix}"
        flipped.write_bytes(content)
        cut.write_bytes(file.read_bytes()[:middle])
        check_sums(file)
        assert kind_of_sums(file).startswith("crc32")
        for bad, words in ((flipped, "is damaged .* bytes have changed"), (cut, "truncated or damaged|is damaged")):
            for use in (read_checkpoint, load_encoder, verify_file, inspect_file):
                with pytest.raises(InputError, match=words):
                    use(bad)
    write_torch(tmp_path / "nan.pth", {"model": encoder.state_dict() | {"norm.bias": torch.full((192,), torch.nan)}})
    with pytest.raises(InputError, match="not finite in 1 tensors, first norm.bias"):
        verify_file(tmp_path / "nan.pth")
    assert inspect_file(tmp_path / "nan.pth")["not_finite"] == ["norm.bias"]
    other = reference_of(VisionTransformer(SIZE, 16, 192, 2, 3).eval())
    write_safetensors(tmp_path / "other.safetensors", encoder.state_dict(), {
        "config": json.dumps(encoder.settings()), "reference": json.dumps(other)})  # fmt: skip
    with pytest.raises(InputError, match="answers its reference pictures differently"):
        verify_file(tmp_path / "other.safetensors")
    for broken in ("{", json.dumps(other | {"cls": "AAAA"}), json.dumps({"images": 3})):
        write_safetensors(tmp_path / "b.safetensors", encoder.state_dict(), {"reference": broken,
            "config": json.dumps(encoder.settings())})  # fmt: skip
        with pytest.raises(InputError, match="reference"):
            verify_file(tmp_path / "b.safetensors")


def test_a_changed_byte_anywhere_is_damage_and_nothing_else(tmp_path):
    """Not a traceback, and not an accusation: a flipped letter of a name is no foreign object."""
    content = {"model": {"a.weight": torch.arange(6.0), "b.weight": torch.zeros(3)}, "epoch": 3}
    torch.save(content, tmp_path / "whole.pth")
    header = {"config": json.dumps({"kind": "CGD-MAE encoder", "mean": [0.485, 0.4, 0.4]})}
    write_safetensors(tmp_path / "whole.safetensors", content["model"], header)
    for name in ("whole.pth", "whole.safetensors"):
        data = (tmp_path / name).read_bytes()
        file = tmp_path / f"flipped{Path(name).suffix}"
        found = {"damaged": 0, "same": 0}
        for position in range(0, len(data), 3):
            changed = bytearray(data)
            changed[position] ^= 4
            file.write_bytes(changed)
            for use in (read_checkpoint, inspect_file):
                try:
                    result = use(file)
                except InputError as error:
                    assert "Python objects" not in str(error), (position, str(error))
                    found["damaged"] += 1
                    continue
                found["same"] += 1
                if use is read_checkpoint:
                    for key, value in content["model"].items():
                        assert torch.equal(result["model"][key], value), position
                else:
                    assert "python_objects" not in result, position
        assert found["damaged"] > 100


def test_files_written_without_checksums_are_read(encoder, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": encoder.state_dict()}, tmp_path / "e.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(read_checkpoint(tmp_path / "e.pth")["model"]) == len(encoder.state_dict())


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {Payload.trace}",)


class Remote:
    def __reduce__(self):
        return torch.hub.load, ("attacker/repo", "x")


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_in_a_file_is_listed_and_not_run(encoder, tmp_path, zip_format):
    Payload.trace = tmp_path / "it_ran"
    file = tmp_path / "payload.pth"
    content = {"model": encoder.state_dict(), "extra": Payload()}
    torch.save(content, file, _use_new_zipfile_serialization=zip_format)
    facts = inspect_file(file)
    assert any("system" in name for name in facts["python_objects"]) and "refuses" in facts["kind"]
    assert facts["parts"]["blocks.*"][0] == 24 and facts["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert "posix.system" in table(facts)
    for use in (load_encoder, verify_file, read_checkpoint, lambda f: export_onnx(f, tmp_path / "x.onnx")):
        with pytest.raises(InputError, match="holds Python objects"):
            use(file)
    assert not Payload.trace.exists()
    hub = tmp_path / "hub.pth"
    torch.save({"model": {}, "x": Remote()}, hub)
    facts = inspect_file(hub)
    assert facts["python_objects"] == ["torch.hub.load"] and "refuses" in facts["kind"]
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps(Payload()))
    assert any("system" in name for name in inspect_file(bare)["python_objects"])
    assert not Payload.trace.exists()
    done = run_command(command("-m", "tools.checkpoint", "inspect", str(file)))
    assert done.returncode == 0 and "posix.system" in done.stdout and not Payload.trace.exists()


@pytest.mark.parametrize(
    "config", [{"mean": [0.5]}, {"img_size": 96}, {"num_heads": "3"}, {"patch_size": -1}, {"std": [0, 1, 1]}]
)
def test_a_config_that_cannot_be_is_named(encoder, tmp_path, config):
    settings = encoder.settings() | config
    write_safetensors(tmp_path / "e.safetensors", encoder.state_dict(), {"config": json.dumps(settings)})
    for use in (load_encoder, verify_file, inspect_file):
        with pytest.raises(InputError, match=f"says {next(iter(config))} .* of its model"):
            use(tmp_path / "e.safetensors")


# ONNX


def onnx_packages():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def test_onnx_of_an_encoder(encoder_file, encoder, photos, tmp_path):
    ort = onnx_packages()
    result = export_onnx(encoder_file, tmp_path / "e.onnx", pictures=photos[:2])
    assert result["largest_difference"] < 1e-3 and result["images_compared"] == 9
    session = ort.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    batch = torch.stack([whole_image(Image.open(photo), SIZE) for photo in photos])
    cls, mean, tokens = session.run(["cls", "mean", "tokens"], {"images": batch.numpy()})
    ours = encoder.embed_images(photos)
    for name, theirs in (("cls", cls), ("mean", mean), ("tokens", tokens)):
        assert np.allclose(ours[name].numpy(), theirs, atol=1e-4)
    facts = inspect_file(tmp_path / "e.onnx")
    assert facts["shapes"]["images"][1:] == [3, 32, 48] and float(facts["largest_difference"]) < 1e-3
    assert "uint8" in facts["preprocessing"] and [f.name for f in tmp_path.iterdir()] == ["e.onnx"]
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "e.onnx").read_bytes()[:1000])
    with pytest.raises(InputError, match="truncated or no ONNX"):
        inspect_file(tmp_path / "cut.onnx")
    for output, pictures, message in (
        ("e.pb", (), "ends in .onnx"),
        (".onnx", (), "ends in .onnx"),
        ("/proc/nowhere/e.onnx", (), "cannot write"),
        ("f.onnx", ("absent.jpg",), "--pictures absent.jpg cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            export_onnx(encoder_file, tmp_path / output, pictures=pictures)
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="is empty or no ONNX"):
        inspect_file(tmp_path / "empty.onnx")
    with pytest.raises(InputError, match="is ONNX"):
        verify_file(tmp_path / "e.onnx")


@pytest.mark.parametrize("sides", [{}, {"cameras": 3, "views": 2}])
def test_onnx_of_a_reid_model(tmp_path, sides):
    ort = onnx_packages()
    torch.manual_seed(1)
    base = VisionTransformer((32, 32), 16, 192, 2, 3, fused_attn=False)
    config = TransReIDConfig(jpm=True, parts=2, shift=2, **sides)
    model = TransReID(base, 4, config).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    from finetune.reid_model import KIND

    facts = {"kind": KIND, **base.settings(), "num_classes": 4, "reid": vars(config), "depth": 2, "set": "x",
             "camera_names": [], "view_names": []}  # fmt: skip
    write_torch(tmp_path / "model.pth", {"model": model.state_dict(), "config": facts})
    result = export_onnx(tmp_path / "model.pth", tmp_path / "reid.onnx")
    assert result["largest_difference"] < 1e-3 and result["outputs"] == ["embedding"]
    session = ort.InferenceSession(str(tmp_path / "reid.onnx"), providers=["CPUExecutionProvider"])
    imgs = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    camids, viewids = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0])
    ids = {"camids": camids, "viewids": viewids} if sides else {}
    found = session.run(None, {"images": imgs.numpy(), **{k: v.numpy() for k, v in ids.items()}})[0]
    with torch.no_grad():
        wanted = model.encode(imgs, *ids.values())
    assert np.allclose(wanted.numpy(), found, atol=1e-4)


def test_a_model_of_another_task_is_not_exported(tmp_path, encoder):
    write_torch(tmp_path / "m.pth", {"model": encoder.state_dict(), "config": {"kind": "CGD-MAE SETR"}})
    with pytest.raises(InputError, match="CGD-MAE SETR"):
        export_onnx(tmp_path / "m.pth", tmp_path / "x.onnx")


# the command


def test_the_command(encoder_file, tmp_path):
    out = tmp_path / "facts.json"
    done = run_command(command("-m", "tools.checkpoint", "verify", str(encoder_file), "--metrics", str(out)))
    assert done.returncode == 0 and json.loads(out.read_text())["verdict"].startswith("the same features")
    done = run_command(command("-m", "tools.checkpoint", "convert", str(encoder_file), "--to", "timm",
                               "--output", str(tmp_path / "t.pth"), "--pictures", "a.jpg"))  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: --pictures") and "Traceback" not in done.stderr
    done = run_command(command("-m", "tools.checkpoint", "verify", "mae_vit_bas"))
    assert done.returncode == 2 and "did you mean mae_vit_base" in done.stderr


def test_push_wants_an_address_and_reports_a_failure(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="give hf://ORG/REPO"):
        push(tmp_path, "hf://only")
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo, **kwargs):
            calls.append((repo, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(kwargs)
            if kwargs["repo_id"] == "a/full":
                raise OSError("no network")
            return "https://somewhere"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(tmp_path, "hf://a/b") == "https://somewhere"
    assert calls[0] == ("a/b", {"private": True, "exist_ok": True}) and calls[1]["folder_path"] == tmp_path
    with pytest.raises(InputError, match="no network.*can be uploaded later"):
        push(tmp_path, "hf://a/full")


def test_the_models_that_only_a_name_tells_apart(tmp_path):
    """facebook's full files do not say their target: the tool asks for it."""
    model = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32))
    write_torch(tmp_path / "full.pth", {"model": model.state_dict()})
    with pytest.raises(InputError, match="pass --model"):
        load_autoencoder(tmp_path / "full.pth")
    with pytest.raises(InputError, match="pass --norm_pix_loss"):
        load_autoencoder(tmp_path / "full.pth", "mae_vit_tiny_patch16")
