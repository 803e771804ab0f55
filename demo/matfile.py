"""Struct arrays and cell arrays of strings as MATLAB 5 files (.mat), the reverse of description.matfile."""

import struct
from pathlib import Path

from description.matfile import MI_MATRIX, MX_CELL, MX_CHAR, MX_STRUCT
from util.files import write_atomic

INT8, UINT8, UINT16, INT32, UINT32, UTF8 = 1, 2, 4, 5, 6, 16  # data types
CLASS_UINT8, CLASS_UINT16 = 9, 11  # array classes
HEADER = b"MATLAB 5.0 MAT-file, drawn vehicles".ljust(124) + b"\x00\x01IM"  # little-endian


def write_mat(file: Path, variables: dict[str, list[str] | list[dict[str, int | str]]]) -> None:
    """Write a file that MATLAB and scipy read.

    Args:
        variables: by name. A list of texts becomes a row cell array; a list of dicts, all with the same keys
            in the same order, a row struct array with these fields: texts are char arrays, numbers from 0 to
            65535 1 x 1 arrays, uint8 where they fit and uint16 above, as in StanfordCars' devkit.
    Raises:
        InputError: the file cannot be written.
    """
    content = HEADER
    for name, values in variables.items():
        if isinstance(values[0], dict):
            fields = list(values[0])
            length = 1 + max(map(len, fields))
            names = b"".join(field.encode().ljust(length, b"\0") for field in fields)
            body = _element(INT32, struct.pack("<i", length)) + _element(INT8, names)
            body += b"".join(_value(row[field]) for row in values for field in fields)
            content += _array(MX_STRUCT, (1, len(values)), body, name)
        else:
            content += _array(MX_CELL, (1, len(values)), b"".join(map(_value, values)), name)
    write_atomic(file, lambda opened: opened.write(content))


def _value(value: int | str) -> bytes:
    if isinstance(value, str):
        return _array(MX_CHAR, (1, len(value)), _element(UTF8, value.encode()))
    if value < 256:
        return _array(CLASS_UINT8, (1, 1), _element(UINT8, struct.pack("<B", value)))
    return _array(CLASS_UINT16, (1, 1), _element(UINT16, struct.pack("<H", value)))


def _array(kind: int, shape: tuple[int, int], body: bytes, name: str = "") -> bytes:
    content = _element(UINT32, struct.pack("<II", kind, 0)) + _element(INT32, struct.pack("<ii", *shape))
    content += _element(INT8, name.encode()) + body
    return struct.pack("<II", MI_MATRIX, len(content)) + content


def _element(kind: int, data: bytes) -> bytes:
    """Data behind its tag; up to four bytes share a word with it."""
    if len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)
