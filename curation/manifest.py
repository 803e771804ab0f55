"""The selection as manifest.csv, which main_pretrain.py takes as --data_path."""

import csv
import io
from pathlib import Path

import numpy as np

from curation.index import read_rows
from curation.sources import JoinedImages
from datasets.images import open_rgb
from datasets.packed import PackedImages
from util.files import write_atomic

COLUMNS = ("path", "source", "sha256", "width", "height", "box", "identity", "camera")


def write_manifest(
    folder: Path,
    cut_folder: str,
    images: JoinedImages,
    selection: np.ndarray,
    clusters: np.ndarray,
    distance: np.ndarray,
    progress=lambda done: None,
) -> dict[str, int]:
    """Write folder/manifest.csv, one row a selected image in the order of the index.

    Images that have no file of their own, or of which a box is wanted, are written to folder/images as they
    will be trained on (packed images byte for byte, boxes as JPEG of quality 95); all others stay where they
    are.

    Args:
        cut_folder: name of the folder in folder/images, another one for another index.
        selection: [n] int64 index rows, ascending. clusters: [n, levels] int32. distance: [n] float32,
        squared.
    Returns:
        {"images", "written_images"}.
    """
    wanted = iter(zip(selection.tolist(), clusters.tolist(), distance.tolist()))
    number, path_of_clusters, away = next(wanted, (-1, [], 0.0))
    written = count = 0

    def write(opened) -> None:
        nonlocal number, path_of_clusters, away, written, count
        text = io.TextIOWrapper(opened, encoding="utf-8", errors="replace", newline="")
        writer = csv.writer(text, lineterminator="\n")
        levels = [f"cluster{level}" for level in range(1, clusters.shape[1] + 1)]
        writer.writerow([*COLUMNS, *levels, "distance"])
        for row_number, row in enumerate(read_rows(folder / "index.csv")):
            if row_number != number:
                continue
            file = own_file(folder / "images" / cut_folder, images, number, row["box"])
            if file is not None:
                row = row | {"path": str(file.relative_to(folder)), "box": ""}  # it is cut already
                written += 1
            writer.writerow([*(row[name] for name in COLUMNS), *path_of_clusters, f"{away:.6g}"])
            count += 1
            if count % 512 == 0:
                progress(count)
            number, path_of_clusters, away = next(wanted, (-1, [], 0.0))
        text.flush()
        text.detach()

    write_atomic(folder / "manifest.csv", write)
    progress(count)
    return {"images": count, "written_images": written}


def own_file(folder: Path, images: JoinedImages, number: int, box: str) -> Path | None:
    """A file for an image that has none that can be trained on as it is; None where it has."""
    source, index = images.locate(number)
    paths = images.sources[source].paths
    packed = isinstance(paths, PackedImages)
    if not box and not packed:
        return None
    file = folder / images.sources[source].name / f"{number:09d}.jpg"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        if box:
            cut = open_rgb(paths[index]).crop(tuple(map(int, box.split())))
            encoded = io.BytesIO()
            cut.save(encoded, "JPEG", quality=95, subsampling=0)
            data = encoded.getvalue()
        else:
            data = paths.read(index)
        write_atomic(file, lambda opened: opened.write(data))
    return file
