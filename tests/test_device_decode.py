"""Decoding and cropping on the device, checked on the CPU; with nvJPEG where there is a GPU."""

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image
from test_data import detailed_photo

from datasets.device_decode import collate_encoded, crop_batch, decode_batch
from datasets.manifest import list_images
from datasets.pretrain import EpochBatches, PretrainDataset, build_loader
from util.stop import init_worker

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_batched_crop_is_pillows(device):
    """Growing, shrinking and mixed boxes, several pictures of different sizes."""
    photos = [detailed_photo(w, h, seed=w) for w, h in ((300, 200), (120, 500), (640, 480), (64, 64))]
    boxes = torch.tensor([[10, 20, 290, 180], [0, 100, 120, 260], [100, 0, 140, 480], [0, 0, 64, 64]])
    flips = torch.tensor([True, False, True, False], device=device)
    pictures = [torch.from_numpy(np.array(p)).permute(2, 0, 1).to(device) for p in photos]
    ours = crop_batch(pictures, boxes, flips, (96, 128)).cpu()
    for photo, box, flip, crop in zip(photos, boxes.tolist(), flips.tolist(), ours):
        plain = photo.crop(box).resize((128, 96), Image.Resampling.BICUBIC)
        plain = np.array(plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else plain).astype(int)
        difference = np.abs(plain - crop.permute(1, 2, 0).numpy())
        assert difference.mean() < 0.3 and difference.max() <= 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers", [0, 2])
def test_same_batches_as_on_the_cpu(tmp_path, device, workers):
    """JPEG, PNG and a turned JPEG; the same crops and masks, pixels within 2/255 on average."""
    write_pictures(tmp_path, 5, size=(150, 100))
    for k in range(6):
        detailed_photo(400 + 40 * k, 300, seed=k).save(tmp_path / f"p{k}.jpg", quality=92)
    exif = Image.Exif()
    exif[0x0112] = 8
    detailed_photo(320, 240, seed=9).save(tmp_path / "turned.jpg", exif=exif)
    paths = list_images(tmp_path)
    kinds = {}
    for decode in ("cpu", "gpu"):
        dataset = PretrainDataset(paths, (64, 96), 24, seed=1, min_area=0.3, teacher_size=(48, 48), decode=decode)
        batches = EpochBatches(len(paths), 6, 0, 1, 1)
        kinds[decode] = list(build_loader(dataset, batches, workers, False, init_worker))
    for plain, encoded in zip(kinds["cpu"], kinds["gpu"], strict=True):
        ours = decode_batch(encoded, (64, 96), (48, 48), torch.device(device))
        assert torch.equal(ours["noise"].cpu(), plain["noise"]) and ours["problem"] == plain["problem"]
        for name in ("imgs", "teacher_imgs"):
            assert ours[name].shape == plain[name].shape and ours[name].dtype == torch.uint8
            assert (ours[name].cpu().float() - plain[name]).abs().mean(dim=(1, 2, 3)).max() < 2


def test_damaged_files_are_reported_and_replaced(tmp_path):
    write_pictures(tmp_path, 2, size=(80, 60))
    detailed_photo(300, 200, seed=1).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "hollow.jpg").write_bytes(data[:700] + bytes(3000) + b"\xff\xd9")
    dataset = PretrainDataset(list_images(tmp_path), (32, 32), 4, seed=0, min_area=0.5, decode="gpu")
    samples = [dataset[0, i] for i in range(4)]
    assert "truncated" in samples[2]["problem"], "found by the worker, the next image stands in"
    batch = decode_batch(collate_encoded(samples), (32, 32), None, torch.device("cpu"))
    assert [bool(p) for p in batch["problem"]][:3] == [False, False, True]
    assert batch["imgs"].shape == (4, 3, 32, 32)
