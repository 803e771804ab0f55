"""Part segmentation: the model, the data, the numbers, and runs from a set on disk to a report."""

import copy
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, read_log, run_command, run_finetune
from layouts import write_demo_parts
from PIL import Image

from datasets.seg import PartsAugment, open_mask, open_pair, part_names, read_parts
from datasets.transforms import distort_colours
from finetune.seg import Seg, evaluate_parts, model_size, predict_mask, sliding_logits, window_starts
from metrics.seg import confusion_matrix, segmentation_numbers
from models_setr import SETR, TAPS, CpuSyncBatchNorm, SETRConfig, scaled_taps, setr_loss, synchronized
from models_vit import VisionTransformer
from tools import convert_partimagenet
from tools.convert_partimagenet import fill_polygon
from util.checkpoint import read_checkpoint
from util.errors import InputError
from util.optim import build_finetune_optimizer, poly_lr

CPU = "--device cpu --amp none --num_workers 0".split()


def encoder(size=(32, 32), depth=2) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(size, 16, 24, depth, 3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "parts"
    write_demo_parts(folder, "canonical")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a run of seconds: two blocks, 32 px."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 2, 3).state_dict()}, file)
    flags = f"--task seg --finetune {file} --input_size 32 --batch_size 4 --epochs 2 --print_freq 1"
    return [*flags.split(), *CPU, "--decoder", "naive", "--lr", "0.003"]


def finetune(small, data, output, *more) -> dict:
    flags = [*small, "--data_path", str(data), "--output_dir", str(output), *more]
    return run_finetune(flags)


def score(model, data, output, *more) -> dict:
    words = f"--task seg --eval --resume {model} --data_path {data} --output_dir {output}"
    return run_finetune([*words.split(), *CPU, *more])


@pytest.fixture(scope="module")
def trained(small, parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    return output, finetune(small, parts, output, "--report", "--decoder", "mla")


# the model


def test_taps_of_any_depth():
    assert all(scaled_taps(name, 12) == taps for name, taps in TAPS.items())
    assert scaled_taps("mla", 24) == (5, 11, 17, 23)  # SETR's own for ViT-L
    for name, depth in itertools.product(TAPS, (1, 2, 3, 7, 32)):
        taps = scaled_taps(name, depth)
        assert taps[-1] == depth - 1 and min(taps) >= 0 and list(taps) == sorted(taps)


@pytest.mark.parametrize("decoder", TAPS)
def test_features_are_outputs_of_blocks_without_class_token_and_norm(decoder):
    model = SETR(encoder((48, 80), depth=4), SETRConfig(5, decoder)).eval()
    imgs = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8)
    x, outputs = model.base.embed(imgs), []
    if decoder == "mla":
        x = x[:, 1:]
    for block in model.base.blocks:
        x = block(x)
        outputs.append(x[:, -15:])  # 3 x 5 patches
    assert all(torch.equal(x, outputs[tap]) for tap, x in zip(scaled_taps(decoder, 4), model.features(imgs)))
    logits = model(imgs)
    assert torch.equal(logits[0], model.predict(imgs))
    assert [x.shape for x in logits] == [(2, 5, 48, 80)] * (4 if decoder == "naive" else 5)
    assert len(SETR(encoder(), SETRConfig(5, decoder, aux=False))(imgs[:, :, :32, :32])) == 1


def test_the_heads_have_setrs_layers():
    def kernels(module):
        return [tuple(w.shape) for name, w in module.named_parameters() if w.ndim == 4]

    naive, pup, mla = (SETR(encoder(depth=12), SETRConfig(5, name)) for name in TAPS)
    one = [(256, 24, 1, 1), (5, 256, 1, 1)]
    assert kernels(naive.decoder) == one and [kernels(head) for head in naive.aux] == [one] * 3
    assert kernels(pup.decoder) == [(256, 24, 3, 3), *[(256, 256, 3, 3)] * 3, (5, 256, 1, 1)]
    assert [kernels(head) for head in pup.aux] == [[(256, 24, 3, 3), (5, 256, 1, 1)]] * 4
    assert pup.decoder.scales == (2, 2, 2, 1) and pup.aux[0].scales == (4,)
    assert kernels(mla.decoder.lateral) == [(256, 24, 1, 1)] * 4
    assert kernels(mla.decoder.smooth) == [(256, 256, 3, 3)] * 4
    assert kernels(mla.decoder.branches) == [(128, 256, 3, 3), (128, 128, 3, 3)] * 4
    assert kernels(mla.decoder.classify) == [(5, 512, 3, 3)] and kernels(mla.decoder.aux) == [(5, 256, 1, 1)] * 4
    assert all(not hasattr(m.base.norm, "weight") and m.base.pos_embed.requires_grad for m in (naive, pup, mla))


def as_map(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (24,), eps=1e-6).transpose(1, 2).reshape(1, 24, 2, 3)


def test_multi_level_aggregation_by_hand():
    """Deep to shallow sums, then 3 x 3, two more, x 4 with aligned corners, all together."""
    head = SETR(encoder(depth=4), SETRConfig(3, "mla")).eval().decoder
    levels = [torch.randn(1, 6, 24) for _ in range(4)]
    lateral = [head.lateral[i](as_map(x)) for i, x in enumerate(levels)]
    maps = [head.smooth[i](sum(lateral[i:])) for i in range(4)]
    larger = {"size": (8, 12), "mode": "bilinear", "align_corners": True}
    large = [F.interpolate(head.branches[i](x), **larger) for i, x in enumerate(maps)]
    found = head(levels, (2, 3))
    assert torch.allclose(found[0], head.classify(torch.cat(large, dim=1)), atol=1e-5)
    assert torch.allclose(found[2], head.aux[1](maps[1]), atol=1e-5)


def test_the_backbone_of_mla_learns_as_setrs():
    """Norms, lateral and 3 x 3 convolutions belong to SETR's backbone, at x 1; auxiliary classifiers have no bias."""
    model = SETR(encoder(depth=4), SETRConfig(3, "mla"))
    optimizer = build_finetune_optimizer(model, 4, "sgd", 0.1, 0.0, head_lr_factor=10)
    peak = {id(p): group["peak_scale"] for group in optimizer.param_groups for p in group["params"]}
    tens = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if peak[id(p)] == 10}
    assert tens == {"decoder.branches", "decoder.classify", "decoder.aux"} and set(peak.values()) == {1, 10}
    assert all(head.bias is None for head in model.decoder.aux)
    pup = SETR(encoder(depth=4), SETRConfig(3, "pup"))
    optimizer = build_finetune_optimizer(pup, 4, "sgd", 0.1, 0.0, head_lr_factor=10)
    ones = [p for group in optimizer.param_groups for p in group["params"] if group["peak_scale"] == 1]
    assert len(ones) == len(list(pup.base.parameters()))
    task = Seg(SimpleNamespace(lr=1e-3, warmup_epochs=0, epochs=10, min_lr_ratio=0.1, warmup_lr_ratio=0), "cpu")
    assert [task.lr(0, 10), task.lr(10, 10), task.lr(10)] == pytest.approx([1e-2, 1e-4, 1e-4])  # mmcv's PolyLrUpdater


