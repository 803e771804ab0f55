"""Values that no flag should take: one sentence for each, whatever the program, before anything is read."""

import argparse
import contextlib
import copy
import io

import pytest
from conftest import small_flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_house import PARSERS

import main_finetune
import main_pretrain
from util.errors import InputError

ODD = [*"nan inf -inf 1e999 ² ١٢ 1_0 0x10 -- 1e 99999999999999999999 -1 0".split(), "", " ", "\n", "\ud800"]
VALUES = st.one_of(st.sampled_from(ODD), st.integers().map(str), st.floats().map(str), st.text(max_size=8))
TRAINERS = {"main_pretrain.py": main_pretrain.check_given, "main_finetune.py": main_finetune.check_args}


def numeric(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.type in (int, float) and action.option_strings]


def refused(call, *args) -> str:
    """What is said on stderr; empty where nothing is wrong. Anything else than one sentence fails."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            call(*args)
        except SystemExit as stopped:
            assert stopped.code == 2
        except InputError as error:
            print(f"error: {error}", file=err)
    said = err.getvalue()
    assert said.count("\n") <= 1 and (not said or said.startswith("error: ")), said
    return said


@pytest.mark.parametrize("program", PARSERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_value_of_a_number_ends_in_a_traceback(program, data):
    parser = copy.deepcopy(data.draw(st.sampled_from(PARSERS[program])))
    if not (actions := numeric(parser)):
        return
    action, value = data.draw(st.sampled_from(actions)), data.draw(VALUES)
    for other in parser._actions:
        other.required = False
    parse = lambda: parser.parse_args([f"{action.option_strings[0]}={value}"])  # noqa: E731
    if not refused(parse) and action.nargs is None:
        number = getattr(parse(), action.dest)
        assert value.isascii() and abs(number) < float("inf") and "_" not in value


@pytest.mark.parametrize("program", TRAINERS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_trainer_refuses_what_it_cannot_run_with(program, data, tmp_path_factory):
    parser = PARSERS[program][0]
    action, value = data.draw(st.sampled_from(numeric(parser))), data.draw(VALUES)
    flags = "--task reid --model vit_tiny_patch16 --data_path x".split()
    if program == "main_pretrain.py":
        flags = small_flags("x", tmp_path_factory.getbasetemp() / "none")
    refused(lambda: TRAINERS[program](parser.parse_args([*flags, f"{action.option_strings[0]}={value}"])))


WRONG = """
--micro_batch 0|--num_workers -1|--num_workers 100000|--lr nan|--lr -1|--seed 99999999999999999999|--seed -1|--blr inf
--clip_grad nan|--weight_decay inf|--min_lr nan|--warmup_epochs inf|--input_size 22²|--input_size 1600000|--epochs 0
--save_minutes -1|--distill_hidden 1000000000|--kl_tau 0|--crop_min nan|--mask_ratio nan|--dist_timeout nan
--input_size ٢٢٤|--input_size 224,|--input_size 1,2,3|--input_size=-224|--input_size 99999|--input_size nan
"""


def test_bad_values_of_pretraining(tmp_path):
    for words in WRONG.strip().replace("\n", "|").split("|"):
        flags = [*small_flags("x", tmp_path), *words.split()]
        assert refused(lambda f=flags: main_pretrain.check_given(main_pretrain.get_args_parser().parse_args(f))), words
