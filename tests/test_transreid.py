"""TransReID's parts against hand-written cases."""

import copy
import math

import pytest
import torch

from models_transreid import TransReID, TransReIDConfig, hard_triplet_loss, jigsaw_order, over_branches
from models_vit import VisionTransformer
from util.errors import InputError


def tiny(size=(64, 64), stride=16, **more):
    torch.manual_seed(0)
    return VisionTransformer(size, 16, 24, 3, 3, stride=stride, **more)


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)


def test_jigsaw_order_by_hand():
    assert jigsaw_order(8, 3, 2).tolist() == [2, 6, 3, 7, 4, 0, 5, 1]
    assert jigsaw_order(9, 3, 2).tolist() == [2, 7, 3, 8, 4, 0, 5, 1, 6, 0]  # with 0 twice
    for stride, patches, length in (16, 256, 64), (12, 441, 110):
        model = TransReID(tiny((256, 256), stride), 5, TransReIDConfig(jpm=True))
        assert model.base.num_patches == patches and model.order.shape == (4, length)
        assert model.order[0, :3].tolist() == [8, 8 + (patches + 1) // 2, 9]  # tokens: 1 + patch, rolled by 7
    with pytest.raises(InputError, match="cannot be shifted by 8"):
        TransReID(tiny((32, 32)), 3, TransReIDConfig(jpm=True))


def test_overlapping_patches_see_the_right_pixels():
    model, imgs = tiny((40, 64), 12), torch.rand(1, 3, 40, 64)
    expected = (model.patch_embed.proj.weight * imgs[0, :, 24:40, 12:28]).sum(dim=(1, 2, 3))  # row 2, column 1
    found = model.patch_embed(imgs)[0, 2 * 5 + 1]
    assert model.grid_size == (3, 5) and torch.allclose(found, expected + model.patch_embed.proj.bias, atol=1e-5)


def test_baseline_is_the_encoder():
    encoder, imgs = tiny(), pictures(3)
    model = TransReID(copy.deepcopy(encoder), 7, TransReIDConfig()).eval()
    assert torch.allclose(model.encode(imgs), encoder.eval().encode(imgs)["cls"], atol=1e-6)
    logits, features = model(imgs)
    assert len(logits) == len(features) == 1 and logits[0].shape == (3, 7)
    assert not model.bottleneck[0].bias.requires_grad and model.base.pos_embed.requires_grad


def test_jpm_is_what_the_paper_says():
    """Global: the last block and norm on all tokens; local: another copy on the class token and the part."""
    encoder, imgs = tiny(), pictures(2)
    whole = copy.deepcopy(encoder).eval()
    model = TransReID(encoder, 7, TransReIDConfig(jpm=True, shift=5)).eval()
    x = whole.embed(imgs)
    for block in whole.blocks[:2]:
        x = block(x)
    last = torch.nn.Sequential(whole.blocks[2], whole.norm)
    expected = [last(x)[:, 0]]
    dealt = [4, 12, 5, 13, 6, 14, 7, 15, 8, 0, 9, 1, 10, 2, 11, 3]  # 16 patches, rolled by 4
    for part in range(4):
        tokens = [0] + [1 + p for p in dealt[4 * part : 4 * part + 4]]
        expected.append(last(x[:, tokens])[:, 0] / 4)
    assert torch.allclose(model.encode(imgs), torch.cat(expected, dim=1), atol=1e-5)
    logits, features = model(imgs)
    assert len(logits) == len(features) == 5


def test_side_information_is_added_to_every_token():
    imgs = pictures(2)
    model = TransReID(tiny(), 7, TransReIDConfig(cameras=4, views=3, sie_weight=2.0)).eval()
    camids, viewids = torch.tensor([1, 3]), torch.tensor([2, 0])
    assert model.side_rows(camids, viewids).tolist() == [1 * 3 + 2, 3 * 3 + 0] and model.sie_embed.shape == (12, 1, 24)
    seen = []
    model.base.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode(imgs, camids, viewids)
    added = seen[0] - model.base.embed(imgs)
    assert torch.allclose(added, 2 * model.sie_embed[[5, 9]].expand(-1, 17, -1), atol=1e-6)
    for cameras, message in ((torch.tensor([0, 4]), "reach from 0 to 4"), (None, "none is given")):
        with pytest.raises(InputError, match=message):
            model.encode(imgs, cameras, viewids)
    only = TransReID(tiny(), 7, TransReIDConfig(views=3))
    assert only.side_rows(None, viewids).tolist() == [2, 0] and only.sie_embed.shape == (3, 1, 24)
    unseen = model.forget_unseen(torch.tensor([0, 2, 2]), torch.tensor([1, 0, 0]))
    assert unseen.tolist() == [0, *range(2, 6), *range(7, 12)]
    assert not model.sie_embed[unseen].any() and (model.sie_embed[[1, 6]] != 0).all()


def test_parameters_of_the_published_size():
    with torch.device("meta"):
        encoder = VisionTransformer((256, 256), 16, 768, 12, 12, initialize=False)
        plain = TransReID(copy.deepcopy(encoder), 575, TransReIDConfig())
        full = TransReID(copy.deepcopy(encoder), 575, TransReIDConfig(cameras=20, views=8, jpm=True))
    count = sum(p.numel() for p in encoder.parameters())
    block, norm, head = sum(p.numel() for p in encoder.blocks[0].parameters()), 2 * 768, 2 * 768 + 575 * 768
    assert count == 85_798_656 + (257 - 197) * 768
    assert sum(p.numel() for p in plain.parameters()) == count + head
    assert sum(p.numel() for p in full.parameters()) == count + block + norm + 5 * head + 160 * 768


def test_every_parameter_gets_a_gradient():
    model = TransReID(tiny(), 3, TransReIDConfig(cameras=2, jpm=True, shift=5))
    pids = torch.tensor([0, 0, 1, 1])
    logits, features = model(pictures(4), torch.tensor([0, 1, 0, 1]))
    loss = over_branches(torch.nn.functional.cross_entropy, logits, pids)
    (loss + over_branches(hard_triplet_loss, features, pids)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


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


def test_the_global_branch_weighs_half():
    outputs = [torch.tensor([8.0]), torch.tensor([1.0]), torch.tensor([3.0])]
    assert over_branches(lambda output, _: output[0], outputs, None).item() == 5.0
    assert over_branches(lambda output, _: output[0], outputs[:1], None).item() == 8.0
