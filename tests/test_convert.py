"""To every peer's format and back: their own loaders, or readers that do what theirs do, agree with ours."""

import argparse
import json
import math

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from conftest import refuses
from PIL import Image
from safetensors.torch import save_file

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, load_encoder
from tools.convert import convert
from util.checkpoint import encoder_state, read_checkpoint, write_safetensors
from util.fetch import fetch
from util.pretrained import read_pretrained

SIZE = (32, 32)
OUTPUTS = {"mae": "a.pth", "transreid": "a.pth", "transfg": "a.npz", "setr": "a.pth", "hf": "a"}


def shaken(model):
    """Every tensor gets random parts, so that no two norms or biases are equal and none is 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    decoder = {"decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2, "norm_pix_loss": True}
    return shaken(MaskedAutoencoderViT(SIZE, 16, 192, 12, 3, **decoder))


@pytest.fixture(scope="module")
def state(mae):
    return encoder_state(mae.state_dict())


@pytest.fixture(scope="module")
def full(mae, tmp_path_factory):
    """A whole checkpoint of ours, with decoder and distillation head."""
    file = tmp_path_factory.mktemp("ours") / "checkpoint-last.pth"
    config = {"kind": "CGD-MAE encoder", "model": "mae_vit_tiny_patch16", "img_size": [32, 32], "norm_pix_loss": True,
              "mask_ratio": 0.75} | {k: mae.settings()[k] for k in ("mean", "std")}  # fmt: skip
    torch.save({"model": mae.state_dict() | {"distill_head.a.weight": torch.ones(2, 2)}, "config": config}, file)
    return file


@pytest.fixture(scope="module")
def encoder_file(state, tmp_path_factory):
    """facebook's format of the encoder alone."""
    file = tmp_path_factory.mktemp("facebook") / "encoder.pth"
    torch.save({"model": state}, file)
    return file


@pytest.fixture(scope="module")
def imgs():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def run(load: str) -> dict:
    """Run the lines that `convert` prints."""
    scope = {"timm": timm, "transformers": transformers}
    exec(load, scope)
    return scope


