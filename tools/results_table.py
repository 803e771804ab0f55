"""Runs of main_finetune.py beside published numbers: re-identification; attributes, classes and parts.

    python -m tools.results_table runs/ --output results.md --name 3fa4b2c1="CGD-MAE, 400 epochs"

Writes OUTPUT (Markdown). Runs that differ in their seed only become one row,
mean +- sample deviation. A run without its config, seed, commit or the hash of its starting weights gives no
row, and is listed with the reason. Numbers of sets with other counts than published have tables of their own.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.results_table", __doc__)
    add = parser.add_argument
    # fmt: off
    add("runs", nargs="+", metavar="RUN_OR_FOLDER",
        help="output folders of main_finetune.py, or folders of them")
    add("--output", required=True, help="Markdown file to write")
    add("--name", nargs="+", default=[], metavar="HASH=TEXT",
        help="what to call the weights whose SHA-256 begins so; random=TEXT for none (default: their file)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import hashlib
import json
import math
import re
from dataclasses import dataclass

import numpy as np

from datasets.tables import PUBLISHED as COUNTS
from metrics.attr import THRESHOLD
from util.errors import InputError
from util.files import write_atomic

PUBLISHED = Path(__file__).with_name("published_results.json")
# no part of the recipe: where things lie, how fast it goes, the weights, the seed that rows are means over
NOT_CONFIG = (
    "seed finetune weights_sha256 data_path output_dir log_dir device num_workers pin_mem batch_size "
    "world_size resume given max_bad_ratio max_bad_steps allow_change print_freq save_freq save_minutes "
    "keep_checkpoints eval eval_every report compile grad_checkpoint local_rank dist_url dist_on_itp "
    "dist_timeout tests rerank rerank_k1 rerank_k2 rerank_lambda"
).split()
METRICS = {  # of each task, in the order of the tables
    "reid": ("mAP", "R1", "R5"),
    "attr": ("mA", "accuracy", "F1", "constant_mA"),
    "fgvc": ("top1", "mean_class_accuracy", "majority"),
    "seg": ("mIoU", "mAcc", "aAcc", "parts_mIoU", "parts_mAcc"),
}
NAMES = {
    "accuracy": "Acc", "constant_mA": "mA of a constant", "top1": "top-1", "mean_class_accuracy": "mean per class",
    "majority": "largest class", "parts_mIoU": "mIoU of parts", "parts_mAcc": "mAcc of parts",
}  # fmt: skip
DIGITS = {"reid": 1, "attr": 2, "fgvc": 1, "seg": 2}
TABLES = {  # heading: {test: (title, metrics)}
    "Re-identification": {"reid veri776": ("VeRi-776", ("mAP", "R1"))}
    | {f"reid vehicleid/{size}": (f"VehicleID {size}", ("R1", "R5")) for size in (800, 1600, 2400)}
    | {f"reid veriwild/{size}": (f"VERI-Wild {size}", ("mAP", "R1")) for size in (3000, 5000, 10000)},
    "Attributes, classes, parts": {
        "attr veri776": ("VeRi-776 attributes", ("mA", "accuracy", "F1")),
        "fgvc StanfordCars": ("StanfordCars", ("top1",)),
        "seg PartImageNet vehicles": ("PartImageNet vehicles", ("mIoU", "mAcc")),
    },
}
WORDS = """In percent. Bold: ours, mean ± sample deviation over seeds; [n]: the runs below. The others are published
numbers, and their recipes differ. It is not published which vehicles and parts of PartImageNet theirs are of, nor with
which decoder: no run of ours stands there."""


class LeftOut(ValueError):
    """Why a folder gives no row, in words."""


@dataclass(frozen=True)
class Run:
    """A finished run. weights: SHA-256 of those that it started from, or "random". config: eight digits, equal for runs
    that differ in weights, seed and place only. words: what the command said of the recipe."""

    folder: Path
    args: dict
    metrics: dict
    commit: str
    weights: str
    config: str
    words: str


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, on one test. name: of the weights. key: equal for what may stand in one
    column, `TASK SET` of a published set. title: the test in words. values: {metric: percents}."""

    number: int
    name: str
    key: str
    is_published: bool
    title: str
    runs: list[Run]
    values: dict[str, list[float]]

    def cell(self, metric: str) -> str:
        """Mean, sample deviation, number of seeds; one seed alone as such."""
        values, digits = self.values.get(metric, []), DIGITS[self.runs[0].args["task"]]
        spread = f"± {np.std(values, ddof=1):.{digits}f} ({len(values)} seeds)" if len(values) > 1 else "(1 seed)"
        return f"{np.mean(values):.{digits}f} {spread}" if values else ""