def test_progressive_upsampling_by_hand():
    head, x = SETR(encoder(), SETRConfig(3, "pup")).eval().decoder, torch.randn(1, 6, 24)
    y = as_map(x)
    for conv in head.convs[:3]:
        y = F.interpolate(conv(y), scale_factor=2, mode="bilinear", align_corners=False)
    y = F.conv2d(head.convs[3](y), head.classify.weight, head.classify.bias)
    assert torch.allclose(head(x, (2, 3)), y, atol=1e-5) and y.shape == (1, 3, 16, 24)


def test_batch_norm_of_one_rank_is_torchs():
    ours, theirs = CpuSyncBatchNorm(6), torch.nn.BatchNorm2d(6)
    for _ in range(2):
        x = torch.randn(3, 6, 4, 5)
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    model = SETR(encoder(), SETRConfig(3, "mla"))
    assert synchronized(model, torch.device("cpu")) is model
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))  # as on several GPUs
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert not any(isinstance(module, CpuSyncBatchNorm) for module in converted.modules())


def test_the_loss_by_hand():
    torch.manual_seed(0)
    outputs, masks = [torch.randn(2, 3, 2, 2) for _ in range(3)], torch.tensor([[[0, 2], [255, 1]]] * 2)
    masks[1, 0, 0] = 255
    terms = setr_loss(outputs, masks.to(torch.uint8), aux_weight=0.4)

    def by_hand(z):
        rows = [(n, y, x) for n, y, x in itertools.product(*map(range, (2, 2, 2))) if masks[n, y, x] != 255]
        assert len(rows) == 5
        return sum(-z[n, :, y, x].log_softmax(0)[masks[n, y, x]] for n, y, x in rows) / 5

    expected = [by_hand(z) for z in outputs]
    assert terms["main"] == pytest.approx(expected[0].item())
    assert terms["loss"].item() == pytest.approx((expected[0] + 0.4 * (expected[1] + expected[2])).item())
    nothing = setr_loss(outputs[:1], torch.full((2, 2, 2), 255))
    assert nothing["loss"] == 0 and "aux" not in nothing


