"""Pack images into a few big files of JPEGs with a short side of 256 px, which train faster and copy well.

    python -m tools.pack --data_path PHOTOS --output packed
    python main_pretrain.py --data_path packed ...
    python -m tools.pack --data_path "https://host/shard-{000..099}.tar" --output packed   # WebDataset

JPEGs that are small enough are stored byte for byte; of a picture with a box what lies in it is stored.
A run that was stopped goes on at the first shard that is missing. Unreadable images are left out, counted and
listed in bad_images.txt.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.pack", __doc__)
    add = parser.add_argument
    add("--data_path", required=True, help="folder, manifest, or WebDataset: .tar files or URLs, {000..099} is a range")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all)")
    add("--output", required=True, help="folder of the packed set")
    add("--short_side", default=256, type=int, help="pixels of the shorter side; smaller stay (default 256)")
    add("--quality", default=90, type=int, help="JPEG quality of what is re-encoded (default 90)")
    add("--shard_images", default=8192, type=int, help="images a file, not of a WebDataset (default 8192)")
    add("--num_workers", default=None, type=int, help="processes (default: the cores of this machine)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
from PIL import Image

from datasets import images
from datasets.images import IMAGE_ENDINGS, Unreadable
from datasets.path_list import PACK_HEADER, PathList, list_images, printable, shard_file
from datasets.transforms import jpeg_reduction
from util.cli import Progress
from util.dist import claim, map_in_order, worker_pool
from util.errors import InputError
from util.files import write_atomic, write_json


def main(args) -> dict:
    for name, low, high in (("short_side", 16, 65_500), ("quality", 1, 100), ("shard_images", 1, 10**9)):
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name} {getattr(args, name)}: must be from {low} to {high}")
    started, folder = time.perf_counter(), Path(args.output)
    shards, source = read_source(args)
    header = {"kind": "cgd-mae packed images", "version": 1, "source_sha256": source}
    header |= {"short_side": args.short_side, "quality": args.quality, "shards": len(shards)}
    claim(folder / PACK_HEADER, header, "packed set")
    todo = [k for k in range(len(shards)) if not shard_file(folder, k).is_file()]
    progress = Progress("shards", len(shards), len(shards) - len(todo))
    encode = partial(encode_chunk, short_side=args.short_side, quality=args.quality)
    workers = args.num_workers or os.cpu_count() or 1
    with worker_pool(workers) as pool:
        for shard in todo:
            write_shard(folder, shard, map_in_order(pool, encode, shards[shard](), workers))
            progress.update(progress.done + 1)
    progress.close()
    totals = finish(folder, len(shards))
    if not totals["images"]:
        raise InputError(f"no image of {args.data_path} could be read: {folder / 'bad_images.txt'} says why")
    return totals | {"shards": len(shards), "written": len(todo), "seconds": time.perf_counter() - started}


def read_source(args) -> tuple[list[Callable[[], Iterator[tuple[str, Path | bytes]]]], str]:
    """(for each shard what yields its images: name, and file or bytes; identity of the whole). In the name of a
    WebDataset braces give ranges, `::` joins lists, as the webdataset library has it."""
    if not (args.data_path.endswith((".tar", ".tar}")) or "::" in args.data_path or args.data_path.startswith("pipe:")):
        paths, step = list_images(args.data_path, args.split), args.shard_images

        def files_from(first: int) -> Iterator[tuple[str, Path]]:
            return ((str(paths.entry(i)), paths[i]) for i in range(first, min(first + step, len(paths))))

        return [partial(files_from, first) for first in range(0, len(paths), step)], f"{paths.sha256()} / {step}"
    from webdataset.shardlists import expand_urls  # here and not above: most sets are folders

    urls = expand_urls(args.data_path)
    if missing := [url for url in urls if ":" not in url and not Path(url).is_file()]:
        raise InputError(f"{len(missing)} of {len(urls)} shards do not exist, first {missing[0]}")
    names = "\n".join(url.rsplit("/", 1)[-1] for url in urls)
    return [partial(read_tar, url) for url in urls], hashlib.sha256(names.encode()).hexdigest()


def read_tar(url: str) -> Iterator[tuple[str, bytes]]:
    """(shard/name, encoded image) of every sample that has an image."""
    import webdataset

    stem, found, others = url.rsplit("/", 1)[-1].removesuffix(".tar"), 0, Counter()
    try:
        with webdataset.gopen(url) as opened:
            stream = Tail(opened)
            for name, data in images_of_samples(tarfile.open(fileobj=stream, mode="r|"), others):
                found += 1
                yield f"{stem}/{name}", data
            while stream.read(1 << 20):
                pass
            if any(stream.last):  # tarfile takes a cut between two files for the end of the archive
                raise tarfile.ReadError("it is cut off, there is no end-of-archive mark")
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        cure = "copy or download it again, then run the same command; finished shards are kept"
        raise InputError(f"shard {url} could not be read to its end ({reason}): {cure}") from error
    if not found:
        seen = ", ".join(f"{ending} ({count})" for ending, count in others.most_common(5))
        raise InputError(f"shard {url} holds no image ({' '.join(IMAGE_ENDINGS)}): it holds {seen or 'nothing'}")


class Tail:
    """A stream that remembers its last 1024 bytes."""

    def __init__(self, stream):
        self.stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.last = (self.last + data)[-1024:]
        return data


def images_of_samples(archive: tarfile.TarFile, others: Counter) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the images of an archive; `others` counts the endings of what is passed over. Files that follow
    each other with the same name up to the first dot are one sample: of KEY.jpg and KEY.mask.png the first is its
    image, of KEY.1.jpg and KEY.2.jpg both are."""
    files = (member for member in archive if member.isfile())
    for stem, members in itertools.groupby(files, lambda member: re.sub(r"(?<=[^/])\.[^/]*$", "", member.name)):
        sample = {}
        for member in members:
            name = member.name.rsplit("/", 1)[-1].lower()
            if member.size <= images.MAX_BYTES and name[0] != "." and name.endswith(IMAGE_ENDINGS):
                sample[member.name] = archive.extractfile(member).read()
            else:
                others[os.path.splitext(name)[1] or "no ending"] += 1
        plain = [name for name in sample if os.path.splitext(name)[0] == stem]
        yield from ((name, sample[name]) for name in plain[:1] or sample)


