"""A name, an address or a path -> a file on this disk: downloaded once, offline from then on.

fetch("mae_vit_base")                                     a row of util/registry.json
fetch("https://host/encoder.safetensors#sha256=1a2b3c4d") an address, with or without a hash (or #md5=)
fetch("hf://ORG/REPO/encoder.safetensors")                through huggingface_hub; hf://ORG/REPO@REVISION/FILE
fetch("output_dir/encoder.pth")                           a file here, returned as it is
fetch("vit-mae-base/")                                    a folder of Hugging Face's: its file of weights
"""

import difflib
import fcntl
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from util.errors import InputError
from util.files import file_digests, write_atomic

REGISTRY = Path(__file__).with_name("registry.json")
CACHE = Path("~/.cache/cgd_mae")


def fetch(source: str | Path, cache: str | Path | None = None) -> Path:
    """The file behind a path, a registry name or an address; no network call where it is here already.

    Args:
        source: see the top of this file. A local file wins over a registry name of the same spelling.
        cache: folder of the downloads, default ~/.cache/cgd_mae; hf:// has huggingface_hub's own.
    Raises:
        InputError: no such file, name or address; a failed download; a wrong hash.
    """
    text = re.sub(r"^(https?|hf):/(?=[^/])", r"\1://", str(source))  # a Path has swallowed one slash
    local, rows = os.path.expanduser(text), known()
    if os.path.exists(local):
        return weights_file(local)
    if text in rows:
        row = rows[text]
        if not row["url"]:
            raise InputError(f"{text} ({row['what']}) has no address: fill in its url in {REGISTRY}, or give a path")
        return _from_web(row["url"], {kind: row[kind] for kind in ("sha256", "md5") if kind in row}, cache)
    url, _, fragment = text.partition("#")
    kind, _, prefix = fragment.lower().partition("=")
    if fragment and not (kind in ("sha256", "md5") and re.fullmatch("[0-9a-f]{6,64}", prefix)):
        raise InputError(f"{text} with the hash {fragment}: give sha256= or md5= and 6 or more of its digits")
    wanted = {kind: prefix} if fragment else {}
    if url.startswith(("http://", "https://")):
        return _from_web(url, wanted, cache)
    if url.startswith("hf://"):
        return _from_hugging_face(url, wanted)
    nearest = difflib.get_close_matches(text, rows, n=3, cutoff=0.6)
    raise InputError(
        f"checkpoint {text or repr(text)} does not exist as a file, and no released one has this name"
        + (f": did you mean {' or '.join(nearest)}?" if nearest else ".")
        + f" Known names: {', '.join(rows)}; else give a file, https://HOST/FILE or hf://ORG/REPO/FILE"
    )


def known() -> dict[str, dict]:
    """The registry: name -> {url, what, kind (encoder or full), model, licence}, and md5 or sha256 (a prefix)
    where one was published."""
    return json.loads(REGISTRY.read_text())


def weights_file(source: str | Path) -> Path:
    """The file of weights in a folder as Hugging Face's libraries write it; a file is returned as it is."""
    source = Path(source)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (source / name).is_file():
            return source / name
    if source.is_dir():
        files = sorted(str(p) for p in source.iterdir() if p.suffix in (".pth", ".pt", ".safetensors", ".npz"))
        holds = f"it holds {', '.join(files[:4]) or 'none'}"
        raise InputError(f"{source} is a folder without model.safetensors or pytorch_model.bin: give a file ({holds})")
    return source


def _from_web(url: str, wanted: dict[str, str], cache) -> Path:
    """A download in CACHE/HASH OF THE ADDRESS AND ITS HASH/, beside its `FILE.sha256` that `sha256sum -c` reads."""
    name = re.sub(r"[^\w.+=@-]", "_", urlsplit(url).path.rpartition("/")[2])[-100:].lstrip(".")
    if not name:
        raise InputError(f"{url} names no file: an address is https://HOST/PATH/FILE")
    folder = Path(cache or CACHE).expanduser() / hashlib.sha256(f"{url} {wanted}".encode()).hexdigest()[:12]
    file = folder / name
    if not file.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait for it
                if not file.is_file():
                    _download(url, file, wanted)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise InputError(
                f"cannot download {url} to {folder} ({error}): check the address, the network and the disk, or "
                "download it yourself and give its path"
            ) from error
    return file


def _download(url: str, file: Path, wanted: dict[str, str]) -> None:
    import torch  # here, so that this file can be imported without

    for left in file.parent.glob("*.partial"):  # of a process that was killed
        left.unlink()
    part, length = file.with_name(f"{file.name}.partial"), _length(url)
    print(f"downloading {url.partition('?')[0]}", flush=True)  # what follows a ? may be a key
    torch.hub.download_url_to_file(url, str(part))
    if length not in (None, part.stat().st_size):  # torch takes a cut connection for the end of the file
        raise OSError(f"cut at {part.stat().st_size:,} of {length:,} bytes")
    digests = _compare_hash(part, wanted, url)
    # the record first: a file that is there is a file that was checked
    write_atomic(f"{file}.sha256", lambda opened: opened.write(f"{digests['sha256']}  {file.name}\n".encode()))
    os.replace(part, file)


def _length(url: str) -> int | None:
    """Bytes that a server says a file has, None where it does not say; ValueError for a web page."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30) as answer:
            headers = answer.headers
    except urllib.error.HTTPError:  # also of servers that answer GET alone, which comes next
        return None
    if headers.get_content_type() == "text/html":
        raise ValueError("it is a web page")
    return int(headers["Content-Length"]) if headers["Content-Length"] else None


def _compare_hash(file: Path, wanted: dict[str, str], url: str) -> dict[str, str]:
    digests = file_digests(file, ("sha256", "md5"))
    for kind, prefix in wanted.items():
        if not digests[kind].startswith(prefix):
            raise InputError(f"{url} has the {kind} {digests[kind]}, not {prefix}... as published: it is another file")
    return digests


def _from_hugging_face(url: str, wanted: dict[str, str]) -> Path:
    """hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE; cache, login and offline rule are huggingface_hub's."""
    named = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+[^/])", url)
    if not named:
        raise InputError(f"{url} names no file: give hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE")
    import huggingface_hub  # takes a second, and only hf:// needs it

    try:
        file = Path(huggingface_hub.hf_hub_download(named[1], named[3], revision=named[2]))
    except Exception as error:  # its own, those of the HTTP client under it, the disk's
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot get {url} (private or gated: hf auth login first): {reason}") from error
    if wanted:
        _compare_hash(file, wanted, url)
    return file
