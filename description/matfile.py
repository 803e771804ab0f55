"""Cell arrays of strings in MATLAB 5 files (.mat), without further packages.

Layout: MATLAB's public description of the level-5 format. A file is a header of 128 bytes and a list
of elements; an element is a tag (type, size in bytes) and data, padded to 8 bytes; small ones share
one 8-byte word with their tag.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from util.errors import InputError

MI_MATRIX, MI_COMPRESSED = 14, 15
MX_CELL, MX_CHAR = 1, 4
CHARACTERS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}


def read_cell_strings(file: str | Path, variable: str) -> list[str | None]:
    """The strings of one cell array in MATLAB's (column-major) order, None for empty cells. A file with
    only one cell array is read whatever its name.

    Raises:
        InputError: no such file or variable, another format (v7.3 is HDF5), damage.
    """
    file = Path(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    if len(data) < 128 or data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise InputError(
            f"{file} is no MATLAB 5 file (version 7.3 is another format): write its names to a .txt, one "
            "a line"
        )
    order = "<" if data[126:128] == b"IM" else ">"
    found: dict[str, list[str | None] | None] = {}
    try:
        for kind, content in _elements(data[128:], order):
            if kind == MI_COMPRESSED:
                [(kind, content)] = _elements(zlib.decompress(content), order)
            if kind == MI_MATRIX:
                name, strings = _cell(content, order)
                found[name] = strings
    except (struct.error, zlib.error, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{file} is damaged ({error}): copy it again") from error
    cells = {name: strings for name, strings in found.items() if strings is not None}
    if variable not in cells and len(cells) != 1:
        raise InputError(
            f"{file} has no cell array '{variable}': it holds {', '.join(filter(None, found)) or 'nothing'}"
        )
    return cells.get(variable) or next(iter(cells.values()))


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        if kind >> 16:  # small element: size and type share the first four bytes
            yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
            at += 8
            continue
        if at + 8 + size > len(data):
            raise ValueError(f"an element of {size} bytes is cut off")
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size + (0 if kind == MI_COMPRESSED else -size % 8)


def _cell(content: bytes, order: str) -> tuple[str, list[str | None] | None]:
    """A matrix element -> (its name, the strings of its cells or None if it is no cell array)."""
    parts = list(_elements(content, order))
    flags, name = struct.unpack_from(order + "I", parts[0][1])[0], parts[2][1].decode("latin-1")
    if flags & 0xFF != MX_CELL:
        return name, None
    return name, [_string(cell, order) for kind, cell in parts[3:] if kind == MI_MATRIX]


def _string(content: bytes, order: str) -> str | None:
    parts = list(_elements(content, order))
    if not parts or struct.unpack_from(order + "I", parts[0][1])[0] & 0xFF != MX_CHAR or len(parts) < 4:
        return None
    kind, text = parts[3]
    encoding = CHARACTERS[kind]
    if encoding in ("utf-16", "utf-32"):
        encoding += "-le" if order == "<" else "-be"
    return text.decode(encoding).strip() or None
