"""Find the images of a gallery that look most like a query. The gallery is embedded once; no labels needed.

    python -m tools.search car.jpg --gallery PHOTOS --checkpoint runs/veri/model.pth --output found
    python -m tools.search van.jpg --gallery PHOTOS --checkpoint runs/veri/model.pth --output van --index found.index

Under torchrun the ranks share the embedding; a call that was stopped goes on where it was.
"""

import argparse
from pathlib import Path

from util.cli import Parser, check_numbers, parse_input_size, run_tool

TILE, QUERIES_DRAWN, RANKS_DRAWN = 128, 20, 20
BLOCK_NUMBERS = 1 << 22  # of the gallery and of cosines, held at a time; more are slower


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.search", __doc__)
    add = parser.add_argument
    add("queries", nargs="+", metavar="QUERY", help="image files, or one folder or manifest")
    add("--gallery", required=True, help="folder, manifest or packed set to search in")
    add("--index", default=None, help="folder that keeps its embeddings, float16 (default: OUTPUT.index)")
    add("--output", default="search_results", help="folder for the results (default search_results)")
    add("--topk", default=10, type=int, help="results a query (default 10)")
    add("--exclude_self", action="store_true", help="leave out the query's own file (default: mark it)")
    add("--checkpoint", required=True, help="re-id model of main_finetune.py, or any plain encoder")
    add("--read_out", default="cls", choices=("cls", "mean"), help="of plain encoders (default cls)")
    add("--input_size", default=None, help="pixels: one side, or H,W (default: the checkpoint's)")
    add("--amp", default="none", choices=("auto", "bf16", "fp16", "none"), help="precision (default none: fp32)")
    add("--batch_size", default=128, type=int, help="images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes per rank (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from datasets.images import Unreadable, open_rgb
from datasets.items import WholeImages
from datasets.path_list import PackedImages, PathList, list_images, printable
from datasets.tables import TABLE_ENDINGS
from engine_extract import extract_features, extract_to_file
from finetune.task import load_model
from reports.page import FONT
from util.checkpoint import weights_sha256
from util.cli import Progress
from util.dist import barrier, claim, is_main_process, launch, print_main
from util.errors import InputError
from util.fetch import fetch
from util.files import read_array, write_atomic, write_json
from util.precision import pick_precision

Images = PathList | PackedImages


def main(args) -> dict:
    check_numbers(args, at_least_one="topk batch_size", not_negative="num_workers")
    if not Path(args.gallery).exists():
        raise InputError(f"--gallery {args.gallery} does not exist: give a folder of images, a manifest or packed set")
    queries = open_queries(args.queries)
    return launch(args.device, args.output, partial(search, args, queries, list_images(args.gallery)))


def search(args, queries: Images, gallery: Images, device: torch.device) -> dict:
    """Embed the queries, embed the gallery or open its index, find, write."""
    args.checkpoint = str(fetch(args.checkpoint))
    embed, size = load_embedder(args, device)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    loading["amp_dtype"], _ = pick_precision(args.amp, device)
    images, quiet = WholeImages(queries, np.arange(len(queries)), size), Progress("queries", 0, shown=False)
    features, problems = extract_features(lambda imgs, _: {"": embed(imgs)}, images, device, quiet, **loading)
    if len(problems) == len(queries):
        raise InputError(f"none of the {len(queries)} queries could be read, e.g. {next(iter(problems.values()))}")
    header = {"checkpoint_sha256": weights_sha256(args.checkpoint), "read_out": args.read_out, "img_size": list(size)}
    header |= {"amp": str(loading["amp_dtype"]), "images_sha256": gallery.sha256(), "images": len(gallery)}
    folder = Path(args.index or f"{os.path.abspath(args.output)}.index")
    embedded = embed_gallery(embed, gallery, size, device, folder, header, loading)
    if not is_main_process():
        return {}
    rows = open_index(folder, (len(gallery), features[""].shape[1]))
    unreadable = int(np.isnan(rows[:, 0]).sum())
    print(f"gallery: {len(rows)} images under {gallery.root}, {unreadable} of them unreadable and never found")
    names = [image_name(queries, number) for number in range(len(queries))]
    lists = find_hits(names, torch.from_numpy(features[""]).to(device), rows, gallery, args)
    write_results(Path(args.output), names, problems, lists)
    shown = [number for number in range(len(queries)) if number not in problems][:QUERIES_DRAWN]
    sheet = draw_results(queries, gallery, {number: lists[number] for number in shown})
    write_atomic(Path(args.output) / "results.png", lambda opened: sheet.save(opened, format="PNG"))
    counts = {"queries": len(queries), "unreadable_queries": len(problems), "gallery": len(rows)}
    counts |= {"unreadable": unreadable, "embedded": embedded, "topk": args.topk, "index": str(folder)}
    return counts | {"same_file": sum(hit["same_file"] for hits in lists for hit in hits)}


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


def load_embedder(args, device: torch.device) -> tuple[Callable, tuple[int, int]]:
    """-> (uint8 [n, 3, H, W] -> [n, D] float32 of unit length; (H, W) in px)."""
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
        return F.normalize(features.float(), dim=1)

    return embed, base.img_size


def embed_gallery(embed, gallery: Images, size, device, folder: Path, header: dict, loading: dict) -> int:
    """Fill an index, or go on with it; how many images this call added to it. Files: embeddings.npy [M, D] float16, NaN
    where unreadable; index.json, what they depend on."""
    is_whole = (folder / "embeddings.npy").is_file()
    barrier()  # all ranks have looked
    claim(folder / "index.json", header, "search index")
    if is_whole:
        return 0
    images = WholeImages(gallery, np.arange(len(gallery)), size)
    found = extract_to_file(embed, images, device, folder / "embeddings", job=header, dtype=np.float16, **loading)
    for number, why in (found[1] if found else {}).items():
        print(f"unreadable, left out: {printable(image_name(gallery, number))}: {why}")
    return len(gallery)


def open_index(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    """[M, D] float16, a memory map; rows are unit vectors, or NaN where unreadable."""
    cure = "remove it, embed again"
    rows = read_array(folder / "embeddings.npy", cure)
    if rows.shape != shape or rows.dtype != np.float16:
        raise InputError(f"{folder} is damaged ({rows.dtype} {rows.shape}, not {shape}): {cure}")
    for start in range(0, len(rows), 1 << 16):
        lengths = np.linalg.norm(rows[start : start + (1 << 16)].astype(np.float32), axis=1)
        if (bad := np.flatnonzero(np.abs(lengths - 1) > 0.02)).size:
            raise InputError(f"{folder} is damaged (row {start + bad[0]} is no unit vector): {cure}")
    return rows


def search_rows(query: torch.Tensor, rows: np.ndarray, k: int, block_numbers: int = BLOCK_NUMBERS) -> tuple:
    """The rows [M, D] float most similar to each query [Q, D]: cosines [Q, min(k, M)] float32, descending, ties in the
    order of the rows, -inf: there are no more; and their numbers. The rows are read once, block by block; those with
    NaN are never found. Products are float64, rounded to float32: equal rows have equal cosines, whatever their block.
    """
    q = F.normalize(query.double(), dim=1)
    step = max(1, block_numbers // sum(q.shape))
    values, found = q.new_empty((len(q), 0), dtype=torch.float32), q.new_empty((len(q), 0), dtype=torch.int64)
    progress = Progress("searched", len(rows), shown=len(rows) > step)
    for start in range(0, len(rows), step):
        block = np.array(rows[start : start + step])
        g = torch.from_numpy(block).to(q.device).float().double()  # in two steps: straight is half as fast
        cosines = (q @ g.t() / torch.linalg.vector_norm(g, dim=1).clamp_min(1e-12)).float().nan_to_num_(nan=-torch.inf)
        cosines = torch.cat([values, cosines], dim=1)
        numbers = torch.cat([found, torch.arange(start, start + len(g), device=q.device).expand(len(q), -1)], dim=1)
        kept = min(k, cosines.shape[1])
        least = cosines.topk(kept, dim=1).values[:, -1:]
        ahead, equal = cosines > least, cosines == least
        chosen = ahead | (equal & (equal.cumsum(dim=1) <= kept - ahead.sum(dim=1, keepdim=True)))  # of ties the first
        values, found = cosines[chosen].view(-1, kept), numbers[chosen].view(-1, kept)
        progress.update(start + len(block))
    progress.close()
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values.cpu().numpy(), found.gather(1, order).cpu().numpy()


def find_hits(names: list[str], features: torch.Tensor, rows: np.ndarray, gallery: Images, args) -> list[list[dict]]:
    """[{row, path, cosine, same_file, rank}, ...] of each query; names, features [Q, D]: the queries', NaN: none."""
    lists = []
    for name, values, found in zip(names, *search_rows(features, rows, args.topk + args.exclude_self)):
        hits, place = [], os.path.realpath(name)
        for row, cosine in zip(found[values > -np.inf].tolist(), values.tolist()):
            path = image_name(gallery, row)
            same_file = os.path.realpath(path) == place
            if not (same_file and args.exclude_self):
                hits.append({"row": row, "path": path, "cosine": cosine, "same_file": same_file, "rank": len(hits) + 1})
        lists.append(hits[: args.topk])
    return lists


def write_results(output: Path, names: list[str], problems: dict[int, str], lists: list[list[dict]]) -> None:
    """The table on stdout and results.json."""
    results = []
    for number, (query, hits) in enumerate(zip(names, lists)):
        problem = problems.get(number, "")
        results.append({"query": query, "problem": problem, "results": hits})
        print(f"{printable(query)} is left out: {problem}" if problem else f"{printable(query)}:")
        for hit in hits:
            sign = "  (same file)" * hit["same_file"]
            print(f"  {hit['rank']:3d}  {hit['cosine']:7.4f}  {printable(hit['path'])}{sign}")
    write_json(output / "results.json", results)


def draw_results(queries: Images, gallery: Images, found: dict[int, list[dict]]) -> Image.Image:
    """A line a query: the query, then what was found, cosine and file name beneath."""
    width, height = TILE + 8, TILE + 40
    columns = 1 + max(len(hits[:RANKS_DRAWN]) for hits in found.values())
    sheet = Image.new("RGB", (columns * width, len(found) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 11)
    for line, (query, hits) in enumerate(found.items()):
        words = [f"{hit['cosine']:.4f}{'  same file' * hit['same_file']}" for hit in hits[:RANKS_DRAWN]]
        cells = [(queries, query, "query"), *((gallery, hit["row"], text) for hit, text in zip(hits, words))]
        for column, (images, number, text) in enumerate(cells):
            left, top = column * width + 4, line * height + 4
            try:
                tile = ImageOps.pad(open_rgb(images[number]), (TILE, TILE), color="#eee")
            except Unreadable:  # removed since it was embedded
                tile = Image.new("RGB", (TILE, TILE), "#b33")
            sheet.paste(tile, (left, top))
            name = printable(Path(images.relative(number)).name)[-18:]
            draw.text((left, top + TILE + 2), f"{text}\n{name}", fill="black", font=font)
    return sheet


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
