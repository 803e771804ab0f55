"""Files of weights and runs: written atomically, read without running code from them."""

import argparse
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from util.errors import InputError
from util.files import BLOCK_BYTES, write_atomic

CONTAINERS = ("state_dict", "teacher")  # where others keep their weights; DINO's teacher is what it evaluates
# what torch and numpy say of a file with other objects than tensors and plain values
FORBIDDEN = (
    "unsupported global", "unsupported class", "unrecognized function", "can only build", "object arrays cannot"
)  # fmt: skip
POSITION_TABLES = ("pos_embed", "decoder_pos_embed")
DECODER_KEYS = ("mask_token", "decoder_")
HEAD_KEYS = ("distill_head.",)


def write_torch(file: str | Path, value) -> None:
    """torch.save, atomically; the caller passes tensors, numbers, strings and containers only."""
    write_atomic(file, lambda opened: torch.save(value, opened))


def write_safetensors(file: str | Path, tensors: dict, metadata: dict[str, str]) -> None:
    """safetensors with a string header, atomically."""
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    write_atomic(file, lambda opened: opened.write(safetensors_bytes(tensors, metadata)))


def read_checkpoint(file: str | Path) -> dict:
    """Load a .pth, .safetensors or .npz to the CPU, tensors and plain values only.

    Returns:
        The file's dict; a bare state dict comes as {"model": state dict}, and so do those of `CONTAINERS`.
    Raises:
        InputError: missing, truncated, holding Python objects, or no dict of tensors.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"checkpoint {file} does not exist")
    if file.suffix == ".onnx":
        raise InputError(f"{file} is ONNX, whose weights are not read back: give the file that it was made from")
    try:
        content = _read(file)
    except Exception as error:  # of a damaged file readers raise nearly anything
        raise InputError(_why_unreadable(file, error)) from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {file} holds a {type(content).__name__}, not a dict of weights")
    if "model" not in content and all(isinstance(v, torch.Tensor) for v in content.values()):
        content = {"model": content}
    for name in CONTAINERS:
        if "model" not in content and isinstance(content.get(name), dict):
            content = content | {"model": content[name]}
    if not isinstance(content.get("model"), dict):
        keys = ", ".join(map(str, list(content)[:8]))
        raise InputError(f"checkpoint {file} has no entry 'model': it has {keys or 'nothing'}")
    return content


def _read(file: Path):
    if file.suffix == ".safetensors":
        return load_file(file)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:  # torch.load does not look at the checksums; 0: written without
            for record in (record for record in archive.infolist() if record.CRC):
                with archive.open(record) as opened:
                    while opened.read(BLOCK_BYTES):  # before loading: a changed byte can look like a forbidden name
                        pass
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's `args`: only holds values
        return torch.load(file, map_location="cpu", weights_only=True)


def _why_unreadable(file: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if any(words in reason.lower() for words in FORBIDDEN):
        return (
            f"checkpoint {file} holds Python objects, which could run code, and is refused: load it once where you "
            "trust it and save its weights alone, torch.save({'model': checkpoint['model']}, FILE)"
        )
    if "TorchScript" in reason:
        return (
            f"checkpoint {file} is a program (a TorchScript archive, as OpenAI's own CLIP files are) and is refused: "
            "save its weights once where you trust it, torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
        )
    reason = reason.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()
    return (
        f"checkpoint {file} ({file.stat().st_size:,} bytes) is truncated or damaged, or no checkpoint "
        f"({reason[:200] or 'no end'}): fetch or copy it again"
    )


def read_safetensors_header(file: str | Path) -> dict[str, str]:
    """The string header of a safetensors file that `read_checkpoint` has accepted."""
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def encoder_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's tensors alone (150 for ViT-B/16): no decoder, no distillation head."""
    return {k: v for k, v in state.items() if not k.startswith(DECODER_KEYS + HEAD_KEYS)}


def not_finite(state: dict) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    floats = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return [k for k, v in floats.items() if not torch.isfinite(v.float()).all()]


def load_weights(model: torch.nn.Module, state: dict, file, *, needed: str, **more) -> str:
    """Copy weights by name and say what matched.

    Args:
        model: receives the weights.
        state: tensors by name, from `read_checkpoint(file)["model"]`.
        needed: "encoder": every encoder tensor must be there, decoder and distillation head may be
            missing; "all": nothing of the MAE may be missing; "95%": of the tensors, and every block whole.
        more: rows of the table that the caller knows.
    Returns:
        A table of one line a part: loaded / new (kept at its initial value) / more / ignored.
    Raises:
        InputError: a needed tensor is missing or has another shape.
    """
    own = model.state_dict()
    # position tables of MAE are fixed and follow from the input size: another size keeps its own
    fixed = POSITION_TABLES if needed != "95%" else ()
    state = {k: v for k, v in state.items() if k not in fixed or v.shape == own.get(k, v).shape}
    head = {k for k in own if k.startswith(HEAD_KEYS)}
    wrong_shape = [k for k in own if k in state and state[k].shape != own[k].shape]
    if fatal := [k for k in wrong_shape if k not in head]:
        k = fatal[0]
        raise InputError(
            f"{file} holds another architecture: {k} is {tuple(state[k].shape)}, the model wants "
            f"{tuple(own[k].shape)} ({len(fatal)} tensors differ); check --model and --input_size"
        )
    optional = {*fixed, *head, *(set(own) - set(encoder_state(own)) if needed == "encoder" else ())}
    missing = [k for k in own if k not in state and k not in optional]
    if needed == "95%" and len(missing) <= 0.05 * len(own):
        missing = [k for k in missing if k.startswith("blocks.")]  # random in part, it would spoil the features
    if missing:
        raise InputError(
            f"{file} lacks {len(missing)} of the {len(own)} tensors this model needs, first "
            f"{missing[0]}; it holds {', '.join(list(state)[:3])}, ...: is it a file of this "
            "architecture?"
        )
    loaded = {k: v for k, v in state.items() if k in own and k not in wrong_shape}
    model.load_state_dict(loaded, strict=False)
    rows = {"loaded": loaded, "new": [k for k in own if k not in loaded], **more}
    rows.setdefault("ignored", [k for k in state if k not in own])
    parts = {title: ", ".join(dict.fromkeys(key.split(".")[0] for key in keys)) for title, keys in rows.items()}
    lines = (f"  {title:8s} {len(keys):4d} tensors: {parts[title]}" for title, keys in rows.items())
    return "\n".join(line.removesuffix(": ") for line in lines)
