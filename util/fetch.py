"""A name, an address or a path -> a file on this disk: downloaded once, checked, offline from then on.

    fetch("mae_vit_base")                                     a row of util/registry.json
    fetch("https://host/encoder.safetensors#sha256=1a2b3c4d") an address, with or without a hash (or #md5=)
    fetch("hf://ORG/REPO/encoder.safetensors")                through huggingface_hub; hf://ORG/REPO@REVISION/FILE
    fetch("output_dir/encoder.pth")                           a file here, returned as it is
    fetch("vit-mae-base/")                                    a folder of Hugging Face's: its file of weights

A download lies in ~/.cache/cgd_mae/HASH OF THE ADDRESS/ beside its `FILE.sha256`, which `sha256sum -c` reads.
Later calls compare its size alone; only hashing it again would see a flipped bit.
"""

import difflib
import fcntl
import hashlib
import json
import os
import re
import string
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from util.errors import InputError
from util.files import file_digests, write_atomic
from util.pretrained import weights_file
from util.transfer import discard, transfer

REGISTRY = Path(__file__).with_name("registry.json")
CACHE = Path("~/.cache/cgd_mae")
HASHES = {"sha256": 64, "md5": 32}  # digits
WEIGHTS = (".pth", ".pt", ".safetensors", ".npz", ".bin")


def fetch(source: str | Path, cache: str | Path | None = None) -> Path:
    """The file behind a path, a registry name or an address; no network call where it is here already.

    Args:
        source: see the top of this file. A local file wins over a registry name of the same spelling.
        cache: folder of the downloads, default ~/.cache/cgd_mae; hf:// has huggingface_hub's own.
    Raises:
        InputError: no such file, name or address; cut or refused; a wrong hash; a cache that is not writable.
    """
    text = re.sub(r"^(https?|hf):/(?=[^/])", r"\1://", str(source))  # a Path has swallowed one slash
    if "://" in text:
        return _from_address(text, {}, cache)
    local = os.path.expanduser(text)
    if os.path.isfile(local):
        return Path(local)
    rows = known()
    if text in rows:
        return _from_registry(text, rows[text], cache)
    if os.path.isdir(local):
        if os.path.isfile(os.path.join(local, "config.json")):
            return weights_file(local)
        files = sorted(p for p in Path(local).iterdir() if p.suffix in WEIGHTS)
        holds = f"it holds {', '.join(str(p) for p in files[:4])}" if files else "it holds no file of weights"
        raise InputError(f"checkpoint {text} is a folder: give a file ({holds})")
    nearest = difflib.get_close_matches(text, rows, n=3, cutoff=0.6)
    raise InputError(
        f"checkpoint {text or repr(text)} does not exist as a file, and no released one has this name"
        + (f": did you mean {' or '.join(nearest)}?" if nearest else ".")
        + f" Known names: {', '.join(rows)}; else give a file, https://HOST/FILE or hf://ORG/REPO/FILE"
    )


