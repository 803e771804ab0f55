"""scripts/quickstart.sh and scripts/venv.sh, with a python that only leaves the files of each stage."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

PYTHON = """#!/usr/bin/env bash
echo "called $*" >> calls
echo '{"for": "machines"}'
words=("$@")
for ((i = 0; i < $#; i++)); do case "${words[i]}" in --output | --output_dir) out="${words[i + 1]}" ;; esac; done
case "$*" in
    *tools.report*) touch "$4/report.html"; exit ;;
    *"--before"*) [ -z "${FAILS:-}" ] || exit 3; echo "R1 19.0 before, 38.0 after" ;;
esac
mkdir -p "$out"
touch "$out"/{pool.json,texts.txt,encoder.safetensors,metrics.json}
case "$*" in *main_pretrain* | *--eval*) ;; *) touch "$out/report.html" ;; esac
"""


def test_a_finished_quickstart_is_left_alone_and_a_stopped_one_goes_on(tmp_path):
    """The scripts beside an environment that is installed."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for folder in (".", "bin", ".venv/bin", ".venv/installed"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "requirements.txt", tmp_path / folder)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(0o755)

    def quickstart(*words, **more):
        env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | more
        command = ["bash", str(tmp_path / "scripts/quickstart.sh"), *words]
        done = subprocess.run(command, cwd=tmp_path.parent, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, (tmp_path / "calls").read_text().count("called ")

    code, said, calls = quickstart(FAILS="1")
    assert code == 3 and calls == 9 and said.count("== ") == 7 and "done before" not in said and "{" not in said
    code, said, calls = quickstart()
    assert code == 0 and calls == 9 + 2 and said.count(": done before") == 6  # the drawn set and the fine-tuning
    assert "The same vehicle found again: R1 19.0 before, 38.0 after" in said
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        code, said, calls = quickstart()
        assert code == 0 and calls == 11 and "is finished, and nothing was done" in said and "38.0 after" in said
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    code, said, _ = quickstart("--help")
    assert code == 2 and "Usage: bash scripts/quickstart.sh [FOLDER]" in said
    assert quickstart(str(tmp_path / "calls"))[:2] == (2, f"{tmp_path}/calls is a file: name a folder\n")


@pytest.mark.parametrize(
    "has, chosen", [(("2.13.0+cpu", "2.14.1+cpu", "2.15.0"), "2.14.1+cpu"), (("2.13.0+cpu", "2.15.0"), "none")]
)
def test_torch_without_cuda_is_taken_where_the_index_has_it(tmp_path, has, chosen):
    """2.13.0 is left out by requirements.txt."""
    for name, version in [("torch", version) for version in has] + [("torchvision", "0.29.1+cpu")]:
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            wheel.writestr(f"{name}-{version}.dist-info/METADATA", text)
    script = "eval \"$(sed -n '/^cpu_builds/,/^}/p' scripts/venv.sh)\"; cpu_index=(); cpu_builds requirements.txt"
    env = {"python": sys.executable, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    env = os.environ | env | {"PIP_FIND_LINKS": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] in (f"torch=={chosen}", chosen), done.stderr
