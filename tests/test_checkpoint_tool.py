"""Files of weights: features in three lines, inspection and verification without running, release, ONNX."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import command, refuses, run_command, small_flags, write_pictures
from PIL import Image

from datasets.transforms import whole_image
from finetune.task import Trained
from models_mae import MODELS, load_autoencoder
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer, load_encoder
from tools.checkpoint import FORMATS, get_args_parser, inspect_file, main, release, verify_file
from tools.convert import TARGETS, export_onnx
from util.checkpoint import read_checkpoint, write_safetensors, write_torch
from util.cli import run_tool
from util.files import file_sha256

SIZE = (32, 48)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return VisionTransformer(SIZE, 16, 192, 2, 3).eval()


@pytest.fixture(scope="module")
def encoder_file(encoder, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    header = {"config": json.dumps({"kind": "CGD-MAE encoder", **encoder.settings()})}
    write_safetensors(file, encoder.state_dict(), header)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return sorted(write_pictures(tmp_path_factory.mktemp("photos"), 5, seed=3).iterdir())


def test_every_kind_of_picture_gives_the_same_features(encoder_file, photos, tmp_path):
    encoder, images = load_encoder(encoder_file, drop_path=0.5), [Image.open(photo).convert("RGB") for photo in photos]
    found = encoder.embed_images(images)
    shapes = {"cls": (5, 192), "mean": (5, 192), "tokens": (5, 6, 192)}
    assert {k: tuple(v.shape) for k, v in found.items()} == shapes
    uint8 = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    mixed = [photos[0], str(photos[1]), uint8[2], images[3].convert("RGBA"), images[4]]
    by_hand = encoder.encode(torch.stack([whole_image(image, SIZE) for image in images]))
    for other in (by_hand, encoder.embed_images(mixed, batch_size=2), encoder.embed_images(uint8)):
        assert all(torch.allclose(found[name], other[name], atol=1e-5) for name in found)
    assert list(encoder.embed_images(images, read_outs=("mean",))) == ["mean"]
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to see it upright"
    images[0].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    again = encoder.embed_images([Image.open(tmp_path / "turned.png"), tmp_path / "turned.png"])["cls"]
    assert torch.allclose(again, found["cls"][[0, 0]], atol=1e-5)
    encoder.train()  # and deterministic in training mode, float32 under autocast
    assert torch.equal(encoder.embed_images(images)["cls"], found["cls"]) and encoder.training
    assert not found["cls"].requires_grad and found["cls"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.embed_images(images)["cls"], found["cls"])
    wrong = {"no picture": [], "a picture is a ndarray": [np.zeros((4, 4, 3))], "a Tensor": [torch.zeros(3, 8, 8)]}
    for message, given in (wrong | {"picture absent.jpg cannot be read": ["absent.jpg"]}).items():
        refuses(message, encoder.embed_images, given)


def test_a_run_is_released_as_its_card_says(pictures, tmp_path):
    out, folder = tmp_path / "run", tmp_path / "released"
    done = run_command(command("main_pretrain.py", *small_flags(pictures, out, "--no_distill")))
    assert done.returncode == 0, done.stderr
    facts = inspect_file(out / "checkpoint-last.pth")
    assert facts["finished_epochs"] == 2 and facts["args"]["model"] == "mae_vit_tiny_patch16"
    assert facts["kind"].startswith("checkpoint of a run") and "decoder 128 wide, 8 blocks" in facts["kind"]
    assert facts["parts"]["decoder_blocks"][0] == 96

    released = release(out, folder, "small", "Apache-2.0")
    wanted = {"README.md", "SHA256SUMS", "encoder.pth", "encoder.safetensors", "full.pth"}
    assert {file.name for file in folder.iterdir()} == wanted == set(released["files"])
    files = [folder / name for name in ("encoder.safetensors", "encoder.pth", "full.pth")]
    states = [load_encoder(file).state_dict() for file in (out / "encoder.pth", *files)]
    assert all(torch.equal(value, state[name]) for state in states for name, value in states[0].items())
    assert set(torch.load(folder / "encoder.pth", weights_only=True)) == {"model"}
    full = load_autoencoder(folder / "full.pth")
    assert torch.equal(full.decoder_pred.weight, load_autoencoder(out / "checkpoint-last.pth").decoder_pred.weight)
    assert inspect_file(files[0])["licence"] == "Apache-2.0" and verify_file(files[0])["verdict"].startswith("whole")
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert len(sums) == 3 and all(file_sha256(folder / name) == digest for name, digest in sums.items())
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0") and "| epochs | 2 |" in card and str(tmp_path) not in card
    assert "none (plain MAE)" in card and "Data: 40 images" in card

    (folder / "README.md").write_text("ours")
    release(out, folder, "small", "MIT")
    assert (folder / "README.md").read_text() == "ours" and verify_file(files[1])["verdict"].startswith("whole")
    write_torch(folder / "encoder.pth", {"model": full.state_dict()})
    refuses("another sha256 than .*SHA256SUMS", verify_file, folder / "encoder.pth")
    content = read_checkpoint(out / "checkpoint-last.pth")
    write_torch(tmp_path / "checkpoint-last.pth", content | {"args": content["args"] | {"epochs": 9}})
    refuses("has finished 2 of 9 epochs", release, tmp_path, tmp_path / "x", "small", "MIT")
    refuses("checkpoint-last.pth does not exist", release, folder, tmp_path / "x", "small", "MIT")
    assert not (tmp_path / "x").exists()


def test_damage_is_named(encoder, encoder_file, tmp_path):
    result = verify_file(encoder_file)
    assert result["kind"] == "CGD-MAE encoder" and result["verdict"].startswith("loads into its model")
    copy = tmp_path / "copy.safetensors"
    shutil.copy(encoder_file, copy)
    (tmp_path / "copy.safetensors.sha256").write_text(f"{file_sha256(copy)}  copy.safetensors\n")
    assert verify_file(copy)["sha256"].endswith("copy.safetensors.sha256")
    content = bytearray(copy.read_bytes())
    content[-9] ^= 4
    copy.write_bytes(content)
    refuses("another sha256", verify_file, copy)
    copy.write_bytes(content[: len(content) // 2])
    for use in (load_encoder, verify_file, inspect_file):
        refuses("truncated or damaged", use, copy)
    state, config = encoder.state_dict(), {"kind": "CGD-MAE encoder", **encoder.settings()}
    nan = {"model": state | {"norm.bias": torch.full((192,), torch.nan)}, "config": config}
    write_torch(tmp_path / "nan.pth", nan)
    for use in (verify_file, load_encoder, lambda f: export_onnx(f, tmp_path / "x.onnx")):
        refuses("not finite in 1 tensors, first norm.bias", use, tmp_path / "nan.pth")
    assert inspect_file(tmp_path / "nan.pth")["not_finite"] == ["norm.bias"]
    write_torch(tmp_path / "shape.pth", {"model": state | {"norm.bias": torch.zeros(9)}, "config": config})
    refuses(r"norm.bias is \(9,\)", verify_file, tmp_path / "shape.pth")
    write_torch(tmp_path / "encoder.pth", {"model": VisionTransformer((32, 32), 16, 192, 2, 3).state_dict()})
    kind = verify_file(tmp_path / "encoder.pth")["kind"]
    assert kind.startswith("ViT: ViT 192 wide, 2 blocks") and "others" not in kind
    # before it asks for what it could not use
    refuses("holds an encoder only", load_autoencoder, tmp_path / "encoder.pth")
    model = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32))
    write_torch(tmp_path / "full.pth", {"model": model.state_dict()})  # facebook's do not say their target
    refuses("pass --model", load_autoencoder, tmp_path / "full.pth")
    refuses("pass --norm_pix_loss", load_autoencoder, tmp_path / "full.pth", "mae_vit_tiny_patch16")


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {Payload.trace}",)


class Remote:
    def __reduce__(self):
        return torch.hub.load, ("attacker/repo", "x")


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_in_a_file_is_listed_and_not_run(encoder, tmp_path, zip_format):
    Payload.trace = tmp_path / "it_ran"
    file, content = tmp_path / "payload.pth", {"model": encoder.state_dict(), "extra": Payload(), "more": Remote()}
    torch.save(content, file, _use_new_zipfile_serialization=zip_format)
    facts = inspect_file(file)
    assert facts["python_objects"] == ["posix.system", "torch.hub.load"][: 1 + zip_format]
    assert facts["kind"].startswith("refused")
    for use in (load_encoder, verify_file, read_checkpoint, lambda f: export_onnx(f, tmp_path / "x.onnx")):
        refuses("holds Python objects", use, file)
    assert not Payload.trace.exists()


@pytest.fixture
def session():
    """An ONNX file -> what runs it."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    ort = pytest.importorskip("onnxruntime")
    return lambda file: ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_onnx_of_an_encoder(encoder_file, encoder, photos, tmp_path, session, monkeypatch):
    assert export_onnx(encoder_file, tmp_path / "e.onnx")["largest_difference"] < 1e-3
    opened, ours = session(tmp_path / "e.onnx"), encoder.embed_images(photos)
    batch = torch.stack([whole_image(Image.open(photo), SIZE) for photo in photos])
    found = opened.run(["cls", "mean", "tokens"], {"images": batch.numpy()})
    assert all(np.allclose(ours[name].numpy(), theirs, atol=1e-4) for name, theirs in zip(ours, found))
    facts = opened.get_modelmeta().custom_metadata_map
    assert facts["kind"] == "CGD-MAE encoder" and "uint8 [N, 3, 32, 48]" in facts["preprocessing"]
    assert [f.name for f in tmp_path.iterdir()] == ["e.onnx"]
    refuses("ends in .onnx", export_onnx, encoder_file, tmp_path / "e.pb")
    refuses("no checkpoint", verify_file, tmp_path / "e.onnx")
    monkeypatch.setattr("tools.convert.TOLERANCE", 0)
    words = "other features under onnxruntime .* nothing was written"
    refuses(words, export_onnx, encoder_file, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_onnx_of_a_reid_model_and_of_no_other_task(tmp_path, session, monkeypatch):
    torch.manual_seed(1)
    base, config = VisionTransformer((32, 32), 16, 192, 2, 3), TransReIDConfig(3, 2, jpm=True, parts=2, shift=2)
    model = TransReID(base, 4, config).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    facts = {"kind": "CGD-MAE TransReID", "task": "reid", **base.settings(), "num_classes": 4, "reid": vars(config)}
    write_torch(tmp_path / "model.pth", {"model": model.state_dict(), "config": facts})
    assert verify_file(tmp_path / "model.pth")["kind"] == "CGD-MAE TransReID"
    result = export_onnx(tmp_path / "model.pth", tmp_path / "reid.onnx")
    assert result["largest_difference"] < 1e-3 and result["outputs"] == ["embedding"]
    ids = {"camids": torch.tensor([2, 0, 1]), "viewids": torch.tensor([1, 1, 0])}
    imgs = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    given = {"images": imgs.numpy(), **{k: v.numpy() for k, v in ids.items()}}
    with torch.no_grad():
        assert np.allclose(model.encode(imgs, **ids), session(tmp_path / "reid.onnx").run(None, given)[0], atol=1e-4)
    trained = Trained("seg", model, {"kind": "CGD-MAE SETR"}, "")
    monkeypatch.setattr("tools.convert.load_model", lambda *_, **__: trained)
    refuses("CGD-MAE SETR", export_onnx, tmp_path / "m.pth", tmp_path / "x.onnx")


def test_the_command(encoder_file, capsys):
    assert set(FORMATS) == {*TARGETS, "onnx"}
    parse = get_args_parser().parse_args
    run_tool(main, parse(["verify", str(encoder_file)]), None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"].startswith("loads into its model")
    run_tool(main, parse(["inspect", str(encoder_file)]), None)
    assert "ViT 192 wide, 2 blocks" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run_tool(main, parse(["verify", "mae_vit_bas"]), None)
    assert stopped.value.code == 2 and "did you mean mae_vit_base" in capsys.readouterr().err
