"""Packed sets and WebDataset shards."""

import io
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import command, run_command, write_pictures
from PIL import Image

from datasets.images import Unreadable
from datasets.items import PretrainDataset
from datasets.path_list import PackedImages, list_images
from tools import pack
from util.errors import InputError


def flags(data, output, *more):
    return pack.get_args_parser().parse_args(["--data_path", str(data), "--output", str(output), *more])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """30 pictures: PNG, small JPEG, big JPEG, a turned one, a truncated one and one that is text."""
    folder = write_pictures(tmp_path_factory.mktemp("photos"), 24, size=(90, 60))
    big = Image.open(folder / "0000.png").resize((900, 600))
    big.save(folder / "big.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    big.save(folder / "turned.jpg", exif=exif)
    big.convert("L").save(folder / "grey.jpg")
    big.resize((80, 60)).save(folder / "small.jpg")
    (folder / "cut.jpg").write_bytes((folder / "big.jpg").read_bytes()[:9000])
    (folder / "text.jpg").write_text("no picture")
    return folder


def test_packed_set_reads_like_the_folder(photos, tmp_path, capsys):
    result = pack.main(flags(photos, tmp_path / "p", "--shard_images", "8", "--num_workers", "2"))
    assert (result["images"], result["unreadable"], result["shards"]) == (28, 2, 4)
    assert result["copied"] == 1, "only small.jpg is stored as it is"
    listed = (tmp_path / "p" / "bad_images.txt").read_text()
    assert "cut.jpg" in listed and "text.jpg" in listed and len(listed.splitlines()) == 2

    plain, packed = list_images(photos), list_images(tmp_path / "p")
    assert isinstance(packed, PackedImages) and len(packed) == 28
    names = [packed.relative(i) for i in range(28)]
    good = [i for i in range(len(plain)) if plain.relative(i) not in ("cut.jpg", "text.jpg")]
    assert names == [plain.relative(i) for i in good]
    assert [file.read() for file in packed] == [packed.read(i) for i in range(28)], "a loop ends at the end"
    assert packed.read(names.index("small.jpg")) == (photos / "small.jpg").read_bytes()
    with Image.open(packed[names.index("big.jpg")]) as image:
        assert image.size == (384, 256) and image.mode == "RGB"
    with Image.open(packed[names.index("turned.jpg")]) as image:
        assert image.size == (256, 384), "stored upright"
    ours = PretrainDataset(packed, (64, 64), 16, seed=0, min_area=0.2)
    theirs = PretrainDataset(plain, (64, 64), 16, seed=0, min_area=0.2)
    for position in (0, 5):  # same position in both lists, hence the same crop
        a, b = ours[3, position]["imgs"].float(), theirs[3, position]["imgs"].float()
        assert (a - b).abs().mean() < 6, "JPEG of the picture itself"


KILLED = """
import multiprocessing, os, signal, sys
from tools import pack

def write_shard(folder, shard, rows, write=pack.write_shard):
    if shard == 3:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, shard, rows)

pack.write_shard = write_shard
pack.main(pack.get_args_parser().parse_args(sys.argv[1:]))
"""


def test_killed_packing_goes_on_and_ends_the_same(photos, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--shard_images", "5", "--num_workers", "1")
    pack.main(flags(photos, whole, *more))
    done = run_command(command("-c", KILLED, "--data_path", str(photos), "--output", str(killed), *more))
    children = done.stdout.splitlines()[-1].split()
    assert done.returncode == -signal.SIGKILL and children
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children), "no orphans"
    before = {file.name: file.stat().st_mtime_ns for file in killed.glob("shard*.bin")}
    assert len(before) == 3
    with pytest.raises(InputError, match="unfinished packed set"):
        list_images(killed)
    assert pack.main(flags(photos, killed, *more))["written"] == 3
    assert all((killed / name).stat().st_mtime_ns == stamp for name, stamp in before.items())
    for file in whole.glob("shard*.bin"):
        assert (killed / file.name).read_bytes() == file.read_bytes()
    assert PackedImages(killed).sha256() == PackedImages(whole).sha256()


def test_other_settings_are_refused(photos, tmp_path):
    pack.main(flags(photos, tmp_path / "p"))
    with pytest.raises(InputError, match="its short_side differ"):
        pack.main(flags(photos, tmp_path / "p", "--short_side", "128"))
    with pytest.raises(InputError, match="--quality 200: must be from 1 to 100"):
        pack.main(flags(photos, tmp_path / "q", "--quality", "200"))
    with pytest.raises(InputError, match="or pack this split alone"):
        list_images(tmp_path / "p", "train")


def test_damage_is_found(photos, tmp_path):
    pack.main(flags(photos, tmp_path / "p"))
    shard = tmp_path / "p" / "shard00000.bin"
    data = bytearray(shard.read_bytes())
    packed = PackedImages(tmp_path / "p")
    position = len(packed.read(0)) // 2
    data[position] ^= 1
    shard.write_bytes(data)
    item = PretrainDataset(PackedImages(tmp_path / "p"), (32, 32), 4, seed=0, min_area=0.2)[0, 0]
    assert "checksum differs" in item["problem"], "one bit: counted like any unreadable image"
    opened = PackedImages(tmp_path / "p")
    shard.write_bytes(data[:-10])
    with pytest.raises(InputError, match="where its index says"):
        list_images(tmp_path / "p")
    with pytest.raises(Unreadable, match="checksum differs"):
        opened.read(len(opened) - 1)  # cut short while it is read: no memory map that ends the process
    shard.write_bytes(data)
    for name, content in (
        ("pack.json", b"["), ("pack.json", b'{"shards": "x"}'), ("names.npy", b""), ("names.npy", b"no array"),
        ("name_ends.npy", b"\x93NUMPY"), ("shard00000.npy", b"x" * 200),
    ):  # fmt: skip
        whole = (tmp_path / "p" / name).read_bytes()
        (tmp_path / "p" / name).write_bytes(content)
        with pytest.raises(InputError, match="is damaged"):
            list_images(tmp_path / "p")
        (tmp_path / "p" / name).write_bytes(whole)


def jpeg(shade: int) -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 80, 40)).save(image, "JPEG", quality=95)
    return image.getvalue()


