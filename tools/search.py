"""Find the images of a gallery that look most like a query. The gallery is embedded once; no labels needed.

    python -m tools.search car.jpg --gallery PHOTOS --checkpoint runs/veri/model.pth --output found
    python -m tools.search van.jpg --gallery found.index --checkpoint runs/veri/model.pth --output found_van

Under torchrun the ranks share the embedding; a call that was stopped goes on where it was.
"""

import argparse
from pathlib import Path

from util.cli import Parser, parse_input_size, run_tool

TILE, QUERIES_DRAWN, RANKS_DRAWN = 128, 20, 20


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.search", __doc__)
    # fmt: off
    add = parser.add_argument_group("images").add_argument
    add("queries", nargs="+", metavar="QUERY", help="image files, or one folder or manifest")
    add("--gallery", required=True, help="folder, manifest or packed set; or the index of an earlier call")
    add("--index", default=None, help="folder to keep the embeddings in, float16 (default: OUTPUT.index)")
    add("--output", default="search_results", help="folder for the results (default search_results)")
    add("--topk", default=10, type=int, help="results a query (default 10)")
    add("--exclude_self", action="store_true", help="leave out the query's own file (default: mark it)")
    add("--picture", action=argparse.BooleanOptionalAction, default=True,
        help=f"draw results.png of the first {QUERIES_DRAWN} queries (default on)")
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", required=True, help="re-id model of main_finetune.py, or any plain encoder")
    add("--read_out", default=None, choices=("cls", "mean"),
        help="of plain encoders: class token or mean of the patches (default: the index's, else cls)")
    add("--input_size", default=None, help="pixels: one side, or H,W (default: the index's, else the checkpoint's)")
    add("--amp", default="none", choices=("auto", "bf16", "fp16", "none"), help="precision (default none: fp32)")
    add = parser.add_argument_group("run").add_argument
    add("--faiss", action="store_true",
        help="faiss on the CPU: rounds more, ties in any order (default: torch, exact, ties as in the gallery)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes per rank (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import json
import os
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from datasets.eval_images import WholeImages
from datasets.images import UNREADABLE, open_rgb
from datasets.manifest import MANIFEST_ENDINGS, list_images
from datasets.packed import PackedImages
from datasets.path_list import PathList, printable
from engine_extract import extract_features, extract_to_file
from finetune.encoder import load_model
from tools.search_index import HEADER, KIND, best_of_block, build_index, load_faiss, open_index, search_rows
from util.dist import end_distributed, init_distributed, is_main_process, pick_device, print_main
from util.errors import InputError
from util.fetch import fetch
from util.files import file_sha256, write_atomic, write_json
from util.parallel import claim
from util.precision import pick_precision
from util.progress import Progress


def main(args) -> dict:
    if args.topk < 1:
        raise InputError(f"--topk {args.topk}: must be at least 1")
    device = pick_device(args.device)
    init_distributed(device, timeout_s=600)
    try:
        return search(args, device)
    finally:
        end_distributed()


def search(args, device: torch.device) -> dict:
    best = load_faiss() if args.faiss else best_of_block
    queries = open_queries(args.queries)
    folder, known, paths = locate_index(args)
    read_out = args.read_out or known.get("read_out", "cls")
    size = parse_input_size(args.input_size) if args.input_size else known.get("img_size")
    embed, size = load_embedder(args, device, read_out, size)
    sha256 = file_sha256(args.checkpoint)
    header = {"kind": KIND, "checkpoint_sha256": sha256, "read_out": read_out, "img_size": list(size)}
    if paths is not None:
        header |= {"images_sha256": paths.sha256(), "images": len(paths)}
    if known:
        claim(folder / HEADER, header, KIND)
    amp_dtype, _ = pick_precision(args.amp, device)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers, "amp_dtype": amp_dtype}
    features, problems = embed_queries(embed, queries, size, device, loading)
    started = time.perf_counter()
    is_new = "unreadable" not in known
    if is_new:
        images, job = WholeImages(paths, np.arange(len(paths)), size), header | {"amp": str(amp_dtype)}
        extract = partial(extract_to_file, embed, images, device, job=job, dtype=np.float16, **loading)
        build_index(folder, header, paths, extract)
    if not is_main_process():
        return {}
    embedded = time.perf_counter()
    header, rows, paths = open_index(folder, paths)
    readable = [number for number in range(len(queries)) if number not in problems]
    names = [image_name(queries, number) for number in readable]
    lists = find_hits(names, features[readable].to(device), rows, paths, args, best)
    searched = time.perf_counter()
    if header["unreadable"]:
        print(f"{header['unreadable']} gallery images are unreadable and not found: {folder}/unreadable.json")
    write_results(args, queries, problems, dict(zip(readable, lists)), paths)
    return {
        "queries": len(queries), "unreadable_queries": len(problems), "gallery": len(rows),
        "unreadable": header["unreadable"], "embedded": len(rows) if is_new else 0, "topk": args.topk,
        "same_file": sum(hit["same_file"] for hits in lists for hit in hits), "index": str(folder),
        "embed_seconds": embedded - started, "search_seconds": searched - embedded,
    }  # fmt: skip


