"""Downloads: resumed, checked, cached, one at a time; names and addresses; torch.hub; the script."""

import hashlib
import http.server
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import redirect_stdout
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from huggingface_hub import errors as hub_errors

from models_mae import MODELS
from models_vit import load_encoder
from util import fetch as fetching
from util import transfer as transferring
from util.checkpoint import encoder_state
from util.errors import InputError
from util.fetch import fetch, known, read_record

FIRST = bytes(range(256)) * 4096  # 1 MiB
SECOND = FIRST[::-1]
HALF = 1 << 19
DROP = "drop"  # the connection ends without an answer


class Server(http.server.ThreadingHTTPServer):
    """One file under every path. What it does to the first, second, ... request:

    versions: (content, headers); the last one stays.
    ends: (bytes, "close" | "reset" | "stall"), DROP, or a status; afterwards all is sent.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.versions = [(FIRST, {"ETag": '"first"'})]
        self.ends = []
        self.ranges, self.reads_if_range, self.length_error = True, True, 0
        self.asked: list[str | None] = []  # the Range of each request
        self.sent: list[int] = []
        self.go_on = threading.Event()  # ends a stall
        self.url = f"http://127.0.0.1:{self.server_port}/weights.pth"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that are killed


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, number = self.server, len(self.server.asked)
        server.asked.append(self.headers["Range"])
        server.sent.append(0)
        content, headers = server.versions[min(number, len(server.versions) - 1)]
        end = server.ends[number] if number < len(server.ends) else None
        if end == DROP:
            return
        if isinstance(end, int):
            self.send_error(end)
            return
        start = 0
        same = self.headers["If-Range"] in (None, headers.get("ETag"), headers.get("Last-Modified"))
        if server.ranges and self.headers["Range"] and (same or not server.reads_if_range):
            start = int(re.match(r"bytes=(\d+)-$", self.headers["Range"])[1])
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.length_error is not None:
            self.send_header("Content-Length", str(len(content) - start + server.length_error))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        stop, how = end or (len(content), "close")
        self.wfile.write(content[start:stop])
        server.sent[number] = stop - start
        if how == "stall":
            server.go_on.wait(20)
            self.wfile.write(content[stop:])
        elif how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transferring, "PAUSES_S", (0, 0, 0))
    started = Server()
    yield started
    started.go_on.set()
    started.shutdown()
    started.server_close()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network call")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


def refused(source, cache=None) -> str:
    """The one sentence that refuses a source."""
    with pytest.raises(InputError) as caught:
        fetch(source, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_in(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.name != ".lock")


def registry(monkeypatch, tmp_path, **rows) -> None:
    (tmp_path / "registry.json").write_text(json.dumps(rows))
    monkeypatch.setattr(fetching, "REGISTRY", tmp_path / "registry.json")


def wait_until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def fetch_aside(url: str, cache: Path, said: Path):
    """A process of its own that fetches; `said` gets its prints, and at last the path."""

    def work():
        with open(said, "w", buffering=1) as opened, redirect_stdout(opened):
            print(f"file={fetch(url, cache)}")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_whole_download_is_recorded_and_needs_no_server_again(server, tmp_path, capsys):
    file = fetch(server.url, tmp_path)
    assert file.read_bytes() == FIRST and server.asked == [None]
    assert left_in(tmp_path) == ["weights.pth", "weights.pth.sha256"]
    sha256 = hashlib.sha256(FIRST).hexdigest()
    assert Path(f"{file}.sha256").read_text().startswith(f"{sha256}  weights.pth\n")
    assert subprocess.run(["sha256sum", "-c", f"{file}.sha256"], cwd=file.parent).returncode == 0
    md5 = hashlib.md5(FIRST).hexdigest()
    assert read_record(file) == {"sha256": sha256, "md5": md5, "size": str(len(FIRST)), "from": server.url}
    assert "weights.pth (MB)  2/2  eta 00:00:00" in capsys.readouterr().out
    server.shutdown()
    server.server_close()
    assert fetch(server.url, tmp_path) == file
    assert fetch(f"{server.url}#sha256={sha256[:8]}", tmp_path) == file
    assert fetch(f"{server.url}#md5={md5.upper()}", tmp_path) == file
    message = refused(f"{server.url}#sha256=0123456789", tmp_path)
    assert sha256 in message and "0123456789" in message and file.read_bytes() == FIRST


@pytest.mark.parametrize("how", ["close", "reset", "stall"])
def test_a_cut_download_goes_on_where_it_was(server, tmp_path, monkeypatch, how):
    monkeypatch.setattr(transferring, "TIMEOUT_S", 0.3)
    server.ends = [(HALF, how), (HALF + 1000, "close")]
    assert fetch(server.url, tmp_path).read_bytes() == FIRST
    starts = [int(asked[6:-1]) for asked in server.asked[1:]]
    assert len(starts) == 2 and starts[1] == HALF + 1000
    # what was in flight when a connection breaks may be lost, what ends in order may not
    assert starts[0] == HALF if how != "reset" else 0 < starts[0] <= HALF
    assert sum(server.sent) == len(FIRST) + HALF - starts[0]


def test_after_giving_up_another_process_goes_on(server, tmp_path):
    server.ends = [(HALF, "close"), DROP, DROP, 503, (len(FIRST) - 7, "close")]
    message = refused(server.url, tmp_path)
    assert "run the command again and it goes on" in message and "0.5 MB of 1.0 MB are kept" in message
    assert "503" in message and "4 times in a row" in message
    assert len(server.asked) == 4 and left_in(tmp_path) == ["weights.pth.part", "weights.pth.part.json"]
    code = "import sys; from checkpoints import transfer; transfer.PAUSES_S =(0,)\n"
    code += "from util.fetch import fetch; print(fetch(*sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, server.url, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).read_bytes() == FIRST
    assert server.asked[4:] == [f"bytes={HALF}-", f"bytes={len(FIRST) - 7}-"] and sum(server.sent) == len(FIRST)
    assert left_in(tmp_path) == ["weights.pth", "weights.pth.sha256"]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"first"'}])
def test_without_a_strong_mark_of_the_file_it_starts_again(server, tmp_path, headers):
    server.versions = [(FIRST, headers), (SECOND, headers)]
    server.ends = [(HALF, "close")]
    assert fetch(server.url, tmp_path).read_bytes() == SECOND
    assert server.asked == [None, None]


def test_a_date_is_mark_enough(server, tmp_path):
    server.versions = [(FIRST, {"ETag": 'W/"x"', "Last-Modified": "Mon, 01 Jan 2024 10:00:00 GMT"})]
    server.ends = [(HALF, "close")]
    assert fetch(server.url, tmp_path).read_bytes() == FIRST and server.asked == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("reads_if_range", [True, False])
@pytest.mark.parametrize("content", [SECOND, SECOND + FIRST, SECOND[: HALF // 2]])
def test_a_file_that_changed_is_not_spliced(server, tmp_path, reads_if_range, content):
    """Of the same size, longer, and shorter than what has come; also where If-Range is ignored."""
    server.reads_if_range = reads_if_range
    server.versions = [(FIRST, {"ETag": '"first"'}), (content, {"ETag": '"second"'})]
    server.ends = [(HALF, "close")]
    assert fetch(server.url, tmp_path).read_bytes() == content
    assert server.asked[:2] == [None, f"bytes={HALF}-"]
    assert server.asked[2:] == ([] if reads_if_range else [None])


def test_a_server_that_cannot_resume_sends_all_again(server, tmp_path):
    server.ranges, server.ends = False, [(HALF, "close")]
    assert fetch(server.url, tmp_path).read_bytes() == FIRST
    assert len(server.asked) == 2 and server.sent == [HALF, len(FIRST)]


@pytest.mark.parametrize("error", [100, -100])
def test_a_length_that_is_not_true(server, tmp_path, error):
    """Too long: it never ends whole. Too short: only a hash can tell."""
    server.length_error = error
    message = refused(f"{server.url}#sha256={hashlib.sha256(FIRST).hexdigest()}", tmp_path)
    assert ("cut" in message or "another one" in message) if error > 0 else "has the sha256" in message
    assert "weights.pth" not in left_in(tmp_path)


def test_a_length_that_is_not_said(server, tmp_path):
    server.length_error = None
    assert fetch(server.url, tmp_path).read_bytes() == FIRST


def test_a_wrong_hash_is_refused_and_nothing_is_kept(server, tmp_path, monkeypatch):
    found = hashlib.md5(FIRST).hexdigest()
    row = {"url": server.url, "what": "a test", "licence": "none"}
    registry(monkeypatch, tmp_path, good=row | {"md5": found[:6]}, bad=row | {"md5": "abcdef"})
    cache = tmp_path / "cache"
    message = refused("bad", cache)
    assert found in message and "abcdef" in message and left_in(cache) == []
    assert "0000000" in refused(f"{server.url}#sha256=0000000", cache) and left_in(cache) == []
    assert fetch("good", cache).read_bytes() == FIRST
    assert len(server.asked) == 3
    assert found in refused("bad", cache) and len(server.asked) == 3  # also from the cache


def test_what_is_no_hash_is_said_before_the_download(server, tmp_path):
    for fragment in ("sha256=12345", "sha256=xyzxyzxyz", "crc=12345678", "md5=" + 33 * "a", "readme"):
        assert "6 or more of its digits" in refused(f"{server.url}#{fragment}", tmp_path)
    assert not server.asked


def test_a_cached_file_of_another_size_is_downloaded_again(server, tmp_path):
    file = fetch(server.url, tmp_path)
    file.write_bytes(FIRST[:-1])
    assert fetch(server.url, tmp_path).read_bytes() == FIRST and len(server.asked) == 2
    Path(f"{file}.sha256").write_text("no record")
    assert fetch(server.url, tmp_path).read_bytes() == FIRST and len(server.asked) == 3


def test_killed_between_the_last_byte_and_the_check(server, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fetching, "file_digests", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(server.url, tmp_path)
    assert fetch(server.url, tmp_path).read_bytes() == FIRST and server.asked == [None]


def test_files_of_one_name_at_two_addresses(server, tmp_path):
    server.versions = [(FIRST, {}), (SECOND, {})]
    other = server.url.replace("/weights", "/other/weights")
    files = fetch(server.url, tmp_path), fetch(other, tmp_path)
    assert [file.read_bytes() for file in files] == [FIRST, SECOND]
    assert files[0].name == files[1].name == "weights.pth"


def test_two_processes_download_once(server, tmp_path):
    server.ends = [(HALF, "stall")]
    said = tmp_path / "said1", tmp_path / "said2"
    first = fetch_aside(server.url, tmp_path / "cache", said[0])
    wait_until(lambda: server.sent == [HALF])
    second = fetch_aside(server.url, tmp_path / "cache", said[1])
    wait_until(lambda: said[1].is_file() and "waiting" in said[1].read_text())
    server.go_on.set()
    for process in (first, second):
        process.join(20)
        assert process.exitcode == 0
    files = [Path(file.read_text().rpartition("file=")[2].strip()) for file in said]
    assert files[0] == files[1] and files[0].read_bytes() == FIRST
    assert server.asked == [None]


def test_a_killed_downloader_releases_the_file(server, tmp_path):
    server.ends = [(HALF, "stall")]
    said = tmp_path / "said1", tmp_path / "said2"
    cache = tmp_path / "cache"
    first = fetch_aside(server.url, cache, said[0])
    wait_until(lambda: any(p.stat().st_size == HALF for p in cache.rglob("*.part")))
    second = fetch_aside(server.url, cache, said[1])
    wait_until(lambda: said[1].is_file() and "waiting" in said[1].read_text())
    os.kill(first.pid, signal.SIGKILL)
    second.join(20)
    assert second.exitcode == 0 and next(cache.rglob("weights.pth")).read_bytes() == FIRST
    assert server.asked == [None, f"bytes={HALF}-"]
    first.join(20)


def test_answers_that_are_no_file(server, tmp_path):
    server.ends = [404, 403]
    assert "answered 404 Not Found: check the address" in refused(server.url, tmp_path)
    assert "answered 403" in refused(server.url, tmp_path) and len(server.asked) == 2
    server.versions = [(b"<html>", {"Content-Type": "text/html; charset=utf-8"})]
    assert "is a web page" in refused(server.url, tmp_path)
    assert left_in(tmp_path) == []


def test_unreachable(server, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it, nobody answers
        message = refused(f"http://127.0.0.1:{free.getsockname()[1]}/w.pth", tmp_path)
    assert "refused" in message and "4 times in a row" in message and "give its path" in message


def test_no_room_and_no_right_to_write(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "cannot write to the cache" in refused(server.url, tmp_path / "file" / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(transferring.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
        message = refused(server.url, tmp_path / "full")
    assert "needs 1.0 MB" in message and "0.0 MB free" in message

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(transferring.os, "fsync", full)
        assert "No space left on device" in refused(server.url, tmp_path / "full")
    assert fetch(server.url, tmp_path / "full").read_bytes() == FIRST


def test_a_local_file_is_returned_untouched(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("encoder.pth").write_bytes(b"as it is")
    Path("mae_vit_base").write_bytes(b"a file of a registry name")
    for source in ("encoder.pth", Path("encoder.pth"), tmp_path / "encoder.pth", "mae_vit_base"):
        assert fetch(source) == Path(source)
    assert fetch("~/encoder.pth") == tmp_path / "encoder.pth"
    assert left_in(tmp_path) == ["encoder.pth", "mae_vit_base"]


def test_the_default_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(server.url).is_relative_to(tmp_path / ".cache" / "cgd_mae")
    assert fetch(Path(server.url)).read_bytes() == FIRST and len(server.asked) == 1  # a Path eats one slash


def test_sources_that_are_nothing(tmp_path, monkeypatch, no_network):
    message = refused("mae_vit_bas", tmp_path)
    assert "mae_vit_bas does not exist" in message and "did you mean mae_vit_base" in message
    assert all(name in message for name in known())
    assert "did you mean" not in refused("/no/such/file.pth", tmp_path)
    (tmp_path / "encoder.pth").write_bytes(b"")
    message = refused(tmp_path)
    assert "is a folder" in message and str(tmp_path / "encoder.pth") in message
    assert "begins with s3://" in refused("s3://bucket/encoder.pth")
    assert "begins with file://" in refused("file:///encoder.pth")
    for source in ("https://", "https://host", "https://host/", "http:///encoder.pth", "https://[bad/x.pth"):
        assert re.search("names no file|is no address", refused(source, tmp_path / "cache")), source
    assert "'' does not exist" in refused("")
    registry(monkeypatch, tmp_path, ours={"url": "", "what": "ours", "licence": "x"})
    message = refused("ours")
    assert "fill in its url" in message and "registry.json" in message and "give a path" in message
    (tmp_path / "registry.json").write_text("{,")
    assert "registry.json cannot be read" in refused("ours")


def test_names_in_addresses_stay_in_the_cache(server, tmp_path):
    host = server.url.removesuffix("/weights.pth")
    for path in ("/%2e%2e/%2e%2e", "/a/..%2f..%2fpasswd", "/" + 300 * "x" + ".safetensors", "/a%20b.pth?key=secret"):
        if path.endswith("%2e%2e"):
            assert "names no file" in refused(host + path, tmp_path)
            continue
        file = fetch(host + path, tmp_path)
        assert file.parent.parent == tmp_path and file.read_bytes() == FIRST
    assert file.name == "a_b.pth" and "secret" not in Path(f"{file}.sha256").read_text()


def test_hugging_face(tmp_path, monkeypatch):
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(FIRST)
    calls = []

    def download(repo, name, revision=None):
        calls.append((repo, name, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch("hf://org/repo/encoder.safetensors") == file
    assert fetch("hf://org/repo@v1/folder/encoder.safetensors") == file
    assert fetch(Path("hf://org/repo/encoder.safetensors")) == file
    sha256 = hashlib.sha256(FIRST).hexdigest()
    assert fetch(f"hf://org/repo/encoder.safetensors#sha256={sha256}") == file
    assert calls[:2] == [("org/repo", "encoder.safetensors", None), ("org/repo", "folder/encoder.safetensors", "v1")]
    message = refused("hf://org/repo/encoder.safetensors#md5=123456")
    assert "123456" in message and hashlib.md5(FIRST).hexdigest() in message
    for source in ("hf://", "hf://org/repo", "hf://org/repo/", "hf:///repo/file"):
        assert "hf://ORG/REPO/FILE" in refused(source)


def test_hugging_face_says_why_not(monkeypatch):
    class Answer:  # what the library's HTTP errors want
        headers, request, status_code = {}, None, 404

    reasons = {
        hub_errors.LocalEntryNotFoundError("cannot find\nthe file"): "no network",
        hub_errors.EntryNotFoundError("404"): "no such file",
        hub_errors.RepositoryNotFoundError("404", response=Answer()): "no such repository",
        hub_errors.GatedRepoError("403", response=Answer()): "is gated",
        hub_errors.HFValidationError("a..b"): "no name of a repository",
        hub_errors.OfflineModeIsEnabled("offline"): "offline",
        OSError(28, "No space left on device"): "No space left",
        hub_errors.HTTPError("the peer closed"): "the peer closed",
    }
    for error, why in reasons.items():

        def fails(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
        message = refused("hf://org/repo/encoder.safetensors")
        assert why in message and "hf://org/repo/encoder.safetensors" in message


def test_the_registry_is_well_formed():
    rows = known()
    assert {"mae_vit_base", "mae_vit_huge_full", "cgd_mae_vit_base", "mae_automobile1m_vit_base_full"} <= set(rows)
    for name, row in rows.items():
        assert (
            {"url", "what", "kind", "model", "licence"}
            <= set(row)
            <= {"url", "what", "kind", "model", "licence", "md5"}
        )
        assert row["what"] and row["licence"] and row["model"] in MODELS
        assert row["kind"] == ("full" if name.endswith("_full") else "encoder")
        assert not row["url"] or re.fullmatch(r"https://[^#\s]+\.pth", row["url"])
        assert re.fullmatch("[0-9a-f]{6,32}", row.get("md5", "000000"))
        assert "md5" in row or "hash" in row["what"]  # where none is published it says so
    published = [rows[f"mae_vit_{size}"]["md5"] for size in ("base", "large", "huge")]
    assert published == ["8cad7c", "b8b06e", "9bdbb0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """A whole MAE and its encoder alone."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    state = MODELS["mae_vit_tiny_patch16"](img_size=(32, 32)).state_dict()
    config = {"kind": "CGD-MAE", "img_size": [32, 32], "norm_pix_loss": True}
    torch.save({"model": state, "config": config}, folder / "full.pth")
    torch.save({"model": encoder_state(state)}, folder / "encoder.pth")
    return folder / "full.pth", folder / "encoder.pth"


