"""Boxes in tables: what a program sees of a picture is what lies in its box, whoever reads it."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import small_flags
from PIL import Image

import main_pretrain
from datasets.attr import read_attribute_set
from datasets.fgvc import read_fgvc
from datasets.images import Cut, Unreadable, open_image, open_rgb, open_upright, upright_size
from datasets.items import LabelledItems, PretrainDataset, WholeImages
from datasets.path_list import PackedImages, PathList, list_images
from datasets.reid import read_reid
from datasets.tables import iterate_table, moment
from datasets.transforms import PadCropErase, whole_image
from models_vit import VisionTransformer
from tools import extract, pack, reid_table
from util.errors import InputError

SIZE = (90, 60)  # width, height of the frames
BOXES = [(10, 5, 50, 45), (40, 20, 90, 60), (0, 0, 90, 30), (60, 10, 80, 50)]


@pytest.fixture
def frames(tmp_path):
    """Noise, so that no two boxes look alike; one frame is stored on its side and turned by EXIF."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (60, 90, 1), np.uint8).repeat(3, 2)) for _ in range(2)]
    pictures[0].save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[1].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.jpg", quality=95, exif=exif)
    return tmp_path


def write(file, header, *rows):
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def crop(frames, row):
    """By hand: the upright picture, then what lies in the box."""
    return open_rgb(frames / ("a.png" if row % 2 == 0 else "b.jpg")).crop(BOXES[row])


def manifest(frames, style="text", split=None):
    """Four rows, two of each frame."""
    texts = [" ".join(map(str, box)) for box in BOXES]
    names, ends = ["a.png", "b.jpg"] * 2, [f",{split}" if split else ""] * 4
    head = ",split" if split else ""
    if style == "text":
        rows = (f'{name},"{text.replace(" ", ", ")}"{end}' for name, text, end in zip(names, texts, ends))
        return write(frames / "m.csv", f"path,Box{head}", *rows)
    if style == "sides":
        sides = ((left, upper, right - left, lower - upper) for left, upper, right, lower in BOXES)
        rows = (f"{name}\t" + "\t".join(map(str, side)) for name, side in zip(names, sides))
        return write(frames / "m.tsv", "path\tx\ty\tw\th", *rows)
    rows = [json.dumps({"path": name, "box": list(box)}) for name, box in zip(names, BOXES)]
    return write(frames / "m.jsonl", *rows)


@pytest.mark.parametrize("style", ["text", "sides", "json"])
def test_a_list_of_images_carries_the_boxes(frames, style):
    paths = list_images(manifest(frames, style))
    assert paths.boxes.tolist() == list(map(list, BOXES)) and paths.boxes.dtype == np.int32
    assert paths[1] == Cut(frames / "b.jpg", BOXES[1]) and paths.entry(1) == Cut("b.jpg", BOXES[1])
    taken = pickle.loads(pickle.dumps(paths)).take(np.array([3, 0]))
    assert taken.boxes.tolist() == [[*BOXES[3]], [*BOXES[0]]] and taken.relative(0) == "b.jpg"
    plain = PathList(frames, ["a.png", "b.jpg"] * 2)
    other = PathList(frames, [Cut("a.png", (10, 5, 50, 46)), *map(paths.entry, range(1, 4))])
    assert len({paths.sha256(), plain.sha256(), other.sha256()}) == 3 and plain.boxes is None
    for row in range(4):
        assert open_rgb(paths[row]).tobytes() == crop(frames, row).tobytes()


def test_every_reader_of_pictures_sees_the_box_alone(frames, tmp_path):
    paths = list_images(manifest(frames))
    seen = [whole_image(crop(frames, row), (24, 32)) for row in range(4)]
    whole = WholeImages(paths, np.arange(4), (24, 32))
    assert all(torch.equal(whole[row][0], seen[row]) for row in range(4))
    # pre-training: the random crop is one of the box, as of a picture that was cut out before
    (tmp_path / "cut").mkdir()
    for row in range(4):
        crop(frames, row).save(tmp_path / "cut" / f"{row}.png")
    cut = PathList(tmp_path / "cut", [f"{row}.png" for row in range(4)])
    ours, theirs = (PretrainDataset(of, (24, 32), 12, seed=0, min_area=0.2) for of in (paths, cut))
    assert all(torch.equal(ours[e, row]["imgs"], theirs[e, row]["imgs"]) for e in range(3) for row in range(4))
    # the tables of three tasks, and their training items
    texts = [f'"{box[0]} {box[1]};{box[2]} {box[3]}"' for box in BOXES]
    for task, head, ends in (
        ("reid", "pid,camid,split", ["x,1,train", "y,1,train", "z,1,query", "z,2,gallery"]),
        ("attr", "taxi,split", ["1,train", "0,train", "1,test", "0,test"]),
        ("fgvc", "label,split", ["p,train", "q,train", "p,test", "q,test"]),
    ):
        rows = [f"{name},{text},{end}" for name, text, end in zip(["a.png", "b.jpg"] * 2, texts, ends)]
        file = write(frames / f"{task}.csv", f"path,box,{head}", *rows)
        data = {"reid": read_reid, "attr": read_attribute_set, "fgvc": read_fgvc}[task](file)
        tested = [*data.tests["test"]] if task == "reid" else [data.test]
        found = [open_rgb(part.paths[row]) for part in (data.train, *tested) for row in range(len(part))]
        assert [image.tobytes() for image in found] == [crop(frames, row).tobytes() for row in range(4)], task
        item = LabelledItems(data.train, PadCropErase((24, 32), flip=0, pad=0, erase=0), 0)[0, 0, 1]
        assert torch.equal(item["imgs"], seen[1]) and not item["problem"], task
    assert [a.name for a in read_attribute_set(frames / "attr.csv").attributes] == ["taxi"]


