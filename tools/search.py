"""Find the pictures of a gallery that look most like a query; no labels needed. The gallery is an index on disk:
pictures are added to it, each embedded once, and removed from it.

    python -m tools.search car.jpg --gallery PHOTOS --checkpoint runs/veri/model.pth --output found
    python -m tools.search --gallery day2.csv --index found.index --checkpoint runs/veri/model.pth
    python -m tools.search van.jpg --index found.index --checkpoint runs/veri/model.pth --where camid=3 --output van
    python -m tools.search --remove --where "time<2026-01-01" --index found.index

Under torchrun the ranks share the embedding; a call that was stopped goes on where it was.
"""

import argparse
from pathlib import Path

from util.cli import Parser, check_numbers, parse_input_size, run_tool

TILE, QUERIES_DRAWN, RANKS_DRAWN = 128, 20, 20
LARGER = 1.5  # so many times the gallery of the threshold, and its promise is in doubt
ENGINES = ("exact", "usearch")
WHERE = "COLUMN=VALUE, also != < <= > >=: only these pictures; several must all hold (default: all pictures)"


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.search", __doc__)
    add = parser.add_argument
    add("queries", nargs="*", default=[], metavar="QUERY", help="image files, or one folder or manifest (default none)")
    add("--gallery", default=None, help="folder, manifest or packed set to add to the index (default: add nothing)")
    add("--index", default=None, help="folder that keeps the gallery (default: OUTPUT.index)")
    add("--engine", default=None, choices=ENGINES, help="what holds the vectors (default: the index's own; new: exact)")
    add("--where", action="append", default=[], metavar="CONDITION", help=WHERE)
    add("--remove", nargs="*", default=None, metavar="PATH", help="remove these, or what meets --where (default off)")
    add("--list", action="store_true", help="what the index holds, each picture in OUTPUT/rows.jsonl (default off)")
    add("--output", default="search_results", help="folder for the results (default search_results)")
    add("--topk", default=10, type=int, help="results a query (default 10)")
    add("--exclude_self", action="store_true", help="leave out the query's own file (default: mark it)")
    add("--checkpoint", default=None, help="re-id model or plain encoder (default none: --remove and --list need none)")
    add(
        "--open_set",
        default=None,
        metavar="FILE",
        help="open_set.safetensors of main_finetune.py --open_set: what "
        "scores below its threshold is not in the gallery (default none)",
    )
    add("--read_out", default="cls", choices=("cls", "mean"), help="of plain encoders (default cls)")
    add("--input_size", default=None, help="pixels: one side, or H,W (default: the checkpoint's)")
    add("--amp", default="none", choices=("auto", "bf16", "fp16", "none"), help="precision (default none: fp32)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes per rank (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

import engine_extract
from datasets.images import Unreadable, open_rgb
from datasets.items import WholeImages
from datasets.path_list import PackedImages, PathList, list_images, printable
from datasets.tables import TABLE_ENDINGS
from engine_extract import extract_features, extract_to_file
from finetune.open_set import OpenSet, model_identity, read_open_set
from finetune.task import load_model
from reports.page import FONT
from tools import gallery, gallery_usearch
from util.checkpoint import weights_sha256
from util.cli import Progress
from util.dist import broadcast, get_world_size, is_main_process, launch, print_main, run_lock, wait_for_main
from util.errors import InputError
from util.fetch import fetch
from util.files import read_array, write_atomic, write_json
from util.precision import pick_precision

Images = PathList | PackedImages


def main(args) -> dict:
    check_numbers(args, at_least_one="topk batch_size", not_negative="num_workers")
    conditions, is_change = [gallery.Condition(words) for words in args.where], args.remove is not None
    if is_change or args.list:
        if args.queries or args.gallery or (is_change and args.list) or not args.index:
            raise InputError("--remove and --list go alone, each with --index (--where, --output): give one at a time")
        job = partial(remove if is_change else show, args, conditions)
        return launch("cpu", args.output, lambda _: gallery.latest(job))
    if not args.checkpoint or not (args.queries or args.gallery):
        raise InputError("give --checkpoint, and QUERY to search for or --gallery PHOTOS to add (--help has examples)")
    if conditions and not args.queries:
        raise InputError(f"--where {conditions[0].words}: goes with QUERY, --remove or --list")
    if args.gallery and not Path(args.gallery).exists():
        raise InputError(f"--gallery {args.gallery} does not exist: give a folder of images, a manifest or packed set")
    queries = open_queries(args.queries) if args.queries else PathList(Path(), [])
    return launch(args.device, args.output, partial(search, args, conditions, queries))


def search(args, conditions: list[gallery.Condition], queries: Images, device: torch.device) -> dict:
    """Embed the queries, add to the gallery, find, write."""
    args.checkpoint = str(fetch(args.checkpoint))
    embed, size, known = load_embedder(args, device)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    loading["amp_dtype"], _ = pick_precision(args.amp, device)
    features, problems = np.zeros((0, 0), np.float32), {}
    if len(queries):
        images, quiet = WholeImages(queries, np.arange(len(queries)), size), Progress("queries", 0, shown=False)
        found, problems = extract_features(lambda imgs, _: {"": embed(imgs)}, images, device, quiet, **loading)
        features = found[""]
        if len(problems) == len(queries):
            raise InputError(f"none of the {len(queries)} queries could be read, e.g. {next(iter(problems.values()))}")
    header = {"checkpoint_sha256": weights_sha256(args.checkpoint), "read_out": args.read_out, "img_size": list(size)}
    header |= {"amp": str(loading["amp_dtype"])} | ({"engine": args.engine} if args.engine else {})
    header["whitening"] = weights_sha256(known.white._asdict()) if known and known.white else "none"
    folder, counts = Path(args.index or f"{os.path.abspath(args.output)}.index"), {"topk": args.topk}
    if args.gallery:
        extract = partial(extract_to_file, embed, device=device, dtype=np.float16, **loading)
        counts |= add_pictures(folder, header, args.gallery, size, extract)
    if not is_main_process():
        return {}
    names = [image_name(queries, number) for number in range(len(queries))]
    given = conditions, names, torch.from_numpy(features).to(device), args
    lists, total, searched = gallery.latest(lambda: find(folder, header, *given))
    counts |= {"gallery": total, "index": str(folder)}
    if not len(queries):
        return counts
    answers = write_results(Path(args.output), names, problems, lists, known)
    if known and total > LARGER * known.facts["gallery"]:
        was = f"the threshold was chosen on a gallery of {known.facts['gallery']:,}, this one has {total:,} pictures"
        print(f"note: {was}: more vehicles look alike, so choose it again")
    shown = [number for number in range(len(queries)) if number not in problems][:QUERIES_DRAWN]
    sheet = draw_results(queries, {number: lists[number] for number in shown})
    write_atomic(Path(args.output) / "results.png", lambda opened: sheet.save(opened, format="PNG"))
    counts |= {"queries": len(queries), "unreadable_queries": len(problems), "searched": searched}
    return counts | answers | {"same_file": sum(hit["same_file"] for hits in lists for hit in hits)}


def open_queries(words: list[str]) -> Images:
    """Images that a command names: files, or one folder, manifest or packed set."""
    first = Path(words[0])
    if len(words) == 1 and (first.is_dir() or first.suffix.lower() in TABLE_ENDINGS):
        return list_images(first)
    if missing := [word for word in words if not os.path.lexists(word)]:
        raise InputError(f"{printable(missing[0])} does not exist: give image files, or one folder or manifest")
    return PathList(Path(), words)


def image_name(paths: Images, number: int) -> str:
    """Its path; of a packed set PACK:NAME."""
    is_packed = isinstance(paths, PackedImages)
    return f"{os.path.realpath(paths.root)}:{paths.relative(number)}" if is_packed else str(paths[number])


def load_embedder(args, device: torch.device) -> tuple[Callable, tuple[int, int], OpenSet | None]:
    """-> (uint8 [n, 3, H, W] -> [n, D] float32 of unit length; (H, W) in px; the threshold of --open_set)."""
    found = load_model(args.checkpoint, device, parse_input_size(args.input_size) if args.input_size else None)
    print_main(f"model {args.checkpoint}:\n{found.report}")
    model, base, is_reid = found.model, found.model.base if found.task else found.model, found.task == "reid"
    if is_reid and (model.config.cameras or model.config.views):
        why = "was trained with the camera or view of each image (SIE), which a search does not know"
        raise InputError(f"{args.checkpoint} {why}: give a model trained without --sie_camera and --sie_view")
    if is_reid and args.read_out == "mean":
        raise InputError(f"--read_out mean: {args.checkpoint} is a re-id model with a feature of its own; drop it")

    def embed(imgs: torch.Tensor) -> torch.Tensor:
        features = model.encode(imgs) if is_reid else base.encode(imgs)[args.read_out]
        if not torch.isfinite(features).all():
            raise InputError(f"{args.checkpoint} gives embeddings that are not finite at --amp {args.amp}: try another")
        return F.normalize(known.white(features) if known and known.white else features.float(), dim=1)

    known = None
    if args.open_set:
        known = read_open_set(args.open_set, model_identity(model if is_reid else base))
        if known.facts["score"] != "cosine" or (not is_reid and args.read_out != "cls"):
            what = f"for {known.facts['score']} of the feature {known.facts['feature']}"
            raise InputError(f"--open_set {args.open_set} was chosen {what}: a search compares cosines of that feature")
        known = known._replace(white=known.white and known.white.to(device))
    return embed, base.img_size, known


def add_pictures(folder: Path, header: dict, source: str, size: tuple[int, int], extract: Callable) -> dict[str, int]:
    """Add what the index does not hold yet, `PART_IMAGES` a rank at a time; what is said to be added is on disk."""
    gallery_of(header.get("engine"))  # before the folder is made
    images, columns, is_main = list_images(source), gallery.read_columns(source), is_main_process()
    with run_lock(folder):
        index, plan = None, None
        if is_main:
            gallery.claim_index(folder, header)
            index = open_index(folder)
            index.sweep()
            plan = gallery.compare(index, images, columns)
        todo, old, renamed, counts = broadcast(plan)
        changed = sorted(renamed, key=renamed.get) if is_main else []
        for start in range(0, len(changed), gallery.SEGMENT_ROWS):
            own = changed[start : start + gallery.SEGMENT_ROWS]
            gone = [renamed[number] for number in own]
            index.commit([gallery.make_row(images, columns, number, old) for number in own], index.features(gone), gone)
        embedded, step = 0, engine_extract.PART_IMAGES * get_world_size()
        for start in range(0, len(todo), step):
            own = todo[start : start + step]
            rows = {n: gallery.make_row(images, columns, n, old) for n in own}  # before the pixels are read
            found = extract(WholeImages(images, np.array(own), size), output=folder / "adding", job=header)
            if found:
                for number, why in found[1].items():
                    print(f"unreadable, left out: {printable(rows.pop(number)['path'])}: {why}")
                kept = np.array([number in rows for number in own])
                features = read_array(folder / "adding.npy", "run the same command again")[kept]
                index.commit(list(rows.values()), features, [old[number][0] for number in rows if number in old])
                embedded += len(rows)
                print(f"added: {embedded} of {len(todo)}, the index holds {index.count}", flush=True)
            wait_for_main()
        if not is_main:
            return {}
        index.tidy()
    counts |= {"embedded": embedded, "unreadable": len(todo) - embedded}
    said = f"{counts['already']} there already ({counts['columns_changed']} with other columns), {embedded} embedded"
    print(f"{source}: {len(images)} images, {said}, {counts['unreadable']} unreadable and left out")
    return counts


def gallery_of(engine: str | None) -> type[gallery.Gallery]:
    if engine != "usearch":
        return gallery.Gallery
    gallery_usearch.usearch_index()  # a package that is missing is told first
    return gallery_usearch.GraphGallery


def open_index(folder: Path) -> gallery.Gallery:
    """The gallery in a folder, by the engine that its header names."""
    return gallery_of(gallery.Gallery(folder).about.get("engine"))(folder)


def remove(args, conditions: list[gallery.Condition]) -> dict:
    """Take pictures out of an index: by path, where a folder stands for all below it, by conditions, or by both."""
    if not args.remove and not conditions:
        raise InputError("--remove: name pictures or folders, or give --where: nothing is removed without")
    names = {os.path.abspath(path): path for path in args.remove}
    below, unseen = tuple(name + mark for name in names for mark in "/:#"), set(names)
    with run_lock(Path(args.index)):
        index, gone = open_index(Path(args.index)), []
        for number, row in gallery.choose(index, conditions):
            path = row["path"]
            if not names or path in names or path.startswith(below):
                gone.append(number)
                unseen -= {
                    name for name in unseen if path == name or path.startswith(tuple(name + mark for mark in "/:#"))
                }
        if unseen:
            missing = printable(names[min(unseen)])
            raise InputError(f"--remove {missing}: the index holds no such picture; nothing was removed (see --list)")
        if gone:
            index.commit([], None, gone)
        print(f"removed: {len(gone)}, the index holds {index.count}", flush=True)
        index.tidy()
    return {"removed": len(gone), "gallery": index.count, "index": args.index}


def show(args, conditions: list[gallery.Condition]) -> dict:
    """Say what an index holds, of the pictures that meet the conditions; all of them in rows.jsonl, a manifest."""
    index, file = open_index(Path(args.index)), Path(args.output) / "rows.jsonl"
    columns: dict[str, Counter] = defaultdict(Counter)

    def lines() -> Iterator[bytes]:
        for _, row in gallery.choose(index, conditions):
            columns[""][""] += 1
            for name, text in row["columns"].items():
                columns[name][text] += 1
            yield f"{json.dumps({'path': gallery.split_box(row['path'])[0]} | row['columns'])}\n".encode()

    write_atomic(file, lambda opened: opened.writelines(lines()))
    listed = columns.pop("", Counter()).total()
    print(*(f"{name}: {value}" for name, value in index.about.items() if name not in ("segments", "next")), sep="\n")
    for name, values in columns.items():
        shown = ", ".join(f"{text} ({count})" for text, count in values.most_common(5))
        print(printable(f"column {name}: {values.total()} pictures, {len(values)} values, e.g. {shown}"))
    print(f"{listed} of {index.count} pictures: {file}")
    return {"listed": listed, "gallery": index.count, "rows": str(file), "index": args.index}


def find(folder: Path, header: dict, conditions, names: list[str], features: torch.Tensor, args) -> tuple:
    """([{path, columns, cosine, same_file, rank}, ...] of each query, pictures of the gallery, how many meet the
    conditions); names, features [Q, D]: the queries', NaN: none."""
    index = open_index(folder)
    gallery.claim_index(folder, header)
    if not index.count:
        raise InputError(f"{folder} holds no picture that could be read: add some with --gallery")
    if not names:
        return [], index.count, 0
    cosines, found, searched = index.search(features, args.topk + args.exclude_self, conditions)
    rows = index.rows(set(found[cosines > -np.inf].tolist()))
    print(f"gallery: {index.count} pictures in {folder}" + f", {searched} of them meet --where" * bool(conditions))
    lists = []
    for name, values, numbers in zip(names, cosines, found):
        hits, place = [], os.path.realpath(name)
        for number, cosine in zip(numbers[values > -np.inf].tolist(), values.tolist()):
            path, columns = rows[number]["path"], rows[number]["columns"]
            hit = {"path": path, "columns": columns, "cosine": cosine, "same_file": os.path.realpath(path) == place}
            if not (hit["same_file"] and args.exclude_self):
                hits.append(hit | {"rank": len(hits) + 1})
        lists.append(hits[: args.topk])
    return lists, index.count, searched


def write_results(
    output: Path, names: list[str], problems: dict[int, str], lists: list[list[dict]], known: OpenSet | None
) -> dict[str, int]:
    """The table on stdout and results.json; with a threshold, how many queries are in the gallery and how many not."""
    results, counts = [], {"found": 0, "unknown": 0}
    for number, (query, hits) in enumerate(zip(names, lists)):
        problem, words = problems.get(number, ""), ""
        results.append({"query": query, "problem": problem, "results": hits})
        others = [hit["cosine"] for hit in hits if not hit["same_file"]]
        if known and not problem:
            is_there = bool(others) and others[0] > known.threshold
            results[-1]["in_gallery"] = is_there
            counts["found" if is_there else "unknown"] += 1
            below = f" not in the gallery: nothing above {known.threshold:.4f}"
            words = "" if is_there else f"{below} (at most {100 * known.facts['far']:g}% of such are let through)"
        print(f"{printable(query)} is left out: {problem}" if problem else f"{printable(query)}:{words}")
        for hit in hits:
            sign = "  (same file)" * hit["same_file"]
            print(f"  {hit['rank']:3d}  {hit['cosine']:7.4f}  {printable(hit['path'])}{sign}")
    write_json(output / "results.json", results)
    return counts if known else {}


def draw_results(queries: Images, found: dict[int, list[dict]]) -> Image.Image:
    """A line a query: the query, then what was found, cosine and file name beneath."""
    width, height = TILE + 8, TILE + 40
    columns = 1 + max(len(hits[:RANKS_DRAWN]) for hits in found.values())
    sheet = Image.new("RGB", (columns * width, len(found) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 11)
    for line, (query, hits) in enumerate(found.items()):
        words = [f"{hit['cosine']:.4f}{'  same file' * hit['same_file']}" for hit in hits[:RANKS_DRAWN]]
        cells = [(partial(queries.__getitem__, query), queries.relative(query), "query")]
        cells += [(partial(gallery.open_named, hit["path"]), hit["path"], text) for hit, text in zip(hits, words)]
        for column, (picture, name, text) in enumerate(cells):
            left, top = column * width + 4, line * height + 4
            try:
                tile = ImageOps.pad(open_rgb(picture()), (TILE, TILE), color="#eee")
            except Unreadable:  # removed since it was embedded
                tile = Image.new("RGB", (TILE, TILE), "#b33")
            sheet.paste(tile, (left, top))
            draw.text((left, top + TILE + 2), f"{text}\n{printable(Path(name).name)[-18:]}", fill="black", font=font)
    return sheet


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
