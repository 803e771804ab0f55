"""What each rule makes of the same features, so that a reader can say which one produced a published number.

    python -m tools.audit --data_path VeRi --checkpoint runs/veri/model.pth --output audit
    python -m tools.audit --data_path reid.csv --features query.npy gallery.npy --output audit
    python -m tools.audit --data_path reid.csv --ranks found.csv --output audit
    python -m tools.audit --run runs/veri --output audit

Writes OUTPUT/audit.md and metrics.json: a row a rule, each with its protocol line. Rules: the set's own; the junk
filter by camera off; queries in the gallery, with their own file left out or counted; one random gallery image a
vehicle; re-ranking with the constants of its paper and of TransReID; expansion by neighbours. Of a run: the best epoch
on the test beside the last. A file of ranks has the columns query and gallery, paths as the set lists them, a row a
pair, of each query the most similar first (.jsonl: gallery may be a list); what a list leaves out comes behind it, in
the order of the gallery. Ranks alone cannot be re-ranked, expanded, or searched among the queries.
"""

import argparse
from pathlib import Path

from util.cli import Parser, check_numbers, parse_input_size, run_tool
from util.errors import REID_FORMATS, InputError


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.audit", __doc__)
    add = parser.add_argument
    add("--data_path", default="", help="set or table, as for main_finetune.py --task reid (default none: only --run)")
    add("--format", default="auto", choices=REID_FORMATS, help="its layout (default auto: by its files)")
    add("--tests", default=None, nargs="+", metavar="NAME", help="tests of the set (default all)")
    add("--checkpoint", default="", help="features: a model of --task reid, or an encoder as it is (default none)")
    files = "features: .npy of the queries and of the gallery, rows as the set lists them (default none)"
    add("--features", default=None, nargs="+", metavar="NPY", help=files)
    add("--ranks", default="", help="instead of features: table .csv .tsv .jsonl of what was found (default none)")
    add("--run", default="", help="folder of a run, whose log.txt has test numbers of its epochs (default none)")
    add("--input_size", default=None, help="pixels of an encoder: one side, or H,W (default the file's)")
    add("--expand_k", default=10, type=int, help="neighbours that an expansion takes up (default 10)")
    add("--expand_alpha", default=3.0, type=float, help="weights are cosines to this power (default 3)")
    add("--seed", default=0, type=int, help="seed of the ten draws of galleries (default 0)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--output", required=True, help="folder of audit.md and metrics.json")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from datasets.reid import ReidData, ReidImages, read_reid
from datasets.tables import iterate_table
from finetune.reid import Reid, across_sets, extract_reid, renumber_cameras
from finetune.task import load_model
from metrics.reid import FeatureSet, Protocol, evaluate, protocols_of
from metrics.rerank import BLOCK_NUMBERS
from models_vit import load_encoder
from tools.results_table import CHANGED, table
from util.dist import pick_device
from util.fetch import fetch
from util.files import make_folder, read_array, write_atomic
from util.precision import scoring

RERANK = (20, 6, 0.3), (50, 15, 0.3)  # of the paper, of TransReID's code
Test = tuple[FeatureSet, FeatureSet | None, int]  # queries, gallery, how many images have no features


