"""Files of weights and runs: written atomically, read without running code from them, sizes looked at first."""

import argparse
import hashlib
import json
import pathlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from util.errors import InputError
from util.files import BLOCK_BYTES, write_atomic

# where others keep their weights, the first that is there; DINO's teacher is what it evaluates, DeepSpeed has "module"
CONTAINERS = ("model", "state_dict", "teacher", "module", "state_dicts", "model_state_dict", "model_ema")
# what torch and numpy say of a file with other objects than tensors and plain values
FORBIDDEN = ("unsupported global", "unsupported class", "unrecognized function", "can only build", "object arrays can")
POSITION_TABLES = ("pos_embed", "decoder_pos_embed")
DECODER_KEYS = ("mask_token", "decoder_")
HEAD_KEYS = ("distill_head.",)
_NUMPY = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
PLAIN = [  # that only hold values: MAE's `args`, paths in it, numpy's numbers under the names of its versions 1 and 2
    argparse.Namespace, pathlib.PosixPath, np.dtype, np.ndarray, *{type(np.dtype(c)) for c in np.typecodes["All"]},
    *((value, f"numpy.{core}.multiarray.{name}") for name, value in _NUMPY.items() for core in ("core", "_core")),
]  # fmt: skip


def write_torch(file: str | Path, value) -> None:
    """torch.save, atomically; the caller passes tensors, numbers, strings and containers only."""
    write_atomic(file, lambda opened: torch.save(value, opened))


def write_safetensors(file: str | Path, tensors: dict, metadata: dict[str, str]) -> None:
    """safetensors with a string header, atomically; the same tensors and header give the same bytes."""
    data = memoryview(safetensors_bytes({k: v.contiguous() for k, v in tensors.items()}, metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end]))  # the library's order of the metadata changes from run to run
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(file, lambda opened: [opened.write(x) for x in (len(text).to_bytes(8, "little"), text, data[end:])])


def weights_sha256(state: dict[str, torch.Tensor] | str | Path, settings: dict | None = None) -> str:
    """Identity of weights, or of those in a file, whatever its format: sha256 of `settings`, names, float32 values."""
    state = state if isinstance(state, dict) else read_checkpoint(state)["model"]
    digest = hashlib.sha256(json.dumps(settings).encode() if settings else b"")
    for name, value in sorted(state.items(), key=lambda item: item[0]):
        if torch.is_tensor(value):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().float().numpy().data)
    return digest.hexdigest()


