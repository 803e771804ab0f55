"""Parts of fine-tuning: batches of vehicles, augmentation, schedules, groups of the optimiser, stochastic depth."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.samplers import PKBatches, pk_batches
from datasets.transforms import PadCropErase, erase_box, erase_boxes
from engine_finetune import seed_of_step
from finetune.fgvc import Fgvc
from finetune.reid import Reid
from finetune.seg import Seg
from models_mae import MODELS
from models_transreid import TransReID, TransReIDConfig, hard_triplet_loss
from models_vit import SameOnAnyRanksDropPath, VisionTransformer
from util.optim import build_finetune_optimizer, layer_number, poly_lr, transreid_lr
from util.run_files import RunFiles


def test_augmentation_is_a_function_of_its_numbers():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    augment = PadCropErase((32, 24), erase=1.0)
    one, two, other = (augment(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one) and one["imgs"].shape == (3, 32, 24)
    assert not torch.equal(one["imgs"], other["imgs"])
    plain, mirrored = (
        PadCropErase((32, 24), flip=flip, pad=0, erase=0.0)(image, np.random.default_rng(1)) for flip in (0.0, 1.0)
    )
    assert torch.equal(plain["imgs"].flip(2), mirrored["imgs"]) and plain["erase"][2] == 0


def test_erasing_fills_the_box_with_normal_noise_and_nothing_else():
    rng = np.random.default_rng(0)
    boxes = [erase_box(rng, (200, 100)) for _ in range(500)]
    areas = np.array([h * w for *_, h, w in boxes]) / 20_000
    assert 0.018 < areas.min() and areas.max() < 0.34 and 0.15 < areas.mean() < 0.2
    assert all(0 <= top and top + h <= 200 and 0 <= left and left + w <= 100 for top, left, h, w in boxes)
    imgs = torch.zeros(3, 3, 60, 50)
    erase_boxes(imgs, torch.tensor([[5, 10, 40, 30, 7], [0, 0, 0, 0, 8], [5, 10, 40, 30, 7]]))
    assert torch.equal(imgs[0], imgs[2]) and not imgs[1].any()
    inside = imgs[0, :, 5:45, 10:40].clone()
    assert abs(inside.mean()) < 0.05 and abs(inside.std() - 1) < 0.05
    imgs[0, :, 5:45, 10:40] = 0
    assert not imgs[0].any()


def test_batches_of_ranks_are_parts_of_one():
    pids = np.repeat(np.arange(8), 6)
    whole, *parts = (PKBatches(pids, 8 // ranks, 2, rank, ranks, seed=3) for rank, ranks in ((0, 1), (0, 2), (1, 2)))
    for batches in (whole, *parts):
        batches.set_epoch(4, 1)
    for one, left, right in zip(whole, *parts):
        assert one == left + right and len(one) == 8
    assert len(whole) == len(parts[0]) == whole.batches_per_epoch - 1
    slots = [slot for batch in whole for _, slot, _ in batch]
    assert len(set(slots)) == len(slots)


def test_a_vehicle_with_few_images_is_drawn_with_replacement():
    """TransReID: np.random.choice(idxs, K, replace=True), so 16 vehicles of 3 show 38.5 of 48 images at K 4."""
    pids = np.repeat(np.arange(17), [3] * 16 + [5])
    batches = [pk_batches(pids, 17, 4, 0, epoch)[0] for epoch in range(60)]
    assert all((np.bincount(pids[batch]) == 4).all() for batch in batches)
    few, more = (np.mean([len(np.unique(b[rule(pids[b])])) for b in batches]) for rule in (
        lambda x: x < 16, lambda x: x == 16))  # fmt: skip
    assert few == pytest.approx(48 * (1 - (2 / 3) ** 4), abs=1) and more == 4


def timm_cosine(base: float, first: float, last: float, epoch: int) -> float:
    """The scheduler of TransReID's code for a group of learning rate `base`, 5 of 120 epochs of warm-up."""
    if epoch < 5:
        return first + epoch * (base - first) / 5
    return last + 0.5 * (base - last) * (1 + math.cos(math.pi * epoch / 120))


