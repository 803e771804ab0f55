"""Attention roll-out (Abnar and Zuidema, ACL 2020, arXiv 2005.00928): what the class token has looked at.

Letters as in models_vit.py; T = 1 + L tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import Block
from torch import nn

from models_transreid import TransReID
from models_vit import VisionTransformer

Rollout = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]

HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to light, also in grey


@torch.no_grad()
def attention_rollout(
    base: VisionTransformer, imgs: torch.Tensor, blocks: Iterable[Block] | None = None, side: torch.Tensor | None = None
) -> torch.Tensor:
    """How much of each patch has reached the class token through all blocks.

    The attention of a block, averaged over its heads, is mixed with the identity, which stands for the
    residual connection: A' = A / 2 + I / 2 (Sec. 3); its rows sum to 1 as those of A do. The roll-out is the
    product of A' over the blocks. Only the class token's row of it is needed, so a vector goes backwards
    through the blocks: T^2 products each instead of T^3.

    Args:
        base: embeds the images; neither its weights nor its mode change.
        imgs: [N, 3, H, W] uint8 or normalised float, on any device.
        blocks: those to run, in order (None: the blocks of `base`).
        side: [N, 1, D] float that is added to all tokens, e.g. side information (None: nothing).
    Returns:
        [N, rows, columns] float32 in [0, 1] on the CPU: of each image relative to its largest patch. Only
        the order and ratios within one image mean something.
    Raises:
        ValueError: no blocks.
    """
    blocks = list(base.blocks if blocks is None else blocks)
    if not blocks:
        raise ValueError("a roll-out needs at least one block")
    with _evaluating(base, *blocks):
        x = base.embed(imgs.to(base.cls_token.device))  # [N, T, D]
        if side is not None:
            x = x + side
        attentions = []
        for block in blocks:
            attentions.append(mean_attention(block, x))
            x = block(x)
    row = torch.zeros(len(x), 1, x.shape[1], device=x.device)
    row[:, :, 0] = 1
    for attention in reversed(attentions):
        row = (row + row @ attention) / 2
    patches = row[:, 0, 1:]
    tiny = torch.finfo(patches.dtype).tiny  # a class token that looks at itself alone gives zeros, not NaN
    patches = patches / patches.amax(dim=1, keepdim=True).clamp_min(tiny)
    return patches.view(-1, *base.grid_size).cpu()  # [N, rows, columns]


def mean_attention(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The attention weights of a block, which a fused kernel does not return.

    Args:
        x: [N, T, D] float tokens as they enter the block.
    Returns:
        [N, T, T] float32, averaged over the heads; rows sum to 1.
    """
    attn = block.attn
    N, T, _ = x.shape
    qkv = attn.qkv(block.norm1(x)).view(N, T, 3, attn.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # [N, heads, T, head width] each
    weights = (attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)
    return weights.float().softmax(dim=-1).mean(dim=1)


def reid_rollout(model: TransReID) -> Rollout:
    """The roll-out of TransReID's global branch, with its side information; with JPM through the branch's
    own last block.

    Returns:
        (imgs [N, 3, H, W] uint8, camids, viewids: [N] int64 on the CPU or None) -> [N, rows, columns] float32
        in [0, 1] on the CPU, see `attention_rollout`; InputError where the model needs cameras or views that
        are missing or new to it.
    """

    def rollout(
        imgs: torch.Tensor, camids: torch.Tensor | None = None, viewids: torch.Tensor | None = None
    ) -> torch.Tensor:
        side = None
        if model.sie_embed is not None:
            rows = model.side_rows(camids, viewids).to(model.sie_embed.device)
            side = model.config.sie_weight * model.sie_embed[rows]  # [N, 1, D]
        last = [model.b1[0]] if model.config.jpm else []
        return attention_rollout(model.base, imgs, [*model.base.blocks, *last], side)

    return rollout


def heat_picture(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """A grey picture under its heat, from its coolest patch (black) to its hottest (light yellow).

    Args:
        image: RGB; heat: [rows, columns] float, stretched over the whole picture.
    """
    low, high = float(heat.min()), float(heat.max())
    level = Image.fromarray(((heat - low) / max(high - low, 1e-12)).numpy().astype(np.float32))
    level = np.asarray(level.resize(image.size, Image.Resampling.BILINEAR))
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(level, stops, channel) for channel in zip(*HEAT)], axis=-1)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[:, :, None]
    return Image.fromarray((0.45 * grey + 0.55 * colour).round().astype(np.uint8))


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each part's own mode again: parts of a model may be frozen in theirs."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