def main(args) -> dict:
    """Returns the rows, and what could not be said with the reason."""
    sources = [name for name in ("checkpoint", "features", "ranks") if getattr(args, name)]
    if len(sources) != bool(args.data_path) or not (sources or args.run):
        given = ", ".join(f"--{name}" for name in ["data_path"] * bool(args.data_path) + sources) or "nothing"
        raise InputError(f"got {given}: give --data_path with one of --checkpoint, --features, --ranks, or --run alone")
    check_numbers(args, at_least_one="expand_k batch_size", not_negative="expand_alpha seed num_workers")
    rows, skipped = [], {}
    make_folder(args.output)
    if args.run:
        rows += run_rows(Path(args.run), skipped)
    if args.data_path:
        data = read_reid(args.data_path, args.format, need_train=False)
        if unknown := [name for name in args.tests or () if name not in data.tests]:
            raise InputError(f"--tests {unknown[0]}: {args.data_path} has {', '.join(data.tests)}")
        data = replace(data, tests={name: data.tests[name] for name in args.tests or data.tests})
        print(f"data: {args.data_path} as {data.name}", *(f"  {note}" for note in data.notes), sep="\n", flush=True)
        rows += set_rows(args, data, skipped)
    head = ["rule", "mAP", "against the first", "R1", "R5", "queries", "protocol"]
    parts = [f"# What each rule makes of {args.data_path or args.run}", "In percent."]
    for test in dict.fromkeys(row["test"] for row in rows):
        parts += [f"## {test}", table(head, [cells(row) for row in rows if row["test"] == test])]
    parts += ["## Not said", table(["rule", "reason"], [*skipped.items()])] if skipped else []
    text = "\n\n".join(parts) + "\n"
    write_atomic(Path(args.output) / "audit.md", lambda opened: opened.write(text.encode("utf-8", "backslashreplace")))
    print(text, flush=True)
    return {"data_path": args.data_path, "run": args.run, "rows": rows, "not_said": skipped}


def cells(row: dict) -> list[str]:
    """A row of the table."""
    spread = f" ± {100 * row['mAP_std']:.2f}" if "mAP_std" in row else ""
    numbers = [f"{100 * row[name]:.2f}" if name in row else "" for name in ("R1", "R5")]
    counted = f"{row['queries']:g}" if "queries" in row else ""
    first = [row["rule"], f"{100 * row['mAP']:.2f}{spread}", f"{100 * row['gain']:+.2f}"]
    return [*first, *numbers, counted, row["protocol"]]


def set_rows(args, data: ReidData, skipped: dict[str, str]) -> Iterator[dict]:
    """Every rule on every test of a set."""
    device, similar, across = pick_device(args.device), None, None
    if args.checkpoint:
        tests, across = model_features(args, data, device)
    elif len(data.tests) > 1:
        raise InputError(f"{args.data_path} has the tests {', '.join(data.tests)}: choose one by --tests")
    else:
        (test, pair) = next(iter(data.tests.items()))
        if args.features:
            tests = {test: file_features(args, pair)}
        else:
            tests, similar = {test: (*map(numbered, pair), 0)}, listed_blocks(args, *pair, skipped)
    rules = protocols_of(data.name, data.tests, seed=args.seed)
    for test, (query, gallery, gone) in tests.items():
        base, first = replace(rules[test], across=across), None
        if gone:  # the words of `main_finetune.py --eval`
            base = replace(base, name=f"{base.name}/{gone}-unreadable-left-out")
        for rule, protocol, *sides in rules_of(base, query, gallery, args):
            if similar and (
                protocol.rerank or protocol.expand or sides[1] is not None and len(sides[1].pids) != len(gallery.pids)
            ):
                skipped[rule] = "ranks alone cannot say: give features"
                continue
            numbers = evaluate(protocol, *sides, device=device, similar=similar)
            first = numbers["mAP"] if first is None else first
            about = {"test": test, "rule": rule, "protocol": protocol.line(), "gain": numbers["mAP"] - first}
            yield about | numbers


