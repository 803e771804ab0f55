"""Pictures from strangers, damaged, disguised or made to harm: each is listed as unreadable, nothing else happens."""

import io
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import small_flags, write_pictures
from PIL import Image

import main_curate
import main_pretrain
from datasets import images
from datasets.images import MAX_PIXELS, Unreadable, open_image, open_rgb
from datasets.items import WholeImages
from datasets.path_list import list_images

ALLOWED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n0 0 moveto showpage\n%%EOF\n"
STARTED: list[str] = []  # processes, by events of the interpreter's audit
WATCHED = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.startfile"}
sys.addaudithook(lambda event, args: STARTED.append(f"{event} {args}") if event in WATCHED else None)


@pytest.fixture
def no_process():
    STARTED.clear()
    yield
    assert not [event for event in STARTED if not re.search("'(git|uname)'", event)], "what a run says of itself"


def every_format() -> dict[str, bytes]:
    Image.init()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((64, 48))
    made = {"EPS by hand": EPS}
    for name in Image.SAVE:
        for mode in ("RGB", "P", "L", "1", "RGBA", "CMYK", "I;16"):
            opened = io.BytesIO()
            try:
                (photo.convert("L") if mode == "I;16" else photo).convert(mode).save(opened, name)
            except Exception:
                continue  # a format without this mode, or without its library
            made[f"{name} {mode}"] = opened.getvalue()
    return made


@pytest.fixture(scope="module")
def hostile() -> dict[str, bytes]:
    """What strangers' folders hold, under names of pictures: whole, cut, with flipped bits, heads on other bodies."""
    made, draw = every_format(), random.Random(0)
    found = {f"whole {name}": data for name, data in made.items()}
    heads = {name: made[f"{name} RGB"][:16] for name in ALLOWED if f"{name} RGB" in made}
    for name, data in made.items():
        found[f"cut {name}"] = data[: draw.randrange(4, max(5, len(data) - 1))]
        flipped = bytearray(data)
        for _ in range(8):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        found[f"flipped {name}"] = bytes(flipped)
        head = draw.choice(sorted(heads))
        found[f"head of {head} on {name}"] = heads[head] + data[16:]
    allowed = [name for name in sorted(made) if name.split()[0] in ALLOWED]
    for count in range(60):
        source = bytearray(made[draw.choice(allowed)])
        for _ in range(draw.choice((1, 3, 30))):
            source[draw.randrange(min(len(source), 200))] = draw.randrange(256)
        found[f"broken head {count}"] = bytes(source)
    Image.new("1", (13_300, 13_300)).save(bomb := io.BytesIO(), "PNG")  # few bytes, many pixels
    return found | {"nothing": b"", "text": b"hello", "zeros": bytes(5000), "bomb": bomb.getvalue()}


def test_only_allowed_formats_reach_a_decoder_and_all_else_is_unreadable(hostile, no_process, tmp_path):
    assert len(hostile) >= 300
    read, refused, started, file = [], {}, time.monotonic(), tmp_path / "a.jpg"
    for name, data in hostile.items():
        file.write_bytes(data)
        try:
            picture = open_rgb(file)
            assert picture.mode == "RGB" and picture.width * picture.height <= MAX_PIXELS
            read.append(name)
        except Unreadable as error:
            refused[name] = str(error)
            assert str(error) and "\n" not in str(error) and not re.search("0x[0-9a-f]{6}", str(error))
    assert time.monotonic() - started < 120
    whole = {name.split()[1] for name in read if name.startswith("whole")}
    assert whole == {name for name in ALLOWED if f"whole {name} RGB" in hostile} | {"MPO"} & whole
    assert "pixels, more than" in refused["bomb"] and "UnidentifiedImageError" in refused["whole EPS by hand"]


@pytest.mark.parametrize("kind", [NotImplementedError, ZeroDivisionError, AttributeError, RuntimeError, KeyError])
def test_whatever_a_decoder_raises_is_unreadable(tmp_path, monkeypatch, kind):
    file = write_pictures(tmp_path, 1) / "0000.png"
    space = {"__name__": "PIL.PngImagePlugin", "kind": kind}
    exec(compile("def load(self): raise kind('odd')", "decoder", "exec"), space)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", space["load"])
    with pytest.raises(Unreadable, match=f"{kind.__name__}: .*odd"):
        open_rgb(file)
    assert open_image(file, decode=False).size == (48, 40)
    monkeypatch.setattr(images, "is_turned", lambda image: image.no_such_thing)  # errors of our own code surface
    with pytest.raises(AttributeError):
        open_rgb(file)


def test_nothing_but_datasets_images_opens_pictures():
    root, own = Path(images.__file__).parents[1], "datasets/images demo/pool benchmarks/run reports/run models_vit"
    opening = {str(f.relative_to(root))[:-3] for f in root.rglob("*.py") if "Image.open(" in f.read_text()}
    assert not [name for name in opening - set(own.split()) if not name.startswith((".venv", "tests/"))]


def test_names_that_no_file_can_have(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name in ("a\0.jpg", "\ud800.jpg", "x" * 256 + ".jpg", "no/such/folder.jpg", "folder.jpg"):
        with pytest.raises(Unreadable):
            open_rgb(tmp_path / name)


def test_an_outage_is_waited_for_and_a_missing_file_is_not(tmp_path, monkeypatch):
    """A folder that was read and is away comes back; a file that was never there costs no time."""
    folder, away, waited = write_pictures(tmp_path / "photos", 2), tmp_path / "away", []
    open_rgb(folder / "0000.png")

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            away.rename(folder)

    monkeypatch.setattr(images.time, "sleep", sleep)
    folder.rename(away)
    assert open_rgb(folder / "0001.png").size == (48, 40) and len(waited) == 3
    for file in (folder / "0009.png", tmp_path / "never" / "0000.png"):
        with pytest.raises(Unreadable, match="No such file"):
            open_rgb(file)
    assert len(waited) == 3
    monkeypatch.setattr(images, "PATIENCE", 0.0)
    monkeypatch.setattr(images.os, "stat", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(Unreadable, match="Input/output error"):
        open_rgb(folder / "0001.png")


def test_training_and_curation_list_them_and_end_well(hostile, no_process, tmp_path, teacher_files, capsys):
    folder = write_pictures(tmp_path / "photos", 24, size=(160, 120))  # good ones, and the hostile among them
    for number, data in enumerate(hostile.values()):
        (folder / f"z{number:04d}.jpg").write_bytes(data)
    listed = list_images(folder)
    items = WholeImages(listed, np.arange(len(listed)), (16, 16))
    bad = {listed.relative(index) for _, index, problem in (items[i] for i in range(len(items))) if problem}
    words = small_flags(folder, tmp_path / "run", *"--no_distill --epochs 1 --max_bad_ratio 1".split())
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(words))
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert lines and {line.split("\t")[-2] for line in lines} <= bad
    words = f"--pool a={folder} --output {tmp_path}/cur --target_size 5 --min_sharpness 0 --num_workers 1 --device cpu"
    words += f" --clip_model {teacher_files[0]} --clip_pretrained {teacher_files[1]}"
    main_curate.main(main_curate.get_args_parser().parse_args(words.split()))
    quality = (tmp_path / "cur" / "quality.csv").read_text()
    assert all(name in quality for name in sorted(bad)[:20])