def test_schedules_are_the_peers():
    """TransReID: biases have twice the peak and the same ends; TransFG: linear, then a cosine in updates; SETR: mmcv's
    PolyLrUpdater."""
    ratios = {"min_lr_ratio": 0.002, "warmup_lr_ratio": 0.01}
    lr = Reid(SimpleNamespace(lr=0.008, warmup_epochs=5.0, epochs=120, **ratios), "cpu").lr
    for epoch in range(1, 121):
        for factor in (1, 2):
            expected = timm_cosine(factor * 0.008, 0.01 * 0.008, 0.002 * 0.008, epoch)
            assert lr(epoch - 1 + 0.5, factor) == pytest.approx(expected)
    assert lr(119, 2) == lr(119) and max(map(lr, range(120))) == lr(4)
    assert transreid_lr(0, 0.008, 8e-5, 1.6e-5, 5, 120) == pytest.approx(8e-5 + (0.008 - 8e-5) / 5)
    task = Fgvc(SimpleNamespace(lr=0.03, warmup_epochs=1.0, epochs=20, min_lr_ratio=0.0, warmup_lr_ratio=0.0), "cpu")
    assert [task.lr(0), task.lr(0.5), task.lr(1)] == pytest.approx([0, 0.015, 0.03])
    assert task.lr(10) == pytest.approx(0.03 * 0.5 * (1 + np.cos(np.pi * 9 / 19)))
    assert task.lr(20) == pytest.approx(0, abs=1e-9)
    task.args.warmup_lr_ratio = 0.1
    assert task.lr(0) == pytest.approx(0.003)
    lr = Seg(SimpleNamespace(lr=1e-3, warmup_epochs=0, epochs=10, min_lr_ratio=0.1, warmup_lr_ratio=0), "cpu").lr
    assert [lr(0, 10), lr(10, 10), lr(10)] == pytest.approx([1e-2, 1e-4, 1e-4])
    assert [lr(0), lr(5)] == pytest.approx([1e-3, 1e-4 + 9e-4 * 0.5**0.9])
    assert poly_lr(1, 1e-3, 1e-5, 1e-4, 2, 10) == pytest.approx((1e-3 + 1e-5) / 2)


def test_layers_and_groups_of_the_optimiser():
    model = TransReID(VisionTransformer((32, 32), 16, 24, 3, 3), 5, TransReIDConfig(jpm=True, parts=2, shift=2))
    names = {name: layer_number(name, 3) for name, _ in model.named_parameters()}
    assert names["base.pos_embed"] == names["base.patch_embed.proj.weight"] == 0
    assert names["base.blocks.1.norm1.bias"] == 2 and names["b1.0.mlp.fc1.weight"] == 3
    assert names["classifier.0.weight"] == names["bottleneck.1.weight"] == 4
    optimizer = build_finetune_optimizer(model, 3, "sgd", 0.1, 1e-4, layer_decay=0.5, bias_lr_factor=2)
    scale = {id(p): (g["lr_scale"], g["peak_scale"]) for g in optimizer.param_groups for p in g["params"]}
    assert scale[id(model.base.pos_embed)] == (0.5**4, 1) and scale[id(model.classifier[0].weight)] == (1, 1)
    assert scale[id(model.b1[0].mlp.fc1.bias)] == (0.5, 2)
    assert all(g["weight_decay"] == 1e-4 for g in optimizer.param_groups)
    adamw = build_finetune_optimizer(model, 3, "adamw", 0.1, 0.05)
    decay = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert decay[id(model.base.pos_embed)] == 0 and decay[id(model.b1[0].mlp.fc1.weight)] == 0.05


def test_a_skipped_first_update_leaves_no_trace_in_sgd():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = build_finetune_optimizer(model, 1, "sgd", 0.1, 0.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert torch.allclose(model.weight, before - 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triplets_are_not_rounded_by_autocast(dtype):
    """Features of LayerNorm at ViT-B's width: distances of nearby vehicles drown in half precision."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 768, generator=rng)
    features = centres.repeat_interleave(4, dim=0) + 0.7 * torch.randn(64, 768, generator=rng)
    pids = torch.arange(16).repeat_interleave(4)
    expected = hard_triplet_loss(10 * features, pids)
    with torch.autocast("cpu", dtype):
        assert torch.equal(hard_triplet_loss(10 * features, pids), expected)


def test_stochastic_depth_skips_whole_samples_and_keeps_the_mean():
    layer, x = SameOnAnyRanksDropPath(0.25), torch.ones(4000, 2, 3)
    assert torch.equal(layer.eval()(x), x)
    torch.manual_seed(seed_of_step(0, 1, 2))
    y = layer.train()(x)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y == y[:, :1, :1]).all() and abs(y.mean() - 1) < 0.05
    assert seed_of_step(0, 1, 2) != seed_of_step(0, 2, 1)


def test_transreids_loader_takes_our_encoder(tmp_path):
    """Its contract (`base.load_param`): every name but those with 'head' or 'dist' is looked up in its model, an
    unknown one is a KeyError; the path must not say 'distilled'."""
    distill = {"context": "attention", "bank": torch.randn(4, 8), "tau": 0.07, "hidden": 0}
    mae = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32), distill=distill)
    args = SimpleNamespace(output_dir=tmp_path, save_minutes=1, keep_checkpoints=1, resume="")
    RunFiles(args, {}, {}, [], "--init").export("encoder", mae)
    content = torch.load(tmp_path / "encoder.pth", weights_only=True)
    assert list(content) == ["model"] and len(content["model"]) == 150
    assert content["model"].keys() == VisionTransformer((32, 32), 16, 192, 12, 3).state_dict().keys()
    for name, value in content["model"].items():
        assert "head" not in name and "dist" not in name and value.dtype == torch.float32 and value.is_contiguous()
        assert torch.equal(value, mae.state_dict()[name])