def known() -> dict[str, dict]:
    """The registry: name -> {url, what, kind (encoder or full), model, licence}, and md5 or sha256 (a prefix)
    where one was published."""
    try:
        return json.loads(REGISTRY.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{REGISTRY} cannot be read ({error}): restore it with git checkout") from error


def read_record(file: str | Path) -> dict[str, str]:
    """What `FILE.sha256` says of a downloaded file: {sha256, md5, size, from}; empty where there is none."""
    try:
        text = Path(f"{file}.sha256").read_text()
    except (OSError, UnicodeDecodeError):
        return {}
    record = dict(re.findall(r"^# (\w+) (.*)$", text, re.MULTILINE))
    first = re.match(r"([0-9a-f]{64}) ", text)
    return record | {"sha256": first[1]} if first and record.get("size", "").isdigit() else {}


def _from_registry(name: str, row: dict, cache) -> Path:
    if not row.get("url"):
        raise InputError(
            f"{name} ({row.get('what')}) has no address: fill in its url in {REGISTRY}, or give a path or an "
            "address in place of the name"
        )
    wanted = {kind: row[kind] for kind in HASHES if row.get(kind)}
    title = f"{name}: {row.get('what', row['url'])}. Licence: {row.get('licence', 'not said')}"
    return _from_address(row["url"], wanted, cache, title)


def _from_address(address: str, wanted: dict[str, str], cache, title: str = "") -> Path:
    """`wanted`: {"sha256" or "md5": prefix}, to which the address adds its own."""
    url, _, fragment = address.partition("#")
    if fragment:
        kind, _, prefix = fragment.partition("=")
        wanted = wanted | {kind: prefix.lower()}
    for kind, prefix in wanted.items():
        if not (6 <= len(prefix) <= HASHES.get(kind, 0) and re.fullmatch("[0-9a-f]+", prefix)):
            raise InputError(
                f"{address} with the hash {kind}={prefix}: give sha256= or md5= and 6 or more of its digits"
            )
    scheme = url.partition("://")[0].lower()
    if scheme == "hf":
        return _from_hugging_face(url, wanted)
    if scheme not in ("http", "https"):
        raise InputError(f"{address} begins with {scheme}://: give https://, http://, hf:// or a local file")
    return _from_web(url, wanted, Path(cache or CACHE).expanduser(), title)


def _from_web(url: str, wanted: dict[str, str], cache: Path, title: str) -> Path:
    # a folder for each address: files of one name at two addresses do not meet
    file = cache / hashlib.sha256(url.encode()).hexdigest()[:12] / _file_name(url)
    if _is_here(file, wanted):
        return file
    with _alone_in(file.parent):
        if _is_here(file, wanted):  # another process was faster
            return file
        print(title or f"downloading {url}", flush=True)
        part = transfer(quote(url, safe=string.punctuation), file)
        found = file_digests(part, tuple(HASHES))
        try:
            _compare(found, wanted, url)
        except InputError as error:
            discard(part)
            raise InputError(
                f"{error}: it was damaged on the way or is another file, and was removed; try again, and if "
                "it stays so, ask where the hash was published"
            ) from None
        record = f"{found['sha256']}  {file.name}\n# md5 {found['md5']}\n# size {part.stat().st_size}\n"
        record += f"# from {url.partition('?')[0]}\n"  # what follows a ? may be a key
        # the record first: a file that is there is a file that was checked
        write_atomic(f"{file}.sha256", lambda opened: opened.write(record.encode()))
        os.replace(part, file)
        discard(part)
    return file


def _is_here(file: Path, wanted: dict[str, str]) -> bool:
    """Whether a checked download is in the cache, by its size; InputError where another hash is wanted."""
    record = read_record(file)
    if not record or not file.is_file():
        return False
    if file.stat().st_size != int(record["size"]):
        print(f"{file} has changed its size since it was downloaded: downloading it again", flush=True)
        return False
    try:
        _compare(record, wanted, file)
    except InputError as error:
        raise InputError(f"{error}: if the one at its source is new, remove {file} and run again") from None
    return True


def _compare(found: dict[str, str], wanted: dict[str, str], file) -> None:
    for kind, prefix in wanted.items():
        if not found[kind].startswith(prefix):
            raise InputError(f"{file} has the {kind} {found[kind]}, not {prefix}... as published")


@contextmanager
def _alone_in(folder: Path):
    """One process at a time in a folder; the lock ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(folder / ".lock", "a")
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {folder}: {error.strerror or error}; make it writable, or download "
            "the file yourself and give its path"
        ) from error
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is downloading to {folder}: waiting for it", flush=True)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _file_name(url: str) -> str:
    """The last part of an address as a safe file name; its suffix says how the file is read."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise InputError(f"{url} is no address: {error}") from error
    name = re.sub(r"[^\w.+=@-]", "_", unquote(parts.path).rpartition("/")[2])[-100:].lstrip(".")
    if not host or not name:
        raise InputError(f"{url} names no file: an address is https://HOST/PATH/FILE")
    return name


def _from_hugging_face(url: str, wanted: dict[str, str]) -> Path:
    """hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE; cache, login, offline rule are huggingface_hub's."""
    named = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+[^/])", url, re.IGNORECASE)
    if not named:
        raise InputError(f"{url} names no file: give hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE")
    try:
        import huggingface_hub  # takes a second to import, and only hf:// needs it
        from huggingface_hub import errors
    except ImportError as error:
        raise InputError(f"{url} needs huggingface_hub: pip install huggingface_hub") from error
    # the library's own HTTP errors are OSErrors; those of the client under it are not
    failures = (OSError, ValueError, errors.EntryNotFoundError, getattr(errors, "HTTPError", OSError))
    try:
        file = Path(huggingface_hub.hf_hub_download(named[1], named[3], revision=named[2]))
    except failures as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot get {url}: {_hugging_face_cure(error, errors)} ({reason[:200]})") from error
    if wanted:
        _compare(file_digests(file, tuple(HASHES)), wanted, f"{url} (kept by huggingface_hub in {file})")
    return file


def _hugging_face_cure(error: Exception, errors) -> str:
    cures = (  # the narrow classes first: each is a kind of a later one
        (errors.GatedRepoError, "it is gated: ask for access on its page, then log in with hf auth login"),
        (errors.RepositoryNotFoundError, "no such repository, or a private one: hf auth login"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.LocalEntryNotFoundError, "not in its cache, and no network (or HF_HUB_OFFLINE is set)"),
        (errors.EntryNotFoundError, "the repository has no such file"),
        (errors.HFValidationError, "no name of a repository"),
    )
    return next((cure for kind, cure in cures if isinstance(error, kind)), "the download failed")
