"""Any labelled table -> a table for re-identification: identities for training, others to search for.

    python -m tools.reid_table --data_path labels.csv --label_column class_name --output reid.csv
    python main_finetune.py --task reid --data_path reid.csv ...

No vehicle is trained on and searched for. Columns camid, viewid, box, track, time, frame are kept if there.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.reid_table", __doc__)
    add = parser.add_argument
    add("--data_path", required=True, help="table .csv .tsv .jsonl with the columns path and the label")
    add("--label_column", default="pid", help="column that tells identities apart (default pid)")
    add("--test_share", default=0.5, type=float, help="share of the identities to search for (default 0.5)")
    add("--queries", default=1, type=int, help="images of each of them that become queries (default 1)")
    add("--test_split", default=None, help="test on this `split` alone, train on the others alone (default: all rows)")
    words = "vehicles with this value are never trained on, and tested for themselves (default none)"
    add("--unseen", default="", metavar="COLUMN=VALUE", help=words)
    add("--seed", default=0, type=int, help="seed of every choice (default 0)")
    add("--output", required=True, help="table to write; its paths are absolute")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import re
from collections import Counter, defaultdict

import numpy as np

from datasets.tables import SEEN, cell, iterate_table, split_name
from util.errors import InputError
from util.files import write_csv


def main(args) -> dict:
    """Returns counts: identities and images of each part, and what was left out."""
    if not 0 < args.test_share < 1 or args.queries < 1:
        raise InputError(f"--test_share {args.test_share}, --queries {args.queries}: give a share in (0, 1), 1 or more")
    file, (column, _, value) = Path(args.data_path), args.unseen.partition("=")
    if args.unseen and not (column and value):
        raise InputError(f"--unseen {args.unseen}: give COLUMN=VALUE, for example type=motorcycle")
    members: dict[str, list[dict]] = defaultdict(list)
    needed = (args.label_column, *[column] * bool(column))
    for row in iterate_table(file, needed, "; --label_column and --unseen choose among them"):
        members[cell(row, args.label_column)].append(row)
    unnamed = len(members.pop("", []))
    apart = {name for name, rows in members.items() if column and value in (cell(row, column) for row in rows)}
    if column and not any(len(members[name]) > args.queries for name in apart):
        what = f"{file} has {len(apart)} identities of it, none with more than {args.queries} images"
        raise InputError(f"--unseen {args.unseen}: {what}: give another value")
    rng, names = np.random.default_rng(args.seed), sorted({*members} - apart)
    count = round(args.test_share * len(names))
    if not 2 <= count <= len(names) - 2:
        raise InputError(f"{file} has {len(names)} identities in {args.label_column}: too few to part them")
    tested = {names[i] for i in rng.permutation(len(names))[:count]}
    rows, too_few, unseen = [], 0, re.sub(r"[^\w=.-]+", "-", f"unseen-{args.unseen}")
    tested |= apart
    for name in [*names, *sorted(apart)]:
        chosen, splits = members[name], []
        if args.test_split is not None:
            chosen = [r for r in chosen if (r.get("split") == split_name(args.test_split)) == (name in tested)]
        if name not in tested:
            splits = ["train"] * len(chosen)
        elif len(chosen) > args.queries:
            chosen = [chosen[i] for i in rng.permutation(len(chosen))]
            splits = ["query"] * args.queries + ["gallery"] * (len(chosen) - args.queries)
        else:
            too_few += 1
        for row, split in zip(chosen, splits):
            row |= {"box": " ".join(map(str, row["box"]))} if "box" in row else {}
            row |= {"path": str((file.parent / row["path"]).absolute()), "pid": name, "split": split}
            rows.append(row | {"test_name": unseen if name in apart else ""})
    kept = [name for name in ("camid", "viewid", *SEEN) if any(name in row for row in rows)]
    columns = ["path", "pid", "split", *["test_name"] * bool(apart), *kept]
    write_csv(args.output, [columns, *([row.get(name, "") for name in columns] for row in rows)])
    counts = {**dict.fromkeys(("train", "query", "gallery"), 0), **Counter(row["split"] for row in rows)}
    counts |= {"train_identities": len(names) - count, "test_identities": len(tested) - too_few}
    counts |= {"unseen_identities": len(apart)} if apart else {}
    counts |= {"identities_with_too_few_images": too_few, "rows_without_label": unnamed}
    return counts | {"images_left_out": sum(map(len, members.values())) - len(rows)}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output).with_suffix(".metrics.json"))
