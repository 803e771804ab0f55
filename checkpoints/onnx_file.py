"""An encoder or a re-identification model as ONNX, checked before it is kept.

uint8 pictures in, features out: [N, 3, H, W] RGB, any N, resized to the model's H x W
(`datasets.transforms.whole_image`); normalisation and the position table are inside.
"""

import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints.reference import reference_images
from checkpoints.verification import TRAINED
from datasets.images import open_given
from datasets.transforms import whole_image
from demo.render import render
from finetune.reid_model import KIND as REID
from finetune.reid_model import load_reid
from models_transreid import TransReID
from models_vit import FEATURES, VisionTransformer, load_encoder
from util.checkpoint import read_checkpoint
from util.errors import InputError
from util.files import file_sha256
from util.pretrained import read_config

ONE_FILE_BYTES = 1 << 30  # more goes to NAME.onnx.data beside it: ONNX files end at 2 GiB
TOLERANCE = 1e-3  # |onnx - torch| / |torch| of a feature
TIMED_IMAGES, TIMED_ROUNDS = 8, 3


class _Encoder(nn.Module):
    def __init__(self, model: VisionTransformer):
        super().__init__()
        self.model = model

    def forward(self, images):
        features = self.model.encode(images)
        return tuple(features[name] for name in FEATURES)


class _ReID(nn.Module):
    def __init__(self, model: TransReID):
        super().__init__()
        self.model = model
        self.sides = {"camids": model.config.cameras, "viewids": model.config.views}

    def forward(self, images, *ids):
        given = iter(ids)
        return self.model.encode(images, *(next(given) if count else None for count in self.sides.values()))