def test_the_schedule_is_polynomial():
    lrs = [poly_lr(e, 1e-3, 0, 1e-4, 0, 10) for e in np.linspace(0, 10, 11)]
    assert lrs[0] == 1e-3 and lrs[-1] == pytest.approx(1e-4)
    assert lrs[5] == pytest.approx(1e-4 + 9e-4 * 0.5**0.9)
    assert poly_lr(1, 1e-3, 1e-5, 1e-4, 2, 10) == pytest.approx((1e-3 + 1e-5) / 2)


# the numbers


def test_numbers_against_brute_force():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 3, 255], (4, 9, 7), p=[0.5, 0.3, 0.1, 0.1])  # 2 and 4 are absent
    predicted = np.where(rng.random(truth.shape) < 0.6, np.minimum(truth, 3), rng.integers(0, 3, truth.shape))
    confusion = sum(confusion_matrix(torch.tensor(t), torch.tensor(p), 5) for t, p in zip(truth, predicted)).numpy()
    pairs, iou, acc = [(t, p) for t, p in zip(truth.ravel(), predicted.ravel()) if t != 255], [], []
    assert all(confusion[t, p] == pairs.count((t, p)) for t, p in itertools.product(range(5), range(5)))
    for c in range(5):
        both, either, true = pairs.count((c, c)), sum(c in pair for pair in pairs), sum(c == t for t, _ in pairs)
        iou.append(both / either if either else float("nan"))
        acc.append(both / true if true else float("nan"))
    numbers = segmentation_numbers(confusion, background=True)
    np.testing.assert_allclose(numbers.iou, iou)
    np.testing.assert_allclose(numbers.acc, acc)
    assert np.isnan(numbers.iou[4]) and numbers.iou[2] == 0 and np.isnan(numbers.acc[2])
    expected = {"mIoU": np.nanmean(iou), "parts_mIoU": np.nanmean(iou[1:]), "mAcc": np.nanmean(acc)}
    expected["aAcc"] = np.mean([t == p for t, p in pairs])
    expected["parts_aAcc"] = np.mean([t == p for t, p in pairs if t > 0])
    assert {name: numbers.flat[name] for name in expected} == pytest.approx(expected)
    assert "parts_mIoU" not in segmentation_numbers(np.eye(2, dtype=int), background=False).flat
    assert all(np.isnan(v) for v in segmentation_numbers(np.zeros((2, 2), dtype=int), True).flat.values())
    with pytest.raises(ValueError, match="truth has classes from 0 to 3, there are 3"):  # the peers count K as K - 1
        confusion_matrix(torch.tensor([0, 3]), torch.tensor([0, 0]), 3)


# windows


@pytest.mark.parametrize("length", [32, 33, 53, 54, 100, 117])
def test_windows_cover_everything(length):
    starts = window_starts(length, 32)
    assert starts[0] == 0 and starts[-1] == length - 32 and len(set(starts)) == len(starts)
    assert all(b - a <= 21 for a, b in itertools.pairwise(starts)) and window_starts(512, 512) == [0]
    assert window_starts(683, 512) == [0, 171] and window_starts(1024, 512) == [0, 341, 512]


@pytest.mark.parametrize("size", [(20, 12), (32, 48), (48, 32), (200, 33), (31, 90)])
def test_any_size_is_scored_at_its_own_size(size):
    """Small, non-square and long pictures; windows and whole; square crop and not."""
    for crop in ((32, 32), (32, 48)):
        model = SETR(encoder(crop), SETRConfig(4, "naive")).eval()
        width, height = model_size(size, crop)
        assert min(width - crop[1], height - crop[0]) == 0 or width == crop[1] or height == crop[0]
        assert width >= crop[1] and height >= crop[0]
        assert abs(width / height - size[0] / size[1]) < 0.06 * size[0] / size[1]
        imgs = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        with torch.inference_mode():
            assert predict_mask(model, imgs, size[::-1], 2).shape == size[::-1]


def test_logits_of_overlapping_windows_are_averaged():
    model = SETR(encoder(), SETRConfig(3, "naive")).eval()
    imgs = torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8)
    with torch.inference_mode():
        left, right = model.predict(imgs[None, :, :, :32])[0], model.predict(imgs[None, :, :, 8:])[0]
        found = sliding_logits(model, imgs, batch_size=1)
    assert torch.allclose(found[..., :8], left[..., :8], atol=1e-6)
    assert torch.allclose(found[..., 8:32], (left[..., 8:] + right[..., :24]) / 2, atol=1e-6)
    assert torch.allclose(found[..., 32:], right[..., 24:], atol=1e-6)


