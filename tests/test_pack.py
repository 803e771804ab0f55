"""Packed sets and WebDataset shards."""

import io
import signal
import tarfile
import time
from pathlib import Path

import pytest
from conftest import command, read_log, refuses, run_command, run_main, small_flags, write_pictures
from PIL import Image

from datasets.images import Unreadable
from datasets.items import PretrainDataset
from datasets.path_list import PackedImages, list_images
from tools import pack


def run(data, output, *more) -> dict:
    return run_main(pack, "--data_path", data, "--output", output, *more)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """30 pictures: PNG, small JPEG, big JPEG, a turned one, a truncated one and one that is text."""
    folder = write_pictures(tmp_path_factory.mktemp("photos"), 24, size=(90, 60))
    big, exif = Image.open(folder / "0000.png").resize((900, 600)), Image.Exif()
    big.save(folder / "big.jpg", quality=95)
    exif[0x0112] = 6
    big.save(folder / "turned.jpg", exif=exif)
    big.convert("L").save(folder / "grey.jpg")
    big.resize((80, 60)).save(folder / "small.jpg")
    (folder / "cut.jpg").write_bytes((folder / "big.jpg").read_bytes()[:9000])
    (folder / "text.jpg").write_text("no picture")
    return folder


def test_packed_set_reads_like_the_folder_and_trains(photos, tmp_path):
    result = run(photos, tmp_path / "p", "--shard_images", "8", "--num_workers", "2")
    assert (result["images"], result["unreadable"], result["shards"]) == (28, 2, 4)
    assert result["copied"] == 1, "only small.jpg is stored as it is"
    listed = (tmp_path / "p" / "bad_images.txt").read_text()
    assert "cut.jpg" in listed and "text.jpg" in listed and len(listed.splitlines()) == 2

    plain, packed = list_images(photos), list_images(tmp_path / "p")
    assert isinstance(packed, PackedImages) and len(packed) == 28
    names = [packed.relative(i) for i in range(28)]
    assert names == [name for name in map(plain.relative, range(30)) if name not in ("cut.jpg", "text.jpg")]
    assert [file.read() for file in packed] == [packed.read(i) for i in range(28)], "a loop ends at the end"
    assert packed.read(names.index("small.jpg")) == (photos / "small.jpg").read_bytes()
    for name, size in (("big.jpg", (384, 256)), ("turned.jpg", (256, 384))):  # stored upright
        with Image.open(packed[names.index(name)]) as image:
            assert image.size == size and image.mode == "RGB"
    ours, theirs = (PretrainDataset(paths, (64, 64), 16, seed=0, min_area=0.2) for paths in (packed, plain))
    a, b = ours[3, 5]["imgs"].float(), theirs[3, 5]["imgs"].float()
    assert (a - b).abs().mean() < 6, "JPEG of the picture itself, at the same position, hence the same crop"
    done = run_command(command("main_pretrain.py", *small_flags(tmp_path / "p", tmp_path / "run", "--no_distill")))
    assert done.returncode == 0, done.stderr
    assert [row["bad_images"] for row in read_log(tmp_path / "run")] == [0, 0]


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
    run(photos, whole, *more)
    done = run_command(command("-c", KILLED, "--data_path", str(photos), "--output", str(killed), *more))
    children = [Path(f"/proc/{pid}") for pid in done.stdout.splitlines()[-1].split()]
    assert done.returncode == -signal.SIGKILL and children
    deadline = time.monotonic() + 30
    while any(child.exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(child.exists() for child in children), "no orphans"
    before = {file: file.stat().st_mtime_ns for file in killed.glob("shard*.bin")}
    assert len(before) == 3
    refuses("unfinished packed set", list_images, killed)
    assert run(photos, killed, *more)["written"] == 3
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())
    for file in whole.glob("shard*.bin"):
        assert (killed / file.name).read_bytes() == file.read_bytes()
    assert PackedImages(killed).sha256() == PackedImages(whole).sha256()