def export_onnx(
    file: str | Path, output: str | Path, input_size: tuple[int, int] | None = None, pictures: Sequence[str | Path] = ()
) -> dict:
    """Write `output` (.onnx) and compare it with torch under onnxruntime.

    Args:
        file: what `load_encoder` reads, or a model.pth of `--task reid`.
        input_size: (H, W) in px of an encoder, default the file's.
        pictures: files to compare on beside the drawn reference pictures.
    Returns:
        Numbers and strings; `largest_difference` (relative, over all pictures and features) is also in the
        file's metadata.
    Raises:
        InputError: a model of another task, packages are missing, the two differ by more than `TOLERANCE`.
    """
    onnx, ort = _packages()
    output = Path(output)
    if output.suffix != ".onnx" or output.is_dir():
        raise InputError(f"--output {output}: give a file name that ends in .onnx")
    content = read_checkpoint(file)
    kind = read_config(file, content).get("kind", "")
    if kind == REID:
        model, config, _ = load_reid(file, img_size=input_size, fused_attn=False)
        base, wrapped, outputs = model.base, _ReID(model), ("embedding",)
        sides = {name: count for name, count in wrapped.sides.items() if count}
    elif kind in TRAINED:
        raise InputError(f"{file} is a {kind}: only encoders and {REID} models go to ONNX")
    else:
        base = load_encoder(file, input_size, fused_attn=False)
        wrapped, outputs, sides, config = _Encoder(base), FEATURES, {}, base.settings()
    batch = _pictures(base.img_size, pictures)
    inputs = (batch, *(torch.zeros(len(batch), dtype=torch.int64) for _ in sides))
    names = ("images", *sides)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        started = time.perf_counter()
        _write(wrapped.eval(), inputs, names, outputs, written)
        seconds = time.perf_counter() - started
        session = ort.InferenceSession(str(written), providers=["CPUExecutionProvider"])
        result = _differences(wrapped, session, inputs, names, outputs)
        largest = max(result.values())
        if not largest < TOLERANCE:  # also NaN
            raise InputError(
                f"{file} gives other features under onnxruntime {ort.__version__} (relative difference "
                f"{largest:.2g}, at most {TOLERANCE} is accepted): nothing was written; try other versions "
                "of torch and onnxruntime"
            )
        facts = {
            "kind": kind or "encoder", "source": Path(file).name, "source_sha256": file_sha256(file),
            "config": json.dumps(config), "largest_difference": f"{largest:.3g}",
            "preprocessing": f"RGB uint8 [N, 3, {base.img_size[0]}, {base.img_size[1]}]; the whole picture "
            "resized by an antialiased bicubic filter; normalisation is inside",
        }  # fmt: skip
        graph = onnx.load(str(written), load_external_data=False)
        onnx.helper.set_model_props(graph, facts)
        onnx.save(graph, str(written))
        weights = output.with_name(f"{output.name}.data")
        size = sum(part.stat().st_size for part in Path(folder).iterdir())
        if weights.is_file() and not (Path(folder) / weights.name).exists():
            weights.unlink()  # of an earlier, larger one
        for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights first, then what needs them
            with open(part, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(part, output.with_name(part.name))
    return {
        "inputs": {name: list(value.shape[1:]) for name, value in zip(names, inputs)},
        "outputs": list(outputs),
        "images_compared": len(batch),
        "largest_difference": largest,
        **{f"difference_{name}": value for name, value in result.items()},
        **_timing(wrapped, session, inputs, names),
        "export_seconds": seconds,
        "onnxruntime": ort.__version__,
        "bytes": size,
    }


def _packages() -> tuple:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise InputError(
            f"ONNX needs a package that is not installed ({error.name}): pip install onnx onnxscript onnxruntime"
        ) from error
    return onnx, onnxruntime


def _pictures(size: tuple[int, int], files: Sequence[str | Path]) -> torch.Tensor:
    """[N, 3, H, W] uint8: the reference pictures, four drawn vehicles, and the given files."""
    vehicles = [render(seed=7, pid=i, camid=i, viewid=i, shot=0, size=256) for i in range(4)]
    given = [open_given(file, "--pictures") for file in files]
    return torch.stack([whole_image(image, size) for image in (*reference_images(), *vehicles, *given)])


def _write(model: nn.Module, inputs: tuple, names: tuple, outputs: tuple, file: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    shapes: dict = {"images": {0: batch}}
    if len(inputs) > 1:  # camids and viewids, the *ids of _ReID
        shapes["ids"] = tuple({0: batch} for _ in inputs[1:])
    size = sum(p.numel() * 4 for p in model.parameters())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program, input_names=list(names), output_names=list(outputs), dynamo=True, verbose=False
        )
        exported.save(str(file), external_data=size > ONE_FILE_BYTES)


@torch.inference_mode()
def _differences(model, session, inputs, names, outputs) -> dict[str, float]:
    """{feature: largest |onnx - torch| / |torch|} over the pictures, in batches of one and of all."""
    expected = model(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    worst = dict.fromkeys(outputs, 0.0)
    for rows in (slice(0, 1), slice(None)):
        found = session.run(None, {name: value[rows].numpy() for name, value in zip(names, inputs)})
        for name, ours, theirs in zip(outputs, expected, found):
            a, b = ours[rows].flatten(1).numpy(), theirs.reshape(len(theirs), -1)
            difference = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
            worst[name] = float(np.maximum(worst[name], difference.max()))
    return worst


@torch.inference_mode()
def _timing(model, session, inputs, names) -> dict[str, float]:
    """Images/s of both, in turns, on `TIMED_IMAGES` at a time, the best of `TIMED_ROUNDS`."""
    batch = [value[torch.arange(TIMED_IMAGES) % len(value)] for value in inputs]
    arrays = {name: value.numpy() for name, value in zip(names, batch)}
    best = {"torch_images_per_s": 0.0, "onnxruntime_images_per_s": 0.0}
    for _ in range(TIMED_ROUNDS):
        for name, run in zip(best, (lambda: model(*batch), lambda: session.run(None, arrays))):
            started = time.perf_counter()
            run()
            best[name] = max(best[name], TIMED_IMAGES / (time.perf_counter() - started))
    return best