def write_tar(file, members) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as opened:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    if isinstance(file, Path):
        file.write_bytes(made.getvalue())
    return made.getvalue()


def samples(first, count):
    for index in range(first, first + count):
        yield from (
            (f"{index:05d}.jpg", jpeg(index * 9 % 256)),
            (f"{index:05d}.cls", b"3"),
            (f"{index:05d}.json", b"{}"),
        )


def test_webdataset_shards(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard:03d}.tar", samples(shard * 5, 5))
    result = pack.main(flags(f"{tmp_path}/s-{{000..002}}.tar", tmp_path / "p"))
    assert (result["images"], result["shards"], result["copied"]) == (15, 3, 15)
    packed = list_images(tmp_path / "p")
    assert packed.relative(6) == "s-001/00006.jpg"
    with Image.open(packed[6]) as image:
        assert abs(np.asarray(image)[0, 0, 0].astype(int) - 54) < 4


def test_which_images_of_a_webdataset_are_taken(tmp_path):
    """Names with dots, as img2dataset and others write them; masks beside images; hidden files."""
    names = ["0000.img.jpg", "0001.seg.png", "0001.jpg", "a.b/0002.jpg", "my.photo1.jpg", "my.photo2.JPG", "._0002.jpg"]
    write_tar(tmp_path / "s.tar", [(name, jpeg(9)) for name in names])
    pack.main(flags(tmp_path / "s.tar", tmp_path / "p"))
    packed = list_images(tmp_path / "p")
    taken = [packed.relative(i).removeprefix("s/") for i in range(len(packed))]
    assert taken == ["0000.img.jpg", "0001.jpg", "a.b/0002.jpg", "my.photo1.jpg", "my.photo2.JPG"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: None, "1 of 2 shards do not exist"),
        (lambda data: data[: data.index(b"00020.jpg")], "s-001.tar could not be read to its end .*it is cut off"),
        (lambda data: data[: len(data) // 2], "s-001.tar could not be read to its end"),
        (lambda data: write_tar(None, [("a.xyz", b"1")]), r"s-001.tar holds no image .*it holds .xyz \(1\)"),
        (lambda data: bytes(10240), "s-001.tar holds no image .*it holds nothing"),
        (lambda data: b"", "s-001.tar could not be read"),
    ],
)
def test_a_damaged_shard_is_one_sentence(tmp_path, spoil, message):
    write_tar(tmp_path / "s-000.tar", samples(0, 30))
    data = spoil((tmp_path / "s-000.tar").read_bytes())
    if data is not None:
        (tmp_path / "s-001.tar").write_bytes(data)
    with pytest.raises(InputError, match=message):
        pack.main(flags(f"{tmp_path}/s-{{000..001}}.tar", tmp_path / "p"))
    write_tar(tmp_path / "s-001.tar", samples(30, 4))
    result = pack.main(flags(f"{tmp_path}/s-{{000..001}}.tar", tmp_path / "p"))
    assert (result["images"], result["written"]) == (34, 2 if data is None else 1), "the finished shard was kept"


def test_training_on_a_packed_set(photos, tmp_path):
    from conftest import read_log, small_flags

    pack.main(flags(photos, tmp_path / "p"))
    done = run_command(command("main_pretrain.py", *small_flags(tmp_path / "p", tmp_path / "run", "--no_distill")))
    assert done.returncode == 0, done.stderr
    assert [row["bad_images"] for row in read_log(tmp_path / "run")] == [0, 0]