def open_queries(words: list[str]) -> PathList | PackedImages:
    first = Path(words[0])
    if len(words) == 1 and (first.is_dir() or first.suffix.lower() in MANIFEST_ENDINGS):
        return list_images(first)
    return PathList(Path(), words)


def image_name(paths: PathList | PackedImages, number: int) -> str:
    """Its path; of a packed set PACK:NAME."""
    if isinstance(paths, PackedImages):
        return f"{os.path.realpath(paths.root)}:{paths.relative(number)}"
    return str(paths[number])


def locate_index(args) -> tuple[Path, dict, PathList | PackedImages | None]:
    """-> (folder, its header or {} where it is new, the images or None where the gallery is the index)."""
    gallery = Path(args.gallery)
    if not gallery.exists():
        raise InputError(f"--gallery {gallery} does not exist: give images, or the index of an earlier call")
    is_index = (gallery / HEADER).is_file()
    if is_index and args.index:
        raise InputError(f"--index {args.index}: {gallery} is an index already; drop --index")
    folder = gallery if is_index else Path(args.index or f"{os.path.abspath(args.output)}.index")
    known = {}
    if (folder / HEADER).is_file():
        claim(folder / HEADER, {"kind": KIND}, KIND)
        known = json.loads((folder / HEADER).read_text())
    if is_index and "unreadable" not in known:
        raise InputError(f"{folder} is unfinished: repeat the call that made it, with its own --gallery")
    paths = None if is_index else list_images(gallery)
    where = f"of {folder}" if is_index else f"under {paths.root}"
    print_main(f"gallery: {known['images'] if is_index else len(paths)} images {where}")
    return folder, known, paths


def load_embedder(args, device: torch.device, read_out: str, size) -> tuple[Callable, tuple[int, int]]:
    """-> (uint8 [n, 3, H, W] -> [n, D] float32 of unit length; (H, W) in px)."""
    args.checkpoint = file = str(fetch(args.checkpoint))
    found = load_model(file, device, size)
    print_main(f"model {file}:\n{found.report}")
    is_reid = found.task == "reid"
    model, base = found.model, found.model.base if found.task else found.model
    if is_reid and (model.config.cameras or model.config.views):
        raise InputError(
            f"{file} was trained with the camera or view of each image (SIE), which a search does not know: "
            "give a model trained without --sie_camera and --sie_view"
        )
    if is_reid and read_out == "mean":
        raise InputError(f"--read_out mean: {file} is a re-id model with a feature of its own; drop it")

    def embed(imgs: torch.Tensor) -> torch.Tensor:
        features = model.encode(imgs) if is_reid else base.encode(imgs)[read_out]
        if not torch.isfinite(features).all():
            raise InputError(f"{file} gives embeddings that are not finite at --amp {args.amp}: try another")
        return F.normalize(features.float(), dim=1)

    return embed, base.img_size


