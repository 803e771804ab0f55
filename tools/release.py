"""A finished pre-training run -> a folder for others: weights, what they are, how to check them, what made them."""

import json
from pathlib import Path

import torch

from datasets.transforms import whole_image
from demo.draw import render
from models_mae import load_autoencoder
from models_vit import load_encoder
from reports.panels import draw_reconstructions
from util.checkpoint import encoder_state, read_checkpoint, write_safetensors, write_torch
from util.errors import InputError
from util.files import file_sha256, write_atomic, write_json

WEIGHTS = ("encoder.safetensors", "encoder.pth", "full.safetensors", "full.pth")
FILES = (*WEIGHTS, "README.md", "DATA_CARD.md", "LICENSE", "config.json", "reconstruction.png", "SHA256SUMS")
KEPT = (".git", ".gitattributes", ".cache")  # of a clone that an earlier release was uploaded from
APACHE = Path(__file__).resolve().parent.parent / "LICENSE"
# what of a run's settings the cards show; paths of the machine it ran on are not among them
RECIPE = (
    "model", "img_size", "mask_ratio", "norm_pix_loss", "epochs", "warmup_epochs", "effective_batch", "lr",
    "weight_decay", "crop_min", "context", "sim_weight", "kl_weight", "teacher_view", "seed",
)  # fmt: skip


def release(run_dir: str | Path, output: str | Path, *, name: str, licence: str) -> dict:
    """Write the folder; the sums come last, because they vouch for the weights. A DATA_CARD.md and a LICENSE that are
    there already stay as they are.

    Args:
        run_dir: a finished run of main_pretrain.py.
        output: a new folder or an earlier release.
        name: what the model is called in the cards.
        licence: SPDX identifier of the weights' licence.
    """
    run_dir, output = Path(run_dir), Path(output)
    content = read_checkpoint(run_dir / "checkpoint-last.pth")
    args = content.get("args", {})
    if "epoch" not in content or "task" in args or "mask_ratio" not in args:
        raise InputError(f"{run_dir} is no run of main_pretrain.py: give its --output_dir")
    if content["epoch"] + 1 < args["epochs"]:
        raise InputError(
            f"{run_dir} has finished {content['epoch'] + 1} of {args['epochs']} epochs: let the run end (--resume auto)"
        )
    others = sorted({p.name for p in output.iterdir()} - {*FILES, *KEPT}) if output.is_dir() else []
    if others:
        raise InputError(f"--output {output} holds {others[0]}, which is no file of a release: give a new folder")
    model = load_autoencoder(run_dir / "checkpoint-last.pth")
    recipe = {key: args[key] for key in RECIPE if args.get(key) not in (None, "")}
    (output / "SHA256SUMS").unlink(missing_ok=True)  # it would vouch for other files
    _write_weights(output, content, model, recipe, licence)
    write_json(
        output / "config.json", {"name": name, "licence": licence, "config": content["config"], "recipe": recipe}
    )
    _write_sample(output / "reconstruction.png", model, args["mask_ratio"], name)
    if licence == "Apache-2.0" and not (output / "LICENSE").exists():
        _write_text(output / "LICENSE", APACHE.read_text())
    if not (output / "DATA_CARD.md").exists():
        _write_text(output / "DATA_CARD.md", _data_card(args))
    log = run_dir / "log.txt"
    last = json.loads(log.read_text().splitlines()[-1]) if log.is_file() else {}
    _write_text(output / "README.md", _model_card(name, licence, content, model, recipe, last))
    sums = {file: file_sha256(output / file) for file in WEIGHTS}
    _write_text(output / "SHA256SUMS", "".join(f"{digest}  {file}\n" for file, digest in sums.items()))
    todo = "fill in DATA_CARD.md" + ", add the licence's text as LICENSE" * (not (output / "LICENSE").exists())
    return {
        "folder": str(output),
        "files": sorted(file for file in FILES if (output / file).is_file()),
        "sha256_encoder": sums["encoder.safetensors"],
        "to_do": f"{todo}; then publish: hf upload ORG/REPO {output} --private",
    }


