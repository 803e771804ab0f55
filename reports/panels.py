"""Pictures of what a model sees: reconstructions beside their input, and where the class token has looked.

Letters as in models_vit.py; T = 1 + L tokens.
"""

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


@torch.no_grad()
def reconstruction_columns(model, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor):
    """The four columns of a panel.

    Args:
        model: a MaskedAutoencoderViT; imgs: [N, 3, H, W] uint8 on its device; noise: [N, L].
    Returns:
        [N, 4, H, W, 3] uint8 on the CPU. Where the model predicts per-patch-normalised pixels, the
        true mean and deviation of each patch are put back.
    """
    model.eval()
    imgs = model.normalize(imgs)
    latent, mask, ids_restore = model.forward_encoder(imgs, mask_ratio, noise)
    pred, _ = model.forward_decoder(latent, ids_restore)
    pixels = model.patchify(imgs)
    if model.norm_pix_loss:
        var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    hidden = mask.unsqueeze(-1)  # [N, L, 1]
    columns = [pixels, pixels * (1 - hidden), pred, pixels * (1 - hidden) + pred * hidden]
    stacked = torch.stack([model.unpatchify(x) for x in columns], dim=1)  # [N, 4, 3, H, W]
    rgb = (stacked * model.pixel_std + model.pixel_mean).clamp(0, 1) * 255
    return rgb.round().byte().permute(0, 1, 3, 4, 2).cpu()


def draw_reconstructions(model, imgs: torch.Tensor, mask_ratio: float, seed: int, title: str):
    """Panels of images, [N, 3, H, W] uint8 on the model's device; masks are functions of (seed, row).

    Returns:
        The picture, four columns with their titles and a caption; the columns, [N, 4, H, W, 3] uint8 on the CPU.
    """
    noise = np.stack([mask_noise(seed, 0, i, model.num_patches) for i in range(len(imgs))])
    columns = reconstruction_columns(model, imgs, mask_ratio, torch.from_numpy(noise).to(imgs.device))
    N, _, height, width, _ = columns.shape
    scale = max(1, round(160 / width))
    width, height = width * scale, height * scale
    gap, top, bottom = 6, 18, 20
    sheet = Image.new("RGB", (4 * (width + gap) + gap, N * (height + gap) + top + bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for c, name in enumerate(TITLES):
        draw.text((gap + c * (width + gap), 3), name, fill="black")
        for n in range(N):
            tile = Image.fromarray(columns[n, c].numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + c * (width + gap), top + n * (height + gap)))
    caption = f"{title}; {mask_ratio:.0%} masked"
    if model.norm_pix_loss:
        caption += "; colours use the true mean and deviation of each patch (norm_pix_loss)"
    draw.text((gap, sheet.height - bottom + 3), caption, fill="black")
    return sheet, columns


def save_panels(model, dataset, run, epoch: int, mask_ratio: float, count: int = 6) -> np.ndarray:
    """Panels of a few images spread over the training list, the same masks each time.

    Returns:
        [H, W, 3] uint8 array; also written to `panels/epoch_<epoch>.png` of the run.
    """
    imgs = torch.stack(_some_readable(dataset, count)).to(run.device)
    sheet, _ = draw_reconstructions(model, imgs, mask_ratio, dataset.seed, f"epoch {epoch}")
    file = run.output_dir / "panels" / f"epoch_{epoch:04d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return np.asarray(sheet)


def _some_readable(dataset, count: int) -> list[torch.Tensor]:
    """`count` pictures spread over the list; a neighbour stands in for an unreadable one."""
    found: list[torch.Tensor] = []
    order = np.linspace(0, len(dataset), count, endpoint=False).astype(int).tolist()
    for index in dict.fromkeys([*order, *range(min(len(dataset), 100))]):
        try:
            found.append(whole_image(open_rgb(dataset.paths[index]), dataset.input_size))
        except UNREADABLE:
            continue  # the loop has already counted and listed it
        if len(found) == count:
            break
    return found


@torch.no_grad()
def attention_rollout(
    base: VisionTransformer, imgs: torch.Tensor, blocks: Iterable[Block] | None = None, side: torch.Tensor | None = None
) -> torch.Tensor:
    """How much of each patch has reached the class token (Abnar and Zuidema, ACL 2020, arXiv 2005.00928).

    The attention of a block, averaged over its heads, is mixed with the identity, which stands for the residual
    connection: A' = A / 2 + I / 2 (Sec. 3). The roll-out is the product of A' over the blocks. Only the class token's
    row of it is needed, so a vector goes backwards through the blocks: T^2 products each instead of T^3.

    Args:
        base: embeds the images, in evaluation mode. imgs: [N, 3, H, W] uint8 or normalised float, on any device.
        blocks: those to run, in order (None: the blocks of `base`).
        side: [N, 1, D] float that is added to all tokens, e.g. side information (None: nothing).
    Returns:
        [N, rows, columns] float32 in [0, 1] on the CPU: of each image relative to its largest patch. Only
        the order and ratios within one image mean something.
    """
    x = base.embed(imgs.to(base.cls_token.device))  # [N, T, D]
    x = x if side is None else x + side
    attentions = []
    for block in base.blocks if blocks is None else blocks:
        attentions.append(mean_attention(block, x))
        x = block(x)
    row = torch.zeros(len(x), 1, x.shape[1], device=x.device)
    row[:, :, 0] = 1
    for attention in reversed(attentions):
        row = (row + row @ attention) / 2
    patches = row[:, 0, 1:]
    tiny = torch.finfo(patches.dtype).tiny  # a class token that looks at itself alone gives zeros, not NaN
    return (patches / patches.amax(dim=1, keepdim=True).clamp_min(tiny)).view(-1, *base.grid_size).cpu()


def mean_attention(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The attention weights of a block, which a fused kernel does not return: [N, T, D] tokens as they enter the
    block -> [N, T, T] float32, averaged over the heads; rows sum to 1."""
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
        rows = model.side_rows(camids, viewids).to(model.sie_embed.device)
        side = model.config.sie_weight * model.sie_embed[rows]  # [N, 1, D]
    last = [model.b1[0]] if model.config.jpm else []
    return attention_rollout(model.base, imgs, [*model.base.blocks, *last], side)


def heat_picture(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """A grey picture under its heat, from its coolest patch (black) to its hottest (light yellow).

    Args:
        image: RGB; heat: [rows, columns] float, stretched over the whole picture.
    """
    low, high = heat.min(), heat.max()
    level = Image.fromarray(((heat - low) / (high - low).clamp_min(1e-12)).numpy().astype(np.float32))
    colour = 255 * colormaps["inferno"](np.asarray(level.resize(image.size, Image.Resampling.BILINEAR)))[:, :, :3]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[:, :, None]
    return Image.fromarray((0.45 * grey + 0.55 * colour).round().astype(np.uint8))
