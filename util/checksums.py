"""Whether the bytes of a file of weights are those that were written.

torch.load does not compare the checksums that its zip files hold, and safetensors has none; ours carry one
over their names, sizes, header and numbers.
"""

import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

from util.errors import InputError
from util.files import BLOCK_BYTES

NO_SUM = "00000000"
DAMAGE = (  # what readers raise on files of weights that are cut, changed or something else
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error, EOFError, OSError, MemoryError,
    ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError, ArithmeticError,
)  # fmt: skip


def with_checksum(content: bytes) -> tuple[bytes, memoryview]:
    """A safetensors file with "crc32": NO_SUM in its header -> its beginning with the sum, its numbers."""
    view = memoryview(content)
    start = 8 + int.from_bytes(view[:8], "little")
    header = bytes(view[8:start])
    total = zlib.crc32(view[start:], _header_sum(json.loads(header)))
    placeholder = f'"crc32":"{NO_SUM}"'.encode()
    return bytes(view[:8]) + header.replace(placeholder, f'"crc32":"{total:08x}"'.encode()), view[start:]


def _header_sum(header: dict) -> int:
    """Of names, sizes and metadata, in an order that the writer does not choose."""
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != "crc32"}
    return zlib.crc32(json.dumps(header | {"__metadata__": metadata}, sort_keys=True).encode())


def kind_of_sums(file: str | Path) -> str:
    """Which checksums a file that `check_sums` has accepted holds, in words."""
    if Path(file).suffix == ".safetensors":
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        found = "crc32" in header.get("__metadata__", {})
        return "crc32 of header and tensors" if found else "none in this file: compare sha256"
    return "crc32 of each record" if zipfile.is_zipfile(file) else "none in this format: compare sha256"


def check_sums(file: str | Path) -> None:
    """Compare the checksums inside a file of weights with its bytes: those of torch's zip files, of .npz and
    of our safetensors. An old .pth and safetensors of others have none.

    Raises:
        InputError: bytes have changed since the file was written.
    """
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            _check_safetensors(file)
        elif zipfile.is_zipfile(file):
            _check_zip(file)
    except DAMAGE as error:
        raise InputError(
            f"checkpoint {file} is damaged ({' '.join(str(error).split())[:100]}): bytes have changed, fetch "
            "or copy it again"
        ) from error


def _check_safetensors(file: Path) -> None:
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        wanted = header.get("__metadata__", {}).get("crc32")
        if not wanted:
            return
        found = _header_sum(header)
        while block := opened.read(BLOCK_BYTES):
            found = zlib.crc32(block, found)
    if f"{found:08x}" != wanted:
        raise ValueError(f"its crc32 is {found:08x}, not {wanted}")


def _check_zip(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        records = [record for record in archive.infolist() if record.CRC]  # 0: written without
        for record in records:
            with archive.open(record) as opened:
                while opened.read(BLOCK_BYTES):
                    pass
