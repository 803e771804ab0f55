"""An unbalanced pool out of a labelled set, and a balanced split to judge what is learned from it.

    python -m tools.long_tail --data_path labels.csv --label_column make --output crowd

The classes of the train rows are ordered by size; the class of rank r keeps (largest class) / r ** --exponent
images, chosen at random, if it has so many. Then photos that "go round" are added: small crops, saved
again, of the kept images, each drawn with the same chance, until they are --copies of the pool. Writes

    photos/          the pool, names shuffled
    pool.csv         path and the columns of the table; `of` is the photo that a crop was made from
    balanced.csv     path, split and the columns: equally many train and val rows of each class that has
                     --per_class of both; the train rows are references, whether they are in the pool or not

tests of a curation see a pool whose crowd is known, made of real photos.
"""

import argparse
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from datasets.images import UNREADABLE, open_rgb
from datasets.manifest import read_manifest
from demo.folder import write_set, write_table
from demo.pool import encode
from util.cli import Parser, run_tool
from util.errors import InputError


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.long_tail", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--data_path", required=True,
        help="table with the columns path, split (train, val) and --label_column")
    add("--label_column", required=True, help="column of the classes")
    add("--output", required=True, help="folder to write")
    add("--exponent", default=1.0, type=float, help="steepness of the tail, 0 or more (default 1)")
    add("--copies", default=0.3, type=float, help="crops, fraction of the pool, 0 to 0.9 (default 0.3)")
    add("--per_class", default=12, type=int,
        help="train and val rows of a class in balanced.csv (default 12)")
    add("--seed", default=0, type=int, help="of every random choice (default 0)")
    # fmt: on
    return parser


def long_tail(labels: list[str], exponent: float, rng: np.random.Generator) -> list[int]:
    """Indices that stay: of the class of rank r (1 is the largest), at most n_1 / r ** exponent."""
    of_class = defaultdict(list)
    for index, label in enumerate(labels):
        of_class[label].append(index)
    ranked = sorted(of_class.values(), key=lambda members: (-len(members), members[0]))
    kept = []
    for rank, members in enumerate(ranked, 1):
        count = min(len(members), max(1, round(len(ranked[0]) / rank**exponent)))
        kept.extend(int(i) for i in rng.choice(members, count, replace=False))
    return sorted(kept)


def balanced(rows: list[dict], column: str, per_class: int, rng: np.random.Generator) -> list[dict]:
    """`per_class` train and val rows of every class that has so many of both."""
    of = defaultdict(list)
    for row in rows:
        of[row[column], row["split"]].append(row)
    chosen = []
    for name in sorted({row[column] for row in rows}):
        if min(len(of[name, split]) for split in ("train", "val")) >= per_class:
            for split in ("train", "val"):
                members = of[name, split]
                places = sorted(rng.choice(len(members), per_class, replace=False))
                chosen.extend(members[i] for i in places)
    return chosen


def write_photo(row: dict, folder: Path, seed: int) -> None:
    """The photo as it is, or a crop of it that keeps 90 to 97% of each side."""
    target = folder / row["path"]
    if not row["of"]:
        target.write_bytes(Path(row["source"]).read_bytes())
        return
    try:
        picture = open_rgb(Path(row["source"]))
    except UNREADABLE as error:
        raise InputError(f"{row['source']} cannot be read ({error}): remove its row") from error
    rng = np.random.default_rng((seed, row["number"]))
    width, height = (round(side * rng.uniform(0.90, 0.97)) for side in picture.size)
    left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
    target.write_bytes(encode(picture.crop((left, top, left + width, top + height)), ".jpg", 90))


def main(args) -> dict:
    if args.exponent < 0 or not 0 <= args.copies <= 0.9 or args.per_class < 1:
        raise InputError(
            f"--exponent {args.exponent} must be 0 or more, --copies {args.copies} from 0 to 0.9, "
            f"--per_class {args.per_class} at least 1"
        )
    table, rows = Path(args.data_path).absolute(), read_manifest(args.data_path)
    for column in ("split", args.label_column):
        if column not in rows[0]:
            raise InputError(f"{table} has no column '{column}': it has {', '.join(rows[0])}")
    rows = [{**row, "source": str(table.parent / row["path"])} for row in rows]
    train = [row for row in rows if row["split"] == "train"]
    if not train:
        raise InputError(f"{table} has no row with split 'train'")
    rng = np.random.default_rng(args.seed)
    kept = [train[i] for i in long_tail([row[args.label_column] for row in train], args.exponent, rng)]
    drawn = rng.integers(0, len(kept), round(len(kept) * args.copies / (1 - args.copies)))
    pool = [{**row, "of": ""} for row in kept] + [{**kept[i], "of": kept[i]["path"]} for i in drawn]
    pool = [
        {
            **pool[i],
            "number": n,
            "path": f"photos/{n:06d}{Path(pool[i]['path']).suffix if not pool[i]['of'] else '.jpg'}",
        }
        for n, i in enumerate(rng.permutation(len(pool)))
    ]
    named = {row["source"]: row["path"] for row in pool if not row["of"]}
    for row in pool:
        row["of"] = row["of"] and named[row["source"]]
    judged = balanced(rows, args.label_column, args.per_class, rng)
    if not judged:
        raise InputError(f"no class of {table} has {args.per_class} train and val rows: lower --per_class")
    columns = [name for name in rows[0] if name not in ("path", "split", "source")]
    counts = Counter(row[args.label_column] for row in pool)
    result = {
        "images": len(pool),
        "crops": len(drawn),
        "classes": len(counts),
        "largest_class": max(counts.values()),
        "smallest_class": min(counts.values()),
        "balanced_classes": len({row[args.label_column] for row in judged}),
        "balanced_val": sum(row["split"] == "val" for row in judged),
    }
    settings = {name: getattr(args, name) for name in ("label_column", "exponent", "copies", "per_class", "seed")}

    def finish(folder: Path) -> None:
        write_table(folder / "pool.csv", ["path", "of", *columns], pool)
        write_table(
            folder / "balanced.csv", ["path", "split", *columns], ({**row, "path": row["source"]} for row in judged)
        )

    settings |= {"table": str(table), **result}
    draw = partial(write_photo, seed=args.seed)
    write_set(Path(args.output), "long_tail.json", settings, pool, draw, finish, None)
    return result


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