def _write_weights(folder: Path, content: dict, model, recipe: dict, licence: str) -> None:
    """The four files of weights; all of them give the features of the run's own encoder."""
    state = {k: v.detach().float().contiguous() for k, v in content["model"].items()}
    encoder, config = encoder_state(state), content["config"] | model.settings()
    header = {"format": "pt", "config": json.dumps(config), "licence": licence, "trained": json.dumps(recipe)}
    header["data"] = f"{content['args'].get('images', '?')} images"
    write_torch(folder / "encoder.pth", {"model": encoder})
    write_safetensors(folder / "encoder.safetensors", encoder, header)
    write_torch(folder / "full.pth", {"model": state, "config": config})
    write_safetensors(folder / "full.safetensors", state, header)
    imgs = torch.randn(1, 3, *model.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model.forward_features(imgs)
        for name in WEIGHTS:
            found = load_encoder(folder / name, model.img_size).forward_features(imgs)
            if not torch.allclose(found, wanted, atol=1e-5):
                raise InputError(f"{folder / name} gives other features than the run: disk or memory failed, try again")


def _write_sample(file: Path, model, ratio: float, name: str) -> None:
    """Reconstructions of four drawn vehicles: no photo is published."""
    drawn = [render(seed=7, pid=i, camid=i, viewid=i, shot=0, size=256) for i in range(4)]
    images = torch.stack([whole_image(image, model.img_size) for image in drawn])
    sheet, _ = draw_reconstructions(model, images, ratio, 0, name)
    write_atomic(file, lambda opened: sheet.save(opened, format="PNG"))


def _write_text(file: Path, text: str) -> None:
    write_atomic(file, lambda opened: opened.write(text.encode()))


def _teacher(args: dict) -> str:
    if args.get("no_distill") or not args.get("teacher"):
        return "none (plain MAE)"
    return f"{Path(args['teacher']).name}; what it has seen is part of what this model has seen"


def _data_card(args: dict) -> str:
    return f"""# Data card

- Images: {args.get("images", "unknown")} in `{Path(args.get("data_path", "unknown")).name}` where this was trained
- Identity of the list: sha256 of paths and order `{args.get("images_sha", "unknown")}`
- Labels: none were used
- Teacher: {_teacher(args)}
- Sources, rights, people and licence plates in the pictures: **to be filled in by who publishes this**
- Overlap with benchmarks: **to be filled in**; `main_curate.py --exclude` removes test images
"""


def _model_card(name: str, licence: str, content: dict, model, recipe: dict, last: dict) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.items())
    rows += "".join(
        f"\n| {key.removeprefix('train_')} of the last epoch | {last[key]:.4f} |" for key in last if "loss" in key
    )
    sizes = f"{model.embed_dim} wide, {len(model.blocks)} blocks, patches of {model.patch_size} px"
    return f"""---
license: {licence.lower()}
tags: [vehicle, masked-autoencoder, vision-transformer, cgd-mae]
---

# {name}

ViT {sizes}. Pre-trained without labels. Teacher: {_teacher(content["args"])}.

- `encoder.safetensors`: encoder and its config, for `load_encoder` and all tools here
- `encoder.pth`: `{{"model": encoder}}`, MAE's names, for MAE, TransReID, VTB and others' loaders
- `full.pth`, `full.safetensors`: with decoder and context head, for `--init` and reconstructions

```python
from models_vit import load_encoder

encoder = load_encoder("encoder.safetensors")
features = encoder.embed_images(["car.jpg"])["cls"]
```

`sha256sum -c SHA256SUMS` compares the bytes; `python -m tools.checkpoint convert` writes the formats of timm, Hugging
Face, TransReID, TransFG, SETR and ONNX.

![reconstruction](reconstruction.png)

Drawn vehicles: input, masked, reconstruction, reconstruction over the visible patches.

## How it was trained

| setting | value |
|---|---|
{rows}

Data: [DATA_CARD.md](DATA_CARD.md).

## Limits

Features of vehicles; nothing else was in view. What the training images show too rarely, it knows too little.
It was not made to identify people or to read licence plates. Licence of the weights: {licence}.
"""
