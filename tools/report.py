"""One page about a pre-training run: curves, reconstructions, kNN before and after.

    python -m tools.report RUN_DIR --data_path labels.csv --label_column body colour

"Before" is the same architecture with its initial weights. Writes RUN_DIR/report.html (self-contained)
and RUN_DIR/report.png.
"""

import argparse
import base64
import html
import io
import json
from pathlib import Path

import matplotlib
import torch
from PIL import Image

from datasets.labelled import list_labelled
from engine_extract import extract_features
from metrics.probe import knn_predict, topk_accuracy
from models_mae import MODELS
from models_vit import VisionTransformer, load_encoder
from util.cli import Parser, run_tool
from util.errors import InputError
from util.files import write_atomic
from util.progress import Progress

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.report", __doc__)
    add = parser.add_argument
    # fmt: off
    add("run_dir", help="output folder of main_pretrain.py")
    add("--data_path", required=True, help="labelled images: folder with train/ and val/, or a table")
    add("--label_column", nargs="+", default=["label"], help="label columns of a table (default label)")
    add("--read_out", default="mean", choices=("mean", "cls"), help="feature (default mean)")
    # fmt: on
    return parser


def initial_encoder(config: dict) -> VisionTransformer:
    """The encoder as it was before the first update."""
    torch.manual_seed(config["seed"])
    model = MODELS[config["model"]](img_size=tuple(config["img_size"]), fused_attn=False)
    return model.eval()


def knn_accuracy(model, tables: dict, read_out: str, title: str) -> dict[str, float]:
    paths = next(iter(tables.values())).paths
    progress = Progress(title, len(paths))
    loading = {"batch_size": 128, "num_workers": 2}
    features, problems = extract_features(model, paths, (read_out,), progress=progress.update, **loading)
    progress.close()
    if problems:
        raise InputError(f"{len(problems)} images could not be read, first {paths[min(problems)]}: remove them")
    x = torch.from_numpy(features[read_out])
    scores = {}
    for column, table in tables.items():
        y = torch.from_numpy(table.labels)
        train, val = (torch.from_numpy(table.splits[name]) for name in ("train", "val"))
        votes = knn_predict(x[train], y[train], x[val], len(table.classes))
        scores[column] = topk_accuracy(votes, y[val], 1)
    return scores


def draw(log: list[dict], before: dict, after: dict, chance: dict, panel: Image.Image | None) -> bytes:
    """Curves, bars and panels as one PNG."""
    has_teacher = "train_cos" in log[0]
    epochs = [row["epoch"] + 1 for row in log]
    figure, axes = plt.subplots(1, 2 + has_teacher, figsize=(4.6 * (2 + has_teacher), 3.4))
    axes[0].plot(epochs, [row["train_loss_pixel"] for row in log], marker="o", label="pixel loss")
    baseline = [row["train_pixel_baseline"] for row in log]
    axes[0].plot(epochs, baseline, "--", color="grey", label="every patch = its mean")
    axes[0].set(title="masked pixels", xlabel="epoch")
    axes[0].legend()
    if has_teacher:
        axes[1].plot(epochs, [row["train_cos"] for row in log], marker="o", label="student to teacher")
        constant = [row["train_cos_baseline"] for row in log]
        axes[1].plot(epochs, constant, "--", color="grey", label="always the mean answer")
        axes[1].set(title="cosine to the teacher", xlabel="epoch")
        axes[1].legend()
    names = list(after)
    for offset, (label, values, colour) in enumerate(
        (("chance", chance, "lightgrey"), ("before", before, "tab:grey"), ("after", after, "tab:blue"))
    ):
        at = [i + 0.27 * (offset - 1) for i in range(len(names))]
        bars = axes[-1].bar(at, [100 * values[n] for n in names], 0.25, label=label, color=colour)
        axes[-1].bar_label(bars, fmt="%.0f")
    axes[-1].set_xticks(range(len(names)), names)
    axes[-1].set(title="kNN top-1 on unseen identities, %", ylim=(0, 105))
    axes[-1].legend()
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, dpi=110)
    plt.close(figure)
    curves = Image.open(data).convert("RGB")
    if panel is None:
        return data.getvalue()
    width = max(curves.width, panel.width)
    sheet = Image.new("RGB", (width, curves.height + panel.height + 10), "white")
    sheet.paste(curves, ((width - curves.width) // 2, 0))
    sheet.paste(panel, ((width - panel.width) // 2, curves.height + 10))
    joined = io.BytesIO()
    sheet.save(joined, format="PNG")
    return joined.getvalue()


def page(title: str, png: bytes, facts: dict, metrics: dict) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(f'{v:.4g}' if isinstance(v, float) else str(v))}</td></tr>"
        for k, v in (metrics | facts).items()
    )
    picture = base64.b64encode(png).decode()
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}}
img{{max-width:100%}}td{{padding:.1em 1em;border-bottom:1px solid #ddd}}</style>
<h1>{html.escape(title)}</h1>
<p>Dashed lines are trivial answers: a patch predicted by its own mean, and one embedding for all images.
A model has learned something where it is better than they are.</p>
<img src="data:image/png;base64,{picture}" alt="curves, kNN and reconstructions">
<h2>Numbers and settings</h2><table>{rows}</table></html>"""


def main(args) -> dict:
    run_dir = Path(args.run_dir)
    encoder, log_file = run_dir / "encoder.safetensors", run_dir / "log.txt"
    for file in (encoder, log_file, run_dir / "args.json"):
        if not file.is_file():
            raise InputError(f"{file} does not exist: give the output folder of a finished main_pretrain.py")
    log = [json.loads(line) for line in log_file.read_text().splitlines()]
    facts = json.loads((run_dir / "args.json").read_text())
    tables = {column: list_labelled(args.data_path, column) for column in args.label_column}
    before = knn_accuracy(initial_encoder(facts), tables, args.read_out, "before")
    after = knn_accuracy(load_encoder(encoder, fused_attn=False), tables, args.read_out, "after")
    chance = {}
    for column, table in tables.items():
        val = torch.from_numpy(table.labels[table.splits["val"]])
        majority = torch.from_numpy(table.labels[table.splits["train"]]).bincount().argmax()
        chance[column] = (val == majority).float().mean().item()
    panels = sorted((run_dir / "panels").glob("epoch_*.png"))
    panel = Image.open(panels[-1]).convert("RGB") if panels else None
    png = draw(log, before, after, chance, panel)
    metrics = {}
    for column in tables:
        metrics[f"knn_{column}_majority"] = chance[column]
        metrics[f"knn_{column}_before"] = before[column]
        metrics[f"knn_{column}_after"] = after[column]
    text = page(f"CGD-MAE: {facts['model']} after {len(log)} epochs", png, facts, metrics)
    write_atomic(run_dir / "report.png", lambda opened: opened.write(png))
    write_atomic(run_dir / "report.html", lambda opened: opened.write(text.encode()))
    return metrics | {"report": str(run_dir / "report.html")}


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.run_dir) / "report_metrics.json")
