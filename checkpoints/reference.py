"""Reference embeddings: a file of weights says what it must answer to three drawn pictures.

Whoever loads the file can then find out whether the weights are whole and whether pictures are resized and
normalised as they were in training. The pictures are computed in integers, so they are the same everywhere.
"""

import base64
import hashlib

import numpy as np
import torch
from PIL import Image

from util.errors import InputError

SIZES = ((180, 240), (256, 256), (150, 100))  # (H, W) in px; none is an encoder's own, so resizing is seen too
READ_OUTS = ("cls", "mean")
# Largest relative difference that passes. Of 15 trained ViT-tiny: explicit instead of fused attention 2e-7,
# Pillow's bicubic filter instead of torch's 1e-4 to 1.6e-3. Of one: no antialiasing 3e-3, bilinear 9e-3,
# other pixel statistics 0.4.
TOLERANCE = 2e-3


def reference_images() -> list[Image.Image]:
    """Three RGB pictures: colour ramps, stripes, blocks; integer arithmetic alone."""
    images = []
    for number, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        ramp = 255 * (x + 2 * y) // (width + 2 * height)
        stripes = np.abs((x * (3 + number) + y * 5) % 128 - 64) * 4
        blocks = ((x // 20 + y // 30) * (37 + 16 * number)) % 256
        pixels = np.stack([ramp, (stripes + ramp) // 2, (blocks + stripes) // 2], axis=2)
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return images


def images_sha256() -> str:
    """Of the pictures' bytes, so that a reference to other pictures is not compared."""
    digest = hashlib.sha256()
    for image in reference_images():
        digest.update(image.tobytes())
    return digest.hexdigest()


def reference_of(encoder) -> dict[str, str | int]:
    """What an encoder answers, as strings and numbers for a header or JSON.

    Args:
        encoder: anything with `embed_images`, in float32 on the CPU, where the answer is most exact.
    Returns:
        {"images": sha256 of the pictures, "width": D, "cls": base64 of [3, D] little-endian float32, "mean"}.
    """
    features = encoder.embed_images(reference_images(), read_outs=READ_OUTS)
    coded = {name: base64.b64encode(features[name].numpy().astype("<f4").tobytes()).decode() for name in READ_OUTS}
    return {"images": images_sha256(), "width": features["cls"].shape[1], **coded}


def decode_reference(reference: dict, file) -> dict[str, torch.Tensor]:
    """{"cls": [3, D] float32, "mean": ...} of `reference_of`.

    Raises:
        InputError: damaged, or of other pictures than this version draws.
    """
    try:
        if reference["images"] != images_sha256():
            raise InputError(
                f"{file} holds a reference to other pictures than this version draws: compare it with the "
                "version that wrote it"
            )
        arrays = {name: np.frombuffer(base64.b64decode(reference[name]), "<f4") for name in READ_OUTS}
        return {
            name: torch.from_numpy(a.reshape(len(SIZES), int(reference["width"])).copy()) for name, a in arrays.items()
        }
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{file} holds a damaged reference ({error}): fetch the file again") from error


def compare(reference: dict, encoder, file) -> dict[str, float]:
    """How far an encoder is from the reference in its file.

    Returns:
        {"cls_difference", "mean_difference"}: largest over the pictures of |a - b| / |b|, Euclidean.
    Raises:
        InputError: see `decode_reference`; another width.
    """
    wanted = decode_reference(reference, file)
    found = encoder.embed_images(reference_images(), read_outs=READ_OUTS)
    if found["cls"].shape != wanted["cls"].shape:
        raise InputError(
            f"{file} holds a reference of width {wanted['cls'].shape[1]} and an encoder of width "
            f"{found['cls'].shape[1]}: the weights or the reference were exchanged"
        )
    return {
        f"{name}_difference": float(((found[name] - wanted[name]).norm(dim=1) / wanted[name].norm(dim=1)).max())
        for name in READ_OUTS
    }
