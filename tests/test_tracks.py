"""Tracks of re-identification: pooled, searched for each other, and told beside the image scores."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import main_finetune
from datasets.items import WholeImages
from datasets.reid import read_reid
from metrics.reid import FeatureSet, Protocol, evaluate
from metrics.tracks import pool_tracks, sharpness
from models_vit import VisionTransformer, load_encoder
from tools.results_table import read_queries
from util.errors import InputError

HEAD = "path,box,pid,split,camid,track,time,frame"


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("how", ["mean", "quality", "medoid"])
def test_pooling_equals_loops_over_the_tracks(how):
    rng = np.random.default_rng(0)
    x, tracks, weights = rng.standard_normal((40, 5)), rng.integers(0, 9, 40) * 7, rng.random(40)
    found, rows = pool_tracks(torch.from_numpy(x), tracks, how, torch.from_numpy(weights))
    for track, pooled, row in zip(np.unique(tracks), found.numpy(), rows):
        mine = np.flatnonzero(tracks == track)
        assert row == mine[0] and pooled == pytest.approx(unit(pooled), abs=1e-6)
        members, w = unit(x[mine]), weights[mine, None] if how == "quality" else 1
        wanted = unit((members * w).sum(axis=0))
        if how == "medoid":
            wanted = members[np.argmax((members @ members.T).sum(axis=1).round(9))]
        assert pooled == pytest.approx(wanted, abs=1e-6)
    single = pool_tracks(torch.from_numpy(x), np.arange(40), how, torch.zeros(40))[0]
    assert np.allclose(single, unit(x), atol=1e-6)  # a track of one is its image, even without any quality


def test_quality_is_fine_detail_whether_blur_or_size_took_it():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    small = noise.resize((16, 16), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)
    pictures = [noise, noise.filter(ImageFilter.GaussianBlur(2)), small, Image.new("RGB", (64, 64), "grey")]
    found = sharpness(torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])).tolist()
    assert found[0] > 3 * max(found[1:3]) and min(found[1:3]) > found[3] == 0
    grey = np.array(noise, np.float64).mean(axis=2)
    laplacian = sum(np.roll(grey, s, a) for s in (1, -1) for a in (0, 1))[1:-1, 1:-1] - 4 * grey[1:-1, 1:-1]
    assert found[0] == pytest.approx(laplacian.std(), rel=1e-5)


@pytest.fixture
def tracked(tmp_path):
    """Six vehicles in the frames of three cameras, two tracks of three boxes each; one image without a track."""
    rng, rows = np.random.default_rng(0), []
    colours = rng.integers(0, 256, (6, 3))
    for camera in range(3):
        for frame in range(3):
            pixels = rng.integers(0, 256, (40, 6 * 30, 3))
            for pid in range(6):
                pixels[5:35, 30 * pid : 30 * pid + 28] = colours[pid] + rng.integers(-60, 60, (30, 28, 3))
                split = ("query", "gallery", "train")[camera] if pid > 1 else "train"
                split = "gallery" if pid > 1 and camera == 2 else split
                box = f"{30 * pid} 5 {30 * pid + 28} 35"
                where = f"c{camera}f{frame}.png,{box},{pid},{split},{camera}"
                rows.append(f"{where},p{pid}c{camera},2026-03-01T12:00:0{frame},{frame}")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"c{camera}f{frame}.png")
    rows[-1] = rows[-1].replace("p5c2", "")
    (tmp_path / "t.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    torch.manual_seed(0)
    encoder = VisionTransformer((32, 24), 8, 192, 1, 3)
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    return tmp_path


def test_reading_tracks(tracked):
    data = read_reid(tracked / "t.csv")
    query, gallery = data.tests["test"]
    assert data.train.tracks is None and len(query) == 12 and len(gallery) == 24
    assert len(set(query.tracks)) == 4 and np.unique(gallery.tracks, return_counts=True)[1].tolist() == [3] * 7 + [2, 1]
    assert data.track_names == sorted(f"p{pid}c{camera}" for pid in range(2, 6) for camera in range(3))
    names = [data.track_names[track] for track in query.tracks]
    assert names == [f"p{data.pid_names[pid]}c0" for pid in query.pids]
    lines = (tracked / "t.csv").read_text()
    plain = read_reid(write(tracked, lines.replace("track", "nothing")))
    assert plain.tests["test"][0].tracks is None and plain.sha256() == data.sha256()


def write(folder, text):
    (folder / "u.csv").write_text(text)
    return folder / "u.csv"


def test_an_image_of_a_tracks_file_belongs_to_the_track(tracked):
    """As in VeRi-776, whose queries lie in the tracks of its gallery too; otherwise a query would meet itself."""
    lines = (tracked / "t.csv").read_text().splitlines()
    own = next(line for line in lines if ",gallery," in line and "p3c1" in line)
    asked = own.replace("gallery", "query").replace("p3c1", "")
    query, gallery = read_reid(write(tracked, "\n".join([*lines, asked]))).tests["test"]
    row = int(np.flatnonzero(np.isin(query.files, gallery.files))[0])
    assert query.tracks[row] == gallery.tracks[gallery.files == query.files[row]][0]
    with pytest.raises(InputError, match=r"c1f0\.png#90,5,118,35 lies in the tracks 'new' and 'p3c1'"):
        read_reid(write(tracked, "\n".join([*lines, own.replace("gallery", "query").replace("p3c1", "new")])))


@pytest.mark.parametrize("old, new, message", [
    (",2,query,0,p2c0,", ",3,query,0,p2c0,", "track 'p2c0' shows vehicle 3 by camera 0 and 2 by camera 0"),
    (",2,query,0,p2c0,", ",2,query,1,p2c0,", "track 'p2c0' shows vehicle 2 by camera 1 and 2 by camera 0"),
    ("T12:00:00,0", "T12:00:00,first", "row 1: frame 'first' is neither a number nor an ISO time"),
    ("2026-03-01T12:00:00", "Sunday", "row 1: time 'Sunday' is neither a number nor an ISO time .2026"),
])  # fmt: skip
def test_bad_tracks_and_times_are_one_sentence(tracked, old, new, message):
    with pytest.raises(InputError, match=message):
        read_reid(write(tracked, (tracked / "t.csv").read_text().replace(old, new, 1)))


@pytest.mark.parametrize("how", ["mean", "quality", "medoid"])
def test_track_scores_stand_beside_the_image_scores(tracked, how):
    words = f"--task reid --eval --finetune {tracked}/encoder.pth --data_path {tracked}/t.csv --input_size 32,24"
    words += f" --device cpu --num_workers 0 --track_pool {how} --output_dir {tracked}/{how} --report --rerank"
    args = main_finetune.get_args_parser().parse_args(words.split())
    numbers = main_finetune.main(args)
    query, gallery = read_reid(tracked / "t.csv", need_train=False).tests["test"]
    encoder, sides = load_encoder(tracked / "encoder.pth", (32, 24)).eval(), []
    for part in (query, gallery):
        items = WholeImages(part.paths, np.arange(len(part)), (32, 24))
        imgs = torch.stack([items[i][0] for i in range(len(part))])
        with torch.no_grad():
            x = unit(encoder.encode(imgs)["cls"].double().numpy())
        weights, found = sharpness(imgs).double().numpy(), []
        tracks = np.unique(part.tracks)
        for track in tracks:
            mine = np.flatnonzero(part.tracks == track)
            w = weights[mine, None] if how == "quality" else 1
            medoid = x[mine][np.argmax((x[mine] @ x[mine].T).sum(axis=1).round(9))]
            found.append(medoid if how == "medoid" else unit((x[mine] * w).sum(axis=0)))
        first = [int(np.flatnonzero(part.tracks == track)[0]) for track in tracks]
        sides.append(FeatureSet(torch.from_numpy(np.array(found)), part.pids[first], part.camids[first]))
        sides.append(FeatureSet(torch.from_numpy(x), part.pids, part.camids))
    rule = Protocol("t", True)
    for prefix, pair in (("tracks_", (sides[0], sides[2])), ("", (sides[1], sides[3]))):
        wanted = evaluate(rule, *pair)
        assert [numbers[f"{prefix}{k}"] for k in ("mAP", "R1", "queries")] == pytest.approx(
            [wanted[k] for k in ("mAP", "R1", "queries")], abs=1e-5
        )
    assert f"/track-to-track-{how} (same-camera matches removed" in numbers["tracks_protocol"]
    assert numbers["tracks_protocol"] != numbers["protocol"] and "tracks_reranked_mAP" in numbers
    assert json.loads((tracked / how / "metrics.json").read_text())["tracks_queries"] == 4
    assert [len(read_queries(tracked / how, prefix)[1]) for prefix in ("", "tracks_", "tracks_reranked_")] == [12, 4, 4]
    page = (tracked / how / "report_tracks.html").read_text()
    assert "each shows its first image" in page and "track p2c0" in page and "track p3c1" in page
