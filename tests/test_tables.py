"""Tables as people and programs write them, and what is no table: a row, or one sentence."""

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.attr import read_attribute_set
from datasets.fgvc import list_labelled
from datasets.path_list import list_images
from datasets.reid import read_reid
from datasets.tables import iterate_table, known, published_note
from util.errors import InputError


def rows_of(folder, content: str | bytes, name="t.csv", *needed):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(iterate_table(folder / name, needed))


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.csv", "path, pid, split\na.jpg, 3, valid\n"),
        ("t.csv", "PATH,Pid,Split\na.jpg,3,Validation\n\n"),
        ("t.csv", b'\xef\xbb\xbf"path" ,"pid", "split"\r\n"a.jpg","3", "Val "\r\n'),
        ("t.csv", b"\xef\xbb\xbf\xef\xbb\xbfpath,'pid',split\na.jpg,3,val\n"),
        ("t.tsv", "Path\t Pid \tSPLIT\na.jpg\t3\tvalid\n"),
        ("t.jsonl", '\n{"Path": "a.jpg", " pid": "3", "split": "VALID"}\n'),
    ],
)
def test_headers_and_splits_are_taken_as_they_are_meant(tmp_path, name, content):
    assert rows_of(tmp_path, content, name, "pid", "split") == [{"path": "a.jpg", "pid": "3", "split": "val"}]


def test_splits_by_any_name_are_read_by_every_reader(tmp_path):
    for split in ("Train", "valid"):
        for label in "xy":
            (tmp_path / "tree" / split / label).mkdir(parents=True)
            (tmp_path / "tree" / split / label / "a.jpg").touch()
    assert {name: len(rows) for name, rows in list_labelled(tmp_path / "tree").splits.items()} == {"train": 2, "val": 2}
    assert len(list_images(tmp_path / "tree")) == 2  # of Train/ alone
    rows = [f"tree/{split}/{label}/a.jpg,{split},{label},1" for split in ("Train", "valid") for label in "xy"]
    (tmp_path / "t.csv").write_text("\n".join(["Path,Split,Label,taxi", *rows]))
    assert list_labelled(tmp_path / "t.csv").labels.tolist() == [0, 1, 0, 1]
    assert len(list_images(tmp_path / "t.csv", "validation")) == 2
    data = read_attribute_set(tmp_path / "t.csv", binary=["Taxi"], test_split="Validation")
    assert len(data.train) == len(data.test) == 2 and data.attributes[0].name == "Taxi"


