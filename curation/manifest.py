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
) -> dict[str, int]:
    """Write folder/manifest.csv, one row a selected image in the order of the index.

    Images that have no file of their own, or of which a box is wanted, are written to folder/images as they will be
    trained on (packed images byte for byte, boxes as JPEG of quality 95); all others stay where they are.

    Args:
        cut_folder: name of the folder in folder/images, another one for another index.
        selection: [n] int64 index rows, ascending. clusters: [n, levels] int32. distance: [n] float32, squared.
    """
    text, written = io.StringIO(), 0
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"cluster{level + 1}" for level in range(clusters.shape[1])), "distance"])
    rows = enumerate(read_rows(folder / "index.csv"))
    for place, wanted in enumerate(selection.tolist()):
        row = next(row for number, row in rows if number == wanted)
        file = own_file(folder / "images" / cut_folder, images, wanted, row["box"])
        if file is not None:
            row |= {"path": str(file.relative_to(folder)), "box": ""}  # it is cut already
            written += 1
        writer.writerow([*(row[name] for name in COLUMNS), *clusters[place].tolist(), f"{distance[place]:.6g}"])
    write_atomic(folder / "manifest.csv", lambda opened: opened.write(text.getvalue().encode("utf-8", "replace")))
    return {"images": len(selection), "written_images": written}


def own_file(folder: Path, images: JoinedImages, number: int, box: str) -> Path | None:
    """Write a file for an image that has none that can be trained on as it is; None where it has."""
    source, index = images.locate(number)
    if not box and not isinstance(source.paths, PackedImages):
        return None
    file = folder / source.name / f"{number:09d}.jpg"
    if file.is_file():
        return file
    if box:
        encoded = io.BytesIO()
        cut = open_rgb(source.paths[index]).crop(tuple(map(int, box.split())))
        cut.save(encoded, "JPEG", quality=95, subsampling=0)
        data = encoded.getvalue()
    else:
        data = source.paths.read(index)
    write_atomic(file, lambda opened: opened.write(data))
    return file
