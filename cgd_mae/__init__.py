"""The clone as a package: after `pip install -e .`, or with the clone on `sys.path`, from any folder

    from cgd_mae.models_vit import load_encoder
    python -m cgd_mae.tools.search --help

Its modules are the files of the clone. These import each other by plain names (`from util.files import ...`), as
scripts do; here that means `cgd_mae.util.files`, so that other packages may be called `datasets` or `util`.
"""

import ast
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "models_mae.py").is_file():
    raise ImportError(f"{__file__} is no clone of CGD-MAE: install it from one, with pip install -e .")
OWN = {file.stem for file in ROOT.glob("*.py")} | {file.parent.name for file in ROOT.glob("*/__init__.py")}


class Loader(SourceFileLoader):
    """Imports of the clone's modules get the package's name before them; never the bytecode that scripts keep."""

    def get_code(self, fullname: str):
        tree = ast.parse(self.get_data(self.path), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
                node.module = f"{__name__}.{node.module}"
            for alias in node.names if isinstance(node, ast.Import) else ():
                if alias.name in OWN:
                    alias.name, alias.asname = f"{__name__}.{alias.name}", alias.asname or alias.name
        return compile(tree, self.path, "exec", dont_inherit=True)


class Finder:
    @staticmethod
    def find_spec(name: str, path=None, target=None):
        place = ROOT.joinpath(*name.split(".")[1:])
        for file, folders in ((place / "__init__.py", [str(place)]), (place.with_suffix(".py"), None)):
            if name.startswith(f"{__name__}.") and file.is_file():
                loader = Loader(name, str(file))
                return spec_from_file_location(name, file, loader=loader, submodule_search_locations=folders)


sys.meta_path.insert(0, Finder)
