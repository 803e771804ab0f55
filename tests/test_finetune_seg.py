"""Part segmentation: the model, the numbers, windows, sets with masks, releases of PartImageNet."""

import copy
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from util.errors import InputError
from util.optim import build_finetune_optimizer


def setr(decoder="naive", classes=3, size=(32, 32), depth=2, **more) -> SETR:
    torch.manual_seed(0)
    return SETR(VisionTransformer(size, 16, 24, depth, 3), SETRConfig(classes, decoder, **more)).eval()


def pictures(*shape) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One set as it is read, and as PartImageNet's two releases have it."""
    folder = tmp_path_factory.mktemp("sets")
    for release in ("canonical", "seg", "ood"):
        write_demo_parts(folder / release, release)
    return folder


# the model


def test_taps_of_any_depth():
    assert all(scaled_taps(name, 12) == taps for name, taps in TAPS.items())
    assert scaled_taps("mla", 24) == (5, 11, 17, 23)  # SETR's own for ViT-L
    for name, depth in itertools.product(TAPS, (1, 2, 3, 7, 32)):
        taps = scaled_taps(name, depth)
        assert taps[-1] == depth - 1 and min(taps) >= 0 and list(taps) == sorted(taps)


@pytest.mark.parametrize("decoder", TAPS)
def test_features_are_outputs_of_blocks_without_class_token_and_norm(decoder):
    model, imgs = setr(decoder, 5, (48, 80), depth=4), pictures(2, 3, 48, 80)
    x, outputs = model.base.embed(imgs)[:, decoder == "mla" :], []
    for block in model.base.blocks:
        x = block(x)
        outputs.append(x[:, -15:])  # 3 x 5 patches
    assert all(torch.equal(outputs[tap], x) for tap, x in zip(scaled_taps(decoder, 4), model.features(imgs)))
    logits = model(imgs)
    assert torch.equal(logits[0], model.predict(imgs))
    assert [x.shape for x in logits] == [(2, 5, 48, 80)] * (4 if decoder == "naive" else 5)
    assert len(setr(decoder, aux=False)(imgs[:, :, :32, :32])) == 1


def test_the_heads_have_setrs_layers():
    def kernels(module):
        return [tuple(w.shape) for name, w in module.named_parameters() if w.ndim == 4]

    naive, pup, mla = (setr(name, 5, depth=12) for name in TAPS)
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


def test_multi_level_aggregation_and_progressive_upsampling_by_hand():
    """Deep to shallow sums, then 3 x 3, two more, x 4 with aligned corners, all together; or three times x 2."""
    head, levels = setr("mla", depth=4).decoder, [torch.randn(1, 6, 24) for _ in range(4)]
    lateral = [head.lateral[i](as_map(x)) for i, x in enumerate(levels)]
    maps = [head.smooth[i](sum(lateral[i:])) for i in range(4)]
    larger = {"size": (8, 12), "mode": "bilinear", "align_corners": True}
    large = [F.interpolate(head.branches[i](x), **larger) for i, x in enumerate(maps)]
    found = head(levels, (2, 3))
    assert torch.allclose(found[0], head.classify(torch.cat(large, dim=1)), atol=1e-5)
    assert torch.allclose(found[2], head.aux[1](maps[1]), atol=1e-5)
    head, y = setr("pup").decoder, as_map(levels[0])
    for conv in head.convs[:3]:
        y = F.interpolate(conv(y), scale_factor=2, mode="bilinear", align_corners=False)
    y = F.conv2d(head.convs[3](y), head.classify.weight, head.classify.bias)
    assert torch.allclose(head(levels[0], (2, 3)), y, atol=1e-5) and y.shape == (1, 3, 16, 24)


