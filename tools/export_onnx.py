"""An encoder or a re-identification model as ONNX, compared with torch before it is kept.

uint8 pictures in, features out: [N, 3, H, W] RGB, any N, resized to the model's H x W
(`datasets.transforms.whole_image`); normalisation and the position table are inside.
"""

import json
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from finetune.encoder import load_model
from models_vit import FEATURES
from util.errors import InputError
from util.files import file_sha256

ONE_FILE_BYTES = 1 << 30  # more goes to NAME.onnx.data beside it: ONNX files end at 2 GiB
TOLERANCE = 1e-3  # |onnx - torch| / |torch| of a feature


class _Features(nn.Module):
    """images -> cls, mean, tokens of an encoder, or the embedding of a model that may want ids of cameras and views."""

    def __init__(self, model: nn.Module, sides: dict[str, int] | None):
        super().__init__()
        self.model, self.sides = model, sides

    def forward(self, images, *ids):
        if self.sides is None:
            features = self.model.encode(images)
            return tuple(features[name] for name in FEATURES)
        given = iter(ids)
        return (self.model.encode(images, *(next(given) if count else None for count in self.sides.values())),)


def export_onnx(file: str | Path, output: str | Path, input_size: tuple[int, int] | None = None) -> dict:
    """Write `output` (.onnx) and compare it with torch under onnxruntime.

    Args:
        file: what `load_encoder` reads, or a model.pth of `--task reid`.
        input_size: (H, W) in px of an encoder, default the file's.
    Returns:
        Numbers and strings; `largest_difference` is relative, over pictures and features.
    """
    onnx, ort = _packages()
    output = Path(output)
    if output.suffix != ".onnx":
        raise InputError(f"--output {output}: give a file name that ends in .onnx")
    found = load_model(file, img_size=input_size)
    kind, base, sides, outputs = found.config.get("kind", "encoder"), found.model, None, FEATURES
    if found.task == "reid":
        settings = found.model.config
        base, sides, outputs = base.base, {"camids": settings.cameras, "viewids": settings.views}, ("embedding",)
    elif found.task:
        raise InputError(f"{file} is a {kind}: only encoders and models of --task reid go to ONNX")
    model = _Features(found.model, sides).eval()
    height, width = base.img_size
    generator = torch.Generator().manual_seed(0)
    inputs = {"images": torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8, generator=generator)}
    inputs |= {name: torch.zeros(5, dtype=torch.int64) for name, count in (sides or {}).items() if count}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        _write(model, inputs, outputs, written)
        largest = _largest_difference(model, ort, written, inputs)
        if not largest < TOLERANCE:  # also NaN
            raise InputError(
                f"{file} gives other features under onnxruntime {ort.__version__} (relative difference "
                f"{largest:.2g}, at most {TOLERANCE}): nothing was written; try other versions of torch and onnxruntime"
            )
        graph = onnx.load(str(written), load_external_data=False)
        facts = {
            "kind": kind, "source": Path(file).name, "source_sha256": file_sha256(file),
            "config": json.dumps(found.config if found.task else base.settings()),
            "largest_difference": f"{largest:.3g}",
            "preprocessing": f"RGB uint8 [N, 3, {height}, {width}]; the whole picture resized by an antialiased "
            "bicubic filter; normalisation is inside",
        }  # fmt: skip
        onnx.helper.set_model_props(graph, facts)
        onnx.save(graph, str(written))
        for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights first, then what needs them
            os.replace(part, output.with_name(part.name))
    return {"outputs": list(outputs), "largest_difference": largest, "bytes": output.stat().st_size}


def _packages() -> tuple:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise InputError(f"no package {error.name}: pip install onnx onnxscript onnxruntime") from error
    return onnx, onnxruntime


def _write(model: nn.Module, inputs: dict, outputs: tuple, file: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    shapes: dict = {"images": {0: batch}}
    if len(inputs) > 1:  # camids and viewids are *ids of the module
        shapes["ids"] = tuple({0: batch} for _ in list(inputs)[1:])
    size = sum(p.numel() * 4 for p in model.parameters())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
        names = {"input_names": list(inputs), "output_names": list(outputs)}
        exported = torch.onnx.export(program, **names, dynamo=True, verbose=False)
        exported.save(str(file), external_data=size > ONE_FILE_BYTES)


@torch.inference_mode()
def _largest_difference(model, ort, file: Path, inputs: dict) -> float:
    """Largest |onnx - torch| / |torch| of a feature, in batches of one and of all."""
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    differences = []
    for rows in (slice(0, 1), slice(None)):
        found = session.run(None, {name: value[rows].numpy() for name, value in inputs.items()})
        for ours, theirs in zip(model(*inputs.values()), found):
            a, b = ours[rows].flatten(1).numpy(), theirs.reshape(len(theirs), -1)
            differences.append(np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1))
    return float(np.concatenate(differences).max())


def onnx_facts(file: str | Path) -> dict:
    """What an ONNX file says of itself: the metadata that `export_onnx` writes."""
    onnx, _ = _packages()
    try:
        graph = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # of protobuf
        raise InputError(f"{file} is truncated or no ONNX file: {str(error)[:100]}") from error
    if not graph.graph.node:
        raise InputError(f"{file} is empty or no ONNX file: fetch or copy it again")
    facts = {p.key: p.value for p in graph.metadata_props}
    return facts | {"kind": f"ONNX of {facts.get('kind', 'something else')}"}
