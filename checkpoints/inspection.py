"""What a file of weights is, without running anything that is in it.

Tensors and plain values are read as everywhere in this project. A pickle that names other Python objects,
which all other tools refuse, is read here with an inert stand-in for every name and without its data, so that
its keys and sizes can be shown; the names are listed.
"""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from util.checkpoint import CONTAINERS, read_checkpoint, read_safetensors_header
from util.checksums import DAMAGE, kind_of_sums
from util.errors import InputError
from util.fetch import known
from util.files import file_digests
from util.pretrained import read_config, recognise

OF_TENSORS = ("torch.Size", "torch.device", "torch._utils._rebuild_parameter_with_state")  # not worth a line
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
PICKLES_BEFORE = 3  # magic number, protocol and machine come before the object in files of torch before 1.6
SHOWN_ARGS = (
    "model", "task", "data_path", "images", "epochs", "warmup_epochs", "effective_batch", "lr", "blr",
    "weight_decay", "mask_ratio", "teacher", "context", "sim_weight", "kl_weight", "crop_min", "seed",
)  # fmt: skip
PRETRAINING, FINETUNING = (
    "a checkpoint of pre-training (to go on from, or to start from)",
    "a checkpoint of fine-tuning",
)


class _Inert:
    """Stands for an object of a pickle: takes anything, does nothing."""

    def __init__(self, *args, **kwargs): ...
    def __call__(self, *args, **kwargs):
        return _Inert()

    def __setstate__(self, state): ...
    def __setitem__(self, key, value): ...
    def append(self, value): ...
    def extend(self, values): ...
    def add(self, value): ...