# the data


def test_image_and_mask_stay_together():
    """The picture's colour says the class: after resizing, cropping, mirroring and padding it still does."""
    mask = np.zeros((60, 90), dtype=np.uint8)
    mask[10:50, 20:60], mask[30:, 50:] = 1, 2
    image = Image.fromarray(np.stack([mask * 100, 200 - mask * 100, mask * 0 + 7], axis=2))
    augment = PartsAugment((48, 32), fill=(1, 2, 3), distort=False)
    seen = set()
    for seed in range(40):
        out = augment(image, mask, np.random.default_rng(seed))
        assert out["imgs"].shape == (3, 48, 32) and out["masks"].shape == (48, 32)
        padding = out["masks"] == 255
        assert (out["imgs"][:, padding] == torch.tensor([[1], [2], [3]])).all()
        wrong = (out["imgs"][0].int() - 100 * out["masks"].int()).abs()[~padding] > 50
        assert wrong.float().mean() < 0.06, seed  # mixed colours along the edges
        seen.add((bool(padding.any()), out["masks"][~padding].unique().numel()))
    assert {padded for padded, _ in seen} == {True, False} and max(n for _, n in seen) == 3


def test_augmentation_is_a_function_of_its_numbers():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    mask = rng.integers(0, 3, (40, 50)).astype(np.uint8)
    augment = PartsAugment((32, 32), fill=(0, 0, 0))
    one, two, other = (augment(image, mask, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["imgs"], other["imgs"]) and not torch.equal(one["masks"], other["masks"])


def test_a_crop_of_one_class_is_drawn_again():
    mask = np.zeros((32, 320), dtype=np.uint8)
    mask[:, 150:170] = 1
    augment = PartsAugment((32, 32), fill=(0, 0, 0))
    shares = [(mask[augment.place(mask, np.random.default_rng(s))] == 1).mean() for s in range(200)]
    assert np.mean([0.25 < share < 0.75 for share in shares]) > 0.4  # 6% of single draws


def test_colours_are_distorted_within_bounds():
    grey, red = (Image.new("RGB", (8, 8), colour) for colour in ((120, 120, 120), (150, 60, 60)))
    levels = [distort_colours(grey, np.random.default_rng(s)) for s in range(200)]
    assert all((pixels == pixels[0, 0, 0]).all() for pixels in levels)  # grey has neither hue nor saturation
    values = np.array([pixels[0, 0, 0] for pixels in levels], dtype=float)
    assert values.min() >= 0.5 * 88 - 1 and values.max() <= 1.5 * 152 + 1 and 0.15 < (values == 120).mean() < 0.4
    hues = [distort_colours(red, np.random.default_rng(s))[0, 0] for s in range(100)]
    assert any((hue != hues[0]).any() for hue in hues) and all(hue[0] >= hue[1:].max() for hue in hues)


def write_pair(root, split, name, mask, image_size=None, **save):
    mask = np.asarray(mask, dtype=np.uint8)
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", image_size or mask.shape[::-1], "grey").save(root / "images" / split / f"{name}.png", **save)
    Image.fromarray(mask).save(root / "annotations" / split / f"{name}.png")


def write_classes(root, classes=("background", "door", "wheel"), **more):
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps({"classes": classes, **more}))


def test_masks_are_read_as_they_are(tmp_path):
    """Palette, 255, a class that a split lacks, a class list by value, masks without an image."""
    write_classes(tmp_path, {"7": "wheel", "40": "background", "3": "door"}, ignore=0)
    write_pair(tmp_path, "val", "a", [[7, 40, 0], [40, 40, 7]])
    palette = Image.fromarray(np.array([[7, 7], [40, 0]], dtype=np.uint8), "P")
    palette.putpalette(list(range(256)) * 3)
    write_pair(tmp_path, "val", "b", np.zeros((2, 2)))
    palette.save(tmp_path / "annotations" / "val" / "b.png")
    write_pair(tmp_path, "val", "c", [[40]])
    (tmp_path / "images" / "val" / "c.png").unlink()
    data = read_parts(tmp_path, ("val",))
    assert data.space.names == ("background", "door", "wheel") and data.space.background
    assert data.splits["val"].counts.tolist() == [[3, 0, 2, 1], [1, 0, 2, 1]]
    assert "absent" in "".join(note for note in data.notes if note.endswith("door"))
    assert data.notes[0].startswith("val: 1 masks have no image")
    picture, mask = open_pair(data.splits["val"].images[1], data.splits["val"].masks[1])
    assert data.space.table[mask].tolist() == [[2, 2], [0, 255]] and picture.mode == "RGB"