def read_checkpoint(file: str | Path) -> dict:
    """Load a .pth, .safetensors, .npz or TorchScript archive to the CPU, tensors and plain values only.

    Returns the file's dict; a bare state dict comes as {"model": state dict}, and so do those of `CONTAINERS` and of
    the only entry that holds tensors. Of a TorchScript archive also "quick_gelu", whether it has OpenAI's GELU.
    InputError: missing, truncated, holding Python objects, unpacking to far more than it is, or no dict of tensors."""
    file = Path(file)
    if not file.is_file():
        raise InputError(f"checkpoint {file} does not exist")
    try:
        content = _read(file)
    except InputError:
        raise
    except Exception as error:  # of a damaged file readers raise nearly anything
        reason = " ".join(str(error).split())
        if any(words in reason.lower() for words in FORBIDDEN):
            cure = "where you trust it, load it once and torch.save({'model': checkpoint['model']}, FILE)"
            raise InputError(f"{file} holds Python objects, which could run code, and is refused: {cure}") from error
        reason = reason.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()[:200]
        words = f"({file.stat().st_size:,} bytes) is truncated or damaged, or no checkpoint ({reason})"
        raise InputError(f"{file} {words}: fetch or copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {file} holds a {type(content).__name__}, not a dict of weights")
    if content and all(isinstance(v, torch.Tensor) for v in content.values()):
        content = {"model": content}
    inside = [k for k, v in content.items() if isinstance(v, dict) and any(torch.is_tensor(x) for x in v.values())]
    name = next((name for name in CONTAINERS if name in inside), inside[0] if len(inside) == 1 else None)
    if name is None:
        raise InputError(f"checkpoint {file} has no entry 'model': it has {', '.join(map(str, list(content)[:8]))}")
    for key, value in ((key, value) for key, value in content[name].items() if torch.is_tensor(value)):
        kind = "quantised" if value.is_quantized else "empty (device meta)" if value.is_meta else value.layout
        if kind is not torch.strided:
            raise InputError(f"{file} holds {key} as a tensor that is {kind}: save it as a dense one")
        if value.numel() > (count := value.untyped_storage().nbytes() // value.element_size()):
            words = f"{tuple(value.shape)}, {value.numel():,} numbers of which only {count:,} are in the file"
            raise InputError(f"{file} holds {key} as {words}: it is refused")
    return content | {"model": content[name]}


def _read(file: Path):
    if file.suffix == ".safetensors":
        return load_file(file)
    if (program := check_archive(file)) is not None:
        with zipfile.ZipFile(file) as archive:
            return _TorchScript(archive, program).content()
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    with torch.serialization.safe_globals(PLAIN):
        return torch.load(file, map_location="cpu", weights_only=True)


def check_archive(file: Path) -> str | None:
    """Check sizes and checksums of a zip file (.pth, .npz) -> the folder inside a TorchScript archive, else None."""
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        records, size = archive.infolist(), file.stat().st_size
        unpacked = sum(record.file_size for record in records)
        if unpacked > 4 * size + (64 << 20):
            raise InputError(f"{file} of {size:,} bytes unpacks to {unpacked:,}: weights do not, it is refused")
        for record in (record for record in records if record.CRC):  # torch can write files without
            with archive.open(record) as opened:
                while opened.read(BLOCK_BYTES):  # before loading: a changed byte can look like a forbidden name
                    pass
    programs = [record.filename for record in records if record.filename.endswith("/constants.pkl")]
    return programs[0].removesuffix("constants.pkl") if programs else None


class _TorchScript(pickle.Unpickler):
    """The tensors of a TorchScript archive (as OpenAI's own CLIP files are) by name; its program is not looked at."""

    class Module:
        pass

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}data.pkl"))
        self.archive, self.root, self.classes = archive, root, set()

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            self.classes.add(name)
            return self.Module
        if module == "torch.jit._pickle":  # its lists and their types
            return lambda value, *_: value
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)._dtype
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"unsupported global {module}.{name}")

    def persistent_load(self, saved):
        data = bytearray(self.archive.read(f"{self.root}data/{saved[2]}"))
        return torch.frombuffer(data, dtype=saved[1]) if data else torch.empty(0, dtype=saved[1])

    def content(self) -> dict:
        def walk(module, prefix=""):
            for name, value in vars(module).items():
                if isinstance(value, self.Module):
                    yield from walk(value, f"{prefix}{name}.")
                elif isinstance(value, torch.Tensor):
                    yield f"{prefix}{name}", value

        tensors = dict(walk(self.load()))
        return {"model": tensors, "quick_gelu": any(name.endswith("QuickGELU") for name in self.classes)}


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
    """Copy weights by name -> a table of one line a part: loaded / new (kept at its initial value) / more / ignored.

    Args:
        state: tensors by name, from `read_checkpoint(file)["model"]`.
        needed: "encoder": every encoder tensor must be there, decoder and distillation head may be
            missing; "all": nothing of the MAE may be missing; "95%": of the tensors, and every block whole.
        more: rows of the table that the caller knows.
    """
    own = model.state_dict()
    # position tables of MAE are fixed and follow from the input size: another size keeps its own
    fixed = POSITION_TABLES if needed != "95%" else ()
    state = {k: v for k, v in state.items() if k not in fixed or v.shape == own.get(k, v).shape}
    head = {k for k in own if k.startswith(HEAD_KEYS)}
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    if fatal := [k for k in wrong if k not in head]:
        k, count = fatal[0], f"({len(fatal)} tensors differ); check --model and --input_size"
        words = f"{k} is {tuple(state[k].shape)}, the model wants {tuple(own[k].shape)} {count}"
        raise InputError(f"{file} holds another architecture: {words}")
    optional = {*fixed, *head, *(set(own) - set(encoder_state(own)) if needed == "encoder" else ())}
    missing = [k for k in own if k not in state and k not in optional]
    if needed == "95%" and len(missing) <= 0.05 * len(own):
        missing = [k for k in missing if k.startswith("blocks.")]  # random in part, it would spoil the features
    if missing:
        lacks = f"lacks {len(missing)} of the {len(own)} tensors this model needs, first {missing[0]}"
        raise InputError(f"{file} {lacks}; it holds {', '.join(list(state)[:3])}, ...: is it of this architecture?")
    loaded = {k: v for k, v in state.items() if k in own and k not in wrong}
    if bad := not_finite(loaded):
        words = f"numbers that are not finite in {len(bad)} tensors, first {bad[0]}"
        raise InputError(f"{file} holds {words}: the training diverged or it is damaged; give an earlier checkpoint")
    model.load_state_dict(loaded, strict=False)
    rows = {"loaded": loaded, "new": [k for k in own if k not in loaded], **more}
    rows.setdefault("ignored", [k for k in state if k not in own])
    parts = {title: ", ".join(dict.fromkeys(key.split(".")[0] for key in keys)) for title, keys in rows.items()}
    lines = (f"  {title:8s} {len(keys):4d} tensors: {parts[title]}" for title, keys in rows.items())
    return "\n".join(line.removesuffix(": ") for line in lines)
