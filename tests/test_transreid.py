"""TransReID's parts against hand-written cases."""

import copy
import math

import pytest
import torch

from models_transreid import TransReID, TransReIDConfig, hard_triplet_loss, identity_loss, jigsaw_order, over_branches
from models_vit import VisionTransformer
from util.errors import InputError


def tiny(size=(64, 64), stride=16, **more):
    torch.manual_seed(0)
    return VisionTransformer(size, 16, 24, 3, 3, stride=stride, **more)


def test_jigsaw_order_by_hand():
    assert jigsaw_order(8, 3, 2).tolist() == [2, 6, 3, 7, 4, 0, 5, 1]
    assert jigsaw_order(9, 3, 2).tolist() == [2, 7, 3, 8, 4, 0, 5, 1, 6, 0]  # with 0 twice
    assert jigsaw_order(8, 1, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("stride, patches, length", [(16, 256, 64), (12, 441, 110)])
def test_patches_and_parts_at_256(stride, patches, length):
    model = TransReID(tiny((256, 256), stride), 5, TransReIDConfig(jpm=True))
    assert model.base.num_patches == patches and model.order.shape == (4, length)
    assert model.order[0, :3].tolist() == [8, 8 + (patches + 1) // 2, 9]  # tokens: 1 + patch, rolled by 7
    imgs = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    assert model.eval().encode(imgs).shape == (2, 5 * 24)


def test_baseline_is_the_encoder():
    encoder = tiny()
    imgs = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = encoder.eval().encode(imgs)["cls"]
    model = TransReID(copy.deepcopy(encoder), 7, TransReIDConfig()).eval()
    assert torch.allclose(model.encode(imgs), expected, atol=1e-6)
    logits, features = model(imgs)
    assert len(logits) == len(features) == 1 and logits[0].shape == (3, 7)
    assert not model.bottleneck[0].bias.requires_grad and model.base.pos_embed.requires_grad


def test_jpm_is_what_the_paper_says():
    """Global: the last block and norm on all tokens; local: another copy on the class token and the part."""
    encoder = tiny()
    imgs = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    whole = copy.deepcopy(encoder).eval()
    model = TransReID(encoder, 7, TransReIDConfig(jpm=True, shift=5)).eval()
    found = model.encode(imgs)
    x = whole.embed(imgs)
    for block in whole.blocks[:2]:
        x = block(x)
    last = torch.nn.Sequential(whole.blocks[2], whole.norm)
    expected = [last(x)[:, 0]]
    dealt = [4, 12, 5, 13, 6, 14, 7, 15, 8, 0, 9, 1, 10, 2, 11, 3]  # 16 patches, rolled by 4
    for part in range(4):
        tokens = [0] + [1 + p for p in dealt[4 * part : 4 * part + 4]]
        expected.append(last(x[:, tokens])[:, 0] / 4)
    assert torch.allclose(found, torch.cat(expected, dim=1), atol=1e-5)
    logits, features = model(imgs)
    assert len(logits) == len(features) == 5


def test_side_information_is_added_to_every_token():
    imgs = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    model = TransReID(tiny(), 7, TransReIDConfig(cameras=4, views=3, sie_weight=2.0)).eval()
    assert model.sie_embed.shape == (12, 1, 24)
    camids, viewids = torch.tensor([1, 3]), torch.tensor([2, 0])
    assert model.side_rows(camids, viewids).tolist() == [1 * 3 + 2, 3 * 3 + 0]
    seen = []
    model.base.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode(imgs, camids, viewids)
    added = seen[0] - model.base.embed(imgs)
    expected = 2 * model.sie_embed[[5, 9]].expand(-1, 17, -1)
    assert torch.allclose(added, expected, atol=1e-6)
    for cameras, message in ((torch.tensor([0, 4]), "reach from 0 to 4"), (None, "none is given")):
        with pytest.raises(InputError, match=message):
            model.encode(imgs, cameras, viewids)
    only = TransReID(tiny(), 7, TransReIDConfig(views=3))
    assert only.side_rows(None, viewids).tolist() == [2, 0] and only.sie_embed.shape == (3, 1, 24)


def test_parameters_of_the_published_size():
    with torch.device("meta"):
        encoder = VisionTransformer((256, 256), 16, 768, 12, 12, initialize=False)
    count = sum(p.numel() for p in encoder.parameters())
    block, norm = sum(p.numel() for p in encoder.blocks[0].parameters()), 2 * 768
    assert count == 85_798_656 + (257 - 197) * 768
    with torch.device("meta"):
        plain = TransReID(copy.deepcopy(encoder), 575, TransReIDConfig())
        full = TransReID(copy.deepcopy(encoder), 575, TransReIDConfig(cameras=20, views=8, jpm=True))
    head = 2 * 768 + 575 * 768
    assert sum(p.numel() for p in plain.parameters()) == count + head
    assert sum(p.numel() for p in full.parameters()) == count + block + norm + 5 * head + 160 * 768


def test_every_parameter_gets_a_gradient():
    model = TransReID(tiny(), 3, TransReIDConfig(cameras=2, jpm=True, shift=5))
    imgs = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    pids = torch.tensor([0, 0, 1, 1])
    logits, features = model(imgs, torch.tensor([0, 1, 0, 1]))
    (over_branches(identity_loss, logits, pids) + over_branches(hard_triplet_loss, features, pids)).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_too_few_patches_for_the_jigsaw():
    with pytest.raises(InputError, match="cannot be shifted by 8"):
        TransReID(tiny((32, 32)), 3, TransReIDConfig(jpm=True))
    with pytest.raises(InputError, match="--stride 20"):
        tiny((64, 64), 20)


def test_overlapping_patches_see_the_right_pixels():
    model = tiny((40, 64), 12)
    assert model.grid_size == (3, 5)
    imgs = torch.rand(1, 3, 40, 64)
    tokens = model.patch_embed(imgs)
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    patch = imgs[0, :, 24:40, 12:28]  # row 2, column 1
    expected = (weight * patch).sum(dim=(1, 2, 3)) + bias
    assert torch.allclose(tokens[0, 2 * 5 + 1], expected, atol=1e-5)


def test_triplet_loss_by_hand():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    pids = torch.tensor([0, 0, 1, 1])
    d = {(0, 1): 5.0, (0, 2): 1.0, (0, 3): 10.0, (1, 2): 18**0.5, (1, 3): 5.0, (2, 3): 85**0.5}
    gaps = [d[0, 1] - d[0, 2], d[0, 1] - d[1, 2], d[2, 3] - d[0, 2], d[2, 3] - d[1, 3]]
    expected = sum(math.log(1 + math.exp(gap)) for gap in gaps) / 4
    assert hard_triplet_loss(features, pids).item() == pytest.approx(expected, rel=1e-5)
    same = torch.ones(4, 2, requires_grad=True)  # equal features: no NaN in the gradient
    hard_triplet_loss(same, pids).backward()
    assert torch.isfinite(same.grad).all()
    with pytest.raises(ValueError, match="one vehicle"):
        hard_triplet_loss(features, torch.zeros(4, dtype=torch.long))


def test_branches_weigh_half_and_half():
    def first_entry(output, _):
        return output[0]

    outputs = [torch.tensor([8.0]), torch.tensor([1.0]), torch.tensor([3.0])]
    assert over_branches(first_entry, outputs, None).item() == 5.0
    assert over_branches(first_entry, outputs[:1], None).item() == 8.0


def test_label_smoothing_by_hand():
    """Szegedy et al.: the target is 1 - eps on the class and eps / K everywhere."""
    logits, eps = torch.tensor([[2.0, 0.0, -1.0]]), 0.3
    p = (math.e**2, 1.0, math.e**-1)
    logp = [math.log(x / sum(p)) for x in p]
    expected = -((1 - eps + eps / 3) * logp[1] + eps / 3 * (logp[0] + logp[2]))
    assert identity_loss(logits, torch.tensor([1]), eps).item() == pytest.approx(expected, abs=1e-6)