def rules_of(base: Protocol, query: FeatureSet, gallery: FeatureSet | None, args) -> Iterator[tuple]:
    """(what is done, protocol, queries, gallery or None: drawn) of each rule, the set's own first."""
    joined = query
    if gallery is not None:
        more = query.take(np.flatnonzero(~np.isin(query.files, gallery.files)))
        features = torch.cat([gallery.features, more.features])
        joined = FeatureSet(features, *(np.concatenate(pair) for pair in zip(gallery[1:], more[1:])))
    own = (query, gallery)
    yield "as the set's protocol says", base, *own
    if base.remove_same_camera:
        name = f"{base.name}/same-camera-kept"
        yield "junk filter by camera off", replace(base, name=name, remove_same_camera=False), *own
    name = f"{base.name}/queries-in-gallery"
    yield "queries join the gallery, each without its own file", replace(base, name=name, draws=0), query, joined
    counted = replace(base, name=f"{name}/own-file-counts", draws=0, remove_same_camera=False)
    yield "queries join the gallery, their own file counts", counted, query._replace(files=None), joined
    if gallery is not None:
        yield "one random gallery image a vehicle", replace(base, draws=10, seed=args.seed), *own
    for constants in RERANK:
        yield "re-ranked with {}, {}, {:g}".format(*constants), replace(base, rerank=constants), *own
    for method, words in {"aqe": "AQE", "alpha": "alpha-QE", "dba": "DBA"}.items():
        yield words, replace(base, expand=((method,), args.expand_k, args.expand_alpha)), *own


def model_features(args, data: ReidData, device) -> tuple[dict[str, Test], tuple[str, str] | None]:
    """Features of all tests, as `main_finetune.py --eval` makes them, and what `across_sets` says of the model."""
    args.checkpoint = str(fetch(args.checkpoint))
    found = load_model(args.checkpoint, device, parse_input_size(args.input_size) if args.input_size else None)
    if found.task not in ("", "reid"):
        raise InputError(f"{args.checkpoint} is a {found.config['kind']}: give a model of --task reid, or an encoder")
    model, config, tests = found.model, found.config if found.task else Reid.alone, {}
    if found.task:
        data = renumber_cameras(data, config, args.checkpoint)
    else:  # its class token
        encoder = load_encoder(args.checkpoint, model.img_size, device, fc_norm=False)
        model = Reid.model_from(encoder, config).to(device)
    across = across_sets(config, data, args.data_path)
    print(f"model {args.checkpoint}:\n{found.report}", flush=True)
    with scoring(model):
        for test, pair in data.tests.items():
            parts = zip(("query", "gallery"), pair)
            loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
            sides = [images and extract_reid(model, images, f"{test}: {what}", **loading) for what, images in parts]
            rows = [side and FeatureSet.of(side.values, side.images) for side in sides]
            tests[test] = *rows, sum(len(side.unreadable) for side in sides if side)
    return tests, across


def file_features(args, pair: tuple[ReidImages, ReidImages | None]) -> Test:
    """Features of .npy files; rows that are not finite, as `tools.extract` has them, are of unreadable images."""
    parts, gone, widths = [part for part in pair if part is not None], 0, set()
    if len(args.features) != len(parts):
        raise InputError(f"--features {len(args.features)} files: {args.data_path} needs {len(parts)}, a file a part")
    sides: list[FeatureSet | None] = []
    for file, images, what in zip(args.features, parts, ("query", "gallery")):
        values = np.array(read_array(file, "write it again by numpy.save"))
        if values.ndim != 2 or values.dtype.kind != "f" or len(values) != len(images):
            made = f"{values.dtype} of {' x '.join(map(str, values.shape))}"
            raise InputError(
                f"{file} is {made}: give floats, a row for each of the {len(images)} {what} images in order"
            )
        kept = np.flatnonzero(np.isfinite(values).all(axis=1))
        gone, widths = gone + len(values) - len(kept), widths | {values.shape[1]}
        sides.append(FeatureSet.of(torch.from_numpy(values[kept]).float(), images.take(kept)))
    if len(widths) > 1:
        raise InputError(f"--features have {' and '.join(map(str, sorted(widths)))} columns: give those of one model")
    return (*sides, None)[0], (*sides, None)[1], gone


def numbered(images: ReidImages | None) -> FeatureSet | None:
    """Images with their numbers in place of features."""
    return images and FeatureSet.of(torch.arange(len(images))[:, None], images)