def close(a, b, atol=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() <= atol, (a - b).abs().max()


# ---------------------------------------------------------------------------------------------- to the peers


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_it_with_its_own_loader(tmp_path, full, mae, imgs, suffix):
    result = convert(full, "timm", tmp_path / f"timm{suffix}")
    theirs = run(result["load"])["model"].eval()
    close(theirs.forward_features(imgs), mae.forward_features(imgs))
    assert result["tensors"] == 150 and "'vit_tiny_patch16_224'" in result["load"]
    assert "timm's default for vit_tiny_patch16_224 is mean 0.5 0.5 0.5" in result["remark"]
    pixels = timm.data.resolve_model_data_config(theirs)
    assert pixels["mean"] == (0.485, 0.456, 0.406) and pixels["std"] == (0.229, 0.224, 0.225)


def test_a_clip_tower_goes_to_timms_clip_and_nowhere_else(tmp_path, imgs):
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 192, "head_width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    clip = shaken(open_clip.model.CLIP(16, vision, text))
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    result = convert(tmp_path / "clip.pt", "timm", tmp_path / "timm.pth")
    assert "'vit_base_patch16_clip_224'" in result["load"] and result["tensors"] == 7 + 2 * 12 + 0
    wanted = clip.visual.ln_post(clip.visual.transformer(clip.visual._embeds(imgs)))
    close(run(result["load"])["model"].eval().forward_features(imgs), wanted)
    convert(tmp_path / "clip.pt", "safetensors", tmp_path / "o.safetensors")
    close(load_encoder(tmp_path / "o.safetensors").forward_features(imgs), wanted)
    for target, name in OUTPUTS.items():
        refuses("CLIP's kind of ViT.*--to timm or safetensors", convert, tmp_path / "clip.pt", target, tmp_path / name)


def test_hugging_face_loads_the_encoder(tmp_path, encoder_file, mae, imgs):
    got = run(convert(encoder_file, "hf", tmp_path / "hf")["load"])
    close(got["model"](imgs).last_hidden_state, mae.forward_features(imgs))
    config = got["model"].config
    assert type(got["model"]).__name__ == "ViTModel" and config.layer_norm_eps == 1e-6
    assert (config.image_size, config.patch_size, config.num_attention_heads) == (32, 16, 3)
    # 32 x 32: nothing is resized, so that only scale and statistics are compared; then the filter
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    theirs = got["processor"](Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    close(theirs, mae.normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
    saved = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert saved["resample"] == 3 and saved["size"] == {"height": 32, "width": 32}


def test_hugging_face_reconstructs(tmp_path, full, mae, imgs):
    result, noise = convert(full, "hf", tmp_path / "hf"), torch.rand(2, 4, generator=torch.Generator().manual_seed(2))
    theirs = run(result["load"])["model"]
    with torch.no_grad():
        got = theirs(imgs, noise=noise)
        latent, mask, ids_restore = mae.forward_encoder(imgs, 0.75, noise)
        close(got.logits, mae.forward_decoder(latent, ids_restore)[0])
        assert torch.equal(got.mask, mask) and 0 < mask.mean() < 1
        close(got.loss, mae(imgs, 0.75, noise)["pixel"])
    theirs.save_pretrained(tmp_path / "saved")  # what transformers itself writes comes back bit for bit
    convert(tmp_path / "saved", "mae", tmp_path / "mae.pth")
    content = torch.load(tmp_path / "mae.pth", weights_only=True)
    assert list(content) == ["model"] and set(content["model"]) == set(mae.state_dict())
    assert all(torch.equal(v, mae.state_dict()[k]) for k, v in content["model"].items())
    result = convert(full, "mae", tmp_path / "mae.pth")  # without the distillation head
    assert result["tensors"] == len(mae.state_dict()) and "encoder and decoder" in result["remark"]
    assert theirs.config.norm_pix_loss and theirs.config.mask_ratio == 0.75
    _, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.save({"model": read_checkpoint(full)["model"]}, tmp_path / "bare.pth")  # facebook's: weights alone
    remark = convert(tmp_path / "bare.pth", "hf", tmp_path / "bare")["remark"]
    assert "norm_pix_loss is not known, config.json says no" in remark


def test_transreid_loads_all_150_and_nothing_else(tmp_path, full, state):
    """Its loader copies by name: an unknown name is a KeyError, heads are skipped (downstream.md 1.6)."""
    result = convert(full, "transreid", tmp_path / "transreid.pth")
    content = torch.load(tmp_path / "transreid.pth", weights_only=True)
    assert list(content) == ["model"] and content["model"].keys() == state.keys() and result["tensors"] == 150
    assert all(torch.equal(value, state[name]) for name, value in content["model"].items())
    assert not any("head" in name or "dist" in name for name in content["model"])
    refuses("without 'distilled' in it", convert, full, "transreid", tmp_path / "self_distilled" / "encoder.pth")
    assert not (tmp_path / "self_distilled").exists()


def test_transfg_reads_googles_names_and_they_come_back(tmp_path, full, mae, imgs):
    result = convert(full, "transfg", tmp_path / "encoder.npz")
    arrays = dict(np.load(tmp_path / "encoder.npz"))
    assert len(arrays) == 6 + 12 * 16 == result["tensors"]
    query = arrays["Transformer/encoderblock_11/MultiHeadDotProductAttention_1/query/kernel"]
    assert query.shape == (192, 3, 64) and arrays["embedding/kernel"].shape == (16, 16, 3, 192)
    own = {"img_size": 32, "num_classes": 0, "checkpoint_path": tmp_path / "encoder.npz"}  # timm has a reader of it
    theirs = timm.create_model("vit_tiny_patch16_224", **own)
    close(theirs.eval().forward_features(imgs), mae.forward_features(imgs))
    assert load_encoder(tmp_path / "encoder.npz").settings()["mean"] == [0.485, 0.456, 0.406]
    head = {"head/kernel": np.zeros((192, 5), np.float32), "head/bias": np.zeros(5, np.float32)}
    np.savez(tmp_path / "google.npz", **arrays, **head)  # Google's own file
    ours = load_encoder(tmp_path / "google.npz")
    close(ours.forward_features(imgs), mae.forward_features(imgs), 0)
    assert ours.settings()["mean"] == [0.5] * 3 and "Google ViT, 100% of the encoder" in ours.report


def test_setr_loads_both_ways(tmp_path, full, mae):
    result = convert(full, "setr", tmp_path / "setr.pth", input_size=(64, 64))
    content = torch.load(tmp_path / "setr.pth", weights_only=True)
    assert result["tensors"] == 152 + 150 == len(content["model"]) + len(content["state_dict"])
    # its cache: two deletions that raise where there is no head, strict=False, table to the crop, bilinear
    weights = dict(content["model"])
    del weights["head.weight"], weights["head.bias"]
    table = weights.pop("pos_embed")
    assert torch.equal(table, mae.pos_embed)
    side = int(math.sqrt(table.shape[1]))
    grid = table[:, -side * side :].transpose(1, 2).reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=(4, 4), mode="bilinear", align_corners=False)
    weights["pos_embed"] = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    # load_from: names with the prefix, nothing to resize; both give the same backbone
    VisionTransformer((64, 64), 16, 192, 12, 3).load_state_dict(weights, strict=True)
    assert content["state_dict"].keys() == {f"backbone.{name}" for name in weights}
    assert all(torch.equal(content["state_dict"][f"backbone.{k}"], v) for k, v in weights.items())
    assert "deit_base_distilled_patch16_384-d0272ac0.pth" in result["remark"]
    words = "squares of a multiple of the patch size 16"
    refuses(words, convert, full, "setr", tmp_path / "setr.pth", input_size=(64, 32))


def test_anything_goes_to_anything(tmp_path, full, state, mae):
    """One encoder through all formats, each made of the one before; then the decoder through two."""
    file = full
    stations = (("hf", "hf"), ("transfg", "a.npz"), ("setr", "setr.pth"), ("timm", "t.pth"),
                ("transreid", "r.pth"), ("safetensors", "own.safetensors"), ("mae", "mae.pth"))  # fmt: skip
    for target, name in stations:
        assert convert(file, target, tmp_path / name)["input_size"] == "32 x 32"
        file = tmp_path / name
        found = read_pretrained(fetch(file))
        assert set(found.state) == set(state) and all(torch.equal(v, state[k]) for k, v in found.state.items())
    assert not read_pretrained(file).decoder  # the .npz lost it


# ------------------------------------------------------------------------------------------------------- back


def hf_model(kind: str):
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384}
    sizes |= {"image_size": 48, "patch_size": 16, "layer_norm_eps": 1e-6}
    decoder = {"decoder_" + name: value for name, value in sizes.items()} | {"decoder_hidden_size": 64}
    torch.manual_seed(0)
    if kind != "ViTMAEForPreTraining":
        return shaken(getattr(transformers, kind)(transformers.ViTConfig(**sizes)))
    config = transformers.ViTMAEConfig(norm_pix_loss=True, **sizes, **decoder)
    return shaken(transformers.ViTMAEForPreTraining(config))


EXTRA = {"ViTModel": "pooler", "ViTForImageClassification": "classifier", "ViTMAEForPreTraining": "decoder_"}


@pytest.mark.parametrize("kind, extra", EXTRA.items())
def test_hugging_faces_files_load(tmp_path, kind, extra):
    theirs = hf_model(kind)
    theirs.config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # names of the memory, not of the files
    ours, imgs = load_encoder(tmp_path / "pytorch_model.bin"), torch.randn(2, 3, 48, 48)
    theirs.config.mask_ratio = 0.0
    noise = {"noise": torch.arange(9.0).repeat(2, 1)} if "MAE" in kind else {}
    got = (theirs if kind == "ViTModel" else theirs.vit)(imgs, **noise)
    close(ours.forward_features(imgs), got.last_hidden_state)
    assert "100% of the encoder" in ours.report and "new         0 tensors" in ours.report, ours.report
    assert "Hugging Face ViT" in ours.report and ours.settings()["num_heads"] == 4
    assert ours.settings()["mean"] == [0.5] * 3 and ours.settings()["std"] == [0.25] * 3
    assert extra in ours.report.splitlines()[-1]


def test_a_folder_that_transformers_wrote(tmp_path):
    theirs = hf_model("ViTMAEForPreTraining")
    theirs.save_pretrained(tmp_path / "mae")
    found = read_pretrained(fetch(tmp_path / "mae"))
    assert found.origin == "Hugging Face ViTMAE" and found.config["norm_pix_loss"] and len(found.decoder) == 44
    result = convert(tmp_path / "mae", "hf", tmp_path / "again")  # decoder heads of 16 are kept by the config
    again = run(result["load"])["model"]
    assert again.config.decoder_num_attention_heads == 4
    imgs, noise = torch.randn(1, 3, 48, 48), torch.rand(1, 9)
    with torch.no_grad():
        close(again(imgs, noise=noise).loss, theirs(imgs, noise=noise).loss, 1e-6)
    (tmp_path / "mae" / "config.json").unlink()
    refuses("width 96: the known encoders", load_encoder, tmp_path / "mae" / "model.safetensors")
    refuses("a folder without model.safetensors or pytorch_model.bin", fetch, tmp_path)


def test_what_lies_beside_a_hugging_face_file_is_believed_or_refused(tmp_path, encoder_file):
    convert(encoder_file, "hf", tmp_path)
    config = (tmp_path / "config.json").read_text()
    for change, words in (
        ({"hidden_act": "gelu_pytorch_tanh"}, "activation 'gelu_pytorch_tanh'"),
        ({"image_size": 48}, "pos_embed with 5 rows, and its config .*10"),
        ({"num_hidden_layers": 13}, "lacks blocks.12 as a whole: it has 12 blocks of 13"),
        ("", "config.json is damaged"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | change) if change else config[:9])
        refuses(words, load_encoder, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [1], "image_std": [1], "do_normalize": false}')
    assert load_encoder(tmp_path / "model.safetensors").settings()["mean"] == [0.0] * 3


def test_one_fault_is_refused_by_name(tmp_path, encoder_file):
    convert(encoder_file, "hf", tmp_path)
    state = read_checkpoint(tmp_path / "model.safetensors")["model"]
    names = ("layer.2.attention.attention.key.weight", "layer.2.output.dense.weight")
    key, dense = (next(name for name in state if name.endswith(ending)) for ending in names)
    save_file(state | {key: torch.zeros(192, 191)}, tmp_path / "model.safetensors")
    refuses("blocks.2.attn.qkv.weight needs q, k and v", load_encoder, tmp_path / "model.safetensors")
    state[dense.replace("dense", "dance")] = state.pop(dense)
    save_file(state, tmp_path / "model.safetensors")
    refuses("dance", load_encoder, tmp_path / "model.safetensors")
    deep = VisionTransformer((16, 16), 16, 192, 24, 3).state_dict()  # a tensor of a block of 24 is 0.3% of all
    torch.save({"model": {k: v for k, v in deep.items() if k != "blocks.7.norm2.bias"}}, tmp_path / "file.pth")
    refuses("lacks .*blocks.7", load_encoder, tmp_path / "file.pth")


# ------------------------------------------------------------------------------------------ what is refused


def test_a_rectangle_of_odd_sizes_and_statistics_goes_where_it_can(tmp_path):
    encoder = shaken(VisionTransformer((32, 16), 8, 96, 2, 4, mean=(0.5,) * 3, std=(0.5,) * 3))
    file, imgs = tmp_path / "r.safetensors", torch.randn(1, 3, 32, 16)
    wanted = encoder.forward_features(imgs)
    write_safetensors(file, encoder.state_dict(), {"config": json.dumps(encoder.settings())})
    result = convert(file, "timm", tmp_path / "timm.safetensors")
    assert "pretrained_cfg_overlay" not in result["load"] and "default" not in result["remark"]
    close(run(result["load"])["model"].eval().forward_features(imgs), wanted)
    again = load_encoder(tmp_path / "timm.safetensors")  # its header says all of it
    assert again.settings() == encoder.settings() and torch.equal(again.forward_features(imgs), wanted)
    close(run(convert(file, "hf", tmp_path / "hf")["load"])["model"](imgs).last_hidden_state, wanted)
    for target in ("mae", "transreid", "transfg", "setr"):
        refuses(f"of 4 x 2 patches, no square, which --to {target}", convert, file, target, tmp_path / OUTPUTS[target])
    result = convert(file, "transfg", tmp_path / "a.npz", input_size=(24, 24))
    table = np.load(tmp_path / "a.npz")["Transformer/posembed_input/pos_embedding"]
    assert result["input_size"] == "24 x 24" and table.shape == (1, 10, 96)
    assert np.array_equal(table, load_encoder(file, (24, 24)).pos_embed.detach().numpy())


def test_what_else_is_refused(tmp_path, full, encoder_file, state, monkeypatch):
    for target in ("mae", "hf"):
        words = "a decoder for 4 patches, and --input_size makes 16"
        refuses(words, convert, full, target, tmp_path / OUTPUTS[target], input_size=(64, 64))
    assert convert(full, "timm", tmp_path / "t.pth", input_size=(64, 64))["input_size"] == "64 x 64"
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file").write_text("")
    refuses("a name that ends with .pth or .safetensors", convert, full, "timm", tmp_path / "a.npz")
    refuses("a name that ends with .safetensors", convert, full, "safetensors", tmp_path / "a.pth")
    refuses("cannot write", convert, full, "mae", tmp_path / "folder.pth")
    refuses("cannot write", convert, full, "hf", tmp_path / "file")
    before = encoder_file.read_bytes()
    refuses("is the file that is converted", convert, encoder_file, "mae", encoder_file)
    assert encoder_file.read_bytes() == before
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith("norm.")}}, tmp_path / "part.pth")
    refuses("lacks norm.weight, which would be made up", convert, tmp_path / "part.pth", "timm", tmp_path / "t.pth")
    torch.save({"model": state | {"cls_token": state["cls_token"] * float("nan")}}, tmp_path / "nan.pth")
    refuses("not finite in 1 tensors, first cls_token", convert, tmp_path / "nan.pth", "timm", tmp_path / "t.pth")
    torch.save({"model": state | {"mask_token": torch.zeros(1, 1, 192)}}, tmp_path / "ibot.pth")
    assert convert(tmp_path / "ibot.pth", "mae", tmp_path / "m.pth")["tensors"] == 150

    def bad_disk(file, value):
        bias = value["model"]["blocks.4.norm1.bias"] + 1e-6
        torch.save({"model": value["model"] | {"blocks.4.norm1.bias": bias}}, file)

    monkeypatch.setattr("tools.convert.write_torch", bad_disk)
    refuses("1 of them changed .first blocks.4.norm1.bias", convert, encoder_file, "mae", tmp_path / "m.pth")


def test_what_is_written_is_float32_and_plain(tmp_path, state):
    """Half precision and an argparse.Namespace in the source, neither in the copies."""
    half, args = {k: v.half() for k, v in state.items()}, argparse.Namespace(model="mae_vit_tiny_patch16")
    torch.save({"model": half, "args": args, "epoch": 3, "optimizer": {}}, tmp_path / "facebook.pth")
    for target in ("mae", "transreid", "setr"):
        convert(tmp_path / "facebook.pth", target, tmp_path / f"{target}.pth")
        content = torch.load(tmp_path / f"{target}.pth", weights_only=True)  # would refuse `args`
        tensors = [value for part in content.values() for value in part.values()]
        assert len(tensors) >= 150 and all(v.dtype == torch.float32 and v.is_contiguous() for v in tensors)
    convert(tmp_path / "facebook.pth", "transfg", tmp_path / "a.npz")
    assert {array.dtype for array in dict(np.load(tmp_path / "a.npz")).values()} == {np.dtype(np.float32)}
