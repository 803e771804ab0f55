"""One name for every frozen encoder: what it answers for pictures, in its own size and normalisation.

    FILE                     any encoder that `load_encoder` reads; of a pre-training checkpoint also its context
    open_clip:MODEL@WEIGHTS  the image side of a CLIP, both as --clip_model and --clip_pretrained take them
    random:MODEL             one of our encoders with its initial weights, e.g. random:vit_tiny_patch16
    histogram                16 x 8 x 8 bins of hue, saturation and value, their square roots: no learning at all

Letters: N batch, L patches, D width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from engine_linprobe import load_read_outs
from models_mae import MODELS
from models_teacher import FrozenTeacher, load_clip
from models_vit import VisionTransformer
from util.checkpoint import read_checkpoint
from util.errors import ENCODER_MODELS, InputError
from util.fetch import fetch

BINS = (16, 8, 8)
KINDS = ("open_clip", "random", "histogram")


class Encoder(nn.Module):
    """`encode`: [N, 3, H, W] uint8 -> {read-out: [N, D] float32}; `img_size`: (H, W) or what `whole_image` takes.
    `vit`: the transformer whose patch tokens can be had, or None."""

    def __init__(self, encode, img_size, vit: VisionTransformer | None = None):
        super().__init__()
        self.encode, self.img_size, self.vit = encode, img_size, vit

    def tokens(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] uint8 -> [N, L, D] after the final norm, in the order of the patches."""
        return self.vit.encode(imgs)["tokens"]


@torch.no_grad()
def load_any(name: str, img_size: tuple[int, int] | None, device: torch.device) -> Encoder:
    """An encoder by its name (above), in eval mode. img_size: (H, W) in px of our ViTs, None: its own."""
    kind, _, rest = name.partition(":")
    if name == "histogram":
        return Encoder(lambda imgs: {"histogram": colour_histogram(imgs)}, img_size or (128, 128))
    if kind == "open_clip":
        model, _, weights = rest.partition("@")
        clip, _, identity = load_clip(model, weights or "openai")
        teacher = FrozenTeacher(clip, identity, torch.float32).to(device)
        return Encoder(lambda imgs: {"embedding": teacher(imgs)}, teacher.size)
    if kind == "random":
        if rest not in ENCODER_MODELS:
            raise InputError(f"{name}: give one of {', '.join(f'random:{known}' for known in ENCODER_MODELS)}")
        torch.manual_seed(0)
        vit = MODELS[f"mae_{rest}"](img_size=img_size or (224, 224)).to(device).eval()
        return Encoder(lambda imgs: _two(vit.encode(imgs)), vit.img_size, vit)
    if rest and not Path(name).exists() and kind not in ("http", "https", "hf"):
        raise InputError(f"{name}: neither a file nor one of {', '.join(KINDS)}")
    file = str(fetch(name))
    has_head = any(key.startswith("distill_head.proj") for key in read_checkpoint(file)["model"])
    outs, _ = load_read_outs(file, ["cls", "mean", *["context"] * has_head], img_size, device)
    return Encoder(lambda imgs: {k: v.float() for k, v in outs.encode(imgs).items()}, outs.img_size, outs.encoder)


def _two(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: found[name].float() for name in ("cls", "mean")}


def colour_histogram(imgs: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] uint8 -> [N, 1024] of unit length: the cosine of two is their Bhattacharyya coefficient."""
    x = imgs.float() / 255
    (r, g, b), high, low = x.unbind(1), x.amax(1), x.amin(1)
    spread = (high - low).clamp_min(1e-9)
    hue = torch.where(
        high == r, (g - b) / spread % 6, torch.where(high == g, (b - r) / spread + 2, (r - g) / spread + 4)
    )
    hue = torch.where(high == low, 0, hue / 6)
    parts = (hue, (high - low) / high.clamp_min(1e-9), high)
    place = torch.zeros_like(high, dtype=torch.int64)
    for part, bins in zip(parts, BINS):
        place = place * bins + (part * bins).long().clamp(0, bins - 1)
    counts = torch.zeros(len(imgs), BINS[0] * BINS[1] * BINS[2], device=imgs.device)
    counts.scatter_add_(1, place.flatten(1), torch.ones(len(imgs), place[0].numel(), device=imgs.device))
    return F.normalize(counts.sqrt(), dim=1)