def listed_blocks(args, query: ReidImages, gallery: ReidImages | None, skipped: dict[str, str]) -> Callable:
    """What `rank` takes as `similar`, from a file of ranks: minus the place in a query's list."""
    if gallery is None:
        raise InputError(f"--ranks: {args.data_path} draws its galleries, so that no list fits: give features")
    parts = {"query": query, "gallery": gallery}
    number = {what: {images.paths.relative(i): i for i in range(len(images))} for what, images in parts.items()}
    if twice := [what for what, images in parts.items() if len(number[what]) < len(images)]:
        raise InputError(
            f"--ranks: {args.data_path} lists a {twice[0]} image twice, so that its path names none of them"
        )
    lists = [array("i") for _ in range(len(query))]
    for count, row in enumerate(iterate_table(args.ranks, ("gallery",), ": a file of ranks has both", "query"), 1):
        found = row["gallery"] if isinstance(row["gallery"], list) else [row["gallery"]]
        for what, name in (("query", row["query"]), *(("gallery", name) for name in found)):
            if name not in number[what]:
                shown = f"{args.ranks}, row {count}: '{str(name)[:80]}' is no {what} image of {args.data_path}"
                raise InputError(f"{shown}: give paths as the set lists them")
        lists[number["query"][row["query"]]].extend(number["gallery"][name] for name in found)
    for i, own in enumerate(lists):
        if not own or len(set(own)) < len(own):
            what = "twice the same image for" if own else "no row for"
            raise InputError(f"{args.ranks} has {what} {query.paths.relative(i)}: give each query one list")
    if short := sum(len(own) < len(gallery) for own in lists):
        skipped["ranks beyond the end of a list"] = f"{short} of {len(lists)} lists are shorter than the gallery"

    def similar(queries: torch.Tensor, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        for part in queries[:, 0].split(max(1, BLOCK_NUMBERS // len(gallery))):
            block = np.full((len(part), len(gallery)), -len(gallery), np.float32)
            for to, i in zip(block, part.tolist()):
                to[lists[i]] = -np.arange(len(lists[i]))
            yield torch.from_numpy(block[:, rows[:, 0].numpy()])

    return similar


def run_rows(folder: Path, skipped: dict[str, str]) -> Iterator[dict]:
    """Of each test the best epoch by the test itself, beside the last one, from the records of log.txt."""
    log, damaged, epochs = folder / "log.txt", 0, {}
    if not log.is_file():
        raise InputError(f"--run {folder} has no log.txt: give the output folder of a run")
    for line in log.read_text(errors="replace").splitlines():
        try:
            record = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            damaged += 1
            continue
        for key, value in record.items():
            name = key.removeprefix("test_").removesuffix("mAP")
            is_number = isinstance(value, float) and np.isfinite(value) and isinstance(record.get("epoch"), int)
            if key == f"test_{name}mAP" and is_number and not CHANGED.search(name):
                epochs.setdefault(name, {})[record["epoch"]] = value, record
    if damaged:
        skipped[str(log)] = f"{damaged} damaged lines are left out"
    for name, found in epochs.items():
        if len(found) < 2:
            skipped[f"best epoch against last, {name or 'test'}"] = f"{log} has test numbers of one epoch only"
            continue
        last, best = max(found), max(found, key=lambda epoch, of=found: of[epoch][0])
        for words, epoch in (("the last", last), (f"the best of {len(found)} by this test itself", best)):
            value, record = found[epoch]
            keys = [key for key in ("R1", "R5", "queries") if f"test_{name}{key}" in record]
            told = {key: record[f"test_{name}{key}"] for key in keys}
            about = {"test": f"{folder} {name.strip('_')}".strip(), "rule": f"epoch {epoch}, {words}", "mAP": value}
            protocol = str(record.get(f"test_{name}protocol", "log.txt names no protocol"))
            yield about | {"protocol": protocol, "gain": value - found[last][0]} | told
    if not epochs:
        skipped["best epoch against last"] = f"{log} has no test numbers"


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