def test_sets_of_published_parts_are_known_by_their_classes(parts, tmp_path):
    data = read_parts(parts, ("train", "test"))
    assert data.space.name == "car_bicycle" and data.space.names == ("background", *part_names("car_bicycle"))
    write_classes(tmp_path, ["background", "Car Body"])
    write_pair(tmp_path, "train", "a", [[0, 1]])
    assert read_parts(tmp_path, ("train",)).space.name == "own"


def test_a_turned_photo_is_taken_as_its_mask_was_drawn(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    write_classes(tmp_path)
    write_pair(tmp_path, "val", "stored", np.zeros((8, 12)), exif=exif.tobytes())
    write_pair(tmp_path, "val", "upright", np.ones((12, 8)), image_size=(12, 8), exif=exif.tobytes())
    part = read_parts(tmp_path, ("val",)).splits["val"]
    sizes = [open_pair(part.images[i], part.masks[i])[0].size for i in (0, 1)]
    assert sizes == [(12, 8), (8, 12)]


# polygons and releases


def is_inside(x, y, points):
    crossed = [(y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0)
               for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1])]  # fmt: skip
    return sum(crossed) % 2 == 1


def test_polygons_against_a_test_of_every_pixel():
    rng = np.random.default_rng(0)
    for count in (3, 4, 9):
        points = [tuple(p) for p in rng.uniform(-4, 20, (count, 2)).tolist()]
        found = fill_polygon(np.array(points).ravel().tolist(), 13, 17)
        assert np.array_equal(found, [[is_inside(x + 0.5, y + 0.5, points) for x in range(17)] for y in range(13)])
    assert fill_polygon([2, 1, 5, 1, 5, 3, 2, 3], 4, 8).nonzero()[1].tolist() == [2, 3, 4, 2, 3, 4]
    body, mirror = [0, 0, 8, 0, 8, 6, 0, 6], [2, 2, 4, 2, 4, 4, 2, 4]
    for order in ([(24, [body]), (26, [mirror])], [(26, [mirror]), (24, [body])]):  # small parts lie on top
        mask = convert_partimagenet.draw_polygons(order, (9, 7))
        assert (mask == 26).sum() == 4 and (mask == 24).sum() == 44 and mask[6, 8] == 40


def convert(source, output, *more) -> dict:
    words = ["--input", str(source), "--output", str(output), *more]
    return convert_partimagenet.main(convert_partimagenet.get_args_parser().parse_args(words))


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases")
    for release in ("seg", "ood"):
        write_demo_parts(folder / release, release)
    return folder


def masks_of(folder) -> dict:
    return {file.name: open_mask(file) for file in folder.glob("annotations/*/*.png")}


def test_both_releases_become_the_same_masks(parts, releases, tmp_path):
    """Polygons with a degenerate ring, drawn largest first; masks with 255 and palettes; other things out."""
    seg = convert(releases / "seg", tmp_path / "seg", "--label_space", "car_bicycle")
    ood = convert(releases / "ood", tmp_path / "ood", "--label_space", "car_bicycle", "--no-resplit")
    canonical = masks_of(parts)
    border = {name for name, mask in canonical.items() if (mask == 255).any()}
    assert len(canonical) == 30 and len(border) == 3
    assert masks_of(tmp_path / "seg").keys() == masks_of(tmp_path / "ood").keys() == canonical.keys()
    for name, mask in masks_of(tmp_path / "seg").items():
        assert np.array_equal(mask, canonical[name])
    for name, mask in masks_of(tmp_path / "ood").items():
        known = canonical[name] != 255
        assert np.array_equal(mask[known], canonical[name][known]), name
    assert seg["dropped"] == {"pictures of something else": 3}
    assert ood["dropped"]["polygons of fewer than 3 points"] == 3 and not ood["left_out"]
    assert sum(sum(kinds.values()) for kinds in seg["pictures"].values()) == 30
    assert convert(releases / "seg", tmp_path / "seg", "--label_space", "car_bicycle") == seg
    assert {Image.open(f).mode for f in (releases / "seg" / "annotations").rglob("*.png")} == {"L", "P"}


