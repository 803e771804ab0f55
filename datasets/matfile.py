"""Strings and struct arrays of MATLAB files (.mat, up to version 7.2), read by scipy."""

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from datasets.images import read_bytes
from util.errors import InputError

MAX_BYTES = 64 * 2**20


def read_cell_strings(file: str | Path, variable: str) -> list[str | None]:
    """The strings of one cell array in MATLAB's (column-major) order, None for empty cells. A file with only one cell
    array is read whatever its name."""
    arrays = _load(file)
    cells = [name for name, value in arrays.items() if value.dtype == object and value.dtype.names is None]
    if variable not in cells and len(cells) != 1:
        raise InputError(f"{file} has no cell array '{variable}': it holds {', '.join(arrays) or 'nothing'}")
    cell = arrays[variable if variable in cells else cells[0]]
    found = (_value(value) for value in cell.ravel(order="F"))
    return [value if isinstance(value, str) else None for value in found]


def read_struct_array(file: str | Path, variable: str) -> tuple[list[str], list[tuple]]:
    """One struct array: its fields, and for each element their values: a text is a str, a single number an int or
    float, all else (matrices, empty fields) None."""
    found = _load(file).get(variable)
    if found is None or found.dtype.names is None:
        raise InputError(f"{file} has no struct array '{variable}'")
    rows = [tuple(_value(value) for value in row) for row in found.ravel(order="F").tolist()]
    return list(found.dtype.names), rows


def _load(file: str | Path) -> dict[str, np.ndarray]:
    from scipy.io import loadmat, whosmat  # here and not above: most sets need no scipy

    try:
        data = read_bytes(file)
        if max(len(data), _unpacked_size(data)) > MAX_BYTES or any(math.prod(x[1]) > MAX_BYTES for x in whosmat(file)):
            raise InputError(f"larger than {MAX_BYTES:,} bytes, as no file of annotations is")
        return {name: value for name, value in loadmat(io.BytesIO(data)).items() if not name.startswith("__")}
    except Exception as error:  # scipy lets errors of many kinds pass
        raise InputError(
            f"{file} cannot be read ({error}): copy it again; version 7.3 is another format, save it with -v7, or "
            "write its names to a .txt, one a line"
        ) from error


def _unpacked_size(data: bytes) -> int:
    """Bytes of the compressed variables of a file of version 5, as far as MAX_BYTES."""
    order, position, size = "<" if data[126:128] == b"IM" else ">", 128, 0
    while position + 8 <= len(data) and size <= MAX_BYTES:
        kind, length = struct.unpack_from(f"{order}II", data, position)
        if kind == 15:  # miCOMPRESSED
            body = data[position + 8 : position + 8 + length]
            size += len(zlib.decompressobj().decompress(body, MAX_BYTES + 1))
        position += 8 + length
    return size


def _value(array: np.ndarray) -> str | int | float | None:
    """A text or a single number; None for all else."""
    if array.dtype.kind == "U":
        return (array[0].strip() or None) if array.shape == (1,) else None
    return array.item() if array.size == 1 and array.dtype.kind in "biuf" else None
