"""The pool of scripts/experiments/curation_experiment.sh: an unbalanced pool of known make out of a labelled set."""

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from scripts.experiments import long_tail
from util.errors import InputError


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    rows = []
    for name, count in (("a", 40), ("b", 30), ("c", 20), ("d", 4)):
        for number in range(count):
            path = f"{name}{number}.png"
            noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            noise.resize((80, 60)).save(folder / path)
            rows.append((path, "val" if number % 4 == 0 else "train", name))
    with open(folder / "labels.csv", "w", newline="") as opened:
        csv.writer(opened).writerows([("path", "split", "kind"), *rows])
    return folder / "labels.csv"


def make(labels, output, *more):
    words = ["--data_path", str(labels), "--label_column", "kind", "--output", str(output), "--per_class", "5"]
    return long_tail.main(long_tail.get_args_parser().parse_args([*words, *more]))


def read(file):
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_the_tail_falls_and_crops_are_named(labels, tmp_path):
    result = make(labels, tmp_path / "crowd")
    rows = read(tmp_path / "crowd" / "pool.csv")
    originals = Counter(row["kind"] for row in rows if not row["of"])
    assert originals == {"a": 30, "b": 15, "c": 10, "d": 3}  # 30 / rank, as far as there are train rows
    crops = [row for row in rows if row["of"]]
    assert len(crops) == result["crops"] == 25 and result["images"] == len(rows) == 83
    kinds = {row["path"]: row["kind"] for row in rows}
    for row in crops:
        assert kinds[row["of"]] == row["kind"]
        picture = Image.open(tmp_path / "crowd" / row["path"])
        assert 72 <= picture.width <= 78 and 54 <= picture.height <= 58
    judged = read(tmp_path / "crowd" / "balanced.csv")
    assert Counter((row["kind"], row["split"]) for row in judged) == {
        (kind, split): 5 for kind in "abc" for split in ("train", "val")
    }
    again = make(labels, tmp_path / "again")
    assert again == result
    assert (tmp_path / "again" / "pool.csv").read_text() == (tmp_path / "crowd" / "pool.csv").read_text()


def test_bad_input_has_one_sentence(labels, tmp_path):
    make(labels, tmp_path / "crowd")
    for more, message in (
        (["--label_column", "make"], "needs columns 'split' and 'make'"),
        (["--per_class", "50"], "lower --per_class"),
        (["--seed", "3"], "does not hold this set"),
    ):
        with pytest.raises(InputError, match=message):
            make(labels, tmp_path / "crowd", *more)