def test_the_backbone_of_mla_learns_as_setrs():
    """Norms, lateral and 3 x 3 convolutions belong to SETR's backbone, at x 1; auxiliary classifiers have no bias."""
    tens = {}
    for name in ("mla", "pup"):
        model = setr(name, depth=4)
        optimizer = build_finetune_optimizer(model, 4, "sgd", 0.1, 0.0, head_lr_factor=10)
        peak = {id(p): group["peak_scale"] for group in optimizer.param_groups for p in group["params"]}
        tens[name] = {".".join(n.split(".")[:2]) for n, p in model.named_parameters() if peak[id(p)] == 10}
        assert set(peak.values()) == {1, 10} and all(peak[id(p)] == 1 for p in model.base.parameters())
    assert tens["mla"] == {"decoder.branches", "decoder.classify", "decoder.aux"}
    assert tens["pup"] == {"decoder.norm", "decoder.convs", "decoder.classify", *(f"aux.{i}" for i in range(4))}
    assert all(head.bias is None for head in setr("mla").decoder.aux)


def test_batch_norm_of_one_rank_is_torchs():
    ours, theirs = CpuSyncBatchNorm(6), torch.nn.BatchNorm2d(6)
    for _ in range(2):
        x = torch.randn(3, 6, 4, 5)
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    model = setr("mla")
    assert synchronized(model, torch.device("cpu")) is model
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))  # as on several GPUs
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert not any(isinstance(module, CpuSyncBatchNorm) for module in converted.modules())


def test_the_loss_by_hand():
    torch.manual_seed(0)
    outputs, masks = [torch.randn(2, 3, 2, 2) for _ in range(3)], torch.tensor([[[0, 2], [255, 1]]] * 2)
    masks[1, 0, 0] = 255
    terms = setr_loss(outputs, masks.to(torch.uint8), aux_weight=0.4)
    rows = [(n, y, x) for n, y, x in itertools.product((0, 1), (0, 1), (0, 1)) if masks[n, y, x] != 255]
    one, two, three = (sum(-z[n, :, y, x].log_softmax(0)[masks[n, y, x]] for n, y, x in rows) / 5 for z in outputs)
    assert len(rows) == 5 and terms["main"] == pytest.approx(one.item())
    assert terms["loss"].item() == pytest.approx((one + 0.4 * (two + three)).item())
    nothing = setr_loss(outputs[:1], torch.full((2, 2, 2), 255))
    assert nothing["loss"] == 0 and "aux" not in nothing


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
    np.testing.assert_allclose([numbers.iou, numbers.acc], [iou, acc])
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


def test_windows_cover_everything():
    for length in (32, 33, 53, 54, 100, 117):
        starts = window_starts(length, 32)
        assert starts[0] == 0 and starts[-1] == length - 32 and len(set(starts)) == len(starts)
        assert all(b - a <= 21 for a, b in itertools.pairwise(starts))
    assert [window_starts(n, 512) for n in (512, 683, 1024)] == [[0], [0, 171], [0, 341, 512]]


@pytest.mark.parametrize("size", [(20, 12), (32, 48), (48, 32), (200, 33), (31, 90)])
def test_any_size_is_scored_at_its_own_size(size):
    """Small, non-square and long pictures; windows and whole; square crop and not."""
    for crop in ((32, 32), (32, 48)):
        width, height = model_size(size, crop)
        assert width == crop[1] and height >= crop[0] or height == crop[0] and width >= crop[1]
        assert abs(width / height - size[0] / size[1]) < 0.06 * size[0] / size[1]
        with torch.inference_mode():
            assert predict_mask(setr("naive", 4, crop), pictures(3, height, width), size[::-1], 2).shape == size[::-1]


def test_logits_of_overlapping_windows_are_averaged():
    model, imgs = setr(), pictures(3, 32, 40)
    with torch.inference_mode():
        left, right = model.predict(imgs[None, :, :, :32])[0], model.predict(imgs[None, :, :, 8:])[0]
        found = sliding_logits(model, imgs, batch_size=1)
    middle = (left[..., 8:] + right[..., :24]) / 2
    assert torch.allclose(found, torch.cat([left[..., :8], middle, right[..., 24:]], dim=2), atol=1e-6)


def test_every_image_is_scored_once(sets):
    data, model = read_parts(sets / "canonical", ("test",)), setr("naive", 8)
    result = evaluate_parts(model, data, "test", 3, 0)
    assert np.array_equal(result.each.sum(axis=2), data.splits["test"].counts[:, :-1])
    assert result.each.dtype == np.int64
    with torch.no_grad():
        model.decoder.classify.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="are not finite: the model has diverged"):
        evaluate_parts(model, data, "test", 3, 0)


