"""Rules of the house: layers, sizes, names, command lines, docs, safety."""

import argparse
import ast
import graphlib
import re
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

import main_pretrain
from finetune.flags import TASKS

# no import runs back up
LAYERS = [
    "util", "datasets metrics", "models", "engine", "reports", "finetune curation description demo",
    "tools benchmarks main hubconf scripts",
]  # fmt: skip
ONLY_FROM = {"util": {"util"}, "metrics": {"metrics", "util"}, "datasets": {"datasets", "util"}}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 420, 60, 8
MAX_TOTAL, MAX_FILES = 17_900, 112
# `file: function` (long, many parameters), `file` (long), `file imports module` (back up)
ALLOWED = {"models_mae.py: __init__", "models_vit.py: __init__"}  # shapes and hyperparameters, called by keyword
HEAVY = ["torch", "torchvision", "timm", "open_clip", "matplotlib"]
MAE_DEFAULTS = {
    "batch_size": 64, "epochs": 400, "accum_iter": 1, "mask_ratio": 0.75, "norm_pix_loss": False,
    "weight_decay": 0.05, "lr": None, "blr": 1e-3, "min_lr": 0.0, "warmup_epochs": None, "seed": 0,
    "output_dir": "./output_dir", "resume": "", "start_epoch": 0, "pin_mem": True,
}  # fmt: skip

ROOMS = "util datasets metrics reports finetune curation description demo tools benchmarks scripts/experiments".split()
FILES = sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))])
TEXTS = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
MODULES = {name[:-3].replace("/", "."): name for name in TREES}
PROGRAMS = [name for name, text in TEXTS.items() if "def get_args_parser" in text and not name.startswith("scripts")]


