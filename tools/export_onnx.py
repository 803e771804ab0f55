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

from finetune.task import load_model
from models_vit import FEATURES
from util.errors import InputError

ONE_FILE_BYTES = 1 << 30  # more goes to NAME.onnx.data beside it: ONNX files end at 2 GiB
TOLERANCE = 1e-3  # |onnx - torch| / |torch| of a feature


class _Features(nn.Module):
    """images -> cls, mean, tokens of an encoder, or the embedding of a model that may want ids of cameras and views."""

    def __init__(self, model: nn.Module, sides: dict[str, int] | None):
        super().__init__()
        self.model, self.sides = model, sides

    def forward(self, images, *ids):
        if self.sides is None:
            return tuple(self.model.encode(images)[name] for name in FEATURES)
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
        base, settings, outputs = base.base, base.config, ("embedding",)
        sides = {"camids": settings.cameras, "viewids": settings.views}
    elif found.task:
        raise InputError(f"{file} is a {kind}: only encoders and models of --task reid go to ONNX")
    model, (height, width) = _Features(found.model, sides).eval(), base.img_size
    generator = torch.Generator().manual_seed(0)
    inputs = {"images": torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8, generator=generator)}
    inputs |= {name: torch.zeros(5, dtype=torch.int64) for name, count in (sides or {}).items() if count}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        _write(model, inputs, outputs, written)
        largest = _largest_difference(model, ort.InferenceSession(written, providers=["CPUExecutionProvider"]), inputs)
        if not largest < TOLERANCE:  # also NaN
            raise InputError(
                f"{file} gives other features under onnxruntime {ort.__version__} (relative difference "
                f"{largest:.2g}, at most {TOLERANCE}): nothing was written; try other versions of torch and onnxruntime"
            )
        graph = onnx.load(written, load_external_data=False)
        pixels = f"RGB uint8 [N, 3, {height}, {width}], resized whole by an antialiased bicubic filter"
        config = json.dumps(found.config if found.task else base.settings())
        facts = {"kind": kind, "config": config, "largest_difference": f"{largest:.3g}", "preprocessing": pixels}
        onnx.helper.set_model_props(graph, facts)
        onnx.save(graph, written)
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
    batch = {0: torch.export.Dim("batch", min=1)}
    shapes: dict = {"images": batch} | ({"ids": (batch,) * (len(inputs) - 1)} if len(inputs) > 1 else {})
    size = sum(p.numel() * 4 for p in model.parameters())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
        names = {"input_names": list(inputs), "output_names": list(outputs)}
        torch.onnx.export(program, **names, dynamo=True, verbose=False).save(file, external_data=size > ONE_FILE_BYTES)


@torch.inference_mode()
def _largest_difference(model, session, inputs: dict) -> float:
    """Largest |onnx - torch| / |torch| of a feature, in batches of one and of all."""
    differences, expected = [], model(*inputs.values())
    for rows in (slice(0, 1), slice(None)):
        found = session.run(None, {name: value[rows].numpy() for name, value in inputs.items()})
        for ours, theirs in zip(expected, found):
            a, b = ours[rows].flatten(1).numpy(), theirs.reshape(len(theirs), -1)
            differences.append(np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1))
    return float(np.concatenate(differences).max())
