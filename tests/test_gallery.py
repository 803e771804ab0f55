"""The index of tools.search: additions, removals and filters against brute force, kill -9, damage, what is refused."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refuses, run_main, write_pictures

from tools import gallery, gallery_usearch, search
from tools.gallery import Condition, Gallery
from util import files
from util.errors import InputError

KILLS = int(os.environ.get("KILLS", "8"))  # points at which a writer is killed, spread over its work


def unit(rng, count: int, dim: int = 16) -> np.ndarray:
    x = rng.normal(size=(count, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def row(name: int, **columns: str) -> dict:
    return {"path": f"/p/{name:04d}.jpg", "stamp": "1", "columns": columns}


def make(folder: Path) -> Gallery:
    gallery.claim_index(folder, {"model": "m"})
    return Gallery(folder)


def paths(index) -> list[str]:
    return [found["path"] for _, found in index.scan()]


WHERE = """
camid=3|3|1   camid=3|03|1   camid=3|3.0|1   camid=3|4|0     camid!=3|4|1   camid!=3|3|0    camid!=3|x|1   camid<10|9|1
camid<10|x|0  camid<=9|9|1   camid>9|10|1    camid=1e1|10|1  type=truck|truck|1  type=truck|Truck|0  type!=car|truck|1
type<b|a|1    type>=b|a|0    t>=2026-01-01|2025-12-31T23:59|0      t>=2026-01-01|2026-01-01T00:00:00Z|1
t<2026-01-01T00:00|2026-01-01T00:30+01:00|1  t=2026-01-01T01:00+01:00|2026-01-01|1   t>2026-01-01|soon|0
n=12345678901234567891|12345678901234567890|0  n=a=b|a=b|1  camid=-1|-1|1  camid=²|2|0  at>=09:30|10:00|1
"""


def test_conditions():
    for case in WHERE.split():
        words, cell, expected = case.split("|")
        assert Condition(words).holds(cell) == bool(int(expected)), case
        assert not Condition(words).holds(None), case
    assert Condition(" my column >= a b ").column == "my column" and Condition("a!=b").sign == "!="
    odd = Condition("camid>3")
    assert [odd.holds(cell) for cell in ("x", "4", "y")] == [False, True, False] and odd.odd == 2
    for words in ("camid", "=3", "camid=", "camid==3", "camid=<3", "", "camid>", "!=x"):
        refuses("give COLUMN=VALUE", Condition, words)


def brute(model: dict, query: np.ndarray, k: int) -> list[list[str]]:
    names, x = list(model), np.stack([model[name][1] for name in model]).astype(np.float64)
    cosines = query.astype(np.float64) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    return [[names[i] for i in np.argsort(-line, kind="stable")[:k]] for line in cosines]


def test_additions_removals_and_filters_equal_a_fresh_exact_search(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SEGMENT_ROWS", 12)
    monkeypatch.setattr(gallery, "SMALL_SEGMENTS", 3)
    monkeypatch.setattr(gallery, "BLOCK_NUMBERS", 100)
    rng, model, index = np.random.default_rng(0), {}, make(tmp_path)
    query = unit(rng, 3).astype(np.float32)
    for step in range(14):
        count = int(rng.integers(1, 30))
        rows = [row(1000 * step + i, camid=str(i % 4), **({"speed": str(i)} if i % 3 else {})) for i in range(count)]
        features, live = unit(rng, count), list(index.scan())
        gone = [n for n, _ in live if rng.random() < (0.9 if step == 9 else 0.3)]
        for number, old in live:
            if number in gone:
                del model[old["path"]]
        index.commit(rows, features, gone)
        model |= {new["path"]: (new["columns"], x) for new, x in zip(rows, features)}
        if step % 2:
            index.tidy()
            assert len([s for s in index.segments if 2 * (~s[1]).sum() < 12]) <= 3 + 1
            assert all(2 * removed.sum() <= len(removed) for _, removed in index.segments)
            assert len(list(tmp_path.glob("segment-*"))) == len(index.segments)
        index = Gallery(tmp_path)
        assert sorted(paths(index)) == sorted(model) and index.count == len(model)
        for words, meets in {
            "": lambda c: True,
            "camid=2": lambda c: c["camid"] == "2",
            "speed>=7": lambda c: int(c.get("speed", 0)) >= 7,
        }.items():
            chosen = {name: entry for name, entry in model.items() if meets(entry[0])}
            conditions = [Condition(words)] if words else []
            cosines, found, searched = index.search(torch.from_numpy(query), 5, conditions)
            names = index.rows(set(found.ravel().tolist()))
            assert searched == len(chosen) and cosines.shape[1] == min(5, len(chosen))
            if chosen:
                assert [[names[n]["path"] for n in line] for line in found.tolist()] == brute(chosen, query, 5)
    some = sorted(rng.permutation([n for n, _ in index.scan()])[:7].tolist())
    expected = [model[index.rows([n])[n]["path"]][1] for n in some]
    assert np.array_equal(index.features(some), np.stack(expected))


def work(folder: Path, said) -> None:
    """Additions, removals, replacements and tidying; each is acknowledged by a byte."""
    with search.run_lock(folder):
        index = make(folder)
        index.sweep()
        rng = np.random.default_rng(0)
        for step in range(6):
            numbers = [n for n, _ in index.scan()]
            gone = numbers[::2] if step % 2 else []
            index.commit([row(100 * step + i) for i in range(5)], unit(rng, 5), gone)
            said()
            index.tidy()


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SMALL_SEGMENTS", 2)
    states, seen = [[]], []
    work(tmp_path / "whole", lambda: states.append(sorted(paths(Gallery(tmp_path / "whole")))))
    assert [len(state) for state in states] == [0, 5, 7, 12, 11, 16, 13]

    def at_each_point(act) -> None:
        """Call `act` before and after each step that changes the disk, and when half of a file is written."""
        for module, name in ((os, "replace"), (os, "fsync"), (files.Path, "unlink")):
            real = getattr(module, name)

            def stepped(*given, real=real, **more):
                act()
                found = real(*given, **more)
                act()
                return found

            setattr(module, name, stepped)

    def child(folder: Path, stop: int) -> tuple[int, int]:
        """(points passed, operations acknowledged) of a process that is killed at point `stop`."""
        reading, writing = os.pipe()
        if (process := os.fork()) == 0:
            point = 0

            def act():
                nonlocal point
                point += 1
                os.write(writing, b".")
                if point == stop:
                    os.kill(os.getpid(), signal.SIGKILL)

            at_each_point(act)
            work(folder, lambda: os.write(writing, b"!"))
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as opened:
            said = opened.read()
        os.waitpid(process, 0)
        return said.count(b"."), said.count(b"!")

    points, done = child(tmp_path / "counted", 0)
    assert done == 6 and points > 40
    for number, stop in enumerate(np.linspace(1, points, KILLS).astype(int).tolist()):
        folder = tmp_path / str(number)
        _, acknowledged = child(folder, stop)
        with contextlib.suppress(InputError):  # killed before there was an index
            found = sorted(paths(Gallery(folder)))
            assert found in states[acknowledged : acknowledged + 2], (
                f"killed at {stop}: {len(found)} after {acknowledged}"
            )
            seen.append(acknowledged)
        index = make(folder)
        before = sorted(paths(index))
        index.tidy()
        assert sorted(paths(Gallery(folder))) == before
        named = {name for name, _ in index.segments} | {"index.json", ".lock"}
        assert {file.name for file in folder.iterdir()} <= named
    assert len(set(seen)) > 3


def test_readers_go_on_while_segments_are_joined(tmp_path):
    index = make(tmp_path)
    for number in range(3):
        index.commit([row(number)], unit(np.random.default_rng(number), 1))
    reader, opened = Gallery(tmp_path), []
    index.commit([], None, [0])
    index.tidy()  # the first segment is gone
    with pytest.raises(gallery.Changed):
        list(reader.scan())

    def read():
        opened.append(Gallery(tmp_path) if opened else reader)
        return paths(opened[-1])

    assert gallery.latest(read) == ["/p/0001.jpg", "/p/0002.jpg"] and len(opened) == 2


def test_damage_is_a_sentence(tmp_path):
    index = make(tmp_path)
    index.commit([row(number) for number in range(50)], unit(np.random.default_rng(0), 50))
    file, list_file = tmp_path / index.segments[0][0], tmp_path / "index.json"
    whole, listed = file.read_bytes(), list_file.read_bytes()
    query = torch.from_numpy(unit(np.random.default_rng(1), 1).astype(np.float32))
    for content in (whole[:-9], b"", whole[:700] + bytes([whole[700] ^ 1]) + whole[701:]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="damaged.*remove the folder"):
            list(Gallery(tmp_path).scan())
            Gallery(tmp_path).search(query, 3, [])
    file.unlink()
    refuses("damaged", lambda: list(Gallery(tmp_path).scan()))
    file.write_bytes(whole)
    entry = json.loads(listed)["segments"][0]
    for wrong in ("x", 7, [entry | {"rows": "many"}], [{}], [entry | {"removed": [50]}], [entry | {"rows": 49}]):
        list_file.write_text(json.dumps(json.loads(listed) | {"segments": wrong}))
        refuses("damaged", lambda: list(Gallery(tmp_path).scan()))
    list_file.write_bytes(listed)
    assert len(paths(Gallery(tmp_path))) == 50
    (tmp_path / "embeddings.npy").write_bytes(b"")
    refuses("older version.*remove it", Gallery, tmp_path)
    refuses("holds no index: give --gallery", Gallery, tmp_path / "none")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    from models_vit import VisionTransformer

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("encoder") / "0.pth"
    torch.save({"model": VisionTransformer((32, 32), 16, 192, 1, 3).state_dict()}, file)
    return file


def test_usearch_finds_what_the_exact_search_finds(tmp_path, monkeypatch, capsys):
    pytest.importorskip("usearch.index")
    monkeypatch.setattr(gallery, "SEGMENT_ROWS", 64)
    monkeypatch.setattr(gallery, "SMALL_SEGMENTS", 3)
    rng, query = np.random.default_rng(0), torch.from_numpy(unit(np.random.default_rng(1), 8).astype(np.float32))
    query[2] = torch.nan
    gallery.claim_index(tmp_path, {"engine": "usearch"})
    index, equal, compared = search.open_index(tmp_path), 0, 0
    for step in range(8):
        gone = [n for n, _ in index.scan() if rng.random() < (0.6 if step == 5 else 0.2)]
        index.commit([row(1000 * step + i, camid=str(i % 4)) for i in range(90)], unit(rng, 90), gone)
        index.tidy()
        assert [file.name for file in tmp_path.glob("graph-*")] == [index.graph.name]
        index, exact = search.open_index(tmp_path), Gallery(tmp_path)
        for words in ([], ["camid=2"], ["camid<9", "camid!=1"]):
            expected = exact.search(query, 5, [Condition(each) for each in words])
            monkeypatch.setattr(gallery_usearch, "FEW", 10_000)
            found = index.search(query, 5, [Condition(each) for each in words])
            assert all(np.array_equal(a, b) for a, b in zip((*found[:1], found[2]), (*expected[:1], expected[2])))
            monkeypatch.setattr(gallery_usearch, "FEW", 0)
            cosines, numbers, _ = index.search(query, 5, [Condition(each) for each in words])
            live = exact.rows(set(numbers[cosines > -np.inf].tolist()))
            assert all("camid=2" not in words or entry["columns"]["camid"] == "2" for entry in live.values())
            equal += (cosines == expected[0]).sum()
            compared += cosines.size
    assert equal > 0.98 * compared
    whole = index.graph.read_bytes()
    index.graph.write_bytes(whole[: len(whole) // 2])
    refuses("damaged .*: remove it", index.search, query, 5, [])
    index.graph.unlink()  # killed before it was written
    assert np.array_equal(index.search(query, 5, [])[0], exact.search(query, 5, [])[0])
    assert "the search is exact" in capsys.readouterr().out
    index.tidy()
    assert index.graph.is_file()


def test_a_package_that_is_missing_is_a_sentence(tmp_path, monkeypatch, encoder):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    gallery.claim_index(tmp_path, {"engine": "usearch"})
    refuses("--engine usearch needs the package usearch: pip install usearch", search.open_index, tmp_path)
    new = ["--gallery", tmp_path, "--index", tmp_path / "i", "--engine", "usearch", "--device", "cpu"]
    refuses("needs the package", run_main, search, *new, "--checkpoint", encoder, "--output", tmp_path / "o")
    assert not (tmp_path / "i").exists()


@pytest.fixture
def table(tmp_path) -> Path:
    write_pictures(tmp_path / "p", 9)
    lines = [f"p/{i:04d}.png,{i % 3},2026-01-0{1 + i}T00:00,{['car', '', 'truck'][i % 3]}" for i in range(8)]
    (tmp_path / "t.csv").write_text("\n".join(["path,CamID,time,type", *lines, lines[0]]))
    return tmp_path / "t.csv"


@pytest.fixture
def call(encoder, tmp_path):
    def run(*words: object, checkpoint=True) -> dict:
        given = ["--checkpoint", encoder] if checkpoint else []
        given += ["--index", tmp_path / "i", "--output", tmp_path / "o", "--device", "cpu", "--num_workers", "0"]
        return run_main(search, *words, *given)

    return run


def hits(tmp_path: Path) -> list[dict]:
    return json.loads((tmp_path / "o" / "results.json").read_text())[0]["results"]


def listed(tmp_path: Path) -> dict[str, dict]:
    rows = map(json.loads, (tmp_path / "o" / "rows.jsonl").read_text().splitlines())
    return {Path(found.pop("path")).name: found for found in rows}


def test_a_table_its_columns_and_its_changes(call, table, tmp_path, capsys):
    done = call("--gallery", table)
    assert (done["embedded"], done["twice"], done["gallery"], done["already"]) == (8, 1, 8, 0)
    done = call(tmp_path / "p" / "0002.png", "--gallery", table, "--where", "camid=2", "--where", "time<2026-01-07")
    assert (done["embedded"], done["already"], done["searched"]) == (0, 8, 2)
    assert [Path(hit["path"]).name for hit in hits(tmp_path)] == ["0002.png", "0005.png"]
    assert hits(tmp_path)[0]["columns"] == {"camid": "2", "time": "2026-01-03T00:00", "type": "truck"}
    assert "8 there already" in capsys.readouterr().out

    table.write_text(table.read_text().replace("p/0003.png,0", "p/0003.png,7"))  # another label, the same picture
    write_pictures(tmp_path / "q", 1, seed=5)
    os.replace(tmp_path / "q" / "0000.png", tmp_path / "p" / "0004.png")  # another picture, the same label
    os.utime(tmp_path / "p" / "0004.png", ns=(1, 1))
    before = Gallery(tmp_path / "i")
    old = {Path(found["path"]).name: before.features([n])[0] for n, found in before.scan()}
    done = call("--gallery", table)
    assert (done["columns_changed"], done["embedded"], done["gallery"]) == (1, 1, 8)
    index = Gallery(tmp_path / "i")
    new = {Path(found["path"]).name: (index.features([n])[0], found["columns"]) for n, found in index.scan()}
    assert [name for name in old if not np.array_equal(old[name], new[name][0])] == ["0004.png"]
    assert new["0003.png"][1]["camid"] == "7" and "type" not in new["0004.png"][1]

    (tmp_path / "p" / "0001.png").write_bytes(b"broken")
    done = call("--gallery", tmp_path / "p")  # a folder has no columns: those of the table stay
    assert (done["embedded"], done["already"], done["unreadable"], done["gallery"]) == (1, 7, 1, 9)
    assert call("--list", checkpoint=False)["listed"] == 9
    rows = listed(tmp_path)
    assert rows["0003.png"]["camid"] == "7" and rows["0008.png"] == {} and len(rows) == 9
    assert call("--list", "--where", "type=truck", checkpoint=False)["listed"] == 2
    assert call("--gallery", tmp_path / "o" / "rows.jsonl")["columns_changed"] == 0  # it is a manifest
    assert "column type: 2 pictures, 1 values, e.g. truck (2)" in capsys.readouterr().out

    done = call("--remove", tmp_path / "p" / "0000.png", tmp_path / "p" / "0008.png", checkpoint=False)
    assert (done["removed"], done["gallery"]) == (2, 7)
    assert call("--remove", tmp_path / "p", "--where", "type=truck", checkpoint=False)["removed"] == 2
    assert call("--remove", "--where", "type=truck", checkpoint=False)["removed"] == 0
    call(tmp_path / "p" / "0002.png")
    assert sorted(Path(hit["path"]).name for hit in hits(tmp_path)) == [f"000{i}.png" for i in (1, 3, 4, 6, 7)]
    assert call("--gallery", table)["embedded"] == 3  # back again; the broken one keeps its place


def test_boxes_of_one_picture(call, table, tmp_path):
    from PIL import Image

    from datasets.images import open_rgb

    rows = [f"p/0000.png,{box},{camid}" for camid, box in enumerate(("0 0 20 20", "20 10 48 40", ""))]
    table.write_text("\n".join(["path,box,camid", *rows]))
    assert call(table, "--gallery", table, "--where", "camid=1")["embedded"] == 3
    found = hits(tmp_path)
    assert [hit["path"] for hit in found] == [f"{tmp_path}/p/0000.png#20,10,48,40"] and not found[0]["same_file"]
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [entry["results"][0]["same_file"] for entry in results] == [False, True, False]
    cut = open_rgb(gallery.open_named(found[0]["path"]))
    assert cut.tobytes() == Image.open(tmp_path / "p" / "0000.png").convert("RGB").crop((20, 10, 48, 40)).tobytes()
    assert call("--list", checkpoint=False)["listed"] == 3
    assert call("--gallery", tmp_path / "o" / "rows.jsonl")["already"] == 3
    assert call("--remove", tmp_path / "p" / "0000.png", checkpoint=False)["removed"] == 3


def test_mistakes_end_in_a_sentence(call, encoder, table, tmp_path, monkeypatch):
    query = tmp_path / "p" / "0000.png"
    refuses("holds no index: give --gallery", call, query)
    refuses("holds no index", call, "--list", checkpoint=False)
    call("--gallery", table)
    refuses("--where colour=red: no picture has a column 'colour', there is camid, path, time, type", call, query,
            "--where", "colour=red")  # fmt: skip
    refuses("--where 'camid': give COLUMN=VALUE", call, query, "--where", "camid")
    refuses("--where camid=1: goes with QUERY", call, "--gallery", table, "--where", "camid=1")
    refuses("--remove and --list go alone", call, query, "--list")
    refuses("--remove and --list go alone", call, "--list", "--remove", "x")
    refuses("--remove: name pictures or folders", call, "--remove")
    refuses(
        "no.png: the index holds no such picture; nothing was removed", call, "--remove", query, tmp_path / "no.png"
    )
    refuses("give --checkpoint", call, query, checkpoint=False)
    refuses("give --checkpoint, and QUERY", call)
    refuses("line 2 has another number of fields", call, "--gallery", damaged(table))
    assert Gallery(tmp_path / "i").count == 8
    refuses("its img_size differ", call, query, "--input_size", "48")
    refuses("its engine differ", call, query, "--engine", "usearch")
    empty = write_pictures(tmp_path / "e", 1)
    (empty / "0000.png").write_bytes(b"broken")
    refuses("holds no picture that could be read", run_main, search, query, "--gallery", empty, "--checkpoint", encoder,
            "--output", tmp_path / "new", "--device", "cpu", "--num_workers", "0")  # fmt: skip
    call("--remove", tmp_path / "p", checkpoint=False)
    refuses("holds no picture", call, query)


def damaged(table: Path) -> Path:
    (table.parent / "d.csv").write_text(table.read_text().replace("p/0000.png,0", "p/0000.png,0,0", 1))
    return table.parent / "d.csv"