def test_torch_hub(tiny, no_network):
    full, encoder = tiny
    model = torch.hub.load(str(ROOT), "encoder", str(encoder), source="local")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model.encode(images)["cls"], load_encoder(encoder).encode(images)["cls"])
    larger = torch.hub.load(str(ROOT), "encoder", str(encoder), img_size=(64, 48), source="local")
    assert larger.img_size == (64, 48) and not larger.training

    model = torch.hub.load(str(ROOT), "mae", "mae_vit_tiny_patch16", str(full), source="local")
    saved = torch.load(full, weights_only=True)["model"]
    assert model.img_size == (32, 32) and model.norm_pix_loss and not model.training
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    drawn = torch.hub.load(str(ROOT), "mae", "mae_vit_tiny_patch16", img_size=(32, 32), source="local")
    assert not torch.equal(drawn.cls_token, model.cls_token)
    with pytest.raises(InputError, match="decoder_embed|mask_token|decoder"):
        torch.hub.load(str(ROOT), "mae", "mae_vit_tiny_patch16", str(encoder), source="local")
    with pytest.raises(InputError, match="did you mean mae_vit_tiny_patch16"):
        torch.hub.load(str(ROOT), "mae", "mae_vit_tiny", source="local")


def test_torch_hub_lists_the_entries_alone():
    import hubconf

    assert [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"] == ["encoder", "mae"]


def test_the_script(tmp_path):
    script = ROOT / "scripts" / "download_checkpoints.sh"
    for names, wanted in (
        ([], ["mae_vit_base"]),
        (["mae_vit_large", "cgd_mae_vit_base"], ["mae_vit_large", "cgd_mae_vit_base"]),
    ):
        env = os.environ | {"PYTHON": "echo"}
        done = subprocess.run(["bash", script, *names], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.stdout.splitlines() == [f"-m tools.checkpoint download {name}" for name in wanted]
    header = script.read_text().partition("set -e")[0]
    assert set(re.findall(r"\b(?:cgd_)?mae_(?:automobile1m_)?vit_\w+", header)) <= set(known())