# sets


def test_image_and_mask_stay_together():
    """The picture's colour says the class: after resizing, cropping, mirroring and padding it still does; all of it is
    a function of the seed."""
    mask = np.zeros((60, 90), dtype=np.uint8)
    mask[10:50, 20:60], mask[30:, 50:] = 1, 2
    image = Image.fromarray(np.stack([mask * 100, 200 - mask * 100, mask * 0 + 7], axis=2))
    augment, seen = PartsAugment((48, 32), fill=(1, 2, 3), distort=False), set()
    for seed in range(40):
        out = augment(image, mask, np.random.default_rng(seed))
        assert out["imgs"].shape == (3, 48, 32) and out["masks"].shape == (48, 32)
        padding = out["masks"] == 255
        assert (out["imgs"][:, padding] == torch.tensor([[1], [2], [3]])).all()
        wrong = (out["imgs"][0].int() - 100 * out["masks"].int()).abs()[~padding] > 50
        assert wrong.float().mean() < 0.06, seed  # mixed colours along the edges
        seen.add((bool(padding.any()), out["masks"][~padding].unique().numel()))
    assert {padded for padded, _ in seen} == {True, False} and max(n for _, n in seen) == 3
    augment = PartsAugment((32, 32), fill=(0, 0, 0))
    one, two, other = (augment(image, mask, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]) for name in one)


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
    for name, mask in (("a", [[7, 40, 0], [40, 40, 7]]), ("b", np.zeros((2, 2))), ("c", [[40]])):
        write_pair(tmp_path, "val", name, mask)
    palette = Image.fromarray(np.array([[7, 7], [40, 0]], dtype=np.uint8), "P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "annotations" / "val" / "b.png")
    (tmp_path / "images" / "val" / "c.png").unlink()
    data = read_parts(tmp_path, ("val",))
    assert data.space.names == ("background", "door", "wheel") and data.space.background
    assert data.splits["val"].counts.tolist() == [[3, 0, 2, 1], [1, 0, 2, 1]]
    assert "absent" in "".join(note for note in data.notes if note.endswith("door"))
    assert data.notes[0].startswith("val: 1 masks have no image")
    picture, mask = open_pair(data.splits["val"].images[1], data.splits["val"].masks[1])
    assert data.space.table[mask].tolist() == [[2, 2], [0, 255]] and picture.mode == "RGB"


def test_a_turned_photo_is_taken_as_its_mask_was_drawn(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    write_classes(tmp_path)
    write_pair(tmp_path, "val", "stored", np.zeros((8, 12)), exif=exif.tobytes())
    write_pair(tmp_path, "val", "upright", np.ones((12, 8)), image_size=(12, 8), exif=exif.tobytes())
    part = read_parts(tmp_path, ("val",)).splits["val"]
    assert [open_pair(part.images[i], part.masks[i])[0].size for i in (0, 1)] == [(12, 8), (8, 12)]


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


def save(array, file) -> None:
    Image.fromarray(array).save(file)


@pytest.mark.parametrize(
    "message, damage",  # of the root of a set of one pair, its image, its mask
    [
        ("classes.json is missing: write which class", lambda root, i, m: (root / "classes.json").unlink()),
        ("cannot be understood", lambda root, i, m: (root / "classes.json").write_text('["background"')),
        ("must name two classes or more", lambda root, i, m: write_classes(root, ["only"])),
        ('"ignore" is 1, and must be', lambda root, i, m: write_classes(root, ignore=1)),
        ("train is missing: .*splits found: none", lambda root, i, m: shutil.rmtree(root / "images")),
        ("1 of 2 images .* have no mask: first .*b.png is", lambda root, i, m: shutil.copy(i, i.with_name("b.png"))),
        ("no image under", lambda root, i, m: i.unlink()),
        ("one mask cannot serve two images", lambda root, i, m: Image.open(i).save(i.with_suffix(".jpg"))),
        ("the image is 9 x 8 px, its mask 8 x 8", lambda root, i, m: Image.new("RGB", (9, 8)).save(i)),
        ("has 64 pixels of value 9, which classes", lambda root, i, m: save(np.full((8, 8), 9, np.uint8), m)),
        ("none of the 1 pairs .* its mode is RGB", lambda root, i, m: Image.new("RGB", (8, 8)).save(m)),
        ("none of the 1 pairs .* its mode is I;16", lambda root, i, m: save(np.ones((8, 8), np.uint16), m)),
        ("has no pixel in train, while 64 pixels", lambda root, i, m: save(np.full((8, 8), 255, np.uint8), m)),
    ],
)
def test_sets_that_cannot_be_read(tmp_path, message, damage):
    write_classes(tmp_path)
    write_pair(tmp_path, "train", "a", np.ones((8, 8)))
    damage(tmp_path, *(tmp_path / folder / "train" / "a.png" for folder in ("images", "annotations")))
    with pytest.raises(InputError, match=message) as caught:
        read_parts(tmp_path, ("train",))
    assert "\n" not in str(caught.value)


# releases of PartImageNet


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


def change(source, edit) -> None:
    """Edit the training json of a release."""
    content = json.loads((source / "train.json").read_text())
    edit(content)
    (source / "train.json").write_text(json.dumps(content))


def masks_of(folder) -> dict:
    return {file.name: open_mask(file) for file in folder.glob("annotations/*/*.png")}


def test_both_releases_become_the_same_masks(sets, tmp_path):
    """Polygons with a degenerate ring, drawn largest first; masks with 255 and palettes; other things out."""
    seg = convert(sets / "seg", tmp_path / "seg", "--label_space", "car_bicycle")
    ood = convert(sets / "ood", tmp_path / "ood", "--label_space", "car_bicycle", "--no-resplit")
    canonical, of_seg, of_ood = map(masks_of, (sets / "canonical", tmp_path / "seg", tmp_path / "ood"))
    assert len(canonical) == 30 and sum((mask == 255).any() for mask in canonical.values()) == 3
    assert of_seg.keys() == of_ood.keys() == canonical.keys()
    for name, mask in canonical.items():
        assert np.array_equal(of_seg[name], mask)
        assert np.array_equal(of_ood[name][mask != 255], mask[mask != 255]), name
    assert seg["dropped"] == {"pictures of something else": 3}
    assert ood["dropped"]["polygons of fewer than 3 points"] == 3 and not ood["left_out"]
    assert sum(sum(kinds.values()) for kinds in seg["pictures"].values()) == 30
    assert convert(sets / "seg", tmp_path / "seg", "--label_space", "car_bicycle") == seg
    assert {Image.open(f).mode for f in (sets / "seg" / "annotations").rglob("*.png")} == {"L", "P"}
    data = read_parts(tmp_path / "seg", ("train", "test"))
    assert data.space.name == "car_bicycle" and data.space.names == ("background", *part_names("car_bicycle"))


def test_classes_are_split_anew(sets, tmp_path):
    result = convert(sets / "ood", tmp_path / "cars", "--label_space", "car_parts", "--link")
    assert not any("Bicycle" in kinds for kinds in result["pictures"].values())
    rows = [{"synset": "n1", "name": str(i), "split": "train"} for i in range(100)]
    convert_partimagenet.split_anew(rows, seed=0)
    assert [sum(r["split"] == s for r in rows) for s in ("train", "val", "test")] == [85, 5, 10]
    data = read_parts(tmp_path / "cars", ("train", "val", "test"))
    assert data.space.names == ("background", *part_names("car_parts"))
    write_pair(tmp_path / "cars", "val", "no_part", np.zeros((40, 40)))  # a set of cars alone: it stays
    assert len(read_parts(tmp_path / "cars", ("val",)).splits["val"]) == len(data.splits["val"]) + 1


def test_polygons_that_are_none_are_dropped_and_counted(sets, tmp_path):
    far, odd = [1.0, 1.0, 1e300, 5.0, 9.0, 9.0], [1.0, float("nan"), 5.0, 5.0, 9.0, 9.0]
    rings = [far, odd, [1, "2", 5, 5, 9, 9], [True] * 6, [[1, 2]] * 6, [float("inf"), 1, 5, 5, 9, 9]]

    def edit(content: dict) -> None:
        more = [*rings, [1.0, 1.0, 9.0, 9.0], 7, [-3.0, -3.0, 4.0, -3.0, 4.0, 4.0]]
        content["annotations"][1]["segmentation"] += more
        content["annotations"][2]["segmentation"] = {"counts": "run-length", "size": [3, 3]}

    change(source := shutil.copytree(sets / "ood", tmp_path / "ood"), edit)
    dropped = convert(source, tmp_path / "o", "--label_space", "car_parts")["dropped"]
    assert dropped["polygons with NaN, texts or points far away"] == len(rings)
    assert dropped["polygons of fewer than 3 points"] == 4 and dropped["annotations without a usable polygon"] == 1


def test_what_a_release_lacks_is_counted(sets, tmp_path):
    source, lacking = shutil.copytree(sets / "ood", tmp_path / "ood"), []

    def edit(content: dict) -> None:
        first, second, third, *_ = (i for i in content["images"] if not i["file_name"].startswith("n0144"))
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != third["id"]]
        (source / "train" / first["file_name"][:9] / first["file_name"]).unlink()
        second["width"] += 1
        lacking.extend([f"train/{image['file_name']}"] for image in (first, second, third))

    change(source, edit)
    names = ("no such file", "image and mask differ in size", "no annotation that can be drawn")
    found = convert(source, tmp_path / "out", "--label_space", "car_bicycle")["left_out"]
    assert found == dict(zip(names, lacking))


def whole_masks(source) -> None:
    shutil.rmtree(source / "annotations" / "train")
    (source / "annotations" / "train_whole").rename(source / "annotations" / "train")


def shift_ids(content: dict) -> None:
    content["categories"] = [c | {"id": c["id"] + 1} for c in content["categories"]]


def with_value(entry: str, name: str, value):
    """An edit of the first of the images, annotations or categories."""
    return lambda source: change(source, lambda content: content[entry][0].update({name: value}))


@pytest.mark.parametrize(
    "release, damage, message",
    [
        ("ood", shutil.rmtree, "is no folder: give the folder of PartImageNet"),
        ("ood", lambda source: (shutil.rmtree(source), source.mkdir()), "is neither release of PartImageNet"),
        ("seg", whole_masks, "has the value 158: masks of parts hold 0 to 39"),
        ("ood", lambda s: change(s, shift_ids), "calls category 25 'Car Body', which is 24 in the release"),
        ("ood", lambda s: (s / "train.json").write_text('{"images": 3}'), "train.json is no COCO json of PartImageNet"),
        ("seg", lambda s: write_classes(s.with_name("o")), "exists and does not hold this conversion"),
        ("ood", with_value("annotations", "image_id", [3]), "one of its annotations has image_id"),
        ("ood", with_value("annotations", "category_id", "24"), "one of its annotations has category_id '24'"),
        ("ood", with_value("annotations", "category_id", -1), "category_id -1, but ids go from 0"),
        ("ood", with_value("images", "width", None), "one of its images has width 'None'"),
        ("ood", with_value("images", "height", float("nan")), "one of its images has height 'nan'"),
        ("ood", with_value("images", "file_name", 7), "one of its images has file_name '7'"),
        ("ood", with_value("categories", "id", "x"), "is no COCO json"),
    ],
)
def test_releases_that_cannot_be_converted(sets, tmp_path, release, damage, message):
    damage(source := shutil.copytree(sets / release, tmp_path / "source"))
    occupied = (tmp_path / "o").exists()
    with pytest.raises(InputError, match=message) as caught:
        convert(source, tmp_path / "o")
    assert "\n" not in str(caught.value) and (tmp_path / "o").exists() == occupied


def test_auto_finds_the_split_in_any_spelling(sets, tmp_path):
    shutil.copytree(sets / "canonical", tmp_path / "set")
    for folder, name in (("images", "Test"), ("annotations", "TESTING")):
        (tmp_path / "set" / folder / "test").rename(tmp_path / "set" / folder / name)
    task = Seg(SimpleNamespace(seg_split="auto", data_path=tmp_path / "set"), "cpu")
    assert len(task.read(None).splits["test"]) and task.split == "test"
