"""Compare frozen encoders on your data, under one protocol, with intervals and paired tests.

    python -m tools.compare --encoders mae=mae/encoder.pth cgd=run0/encoder.pth,run1/encoder.pth histogram \\
        --reid vehicles.csv --group type --labels cars.csv --label_column make body --parts PARTS --output compared

An encoder is NAME=SPEC[,SPEC...] or SPEC; several files are seeds of one row. SPEC: a file of weights (also a re-id
model of main_finetune.py), open_clip:MODEL@WEIGHTS, random:vit_tiny_patch16, histogram. Writes OUTPUT/compared.md,
compared.json (seeds, p-values) and metrics.json. Each row is tested against the first one on the
same queries or pictures.
"""

import argparse
from pathlib import Path

from util.cli import Parser, check_numbers, parse_input_size, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.compare", __doc__)
    add = parser.add_argument
    add("--encoders", nargs="+", required=True, metavar="[NAME=]SPEC[,SPEC]", help="rows, the first is what others "
        "are tested against")  # fmt: skip
    add("--reid", default=None, help="re-identification set or table, as for main_finetune.py (default none)")
    add("--group", default=None, help="column of the --reid table: numbers for each value too (default none)")
    add("--labels", default=None, help="labelled pictures, as for main_linprobe.py (default none)")
    add("--label_column", nargs="+", default=["label"], help="label columns (default label)")
    add("--protocol", nargs="+", default=["knn"], choices=("knn", "linear"), help="of --labels (default knn)")
    add("--parts", default=None, help="set with masks, as for --task seg: linear probe on tokens (default none)")
    add("--parts_size", default="256", help="pixels of its pictures: one side, or H,W (default 256)")
    add("--input_size", default=None, help="pixels: one side, or H,W (default: each encoder's own)")
    add("--k", default=20, type=int, help="neighbours of knn (default 20)")
    add("--output", default="compared", help="folder (default compared)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import itertools
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from datasets.fgvc import list_labelled
from datasets.images import boxed
from datasets.items import WholeImages
from datasets.path_list import printable
from datasets.reid import read_reid
from datasets.seg import PartsTestItems, read_parts
from datasets.tables import iterate_table
from engine_encoders import Encoder, load_any
from engine_extract import extract_features
from finetune.task import load_model
from metrics.intervals import SURE, Measure, paired_p
from metrics.open_set import accepted_right, open_answers
from metrics.probe import knn_predict, linear_fit, linear_predict
from metrics.reid import FeatureSet, protocols_of, rank
from metrics.seg import confusion_matrix
from metrics.whitening import Whitening
from util.checkpoint import read_checkpoint
from util.cli import Progress
from util.dist import pick_device
from util.errors import InputError
from util.files import make_folder, write_atomic, write_json
from util.precision import scoring
from util.pretrained import read_config

DIR = "DIR@FAR1%"  # found and accepted, where 1% of the queries without their vehicle in the gallery are
PARTS, PARTS_L2 = "mIoU of parts", 1e-2
Found = dict[tuple[str, str], np.ndarray]  # (measure, read-out) -> what `Measure.items` holds of one seed


def main(args) -> dict:
    check_numbers(args, at_least_one="k batch_size", not_negative="num_workers")
    rows = parse_rows(args.encoders)
    device, jobs = pick_device(args.device), []
    args.loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    if args.reid:
        jobs.append(partial(judge_search, args, read_reid(args.reid, need_train=False), read_groups(args)))
    if args.labels:
        tables = {column: list_labelled(args.labels, column) for column in args.label_column}
        jobs.append(partial(judge_labels, args, tables))
    if args.parts:
        jobs.append(partial(judge_parts, args, read_parts(args.parts, ("train", "val"))))
    if not jobs:
        raise InputError("nothing to compare on: give --reid, --labels or --parts")
    make_folder(Path(args.output))
    size = parse_input_size(args.input_size) if args.input_size else None
    measures = {}
    for name, specs in rows.items():
        seeds: list[Found] = []
        for spec in specs:
            encoder = open_encoder(spec, size, device)
            print(f"{name}: {spec}", flush=True)
            with scoring(encoder):
                found = [job(spec, encoder, device) for job in jobs]
                seeds.append(dict(item for part in found for item in part.items()))
        if any(seed.keys() != seeds[0].keys() for seed in seeds):
            raise InputError(f"{name}: its files have different read-outs: give encoders of one kind")
        for what, read_out in seeds[0]:
            items = np.stack([seed[what, read_out] for seed in seeds])
            measures[name, what, read_out] = Measure(items, first=int(what == PARTS))
    text, facts, means = tell(rows, measures)
    write_atomic(Path(args.output) / "compared.md", lambda opened: opened.write(text.encode()))
    write_json(Path(args.output) / "compared.json", facts)
    print(text)
    return means


def parse_rows(words: list[str]) -> dict[str, list[str]]:
    """{name: its files}."""
    rows = {}
    for word in words:
        name, _, specs = word.rpartition("=")
        name = name or Path(specs).name
        if name in rows or not specs:
            raise InputError(f"--encoders {word}: give each row a name of its own and a file, as NAME=FILE")
        rows[name] = specs.split(",")
    return rows


def open_encoder(spec: str, size, device: torch.device) -> Encoder:
    """`load_any`, or the feature of a re-identification model that was fine-tuned."""
    file = Path(spec)
    if file.is_file() and read_config(file, read_checkpoint(file)).get("task") == "reid":
        model = load_model(file, device, size).model
        return Encoder(lambda imgs: {"feature": model.encode(imgs).float()}, model.base.img_size)
    return load_any(spec, size, device)


def features_of(args, encoder: Encoder, paths, indices: np.ndarray, title: str, device) -> tuple[dict, np.ndarray]:
    """({read-out: [n, D] float32 on the device}, the rows of `indices` that could be read)."""
    images, progress = WholeImages(paths, indices, encoder.img_size), Progress(title, len(indices))
    found, problems = extract_features(lambda imgs, _: encoder.encode(imgs), images, device, progress, **args.loading)
    progress.close()
    for index, problem in problems.items():
        print(f"unreadable, left out: {printable(paths.relative(index))}: {problem}")
    kept = np.flatnonzero(~np.isin(indices, list(problems)))
    for name, values in found.items():
        if not np.isfinite(values[kept]).all():
            raise InputError(f"{title}: the feature {name} is not finite: the model has diverged")
    return {name: torch.from_numpy(values[kept]).to(device) for name, values in found.items()}, kept


def read_groups(args) -> dict:
    """{path, with its box: value of --group} of the re-id table."""
    if not args.group:
        return {}
    if not Path(args.reid).is_file():
        raise InputError(f"--group {args.group}: {args.reid} is no table: drop it")
    rows = iterate_table(args.reid, (args.group,))
    return {boxed(row["path"], row.get("box")): str(row[args.group]) for row in rows}


def judge_search(args, data, groups: dict[str, str], spec: str, encoder: Encoder, device) -> Found:
    """AP and first hit of every query; beside the features as they are, whitened over the train images."""
    found: Found = {}
    rules = protocols_of(data.name, data.tests)
    seen = None
    if data.train is not None and len(data.train):
        seen, _ = features_of(args, encoder, data.train.paths, np.arange(len(data.train)), "re-id train", device)
    for test, (query, gallery) in data.tests.items():
        if gallery is None:
            raise InputError(f"{args.reid}: its gallery is drawn, query by query numbers need one that is given")
        sides = [features_of(args, encoder, s.paths, np.arange(len(s)), "re-id", device) for s in (query, gallery)]
        images = [side.take(kept) for side, (_, kept) in zip((query, gallery), sides)]
        title = "" if test == "test" else f" {test}"
        for name in sides[0][0]:
            q, g = (values[name] for values, _ in sides)
            ways = {"": (q, g)}
            if seen is not None:
                white = Whitening.of(seen[name])
                ways[" whitened"] = (white(q), white(g))
            for way, pair in ways.items():
                rows = [FeatureSet.of(x.cpu(), side) for x, side in zip(pair, images)]
                values = rank(rules[test], *rows).by_query()
                scored = np.flatnonzero(~np.isnan(values["mAP"]))
                values = {what: of[scored] for what, of in values.items()}
                values[DIR] = accepted_right(open_answers(rules[test], *rows, "cosine"), 0.01)
                kinds = [groups.get(images[0].paths.entry(i), "") for i in scored]
                for group, what in itertools.product(["", *sorted(set(kinds) - {""})], values):
                    chosen = np.array([group in ("", kind) for kind in kinds])
                    found[f"{what}{title}{' ' if group else ''}{group}", name + way] = values[what][chosen]
    return found


def judge_labels(args, tables: dict, spec: str, encoder: Encoder, device) -> Found:
    """Right or wrong for every val picture, by the nearest train pictures and by a logistic fit."""
    found: Found = {}
    paths = next(iter(tables.values())).paths
    features, kept = features_of(args, encoder, paths, np.arange(len(paths)), "labels", device)
    place = np.full(len(paths), -1)
    place[kept] = np.arange(len(kept))
    for column, table in tables.items():
        labels = torch.from_numpy(table.labels).to(device)
        train, val = (rows[place[rows] >= 0] for rows in (table.splits["train"], table.splits["val"]))
        for name, values in features.items():
            x = [values[torch.from_numpy(place[rows]).to(device)] for rows in (train, val)]
            task = (x[0], labels[train], x[1], len(table.classes))
            for protocol in args.protocol:
                scores = knn_predict(*task, args.k) if protocol == "knn" else linear_predict(*task)[0]
                right = scores.argmax(dim=1) == labels[val]
                found[f"{protocol} {column}", name] = right.cpu().numpy().astype(np.float64)
    return found


@torch.no_grad()
def judge_parts(args, data, spec: str, encoder: Encoder, device) -> Found:
    """Confusion of every val picture by a linear layer on patch tokens: fitted on the train pictures (a patch is what
    most of its pixels are), its logits bilinear to the picture's size. {} where there are no tokens."""
    if encoder.vit is None:
        return {}
    size, K = parse_input_size(args.parts_size), len(data.space.names)
    encoder = load_any(spec, size, device)
    patch, grid = encoder.vit.patch_size, encoder.vit.grid_size
    tokens, labels, found = [], [], []

    def shown(split: str):
        part = data.splits[split]
        items = PartsTestItems(part, list(range(len(part))), lambda _: size[::-1])
        for row, imgs, mask, problem in map(items.__getitem__, range(len(items))):
            if problem:
                print(f"unreadable, left out: {printable(part.images.relative(row))}: {problem}")
                continue
            yield encoder.tokens(imgs[None].to(device))[0].float(), mask.to(device)

    for token, mask in shown("train"):
        small = F.interpolate(mask[None, None].float(), size, mode="nearest")[0, 0].long()
        cells = small.unfold(0, patch, patch).unfold(1, patch, patch).reshape(len(token), -1)
        labels.append(cells.mode(dim=1).values)
        tokens.append(token)
    x, y = torch.cat(tokens), torch.cat(labels)
    x, y = x[y < K], y[y < K]
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    with torch.enable_grad():
        weight = linear_fit((x - mean) / std, y, K, PARTS_L2)
    for token, mask in shown("val"):
        logits = F.pad((token - mean) / std, (0, 1), value=1.0) @ weight
        logits = logits.T.reshape(1, K, *grid)
        guess = F.interpolate(logits, tuple(mask.shape), mode="bilinear", align_corners=False).argmax(dim=1)[0]
        found.append(confusion_matrix(mask, guess, K).cpu().numpy())
    return {(PARTS, "tokens"): np.stack(found)}


def tell(rows: dict, measures: dict) -> tuple[str, dict, dict]:
    """Markdown, a table for each kind of measure and a line for each read-out; all numbers by name; the means alone.

    A row is tested against the same read-out of the first row, or where that has none against its best, whitened
    against whitened.
    """
    first, best, facts = next(iter(rows)), {}, {}
    for (name, what, read_out), found in measures.items():
        way = what, read_out.endswith("whitened")
        if name == first and (way not in best or found.value() > best[way].value()):
            best[way] = found
    cells: dict[str, dict[tuple[str, str], dict[str, str]]] = {}  # {kind: {(row, read-out): {measure: text}}}
    for (name, what, read_out), found in measures.items():
        (low, high), value, kind = found.interval(), found.value(), what.split()[0]
        other = measures.get((first, what, read_out), best.get((what, read_out.endswith("whitened"))))
        p = paired_p(found, other) if name != first and other is not None else None
        sign = "" if p is None or p >= SURE else " +" if value > other.value() else " -"
        text = f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}]{sign}"
        cells.setdefault(kind, {}).setdefault((name, read_out), {})[f"{what} ({found.items.shape[1]})"] = text
        facts[f"{name} | {what} | {read_out}"] = {
            "value": value, "low": low, "high": high, "p": p, "seeds": found.by_seed().tolist(),
        }  # fmt: skip
    lines = [
        f"Percent, [95% interval] over what was tested (how many: in the head); + and -: unlike {first}, p < {SURE}.",
        "Several files are one row: the mean of its seeds.",
    ]
    for table in cells.values():
        head = list(dict.fromkeys(what for found in table.values() for what in found))
        body = [[*key, *(found.get(what, "") for what in head)] for key, found in table.items()]
        rule = ["---"] * (len(head) + 2)
        lines += ["", *(f"| {' | '.join(row)} |" for row in (["", "read-out", *head], rule, *body))]
    means = {name: found["value"] for name, found in facts.items()}
    return "\n".join([*lines, ""]), facts, means


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
