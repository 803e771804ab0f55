"""Runs of main_finetune.py beside published numbers, a table for each test set.

    python -m tools.results_table runs/ --output results.md

Writes OUTPUT (Markdown). Runs that differ in their seed only are one row, mean ± sample deviation. A run without its
config, seed, commit or the hash of its starting weights gives no row, and is listed with the reason. Published numbers
stand beside runs on sets of the published counts alone.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.results_table", __doc__)
    folders = "output folders of main_finetune.py, or folders of them"
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_FOLDER", help=folders)
    parser.add_argument("--output", required=True, help="Markdown file to write")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from datasets.tables import PUBLISHED as COUNTS
from finetune.reid import QUERIES
from metrics.attr import THRESHOLD
from metrics.intervals import SURE, Measure, paired_lead
from util.errors import InputError
from util.files import write_atomic

PUBLISHED = Path(__file__).with_name("published_results.json")
# no part of the recipe: where things lie, how fast it goes, the weights, the seed that rows are means over
NOT_CONFIG = (
    "seed finetune weights_sha256 data_path output_dir log_dir device num_workers pin_mem batch_size "
    "world_size resume given max_bad_ratio max_bad_steps allow_change print_freq save_freq save_minutes "
    "keep_checkpoints eval report compile grad_checkpoint local_rank dist_url dist_on_itp "
    "dist_timeout tests rerank rerank_k1 rerank_k2 rerank_lambda expand expand_k expand_alpha track_pool"
).split()
CHANGED = re.compile("reranked|expanded")  # of other tables than the plain numbers
PARTS = {"parts_mIoU": "mIoU of parts", "parts_mAcc": "mAcc of parts"}
METRICS = {  # of each task: digits, and {metric: title} in the order of the tables
    "reid": (1, {"mAP": "mAP", "R1": "R1", "R5": "R5"}),
    "attr": (2, {"mA": "mA", "accuracy": "Acc", "F1": "F1", "constant_mA": "mA of a constant"}),
    "fgvc": (1, {"top1": "top-1", "mean_class_accuracy": "mean per class", "majority": "largest class"}),
    "seg": (2, {"mIoU": "mIoU", "mAcc": "mAcc", "aAcc": "aAcc"} | PARTS),
}
VERI, CARS, ID, WILD = (COUNTS[name] for name in ("veri776", "StanfordCars", "vehicleid", "veriwild"))
SIZES = {  # training images, identities or classes, test images, gallery of published tests
    "attr veri776": (VERI["train"], 19, VERI["test"], None),
    "fgvc StanfordCars": (CARS["training images"], CARS["classes"], CARS["test images"], None),
    "reid veri776": (VERI["train"], VERI["train identities"], VERI["query"], VERI["gallery"]),
}
for size in (800, 1600, 2400):  # one image of each vehicle is the gallery
    SIZES[f"reid vehicleid/{size}"] = (ID["train"], ID["train identities"], ID[f"test_{size}"] - size, None)
for size in (3000, 5000, 10_000):
    test = WILD[f"query_{size}"], WILD[f"gallery_{size}"]
    SIZES[f"reid veriwild/{size}"] = (WILD["train"], WILD["train identities"], *test)
WORDS = """In percent. Bold: ours, mean ± sample deviation over seeds. The others are published numbers, and their
recipes differ. It is not published which vehicles and parts of PartImageNet theirs are of, nor with which decoder:
no run of ours stands there."""


class Run(NamedTuple):
    """A finished run. weights: SHA-256 of those that it started from, or "random". config: eight digits, equal for runs
    that differ in weights, seed and place only. words: what the command said."""

    folder: Path
    args: dict
    metrics: dict
    commit: str
    weights: str
    config: str
    words: str

    @property
    def name(self) -> str:
        file = "/".join(Path(str(self.args.get("finetune"))).parts[-2:])
        return "random weights" if self.weights == "random" else f"{file} {self.weights[:8]}"

    def tests(self):
        """(heading, {metric: value}) of each test set, without what was re-ranked."""
        _, metrics = METRICS[self.args["task"]]
        for prefix in (name.removesuffix("protocol") for name in self.metrics if name.endswith("protocol")):
            values = {m: self.metrics.get(prefix + m) for m in metrics}
            values = {m: x for m, x in values.items() if isinstance(x, int | float) and math.isfinite(x)}
            if not CHANGED.search(prefix) and next(iter(metrics)) in values:
                yield self.heading(prefix), values

    def prefixes(self, heading: str) -> list[str]:
        """Of the names of the numbers under this heading."""
        ends = [name.removesuffix("protocol") for name in self.metrics if name.endswith("protocol")]
        return [prefix for prefix in ends if not CHANGED.search(prefix) and self.heading(prefix) == heading]

    def heading(self, prefix: str) -> str:
        """`TASK SET` of a published test with the published counts; else what the set is, and its counts."""
        task, protocol = self.args["task"], str(self.metrics[prefix + "protocol"])
        names = "queries" if task == "reid" else "images", "gallery"
        counts = (*map(self.args.get, ("images", "num_classes")), *(self.metrics.get(prefix + name) for name in names))
        published = f"{task} {re.split(r' [(]|: ', protocol)[0]}"
        if counts == SIZES.get(published) and (task != "attr" or self.args.get("attr_threshold") == THRESHOLD):
            return published
        named = zip(("train", "classes", "test", "gallery"), counts)
        words = ", ".join(f"{what} {count:,.0f}" for what, count in named if isinstance(count, int | float))
        folder, images = Path(str(self.args.get("data_path"))).name, str(self.args.get("images_sha"))[:8]
        return f"{task} {folder}, as {protocol}; {words}; images {images}"


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
                raise InputError(f"the same config, weights and seed as {first.folder}: it would count twice")
        except InputError as reason:
            left_out.append([f"`{folder}`", str(reason)])
            print(f"left out: {folder}: {reason}")
    tests: dict[str, dict[tuple, list]] = defaultdict(lambda: defaultdict(list))  # heading -> row -> (run, values)
    for run in sorted(runs.values(), key=lambda run: (run.name, run.args["seed"])):
        for heading, values in run.tests():
            tests[heading][run.weights, run.config].append((run, values))
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    headings = dict.fromkeys(key for row in published["rows"] for key in row["numbers"]) | dict.fromkeys(tests)
    parts = ["# Results", WORDS, *(one_test(name, tests.get(name, {}), published["rows"]) for name in headings)]
    parts += ["## Sources\n", "\n".join(f"- {key}: {words}" for key, words in published["sources"].items())]
    parts += ["## Left out", table(["folder", "reason"], left_out)] if left_out else []
    text = "\n\n".join(parts) + "\n"
    write_atomic(output, lambda opened: opened.write(text.encode("utf-8", "backslashreplace")))
    rows = sum(len(rows) for rows in tests.values())
    return {"runs": len(runs), "rows": rows, "left_out": len(left_out), "output": str(output)}


def read_run(folder: Path) -> Run:
    """Read a run; InputError where it is not finished, damaged, or does not say what its numbers come from."""
    args = read_object(folder / "args.json", "not the folder of a training run")
    if args.get("task") not in METRICS:
        raise InputError("not a run of main_finetune.py: args.json names no task that is known")
    metrics = read_object(folder / "metrics.json", "the run has not ended")
    commit = str(read_object(folder / "env.json", "no commit of the code").get("commit", "unknown"))
    last = read_object(folder / "log.txt", "no log of the training", last_line=True)
    weights, main = str(args.get("weights_sha256", "")), next(iter(METRICS[args["task"]][1]))
    if not isinstance(args.get("seed"), int) or not isinstance(args.get("epochs"), int):
        raise InputError("args.json has no seed or no epochs")
    if weights != "random" and not re.fullmatch(r"[0-9a-f]{64}", weights):
        raise InputError("args.json has no weights_sha256 of the weights that the run started from")
    if commit == "unknown":
        raise InputError("env.json has no commit: the code was no git checkout")
    tested = {name: last[f"test_{name}"] for name in metrics if name.endswith(main) and f"test_{name}" in last}
    if not tested or last.get("epoch") != args["epochs"] - 1 or any(metrics[name] != x for name, x in tested.items()):
        raise InputError(f"log.txt does not end with the numbers of metrics.json after {args['epochs']} epochs")
    kept = {name: value for name, value in args.items() if name not in NOT_CONFIG}
    config = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
    given = {name: kept[name] for name in args.get("given", []) if name in kept}
    words = ", ".join(name if value is True else f"{name} {value}" for name, value in given.items())
    return Run(folder, args, metrics, commit, weights, config, words or "defaults")


def read_object(file: Path, if_missing: str, last_line: bool = False) -> dict:
    """A JSON object, of the whole file or of its last line."""
    try:
        text = file.read_text(encoding="utf-8")
        return dict(json.loads(text.splitlines()[-1] if last_line else text).items())
    except FileNotFoundError:
        raise InputError(f"no {file.name}: {if_missing}") from None
    except (OSError, ValueError, IndexError, RecursionError, AttributeError) as error:  # the last: no object
        raise InputError(f"{file.name} cannot be read: {error}") from None


def one_test(heading: str, ours: dict[tuple, list], published: list[dict]) -> str:
    """Published rows of a test, then ours in bold: of the same weights a row for each recipe."""
    theirs = [(row, row["numbers"][heading]) for row in published if heading in row["numbers"]]
    shown = [*(numbers for _, numbers in theirs), *(values for own in ours.values() for _, values in own)]
    digits, titles = METRICS[heading.split()[0]]
    titles = {metric: title for metric, title in titles.items() if any(metric in values for values in shown)}
    rows = [[row["name"], "", *(numbers.get(m, "") for m in titles), row["source"]] for row, numbers in theirs]
    for (_, config), own in ours.items():
        first = own[0][0]
        cells = (cell([100 * values[m] for _, values in own if m in values], digits) for m in titles)
        behind = (f"`{run.folder}` seed {run.args['seed']} commit {run.commit[:12]}{run.commit[40:]}" for run, _ in own)
        recipe = f"{first.words} ({config}; weights {first.weights[:16]})"
        rows.append([f"**{first.name}**", recipe, *(text and f"**{text}**" for text in cells), "<br>".join(behind)])
    parts = [f"## {heading}", table(["pre-training", "recipe", *titles.values(), "from"], rows), *leads(heading, ours)]
    return "\n\n".join(parts)


def leads(heading: str, ours: dict[tuple, list]) -> list[str]:
    """Which of our rows beats which, tested on the queries that both have answered; [] where no two have."""
    found = {}
    for (_, config), own in ours.items():
        answers = [read_queries(run.folder, prefix) for run, _ in own for prefix in run.prefixes(heading)]
        if len({identity for identity, _ in answers}) == 1 and all(identity for identity, _ in answers):
            identity, items = answers[0][0], np.stack([ap for _, ap in answers])
            found[f"{own[0][0].name} ({config})"] = identity, Measure(items[:, ~np.isnan(items).any(axis=0)])
    lines = []
    for (a, (of_a, first)), (b, (of_b, second)) in itertools.combinations(found.items(), 2):
        if of_a == of_b and first.items.shape[1] == second.items.shape[1]:
            if first.value() < second.value():
                (a, first), (b, second) = (b, second), (a, first)
            low, high, p = paired_lead(first, second)
            lead, count = 100 * (first.value() - second.value()), first.items.shape[1]
            word = "beats" if p < SURE else "does not differ clearly from"
            seeds = f"{len(first.items)} and {len(second.items)} seeds"
            what = f"mAP {lead:+.1f}, 95% {100 * low:.1f} to {100 * high:.1f}, p {p:.3f}; {count} queries, {seeds}"
            lines.append(f"- {a} {word} {b}: {what}")
    head = "Paired bootstrap over the queries, 2,000 draws; it does not know how far other seeds would differ:"
    return [head, "\n".join(lines)] if lines else []


def read_queries(folder: Path, prefix: str) -> tuple[str, np.ndarray | None]:
    """(identity of the test, AP of each query) that a run has left; ("", None) where it has not."""
    test = " ".join(prefix.split("_")).strip() or "test"
    try:
        with safe_open(folder / QUERIES, framework="np") as opened:
            return (opened.metadata() or {})[test], opened.get_tensor(f"{test} mAP")
    except (OSError, SafetensorError, KeyError):
        return "", None


def cell(values: list[float], digits: int) -> str:
    """Mean, sample deviation, number of seeds; one seed alone as such."""
    spread = f"± {np.std(values, ddof=1):.{digits}f} ({len(values)} seeds)" if len(values) > 1 else "(1 seed)"
    return f"{np.mean(values):.{digits}f} {spread}" if values else ""


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output).with_suffix(".metrics.json"))
