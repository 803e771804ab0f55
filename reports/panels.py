"""Reconstructions beside their input. Letters as in models_vit.py."""

import contextlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from datasets.images import Unreadable, open_rgb
from datasets.path_list import printable
from datasets.transforms import mask_noise, whole_image
from reports.page import FONT

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
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 11)
    for column, name in enumerate(TITLES):
        draw.text((4 + column * width, 3), name, fill="black", font=font)
    caption = f"{title}; {mask_ratio:.0%} masked"
    caption += "; colours use the true mean and deviation of each patch (norm_pix_loss)" * model.norm_pix_loss
    draw.text((4, sheet.height - 17), printable(caption), fill="black", font=font)
    return sheet, columns


def save_panels(model, dataset, run, epoch: int, mask_ratio: float, count: int = 6) -> np.ndarray:
    """Reconstructions of images spread over the list, a neighbour in place of an unreadable one: [H, W, 3] uint8, also
    written to `panels/epoch_<epoch>.png` of the run."""
    imgs: list[torch.Tensor] = []
    order = np.linspace(0, len(dataset), count, endpoint=False).astype(int).tolist()
    for index in dict.fromkeys([*order, *range(min(len(dataset), 100))]):
        with contextlib.suppress(Unreadable):  # the loop has already counted and listed it
            imgs.append(whole_image(open_rgb(dataset.paths[index]), dataset.input_size))
        if len(imgs) == count:
            break
    sheet, _ = draw_reconstructions(model, torch.stack(imgs).to(run.device), mask_ratio, dataset.seed, f"epoch {epoch}")
    file = run.output_dir / "panels" / f"epoch_{epoch:04d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return np.asarray(sheet)
