"""Finished runs of main_finetune.py, read back from their folders, and the sets their numbers belong to."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from datasets.tables import PUBLISHED
from metrics.attr import THRESHOLD

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
THINGS = {"reid": "vehicles", "attr": "attributes", "fgvc": "classes", "seg": "classes"}


class LeftOut(ValueError):
    """Why a folder gives no row, in words."""


@dataclass(frozen=True)
class Run:
    """One finished run: args as in args.json, metrics as in metrics.json.

    commit: of the code. weights: SHA-256 of the file it started from, or "random".
    """

    folder: Path
    args: dict
    metrics: dict
    commit: str
    weights: str

    @property
    def task(self) -> str:
        return self.args["task"]

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def config(self) -> str:
        """Eight digits, equal for runs that differ in weights, seed and place only."""
        kept = {name: value for name, value in self.args.items() if name not in NOT_CONFIG}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]

    def words(self) -> str:
        """What the command said of the recipe."""
        given = {name: self.args[name] for name in self.args.get("given", []) if name in self.args}
        parts = [
            name if value is True else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in given.items()
            if name not in NOT_CONFIG
        ]
        return ", ".join(parts) or "defaults"


@dataclass(frozen=True)
class TestNumbers:
    """What a run scored on one test.

    key: equal for what may stand in one column; `TASK SET` of a published set. title: what it is, in words.
    numbers: in percent.
    """

    key: str
    is_published: bool
    title: str
    numbers: dict[str, float]


def read_run(folder: Path) -> Run:
    """Read a run and check that it says what its numbers come from.

    Raises:
        LeftOut: it is not finished, not of main_finetune.py, or lacks config, seed, commit or weights.
    """
    args = _read_json(folder / "args.json", "not the folder of a training run")
    if args.get("task") not in METRICS:
        raise LeftOut("not a run of main_finetune.py: args.json names no task that is known")
    metrics = _read_json(folder / "metrics.json", "the run has not ended")
    if not isinstance(args.get("seed"), int):
        raise LeftOut("args.json has no seed")
    weights = str(args.get("weights_sha256", ""))
    if weights != "random" and not re.fullmatch(r"[0-9a-f]{64}", weights):
        raise LeftOut("args.json has no weights_sha256, the hash of the weights that the run started from")
    commit = _read_json(folder / "env.json", "no commit of the code").get("commit", "unknown")
    if commit == "unknown":
        raise LeftOut("env.json has no commit: the code was no git checkout, or older than this record")
    try:
        last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    except (OSError, IndexError, json.JSONDecodeError):
        raise LeftOut("log.txt is missing or its last line is damaged") from None
    main = METRICS[args["task"]][0]
    tested = {name: last[f"test_{name}"] for name in metrics if name.endswith(main) and f"test_{name}" in last}
    if not tested or last["epoch"] != args["epochs"] - 1 or any(metrics[name] != x for name, x in tested.items()):
        raise LeftOut(f"log.txt does not end with the numbers of metrics.json after {args['epochs']} epochs")
    return Run(folder, args, metrics, commit, weights)


def _read_json(file: Path, if_missing: str) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LeftOut(f"no {file.name}: {if_missing}") from None
    except (OSError, ValueError) as error:
        raise LeftOut(f"{file.name} cannot be read: {error}") from None


def numbers_of(run: Run) -> list[TestNumbers]:
    """Every test of a run, without what was re-ranked."""
    found = []
    for name, protocol in run.metrics.items():
        prefix = name.removesuffix("protocol")
        numbers = {m: run.metrics.get(prefix + m) for m in METRICS[run.task]}
        if prefix == name or "reranked" in prefix or numbers[METRICS[run.task][0]] is None:
            continue
        percent = {m: 100 * value for m, value in numbers.items() if value is not None}
        found.append(TestNumbers(*_test_of(run, prefix, protocol), percent))
    return found


def _test_of(run: Run, prefix: str, protocol: str) -> tuple[str, bool, str]:
    """(key, whether it is a published test, title)."""
    name = re.split(r" \(|: ", protocol)[0]
    counts = {
        "train": run.args.get("images"), "classes": run.args.get("num_classes"),
        "test": run.metrics.get(prefix + ("queries" if run.task == "reid" else "images")),
        "gallery": run.metrics.get(prefix + "gallery"),
    }  # fmt: skip
    usual = run.task != "attr" or run.args.get("attr_threshold") == THRESHOLD
    if usual and counts == published_counts(run.task, name):
        return f"{run.task} {name}", True, name
    words = {what: "?" if count is None else f"{count:,.0f}" for what, count in counts.items()}
    tested = f"{words['test']} queries" if run.task == "reid" else f"{words['test']} test images"
    if counts["gallery"]:
        tested += f" in {words['gallery']}"
    title = (
        f"{Path(run.args['data_path']).name}, as {name}: {words['train']} training images, "
        f"{words['classes']} {THINGS[run.task]}, {tested}"
    )
    return f"{run.task} {title} {protocol} {run.args.get('images_sha')}", False, title


def published_counts(task: str, name: str) -> dict | None:
    """What a run on a published set must count to stand beside published numbers; None for other names.

    PartImageNet has none: which of its vehicles and parts the published numbers are of is not known.
    """
    counts = None
    set_name, _, size = name.partition("/")
    own, ending = PUBLISHED.get(set_name, {}), f"_{size}" if size else ""
    if (task, name) == ("attr", "veri776"):
        counts = own["train"], 19, own["test"], None
    elif (task, name) == ("fgvc", "StanfordCars"):
        counts = own["training images"], own["classes"], own["test images"], None
    elif task == "reid" and f"query{ending}" in own:
        counts = own["train"], own["train identities"], own[f"query{ending}"], own[f"gallery{ending}"]
    elif task == "reid" and f"test{ending}" in own:  # one image of each vehicle is the gallery
        counts = own["train"], own["train identities"], own[f"test{ending}"] - int(size), None
    return counts and dict(zip(("train", "classes", "test", "gallery"), counts))