def test_classes_are_split_anew(releases, tmp_path):
    result = convert(releases / "ood", tmp_path / "cars", "--label_space", "car_parts", "--link")
    assert not any("Bicycle" in kinds for kinds in result["pictures"].values())
    rows = [{"synset": "n1", "name": str(i), "split": "train"} for i in range(100)]
    convert_partimagenet.split_anew(rows, seed=0)
    assert [sum(r["split"] == s for r in rows) for s in ("train", "val", "test")] == [85, 5, 10]
    data = read_parts(tmp_path / "cars", ("train", "val", "test"))
    assert data.space.names == ("background", *part_names("car_parts"))
    write_pair(tmp_path / "cars", "val", "no_part", np.zeros((40, 40)))  # a set of cars alone: it stays
    assert len(read_parts(tmp_path / "cars", ("val",)).splits["val"]) == len(data.splits["val"]) + 1


def damaged_release(source, what: str) -> None:
    """Make a copy of a release one that cannot be converted."""
    train = source / "train.json"
    if what == "whole masks":
        shutil.rmtree(source / "annotations" / "train")
        (source / "annotations" / "train_whole").rename(source / "annotations" / "train")
    elif what == "ids from 1":
        content = json.loads(train.read_text())
        content["categories"] = [c | {"id": c["id"] + 1} for c in content["categories"]]
        train.write_text(json.dumps(content))
    elif what == "no json":
        train.write_text('{"images": 3}')
    elif what == "empty":
        shutil.rmtree(source)
        source.mkdir()
    elif what == "no folder":
        shutil.rmtree(source)


def test_polygons_that_are_none_are_dropped_and_counted(releases, tmp_path):
    source = shutil.copytree(releases / "ood", tmp_path / "ood")
    content = json.loads((source / "train.json").read_text())
    far, odd = [1.0, 1.0, 1e300, 5.0, 9.0, 9.0], [1.0, float("nan"), 5.0, 5.0, 9.0, 9.0]
    rings = [far, odd, [1, "2", 5, 5, 9, 9], [True] * 6, [[1, 2]] * 6, [float("inf"), 1, 5, 5, 9, 9]]
    content["annotations"][1]["segmentation"] += [*rings, [1.0, 1.0, 9.0, 9.0], 7, [-3.0, -3.0, 4.0, -3.0, 4.0, 4.0]]
    content["annotations"][2]["segmentation"] = {"counts": "run-length", "size": [3, 3]}
    (source / "train.json").write_text(json.dumps(content))
    dropped = convert(source, tmp_path / "o", "--label_space", "car_parts")["dropped"]
    assert dropped["polygons with NaN, texts or points far away"] == len(rings)
    assert dropped["polygons of fewer than 3 points"] == 4 and dropped["annotations without a usable polygon"] == 1


@pytest.mark.parametrize(
    "entry, name, value, message",
    [
        ("annotations", "image_id", [3], "one of its annotations has image_id"),
        ("annotations", "category_id", "24", "one of its annotations has category_id '24'"),
        ("annotations", "category_id", 24.5, "has category_id '24.5'"),
        ("annotations", "category_id", -1, "category_id -1, but ids go from 0"),
        ("images", "width", None, "one of its images has width 'None'"),
        ("images", "height", float("nan"), "one of its images has height 'nan'"),
        ("images", "file_name", 7, "one of its images has file_name '7'"),
        ("categories", "id", "x", "is no COCO json"),
    ],
)
def test_wrong_types_in_a_coco_json_get_a_sentence(releases, tmp_path, entry, name, value, message):
    source = shutil.copytree(releases / "ood", tmp_path / "ood")
    content = json.loads((source / "train.json").read_text())
    content[entry][0][name] = value
    (source / "train.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "o")


def test_a_class_without_a_pixel_is_refused_before_training(tmp_path):
    write_classes(tmp_path, ["background", "car"])
    for split in ("train", "val"):
        write_pair(tmp_path, split, "a", np.repeat([[0, 255]], 4, axis=0))
        with pytest.raises(InputError, match=f"class 'car' has no pixel in {split}, while 4 pixels hold 255, which is"):
            read_parts(tmp_path, (split,))
    write_classes(tmp_path, {"0": "background", "1": "car", "2": "van"})
    for split in ("train", "val"):
        write_pair(tmp_path, split, "a", [[0, 1]])
    with pytest.raises(InputError, match="class 'van' has no pixel in train: write the number"):
        read_parts(tmp_path, ("train",))
    assert read_parts(tmp_path, ("val",)).splits["val"].counts.tolist() == [[1, 1, 0, 0]]  # a test may lack one


@pytest.mark.parametrize(
    "what, message",
    [
        ("no folder", "is no folder: give the folder of PartImageNet"),
        ("empty", "is neither release of PartImageNet"),
        ("whole masks", "has the value 158: masks of parts hold 0 to 39"),
        ("ids from 1", "calls category 25 'Car Body', which is 24 in the release"),
        ("no json", "train.json is no COCO json of PartImageNet"),
        ("occupied", "exists and does not hold this conversion"),
    ],
)
def test_releases_that_cannot_be_converted(releases, tmp_path, what, message):
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(releases / ("seg" if what in ("whole masks", "occupied") else "ood"), source)
    damaged_release(source, what)
    if what == "occupied":
        write_classes(output)
    with pytest.raises(InputError, match=message) as caught:
        convert(source, output)
    assert "\n" not in str(caught.value) and (what == "occupied") == output.exists()


def test_what_a_release_lacks_is_counted(releases, tmp_path):
    source = shutil.copytree(releases / "ood", tmp_path / "ood")
    content = json.loads((source / "train.json").read_text())
    first, second, third, *_ = (i for i in content["images"] if not i["file_name"].startswith("n0144"))
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != third["id"]]
    (source / "train" / first["file_name"][:9] / first["file_name"]).unlink()
    second["width"] += 1
    (source / "train.json").write_text(json.dumps(content))
    names = ("no such file", "image and mask differ in size", "no annotation that can be drawn")
    lacking = {name: [f"train/{image['file_name']}"] for name, image in zip(names, (first, second, third))}
    assert convert(source, tmp_path / "out", "--label_space", "car_bicycle")["left_out"] == lacking


