"""The drawn pictures: repeatable, labelled as drawn, told apart by colour and body; sets that appear whole."""

import itertools

import numpy as np
import pytest
from PIL import Image

from demo import draw, pool, reid, seg
from demo.scene import open_scene
from demo.vehicle import BODIES, CAMERAS, VIEWS, label_row, vehicle
from util.errors import InputError

SETS = {"seg": seg.PARTS, "pool": pool.POOL, "reid": reid.VERI}


def pixels(*ids, size=48):
    return np.asarray(draw.render(*ids, size=size), dtype=float)


def test_render_is_a_function_of_its_arguments():
    first = draw.render(3, 7, 1, 4, 2)
    draw.render(3, 8, 1, 4, 2)
    assert first.mode == "RGB" and first.size == (96, 96)
    assert first.tobytes() == draw.render(3, 7, 1, 4, 2).tobytes()
    for other in ((4, 7, 1, 4, 2), (3, 7, 2, 4, 2), (3, 7, 1, 5, 2), (3, 7, 1, 4, 3)):
        assert first.tobytes() != draw.render(*other).tobytes()
    assert draw.render(0, 0, 0, 0, 0, size=(80, 40)).size == (80, 40)
    for pid, viewid in itertools.product(range(len(BODIES)), range(len(VIEWS))):
        assert pixels(0, pid, (pid + viewid) % len(CAMERAS), viewid, 0, size=24).std() > 10


@pytest.mark.parametrize("ids, size", [((0, 0, 8, 0, 0), 96), ((0, 0, 0, 6, 0), 96), ((0, -1, 0, 0, 0), 96),
                                       ((0, 0, 0, 0, 0), 8)])  # fmt: skip
def test_unknown_ids_and_small_sizes_are_refused(ids, size):
    with pytest.raises(ValueError, match="must be 0|at least 16"):
        draw.render(*ids, size=size)
    with pytest.raises(ValueError, match="camid must be"):
        open_scene(0, 0, 8, 0, 0, 96, (4, 1, 2))


def test_captions_name_what_is_drawn_and_marks_tell_equal_vehicles_apart():
    row = label_row(0, 3, 0)
    assert row["caption"].split()[1:3] == [row["colour"], BODIES[row["body"]].word]
    assert VIEWS[row["viewid"]] in row["caption"]
    seen = [(v["body"], v["colour"], v["marks"]) for v in (vehicle(0, pid) for pid in range(1000))]
    assert len(set(seen)) == len(seen)


def test_colour_is_seen_in_the_picture():
    for colour, more, less in (("red", 0, 2), ("blue", 2, 0)):
        of = [pid for pid in range(1000) if vehicle(0, pid)["colour"] == colour and pid % 10 in (0, 2, 4, 6, 9)]
        for pid in [pid for pid in of if "stripe" not in vehicle(0, pid)["marks"]][:3]:
            doors = [pixels(0, pid, camid, view, 0)[25:33, 14:34] for camid in (0, 3) for view in (0, 1)]
            rgb = np.median(np.concatenate(doors).reshape(-1, 3), axis=0)
            assert rgb[more] - rgb[less] > 40


def test_bodies_have_outlines_of_their_own():
    xs, ys = np.meshgrid(np.arange(0, 11, 0.1), np.arange(0, 3.5, 0.1))
    found = {}
    for name, body in BODIES.items():  # of the side, in cells of 10 cm
        found[name] = np.zeros(xs.shape, bool)
        for slab in draw.slabs(body).values():
            nose, tail = (np.interp(ys, part[:, 1], part[:, 0]) for part in (slab.nose, slab.tail))
            found[name] |= (ys >= slab.y0) & (ys <= slab.y1) & (xs >= nose) & (xs <= tail)
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert (a & b).sum() / (a | b).sum() < 0.96, (one, other)


def test_pictures_with_masks_of_their_parts(tmp_path):
    picture, mask = draw.render_parts(0, 0, 1, 4, 0, (90, 60))
    assert picture.size == (90, 60) and mask.shape == (60, 90)
    assert set(np.unique(mask)) == {24, 25, 26, 40} and (mask == 24).sum() > 500
    again = np.asarray(draw.render(0, 0, 1, 4, 0, (90, 60)), dtype=int)  # the same but for the mirrors
    differs = np.abs(np.asarray(picture, dtype=int) - again).max(axis=2) > 12
    ys, xs = np.nonzero(mask == 26)
    far = np.ones_like(differs)
    far[max(0, ys.min() - 2) : ys.max() + 3, max(0, xs.min() - 2) : xs.max() + 3] = False
    assert differs.any() and not differs[far].any()
    counts = seg.PARTS.write(tmp_path / "set", num_images=30, size=40, processes=1)["counts"]
    for split in ("train", "val", "test"):
        assert len(list(tmp_path.glob(f"set/annotations/{split}/*.png"))) == counts[split] > 0
    sizes = {Image.open(file).size for file in tmp_path.glob("set/images/*/*")}
    assert any(h > w for w, h in sizes) and any(w % 2 for w, h in sizes)
    assert len({row["pid"] for row in seg.plan(300, 0)}) == len({(r["pid"], r["split"]) for r in seg.plan(300, 0)})


def test_two_processes_write_the_same_bytes_and_the_same_set_is_left(tmp_path):
    flags = {"train_ids": 5, "test_ids": 5, "images_per_id": 6, "size": 16}
    result = reid.VERI.write(tmp_path / "one", processes=1, **flags)
    reid.VERI.write(tmp_path / "two", processes=2, **flags)
    files = sorted(path.relative_to(tmp_path / "one") for path in tmp_path.glob("one/**/*") if path.is_file())
    assert len(files) == result["images"] + result["counts"]["query"] + 1
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    before = (tmp_path / "one" / files[0]).stat().st_mtime_ns
    assert reid.VERI.write(tmp_path / "one", processes=1, **flags) == {**result, "written": False}
    assert result["written"] and (tmp_path / "one" / files[0]).stat().st_mtime_ns == before
    for target, seed in ((tmp_path / "one", 1), (tmp_path, 0)):
        with pytest.raises(InputError, match="remove it"):
            reid.VERI.write(target, **flags, seed=seed)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary folder left


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(row, folder, seed, size):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        seg.PARTS._replace(draw=fail).write(tmp_path / "set", processes=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SETS)
def test_command_lines_hold_the_settings_and_refuse_the_smallest(name, tmp_path):
    parser = SETS[name].parser(name, "")
    args = vars(parser.parse_args(["--output", str(tmp_path / "set")]))
    assert {flag: args[flag] for flag in SETS[name].settings} == SETS[name].settings
    for flag, least in SETS[name].least.items():
        with pytest.raises(InputError, match=f"--{flag} {least - 1}: must be {least} or more"):
            SETS[name].write(tmp_path / "set", **{flag: least - 1})
    assert not list(tmp_path.iterdir())