def main(args) -> dict:
    """Returns counts: runs, rows, left_out; and the file."""
    output, folders = Path(args.output), set()
    if output.suffix != ".md":
        raise InputError(f"--output {output}: the table is Markdown, so name a file that ends in .md")
    for path in args.runs:
        files = [file for name in ("args.json", "metrics.json") for file in Path(path).rglob(name)]
        if not files:
            raise InputError(f"no args.json and no metrics.json in or below {path}: give folders of main_finetune.py")
        folders |= {file.parent for file in files}
    runs, left_out = {}, []
    for folder in sorted(folders):
        try:
            run = read_run(folder)
            first = runs.setdefault((run.config, run.weights, run.args["seed"]), run)
            if first is not run:
                raise LeftOut(f"the same config, weights and seed as {first.folder}: it would count twice")
        except LeftOut as reason:
            left_out.append([f"`{folder}`", str(reason)])
            print(f"left out: {folder}: {reason}")
    groups = group_runs(list(runs.values()), weight_names(list(runs.values()), args.name))
    text = markdown(groups, left_out, json.loads(PUBLISHED.read_text(encoding="utf-8")))
    write_atomic(output, lambda opened: opened.write(text.encode("utf-8", "backslashreplace")))
    print(output)
    return {"runs": len(runs), "rows": len(groups), "left_out": len(left_out), "output": str(output)}


def read_run(folder: Path) -> Run:
    """Read a run; LeftOut where it is not finished, damaged, or does not say what its numbers come from."""
    args = read_object(folder / "args.json", "not the folder of a training run")
    if args.get("task") not in METRICS:
        raise LeftOut("not a run of main_finetune.py: args.json names no task that is known")
    metrics = read_object(folder / "metrics.json", "the run has not ended")
    commit = read_object(folder / "env.json", "no commit of the code").get("commit", "unknown")
    last = read_object(folder / "log.txt", "no log of the training", last_line=True)
    weights, main = str(args.get("weights_sha256", "")), METRICS[args["task"]][0]
    if not isinstance(args.get("seed"), int) or not isinstance(args.get("epochs"), int):
        raise LeftOut("args.json has no seed or no epochs")
    if weights != "random" and not re.fullmatch(r"[0-9a-f]{64}", weights):
        raise LeftOut("args.json has no weights_sha256 of the weights that the run started from")
    if commit == "unknown":
        raise LeftOut("env.json has no commit: the code was no git checkout")
    tested = {name: last[f"test_{name}"] for name in metrics if name.endswith(main) and f"test_{name}" in last}
    if not tested or last.get("epoch") != args["epochs"] - 1 or any(metrics[name] != x for name, x in tested.items()):
        raise LeftOut(f"log.txt does not end with the numbers of metrics.json after {args['epochs']} epochs")
    kept = {name: value for name, value in args.items() if name not in NOT_CONFIG}
    config = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
    given = {name: kept[name] for name in args.get("given", []) if name in kept}
    words = ", ".join(name if value is True else f"{name} {value}" for name, value in given.items())
    return Run(folder, args, metrics, str(commit), weights, config, words or "defaults")


