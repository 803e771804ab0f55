"""A labelled table becomes a table for re-identification."""

import numpy as np
import pytest
from conftest import refuses, run_main

from datasets.reid import read_reid
from metrics.reid import protocols_of
from tools import reid_table


@pytest.fixture
def labels(tmp_path):
    rows = []
    for i in range(80):
        (tmp_path / f"{i}.jpg").touch()
        model, split = "" if i == 79 else f"car {i % 8}", "train" if i % 3 else "val"
        rows.append(f"{i}.jpg,{model},{split},{i // 24 % 3}")
    (tmp_path / "labels.csv").write_text("\n".join(["path,model,split,camid", *rows]) + "\n")
    return tmp_path / "labels.csv"


def run(labels, *more):
    return run_main(
        reid_table, "--data_path", labels, "--label_column", "model", "--output", labels.with_name("reid.csv"), *more
    )


def test_identities_are_parted_and_read_back(labels):
    counts = run(labels, "--queries", "2")
    assert counts["train"] in (39, 40) and counts["query"] == 8 and counts["rows_without_label"] == 1
    assert counts["train"] + counts["query"] + counts["gallery"] == 79 and counts["images_left_out"] == 0
    assert counts["train_identities"] == counts["test_identities"] == 4
    again, data = labels.with_name("reid.csv").read_text(), read_reid(labels.with_name("reid.csv"))
    query, gallery = data.tests["test"]
    assert data.classes == 4 and (query.camids >= 0).all() and min(query.pids) >= 4
    assert sorted(np.unique(query.pids, return_counts=True)[1]) == [2, 2, 2, 2]
    names = [{str(part.paths[i]) for i in range(len(part))} for part in (query, gallery)]
    assert not names[0] & names[1]
    run(labels, "--queries", "2")
    assert labels.with_name("reid.csv").read_text() == again
    assert run(labels, "--test_split", "val")["images_left_out"] > 0  # only one split is tested on
    data = read_reid(labels.with_name("reid.csv"))
    parts = (*data.tests["test"], data.train)
    query, gallery, train = ([int(part.paths[i].stem) for i in range(len(part))] for part in parts)
    assert not any(number % 3 for number in query + gallery) and all(number % 3 for number in train)


def test_an_unseen_value_is_a_test_of_its_own(labels):
    text = labels.read_text().splitlines()
    typed = [f"{row},{'motor cycle' if ',car 3,' in row or ',car 5,' in row else 'car'}" for row in text[1:]]
    labels.write_text("\n".join([f"{text[0]},type", *typed]) + "\n")
    counts = run(labels, "--unseen", "type=motor cycle")
    assert counts["unseen_identities"] == 2 and counts["train_identities"] == 3 and counts["test_identities"] == 5
    data = read_reid(labels.with_name("reid.csv"))
    assert sorted(data.tests) == ["test", "unseen-type=motor-cycle"] and data.classes == 3
    parts = {name: {data.pid_names[pid] for side in pair for pid in side.pids} for name, pair in data.tests.items()}
    assert parts["unseen-type=motor-cycle"] == {"car 3", "car 5"} and len(parts["test"]) == 3
    assert not {"car 3", "car 5"} & {*data.pid_names[:3], *parts["test"]}
    lines = {name: protocol.line() for name, protocol in protocols_of(data.name, data.tests).items()}
    assert lines["unseen-type=motor-cycle"].startswith("table/unseen-type=motor-cycle (same-camera")
    refuses("give COLUMN=VALUE", run, labels, "--unseen", "type")
    refuses("has 0 identities of it", run, labels, "--unseen", "type=boat")
    refuses("has no column 'colour'", run, labels, "--unseen", "colour=red")
    table = labels.with_name("reid.csv")
    table.write_text(table.read_text().replace("=motor-cycle", " motor/cycle"))
    refuses("test_name 'unseen-type motor/cycle': use letters", read_reid, table)


def test_refusals(labels):
    refuses("has no column 'colour': it has path, model, split, camid", run, labels, "--label_column", "colour")
    refuses("give a share in", run, labels, "--test_share", "1.5")
    refuses("too few to part", run, labels, "--test_share", "0.1")
