"""Lists of images, decoding, augmentation, the training stream."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from datasets.images import IMAGE_ENDINGS, decode_rgb, open_rgb, open_upright
from datasets.items import PretrainDataset, build_loader
from datasets.path_list import PathList, list_images
from datasets.samplers import EpochBatches, pk_batches
from datasets.transforms import CROP_STREAM, jpeg_reduction, random_crop_box, sample_rng, whole_image
from util.dist import init_worker
from util.errors import InputError


def test_path_list_gives_back_what_it_was_given(tmp_path):
    names = ["a.jpg", "b/ü c.png", "d/e/f.webp", "/abs/g.bmp"]
    paths = PathList(tmp_path, names)
    assert [paths.relative(i) for i in range(4)] == names
    assert paths[1] == tmp_path / "b/ü c.png" and paths[3] == Path("/abs/g.bmp")
    assert paths.sha256() == PathList("/elsewhere", names).sha256()
    assert paths.sha256() != PathList(tmp_path, names[::-1]).sha256()


def test_folder_is_searched_and_train_preferred(tmp_path):
    for folder, count, listed in (("deep/er", 2, 2), (".", 1, 3), ("TRAIN/classA", 2, 2)):
        write_pictures(tmp_path / "x" / folder, count)
        assert len(list_images(tmp_path / "x")) == listed


def test_what_counts_as_a_picture_and_what_is_passed_over_is_said(tmp_path, capsys):
    """All endings of JPEG and of its cousins; hidden files, links in circles, what is no file: counted."""
    taken = [f"a{i}{ending}" for i, ending in enumerate(IMAGE_ENDINGS)] + ["UPPER.JPG", "two.dots.jpg", "-rf.jpg"]
    odd = ["new\nline.jpg", "<script>'\".jpg", "x" * 251 + ".jpg", os.fsdecode(b"\xff\xfe.jpg"), "\u00e4 b.png"]
    hidden = ["._a.jpg", ".hidden.png", "__MACOSX/a.jpg", ".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg"]
    others = ["a.heic", "b.HEIC", "Thumbs.db", "noending", "sub/labels.csv"]
    for name in [*taken, *odd, *hidden, *others, "sub/b.jpg"]:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"")
    os.mkfifo(tmp_path / "x" / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "x" / "s.jpg"))
    for name, target in (("zero.jpg", "/dev/zero"), ("gone.jpg", "nowhere"), ("up", ".."), ("self", "."), ("a", "sub")):
        (tmp_path / "x" / name).symlink_to(target)
    (tmp_path / "x" / "folder.jpg").mkdir()
    for name in ("link1", "link2"):
        (tmp_path / "x" / name).symlink_to(write_pictures(tmp_path / "elsewhere", 1))
    listed = list_images(tmp_path / "x")
    names = [listed.relative(i) for i in range(len(listed))]
    assert sorted(names) == sorted([*taken, *odd, "sub/b.jpg", "link1/0000.png"])
    said = capsys.readouterr().out
    for words in (f"{len(names)} images; passed over: ", ".heic, which needs a plug-in (2)", ".db (1)", ".csv (1)",
                  "hidden files (2)", "hidden folders (3)", "pipes, devices or dead links (4)", "no ending (1)",
                  "links to folders that are read already (4)"):  # fmt: skip
        assert words in said, words


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)
def test_every_ending_that_is_listed_can_be_opened(tmp_path, ending):
    file, formats = tmp_path / f"a{ending}", Image.registered_extensions()
    Image.new("RGB", (8, 8), "red").save(file, formats.get(ending, "JPEG"), quality=100)
    assert np.abs(np.asarray(open_rgb(file)).astype(int)[4, 4] - (255, 0, 0)).max() < 9


def test_manifests(tmp_path):
    write_pictures(tmp_path / "pics", 3)
    names = [f"pics/{i:04d}.png" for i in range(3)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    (tmp_path / "list.csv").write_text("\n".join(["path,split"] + [f"{name},train" for name in names[1:]]))
    paths = list_images(tmp_path / "list.txt")
    assert [paths.relative(i) for i in range(3)] == names and paths[0].is_file()
    assert len(list_images(tmp_path / "list.csv", "train")) == 2
    with pytest.raises(InputError, match="no row with split 'test': it has train"):
        list_images(tmp_path / "list.csv", "test")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("empty", None, "nothing, it is empty"),
        ("absent", None, "does not exist"),
        ("elsewhere.csv", "path\n/no/such/1.png\n/no/such/2.png\n", "none of the first 2 images"),
        ("odd.xlsx", "", "neither a folder nor a manifest"),
        ("latin.csv", "path\nAutoblöcke.png\n", "not UTF-8"),
    ],
)
def test_bad_lists_have_one_clear_sentence(tmp_path, name, text, message):
    (tmp_path / "empty").mkdir()
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        list_images(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_every_mode_becomes_rgb(tmp_path):
    red, grey = (200, 40, 30), (90, 90, 90)
    rgb, cyan = Image.new("RGB", (40, 24), red), Image.new("CMYK", (40, 24), (0, 255, 255, 0))
    for name, image, colour in (
        ("rgb.png", rgb, red), ("rgb.bmp", rgb, red), ("rgb.webp", rgb, red),
        ("palette.png", rgb.convert("P", palette=Image.Palette.ADAPTIVE), red),
        ("grey.png", Image.new("L", (40, 24), 90), grey),
        ("bilevel.png", Image.new("1", (40, 24), 1), (255,) * 3),
        ("grey_alpha.png", Image.new("LA", (40, 24), (90, 255)), grey),
        ("transparent.png", Image.new("RGBA", (40, 24), (*red, 0)), (255,) * 3),
        ("sixteen.png", Image.fromarray(np.full((24, 40), 90 * 257, dtype=np.uint16)), grey),
        ("night.png", Image.fromarray(np.full((24, 40), 200, dtype=np.uint16)), (0,) * 3),  # 200 of 65,535
        ("cmyk.jpg", cyan, cyan.convert("RGB").getpixel((0, 0))),
    ):  # fmt: skip
        image.save(tmp_path / name, quality=100)
        found = open_rgb(tmp_path / name)
        assert found.mode == "RGB" and found.size == (40, 24), name
        assert np.allclose(found.getpixel((20, 12)), colour, atol=3), name


def test_crop_boxes_have_the_published_distribution():
    """Against torchvision's RandomResizedCrop, an independent implementation of the same rule."""
    torch.manual_seed(0)
    for width, height in ((1000, 1000), (900, 400)):
        ours, theirs, flips, blank = [], [], [], Image.new("L", (width, height))
        for index in range(4000):
            box, flip = random_crop_box(sample_rng(0, 0, index, 0), width, height, 0.2)
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
            ours.append((box[0], box[1], box[2] - box[0], box[3] - box[1]))
            top, left, h, w = RandomResizedCrop.get_params(blank, (0.2, 1.0), (3 / 4, 4 / 3))
            theirs.append((left, top, w, h))
            flips.append(flip)
        for a, b in zip(np.array(ours).T, np.array(theirs).T):
            assert abs(a.mean() - b.mean()) < 0.01 * width and abs(a.std() - b.std()) < 0.01 * width
        assert 0.47 < np.mean(flips) < 0.53
    box, _ = random_crop_box(sample_rng(0, 0, 0, 0), 3000, 100, 0.9)  # too long: from the centre
    assert box == ((3000 - 133) // 2, 0, (3000 - 133) // 2 + 133, 100)


def detailed_photo(width: int, height: int, seed: int) -> Image.Image:
    rng, mixed = np.random.default_rng(seed), 0
    for n, share in ((6, 0.6), (40, 0.3), (240, 0.1)):
        layer = Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((width, height))
        mixed = mixed + share * np.asarray(layer)
    mixed[height // 3 :: 90, :] *= 0.4
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("width, height, expected", [(300, 200, {1}), (1024, 768, {1, 2}), (1900, 1400, {2, 4})])
def test_fast_decoding_stays_close_to_plain_pillow(tmp_path, width, height, expected):
    """The training path (reduced decode, resize of the box only) against decode, crop, resize."""
    detailed_photo(width, height, seed=width).save(tmp_path / "a.jpg", quality=92)
    dataset = PretrainDataset(list_images(tmp_path), (224, 224), 196, seed=0, min_area=0.2)
    full, reductions = Image.open(tmp_path / "a.jpg").convert("RGB"), set()
    for epoch in range(8):
        box, flip = random_crop_box(sample_rng(0, epoch, 0, CROP_STREAM), width, height, 0.2)
        reductions.add(jpeg_reduction(box, (224, 224)))
        plain = full.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        plain = np.asarray(plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else plain)
        ours = dataset[epoch, 0]["imgs"].permute(1, 2, 0).numpy()
        assert np.abs(ours.astype(int) - plain).mean() < (0.3 if expected == {1} else 2)
    assert reductions == expected
    assert (whole_image(full, (height, width)).permute(1, 2, 0).numpy() == np.asarray(full)).all()


def test_turned_jpegs_are_cropped_upright(tmp_path):
    photo, exif = detailed_photo(1200, 800, seed=1), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for more, sizes in (({"exif": exif}, [(800, 1200), (800, 1200)]), ({}, [(1200, 800), (300, 200)])):
        photo.save(tmp_path / "a.jpg", quality=95, **more)
        image = open_upright(tmp_path / "a.jpg")
        assert [image.size, decode_rgb(image, 4).size] == sizes


def test_stream_does_not_depend_on_workers_or_history(pictures):
    dataset = PretrainDataset(list_images(pictures), (32, 32), 4, seed=3, min_area=0.2)
    streams, batches = [], EpochBatches(40, 8, 0, 1, 3)
    for workers in (0, 2):
        loader = build_loader(dataset, batches, workers, False, init_worker)
        batches.set_epoch(1)
        streams.append([b for _ in range(2) for b in loader][-5:])
    batches.set_epoch(1, start=3)
    resumed = list(build_loader(dataset, batches, 0, False, init_worker))
    for a, b in zip(*streams):
        assert torch.equal(a["imgs"], b["imgs"]) and torch.equal(a["noise"], b["noise"])
    assert all(torch.equal(a["imgs"], b["imgs"]) for a, b in zip(resumed, streams[0][3:]))
    item, other = dataset[0, 5], dataset[1, 5]
    assert not torch.equal(item["imgs"], other["imgs"]) and not torch.equal(item["noise"], other["noise"])


def test_ranks_share_one_permutation():
    one = EpochBatches(103, 8, 0, 1, 0)
    ranks = [EpochBatches(103, 4, r, 2, 0) for r in range(2)]
    for epoch in range(2):
        for batches in (one, *ranks):
            batches.set_epoch(epoch)
        halves = [a + b for a, b in zip(*ranks)]
        assert halves == list(one) and len({index for batch in one for _, index in batch}) == 96
        assert [index for _, index in halves[3]] == one.global_batch(epoch, 3).tolist()


# vehicle: images; 3 and 7 have fewer than K
COUNTS = {0: 9, 1: 4, 2: 13, 3: 1, 4: 8, 5: 6, 6: 5, 7: 3, 8: 40}
PIDS = np.random.default_rng(0).permutation(np.repeat(list(COUNTS), list(COUNTS.values())))


def test_every_row_holds_different_vehicles_with_k_images_each():
    batches = pk_batches(PIDS, 3, 4, seed=1, epoch=0)
    vehicles = PIDS[batches].reshape(len(batches), 3, 4)
    assert (vehicles == vehicles[:, :, :1]).all() and all(len(set(row)) == 3 for row in vehicles[:, :, 0])
    groups = {pid: max(1, count // 4) for pid, count in COUNTS.items()}
    shown = {pid: int((vehicles[:, :, 0] == pid).sum()) for pid in COUNTS}
    assert all(shown[pid] <= groups[pid] for pid in COUNTS)
    assert sum(shown[pid] < groups[pid] for pid in COUNTS) < 3, "it stops only when fewer than P vehicles are left"
    for pid, count in COUNTS.items():
        used = batches[PIDS[batches] == pid]
        assert len(set(used)) == len(used) or count < 4, "no image twice"
        assert set(used) <= set(np.flatnonzero(PIDS == pid)), "drawn from the few with replacement"
    epochs = [pk_batches(PIDS, 3, 4, seed=1, epoch=epoch) for epoch in range(20)]
    assert (epochs[5] == pk_batches(PIDS, 3, 4, seed=1, epoch=5)).all()
    for other in (epochs[6], pk_batches(PIDS, 3, 4, seed=2, epoch=5)):
        assert other.shape != epochs[5].shape or (other != epochs[5]).any()
    assert set(PIDS[np.concatenate(epochs)].ravel()) == set(COUNTS)
    for vehicles, images, message in ((10, 4, "show 9 vehicles, a batch needs 10"), (4, 1, "at least 2 of both")):
        with pytest.raises(InputError, match=message):
            pk_batches(PIDS, vehicles, images, seed=0, epoch=0)


def test_replacement_is_the_next_readable_image(tmp_path):
    write_pictures(tmp_path, 6)
    for name in ("0002.png", "0003.png"):
        (tmp_path / name).write_bytes(b"x")
    dataset = PretrainDataset(list_images(tmp_path), (32, 32), 4, seed=0, min_area=0.2)
    bad, stand_in = dataset[0, 2], dataset[0, 4]
    assert bad["problem"].startswith("0002.png\tUnidentifiedImageError") and stand_in["problem"] == ""
    assert torch.equal(bad["imgs"], stand_in["imgs"])