def encode_chunk(chunk, short_side: int, quality: int) -> list[tuple[str, bytes, str]]:
    """[(name, file or encoded bytes)] -> [(name, JPEG or b"", how: "copied", "encoded" or the problem)]."""
    return [(name, *encode_image(source, short_side, quality)) for name, source in chunk]


def encode_image(source: Path | images.Cut | bytes, short_side: int, quality: int) -> tuple[bytes, str]:
    """-> (upright RGB or grey JPEG with at most `short_side` px on its shorter side, how), or (b"", the problem)."""
    try:
        encoded = io.BytesIO()
        if not isinstance(source, images.Cut):
            data = images.read_bytes(source) if isinstance(source, Path) else source
            image = images.open_image(io.BytesIO(data), decode=False)
            with images.decoding():
                is_plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not images.is_turned(image)
                if is_plain and min(image.size) <= short_side:
                    image.load()  # a truncated file must not get into the set
                    return data, "copied"
            source = io.BytesIO(data)
        image = images.open_upright(source)
        image = images.decode_rgb(image, jpeg_reduction((0, 0, *image.size), (short_side, short_side), oversampling=2))
        scale = min(short_side / min(image.size), 1)
        image = image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.BICUBIC)
        with images.decoding():  # a JPEG has at most 65,535 px a side
            image.save(encoded, "JPEG", quality=quality)
        return encoded.getvalue(), "encoded"
    except Unreadable as error:
        return b"", str(error)


def write_shard(folder: Path, shard: int, rows: Iterable[tuple[str, bytes, str]]) -> None:
    """One shard and, before it appears, all that is told about it: what exists is complete."""
    file = shard_file(folder, shard)
    names, problems, index, counts = [], [], [], Counter(copied=0, encoded=0)

    def write(opened) -> None:
        for name, data, how in rows:
            if data:
                index.append((opened.tell(), len(data), zlib.crc32(data)))
                names.append(name)
                counts[how] += 1
                opened.write(data)
            else:
                problems.append((name, how))
        table = np.array(index, dtype=np.int64).reshape(-1, 3)
        write_atomic(file.with_suffix(".npy"), lambda f: np.save(f, table))
        write_json(file.with_suffix(".json"), {"names": names, "problems": problems, **counts})

    write_atomic(file, write)


def finish(folder: Path, shards: int) -> dict:
    """Join the names; what a reader needs is then all there."""
    files = [shard_file(folder, shard) for shard in range(shards)]
    about = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    names = PathList(folder, [name for part in about for name in part["names"]])
    problems = [f"{printable(name)}\t{problem}\n" for part in about for name, problem in part["problems"]]
    if problems:
        write_atomic(folder / "bad_images.txt", lambda f: f.write("".join(problems).encode()))
    write_atomic(folder / "name_ends.npy", lambda f: np.save(f, names.ends))
    write_atomic(folder / "names.npy", lambda f: np.save(f, names.bytes))
    totals = {how: sum(part[how] for part in about) for how in ("copied", "encoded")}
    totals |= {"unreadable": len(problems), "bytes": sum(file.stat().st_size for file in files)}
    return {"images": len(names)} | totals


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
