"""Files: atomic, safe to load, refused with a reason."""

import argparse
import pickle
import resource

import numpy as np
import pytest
import torch
from safetensors import safe_open

from models_mae import MODELS
from util.checkpoint import encoder_state, load_weights, read_checkpoint, weights_sha256, write_safetensors, write_torch
from util.errors import InputError
from util.files import write_atomic

TINY = MODELS["mae_vit_tiny_patch16"]


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return TINY(img_size=(32, 32)).state_dict()


def test_a_write_is_whole_or_not_at_all(tmp_path):
    """And a full disk is named where torch hides it."""
    file, before = tmp_path / "x.pth", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_torch(file, {"old": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*x.pth: File too large"):
            write_torch(file, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def fails(opened):
        opened.write(b"half")
        raise RuntimeError("of its own")  # no disk behind it: not ours to explain

    with pytest.raises(RuntimeError, match="of its own"):
        write_atomic(file, fails)
    assert torch.load(file, weights_only=True) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["x.pth"]


class Payload:
    ran = False

    def __reduce__(self):
        return (exec, ("import test_checkpoint; test_checkpoint.Payload.ran = True",))


def test_bad_files_are_refused_with_one_sentence(tmp_path, state):
    torch.save({"model": state}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello world, this is no checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "text.npz").write_bytes(b"no archive at all")
    np.savez(tmp_path / "objects.npz", **{"embedding/kernel": np.array([print], dtype=object)})
    torch.save({"model": Payload()}, tmp_path / "payload.pth")
    torch.save({"model": Payload()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload()))
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "nomodel.pth")
    wanted = dict.fromkeys(("cut.pth", "cut.safetensors", "text.npz", "empty.pth"), "truncated or damaged")
    wanted |= dict.fromkeys(("objects.npz", "payload.pth", "old.pth"), "holds Python objects.*refused")
    wanted |= {"text.pth": "damaged|refused", "bare.pth": "damaged|refused", "list.pth": "holds a list",
               "nomodel.pth": "no entry 'model': it has epoch", "absent.pth": "does not exist",
               "bomb.npz": "unpacks to 314,5"}  # fmt: skip
    np.savez_compressed(tmp_path / "bomb.npz", **{"embedding/kernel": np.zeros(300 << 18, np.float32)})
    for name, message in wanted.items():
        with pytest.raises(InputError, match=message) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not Payload.ran


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_a_changed_byte_anywhere_is_damage_and_nothing_else(tmp_path, suffix):
    """Not a traceback, and not an accusation: a flipped letter of a name is no foreign object."""
    content = {"model": {"a.weight": torch.arange(6.0), "b.weight": torch.zeros(3)}, "epoch": 3}
    whole, file = tmp_path / f"whole{suffix}", tmp_path / f"flipped{suffix}"
    if suffix == ".pth":
        torch.save(content, whole)
    else:
        np.savez(whole, **{name: value.numpy() for name, value in content["model"].items()})
    data, damaged = whole.read_bytes(), 0
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 4
        file.write_bytes(changed)
        try:
            found = read_checkpoint(file)["model"]
        except InputError as error:
            assert "Python objects" not in str(error), (position, str(error))
            damaged += 1
        else:
            assert all(torch.equal(found[key], value) for key, value in content["model"].items()), position
    assert damaged > 50


def test_facebook_files_full_and_encoder_only(tmp_path, state):
    """Its scripts keep their `args` in an argparse.Namespace, which holds values and runs no code."""
    other = TINY(img_size=(32, 32))
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "full.pth")
    assert read_checkpoint(tmp_path / "full.pth")["args"].lr == 1
    assert "loaded    254 tensors" in load_weights(other, state, "full.pth", needed="encoder")
    assert all(torch.equal(other.state_dict()[k], state[k]) for k in state)
    another = TINY(img_size=(64, 48))  # fixed tables follow the input size
    report = load_weights(another, encoder_state(state), "encoder.pth", needed="encoder")
    assert "loaded    149 tensors" in report and another.pos_embed.shape[1] == 13
    assert torch.equal(another.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])


def test_other_architectures_are_refused_by_name(tmp_path, state):
    small = MODELS["mae_vit_small_patch16"](img_size=(32, 32))
    with pytest.raises(InputError, match=r"cls_token is \(1, 1, 192\), the model wants \(1, 1, 384\)"):
        load_weights(small, state, "tiny.pth", needed="encoder")
    renamed = {k.replace("blocks.5.", "block_five."): v for k, v in state.items()}
    with pytest.raises(InputError, match="first blocks.5.norm1.weight"):
        load_weights(TINY(img_size=(32, 32)), renamed, "renamed.pth", needed="encoder")


def test_the_same_tensors_and_header_give_the_same_bytes_and_identity(tmp_path, state):
    """In another order, too: the library's own order of the header changes from call to call."""
    header = {name: name * 3 for name in "abcdefgh"}
    write_safetensors(tmp_path / "a.safetensors", state, header)
    for _ in range(4):
        write_safetensors(tmp_path / "b.safetensors", dict(reversed(state.items())), dict(reversed(header.items())))
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "b.safetensors", "pt") as opened:
        assert opened.metadata() == header and set(opened.keys()) == set(state)
    write_torch(tmp_path / "c.pth", {"model": state})
    assert len({weights_sha256(x) for x in (state, tmp_path / "a.safetensors", tmp_path / "c.pth")}) == 1
    changed = state | {"norm.bias": state["norm.bias"] + 1e-6}
    assert weights_sha256(changed) != weights_sha256(state)
