"""MAE parity against published numbers and an independent NumPy forward pass; the context readings."""

import numpy as np
import numpy_mae
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import nn

from models_mae import CONTEXTS, MODELS, GlobalContextHead, count_kept
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import encoder_state
from util.errors import InputError
from util.pos_embed import resize_pos_embed, sincos_pos_embed

TINY = MODELS["mae_vit_tiny_patch16"]


def unit_rows(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def distill(context: str, **more) -> dict:
    return {"context": context, "bank": unit_rows(7, 24), "tau": 0.07} | more


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return MODELS["mae_vit_base_patch16"](norm_pix_loss=True)


def test_published_loss_and_gradient(base):
    torch.manual_seed(1)
    imgs = torch.randn(2, 3, 224, 224)
    torch.manual_seed(2)
    loss = base(imgs)["pixel"]
    loss.backward()
    grads = [p.grad for p in base.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    assert loss.item() == pytest.approx(1.85783231, abs=1e-5)
    assert nn.utils.get_total_norm(grads).item() == pytest.approx(4.24847269, abs=1e-5)


def test_keys_and_sizes_are_maes_and_timms(base, tmp_path):
    state, encoder = base.state_dict(), encoder_state(base.state_dict())
    assert len(state) == 254 and len(encoder) == 150
    assert sum(p.numel() for p in base.parameters()) == 111_907_840
    assert list(state)[:5] == ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight"]
    assert sum(v.numel() for v in encoder.values()) == 85_798_656
    plain = timm.create_model("vit_base_patch16_224", num_classes=0)
    plain.load_state_dict(encoder, strict=True)
    torch.save({"model": state}, tmp_path / "full.pth")
    ours = load_encoder(tmp_path / "full.pth")
    imgs = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(plain.forward_features(imgs), ours.forward_features(imgs), atol=2e-5)


@pytest.mark.parametrize("img_size, norm_pix", [((64, 64), True), ((96, 48), False)])
def test_against_numpy(img_size, norm_pix):
    torch.manual_seed(3)
    model = TINY(img_size=img_size, norm_pix_loss=norm_pix)
    for p in model.parameters():  # away from the zeros and ones of the initial biases and norms
        p.data += 0.05 * torch.randn_like(p)
    imgs, noise = torch.randn(3, 3, *img_size), torch.rand(3, model.num_patches)
    keep = count_kept(model.num_patches, 0.75)
    state = {k: v.double().numpy() for k, v in model.state_dict().items()}
    sizes = {"p": 16, "depth": 12, "heads": 3, "decoder_depth": 8, "decoder_heads": 4, "keep": keep}
    given = imgs.double().numpy(), noise.double().numpy()
    loss, pred, mask = numpy_mae.mae_loss(*given, state, **sizes, norm_pix=norm_pix)
    with torch.no_grad():
        terms = model(imgs, 0.75, noise)
        latent, ours_mask, ids_restore = model.forward_encoder(imgs, 0.75, noise)
        ours_pred, _ = model.forward_decoder(latent, ids_restore)
    assert terms["pixel"].item() == pytest.approx(loss, rel=1e-5)
    assert np.array_equal(ours_mask.numpy(), mask)
    assert np.allclose(ours_pred.numpy(), pred, atol=2e-4)


def test_patchify_roundtrip_and_order_and_uint8_equals_normalised_float():
    model, noise = TINY(img_size=(32, 48)), torch.rand(2, 6)
    imgs = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    normalised = model.normalize(imgs)
    patches = model.patchify(normalised)
    assert torch.equal(model.unpatchify(patches), normalised)
    assert torch.equal(patches[1, 4, 7 * 48 + 5 * 3 + 2], normalised[1, 2, 16 + 7, 16 + 5])
    with torch.no_grad():
        a, b = (model(x, 0.5, noise)["pixel"].item() for x in (imgs, normalised))
    assert a == pytest.approx(b, rel=1e-5)


def test_pixel_baseline_is_the_patch_mean_predictor():
    model = TINY(img_size=(64, 64), norm_pix_loss=False)
    imgs, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    removed = noise.argsort(1)[:, 4:]
    patches = model.patchify(imgs)[torch.arange(2)[:, None], removed]
    expected = (patches - patches.mean(-1, keepdim=True)).square().mean()
    assert model(imgs, 0.75, noise)["pixel_baseline"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains(name):
    side = 28 if name.endswith("14") else 32
    with torch.device("meta"):
        assert len(MODELS[name](img_size=(side, side)).state_dict()) > 200
    if "large" not in name and "huge" not in name:  # too large for a quick backward pass
        MODELS[name](img_size=(side, side))(torch.randn(1, 3, side, side))["pixel"].backward()


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts(context):
    models = []
    for head in (None, distill(context)):
        torch.manual_seed(0)
        models.append(TINY(img_size=(64, 64), norm_pix_loss=True, distill=head))
    (plain, model), (old, new) = models, (model.state_dict() for model in models)
    assert all(torch.equal(value, new[key]) for key, value in old.items())  # the head leaves MAE's initial weights
    assert new.keys() > old.keys() and all(key.startswith("distill_head.") for key in new.keys() - old.keys())
    assert set(encoder_state(new)) == set(encoder_state(old))
    imgs, noise, f = torch.randn(4, 3, 64, 64), torch.rand(4, 16), unit_rows(4, 24, 5)
    terms = model(imgs, 0.75, noise, f)
    assert terms["pixel"].item() == plain(imgs, 0.75, noise)["pixel"].item()
    assert 0 <= terms["sim"].item() <= 2 and terms["kl"].item() >= 0
    (terms["sim"] + terms["kl"] + 0 * terms["pixel"]).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def head_for(context="cls", **more):
    return GlobalContextHead(embed_dim=24, decoder_dim=16, num_patches=9, **distill(context, **more))


def test_losses_are_zero_when_student_equals_teacher():
    head = head_for()
    head.proj = nn.Identity()
    f = unit_rows(5, 24, 1)
    latent = torch.cat([3 * f[:, None], torch.randn(5, 4, 24)], dim=1)
    terms = head(latent, None, f)
    assert terms["sim"].item() == pytest.approx(0, abs=1e-6) == terms["kl"].item()


def test_distillation_terms_by_hand():
    head = head_for("mean")
    latent, f = torch.randn(5, 6, 24), unit_rows(5, 24, 1)
    terms = head(latent, None, f)
    z = F.linear(latent[:, 1:].mean(1), head.proj.weight, head.proj.bias).double().detach()
    z = (z / z.norm(dim=1, keepdim=True)).numpy()
    U, t = head.bank.double().numpy(), f.double().numpy()
    P, Q = (softmax(x @ U.T / 0.07, axis=1) for x in (t, z))
    assert terms["sim"].item() == pytest.approx((1 - (z * t).sum(1)).mean(), abs=1e-6)
    assert terms["kl"].item() == pytest.approx((P * np.log(P / Q)).sum(1).mean(), rel=1e-4)
    assert terms["teacher_entropy"].item() == pytest.approx(-(P * np.log(P)).sum(1).mean(), rel=1e-4)
    assert np.allclose(terms["teacher_marginal"].numpy(), P.mean(0), atol=1e-6)


def test_a_target_moves_the_teacher_and_drops_the_texts():
    mean, scale, f = torch.randn(24), torch.randn(24, 24), unit_rows(5, 24, 1)
    head, latent = head_for("cls", target=(mean, scale)), torch.randn(5, 6, 24)
    terms = head(latent, None, f)
    z = head.proj(latent[:, 0])
    expected = 1 - F.cosine_similarity(z, (f - mean) @ scale).mean()
    assert terms["sim"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert set(terms) == {"sim", "teacher_embed_mean"} and set(head.state_dict()) == set(head_for().state_dict())


def test_attention_pools_where_the_key_points():
    head = head_for("attention")
    nn.init.zeros_(head.key.weight)
    head.key.weight.data[0, 0] = 100.0
    nn.init.normal_(head.transform[-1].weight)
    latent = torch.zeros(1, 5, 24)
    latent[0, 3] = torch.randn(24)
    latent[0, 3, 0] = 5.0  # the only token with a large first channel
    expected = latent[0, 0] + head.transform(latent[0, 3])
    assert torch.allclose(head.pool(latent, None)[0], expected, atol=1e-5)
    head = head_for("decoder")  # weighs positions
    head.position_weight.data = torch.randn(9)
    head.position_bias.data = torch.ones(1)
    decoded = torch.randn(2, 10, 16)
    expected = sum(head.position_weight[i] * decoded[:, 1 + i] for i in range(9)) + 1
    assert torch.allclose(head.pool(None, decoded), expected, atol=1e-5)


def test_the_decoder_sees_patches_in_image_order():
    """What is kept returns to its place, whatever the noise."""
    model = TINY(img_size=(64, 64))
    model.decoder_blocks = nn.ModuleList()
    imgs, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    latent, mask, ids_restore = model.forward_encoder(imgs, 0.5, noise)
    _, decoded = model.forward_decoder(latent, ids_restore)
    kept = noise.argsort(dim=1)[:, :8]
    for n in range(2):
        assert mask[n, kept[n]].sum() == 0 and mask[n].sum() == 8
        expected = model.decoder_norm(model.decoder_embed(latent[n, 1:]) + model.decoder_pos_embed[0, 1 + kept[n]])
        assert torch.allclose(decoded[n, 1 + kept[n]], expected, atol=1e-5)


def test_position_table():
    table = sincos_pos_embed(8, (2, 3)).numpy()
    assert table.shape == (7, 8) and not table[0].any()
    row, column = 1, 2  # token 1 + row * 3 + column
    expected = [f(x / by) for x in (column, row) for f in (np.sin, np.cos) for by in (1, 100)]
    assert np.allclose(table[1 + row * 3 + column], expected, atol=1e-6)
    table = sincos_pos_embed(16, (4, 6))[None]
    resized = resize_pos_embed(table, (4, 6), (8, 12))
    assert resized.shape == (1, 97, 16) and torch.equal(resized[:, 0], table[:, 0])
    assert torch.equal(resize_pos_embed(table, (4, 6), (4, 6)), table)


def test_encode_is_unmasked_and_repeatable():
    model = VisionTransformer((32, 48), embed_dim=192, depth=2, num_heads=3).eval()
    imgs = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    first, second = model.encode(imgs), model.encode(imgs)
    assert first["tokens"].shape == (2, 6, 192)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.allclose(first["mean"], first["tokens"].mean(1))


def test_useless_mask_ratios_and_sizes_are_refused():
    for bad in (0.0, 0.99, 1.0):
        with pytest.raises(InputError, match="mask_ratio"):
            count_kept(16, bad)
    with pytest.raises(InputError, match="208 or 224"):
        TINY(img_size=(220, 224))
