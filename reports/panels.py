"""Pictures of what a model sees: reconstructions beside their input, and where the class token has looked.

Letters as in models_vit.py; T = 1 + L tokens.
"""

import contextlib
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from timm.models.vision_transformer import Block

from datasets.images import UNREADABLE, open_rgb
from datasets.transforms import mask_noise, whole_image
from models_transreid import TransReID
from models_vit import VisionTransformer

TITLES = ("input", "masked", "reconstruction", "reconstruction + visible")
PADDING = ((0, 0), (0, 0), (3, 3), (3, 3), (0, 0))  # px around each picture [N, 4, H, W, 3]


@torch.no_grad()
def draw_reconstructions(model, imgs: torch.Tensor, mask_ratio: float, seed: int, title: str):
    """Panels of images [N, 3, H, W] uint8 on the model's device -> the picture; its four columns [N, 4, H, W, 3] uint8
    on the CPU. Masks are functions of (seed, row). Where the model predicts per-patch-normalised pixels, the true mean
    and deviation of each patch are put back."""
    noise = np.stack([mask_noise(seed, 0, i, model.num_patches) for i in range(len(imgs))])
    imgs = model.eval().normalize(imgs)
    latent, mask, ids_restore = model.forward_encoder(imgs, mask_ratio, torch.from_numpy(noise).to(imgs.device))
    pred, _ = model.forward_decoder(latent, ids_restore)
    pixels = model.patchify(imgs)
    if model.norm_pix_loss:
        var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    hidden = mask.unsqueeze(-1)  # [N, L, 1]
    columns = [pixels, pixels * (1 - hidden), pred, pixels * (1 - hidden) + pred * hidden]
    stacked = torch.stack([model.unpatchify(x) for x in columns], dim=1)  # [N, 4, 3, H, W]
    rgb = (stacked * model.pixel_std + model.pixel_mean).clamp(0, 1) * 255
    columns = rgb.round().byte().permute(0, 1, 3, 4, 2).cpu()
    scale = max(1, round(160 / columns.shape[3]))
    tiles = np.pad(columns.numpy().repeat(scale, axis=2).repeat(scale, axis=3), PADDING, constant_values=255)
    N, _, height, width, _ = tiles.shape
    grid = tiles.transpose(0, 2, 1, 3, 4).reshape(N * height, 4 * width, 3)
    sheet = Image.fromarray(np.pad(grid, ((20, 20), (0, 0), (0, 0)), constant_values=255))
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(TITLES):
        draw.text((4 + column * width, 3), name, fill="black")
    caption = f"{title}; {mask_ratio:.0%} masked"
    caption += "; colours use the true mean and deviation of each patch (norm_pix_loss)" * model.norm_pix_loss
    draw.text((4, sheet.height - 17), caption, fill="black")
    return sheet, columns


def save_panels(model, dataset, run, epoch: int, mask_ratio: float, count: int = 6) -> np.ndarray:
    """Reconstructions of images spread over the list, a neighbour in place of an unreadable one: [H, W, 3] uint8, also
    written to `panels/epoch_<epoch>.png` of the run."""
    imgs: list[torch.Tensor] = []
    order = np.linspace(0, len(dataset), count, endpoint=False).astype(int).tolist()
    for index in dict.fromkeys([*order, *range(min(len(dataset), 100))]):
        with contextlib.suppress(*UNREADABLE):  # the loop has already counted and listed it
            imgs.append(whole_image(open_rgb(dataset.paths[index]), dataset.input_size))
        if len(imgs) == count:
            break
    sheet, _ = draw_reconstructions(model, torch.stack(imgs).to(run.device), mask_ratio, dataset.seed, f"epoch {epoch}")
    file = run.output_dir / "panels" / f"epoch_{epoch:04d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return np.asarray(sheet)


@torch.no_grad()
def attention_rollout(
    base: VisionTransformer, imgs: torch.Tensor, blocks: Iterable[Block] | None = None, side: torch.Tensor | None = None
) -> torch.Tensor:
    """How much of each patch has reached the class token (Abnar and Zuidema, ACL 2020, arXiv 2005.00928).

    The attention of a block, averaged over its heads, is mixed with the identity, which stands for the residual
    connection: A' = A / 2 + I / 2 (Sec. 3). The roll-out is the product of A' over the blocks, of which the class
    token's row is needed alone: a vector goes backwards through the blocks. side: [N, 1, D], added to all tokens.

    Returns:
        [N, rows, columns] float32 in [0, 1] on the CPU: of each image relative to its largest patch.
    """
    x = base.embed(imgs.to(base.cls_token.device)) + (0 if side is None else side)  # [N, T, D]
    attentions = []
    for block in base.blocks if blocks is None else blocks:
        attentions.append(mean_attention(block, x))
        x = block(x)
    row = torch.eye(1, x.shape[1], device=x.device).expand(len(x), 1, -1)
    for attention in reversed(attentions):
        row = (row + row @ attention) / 2
    patches = row[:, 0, 1:]
    tiny = torch.finfo(patches.dtype).tiny  # a class token that looks at itself alone gives zeros, not NaN
    return (patches / patches.amax(dim=1, keepdim=True).clamp_min(tiny)).view(-1, *base.grid_size).cpu()


def mean_attention(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Attention weights, which a fused kernel does not return: tokens as they enter the block [N, T, D] -> [N, T, T]
    float32, averaged over the heads; rows sum to 1."""
    attn, (N, T, _) = block.attn, x.shape
    qkv = attn.qkv(block.norm1(x)).view(N, T, 3, attn.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # [N, heads, T, head width] each
    weights = (attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)
    return weights.float().softmax(dim=-1).mean(dim=1)


def reid_rollout(model: TransReID, imgs: torch.Tensor, camids: torch.Tensor, viewids: torch.Tensor) -> torch.Tensor:
    """The roll-out of TransReID's global branch, with its side information; with JPM through the branch's own last
    block. camids, viewids: [N] int64 on the CPU."""
    side = None
    if model.sie_embed is not None:
        side = model.config.sie_weight * model.sie_embed[model.side_rows(camids, viewids)]  # [N, 1, D]
    return attention_rollout(model.base, imgs, [*model.base.blocks, *([model.b1[0]] if model.config.jpm else [])], side)


def heat_picture(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """An RGB picture in grey under its heat [rows, columns] float, from the coolest patch (black) to the hottest."""
    level = Image.fromarray(((heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-12)).numpy().astype("f4"))
    colour = 255 * colormaps["inferno"](np.asarray(level.resize(image.size, Image.Resampling.BILINEAR)))[:, :, :3]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[:, :, None]
    return Image.fromarray((0.45 * grey + 0.55 * colour).round().astype(np.uint8))