def test_values_that_say_nothing_are_unknown():
    assert [known(v) for v in (None, "", " ", -1, "-1", "-1.0", -1.0, float("nan"), "NaN", "null")] == [""] * 10
    assert [known(v) for v in (0, "0", 1.0, "17.0", "1.5", "v1.0", "0000", "none", True)] == [
        "0", "0", "1", "17", "1.5", "v1.0", "0000", "none", "True"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", 'path,pid\n"a.jpg,1\nb.jpg,2\n', "line 3: unexpected end of data: look for a lost quote"),
        ("t.csv", 'path,pid\n"a.jpg,1\nb.jpg",2\n', "line 3 has a field over several lines with ',' in it"),
        ("t.csv", 'path,pid\n"a.jpg"x,1\n', "line 2: .*: look for a lost quote"),
        ("t.csv", 'path\n"a.jpg\nb.jpg"\n', "line 3 is damaged: .* a quote is lost"),
        ("t.csv", "path,pid\n" + "a" * 200_000 + ",1\n", "line 2: field larger than field limit"),
        ("t.csv", "path,pid\na.jpg\n", "line 2 has another number of fields than the first line"),
        ("t.csv", "path,pid,Path\na.jpg,1,2\n", "has the column 'path' twice"),
        ("t.csv", "path\na\0.jpg\n", "line 2.*(NUL|damaged)"),
        ("t.csv", "path\n \n", "line 2 has no text in the column 'path'"),
        ("t.csv", "file\na.jpg\n", "has no column 'path': it has file"),
        ("t.jsonl", '{"path": "a.jpg", "pid": ' + "9" * 5000 + "}", "line 1 is not JSON: .*4300"),
        ("t.jsonl", "[" * 100_000 + "]" * 100_000, "line 1 is not JSON: .*recursion"),
        ("t.jsonl", "[1]", "line 1 is not a JSON object"),
        ("t.jsonl", '{"path": "a.jpg", "pid": "\\ud800"}', "line 1 is damaged"),
        ("t.jsonl", '{"path": "\\ud800.jpg"}', "line 1 is damaged"),
        ("t.jsonl", '{"path": ["a.jpg"]}', "line 1 has no text in the column 'path'"),
    ],
)
def test_damaged_tables_get_a_sentence(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        rows_of(tmp_path, content, name)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_names_that_only_look_odd_are_read(tmp_path):
    (tmp_path / "a\nb.jpg").touch()
    written = 'path,text\n"a\nb.jpg","two\nlines"\n"c,d.jpg","say ""x"""\n'
    assert [row["path"] for row in rows_of(tmp_path, written)] == ["a\nb.jpg", "c,d.jpg"]
    assert rows_of(tmp_path, json.dumps({"path": "v\udce9.jpg"}), "t.jsonl")[0]["path"] == "v\udce9.jpg"
    (tmp_path / "t.csv").write_text(f"path,pid,split\n{'x' * 300}.jpg,1,train\n")
    with pytest.raises(InputError, match="none of the first 1 images"):
        list_images(tmp_path / "t.csv")


@pytest.mark.parametrize("line", [f"0001_c{'9' * 5000}_1.jpg", "0001_c001_\0.jpg", "0001_c\u0661_1.jpg", "000001.jpg"])
def test_lists_of_published_sets_with_odd_lines_get_a_sentence(tmp_path, line):
    for part in ("train", "query", "test"):
        (tmp_path / f"image_{part}").mkdir()
        (tmp_path / f"name_{part}.txt").write_text(f"0001_c001_1.jpg\n{line}\n")
    with pytest.raises(InputError, match="line 2 is ('.*', not like 0001_c001_.*give a table: path|damaged)"):
        read_reid(tmp_path)


def test_counts_beside_the_published_ones():
    for counts, note in (
        ({"train": 37_778, "query": 1678}, "all counts as published"),
        ({"train": 37_777, "query": 1678}, "other counts than published: train 37,777 instead of 37,778"),
        ({"train": 12, "query": 3}, "smaller than the published set"),
    ):
        assert published_note(counts, "veri776") == note


def test_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / "t.csv")
    for read in (read_reid, read_attribute_set, list_labelled, list_images):
        with pytest.raises(InputError):
            read(tmp_path / "t.csv")


WORDS = "path pid split label train query gallery test val a.jpg b.jpg 1 -1 1.0 nan [ {} 0000_c1s1_1.jpg".split()
ODD = ["\u0661", "\u00b2", "", " ", '"', "'", "\0", "\ud800", "\ufeff", "\n", "9" * 5000, "x" * 300]
CELLS = st.sampled_from(WORDS + ODD) | st.text(max_size=6)
LEAVES = CELLS | st.none() | st.floats() | st.integers()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
HEADER = st.just(["path", "pid", "split", "label"]) | st.lists(CELLS, max_size=5)
BODY = st.lists(st.lists(CELLS, min_size=4, max_size=4) | st.lists(CELLS, max_size=5), max_size=6)
CSV = st.builds(lambda head, rows: "\n".join(",".join(row) for row in [head, *rows]), HEADER, BODY)
OBJECT = st.dictionaries(st.sampled_from(["path", "pid", "split", "label", "camid"]) | CELLS, VALUES, max_size=5)
JSONL = st.builds(lambda rows: "\n".join(json.dumps(row) for row in rows), st.lists(OBJECT, max_size=5))
START = time.monotonic()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from([".csv", ".tsv", ".jsonl", ".txt"]), CSV | JSONL, st.binary(max_size=3))
def test_whatever_stands_in_a_table_every_reader_reads_it_or_says_why(tmp_path_factory, ending, text, more):
    if time.monotonic() - START > 60:
        return
    folder = tmp_path_factory.getbasetemp() / "generated"
    folder.mkdir(exist_ok=True)
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_text(name)
    file = folder / f"t{ending}"
    file.write_bytes(text.replace(",", "\t" if ending == ".tsv" else ",").encode("utf-8", "surrogatepass") + more)
    for read in (read_reid, read_attribute_set, list_labelled, list_images):
        try:
            read(file)
        except InputError as error:
            assert str(error).strip()
