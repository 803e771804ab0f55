"""Reconstruction pictures: input, masked, reconstruction, reconstruction over the visible."""

import numpy as np
import torch
from PIL import Image, ImageDraw

from datasets.images import UNREADABLE, open_rgb
from datasets.transforms import mask_noise, whole_image

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
    pred, mask = model.reconstruct(imgs, mask_ratio, noise)
    pixels = model.patchify(model.normalize(imgs))
    if model.norm_pix_loss:
        var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    hidden = mask.unsqueeze(-1)  # [N, L, 1]
    columns = [pixels, pixels * (1 - hidden), pred, pixels * (1 - hidden) + pred * hidden]
    stacked = torch.stack([model.unpatchify(x) for x in columns], dim=1)  # [N, 4, 3, H, W]
    rgb = (stacked * model.pixel_std + model.pixel_mean).clamp(0, 1) * 255
    return rgb.round().byte().permute(0, 1, 3, 4, 2).cpu()


def draw_panel(columns: torch.Tensor, caption: str) -> Image.Image:
    """[N, 4, H, W, 3] uint8 -> one picture with column titles and a caption."""
    N, _, height, width, _ = columns.shape
    scale = max(1, round(160 / width))
    width, height = width * scale, height * scale
    gap, top, bottom = 6, 18, 20
    sheet = Image.new("RGB", (4 * (width + gap) + gap, N * (height + gap) + top + bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(TITLES):
        draw.text((gap + c * (width + gap), 3), title, fill="black")
        for n in range(N):
            tile = Image.fromarray(columns[n, c].numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + c * (width + gap), top + n * (height + gap)))
    draw.text((gap, sheet.height - bottom + 3), caption, fill="black")
    return sheet


def panel_caption(model, mask_ratio: float, title: str) -> str:
    text = f"{title}; {mask_ratio:.0%} masked"
    if model.norm_pix_loss:
        text += "; colours use the true mean and deviation of each patch (norm_pix_loss)"
    return text


def save_panels(model, dataset, run, epoch: int, mask_ratio: float, count: int = 6) -> np.ndarray:
    """Panels of a few images spread over the training list, the same masks each time.

    Returns:
        [H, W, 3] uint8 array; also written to `panels/epoch_<epoch>.png` of the run.
    """
    imgs = torch.stack(_some_readable(dataset, count)).to(run.device)
    noise = np.stack([mask_noise(dataset.seed, 0, i, dataset.num_patches) for i in range(len(imgs))])
    columns = reconstruction_columns(model, imgs, mask_ratio, torch.from_numpy(noise).to(run.device))
    sheet = draw_panel(columns, panel_caption(model, mask_ratio, f"epoch {epoch}"))
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
