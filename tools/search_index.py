"""Nearest images of a gallery: its embeddings as an index on disk, and an exact search in blocks."""

import importlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from datasets.images import UNREADABLE, why_unreadable
from datasets.packed import PackedImages, is_packed
from datasets.path_list import PathList, printable
from util.dist import barrier, is_main_process
from util.errors import InputError
from util.files import write_atomic, write_json
from util.parallel import claim
from util.progress import Progress

HEADER, KIND = "search_index.json", "search index"
BLOCK_NUMBERS = 1 << 22  # of the gallery and of cosines, held at a time; more are slower


def best_of_block(q: torch.Tensor, block: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best rows of a block; those with NaN have cosine -inf.

    Products are float64, rounded to float32: equal rows then have equal cosines, whatever block they are in.

    Args:
        q: [Q, D] float64, unit length. block: [n, D] float.
    Returns:
        Cosines [Q, min(k, n)] float32, descending, ties in the order of the rows; rows, int64.
    """
    g = torch.from_numpy(block).to(q.device).float().double()  # in two steps: straight is half as fast
    lengths = torch.linalg.vector_norm(g, dim=1).clamp_min(1e-12)
    cosines = (q @ g.t() / lengths).float().nan_to_num_(nan=-torch.inf)
    k = min(k, len(block))
    least = cosines.topk(k, dim=1).values[:, -1:]
    ahead, equal = cosines > least, cosines == least
    room = k - ahead.sum(dim=1, keepdim=True)
    chosen = ahead | (equal & (equal.cumsum(dim=1) <= room))  # of those tied for the last places the first
    rows = chosen.nonzero()[:, 1].view(-1, k)
    values, order = cosines.gather(1, rows).sort(dim=1, descending=True, stable=True)
    return values, rows.gather(1, order)


def load_faiss() -> Callable:
    """`best_of_block` by faiss.IndexFlatIP, in float32."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise InputError("--faiss: it is not installed; pip install faiss-cpu, or drop --faiss") from error

    def best(q: torch.Tensor, block: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        readable = np.flatnonzero(~np.isnan(block[:, 0]))
        if not len(readable):
            return best_of_block(q, block, k)
        flat = faiss.IndexFlatIP(block.shape[1])
        flat.add(F.normalize(torch.from_numpy(block[readable]).float(), dim=1).numpy())
        values, rows = flat.search(q.float().cpu().numpy(), min(k, len(readable)))
        return torch.from_numpy(values).to(q.device), torch.from_numpy(readable[rows]).to(q.device)

    return best


def search_rows(
    query: torch.Tensor, rows: np.ndarray, k: int, block_numbers: int = BLOCK_NUMBERS, best=best_of_block
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows most similar to each query; the rows are read once, block by block.

    Args:
        query: [Q, D] float, finite; its device computes. rows: [M, D] float array or memory map; those with NaN are
            never found. block_numbers: held at a time; about 24 bytes each.
    Returns:
        Cosines [Q, min(k, M)] float32, descending, ties in the order of the rows, -inf: there are no more;
        rows [Q, min(k, M)] int64.
    """
    q = F.normalize(query.double(), dim=1)
    step = max(1, block_numbers // sum(q.shape))
    values, found = q.new_empty((len(q), 0), dtype=torch.float32), q.new_empty((len(q), 0), dtype=torch.int64)
    progress = Progress("searched", len(rows), shown=len(rows) > step)
    for start in range(0, len(rows), step):
        block = np.array(rows[start : start + step])
        more, place = best(q, block, k)
        values, order = torch.cat([values, more], dim=1).sort(dim=1, descending=True, stable=True)
        values, found = values[:, :k], torch.cat([found, place + start], dim=1).gather(1, order[:, :k])
        progress.update(start + len(block))
    progress.close()
    return values.cpu().numpy(), found.cpu().numpy()


def build_index(folder: Path, header: dict, paths: PathList | PackedImages, extract: Callable) -> None:
    """Embed a gallery into a folder, or go on with it.

    Args:
        header: what the index depends on; it claims the folder.
        extract: file name without ending -> what `extract_to_file` returns.
    """
    embedded = (folder / "embeddings.npy").is_file()  # by a call that was killed in its last moment
    barrier()  # all ranks have looked
    claim(folder / HEADER, header, KIND)
    problems = {}
    if not embedded:
        _, problems = extract(folder / "embeddings") or (None, {})
    if not is_main_process():
        return
    lost = np.flatnonzero(np.isnan(np.load(folder / "embeddings.npy", mmap_mode="r")[:, 0])).tolist()
    unreadable = {printable(paths.relative(i)): problems.get(i, "unreadable") for i in lost}
    write_json(folder / "unreadable.json", unreadable)
    names = PathList(Path(), (paths.relative(i) for i in range(len(paths))))
    write_atomic(folder / "names.npz", lambda opened: np.savez(opened, names=names.bytes, ends=names.ends))
    about = {"root": os.path.abspath(paths.root), "packed": isinstance(paths, PackedImages)}
    write_json(folder / HEADER, header | about | {"unreadable": len(lost)})  # last: the index is whole


def open_index(folder: Path, paths) -> tuple[dict, np.ndarray, PathList | PackedImages]:
    """-> (header; rows [M, D] float16, a memory map, NaN where unreadable; the images).

    `paths` are the images where they were just listed, for they may have moved; else None.
    """
    header = json.loads((folder / HEADER).read_text())
    try:
        rows = np.load(folder / "embeddings.npy", mmap_mode="r")
        with np.load(folder / "names.npz") as opened:
            names, ends = opened["names"], opened["ends"]
        if not len(rows) == len(ends) == header["images"]:
            raise ValueError(f"{len(rows)} rows and {len(ends)} names of {header['images']} images")
    except (*UNREADABLE, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{folder} is damaged ({why_unreadable(error)}): remove it, embed again") from error
    root = Path(header["root"])
    if paths is None and header["packed"]:
        paths = PackedImages(root) if is_packed(root) else None
        if paths is None or paths.sha256() != header["images_sha256"]:
            raise InputError(f"{root} no longer holds the packed set of {folder}: give it as --gallery")
    return header, rows, paths or PathList.from_arrays(root, names, ends)
