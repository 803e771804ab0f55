"""Files of weights: features in three lines, inspection and verification without running, release, ONNX."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import command, run_command, small_flags, write_pictures
from PIL import Image

from datasets.transforms import whole_image
from models_mae import MODELS, load_autoencoder
from models_setr import SETR, SETRConfig
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer, load_encoder
from tools.checkpoint import FORMATS, get_args_parser, inspect_file, main, release, verify_file
from tools.convert import TARGETS, export_onnx
from util.checkpoint import read_checkpoint, write_safetensors, write_torch
from util.cli import run_tool
from util.errors import InputError
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
        ([np.zeros((4, 4, 3))], "a picture is a ndarray"),
        ([torch.zeros(3, 8, 8)], "a picture is a Tensor"),
        (["absent.jpg"], "picture absent.jpg cannot be read"),
    ],
)
def test_what_is_no_picture_is_named(encoder_file, images, message):
    with pytest.raises(InputError, match=message):
        load_encoder(encoder_file).embed_images(images)


# a run and its release


def test_a_run_is_released_as_its_card_says(pictures, tmp_path):
    out, folder = tmp_path / "run", tmp_path / "released"
    done = run_command(command("main_pretrain.py", *small_flags(pictures, out, "--no_distill")))
    assert done.returncode == 0, done.stderr
    facts = inspect_file(out / "checkpoint-last.pth")
    assert facts["finished_epochs"] == 2 and facts["args"]["model"] == "mae_vit_tiny_patch16"
    assert facts["kind"].startswith("checkpoint of a run") and "decoder 128 wide, 8 blocks" in facts["kind"]
    assert facts["parts"]["decoder_blocks"][0] == 96

    released = release(out, folder, name="small", licence="Apache-2.0")
    wanted = {"README.md", "SHA256SUMS", "encoder.pth", "encoder.safetensors", "full.pth"}
    assert {file.name for file in folder.iterdir()} == wanted == set(released["files"])
    photos = sorted(pictures.iterdir())[:3]
    files = [folder / name for name in ("encoder.safetensors", "encoder.pth", "full.pth")]
    features = [load_encoder(file).embed_images(photos)["cls"] for file in (*files, out / "encoder.pth")]
    assert all(torch.equal(features[0], other) for other in features)
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
    release(out, folder, name="small", licence="MIT")
    assert (folder / "README.md").read_text() == "ours" and verify_file(files[1])["verdict"].startswith("whole")
    write_torch(folder / "encoder.pth", {"model": full.state_dict()})
    with pytest.raises(InputError, match="another sha256 than .*SHA256SUMS"):
        verify_file(folder / "encoder.pth")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(out, unfinished)
    content = read_checkpoint(out / "checkpoint-last.pth")
    write_torch(unfinished / "checkpoint-last.pth", content | {"args": content["args"] | {"epochs": 9}})
    for run, message in ((unfinished, "has finished 2 of 9 epochs"), (tmp_path, "checkpoint-last.pth does not exist")):
        with pytest.raises(InputError, match=message):
            release(run, tmp_path / "x", name="small", licence="MIT")
    assert not (tmp_path / "x").exists()


# what a file is, and whether it is whole


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
    with pytest.raises(InputError, match="another sha256"):
        verify_file(copy)
    copy.write_bytes(content[: len(content) // 2])
    for use in (load_encoder, verify_file, inspect_file):
        with pytest.raises(InputError, match="truncated or damaged"):
            use(copy)
    state, square = encoder.state_dict(), VisionTransformer((32, 32), 16, 192, 2, 3)
    write_torch(
        tmp_path / "nan.pth",
        {
            "config": {"kind": "x", "img_size": list(SIZE)},
            "model": state | {"norm.bias": torch.full((192,), torch.nan)},
        },
    )
    for use in (verify_file, load_encoder, lambda f: export_onnx(f, tmp_path / "x.onnx")):
        with pytest.raises(InputError, match="not finite in 1 tensors, first norm.bias"):
            use(tmp_path / "nan.pth")
    write_torch(tmp_path / "encoder.pth", {"model": square.state_dict()})
    kind = verify_file(tmp_path / "encoder.pth")["kind"]
    assert kind.startswith("ViT: ViT 192 wide, 2 blocks") and "others" not in kind
    with pytest.raises(InputError, match="holds an encoder only"):  # before it asks for what it could not use
        load_autoencoder(tmp_path / "encoder.pth")
    assert inspect_file(tmp_path / "nan.pth")["not_finite"] == ["norm.bias"]
    config = {"kind": "CGD-MAE encoder", **encoder.settings()}
    write_torch(tmp_path / "shape.pth", {"model": state | {"norm.bias": torch.zeros(9)}, "config": config})
    with pytest.raises(InputError, match=r"norm.bias is \(9,\)"):
        verify_file(tmp_path / "shape.pth")


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
    content = {"model": encoder.state_dict(), "extra": Payload(), "more": Remote()}
    torch.save(content, file, _use_new_zipfile_serialization=zip_format)
    facts = inspect_file(file)
    assert facts["python_objects"] == ["posix.system", "torch.hub.load"][: 1 + zip_format]
    assert facts["kind"].startswith("refused")
    for use in (load_encoder, verify_file, read_checkpoint, lambda f: export_onnx(f, tmp_path / "x.onnx")):
        with pytest.raises(InputError, match="holds Python objects"):
            use(file)
    assert not Payload.trace.exists()


# ONNX


def onnx_packages():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def test_onnx_of_an_encoder(encoder_file, encoder, photos, tmp_path, monkeypatch):
    ort = onnx_packages()
    assert export_onnx(encoder_file, tmp_path / "e.onnx")["largest_difference"] < 1e-3
    session = ort.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    batch = torch.stack([whole_image(Image.open(photo), SIZE) for photo in photos])
    ours = encoder.embed_images(photos)
    found = session.run(["cls", "mean", "tokens"], {"images": batch.numpy()})
    assert all(np.allclose(ours[name].numpy(), theirs, atol=1e-4) for name, theirs in zip(ours, found))
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["kind"] == "CGD-MAE encoder" and "uint8 [N, 3, 32, 48]" in facts["preprocessing"]
    assert [f.name for f in tmp_path.iterdir()] == ["e.onnx"]
    with pytest.raises(InputError, match="ends in .onnx"):
        export_onnx(encoder_file, tmp_path / "e.pb")
    with pytest.raises(InputError, match="is ONNX"):
        verify_file(tmp_path / "e.onnx")
    monkeypatch.setattr("tools.convert.TOLERANCE", 0)
    with pytest.raises(InputError, match="other features under onnxruntime .* nothing was written"):
        export_onnx(encoder_file, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_onnx_of_a_reid_model(tmp_path):
    sides = {"cameras": 3, "views": 2}
    ort = onnx_packages()
    torch.manual_seed(1)
    base = VisionTransformer((32, 32), 16, 192, 2, 3)
    config = TransReIDConfig(jpm=True, parts=2, shift=2, **sides)
    model = TransReID(base, 4, config).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    facts = {"kind": "CGD-MAE TransReID", "task": "reid", **base.settings(), "num_classes": 4, "reid": vars(config),
             "depth": 2, "set": "x", "camera_names": [], "view_names": []}  # fmt: skip
    write_torch(tmp_path / "model.pth", {"model": model.state_dict(), "config": facts})
    assert verify_file(tmp_path / "model.pth")["kind"] == "CGD-MAE TransReID"
    result = export_onnx(tmp_path / "model.pth", tmp_path / "reid.onnx")
    assert result["largest_difference"] < 1e-3 and result["outputs"] == ["embedding"]
    session = ort.InferenceSession(str(tmp_path / "reid.onnx"), providers=["CPUExecutionProvider"])
    imgs = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    camids, viewids = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0])
    ids = {"camids": camids, "viewids": viewids}
    found = session.run(None, {"images": imgs.numpy(), **{k: v.numpy() for k, v in ids.items()}})[0]
    with torch.no_grad():
        wanted = model.encode(imgs, *ids.values())
    assert np.allclose(wanted.numpy(), found, atol=1e-4)


def test_a_model_of_another_task_is_not_exported(tmp_path, encoder):
    config = {
        "kind": "CGD-MAE SETR",
        "task": "seg",
        **encoder.settings(),
        "num_classes": 3,
        "decoder": "naive",
        "aux": False,
    }
    model = SETR(encoder, SETRConfig(3, "naive", False))
    write_torch(tmp_path / "m.pth", {"model": model.state_dict(), "config": config})
    with pytest.raises(InputError, match="CGD-MAE SETR"):
        export_onnx(tmp_path / "m.pth", tmp_path / "x.onnx")


# the command


def test_the_command(encoder_file, tmp_path, capsys):
    assert set(FORMATS) == {*TARGETS, "onnx"}
    parse = get_args_parser().parse_args
    run_tool(main, parse(["verify", str(encoder_file)]), None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"].startswith("loads into its model")
    run_tool(main, parse(["inspect", str(encoder_file)]), None)
    assert "ViT 192 wide, 2 blocks" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run_tool(main, parse(["verify", "mae_vit_bas"]), None)
    assert stopped.value.code == 2 and "did you mean mae_vit_base" in capsys.readouterr().err


def test_the_models_that_only_a_name_tells_apart(tmp_path):
    """facebook's full files do not say their target: the tool asks for it."""
    model = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32))
    write_torch(tmp_path / "full.pth", {"model": model.state_dict()})
    with pytest.raises(InputError, match="pass --model"):
        load_autoencoder(tmp_path / "full.pth")
    with pytest.raises(InputError, match="pass --norm_pix_loss"):
        load_autoencoder(tmp_path / "full.pth", "mae_vit_tiny_patch16")