def test_pictures_in_reduced_decoding_are_cut_where_the_full_ones_are(frames):
    big = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1200, 1600, 3), np.uint8))
    big.save(frames / "big.jpg")
    paths = PathList(frames, [Cut("big.jpg", (300, 200, 1500, 1100))])
    assert open_upright(paths[0]).size == (1200, 900)
    shown = PretrainDataset(paths, (16, 16), 1, seed=0, min_area=0.2)[0, 0]["imgs"]
    open_rgb(paths[0]).save(frames / "cut.png")
    by_hand = PretrainDataset(PathList(frames, ["cut.png"]), (16, 16), 1, seed=0, min_area=0.2)[0, 0]["imgs"]
    assert torch.equal(shown, by_hand)


def test_programs_take_boxes(frames, tmp_path, monkeypatch):
    file = manifest(frames)
    run = lambda tool, words: tool.main(tool.get_args_parser().parse_args(words.split()))  # noqa: E731
    run(pack, f"--data_path {file} --output {tmp_path}/packed --num_workers 1 --quality 100")
    packed = PackedImages(tmp_path / "packed")
    assert [packed.relative(row) for row in (0, 1)] == ["a.png#10,5,50,45", "b.jpg#40,20,90,60"]
    for row in range(4):
        image = open_image(packed[row])
        difference = np.abs(np.asarray(image, float) - np.asarray(crop(frames, row), float))
        assert image.size == crop(frames, row).size and difference.mean() < 12
    torch.manual_seed(0)
    encoder = VisionTransformer((24, 32), 8, 16, 1, 2)
    monkeypatch.setattr(extract, "load_encoder", lambda *_: encoder.eval())
    monkeypatch.setattr(extract, "fetch", lambda file: file)
    monkeypatch.setattr(extract, "weights_sha256", lambda file: "")
    encoder.report = ""
    run(extract, f"--checkpoint x --data_path {file} --output {tmp_path}/f --num_workers 0 --device cpu")
    table = (tmp_path / "f.csv").read_text().splitlines()
    assert table[:2] == ["path,problem,box", "a.png,,10 5 50 45"]
    seen = torch.stack([whole_image(crop(frames, row), (24, 32)) for row in range(4)])
    assert np.allclose(np.load(tmp_path / "f.npy"), encoder.encode(seen)["mean"].detach(), atol=1e-5)
    args = [*small_flags(file, tmp_path / "run"), *"--batch_size 2 --epochs 1 --warmup_epochs 0 --no_distill".split()]
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(args))
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
    assert f'"{list_images(file).sha256()}"' in (tmp_path / "run" / "args.json").read_text()


def test_one_frame_with_two_vehicles_is_two_files(frames):
    """A query never meets its own file and box; another box of its frame is another picture."""
    rows = ["a.png,10 5 50 45,x,query", "a.png,10 5 50 45,x,gallery", "a.png,40 20 90 60,x,gallery", "b.jpg,,x,gallery"]
    data = read_reid(write(frames / "r.csv", "path,box,pid,split", *rows), need_train=False)
    query, gallery = data.tests["test"]
    assert (gallery.files == query.files[0]).tolist() == [True, False, False]
    assert any("1 queries lie in the gallery too" in note for note in data.notes)


def test_a_table_for_reid_keeps_the_columns(frames):
    rows = [f"a.png,{i},0,40,30,{i % 4},t{i % 4},{i},2026-03-01T12:00:0{i}" for i in range(8)]
    file = write(frames / "l.csv", "path,x,y,w,h,pid,track,frame,time", *rows)
    words = f"--data_path {file} --output {frames}/reid.csv".split()
    reid_table.main(reid_table.get_args_parser().parse_args(words))
    found = {row["frame"]: row for row in iterate_table(frames / "reid.csv")}
    assert {row["box"] for row in found.values()} <= {(i, 0, i + 40, 30) for i in range(8)}
    assert all(row["time"].endswith(frame) and row["track"] == f"t{row['pid']}" for frame, row in found.items())