def embed_queries(embed: Callable, queries, size, device, loading: dict) -> tuple[torch.Tensor, dict[int, str]]:
    """-> ([Q, D] float32, {number: why it could not be read}); InputError if that is all of them."""
    if len(queries) <= loading["batch_size"]:
        loading = loading | {"num_workers": 0}
    images = WholeImages(queries, np.arange(len(queries)), size)
    progress = Progress("queries", len(queries), shown=False)
    features, problems = extract_features(lambda imgs, _: {"": embed(imgs)}, images, device, progress, **loading)
    for number, why in problems.items():
        print_main(f"unreadable query, left out: {printable(image_name(queries, number))}: {why}")
    if len(problems) == len(queries):
        raise InputError(f"none of the {len(queries)} queries could be read")
    return torch.from_numpy(features[""]), problems


def find_hits(names: list[str], features: torch.Tensor, rows: np.ndarray, paths, args, best) -> list[list]:
    """[{row, path, cosine, same_file, rank}, ...] of each query; names, features [Q, D]: the queries'."""
    places, wanted = [os.path.realpath(name) for name in names], args.topk + args.exclude_self
    while True:
        lists, own = [], 0
        for place, values, found in zip(places, *search_rows(features, rows, wanted, best=best)):
            hits = []
            for row, cosine in zip(found.tolist(), values.tolist()):
                path = image_name(paths, row)
                hits.append({"row": row, "path": path, "cosine": cosine, "same_file": os.path.realpath(path) == place})
            hits = [hit for hit in hits if hit["cosine"] > -np.inf]
            others = [hit for hit in hits if not (args.exclude_self and hit["same_file"])]
            own = max(own, len(hits) - len(others))
            lists.append([hit | {"rank": rank} for rank, hit in enumerate(others[: args.topk], 1)])
        if own <= wanted - args.topk or wanted >= len(rows):
            return lists
        wanted *= 2  # links to the query's file have pushed others out


def write_results(args, queries, problems: dict[int, str], found: dict[int, list[dict]], paths) -> None:
    """The table on stdout, results.json and results.png."""
    output, names = Path(args.output), [image_name(queries, number) for number in range(len(queries))]
    width = max(len(printable(names[number])) for number in found)
    print(f"{'query':{width}}  rank   cosine  path")
    for number, hits in found.items():
        for hit in hits:
            same = "  (same file)" if hit["same_file"] else ""
            line = f"{hit['rank']:4d}  {hit['cosine']:7.4f}  {printable(hit['path'])}{same}"
            print(f"{printable(names[number]):{width}}  {line}")
    results = [{"query": q, "problem": problems.get(i, ""), "results": found.get(i, [])} for i, q in enumerate(names)]
    write_json(output / "results.json", results)
    if args.picture:
        drawn = {number: found[number][:RANKS_DRAWN] for number in list(found)[:QUERIES_DRAWN]}
        sheet = draw_results(queries, paths, drawn)
        write_atomic(output / "results.png", lambda opened: sheet.save(opened, format="PNG"))


def draw_results(queries, paths, found: dict[int, list[dict]]) -> Image.Image:
    """A line a query: the query, then what was found, cosine and file name beneath."""
    width, height = TILE + 8, TILE + 40
    columns = 1 + max(len(hits) for hits in found.values())
    sheet = Image.new("RGB", (columns * width + 24, len(found) * height + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for line, (query, hits) in enumerate(found.items()):
        cells = [(queries, query, "query", "#06c")]
        for hit in hits:
            words, colour = ("  same file", "#d60") if hit["same_file"] else ("", "#ccc")
            cells.append((paths, hit["row"], f"{hit['cosine']:.4f}{words}", colour))
        for column, (images, number, words, colour) in enumerate(cells):
            left, top = 8 + column * width + 16 * (column > 0), 8 + line * height
            try:
                tile = ImageOps.pad(open_rgb(images[number]), (TILE, TILE), color="#eee")
            except UNREADABLE:
                tile, words = Image.new("RGB", (TILE, TILE), "#b33"), f"{words}  is gone"
            sheet.paste(tile, (left, top))
            draw.rectangle((left - 2, top - 2, left + TILE + 1, top + TILE + 1), outline=colour, width=2)
            name = printable(Path(images.relative(number)).name)[-20:]
            draw.text((left, top + TILE + 3), f"{words}\n{name}", fill="black", font=font)
    return sheet


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
