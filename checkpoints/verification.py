"""Does a file of weights still give the features it gave when it was written?"""

import json
from pathlib import Path

import torch

from checkpoints.reference import TOLERANCE, compare, reference_images
from datasets.transforms import whole_image
from finetune.attr_model import load_vtb
from finetune.fgvc_model import load_fgvc
from finetune.reid_model import load_reid
from finetune.seg import load_setr
from models_vit import encoder_from
from util.checkpoint import read_checkpoint, read_safetensors_header
from util.checksums import kind_of_sums
from util.errors import InputError
from util.pretrained import read_config, recognise

# kind in a file's config -> (its loader, what it answers to [N, 3, H, W] uint8)
TRAINED = {
    "CGD-MAE TransReID": (load_reid, lambda model, imgs: model.encode(imgs, *_no_sides(model, imgs))),
    "CGD-MAE VTB": (load_vtb, lambda model, imgs: model(imgs)),
    "CGD-MAE TransFG": (load_fgvc, lambda model, imgs: model(imgs)[0]),
    "CGD-MAE SETR": (load_setr, lambda model, imgs: model.predict(imgs)),
}


def verify_file(file: str | Path) -> dict:
    """Load a file, run it on the drawn reference pictures, and compare with the answers stored in it.

    Returns:
        kind, checksums (what was compared), cls_difference and mean_difference (relative), tolerance, where
        a reference is inside, and the verdict in words.
    Raises:
        InputError: damaged, not all tensors, numbers that are not finite, other answers than stored.
    """
    content = read_checkpoint(file)
    config = read_config(file, content)
    result: dict = {"file": str(file), "checksums": kind_of_sums(file)}
    broken = [k for k, v in content["model"].items() if _broken(v)]
    if broken:
        raise InputError(
            f"{file} holds numbers that are not finite in {len(broken)} tensors, first {broken[0]}: the "
            "training diverged or the file is damaged"
        )
    kind = config.get("kind", "")
    if kind in TRAINED:
        load, answer = TRAINED[kind]
        model = load(file)[0]
        encoder = model.base
        with torch.inference_mode():
            imgs = torch.stack([whole_image(image, encoder.img_size) for image in reference_images()])
            answers = answer(model, imgs)
    else:
        encoder = encoder_from(recognise(content, file), file)
        answers = encoder.embed_images(reference_images(), read_outs=("cls",))["cls"]
    if not torch.isfinite(answers).all():
        raise InputError(f"{file} answers the reference pictures with numbers that are not finite: it is damaged")
    result |= {"kind": kind or "encoder of others", "parameters": sum(p.numel() for p in encoder.parameters())}
    reference = _reference(file)
    if reference is None:
        return result | {"verdict": "loads and runs; no reference inside to compare with"}
    result |= compare(reference, encoder, file) | {"tolerance": TOLERANCE}
    wrong = [k for k in ("cls_difference", "mean_difference") if not result[k] <= TOLERANCE]  # also NaN
    if wrong:
        raise InputError(
            f"{file} answers its reference pictures differently from when it was written (relative "
            f"{wrong[0]} {result[wrong[0]]:.2g}, at most {TOLERANCE} passes): its weights, its pixel "
            "statistics or the way pictures are resized have changed"
        )
    rest = "; its decoder has no reference" if "decoder_embed.weight" in content["model"] else ""
    return result | {"verdict": f"the same features as when it was written{rest}"}


def _no_sides(model, imgs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Camera and view 0 where the model has learned side information."""
    zeros = torch.zeros(len(imgs), dtype=torch.int64)
    return (zeros if model.config.cameras else None), (zeros if model.config.views else None)


def _broken(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value.float()).all()


def _reference(file: str | Path) -> dict | None:
    if Path(file).suffix != ".safetensors":
        return None
    text = read_safetensors_header(file).get("reference")
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise InputError(f"{file} holds a damaged reference ({error}): fetch the file again") from error
