"""Folders that belong to one job: a header says which, and another job is refused."""

import json
from pathlib import Path

from util.checkpoint import write_json
from util.dist import is_main_process
from util.errors import InputError


def claim(file: Path, header: dict, what: str) -> bool:
    """Write `header` to `file` (rank 0), or make sure that the one there is the same.

    Args:
        what: the folder's content in words, for the message.
    Returns:
        Whether the folder is new.
    Raises:
        InputError: it holds something else, with the names that differ, or a damaged header.
    """
    if not file.is_file():
        if is_main_process():
            write_json(file, header)
        return True
    try:
        old = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is damaged ({error}): remove {file.parent} and start again") from error
    different = [key for key in header if old.get(key) != header[key]]
    if different:
        raise InputError(
            f"{file.parent} holds another {what} (its {', '.join(different)} differ): choose another "
            "--output or remove it"
        )
    return False
