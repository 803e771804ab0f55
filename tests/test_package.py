"""The clone as a package, from another folder, beside packages of the same names."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CODE = """
import datasets, util, sys
from cgd_mae.finetune.task import task_class
from cgd_mae.models_vit import VisionTransformer
from cgd_mae import hubconf
assert datasets.WHOSE == util.WHOSE == "another's"
assert task_class("fgvc").__module__ == "cgd_mae.finetune.fgvc"
assert sys.modules["cgd_mae.datasets.images"].__file__ == sys.argv[1]
own = {"engine_finetune", "finetune", "metrics", "models_vit", "reports", "tools"}
assert not own & {name.split(".")[0] for name in sys.modules}
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """From a folder of another project whose modules have names of ours; the installed package is a link."""
    for name in ("datasets", "util") if words[0] in ("-m", "-c") else ():
        (folder / f"{name}.py").write_text('WHOSE = "another\'s"\n')
    (folder / "cgd_mae").symlink_to(ROOT / "cgd_mae")
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300)


def test_names_of_ours_shadow_no_others(tmp_path):
    done = run(tmp_path, "-c", CODE, str(ROOT / "datasets" / "images.py"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", ["-m cgd_mae.tools.search", f"{ROOT}/main_linprobe.py"])
def test_programs_run_from_another_folder(tmp_path, words):
    done = run(tmp_path, *words.split(), "--checkpoint", "no.pth", "--topc", "1")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_the_installation_names_this_package_alone():
    """setuptools then maps `cgd_mae` to its folder, and puts no other folder of ours on the path."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'packages = ["cgd_mae"]' in text and "package-dir" not in text and "py-modules" not in text