def parser_of(program: str) -> argparse.ArgumentParser:
    """What stands above `if __name__`, executed: no torch, as on the command line."""
    body = TREES[program].body
    end = next(i for i, node in enumerate(body) if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    scope = {
        "__name__": program,
        "__file__": str(ROOT / program),
        "__doc__": ast.get_docstring(TREES[program], clean=False),
    }
    exec(compile(ast.Module(body[:end], []), program, "exec"), scope)
    return scope["get_args_parser"]()


def with_verbs(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    verbs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [parser, *(own for action in verbs for own in action.choices.values())]


PARSERS = {program: with_verbs(parser_of(program)) for program in PROGRAMS}


def room(module: str) -> str:
    return re.split(r"[._]", module)[0]


def imports_of(module: str) -> set[str]:
    """Modules of this project that a module imports, also inside of functions."""
    names = set()
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & set(MODULES)


def test_no_import_runs_back_up_or_in_a_circle():
    layer = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
    graph = {module: imports_of(module) for module in MODULES}
    for module, others in graph.items():
        for other in others:
            words = f"{MODULES[module]} imports {other}"
            assert layer[room(other)] <= layer[room(module)] or words in ALLOWED, f"{words}, a layer above"
            assert room(other) in ONLY_FROM.get(room(module), layer), f"{words}, another room's"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_files_and_functions_are_short():
    for name, text in TEXTS.items():
        assert text.count("\n") <= MAX_FILE or name in ALLOWED, f"{name}: {text.count(chr(10))} lines"
        for node in ast.walk(TREES[name]):
            if not isinstance(node, ast.FunctionDef) or f"{name}: {node.name}" in ALLOWED:
                continue
            if not re.search(r"_args_parser$|^add_\w*flags$", node.name):  # these only add flags
                assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{name}: {node.name} is too long"
            own = node.args
            given = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
            count = sum(arg is not None and arg.arg not in ("self", "cls") for arg in given)
            assert count <= MAX_PARAMETERS, f"{name}: {node.name} has {count} parameters"
    total = sum(text.count("\n") for text in TEXTS.values())
    assert total <= MAX_TOTAL, f"{total} lines of Python outside of tests/"
    assert len(FILES) <= MAX_FILES, f"{len(FILES)} files of Python outside of tests/"


def test_a_task_has_one_name_in_every_folder():
    for task in TASKS:
        for folder in ("datasets", "finetune", "metrics", "reports"):
            assert f"{folder}/{task}.py" in TEXTS, f"{folder}/{task}.py is missing"


def names_read() -> set[str]:
    """X of every `args.X`, and every text that is a name, as of `getattr(args, name)`."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    of_args = {
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute) and ast.unparse(n.value).split(".")[-1] in ("args", "ARGS", "rule")
    }
    return of_args | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_flag_has_help_and_is_read():
    read = names_read()
    for program, parsers in PARSERS.items():
        tree = TREES[program]
        as_keywords = {
            node.arg for node in ast.walk(tree) if isinstance(node, ast.arg) and "vars(args)" in TEXTS[program]
        }
        for action in (action for parser in parsers for action in parser._actions):
            words = f"{program} --{action.dest}"
            if action.help == argparse.SUPPRESS or action.dest == "help":
                continue
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help and len(action.help) > 5, words
                assert action.required or "default" in action.help, f"{words}: help names no default"
            assert action.dest in read | as_keywords, f"{words} is never read"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_typo_gets_one_line_with_the_nearest_name(program, capsys):
    for parser in PARSERS[program]:
        actions = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        for action in actions:
            action.required = False
        typos = [(max(flags, key=len), []) for flags in [a.option_strings for a in actions] if flags][:1]
        typos += [(str(next(iter(a.choices))), a.option_strings[:1]) for a in actions if a.choices and a.type is None][
            :1
        ]
        for right, before in typos:
            with pytest.raises(SystemExit) as stopped:
                parser.parse_args([*before, f"{right}x"])
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
            assert "did you mean" in said, said


def test_help_needs_no_torch():
    """One process for all programs, in which nothing heavy can be imported."""
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({HEAVY}))
for program in {PROGRAMS}:
    module = program[:-3].replace("/", ".")
    sys.argv = [program, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as stopped:
        assert not stopped.code, program
    else:
        raise AssertionError(program)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(PROGRAMS)


def test_help_takes_less_than_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "main_pretrain.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_mae_flags_keep_their_defaults():
    args = vars(main_pretrain.get_args_parser().parse_args([]))
    args |= {name: value for name, value in main_pretrain.RECIPES["paper"].items() if args[name] is None}
    assert {name: args[name] for name in MAE_DEFAULTS} == MAE_DEFAULTS
    words = "--input_size 224 --log_dir x --device cuda --pin_mem --no_pin_mem --num_workers 10 --world_size 2"
    words += " --local_rank 0 --dist_on_itp --dist_url env:// --data_path x --model mae_vit_large_patch16"
    assert not main_pretrain.get_args_parser().parse_args(words.split()).pin_mem


def test_the_published_command_parses():
    words = "--batch_size 256 --model mae_vit_base_patch16 --mask_ratio 0.75 --epochs 400 --warmup_epochs 40"
    words += " --blr 1.5e-4 --weight_decay 0.05 --accum_iter 8 --norm_pix_loss"
    args = main_pretrain.get_args_parser().parse_args(words.split())
    main_pretrain.take_recipe(args, 1_000_000)
    main_pretrain.check_args(args)
    assert args.recipe == "paper" and args.img_size == (224, 224) and args.weights == {"sim": 8.0}
    assert (args.teacher_view, args.teacher_norm, args.crop_min) == ("crop", "none", 0.2)


def test_documented_commands_parse():
    """Every command in README, docs and scripts has only known flags."""
    commands = 0
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "scripts").glob("**/*.sh")]:
        text = file.read_text().replace("\\\n", " ")
        for program, parsers in PARSERS.items():
            known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
            called = program if program.startswith("main_") else f"-m {program[:-3].replace('/', '.')}"
            for line in re.findall(rf"{re.escape(called)}( [^\n`#|;&]*)", text):
                commands += 1
                assert set(re.findall(r"(?<=\s)--\w[\w-]*", line)) <= known, f"{file.name}: {called}{line}"
    assert commands >= 20


def test_no_unsafe_loading_and_no_broad_excepts():
    for name, text in TEXTS.items():
        assert "weights_only=False" not in text and "allow_pickle=True" not in text, name
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ExceptHandler):
                kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                broad = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
                assert not broad or any(isinstance(n, ast.Raise) for n in ast.walk(node)), name