# runs


def test_a_run_leaves_a_model_that_scores_the_same(trained, parts, tmp_path):
    output, numbers = trained
    assert json.loads((output / "metrics.json").read_text()) == numbers
    assert {"mIoU", "mAcc", "aAcc", "parts_mIoU", "IoU_Car Side Mirror"} <= set(numbers)
    assert numbers["protocol"].startswith("parts/car_bicycle/test (8 classes, ") and numbers["unreadable"] == 0
    log = read_log(output)
    assert [row["epoch"] for row in log] == [0, 1, 1] and log[1]["train_loss"] < log[0]["train_loss"]
    assert log[0]["train_aux"] > 0 and log[-1]["test_mIoU"] == numbers["mIoU"]
    for name, amp in (("model.pth", "none"), ("model.safetensors", "bf16")):  # which is for training only
        assert score(output / name, parts, tmp_path, "--amp", amp) == numbers
    assert score(output / name, parts, tmp_path, "--seg_split", "val")["mIoU"] != numbers["mIoU"]
    for name in ("model.pth", "checkpoint-last.pth", "checkpoint-1.pth", "model.safetensors"):
        assert read_checkpoint(output / name)["model"]


def test_the_report_shows_every_class_by_name_and_number(trained):
    page = (trained[0] / "report.html").read_text()
    for number, name in enumerate(part_names("car_bicycle"), 1):
        assert page.count(f">{number}</span></td><td>{name}</td>") == 1  # in the table
    assert page.count("<figcaption>answer</figcaption>") == page.count("<figcaption>truth</figcaption>") > 3
    assert trained[1]["protocol"].split(" (")[0] in page and "What is taken for what" in page
    assert "http://" not in page and "https://" not in page


