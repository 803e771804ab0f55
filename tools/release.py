"""A finished pre-training run -> a folder for others: weights that are verified, their sums, and a card."""

import json
from pathlib import Path

import torch

from models_mae import load_autoencoder
from util.checkpoint import encoder_state, read_checkpoint, write_safetensors, write_torch
from util.errors import InputError
from util.files import file_sha256, write_atomic
from util.pretrained import read_pretrained

WEIGHTS = ("encoder.safetensors", "encoder.pth", "full.pth")
# what of a run's settings the card shows; paths of the machine it ran on are not among them
RECIPE = (
    "model", "img_size", "mask_ratio", "norm_pix_loss", "epochs", "warmup_epochs", "effective_batch", "lr",
    "weight_decay", "crop_min", "context", "sim_weight", "kl_weight", "teacher_view", "seed",
)  # fmt: skip
CARD = """---
license: {licence}
tags: [vehicle, masked-autoencoder, vision-transformer, cgd-mae]
---

# {name}

ViT {width} wide, {depth} blocks, patches of {patch} px, pre-trained without labels. Teacher: {teacher}.

`encoder.safetensors` is for `load_encoder` and all tools here, `encoder.pth` for the loaders of MAE, TransReID, VTB and
others, `full.pth` (with decoder and context head) for `--init` and reconstructions. `sha256sum -c SHA256SUMS` compares
the bytes; `python -m tools.checkpoint convert` writes the formats of others.

| setting | value |
|---|---|
{rows}

Data: {images} images, sha256 of paths and order `{images_sha}`, no labels. Sources, rights, people and licence plates
in the pictures, overlap with benchmarks: **to be filled in by who publishes this**.

Limits: nothing but vehicles was in view, and what the training images show too rarely, it knows too little. It was not
made to identify people or to read licence plates. Licence of the weights: {licence}.
"""


def release(run_dir: str | Path, output: str | Path, *, name: str, licence: str) -> dict:
    """Write the folder, the sums last, because they vouch for the weights; a README.md that is there already stays as
    it is. `licence`: SPDX identifier of the weights' licence."""
    run_dir, output = Path(run_dir), Path(output)
    content = read_checkpoint(run_dir / "checkpoint-last.pth")
    args = content.get("args", {})
    if "epoch" not in content or "mask_ratio" not in args:
        raise InputError(f"{run_dir} is no run of main_pretrain.py: give its --output_dir")
    if content["epoch"] + 1 < args["epochs"]:
        raise InputError(
            f"{run_dir} has finished {content['epoch'] + 1} of {args['epochs']} epochs: let the run end (--resume auto)"
        )
    model = load_autoencoder(run_dir / "checkpoint-last.pth")
    recipe = {key: args[key] for key in RECIPE if args.get(key) not in (None, "")}
    (output / "SHA256SUMS").unlink(missing_ok=True)  # it would vouch for other files
    _write_weights(output, content, model, recipe, licence)
    teacher = "none (plain MAE)"
    if args.get("teacher") and not args.get("no_distill"):
        teacher = f"{Path(args['teacher']).name}, and what it has seen is part of what this model has seen"
    card = CARD.format(
        name=name, licence=licence.lower(), teacher=teacher, width=model.embed_dim, depth=len(model.blocks),
        patch=model.patch_size, rows="\n".join(f"| {key} | {value} |" for key, value in recipe.items()),
        images=args.get("images", "?"), images_sha=args.get("images_sha", "?"),
    )  # fmt: skip
    sums = "".join(f"{file_sha256(output / file)}  {file}\n" for file in WEIGHTS)
    for file, text in (("README.md", card), ("SHA256SUMS", sums)):
        if file != "README.md" or not (output / file).exists():
            write_atomic(output / file, lambda opened, text=text: opened.write(text.encode()))
    todo = f"fill in README.md, add the licence's text; then publish: hf upload ORG/REPO {output} --private"
    return {"folder": str(output), "files": [*WEIGHTS, "README.md", "SHA256SUMS"], "to_do": todo}


def _write_weights(folder: Path, content: dict, model, recipe: dict, licence: str) -> None:
    """All of the files hold the run's own encoder."""
    state = {k: v.detach().float().contiguous() for k, v in content["model"].items()}
    encoder, config = encoder_state(state), content["config"] | model.settings()
    header = {"format": "pt", "config": json.dumps(config), "licence": licence, "trained": json.dumps(recipe)}
    write_torch(folder / "encoder.pth", {"model": encoder})
    write_safetensors(folder / "encoder.safetensors", encoder, header)
    write_torch(folder / "full.pth", {"model": state, "config": config})
    for name in WEIGHTS:
        found = read_pretrained(folder / name).state
        if found.keys() != encoder.keys() or not all(torch.equal(found[key], value) for key, value in encoder.items()):
            raise InputError(f"{folder / name} reads back otherwise: disk or memory failed, try again")
