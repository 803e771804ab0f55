"""Finished runs of main_finetune.py, read back from their folders, and the sets their numbers belong to."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from datasets.attr import PUBLISHED as ATTRIBUTE_COUNTS
from datasets.fgvc import PUBLISHED as CAR_COUNTS
from datasets.reid import PUBLISHED as REID_COUNTS
from metrics.attr import THRESHOLD

# no part of the recipe: where things lie, how fast it goes, the weights, the seed that rows are means over
NOT_CONFIG = (
    "seed finetune weights_sha256 data_path output_dir log_dir device num_workers pin_mem batch_size "
    "world_size resume given max_bad_ratio max_bad_steps allow_change print_freq save_freq save_minutes "
    "keep_checkpoints eval eval_every report compile grad_checkpoint local_rank dist_url dist_on_itp "
    "dist_timeout tests rerank rerank_k1 rerank_k2 rerank_lambda"
).split()
METRICS = {  # of each task, in the order of the tables; the first is drawn
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
        names = [name for name in self.args.get("given", []) if name not in NOT_CONFIG]
        parts = [f"{name} {_plain(self.args[name])}".removesuffix(" True") for name in names if name in self.args]
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


def find_folders(paths: list[str]) -> list[Path]:
    """Folders with args.json or metrics.json, at and below `paths`."""
    found = {file.parent for path in paths for name in ("args.json", "metrics.json") for file in Path(path).rglob(name)}
    return sorted(found)


def read_run(folder: Path) -> Run:
    """Read a run and check that it says what its numbers come from.

    Raises:
        LeftOut: it is not finished, not of main_finetune.py, or lacks config, seed, commit or weights.
    """
    if not (folder / "args.json").is_file():
        raise LeftOut("no args.json: not the folder of a training run")
    args = _read_json(folder / "args.json")
    if args.get("task") not in METRICS:
        raise LeftOut("not a run of main_finetune.py: args.json names no task that is known")
    if not (folder / "metrics.json").is_file():
        raise LeftOut("no metrics.json: the run has not ended")
    metrics = _read_json(folder / "metrics.json")
    if not isinstance(args.get("seed"), int):
        raise LeftOut("args.json has no seed")
    weights = str(args.get("weights_sha256", ""))
    if weights != "random" and not re.fullmatch(r"[0-9a-f]{64}", weights):
        raise LeftOut("args.json has no weights_sha256, the hash of the weights that the run started from")
    environment = _read_json(folder / "env.json") if (folder / "env.json").is_file() else {}
    commit = str(environment.get("commit", "unknown"))
    if commit == "unknown":
        raise LeftOut("env.json has no commit: the code was no git checkout, or older than this record")
    _check_log(folder, args, metrics)
    return Run(folder, args, metrics, commit, weights)


def _check_log(folder: Path, args: dict, metrics: dict) -> None:
    """The numbers are of the end of the run that args.json describes."""
    try:
        last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    except (OSError, IndexError, json.JSONDecodeError):
        raise LeftOut("log.txt is missing or its last line is damaged") from None
    named = METRICS[args["task"]][0]
    tested = {name.removeprefix("test_"): value for name, value in last.items() if name.startswith("test_")}
    same = [tested[name] == value for name, value in metrics.items() if name.endswith(named) and name in tested]
    if last.get("epoch") != args.get("epochs", 0) - 1 or not same or not all(same):
        raise LeftOut(f"log.txt does not end with the numbers of metrics.json after {args.get('epochs')} epochs")


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LeftOut(f"{file.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise LeftOut(f"{file.name} holds no JSON object")
    return content


def numbers_of(run: Run) -> list[TestNumbers]:
    """Every test of a run, without what was re-ranked.

    Raises:
        LeftOut: metrics.json has none of the task's numbers.
    """
    found = []
    for name, protocol in run.metrics.items():
        prefix = name.removesuffix("protocol")
        if prefix == name or "reranked" in prefix:
            continue
        numbers = {m: run.metrics.get(prefix + m) for m in METRICS[run.task]}
        numbers = {m: 100 * v for m, v in numbers.items() if isinstance(v, (int, float))}
        if METRICS[run.task][0] in numbers:
            found.append(_test_numbers(run, prefix, protocol, numbers))
    if not found:
        raise LeftOut(f"metrics.json has no {METRICS[run.task][0]} with its protocol")
    return found


def _test_numbers(run: Run, prefix: str, protocol: str, numbers: dict) -> TestNumbers:
    name = re.split(r" \(|: ", protocol)[0]
    counts = {
        "train": run.args.get("images"), "classes": run.args.get("num_classes"),
        "test": run.metrics.get(prefix + ("queries" if run.task == "reid" else "images")),
        "gallery": run.metrics.get(prefix + "gallery"),
    }  # fmt: skip
    usual = run.task != "attr" or run.args.get("attr_threshold") == THRESHOLD
    if usual and counts == published_counts(run.task, name):
        return TestNumbers(f"{run.task} {name}", True, name, numbers)
    tested = f"{_count(counts['test'])} queries" if run.task == "reid" else f"{_count(counts['test'])} test images"
    if counts["gallery"]:
        tested += f" in {_count(counts['gallery'])}"
    title = (
        f"{Path(run.args['data_path']).name}, as {name}: {_count(counts['train'])} training images, "
        f"{_count(counts['classes'])} {THINGS[run.task]}, {tested}"
    )
    key = f"{run.task} {title} {protocol} {run.args.get('images_sha')}"
    return TestNumbers(key, False, title, numbers)


def published_counts(task: str, name: str) -> dict | None:
    """What a run on a published set must count to stand beside published numbers; None for other names.

    PartImageNet has none: which of its vehicles and parts the published numbers are of is not known.
    """
    if task == "attr" and name == "veri776":
        return {"train": ATTRIBUTE_COUNTS["train"], "classes": 19, "test": ATTRIBUTE_COUNTS["test"], "gallery": None}
    if task == "fgvc" and name == "StanfordCars":
        images = CAR_COUNTS["training images"], CAR_COUNTS["classes"], CAR_COUNTS["test images"]
        return dict(zip(("train", "classes", "test", "gallery"), (*images, None)))
    set_name, _, size = name.partition("/")
    if task != "reid" or set_name not in REID_COUNTS:
        return None
    own, ending = REID_COUNTS[set_name], f"_{size}" if size else ""
    first = {"train": own["train"], "classes": own["train identities"]}
    if f"query{ending}" in own:
        return first | {"test": own[f"query{ending}"], "gallery": own[f"gallery{ending}"]}
    if f"test{ending}" in own:  # one image of each vehicle is the gallery
        return first | {"test": own[f"test{ending}"] - int(size), "gallery": None}
    return None


def _count(number) -> str:
    return f"{number:,.0f}" if isinstance(number, (int, float)) else "?"


def _plain(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