def inspect_file(file: str | Path) -> dict:
    """Everything that can be said of a file of weights.

    Returns:
        Plain values, empty ones left out: bytes, sha256, format, checksums (what was compared),
        python_objects (names that would be imported), kind, architecture, parameters, parts {part: [tensors,
        parameters]}, progress, losses, args, config, licence, registry (the row with this hash), reference.
    Raises:
        InputError: missing, truncated, damaged, or no file of weights.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"checkpoint {file} does not exist")
    digests = file_digests(file, ("sha256", "md5"))
    facts: dict = {"file": str(file), "bytes": file.stat().st_size, "sha256": digests["sha256"]}
    facts["format"] = _format(file)
    facts |= _registered(digests)
    if file.suffix == ".onnx":
        return facts | _onnx(file)
    try:
        content, refused = read_checkpoint(file), False
        facts["checksums"] = kind_of_sums(file)
    except InputError as error:
        content, facts["python_objects"] = _read_inert(file, error)
        refused = True
    state = {k: v for k, v in content["model"].items() if isinstance(v, torch.Tensor)}
    facts |= {"tensors": len(state), "parameters": sum(v.numel() for v in state.values()), "parts": _by_part(state)}
    dtypes = sorted({str(v.dtype).removeprefix("torch.") for v in state.values()})
    facts["dtypes"] = ", ".join(dtypes)
    with_data = {k: v for k, v in state.items() if v.is_floating_point() and not v.is_meta}
    broken = [k for k, v in with_data.items() if not torch.isfinite(v.float()).all()]
    if broken:
        facts["not_finite"] = broken[:5]
    header = read_safetensors_header(file) if file.suffix == ".safetensors" else {}
    config = read_config(file, content) if not refused else {}
    facts |= _model(file, content, config, refused=refused)
    facts |= _run(file, content)
    facts |= {name: header[name] for name in ("licence", "data", "trained") if name in header}
    facts["reference"] = "inside: `verify` compares" if "reference" in header else "none inside"
    if config:
        facts["config"] = config
    return {name: value for name, value in facts.items() if value not in ("", None, {}, [])}


def table(facts: dict) -> str:
    """`inspect_file` for people: a line a fact."""
    lines = []
    for name, value in facts.items():
        if name == "parts":
            value = "\n".join(
                f"{'':16}{part}: {count} tensors, {numbers:,}" for part, (count, numbers) in value.items()
            )
            lines.append(f"{name}\n{value}")
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        lines.append(f"{name:15} {value:,}" if isinstance(value, int) else f"{name:15} {value}")
    return "\n".join(lines)


def _format(file: Path) -> str:
    if file.suffix in (".safetensors", ".npz", ".onnx"):
        return file.suffix[1:]
    try:
        if not zipfile.is_zipfile(file):
            return "pickle (torch before 1.6, or no checkpoint)"
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except DAMAGE as error:
        raise InputError(f"{file} is damaged ({error}): fetch or copy it again") from error
    program = any(name.endswith("constants.pkl") for name in names)
    return "TorchScript program" if program else "torch zip file"


def _registered(digests: dict[str, str]) -> dict:
    for name, row in known().items():
        for digest, value in digests.items():
            if row.get(digest) and value.startswith(row[digest]):
                return {"registry": f"{name}: {row['what']}", "licence": row["licence"]}
    return {}


def _read_inert(file: Path, error: InputError) -> tuple[dict, list[str]]:
    """({"model": tensors without data by name}, names of the Python objects); `error` again where it has
    another reason than those.

    `find_class` is a pickle's only way to anything that can be called, and it gives a stand-in for all,
    so nothing of the file runs.
    """
    with open(file, "rb") as opened:
        bare_pickle = opened.read(1) == b"\x80"  # of no torch: it may hold anything
    if "Python objects" not in str(error) and not bare_pickle:
        raise error
    objects: dict[str, None] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return _empty_tensor
            if (module, name) == ("torch._utils", "_rebuild_parameter"):
                return lambda tensor, *_: tensor
            if module == "torch" and name.endswith("Storage"):
                return STORAGES.get(name.removesuffix("Storage"), torch.float32)
            if f"{module}.{name}" not in OF_TENSORS:
                objects[f"{module}.{name}"] = None
            return _Inert

        def persistent_load(self, saved):
            return saved[1]  # ("storage", its class, ...): the class stands for its dtype

    found = {}
    try:
        with open(file, "rb") as opened:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                    found = Unpickler(io.BytesIO(archive.read(name))).load()
            else:
                for _ in range(PICKLES_BEFORE + 1):
                    found = Unpickler(opened).load()
    except (*DAMAGE, StopIteration) as reason:
        objects[f"(reading ended early: {type(reason).__name__}: {str(reason)[:80]})"] = None
    if "Python objects" not in str(error) and all(name.startswith("(") for name in objects):
        raise error
    found = found if isinstance(found, dict) else {}
    inner = next((found[n] for n in ("model", *CONTAINERS) if isinstance(found.get(n), dict)), found)
    return {"model": {str(k): v for k, v in inner.items()}}, list(objects)


def _empty_tensor(dtype, offset, size, *_) -> torch.Tensor:
    """Of the size that a pickle says, without data."""
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    return torch.empty(tuple(size), dtype=dtype, device="meta")


def _by_part(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {}
    for key, value in state.items():
        first, *more = key.split(".")
        part = f"{first}.*" if more else first
        count = parts.setdefault(part, [0, 0])
        count[0] += 1
        count[1] += value.numel()
    return parts


def _model(file: Path, content: dict, config: dict, *, refused: bool) -> dict:
    """kind and architecture."""
    if refused:
        return {"kind": "unknown: it holds Python objects, which every other tool here refuses"}
    kind, facts = config.get("kind", ""), {}
    if "optimizer" in content:
        kind = PRETRAINING if any(k.startswith("decoder_blocks") for k in content["model"]) else FINETUNING
    try:
        found = recognise(content, file)
    except InputError as error:
        return {"kind": kind or f"not an encoder: {error}"}
    width, patch = (found.state["patch_embed.proj.weight"].shape[0], found.state["patch_embed.proj.weight"].shape[2])
    blocks = len({k.split(".")[1] for k in found.state if k.startswith("blocks.")})
    positions = found.state["pos_embed"].shape[1] - 1
    facts["architecture"] = f"ViT {width} wide, {blocks} blocks, patches of {patch} px, {positions} positions"
    if config.get("img_size"):
        facts["architecture"] += " ({} x {} px)".format(*config["img_size"])
    if "decoder_embed.weight" in content["model"]:
        depth = len({k.split(".")[1] for k in content["model"] if k.startswith("decoder_blocks.")})
        facts["architecture"] += f"; decoder {len(content['model']['decoder_embed.weight'])} wide, {depth} blocks"
    return {"kind": kind or f"{found.origin} weights"} | facts


def _run(file: Path, content: dict) -> dict:
    """Where a run was, its settings, and the losses of the log beside it."""
    facts: dict = {}
    args = content.get("args")
    args = vars(args) if hasattr(args, "__dict__") else args  # MAE keeps a Namespace
    if isinstance(args, dict):
        facts["args"] = {k: args[k] for k in SHOWN_ARGS if args.get(k) not in (None, "")}
    if isinstance(content.get("epoch"), int):
        facts["progress"] = {"finished_epochs": content["epoch"] + 1}
        if content.get("batches_done"):
            facts["progress"]["batches_of_the_next"] = content["batches_done"]
    log = file.with_name("log.txt")
    if isinstance(content.get("epoch"), int) and log.is_file():
        try:
            rows = [json.loads(line) for line in log.read_text().splitlines()]
        except (json.JSONDecodeError, UnicodeDecodeError):
            return facts
        row = next((r for r in rows if r.get("epoch") == content["epoch"]), {})
        facts["losses"] = {
            k.removeprefix("train_"): round(v, 5) for k, v in row.items() if "loss" in k or k == "train_cos"
        }
    return facts


def _onnx(file: Path) -> dict:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        return {"kind": "ONNX (pip install onnx to see more)"}
    try:
        graph = onnx.load(str(file), load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{file} is truncated or no ONNX file: {str(error)[:100]}") from error
    if not graph.graph.node:
        raise InputError(f"{file} is empty or no ONNX file: fetch or copy it again")
    facts = {p.key: p.value for p in graph.metadata_props}
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    weights = sum(int(np.prod(t.dims)) for t in graph.graph.initializer)
    return {"kind": f"ONNX of {facts.pop('kind', 'something else')}", **facts, "shapes": shapes, "parameters": weights}