def read_object(file: Path, if_missing: str, last_line: bool = False) -> dict:
    """A JSON object, of the whole file or of its last line."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text.splitlines()[-1] if last_line else text)
    except FileNotFoundError:
        raise LeftOut(f"no {file.name}: {if_missing}") from None
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise LeftOut(f"{file.name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise LeftOut(f"{file.name} cannot be read: it holds no JSON object")
    return found


def test_of(run: Run, prefix: str, protocol: str) -> tuple[str, bool, str]:
    """(key, whether it is a published test, title)."""
    task, name = run.args["task"], re.split(r" \(|: ", protocol)[0]
    counts = {
        "train": run.args.get("images"), "classes": run.args.get("num_classes"),
        "test": run.metrics.get(prefix + ("queries" if task == "reid" else "images")),
        "gallery": run.metrics.get(prefix + "gallery"),
    }  # fmt: skip
    usual = task != "attr" or run.args.get("attr_threshold") == THRESHOLD
    if usual and counts == published_counts(task, name):
        return f"{task} {name}", True, name
    words = ", ".join(f"{what} {count:,.0f}" for what, count in counts.items() if isinstance(count, int | float))
    title = f"{Path(str(run.args.get('data_path'))).name}, as {name}: {words}"
    return f"{task} {title} {protocol} {run.args.get('images_sha')}", False, title


def published_counts(task: str, name: str) -> dict | None:
    """What a run on a published set must count to stand beside published numbers; None for others."""
    counts, (set_name, _, size) = None, name.partition("/")
    own, ending = COUNTS.get(set_name, {}), f"_{size}" if size else ""
    if (task, name) == ("attr", "veri776"):
        counts = own["train"], 19, own["test"], None
    elif (task, name) == ("fgvc", "StanfordCars"):
        counts = own["training images"], own["classes"], own["test images"], None
    elif task == "reid" and f"query{ending}" in own:
        counts = own["train"], own["train identities"], own[f"query{ending}"], own[f"gallery{ending}"]
    elif task == "reid" and f"test{ending}" in own:  # one image of each vehicle is the gallery
        counts = own["train"], own["train identities"], own[f"test{ending}"] - int(size), None
    return counts and dict(zip(("train", "classes", "test", "gallery"), counts))


def weight_names(runs: list[Run], given: list[str]) -> dict[str, str]:
    """{weights: what they are called}, different for different weights."""
    names = {}
    for run in runs:
        told = "/".join(Path(str(run.args.get("finetune"))).parts[-2:])
        names.setdefault(run.weights, "random weights" if run.weights == "random" else told)
    for text in given:
        prefix, _, name = text.partition("=")
        found = [weights for weights in names if weights.startswith(prefix)]
        if not prefix or not name or len(found) != 1:
            known = ", ".join(weights[:16] for weights in names) or "none"
            raise InputError(f"--name {text}: write HASH=TEXT with the begin of one of the hashes: {known}")
        names[found[0]] = name
    twice = list(names.values())
    return {w: name if twice.count(name) == 1 else f"{name} {w[:8]}" for w, name in names.items()}


def group_runs(runs: list[Run], names: dict[str, str]) -> list[Group]:
    """Runs of one config on one test, ordered by the name of their weights; without what was re-ranked."""
    numbers: dict[tuple, int] = {}
    groups: dict[tuple, Group] = {}
    for run in sorted(runs, key=lambda run: (names[run.weights], run.args["task"], run.args["seed"])):
        number = numbers.setdefault((run.config, run.weights), len(numbers) + 1)
        for prefix in (name.removesuffix("protocol") for name in run.metrics if name.endswith("protocol")):
            values = {m: run.metrics.get(prefix + m) for m in METRICS[run.args["task"]]}
            values = {m: x for m, x in values.items() if isinstance(x, int | float) and math.isfinite(x)}
            if "reranked" not in prefix and METRICS[run.args["task"]][0] in values:
                test = test_of(run, prefix, str(run.metrics[prefix + "protocol"]))
                new = Group(number, names[run.weights], *test, [], {})
                group = groups.setdefault((number, test[0]), new)
                group.runs.append(run)
                for metric, value in values.items():
                    group.values.setdefault(metric, []).append(100 * value)
    return list(groups.values())


def markdown(groups: list[Group], left_out: list[list[str]], published: dict) -> str:
    """The page: both tables, a table for each other set, the runs behind our rows, and what was left out."""
    parts = ["# Results"]
    for heading, columns in TABLES.items():
        parts += [f"## {heading}", published_table(columns, groups, published)]
    parts += [WORDS, "\n".join(f"- {key}: {words}" for key, words in published["sources"].items())]
    others = {group.key: group.title for group in groups if not group.is_published}
    parts += ["## Other sets", "Not the published ones: compare within a table only."] if others else []
    for key, title in others.items():
        own = [group for group in groups if group.key == key]
        metrics = [m for m in METRICS[own[0].runs[0].args["task"]] if any(m in group.values for group in own)]
        rows = [[g.name, g.runs[0].words, *(g.cell(m) for m in metrics), f"[{g.number}]"] for g in own]
        parts += [f"### {title}", table(["pre-training", "recipe", *(NAMES.get(m, m) for m in metrics), "runs"], rows)]
    rows = [
        [f"[{group.number}]", run.args["task"], group.name, run.words, run.config, run.args["seed"],
         run.commit[:12] + run.commit[40:], run.weights[:16], f"`{run.folder}`"]
        for group in {group.number: group for group in groups}.values() for run in group.runs
    ]  # fmt: skip
    head = ["runs", "task", "pre-training", "recipe", "config", "seed", "commit", "weights, SHA-256", "folder"]
    parts += ["## Runs behind our rows", table(head, rows)] if rows else []
    parts += ["## Left out", table(["folder", "reason"], left_out)] if left_out else []
    return "\n\n".join(parts) + "\n"


def published_table(columns: dict, groups: list[Group], published: dict) -> str:
    """Published rows, then ours in bold: of the same weights a row for each recipe."""
    cells = [(key, metric, title) for key, (title, metrics) in columns.items() for metric in metrics]
    head = ["pre-training", *(f"{title} {NAMES.get(metric, metric)}" for _, metric, title in cells), "from"]
    rows = []
    for row in published["rows"]:
        texts = [str(row["numbers"].get(key, {}).get(metric, "")) for key, metric, _ in cells]
        rows += [[row["name"], *texts, row["source"]]] if any(texts) else []
    ours: dict[tuple, dict[str, Group]] = {}  # the groups of a row
    for group in (group for group in groups if group.is_published and group.key in columns):
        place = 0  # of the recipes of one test the first shares its row with the first of another
        while group.key in ours.get((group.name, place), {}):
            place += 1
        ours.setdefault((group.name, place), {})[group.key] = group
    for (name, _), row in sorted(ours.items()):
        texts = [row[key].cell(metric) if key in row else "" for key, metric, _ in cells]
        numbers = dict.fromkeys(f"[{group.number}]" for group in row.values())
        rows.append([f"**{name}**", *(f"**{text}**" if text else "" for text in texts), " ".join(numbers)])
    return table(head, rows)


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output).with_suffix(".metrics.json"))