def test_two_ranks_are_one(small, parts, tmp_path):
    """Training: the same weights up to rounding, with statistics and labelled pixels of both ranks; scoring:
    the same digits."""
    words = [*small, "--data_path", str(parts), "--lr", "1e-3", "--epochs", "1"]
    two = ["main_finetune.py", *words, "--batch_size", "2", "--output_dir", str(tmp_path / "two")]
    done = run_command(command(*two, processes=2))
    assert done.returncode == 0, done.stderr
    finetune(words, parts, tmp_path / "one")
    one, two = (read_log(tmp_path / name)[0] for name in ("one", "two"))
    for name in ("train_loss", "train_main", "train_aux", "train_accuracy", "train_grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    one, two = (read_checkpoint(tmp_path / name / "model.pth")["model"] for name in ("one", "two"))
    for name, value in one.items():  # what batch normalisation takes away again stays at rounding errors
        assert torch.allclose(two[name], value, rtol=1e-4, atol=1e-6 * max(1, value.abs().max())), name
    alone = score(tmp_path / "two" / "model.pth", parts, tmp_path / "alone")
    assert json.loads((tmp_path / "two" / "metrics.json").read_text()) == alone


def test_broken_pairs_are_counted_and_named(parts, trained, tmp_path):
    broken = shutil.copytree(parts, tmp_path / "parts")
    images, masks = (sorted((broken / kind / "test").iterdir()) for kind in ("images", "annotations"))
    images[0].write_bytes(images[0].read_bytes()[:300])
    masks[1].write_bytes(b"no image")
    numbers = score(trained[0] / "model.pth", broken, tmp_path)
    assert numbers["unreadable"] == 2 and "2 unreadable left out" in numbers["protocol"]
    listed = (tmp_path / "unreadable_test_images.txt").read_text()
    assert images[0].name in listed and images[1].name in listed and "UnidentifiedImageError" in listed


def test_every_image_is_scored_once(parts):
    data = read_parts(parts, ("test",))
    model = SETR(encoder(), SETRConfig(8, "naive")).eval()
    result = evaluate_parts(model, data, "test", 3, 0)
    counts = data.splits["test"].counts
    assert np.array_equal(result.each.sum(axis=2), counts[:, :-1])
    assert result.each.dtype == np.int64
    with torch.no_grad():
        model.decoder.classify.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="are not finite: the model has diverged"):
        evaluate_parts(model, data, "test", 3, 0)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--aux_weight -1", "--aux_weight -1.0: must be in"),
        ("--batch_size 64", "21 training images do not fill one batch of 64"),
        ("--data_path nowhere", "--data_path nowhere is no folder"),
    ],
)
def test_contradictions_stop_at_once(small, parts, tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as caught:
        finetune(small, parts, tmp_path, *flags.split())
    assert "\n" not in str(caught.value)


def test_eval_takes_no_flag_that_would_change_the_model(small, parts, trained, tmp_path):
    write_classes(tmp_path / "other")
    write_pair(tmp_path / "other", "val", "a", [[0, 1]])
    model = trained[0] / "model.pth"
    words = f"--task seg --eval --finetune {small[3]} --data_path {parts} --output_dir {tmp_path / 'o'}".split()
    with pytest.raises(InputError, match="--eval --finetune: an encoder has no answers for --task seg"):
        run_finetune([*words, *CPU])
    for file, data, flags, message in (
        (model, parts, "--decoder naive", "--decoder would change the model"),
        (model, parts, "--input_size 64", "--input_size would change the model"),
        (model, parts, "--aux_weight 0.4", "--aux_weight would change the model"),  # the default
        (small[3], parts, "", "is no model of main_finetune.py: give the model.pth"),
        (model, tmp_path / "other", "", "knows the classes background, Car Body"),
    ):
        with pytest.raises(InputError, match=message):
            score(file, data, tmp_path / "o", *flags.split())


@pytest.mark.parametrize(
    "what, message",
    [
        ("no classes", "classes.json is missing: write which class"),
        ("odd classes", "classes.json cannot be understood"),
        ("one class", "must name two classes or more"),
        ("ignored class", '"ignore" is 1, and must be'),
        ("no split", "images/train is missing: .*splits found: none"),
        ("no mask", r"1 of 2 images under .* have no mask: first .*b.png is gone"),
        ("no image", "no image under"),
        ("two images", "one mask cannot serve two images"),
        ("sizes", "the image is 9 x 8 px, its mask 8 x 8"),
        ("value", "has 64 pixels of value 9, which classes.json does not name"),
        ("colours", "none of the 1 pairs .* its mode is RGB"),
        ("deep", "none of the 1 pairs .* its mode is I;16"),
        ("unlabelled", "class 'background' has no pixel in train, while 64 pixels hold 255, which is ignored"),
    ],
)
def test_sets_that_cannot_be_read(tmp_path, what, message):
    mask = np.full((8, 8), {"value": 9, "unlabelled": 255}.get(what, 1))
    if what != "no classes":
        write_classes(tmp_path, ["only"] if what == "one class" else ["background", "door"],
                      **({"ignore": 1} if what == "ignored class" else {}))  # fmt: skip
    if what == "odd classes":
        (tmp_path / "classes.json").write_text('["background"')
    if what != "no split":
        write_pair(tmp_path, "train", "a", mask, image_size=(9, 8) if what == "sizes" else None)
    image, file = tmp_path / "images" / "train" / "a.png", tmp_path / "annotations" / "train" / "a.png"
    if what == "no mask":
        shutil.copy(image, image.with_name("b.png"))
    elif what == "two images":
        Image.open(image).save(image.with_suffix(".jpg"))
    elif what == "no image":
        image.unlink()
    elif what == "colours":
        Image.new("RGB", (8, 8)).save(file)
    elif what == "deep":
        Image.fromarray(mask.astype(np.uint16)).save(file)
    with pytest.raises(InputError, match=message) as caught:
        read_parts(tmp_path, ("train",))
    assert "\n" not in str(caught.value)
