"""Cell arrays of strings and struct arrays in MATLAB 5 files (.mat), without further packages.

Layout: MATLAB's public description of the level-5 format. A file is a header of 128 bytes and a list
of elements; an element is a tag (type, size in bytes) and data, padded to 8 bytes; small ones share
one 8-byte word with their tag.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from util.errors import InputError

MI_MATRIX, MI_COMPRESSED = 14, 15
MX_CELL, MX_STRUCT, MX_CHAR = 1, 2, 4
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
CHARACTERS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}


def read_cell_strings(file: str | Path, variable: str) -> list[str | None]:
    """The strings of one cell array in MATLAB's (column-major) order, None for empty cells. A file with
    only one cell array is read whatever its name.

    Raises:
        InputError: no such file or variable, another format (v7.3 is HDF5), damage.
    """
    file = Path(file)
    found = _variables(file, _cell)
    cells = {name: strings for name, strings in found.items() if strings is not None}
    if variable not in cells and len(cells) != 1:
        raise InputError(
            f"{file} has no cell array '{variable}': it holds {', '.join(filter(None, found)) or 'nothing'}"
        )
    return cells.get(variable) or next(iter(cells.values()))


def read_struct_array(file: str | Path, variable: str) -> tuple[list[str], list[tuple]]:
    """One struct array: the names of its fields in their order, and for each element the values of all
    fields, again in that order. A text is a str, a single number an int or float, all else (matrices, empty
    fields) None.

    Raises:
        InputError: see `read_cell_strings`.
    """
    file = Path(file)
    found = _variables(file, _struct)
    if found.get(variable) is None:
        raise InputError(
            f"{file} has no struct array '{variable}': it holds {', '.join(filter(None, found)) or 'nothing'}"
        )
    return found[variable]


def _variables(file: Path, read: Callable[[bytes, str], tuple[str, object]]) -> dict[str, object]:
    """{name: what `read` makes of it (None: not its kind)} of the arrays in a file."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    if len(data) < 128 or data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise InputError(
            f"{file} is no MATLAB 5 file (version 7.3 is another format): save it with -v7, or write its "
            "names to a .txt, one a line"
        )
    order = "<" if data[126:128] == b"IM" else ">"
    found = {}
    try:
        for kind, content in _elements(data[128:], order):
            if kind == MI_COMPRESSED:
                [(kind, content)] = _elements(zlib.decompress(content), order)
            if kind == MI_MATRIX:
                name, values = read(content, order)
                found[name] = values
    except (struct.error, zlib.error, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{file} is damaged ({error}): copy it again") from error
    return found


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


def _struct(content: bytes, order: str) -> tuple[str, tuple[list[str], list[tuple]] | None]:
    """A matrix element -> (its name, fields and rows of `read_struct_array` or None if it is none)."""
    parts = list(_elements(content, order))
    flags, name = struct.unpack_from(order + "I", parts[0][1])[0], parts[2][1].decode("latin-1")
    if flags & 0xFF != MX_STRUCT:
        return name, None
    length = struct.unpack(order + "i", parts[3][1])[0]
    names = parts[4][1]
    fields = [names[i : i + length].split(b"\0")[0].decode("latin-1") for i in range(0, len(names), length)]
    values = [_value(cell, order) for kind, cell in parts[5:] if kind == MI_MATRIX]
    if not fields or len(values) % len(fields):
        raise ValueError(f"a struct array with {len(values)} values of {len(fields)} fields")
    return name, (fields, [tuple(values[i : i + len(fields)]) for i in range(0, len(values), len(fields))])


def _value(content: bytes, order: str) -> str | int | float | None:
    """A matrix element as a text or a single number; None for all else."""
    parts = list(_elements(content, order))
    if len(parts) < 4 or struct.unpack_from(order + "I", parts[0][1])[0] & 0xFF == MX_CHAR:
        return _string(content, order)
    kind, data = parts[3]
    code = order + NUMBERS.get(kind, "")
    return struct.unpack(code, data)[0] if kind in NUMBERS and len(data) == struct.calcsize(code) else None
