"""One file over HTTP into `FILE.part`: goes on where it was cut, starts again where the file has changed.

What the server said of the file (its ETag, date and size) is kept in `FILE.part.json`, so that a later
process goes on as well. The server is asked for the rest only if the file is still the same one (If-Range).
"""

import http.client
import json
import math
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from util.errors import InputError
from util.files import write_json
from util.progress import Progress

PAUSES_S = (1, 3, 10)  # after the first, second, third failure in a row; another one ends it
TIMEOUT_S = 30  # without a byte
BLOCK = 1 << 16  # bytes; what a broken connection can lose
BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers that another try may cure


class Cut(Exception):
    """The connection failed or ended early: another try may help."""


def transfer(url: str, file: Path) -> Path:
    """Bring all of `url` into `FILE.part`. The caller holds a lock on the folder.

    Returns:
        `FILE.part`: all bytes on disk, not yet checked by a hash.
    Raises:
        InputError: no such file, no network, no space; cut, and then `len(PAUSES_S)` times in a row without
            a new byte. What has come by then stays, and the next call goes on from there.
    """
    part = file.with_name(f"{file.name}.part")
    failures, most = 0, _size(part)
    while True:
        try:
            _go_on(url, part)
            return part
        except Cut as cut:
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures > len(PAUSES_S):
                raise InputError(_gave_up(url, part, cut, failures)) from cut
            pause = PAUSES_S[failures - 1]
            print(f"{file.name}: {cut}; {_mb(_size(part))} are here; again in {pause} s", flush=True)
            time.sleep(pause)


def discard(part: Path) -> None:
    """Remove what has come of a file."""
    part.unlink(missing_ok=True)
    _notes_file(part).unlink(missing_ok=True)


def _go_on(url: str, part: Path) -> None:
    """One request: all of the file, or what is missing of it.

    Raises:
        Cut: another try may help. InputError: it will not.
    """
    notes = _read_notes(part)
    same = _validator(notes)
    have = _size(part) if same else 0  # without a mark of the file the pieces could be of two files
    if have and have == notes.get("total"):
        return  # ended between the last byte and the check
    headers = {"User-Agent": "cgd-mae", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": same}
    with _open(url, headers, part) as response:
        if response.status == 206:
            _check_rest(response, notes, have, part)
            total = notes.get("total")
        else:
            if have:
                print(f"{part.stem}: changed, or a server that cannot resume: from the beginning", flush=True)
            have, total = 0, _whole_number(response.headers.get("Content-Length"))
        _check_space(part, total, have)
        try:
            if not have:
                part.write_bytes(b"")
                names = {"etag": "ETag", "modified": "Last-Modified"}
                notes = {key: response.headers.get(name, "") for key, name in names.items()}
                write_json(_notes_file(part), notes | {"total": total})
            with open(part, "ab") as opened:
                _receive(response, opened, part.stem, have, total)
        except OSError as error:
            raise InputError(
                f"cannot write {part}: {error.strerror or error}; what has come is kept: cure that, run the "
                "command again, and it goes on"
            ) from error
    if total is not None and _size(part) != total:
        if _size(part) > total:
            discard(part)
        raise Cut("the connection was cut")


def _open(url: str, headers: dict[str, str], part: Path) -> http.client.HTTPResponse:
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # what is here is longer than the file there
            discard(part)
            raise Cut("the file there is another one now") from error
        if error.code in BUSY:
            raise Cut(f"the server answered {error.code} {error.reason}") from error
        raise InputError(
            f"{url} answered {error.code} {error.reason}: check the address, or download the file yourself "
            "and give its path"
        ) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise InputError(f"{url} is no address: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Cut(_reason(error)) from error
    if response.status not in (200, 206) or (response.status == 206 and "Range" not in headers):
        response.close()
        raise InputError(f"{url} answered {response.status}, not the file: check the address")
    if response.headers.get_content_type() == "text/html":
        response.close()
        raise InputError(
            f"{url} is a web page, not a file of weights: give the address of the file itself, or download "
            "it in a browser and give its path"
        )
    return response


def _check_rest(response: http.client.HTTPResponse, notes: dict, have: int, part: Path) -> None:
    """A 206 must begin where we stopped, in the same file; there are servers that ignore If-Range."""
    begins = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", response.headers.get("Content-Range", ""))
    new = {"etag": response.headers.get("ETag"), "modified": response.headers.get("Last-Modified")}
    another = any(new[key] and notes.get(key) and new[key] != notes[key] for key in new)
    if begins and begins[2] != "*" and notes.get("total") is not None:
        another |= int(begins[2]) != notes["total"]
    if another or not begins or int(begins[1]) != have:
        discard(part)
        raise Cut("the file there is another one now")


def _receive(response: http.client.HTTPResponse, opened, name: str, have: int, total: int | None) -> None:
    """Append what comes to `opened` until the end or a cut, then fsync."""
    megabytes = math.ceil((total or 0) / 1e6)
    progress = Progress(f"{name} (MB)", megabytes, int(have / 1e6), shown=total is not None)
    try:
        while block := _read(response):
            opened.write(block)
            have += len(block)
            done = megabytes if have == total else int(have / 1e6)
            if done > progress.done:
                progress.update(done)
    finally:
        progress.close()
        opened.flush()
        os.fsync(opened.fileno())


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise Cut(_reason(error)) from error


def _check_space(part: Path, total: int | None, have: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise InputError(
            f"{part.stem} needs {_mb(total - have)} and {part.parent} has {_mb(free)} free: make room, or "
            "download the file to another disk and give its path"
        )


def _gave_up(url: str, part: Path, cut: Cut, failures: int) -> str:
    notes, kept = _read_notes(part), _size(part)
    if kept and _validator(notes):
        of = f" of {_mb(notes['total'])}" if notes.get("total") else ""
        cure = f"{_mb(kept)}{of} are kept: run the command again and it goes on from there"
    else:
        cure = "run the command again later, or download the file on another machine and give its path"
    return f"cannot download {url}: {cut}, {failures} times in a row; {cure}"


def _validator(notes: dict) -> str:
    """What If-Range may carry: a strong ETag, else the date, else nothing (RFC 9110, 13.1.5)."""
    etag = notes.get("etag", "")
    return notes.get("modified", "") if not etag or etag.startswith("W/") else etag


def _read_notes(part: Path) -> dict:
    try:
        notes = json.loads(_notes_file(part).read_text())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _notes_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _whole_number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error.reason, str):
        error = error.reason
    return " ".join(str(error).split())[:200] or type(error).__name__
