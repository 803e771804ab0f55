"""An unbalanced pool out of a labelled set, and a balanced split to judge what is learned from it.

    python -m scripts.experiments.long_tail --data_path labels.csv --label_column make --output crowd

The class of rank r keeps (largest class) / r ** --exponent train images, chosen at random, if it has so many. Then
photos that "go round" are added: small crops, saved again, of the kept images, until they are --copies of the pool.

    photos/          the pool, names shuffled
    pool.csv         path and the columns of the table; `of` is the photo that a crop was made from
    balanced.csv     path, split and the columns: equally many train and val rows of each class with --per_class of both
"""

from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from datasets.images import open_given
from datasets.tables import iterate_table
from demo.folder import write_set, write_table
from demo.pool import encode
from util.cli import Parser, run_tool
from util.errors import InputError


def get_args_parser() -> Parser:
    parser = Parser("scripts.experiments.long_tail", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--data_path", required=True, help="table with the columns path, split (train, val) and --label_column")
    add("--label_column", required=True, help="column of the classes")
    add("--output", required=True, help="folder to write")
    add("--exponent", default=1.0, type=float, help="steepness of the tail, 0 or more (default 1)")
    add("--copies", default=0.3, type=float, help="crops, fraction of the pool, 0 to 0.9 (default 0.3)")
    add("--per_class", default=12, type=int, help="train and val rows of a class in balanced.csv (default 12)")
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
        parts = of[name, "train"], of[name, "val"]
        for members in parts if min(map(len, parts)) >= per_class else ():
            chosen.extend(members[i] for i in sorted(rng.choice(len(members), per_class, replace=False)))
    return chosen


def write_photo(row: dict, folder: Path, seed: int) -> None:
    """The photo as it is, or a crop of it that keeps 90 to 97% of each side."""
    target = folder / row["path"]
    if not row["of"]:
        target.write_bytes(Path(row["source"]).read_bytes())
        return
    picture = open_given(row["source"], "--data_path")
    rng = np.random.default_rng((seed, row["number"]))
    width, height = (round(side * rng.uniform(0.90, 0.97)) for side in picture.size)
    left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
    target.write_bytes(encode(picture.crop((left, top, left + width, top + height)), ".jpg", 90))


def main(args) -> dict:
    column, rows = args.label_column, list(iterate_table(args.data_path))
    if "split" not in rows[0] or column not in rows[0]:
        raise InputError(f"{args.data_path} needs columns 'split' and '{column}': it has {', '.join(rows[0])}")
    rows = [row | {"source": str(Path(args.data_path).absolute().parent / row["path"])} for row in rows]
    train = [row for row in rows if row["split"] == "train"]
    rng = np.random.default_rng(args.seed)
    kept = [train[i] for i in long_tail([row[column] for row in train], args.exponent, rng)]
    drawn = rng.integers(0, len(kept), round(len(kept) * args.copies / (1 - args.copies)))
    pool = [row | {"of": ""} for row in kept] + [kept[i] | {"of": kept[i]["path"]} for i in drawn]
    pool = [pool[i] | {"number": number} for number, i in enumerate(rng.permutation(len(pool)))]
    for row in pool:
        row["path"] = f"photos/{row['number']:06d}{'.jpg' if row['of'] else Path(row['path']).suffix}"
    named = {row["source"]: row["path"] for row in pool if not row["of"]}
    for row in pool:
        row["of"] = row["of"] and named[row["source"]]
    judged = balanced(rows, column, args.per_class, rng)
    if not judged:
        raise InputError(f"no class of {args.data_path} has {args.per_class} train and val rows: lower --per_class")
    columns = [name for name in rows[0] if name not in ("path", "split", "source")]
    counts = Counter(row[column] for row in pool)
    result = {"images": len(pool), "crops": len(drawn), "classes": len(counts)}
    result |= {"largest_class": max(counts.values()), "smallest_class": min(counts.values())}
    result["balanced_classes"] = len({row[column] for row in judged})

    def finish(folder: Path) -> None:
        write_table(folder / "pool.csv", ["path", "of", *columns], pool)
        write_table(folder / "balanced.csv", ["path", "split", *columns], (r | {"path": r["source"]} for r in judged))

    settings = vars(args) | {"data_path": str(Path(args.data_path).absolute())} | result
    output = Path(settings.pop("output")).absolute()
    write_set(output, "long_tail.json", settings, pool, partial(write_photo, seed=args.seed), finish, None)
    return result


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
