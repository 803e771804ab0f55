"""Of a pre-training run: reconstructions beside their input, the page of its curves and kNN, numbers of a probe of its
features as a table of text. Letters as in models_vit.py."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from datasets.images import Unreadable, open_rgb
from datasets.path_list import printable
from datasets.transforms import mask_noise, whole_image
from reports.page import FONT, Page, facts_table, image, new_axes

TITLES = ("input", "masked", "reconstruction", "reconstruction + visible")
SHOWN, TRIVIAL = ("balanced", "mA", "mAP", "top1", "R1"), ("majority", "random")  # metrics, protocols in the table
COLUMNS_SHOWN, ATTRIBUTES = 6, "attributes"
CURVES = {  # title: (what is learned, what it is called, its trivial answer, what that is)
    "Masked pixels": ("train_loss_pixel", "pixel loss", "train_pixel_baseline", "every patch = its mean"),
    "Cosine to the teacher": ("train_cos", "student to teacher", "train_cos_baseline", "always the mean answer"),
}
Scores = dict[tuple[str, str, str, str], float]  # (protocol, read-out, label column or test, metric): shares of [0, 1]


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
    scale, border = max(1, round(160 / columns.shape[3])), ((0, 0), (0, 0), (3, 3), (3, 3), (0, 0))
    tiles = np.pad(columns.numpy().repeat(scale, axis=2).repeat(scale, axis=3), border, constant_values=255)
    N, _, height, width, _ = tiles.shape
    grid = tiles.transpose(0, 2, 1, 3, 4).reshape(N * height, 4 * width, 3)
    sheet = Image.fromarray(np.pad(grid, ((20, 20), (0, 0), (0, 0)), constant_values=255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 11)
    for column, name in enumerate(TITLES):
        draw.text((4 + column * width, 3), name, fill="black", font=font)
    caption = printable(f"{title}; {mask_ratio:.0%} masked")
    caption += "; colours use the true mean and deviation of each patch (norm_pix_loss)" * model.norm_pix_loss
    draw.text((4, sheet.height - 17), caption, fill="black", font=font)
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


def write_run_report(file: Path, log: list[dict], settings: dict, knn: dict[str, dict[str, float]]) -> None:
    """Write the page of a finished run; log: a row an epoch; settings: of args.json; knn: top-1 accuracy of
    "majority", "before" and "after", each by label column."""
    page = Page(f"CGD-MAE: {settings['model']} after {len(log)} epochs")
    page.section("Curves", "Dashed: a trivial answer. A model has learned something where it is better than that.")
    for title, (learned, name, trivial, trivial_name) in CURVES.items():
        if all(learned in row and trivial in row for row in log):
            axes, epochs = new_axes("epoch", ""), range(1, len(log) + 1)
            axes.plot(epochs, [row[learned] for row in log], marker="o", label=name)
            axes.plot(epochs, [row[trivial] for row in log], "--", color="grey", label=trivial_name)
            page.figure(title, axes)
    axes, places = new_axes("", "%"), np.arange(len(knn["after"]))
    for offset, name in enumerate(("majority", "before", "after"), -1):
        bars = axes.bar(places + 0.27 * offset, [100 * x for x in knn[name].values()], 0.25, label=name)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(places, list(map(printable, knn["after"])))
    page.figure("kNN top-1 on unseen identities", axes)
    if panels := sorted((file.parent / "panels").glob("epoch_*.png")):
        page.section("Reconstructions")
        panel = Image.open(panels[-1]).convert("RGB")
        page.add(image(panel, "input, masked, reconstruction", max(panel.size)))
    page.section("Numbers and settings")
    numbers = {f"kNN {column} {name}": value for name, values in knn.items() for column, value in values.items()}
    page.add(facts_table(numbers | settings))
    page.write(file)


def mean_attribute_accuracy(scores: Scores) -> Scores:
    """mA, the mean of the balanced accuracy over all 0/1 columns, where there are two and more; for any
    constant answer it is 0.5."""
    groups: dict[tuple[str, str], list[float]] = {}
    for (*group, _, metric), value in scores.items():
        if metric == "balanced":
            groups.setdefault(tuple(group), []).append(value)
    groups = {group: values for group, values in groups.items() if len(values) > 1}
    means = {(*group, ATTRIBUTES, "mA"): float(np.mean(values)) for group, values in groups.items()}
    return means | {(*group, ATTRIBUTES, "columns"): float(len(values)) for group, values in groups.items()}


def score_table(scores: Scores) -> str:
    """A table in percent for each of the first label columns and for the mean over the attributes, a line for each
    read-out, trivial answers beside them."""
    columns, parts = list(dict.fromkeys(key[2] for key in scores)), []
    shown = [name for i, name in enumerate(columns) if i < COLUMNS_SHOWN or name == ATTRIBUTES]
    for column in shown:
        cells: dict[str, dict[str, str]] = {}  # {head: {read-out: text}}
        for (protocol, read_out, of, metric), value in scores.items():
            if of == column and (metric in SHOWN or protocol in TRIVIAL and not metric):
                spread = scores.get((protocol, read_out, of, f"{metric}_std"))
                text = f"{100 * value:.1f}" + (f" +- {100 * spread:.1f}" if spread is not None else "")
                cells.setdefault(f"{protocol} {metric}".strip(), {})[read_out] = text
        names = dict.fromkeys(name for found in cells.values() for name in found)
        names = sorted(names, key=lambda name: name.partition("_block")[0] if "_block" in name else "")
        lines = [[f"{column or 'test'}, %", *cells]]
        lines += [[name, *(found.get(name, "") for found in cells.values())] for name in names]
        widths = [max(map(len, texts)) for texts in zip(*lines)]
        rows = ("  ".join(text.ljust(width) for text, width in zip(line, widths)) for line in lines)
        parts.append("\n".join(row.rstrip() for row in rows))
    left_out = len(columns) - len(shown)
    return "\n\n".join([*parts, *[f"{left_out} further columns are in metrics.json"] * (left_out > 0)])
