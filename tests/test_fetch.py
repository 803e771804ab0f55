"""Downloads: checked, cached, one at a time; names and addresses; torch.hub."""

import functools
import hashlib
import http.server
import json
import re
import subprocess
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT

from models_mae import MODELS
from models_vit import load_encoder
from util import fetch as fetching
from util.checkpoint import encoder_state
from util.errors import InputError
from util.fetch import known

fetch = functools.partial(fetching.fetch, allow_http=True)  # the server of these tests has no certificate
CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """One file under every path but /absent; `server.sent` bytes of it arrive, `server.gets` counts downloads."""

    def do_GET(self):
        self.server.gets += 1
        to = self.server.location
        self.send_response(302 if to else 404 if self.path == "/absent.pth" else 200)
        if self.server.length:
            self.send_header("Content-Length", self.server.length)
        if to:
            self.send_header("Location", to)
        self.send_header("Content-Type", self.server.content_type)
        self.end_headers()
        self.wfile.write(CONTENT[: self.server.sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    started.gets, started.sent, started.content_type = 0, len(CONTENT), "application/octet-stream"
    started.location, started.length = "", str(len(CONTENT))
    started.url = f"http://127.0.0.1:{started.server_port}/weights.pth"
    threading.Thread(target=started.serve_forever, args=(0.01,), daemon=True).start()
    started.stop = lambda: (started.shutdown(), started.server_close())
    yield started
    started.stop()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network call")

    monkeypatch.setattr(urllib.request, "build_opener", refuse)
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


@pytest.mark.parametrize("fragment", ["", f"#sha256={SHA256[:8]}", f"#md5={MD5.upper()}"])
def test_a_download_is_recorded_and_needs_no_server_again(server, tmp_path, fragment):
    with ThreadPoolExecutor(4) as threads:  # several at once download once
        files = list(threads.map(lambda _: fetch(server.url + fragment, tmp_path), range(4)))
    assert len(set(files)) == 1 and files[0].read_bytes() == CONTENT and server.gets == 1
    assert left_in(tmp_path) == ["weights.pth", "weights.pth.sha256"]
    assert subprocess.run(["sha256sum", "-c", f"{files[0]}.sha256"], cwd=files[0].parent).returncode == 0
    server.stop()
    assert fetch(server.url + fragment, tmp_path) == files[0]


def test_a_wrong_hash_is_refused_and_not_used_later(server, tmp_path, monkeypatch):
    row = {"url": server.url, "what": "a test", "licence": "none"}
    registry(monkeypatch, tmp_path, good=row | {"md5": MD5[:6]}, bad=row | {"md5": "abcdef"})
    cache = tmp_path / "cache"
    assert fetch("good", cache).read_bytes() == CONTENT
    for source in ("bad", "bad", f"{server.url}#sha256=0000000"):  # also not from the cache
        assert re.search(f"{MD5}, not abcdef|{SHA256}, not 0000000", refused(source, cache))
    assert left_in(cache).count("weights.pth") == 1 and server.gets == 4
    for fragment in ("sha256=12345", "sha256=xyzxyzxyz", "crc=12345678", "readme"):  # said before the download
        assert "6 or more of its digits" in refused(f"{server.url}#{fragment}", tmp_path)
    assert server.gets == 4


def test_answers_that_are_no_file(server, tmp_path):
    server.sent = len(CONTENT) // 2
    assert "cut at 524,288 of 1,048,576 bytes" in refused(server.url, tmp_path / "cut")
    assert "weights.pth" not in left_in(tmp_path / "cut")
    server.sent = len(CONTENT)
    assert fetch(server.url, tmp_path / "cut").read_bytes() == CONTENT
    assert "404" in refused(server.url.replace("weights", "absent"), tmp_path)
    (tmp_path / "file").write_text("")
    assert re.search("Not a directory.* give its path", refused(server.url, tmp_path / "file" / "cache"))
    server.content_type = "text/html; charset=utf-8"
    assert "is a web page" in refused(server.url, tmp_path)
    server.stop()
    assert "refused" in refused(server.url, tmp_path)


def test_only_https_within_limits_and_to_an_end(server, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is not https; --allow_http"):
        fetching.fetch(server.url, tmp_path)
    for to in ("ftp://127.0.0.1/x.pth", "file:///etc/passwd"):
        server.location = to
        assert "is not https" in refused(server.url, tmp_path) or server.gets
    server.location, server.length = "", None  # a body that nobody knows the end of
    assert "no #sha256= to know it by" in refused(server.url, tmp_path)
    assert fetch(f"{server.url}#sha256={SHA256[:12]}", tmp_path).read_bytes() == CONTENT
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(CONTENT)))
    assert fetch(f"{server.url}#sha256={SHA256[:14]}", tmp_path).read_bytes() == CONTENT  # what the disk has room for
    monkeypatch.setattr(fetching, "LARGEST_BYTES", 1000)
    assert "more than 1,000 bytes arrived" in refused(f"{server.url}#md5={MD5[:12]}", tmp_path)
    server.length = str(len(CONTENT))
    assert "too many for this disk" in refused(server.url.replace("weights", "other"), tmp_path)


def test_names_in_addresses_stay_in_the_cache(server, tmp_path, capsys):
    host = server.url.removesuffix("/weights.pth")
    for path in ("/", "/.."):
        assert "names no file" in refused(host + path, tmp_path)
    for path in ("/a/..%2f..%2fpasswd", "/" + 300 * "x" + ".safetensors", "/a%20b.pth?key=secret"):
        file = fetch(host + path, tmp_path)
        assert file.parent.parent == tmp_path and file.read_bytes() == CONTENT
    assert file.suffix == ".pth" and "secret" not in capsys.readouterr().out


def test_a_local_file_is_returned_untouched(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    Path("encoder.pth").write_bytes(b"as it is")
    Path("mae_vit_base").write_bytes(b"a file of a registry name")
    for source in ("encoder.pth", Path("encoder.pth"), tmp_path / "encoder.pth", "mae_vit_base"):
        assert fetch(source) == Path(source)
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"as Hugging Face writes it")
    assert fetch(tmp_path) == tmp_path / "model.safetensors"


def test_sources_that_are_nothing(tmp_path, monkeypatch, no_network):
    message = refused("mae_vit_bas", tmp_path)
    assert re.search("mae_vit_bas does not exist.* did you mean mae_vit_base", message)
    assert all(name in message for name in known())
    for source in ("s3://bucket/encoder.pth", "file:///encoder.pth", "/no/such/file.pth", ""):
        message = refused(source)
        assert "does not exist" in message and "did you mean" not in message
    assert "names no file" in refused("https://host", tmp_path)
    registry(monkeypatch, tmp_path, ours={"url": "", "what": "ours", "licence": "x"})
    assert re.search("fill in its url in .*registry.json, or give a path", refused("ours"))


def test_hugging_face(tmp_path, monkeypatch):
    file, calls = tmp_path / "encoder.safetensors", []
    file.write_bytes(CONTENT)

    def download(repo, name, revision=None):
        calls.append((repo, name, revision))
        if repo == "org/gated":
            raise RuntimeError("403\nask for access")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch(Path("hf://org/repo/encoder.safetensors")) == file
    assert fetch("hf://org/repo@v1/folder/encoder.safetensors") == file
    assert calls == [("org/repo", "encoder.safetensors", None), ("org/repo", "folder/encoder.safetensors", "v1")]
    assert re.search("hf auth login.* 403 ask for access", refused("hf://org/gated/encoder.safetensors"))
    for source in ("hf://", "hf://org/repo", "hf://org/repo/", "hf:///repo/file"):
        assert "hf://ORG/REPO/FILE" in refused(source)


def test_the_registry_is_well_formed():
    rows = known()
    assert {"mae_vit_base", "mae_vit_huge_full", "cgd_mae_vit_base", "mae_automobile1m_vit_base_full"} <= set(rows)
    needed = {"url", "what", "kind", "model", "licence"}
    for name, row in rows.items():
        assert needed <= set(row) <= needed | {"md5", "sha256"} and row["what"] and row["licence"]
        assert row["model"] in MODELS and row["kind"] == ("full" if name.endswith("_full") else "encoder")
        assert not row["url"] or re.fullmatch(r"https://[^#\s]+\.pth", row["url"])
        assert "md5" in row or "hash" in row["what"]  # where none is published it says so
    published = [rows[f"mae_vit_{size}"]["md5"] for size in ("base", "large", "huge")]
    assert published == ["8cad7c", "b8b06e", "9bdbb0"]


def test_torch_hub(tmp_path, no_network):
    hub = functools.partial(torch.hub.load, str(ROOT), source="local")
    full, encoder, name = tmp_path / "full.pth", tmp_path / "encoder.pth", "mae_vit_tiny_patch16"
    saved = MODELS[name](img_size=(32, 32)).state_dict()
    config = {"kind": "CGD-MAE", "img_size": [32, 32], "norm_pix_loss": True}
    torch.save({"model": saved, "config": config}, full)
    torch.save({"model": encoder_state(saved)}, encoder)
    model, images = hub("encoder", str(encoder)), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model.encode(images)["cls"], load_encoder(encoder).encode(images)["cls"])
    larger = hub("encoder", str(encoder), img_size=(64, 48))
    assert larger.img_size == (64, 48) and not larger.training
    model = hub("mae", name, str(full))
    assert model.img_size == (32, 32) and model.norm_pix_loss and not model.training
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert not torch.equal(hub("mae", name, img_size=(32, 32)).cls_token, model.cls_token)
    with pytest.raises(InputError, match="decoder"):
        hub("mae", name, str(encoder))
    with pytest.raises(InputError, match="did you mean mae_vit_tiny_patch16"):
        hub("mae", "mae_vit_tiny")
