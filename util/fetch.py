"""A name, an address or a path -> a file on this disk: downloaded once, offline from then on.

fetch("mae_vit_base")                                     a row of util/registry.json
fetch("https://host/encoder.safetensors#sha256=1a2b3c4d") an address, with or without a hash (or #md5=)
fetch("hf://ORG/REPO/encoder.safetensors")                through huggingface_hub; hf://ORG/REPO@REVISION/FILE
fetch("output_dir/encoder.pth")                           a file here, returned as it is
fetch("vit-mae-base/")                                    a folder of Hugging Face's: its file of weights
"""

import difflib
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from tqdm import tqdm

from util.errors import InputError
from util.files import BLOCK_BYTES, file_digests, write_atomic

REGISTRY = Path(__file__).with_name("registry.json")
CACHE = Path("~/.cache/cgd_mae")
LARGEST_BYTES = 32 << 30


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone; with `allow_http` also to http."""

    def __init__(self, allow_http: bool):
        self.allowed = ("https://", "http://") if allow_http else ("https://",)

    def check(self, url: str) -> str:
        """The address without what follows a ?, which may be a key."""
        if not url.startswith(self.allowed):
            words = "is not https; --allow_http of tools.checkpoint download takes http, too"
            raise ValueError(f"{url.partition('?')[0]} {words}")
        return url.partition("?")[0]

    def redirect_request(self, request, answer, code, message, headers, url):
        self.check(url)
        return super().redirect_request(request, answer, code, message, headers, url)


def fetch(source: str | Path, cache: str | Path | None = None, allow_http: bool = False) -> Path:
    """The file behind a path, a registry name or an address; no network call where it is here already. A local file
    wins over a registry name. cache: folder of the downloads, default ~/.cache/cgd_mae; hf:// has huggingface_hub's
    own."""
    text = re.sub(r"^(https?|hf):/(?=[^/])", r"\1://", str(source))  # a Path has swallowed one slash
    local, rows = os.path.expanduser(text), known()
    if os.path.exists(local):
        return weights_file(local)
    if row := rows.get(text):
        if not row["url"]:
            raise InputError(f"{text} ({row['what']}) has no address: fill in its url in {REGISTRY}, or give a path")
        return _from_web(row["url"], {kind: row[kind] for kind in ("sha256", "md5") if kind in row}, cache, allow_http)
    if text.startswith("hf://"):
        return _from_hugging_face(text)
    if text.startswith(("http://", "https://")):
        url, _, fragment = text.partition("#")
        wanted = re.fullmatch("(sha256|md5)=([0-9a-f]{6,64})", fragment.lower())
        if fragment and not wanted:
            raise InputError(f"{text} with the hash {fragment}: give sha256= or md5= and 6 or more of its digits")
        return _from_web(url, {wanted[1]: wanted[2]} if wanted else {}, cache, allow_http)
    near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(text, rows, n=1))
    names = f"known names: {', '.join(rows)}; else give a file, https://HOST/FILE or hf://ORG/REPO/FILE"
    raise InputError(f"checkpoint {text or repr(text)} does not exist, as a file or a released name{near} ({names})")


def known() -> dict[str, dict]:
    """The registry: name -> {url, what, kind (encoder or full), model, licence}, and a prefix of md5 or sha256."""
    return json.loads(REGISTRY.read_text())


def weights_file(source: str | Path) -> Path:
    """The file of weights in a folder as Hugging Face's libraries write it; a file is returned as it is."""
    source = Path(source)
    for file in (source / "model.safetensors", source / "pytorch_model.bin") if source.is_dir() else [source]:
        if file.is_file():
            return file
    raise InputError(f"{source} is a folder without model.safetensors or pytorch_model.bin: give a file in it")


def _from_web(url: str, wanted: dict[str, str], cache, allow_http: bool) -> Path:
    """A download in CACHE/HASH OF THE ADDRESS AND ITS HASH/, beside its `FILE.sha256` that `sha256sum -c` reads."""
    name = re.sub(r"[^\w.+=@-]", "_", urlsplit(url).path.rpartition("/")[2])[-100:].lstrip(".")
    if not name:
        raise InputError(f"{url} names no file: an address is https://HOST/PATH/FILE")
    folder = Path(cache or CACHE).expanduser() / hashlib.sha256(f"{url} {wanted}".encode()).hexdigest()[:12]
    file = folder / name
    if not file.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # one process downloads, the others wait for it
                if not file.is_file():
                    _download(url, file, wanted, _Redirects(allow_http))
        except (OSError, ValueError, http.client.HTTPException) as error:
            cure = "check the address, the network and the disk, or download it yourself and give its path"
            raise InputError(f"cannot download {url} to {folder} ({error}): {cure}") from error
    return file


def _download(url: str, file: Path, wanted: dict[str, str], redirects: "_Redirects") -> None:
    part, shown = file.with_name(f"{file.name}.partial"), redirects.check(url)
    print(f"downloading {shown}", flush=True)
    request = urllib.request.Request(url, headers={"User-Agent": "cgd-mae"})
    with urllib.request.build_opener(redirects).open(request, timeout=60) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise ValueError("it is a web page")
        length = int(answer.headers["Content-Length"] or 0)
        room = min(LARGEST_BYTES, shutil.disk_usage(file.parent).free)
        limit = length or room * bool(wanted)  # of what has neither an end nor a hash nothing is known
        if not 0 < limit <= room:
            raise ValueError(f"it says {length:,} bytes: too many for this disk, or none and no #sha256= to know it by")
        with open(part, "wb") as opened, tqdm(total=length or None, unit="B", unit_scale=True) as progress:
            while block := answer.read(BLOCK_BYTES):
                progress.update(opened.write(block))
                if opened.tell() > limit:
                    raise ValueError(f"more than {limit:,} bytes arrived")
    if length and part.stat().st_size != length:
        raise OSError(f"cut at {part.stat().st_size:,} of {length:,} bytes")
    digests = file_digests(part, ("sha256", "md5"))
    for kind, prefix in wanted.items():
        if not digests[kind].startswith(prefix):
            raise InputError(f"{url} has the {kind} {digests[kind]}, not {prefix}... as published: it is another file")
    # the record first: a file that is there is a file that was checked
    write_atomic(f"{file}.sha256", lambda opened: opened.write(f"{digests['sha256']}  {file.name}\n".encode()))
    os.replace(part, file)


def _from_hugging_face(url: str) -> Path:
    """hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE; cache, login and offline rule are huggingface_hub's."""
    import huggingface_hub  # takes a second, and only hf:// needs it

    named = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+[^/])", url)
    if not named:
        raise InputError(f"{url} names no file: give hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE")
    try:
        return Path(huggingface_hub.hf_hub_download(named[1], named[3], revision=named[2]))
    except Exception as error:  # its own, those of the HTTP client under it, the disk's
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot get {url} (private or gated: hf auth login first): {reason}") from error
