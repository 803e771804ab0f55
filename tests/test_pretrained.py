"""One loader for the encoders of everybody: the features are the peers' own."""

import copy

import open_clip
import pytest
import timm
import torch

from models_mae import MODELS
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import encoder_state, write_safetensors
from util.errors import InputError
from util.pretrained import read_pretrained

SIZE = (32, 32)


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    return MODELS["mae_vit_tiny_patch16"](img_size=SIZE)


@pytest.fixture(scope="module")
def imgs():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


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
def test_names_of_the_peers(tmp_path, mae, imgs, kind):
    state = encoder_state(mae.state_dict())
    torch.save(wrapped(kind, state), tmp_path / "file.pth")
    model = load_encoder(tmp_path / "file.pth")
    report = model.report
    assert "loaded    150 tensors" in report and "new         0 tensors" in report, report
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_timm_gives_the_same_features(tmp_path, imgs):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = load_encoder(tmp_path / "timm.pth")
    report = ours.report
    assert torch.allclose(ours.forward_features(imgs), theirs.forward_features(imgs), atol=1e-5), report


def test_deit_has_one_more_token(tmp_path, mae):
    state = encoder_state(mae.state_dict())
    table = torch.randn(1, 6, 192)
    more = {"dist_token": torch.zeros(1, 1, 192), "head_dist.weight": torch.zeros(5, 192), "pos_embed": table}
    torch.save({"model": state | more}, tmp_path / "deit.pth")
    model = load_encoder(tmp_path / "deit.pth")
    report = model.report
    assert "DeiT" in report and torch.equal(model.pos_embed, table[:, [0, 2, 3, 4, 5]])


@pytest.mark.parametrize("quick", [False, True])
def test_clip_gives_the_same_features(tmp_path, imgs, quick):
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(
        16,
        {"image_size": 32, "layers": 2, "width": 192, "head_width": 64, "patch_size": 16},
        {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
        quick_gelu=quick,
    ).eval()
    torch.nn.init.normal_(clip.visual.ln_pre.weight)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    ours = load_encoder(tmp_path / "clip.pt", quick_gelu=quick)
    report = ours.report
    theirs = clip.visual._embeds(imgs)
    theirs = clip.visual.ln_post(clip.visual.transformer(theirs))
    assert torch.allclose(ours.forward_features(imgs), theirs, atol=1e-4), report
    assert report.splitlines()[0] == "  CLIP, 100% of the encoder"


@pytest.mark.parametrize("original", [False, True])
def test_a_reid_model_with_jpm_has_its_last_block_in_the_global_branch(tmp_path, mae, imgs, original):
    encoder = VisionTransformer(SIZE, 16, 192, 3, 3)
    whole = copy.deepcopy(encoder).eval()
    model = TransReID(encoder, 4, TransReIDConfig(jpm=True, parts=2, shift=2))
    state = model.state_dict()
    if original:  # keeps the untrained copies in its encoder
        state |= {"base.norm.weight": torch.zeros(192), "base.norm.bias": torch.zeros(192)}
        state |= {f"base.blocks.2.{k[5:]}": v + 1 for k, v in state.items() if k.startswith("b1.0.")}
    torch.save(state, tmp_path / "reid.pth")
    loaded = load_encoder(tmp_path / "reid.pth")
    report = loaded.report
    assert torch.allclose(loaded.forward_features(imgs), whole.forward_features(imgs), atol=1e-6), report


def test_the_position_table_moves_to_any_grid(tmp_path, mae):
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pth")
    for size, stride, grid in (((48, 32), 16, (3, 2)), ((64, 64), 12, (5, 5)), ((32, 64), 12, (2, 5))):
        model = load_encoder(tmp_path / "mae.pth", size, stride=stride)
        report = model.report
        assert model.grid_size == grid and f"from 2 x 2 to {grid[0]} x {grid[1]}, bicubic" in report
        assert torch.equal(model.pos_embed[:, 0], mae.pos_embed[:, 0])
    state = encoder_state(model.state_dict())
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="10 patches, which is no square"):
        load_encoder(tmp_path / "odd.pth")
    write_safetensors(tmp_path / "odd.safetensors", state, {"config": '{"img_size": [32, 64], "stride": 12}'})
    again = load_encoder(tmp_path / "odd.safetensors", (32, 64), stride=12)
    report = again.report
    assert torch.equal(again.pos_embed, model.pos_embed) and "resized     0" in report


def test_what_is_refused(tmp_path, mae):
    state = encoder_state(mae.state_dict())
    torch.save({"model": {k: v for k, v in state.items() if "mlp.fc2" not in k}}, tmp_path / "part.pth")
    with pytest.raises(InputError, match="lacks 24 of the 150 tensors this model needs, first blocks.0.mlp.fc2.weight"):
        load_encoder(tmp_path / "part.pth")
    most = {k: v for k, v in state.items() if not k.startswith("norm.")}
    torch.save({"model": most}, tmp_path / "most.pth")
    assert "new         2 tensors: norm" in load_encoder(tmp_path / "most.pth").report
    torch.save({"model": state | {"blocks.0.ls1.gamma": torch.ones(192)}}, tmp_path / "dinov2.pth")
    with pytest.raises(InputError, match="this encoder lacks .1 tensors, first blocks.0.ls1.gamma"):
        load_encoder(tmp_path / "dinov2.pth")
    torch.save({k: v for k, v in state.items() if k != "pos_embed"}, tmp_path / "nopos.pth")
    with pytest.raises(InputError, match="lacks pos_embed or cls_token"):
        read_pretrained(tmp_path / "nopos.pth")
