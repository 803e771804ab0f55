"""TransFG's parts, loss, scores and page against slow or hand-worked versions."""

import math
import re

import numpy as np
import pytest
import torch
from layouts import write_demo_cars

from datasets.fgvc import read_fgvc
from metrics.fgvc import class_scores, rank_of_truth
from models_transfg import TransFG, class_token_row, contrastive_loss
from models_vit import VisionTransformer
from reports.fgvc import Answers, write_fgvc_report
from util.errors import InputError


def sharp(depth=4, **more) -> VisionTransformer:
    """A small encoder whose attention is far from even, so that an error would show."""
    torch.manual_seed(0)
    encoder = VisionTransformer((96, 80), 16, 48, depth, 3, stride=12, **more)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


IMAGES = torch.randint(0, 256, (3, 3, 96, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def inputs_of(encoder) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens as they enter each block, and after the last."""
    inputs = [encoder.embed(IMAGES)]
    for block in encoder.blocks:
        inputs.append(block(inputs[-1]))
    return inputs[:-1], inputs[-1]


def full_product(encoder):
    """A_n ... A_1 as whole matrices in float64, by the paper's words, and the tokens after the blocks."""
    x, product = encoder.embed(IMAGES).double(), None
    for block in encoder.blocks:
        block = block.double()
        N, T, D = x.shape
        q, k, _ = block.attn.qkv(block.norm1(x)).view(N, T, 3, 3, D // 3).unbind(dim=2)
        scores = torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(D // 3)
        attention = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        product = attention if product is None else torch.einsum("nhij,nhjk->nhik", attention, product)
        x = block(x)
    return product, x


@pytest.mark.parametrize("rows_at_once", [1, 5, 64])
def test_the_class_tokens_row_is_that_of_the_full_product(rows_at_once):
    encoder = sharp().eval()
    row = class_token_row(encoder.blocks, inputs_of(encoder)[0], rows_at_once)
    product, _ = full_product(encoder)
    assert row.shape == (3, 3, 1 + encoder.num_patches) and encoder.num_patches == 7 * 6
    assert row.max() > 2 / row.shape[2]  # far from even
    assert torch.allclose(row.double(), product[:, :, 0], atol=1e-6, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = class_token_row(encoder.float().blocks, inputs_of(encoder)[0], rows_at_once)
    for found in (row, rounded):  # a bf16 sum is off by 1e-3
        assert found.dtype == torch.float32 and torch.allclose(found.sum(dim=-1), torch.ones(3, 3), atol=1e-5)


def test_the_model_selects_what_the_full_product_says():
    model = TransFG(sharp(drop_path=0.3), 5).eval()
    feature, ids = model.features(IMAGES)
    product, x = full_product(model.base)
    best = product[:, :, 0, 1:].argmax(dim=-1)  # [N, heads]
    assert torch.equal(ids, best) and ids.unique().numel() > 3
    parts = torch.stack([x[i, 1 + best[i]] for i in range(len(x))])
    tokens = model.part_layer.double()(torch.cat([x[:, :1], parts], dim=1))
    assert torch.allclose(feature.double(), model.part_norm.double()(tokens)[:, 0], atol=1e-5)


def test_what_is_fresh_and_what_is_the_encoders():
    encoder = sharp()
    last, norm = encoder.blocks[-1], encoder.norm
    model = TransFG(encoder, 5)
    assert len(model.base.blocks) == 3 and model.part_norm is norm and last is not model.part_layer
    assert not torch.equal(model.part_layer.attn.qkv.weight, last.attn.qkv.weight)
    assert (model.part_layer.norm1.weight == 1).all() and (model.part_layer.mlp.fc1.bias == 0).all()
    assert model.base.pos_embed.requires_grad and model.head.weight.shape == (5, 48)
    plain = TransFG(sharp(), 5, parts=False).eval()
    logits, feature = plain(IMAGES)
    assert torch.equal(feature, plain.base.forward_features(IMAGES)[:, 0])
    assert torch.equal(logits, plain.head(feature)) and plain.features(IMAGES)[1] is None
    with pytest.raises(InputError, match="two blocks or more"):
        TransFG(sharp(depth=1), 5)


def test_gradients_reach_everything_and_checkpoints_change_nothing():
    grads = []
    for checkpointed in (False, True):
        model = TransFG(sharp(), 5)
        model.base.grad_checkpoint = checkpointed
        logits, feature = model(IMAGES)
        (logits.square().sum() + contrastive_loss(feature, torch.tensor([0, 1, 1]))).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*grads) and torch.isfinite(grads[0]).all()


def test_contrastive_loss_by_hand():
    """Four samples at 0, 60, 90 and 180 degrees, lengths that must not matter, classes 0 0 1 1.

    same: cos 60 = .5 -> .5, twice; cos 90 = 0 -> 1, twice; different: of the four pairs only cos 30 is above .4, twice
    """
    degrees = torch.tensor([0.0, 60.0, 90.0, 180.0]).deg2rad()
    features = torch.stack([degrees.cos(), degrees.sin()], dim=1) * torch.tensor([[1.0], [2.0], [3.0], [0.5]])
    labels = torch.tensor([0, 0, 1, 1])
    for margin in (0.4, 0.0):
        expected = (2 * 0.5 + 2 * 1.0 + 2 * (math.sqrt(3) / 2 - margin)) / 16
        assert contrastive_loss(features, labels, margin).item() == pytest.approx(expected, abs=1e-6)
    whole = contrastive_loss(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(features, labels), whole)


@pytest.mark.parametrize("levels", [None, 2])
def test_scores_against_a_slow_version(levels):
    """One image after another in plain Python; with few levels many scores are equal."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((60, 9)).astype(np.float32)
    scores = np.round(scores * levels) if levels else scores
    labels = rng.integers(0, 7, 60)
    orders = [sorted(range(9), key=lambda c: (-row[c], c)) for row in scores.tolist()]
    places = [order.index(label) for order, label in zip(orders, labels.tolist())]
    firsts = [order[0] for order in orders]
    by_class = [[p == 0 for p, y in zip(places, labels) if y == c] for c in range(9)]
    found = class_scores(torch.from_numpy(scores), torch.from_numpy(labels))
    assert found.ranks.tolist() == places
    assert found.numbers["top1"] == pytest.approx(np.mean([p == 0 for p in places]))
    assert found.numbers["top5"] == pytest.approx(np.mean([p < 5 for p in places]))
    assert found.numbers["mean_class_accuracy"] == pytest.approx(np.mean([np.mean(c) for c in by_class if c]))
    assert found.numbers["majority"] == pytest.approx(max(map(len, by_class)) / 60)
    confusion = np.zeros((9, 9), int)
    np.add.at(confusion, (labels, firsts), 1)
    assert found.confusion.tolist() == confusion.tolist() and found.numbers["classes_with_images"] == 7
    share, count = found.per_class()
    expected = [np.mean(c) if c else np.nan for c in by_class]
    assert share.tolist() == pytest.approx(expected, nan_ok=True) and count.tolist() == [len(c) for c in by_class]
    assert rank_of_truth(torch.zeros(4, 3), torch.tensor([0, 1, 2, 2])).tolist() == [0, 1, 2, 2]  # all are equal


def test_confused_pairs_and_worst_classes_of_the_page(tmp_path):
    """Of class 1 two images are taken for 3 and one for 0; of class 3 one for 1; the rest is right."""
    write_demo_cars(tmp_path, "transfg", classes=4, train=1, test=3, size=16)
    data = read_fgvc(tmp_path)
    answers, names = data.test.labels.copy(), data.classes
    ones, threes = (np.flatnonzero(data.test.labels == k) for k in (1, 3))
    answers[ones], answers[threes[0]] = (3, 3, 0), 1
    logits = 5 * torch.nn.functional.one_hot(torch.from_numpy(answers), 4).float()
    scores = class_scores(logits, torch.from_numpy(data.test.labels))
    write_fgvc_report(tmp_path / "page.html", "", {}, Answers(data.test, names, logits, scores))
    table, page, wrong = re.split("<h2", (tmp_path / "page.html").read_text())[1:]
    pairs = re.findall("<article.*?</article>", page, re.S)
    assert len(pairs) == 2 and f"<b>{names[1]}</b><br>2 of 3 taken for the other" in pairs[0]
    assert f"<b>{names[3]}</b><br>1 of 3 taken for the other" in pairs[0]
    assert pairs[0].count('class="wrong"><img') == 4 and pairs[0].count('class="right"><img') == 2
    assert f"<b>{names[0]}</b><br>0 of 3" in pairs[1] and f"<b>{names[1]}</b><br>1 of 3" in pairs[1]
    table = table[table.index("<thead>") :]
    assert table.index(names[1]) < table.index("0.00 %") < table.index("66.67 %") < table.index("100.00 %")
    assert f"{names[3]} (2 x)" in table and "(1 x)" in table and wrong.count('class="wrong"><img') == 4