BAD = [
    ("1 2 3", "is not four finite numbers"), ("a b c d", "is not four finite numbers"),
    ("nan nan nan nan", "is not four finite numbers"), ("0 0 1e999 5", "is not four finite numbers"),
    ("20 5 10 45", "is empty, or its corners are swapped"), ("10 5 10 45", "is empty, or its corners are swapped"),
    ("0.1 0.1 0.3 0.3", "is empty, or its corners are swapped"), ("-30 -30 -5 -5", "lies outside of any picture"),
]  # fmt: skip


@pytest.mark.parametrize("text, why", BAD)
def test_a_bad_box_is_one_sentence(frames, text, why):
    file = write(frames / "m.csv", "path,box", "a.png,0 0 9 9", f'b.jpg,"{text}"')
    with pytest.raises(InputError, match=rf"m\.csv, line 3: the box .* of b\.jpg {why}: give left upper right lower"):
        list_images(file)


def test_boxes_beyond_the_picture(frames, capsys):
    rows = ["a.png,-5 -5 30 30", "a.png,60 30 200 200", "a.png,0 0 90 60", "b.jpg,10 10 20 20", "gone.png,5 5 9 9"]
    paths = list_images(write(frames / "m.csv", "path,box", *rows))
    assert "2 of 5 boxes leave their pictures and are cut at the edges" in capsys.readouterr().out
    whole = open_rgb(frames / "a.png")
    assert open_rgb(paths[0]).tobytes() == whole.crop((0, 0, 30, 30)).tobytes()
    assert open_rgb(paths[1]).tobytes() == whole.crop((60, 30, 90, 60)).tobytes()
    with pytest.raises(
        InputError, match=r"m\.csv, row 6: the box 90 0 99 9 of b\.jpg lies outside of its 90 x 60 px: correct"
    ):
        list_images(write(frames / "m.csv", "path,box", *rows, "b.jpg,90 0 99 9"))  # 60 x 90 before it is turned
    with pytest.raises(InputError, match="row 1: the box 90 0 99 9 of a.png lies outside of its 90 x 60 px"):
        read_fgvc(write(frames / "f.csv", "path,box,label,split", "a.png,90 0 99 9,p,train", "b.jpg,,q,test"))
    with pytest.raises(Unreadable, match=r"the box 0 60 9 99 lies outside of its 90 x 60 px"):  # changed since
        open_rgb(Cut(frames / "a.png", (0, 60, 9, 99)))
    shown = WholeImages(PathList(frames, [Cut("a.png", (0, 60, 9, 99))]), np.arange(1), (8, 8))[0]
    assert not shown[0].any() and "lies outside" in shown[2]


def test_two_ways_of_giving_a_box_are_refused(frames):
    file = write(frames / "m.csv", "path,box,x,y,w,h", "a.png,0 0 9 9,0,0,9,9")
    with pytest.raises(InputError, match="a column 'box' and x, y, w, h too: drop the one or the others"):
        list_images(file)
    file = write(frames / "m.csv", "path,x,y,w,h", "a.png,0,0,9,9", "b.jpg,5,5,-3,9")
    with pytest.raises(InputError, match=r"line 3: the box 5, 5, -3, 9 of b\.jpg is empty.*: give x y w h in px"):
        list_images(file)
    file = write(frames / "m.csv", "path,x,y,w,h", "a.png,-1,-1,20,9", "b.jpg,,,,", "b.jpg,-1,-1,-1,-1")
    assert list_images(file).boxes.tolist() == [[-1, -1, 19, 8], [0] * 4, [0] * 4]  # -1 may be a place, and no box
    assert list_images(write(frames / "m.csv", "path,box", "a.png,", "b.jpg,nan")).boxes is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_headers_tell_the_size_that_is_shown(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 10)).save(tmp_path / f"a.{ending}", exif=exif)
    assert upright_size(tmp_path / f"a.{ending}") == open_rgb(tmp_path / f"a.{ending}").size
    assert upright_size(tmp_path / "none.jpg") is None and upright_size(tmp_path) is None


def test_times_compare():
    assert moment("12.5") == 12.5 and moment("1970-01-01T00:01") == moment("00:01:00") == 60
    assert moment("2026-03-01T12:00:00+01:00") == moment("2026-03-01 11:00:00")
    assert [moment(text) for text in ("yesterday", "inf", "nan", "")] == [None] * 4
