"""Pack images into a few big files of JPEGs with a short side of 256 px, which train faster and copy well.

    python -m tools.pack --data_path PHOTOS --output packed
    python main_pretrain.py --data_path packed ...
    python -m tools.pack --data_path "https://host/shard-{000..099}.tar" --output packed   # WebDataset

JPEGs that are small enough are stored byte for byte. A run that was stopped goes on at the first shard that
is missing. Unreadable images are left out, counted and listed in bad_images.txt.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.pack", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--data_path", required=True,
        help="folder, manifest, or WebDataset: .tar files or URLs, {000..099} for a range")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all)")
    add("--output", required=True, help="folder of the packed set")
    add("--short_side", default=256, type=int, help="pixels of the shorter side; smaller stay (default 256)")
    add("--quality", default=90, type=int, help="JPEG quality of what is re-encoded (default 90)")
    add("--shard_images", default=8192, type=int,
        help="images a file; a WebDataset keeps its own shards (default 8192)")
    add("--num_workers", default=None, type=int, help="processes (default: the cores of this machine)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import hashlib
import io
import json
import os
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from PIL import Image

from datasets.images import UNREADABLE, is_turned, open_reduced, why_unreadable
from datasets.manifest import IMAGE_ENDINGS, list_images
from datasets.path_list import PACK_HEADER, PathList, shard_file
from util.errors import InputError
from util.files import write_atomic, write_json
from util.parallel import claim, map_in_order, worker_pool
from util.progress import Progress


def main(args) -> dict:
    for name, low, high in (("short_side", 16, 65_500), ("quality", 1, 100), ("shard_images", 1, 10**9)):
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name} {getattr(args, name)}: must be from {low} to {high}")
    started, folder = time.perf_counter(), Path(args.output)
    data_path = args.data_path
    if data_path.endswith((".tar", ".tar}")) or "::" in data_path or data_path.startswith("pipe:"):
        source = WebShards(data_path)
    else:
        source = FileShards(list_images(data_path, args.split), args.shard_images)
    header = {
        "kind": "cgd-mae packed images",
        "version": 1,
        "source_sha256": source.sha256(),
        "short_side": args.short_side,
        "quality": args.quality,
        "shards": len(source),
    }
    claim(folder / PACK_HEADER, header, "packed set")
    todo = [k for k in range(len(source)) if not shard_file(folder, k).is_file()]
    total, left = (sum(source.size(k) for k in shards) for shards in (range(len(source)), todo))
    progress, done = Progress(source.unit, total), total - left
    progress.update(done, "packed before")
    encode = partial(encode_chunk, short_side=args.short_side, quality=args.quality)
    workers = args.num_workers or os.cpu_count() or 1
    with worker_pool(workers) as pool:
        for shard in todo:
            write_shard(folder, shard, map_in_order(pool, encode, source.items(shard), workers))
            done += source.size(shard)
            progress.update(done)
    progress.close()
    totals = finish(folder, len(source))
    if not totals["images"]:
        raise InputError(f"no image of {data_path} could be read: {folder / 'bad_images.txt'} says why")
    return totals | {"shards": len(source), "written": len(todo), "seconds": time.perf_counter() - started}


class FileShards:
    """A list of files, cut into shards of `shard_images`."""

    unit = "images"

    def __init__(self, paths: PathList, shard_images: int):
        self.paths, self.shard_images = paths, shard_images

    def __len__(self) -> int:
        return -(-len(self.paths) // self.shard_images)

    def size(self, shard: int) -> int:
        return min(self.shard_images, len(self.paths) - shard * self.shard_images)

    def items(self, shard: int) -> Iterator[tuple[str, Path]]:
        first = shard * self.shard_images
        return ((self.paths.relative(i), self.paths[i]) for i in range(first, first + self.size(shard)))

    def sha256(self) -> str:
        return f"{self.paths.sha256()} / {self.shard_images}"


class WebShards:
    """Shards of `data_path`: braces give ranges, `::` joins lists, as the webdataset library has it.

    Raises:
        InputError: the library is missing, or a local file does not exist.
    """

    unit = "shards"

    def __init__(self, data_path: str):
        try:
            from webdataset.shardlists import expand_urls
        except ImportError:
            raise InputError(f"{data_path} needs the webdataset library: pip install webdataset") from None
        self.urls = expand_urls(data_path)
        missing = [url for url in self.urls if ":" not in url and not Path(url).is_file()]
        if missing:
            raise InputError(f"{len(missing)} of {len(self.urls)} shards do not exist, first {missing[0]}")

    def __len__(self) -> int:
        return len(self.urls)

    def size(self, shard: int) -> int:
        return 1

    def sha256(self) -> str:
        names = [url.rsplit("/", 1)[-1] for url in self.urls]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def items(self, shard: int) -> Iterator[tuple[str, bytes]]:
        """(shard/key.ending, encoded image) of every sample that has an image.

        Raises:
            InputError: the shard cannot be opened, or ends early.
        """
        import webdataset

        url = self.urls[shard]
        if Path(url).is_file() and not _has_end_mark(Path(url)):
            # Python's tarfile takes a cut between two members for the end of the archive
            raise InputError(f"shard {url} is cut off (no end-of-archive mark): copy or download it again")
        stem = url.rsplit("/", 1)[-1].removesuffix(".tar")
        samples = webdataset.WebDataset(url, shardshuffle=False, empty_check=False, handler=_reraise)
        try:
            for sample in samples:
                for ending in IMAGE_ENDINGS:
                    if ending[1:] in sample:
                        yield f"{stem}/{sample['__key__']}{ending}", sample[ending[1:]]
                        break
        except (OSError, EOFError, tarfile.TarError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"shard {url} could not be read to its end ({type(error).__name__}: {reason}): run the same "
                "command again when it can; finished shards are kept"
            ) from error


def _has_end_mark(file: Path) -> bool:
    with open(file, "rb") as opened:
        opened.seek(-min(1024, file.stat().st_size), 2)
        return not any(opened.read())


def _reraise(error: Exception) -> bool:
    raise error


def encode_chunk(chunk, short_side: int, quality: int) -> list[tuple[str, bytes, str]]:
    """[(name, file or encoded bytes)] -> [(name, JPEG or b"", how: "copied", "encoded" or the problem)]."""
    rows = []
    for name, source in chunk:
        try:
            data = source.read_bytes() if isinstance(source, Path) else source
            rows.append((name, *encode_image(data, short_side, quality)))
        except UNREADABLE as error:
            rows.append((name, b"", why_unreadable(error)))
    return rows


def encode_image(data: bytes, short_side: int, quality: int) -> tuple[bytes, str]:
    """Encoded image -> (upright RGB or grey JPEG with at most `short_side` px on its shorter side, how)."""
    with Image.open(io.BytesIO(data)) as image:
        fits = min(image.size) <= short_side
        if image.format == "JPEG" and fits and image.mode in ("RGB", "L") and not is_turned(image):
            image.load()  # a truncated file must not get into the set
            return data, "copied"

    def reduction(width: int, height: int) -> int:
        room = min(width, height) / (2 * short_side)
        return max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))

    image, _ = open_reduced(io.BytesIO(data), reduction)
    scale = short_side / min(image.size)
    if scale < 1:
        size = tuple(max(round(side * scale), 1) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue(), "encoded"


def write_shard(folder: Path, shard: int, rows: Iterable[tuple[str, bytes, str]]) -> None:
    """One shard and, before it appears, all that is told about it: what exists is complete."""
    file = shard_file(folder, shard)
    names, problems, index, counts = [], [], [], {"copied": 0, "encoded": 0}

    def write(opened) -> None:
        position = 0
        for name, data, how in rows:
            if not data:
                problems.append([name, how])
                continue
            opened.write(data)
            index.append((position, len(data), zlib.crc32(data)))
            names.append(name)
            counts[how] += 1
            position += len(data)
        table = np.array(index, dtype=np.int64).reshape(-1, 3)
        write_atomic(file.with_suffix(".npy"), lambda f: np.save(f, table))
        write_json(file.with_suffix(".json"), {"names": names, "problems": problems, **counts})

    write_atomic(file, write)


def finish(folder: Path, shards: int) -> dict:
    """Join the names; what a reader needs is then all there."""
    files = [shard_file(folder, shard) for shard in range(shards)]
    about = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    names = PathList(folder, [name for part in about for name in part["names"]])
    problems = [f"{name}\t{problem}\n" for part in about for name, problem in part["problems"]]
    if problems:
        write_atomic(folder / "bad_images.txt", lambda f: f.write("".join(problems).encode()))
    write_atomic(folder / "name_ends.npy", lambda f: np.save(f, names.ends))
    write_atomic(folder / "names.npy", lambda f: np.save(f, names.bytes))
    totals = {how: sum(part[how] for part in about) for how in ("copied", "encoded")}
    size = sum(file.stat().st_size for file in files)
    return {"images": len(names), **totals, "unreadable": len(problems), "bytes": size}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
