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
    add = parser.add_argument
    # fmt: off
    add("runs", nargs="+", metavar="RUN_OR_FOLDER", help="output folders of main_finetune.py, or folders of them")
    add("--output", required=True, help="Markdown file to write")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import hashlib
import json
import math
import re
from collections import defaultdict
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
WORDS = """In percent. Bold: ours, mean ± sample deviation over seeds. The others are published numbers, and their
recipes differ. It is not published which vehicles and parts of PartImageNet theirs are of, nor with which decoder:
no run of ours stands there."""


class LeftOut(ValueError):
    """Why a folder gives no row, in words."""


@dataclass(frozen=True)
class Run:
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
        metrics = METRICS[self.args["task"]]
        for prefix in (name.removesuffix("protocol") for name in self.metrics if name.endswith("protocol")):
            values = {m: self.metrics.get(prefix + m) for m in metrics}
            values = {m: x for m, x in values.items() if isinstance(x, int | float) and math.isfinite(x)}
            if "reranked" not in prefix and metrics[0] in values:
                yield self.heading(prefix), values

    def heading(self, prefix: str) -> str:
        """`TASK SET` of a published test with the published counts; else what the set is, and its counts."""
        task, protocol = self.args["task"], str(self.metrics[prefix + "protocol"])
        name = re.split(r" \(|: ", protocol)[0]
        test = "queries" if task == "reid" else "images"
        counts = {
            "train": self.args.get("images"), "classes": self.args.get("num_classes"),
            "test": self.metrics.get(prefix + test), "gallery": self.metrics.get(prefix + "gallery"),
        }  # fmt: skip
        usual = task != "attr" or self.args.get("attr_threshold") == THRESHOLD
        if usual and counts == published_counts(task, name):
            return f"{task} {name}"
        words = ", ".join(f"{what} {count:,.0f}" for what, count in counts.items() if isinstance(count, int | float))
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
                raise LeftOut(f"the same config, weights and seed as {first.folder}: it would count twice")
        except LeftOut as reason:
            left_out.append([f"`{folder}`", str(reason)])
            print(f"left out: {folder}: {reason}")
    tests: dict[str, dict[tuple, list]] = defaultdict(lambda: defaultdict(list))  # heading -> row -> (run, values)
    for run in sorted(runs.values(), key=lambda run: (run.name, run.args["seed"])):
        for heading, values in run.tests():
            tests[heading][run.weights, run.config].append((run, values))
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    headings = dict.fromkeys(key for row in published["rows"] for key in row["numbers"]) | dict.fromkeys(tests)
    parts = [
        "# Results",
        WORDS,
        *(one_test(heading, tests.get(heading, {}), published["rows"]) for heading in headings),
    ]
    parts += ["## Sources\n", "\n".join(f"- {key}: {words}" for key, words in published["sources"].items())]
    parts += ["## Left out", table(["folder", "reason"], left_out)] if left_out else []
    text = "\n\n".join(parts) + "\n"
    write_atomic(output, lambda opened: opened.write(text.encode("utf-8", "backslashreplace")))
    print(output)
    rows = sum(len(rows) for rows in tests.values())
    return {"runs": len(runs), "rows": rows, "left_out": len(left_out), "output": str(output)}


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


def one_test(heading: str, ours: dict[tuple, list], published: list[dict]) -> str:
    """Published rows of a test, then ours in bold: of the same weights a row for each recipe."""
    theirs = {row["name"]: row for row in published if heading in row["numbers"]}
    shown = [*(row["numbers"][heading] for row in theirs.values()), *(v for own in ours.values() for _, v in own)]
    task = heading.split()[0]
    metrics = [metric for metric in METRICS[task] if any(metric in values for values in shown)]
    rows = [
        [name, "", *(row["numbers"][heading].get(metric, "") for metric in metrics), row["source"]]
        for name, row in theirs.items()
    ]
    for (_, config), own in ours.items():
        cells = [cell([100 * values[m] for _, values in own if m in values], DIGITS[task]) for m in metrics]
        behind = (f"`{run.folder}` seed {run.args['seed']} commit {run.commit[:12]}{run.commit[40:]}" for run, _ in own)
        recipe = f"{own[0][0].words} ({config}; weights {own[0][0].weights[:16]})"
        rows.append([f"**{own[0][0].name}**", recipe, *(text and f"**{text}**" for text in cells), "<br>".join(behind)])
    head = ["pre-training", "recipe", *(NAMES.get(metric, metric) for metric in metrics), "from"]
    return f"## {heading}\n\n{table(head, rows)}"


def cell(values: list[float], digits: int) -> str:
    """Mean, sample deviation, number of seeds; one seed alone as such."""
    spread = f"± {np.std(values, ddof=1):.{digits}f} ({len(values)} seeds)" if len(values) > 1 else "(1 seed)"
    return f"{np.mean(values):.{digits}f} {spread}" if values else ""


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output).with_suffix(".metrics.json"))