def test_other_settings_are_refused_and_damage_is_found(photos, tmp_path):
    p = tmp_path / "p"
    run(photos, p)
    refuses("its short_side differ", run, photos, p, "--short_side", "128")
    refuses("--quality 200: must be from 1 to 100", run, photos, p, "--quality", "200")
    refuses("or pack this split alone", list_images, p, "train")
    shard, opened = p / "shard00000.bin", PackedImages(p)
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[len(opened.read(0)) // 2] ^= 1
    shard.write_bytes(data)
    item = PretrainDataset(PackedImages(p), (32, 32), 4, seed=0, min_area=0.2)[0, 0]
    assert "checksum differs" in item["problem"], "one bit: counted like any unreadable image"
    shard.write_bytes(whole[:-10])
    refuses("where its index says", list_images, p)
    with pytest.raises(Unreadable, match="checksum differs"):
        opened.read(len(opened) - 1)  # cut short while it is read: no memory map that ends the process
    shard.write_bytes(whole)
    for name, content in (
        ("pack.json", b"["), ("pack.json", b'{"shards": "x"}'), ("names.npy", b""), ("names.npy", b"no array"),
        ("name_ends.npy", b"\x93NUMPY"), ("shard00000.npy", b"x" * 200),
    ):  # fmt: skip
        whole = (p / name).read_bytes()
        (p / name).write_bytes(content)
        refuses("is damaged", list_images, p)
        (p / name).write_bytes(whole)


def tar(members) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as opened:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return made.getvalue()


@pytest.fixture(scope="module")
def jpeg(photos) -> bytes:
    return (photos / "small.jpg").read_bytes()


def samples(jpeg: bytes, numbers: range) -> bytes:
    return tar((f"{i:05d}.{e}", data) for i in numbers for e, data in (("jpg", jpeg), ("cls", b"3"), ("json", b"{}")))


def test_which_images_of_webdataset_shards_are_taken(tmp_path, jpeg):
    """Names with dots, as img2dataset and others write them; masks beside images; hidden files."""
    names = ["0000.img.jpg", "0001.seg.png", "0001.jpg", "a.b/0002.jpg", "my.photo1.jpg", "my.photo2.JPG", "._0002.jpg"]
    (tmp_path / "s-000.tar").write_bytes(tar((name, jpeg) for name in names))
    (tmp_path / "s-001.tar").write_bytes(samples(jpeg, range(5, 10)))
    result = run(f"{tmp_path}/s-{{000..001}}.tar", tmp_path / "p")
    assert (result["images"], result["shards"], result["copied"]) == (10, 2, 10)
    packed = list_images(tmp_path / "p")
    taken = [packed.relative(i).removeprefix("s-000/") for i in range(7)]
    assert taken[:5] == ["0000.img.jpg", "0001.jpg", "a.b/0002.jpg", "my.photo1.jpg", "my.photo2.JPG"]
    assert taken[5:] == ["s-001/00005.jpg", "s-001/00006.jpg"] and packed.read(6) == jpeg


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: None, "1 of 2 shards do not exist"),
        (lambda data: data[: data.index(b"00020.jpg")], "s-001.tar could not be read to its end .*it is cut off"),
        (lambda data: data[: len(data) // 2], "s-001.tar could not be read to its end"),
        (lambda data: tar([("a.xyz", b"1")]), r"s-001.tar holds no image .*it holds .xyz \(1\)"),
        (lambda data: bytes(10240), "s-001.tar holds no image .*it holds nothing"),
        (lambda data: b"", "s-001.tar could not be read"),
    ],
)
def test_a_damaged_shard_is_one_sentence(tmp_path, jpeg, spoil, message):
    data = samples(jpeg, range(30))
    (tmp_path / "s-000.tar").write_bytes(data)
    data = spoil(data)
    if data is not None:
        (tmp_path / "s-001.tar").write_bytes(data)
    refuses(message, run, f"{tmp_path}/s-{{000..001}}.tar", tmp_path / "p")
    (tmp_path / "s-001.tar").write_bytes(samples(jpeg, range(30, 34)))
    result = run(f"{tmp_path}/s-{{000..001}}.tar", tmp_path / "p")
    assert (result["images"], result["written"]) == (34, 2 if data is None else 1), "the finished shard was kept"
