"""One loader for the encoders of everybody: the features are the peers' own."""

import copy
import re

import numpy as np
import open_clip
import pytest
import timm
import torch

from models_mae import MODELS
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer, load_encoder
from tools.convert import convert
from util.checkpoint import encoder_state, write_safetensors
from util.errors import InputError
from util.pos_embed import resize_pos_embed

SIZE = (32, 32)


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    return MODELS["mae_vit_tiny_patch16"](img_size=SIZE)


@pytest.fixture(scope="module")
def imgs():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def load(tmp_path):
    """load(content, ...): `load_encoder` of a file with this content."""
    file = tmp_path / "x.pth"
    return lambda content, *args, **kwargs: torch.save(content, file) or load_encoder(file, *args, **kwargs)


def wrapped(kind: str, state: dict) -> dict:
    """The encoder as each peer would save it."""
    extra = {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    wild = {"pos_embed_probs": torch.zeros(1), "decode_text.weight": torch.zeros(2, 2)}

    def under(prefix, s=state):
        return {prefix + k: v for k, v in s.items()}

    return {
        "mae": {"model": state | {"mask_token": torch.zeros(1, 1, 8)}},
        "vehiclemae": {"model": under("module.", state | wild)},
        "timm": state | extra,
        "dino": {"student": {}, "teacher": under("backbone.") | {"head.mlp.0.weight": torch.zeros(2, 2)}},
        "dino backbone": state,
        "moco": {"state_dict": under("module.momentum_encoder.", {k: v + 1 for k, v in state.items()})
                 | under("module.base_encoder.")},
        "transreid": under("base.") | {"bottleneck.weight": torch.ones(192)},
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["mae", "vehiclemae", "timm", "dino", "dino backbone", "moco", "transreid"])
def test_names_of_the_peers(load, mae, imgs, kind):
    state = encoder_state(mae.state_dict())
    model = load(wrapped(kind, state))
    assert "loaded    150 tensors" in model.report and "new         0 tensors" in model.report, model.report
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("quick", [False, True])
def test_clip_gives_the_same_features(load, imgs, quick):
    image = {"image_size": 32, "layers": 2, "width": 192, "head_width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.model.CLIP(16, image, text, quick_gelu=quick).eval()
    torch.nn.init.normal_(clip.visual.ln_pre.weight)
    ours = load(clip.state_dict(), quick_gelu=quick)
    theirs = clip.visual.ln_post(clip.visual.transformer(clip.visual._embeds(imgs)))
    assert torch.allclose(ours.forward_features(imgs), theirs, atol=1e-4), ours.report
    assert ours.report.splitlines()[0] == "  CLIP, 100% of the encoder"


@pytest.mark.parametrize("original", [False, True])
def test_a_reid_model_with_jpm_has_its_last_block_in_the_global_branch(load, imgs, original):
    encoder = VisionTransformer(SIZE, 16, 192, 3, 3)
    whole = copy.deepcopy(encoder).eval()
    model = TransReID(encoder, 4, TransReIDConfig(jpm=True, parts=2, shift=2))
    state = model.state_dict()
    if original:  # keeps the untrained copies in its encoder
        state |= {"base.norm.weight": torch.zeros(192), "base.norm.bias": torch.zeros(192)}
        state |= {f"base.blocks.2.{k[5:]}": v + 1 for k, v in state.items() if k.startswith("b1.0.")}
    loaded = load(state)
    assert torch.allclose(loaded.forward_features(imgs), whole.forward_features(imgs), atol=1e-6), loaded.report


def test_the_position_table_moves_to_any_grid(load, tmp_path, mae):
    for size, stride, grid in (((48, 32), 16, (3, 2)), ((64, 64), 12, (5, 5)), ((32, 64), 12, (2, 5))):
        model = load({"model": mae.state_dict()}, size, stride=stride)
        assert model.grid_size == grid and f"from 2 x 2 to {grid[0]} x {grid[1]}, bicubic" in model.report
        assert torch.equal(model.pos_embed[:, 0], mae.pos_embed[:, 0])
    state = encoder_state(model.state_dict())
    with pytest.raises(InputError, match="10 patches, which is no square"):
        load(state)
    assert torch.equal(load(state, (32, 64), stride=12).pos_embed, model.pos_embed)
    write_safetensors(tmp_path / "odd.safetensors", state, {"config": '{"img_size": [32, 64], "stride": 12}'})
    again = load_encoder(tmp_path / "odd.safetensors", (32, 64), stride=12)
    assert torch.equal(again.pos_embed, model.pos_embed) and "resized     0" in again.report


@pytest.mark.parametrize("rows, size, stride, grid", [
    (128, (256, 128), 16, (16, 8)), (210, (256, 128), 12, (21, 10)), (64, (256, 64), 16, (16, 4)),
    (64, None, 16, (8, 8)), (196, (256, 128), 16, (14, 14)), (128, (256, 128), 12, (16, 8)),
    (64, (256, 64), 12, "fits 8 x 8 and 16 x 4"), (128, None, 16, "is no square"), (224, None, 16, "flexivit"),
])  # fmt: skip
def test_the_flag_or_the_file_says_which_grid_a_table_has(load, mae, rows, size, stride, grid):
    table = torch.randn(1, 1 + rows, 192)
    state = encoder_state(mae.state_dict()) | {"pos_embed": table}
    if isinstance(grid, str):
        with pytest.raises(InputError, match=grid):
            load(state, size, stride=stride)
        return
    found = load(state, size, stride=stride)
    assert torch.equal(found.pos_embed, resize_pos_embed(table, grid, found.grid_size))


def test_fc_norm_of_a_fine_tuned_mae_is_honoured(tmp_path, imgs):
    how = {"img_size": 32, "num_classes": 0, "global_pool": "avg", "fc_norm": True}
    theirs = timm.create_model("vit_tiny_patch16_224", **how).eval()
    torch.nn.init.normal_(theirs.fc_norm.weight)
    torch.save({"model": theirs.state_dict()}, tmp_path / "finetuned.pth")
    ours = load_encoder(tmp_path / "finetuned.pth")
    assert torch.allclose(ours.encode(imgs)["mean"], theirs(imgs), atol=1e-5)
    convert(tmp_path / "finetuned.pth", "safetensors", tmp_path / "own.safetensors")
    assert torch.equal(load_encoder(tmp_path / "own.safetensors").encode(imgs)["mean"], ours.encode(imgs)["mean"])
    with pytest.raises(InputError, match="final norm after the mean"):
        convert(tmp_path / "finetuned.pth", "hf", tmp_path / "hf")
    of_tokens = load_encoder(tmp_path / "finetuned.pth", fc_norm=False)
    assert torch.allclose(of_tokens.encode(imgs)["cls"], ours.encode(imgs)["cls"], atol=1e-6)


@pytest.mark.parametrize("container", ["module", "state_dicts", "model_ema", "network"])
def test_containers_of_others_and_numpy_beside_the_tensors(load, mae, container):
    state = encoder_state(mae.state_dict())
    beside = {"best": np.float64(0.5), "epoch": np.int64(3), "metric": {np.float32(1)}, "curve": np.zeros(3)}
    assert torch.equal(load({container: state, "optimizer": {}} | beside).cls_token, state["cls_token"])


REFUSED = [
    *(({name: torch.ones(192)}, message) for name, message in {
        "dist_token": "distilled DeiT", "reg_token": "register tokens", "register_tokens": "register tokens",
        "blocks.0.ls1.gamma": "LayerScale", "blocks.0.attn.q_norm.weight": "norms of queries",
        "blocks.0.attn.relative_position_bias_table": "relative positions", "rope_embed.periods": "rotary positions",
        "blocks.0.attn.q_bias": "parts that this encoder lacks .1 tensors, first blocks.0.attn.q_bias",
    }.items()),
    ({"blocks.999999999.norm1.bias": torch.zeros(192)}, "1,000,000,000 blocks, more than any ViT"),
    ({"pos_embed": torch.zeros(1, 1, 192).expand(1, 4_000_001, 192)}, "of which only 192 are in the file"),
    ({"pos_embed": torch.zeros(1, 70_001, 192)}, "70,001 positions"),
    ({"norm.bias": torch.full((192,), torch.inf)}, "not finite in 1 tensors, first norm.bias"),
    ({"norm.bias": torch.zeros(192, device="meta")}, "device meta"),
    ({"norm.bias": torch.zeros(192).to_sparse()}, "norm.bias as a tensor that is torch.sparse_coo"),
    ({"config": {"depth": 10**9}}, "depth 1000000000 in its config"),
    ({"config": {"img_size": [10**9, 10**9]}}, "img_size 1000000000 in its config"),
    ({"config": {"img_size": "large"}}, "img_size large"), ({"config": {"mean": [0.5]}}, "mean .0.5. in its config"),
]  # fmt: skip


@pytest.mark.parametrize("what, message", REFUSED)
def test_other_kinds_of_vit_and_sizes_that_nobody_has_are_refused_in_true_words(load, mae, what, message):
    """Before they cost memory."""
    config = {"kind": "CGD-MAE encoder"} | what.pop("config", {})
    with pytest.raises(InputError, match=message):
        load({"model": encoder_state(mae.state_dict()) | what, "config": config})


def test_what_is_lacking_is_new_or_refused(load, mae):
    def without(part: str):
        return load({k: v for k, v in encoder_state(mae.state_dict()).items() if not re.search(part, k)})

    assert "new         2 tensors: norm" in without("^norm").report
    wrong = {"mlp.fc2": "lacks 24 of the 150 tensors this model needs, first blocks.0.mlp.fc2.weight",
             "pos_embed": "no position table", "cls_token": "no class token"}  # fmt: skip
    for part, message in wrong.items():
        with pytest.raises(InputError, match=message):
            without(part)
