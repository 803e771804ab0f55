"""Files: written whole or not at all, and known by their bytes. Free of torch."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from util.errors import InputError

BLOCK_BYTES = 1 << 24
# what reading a damaged .npz raises
ZIP_ERRORS = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def write_atomic(file: str | Path, write) -> None:
    """`write(binary file)` under a temporary name, then fsync and rename: whole or not at all. InputError: the disk is
    full or the folder not writable; an older file stays as it was."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as opened:
            write(opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides the disk's
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"cannot write {file}: {reason.strerror or reason}") from error
    finally:
        with contextlib.suppress(OSError):  # gone where all went well
            temporary.unlink()


def make_folder(folder: str | Path) -> None:
    """Make an output folder, before hours of work show that it cannot be written; InputError then."""
    write_atomic(Path(folder) / ".writable", lambda opened: None)
    (Path(folder) / ".writable").unlink(missing_ok=True)


def write_json(file: str | Path, value) -> None:
    """JSON with a final newline, atomically."""
    write_atomic(file, lambda opened: opened.write(f"{json.dumps(value, indent=1)}\n".encode()))


def write_csv(file: str | Path, rows) -> None:
    """Rows as CSV, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(file, lambda opened: opened.write(text.getvalue().encode()))


def read_json(file: str | Path, cure: str) -> dict:
    """The object in a file of JSON; InputError with what to do where it is damaged."""
    try:
        if isinstance(value := json.loads(Path(file).read_text(encoding="utf-8")), dict):
            return value
        raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}): {cure}") from error


def fits(value, shape) -> bool:
    """Whether JSON is made so: `str` (that UTF-8 holds), `[shape]` a list of such, `{str: shape}` an object."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(fits(k, str) and fits(v, shape[str]) for k, v in value.items())
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def read_array(file: str | Path, cure: str) -> np.ndarray:
    """A .npy that this project wrote, as a memory map; InputError with what to do where it is damaged or cut short."""
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError, tokenize.TokenError) as error:  # the last of a damaged header
        raise InputError(f"{file} is damaged ({error}): {cure}") from error


def read_arrays(file: str | Path) -> dict[str, np.ndarray] | None:
    """All of a .npz that this project wrote; None where it is not there, or damaged (zip's CRC tells)."""
    try:
        with np.load(file) as stored:
            return dict(stored)
    except ZIP_ERRORS as error:
        if not isinstance(error, FileNotFoundError):
            print(f"{file} is damaged ({error}): it is made again", flush=True)
        return None


def file_sha256(file: str | Path) -> str:
    """Identity of a file's bytes, 64 digits."""
    return file_digests(file, ("sha256",))["sha256"]


def file_digests(file: str | Path, names: tuple[str, ...]) -> dict[str, str]:
    """{name of hashlib: hex digits} of a file's bytes, read once."""
    digests = {name: hashlib.new(name) for name in names}
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            for digest in digests.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}
