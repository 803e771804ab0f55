"""A finished pre-training run -> a folder for others: weights that are verified, their sums, and two cards."""

import json
from pathlib import Path

import torch

from models_mae import load_autoencoder
from models_vit import load_encoder
from util.checkpoint import encoder_state, read_checkpoint, write_safetensors, write_torch
from util.errors import InputError
from util.files import file_sha256, write_atomic

WEIGHTS = ("encoder.safetensors", "encoder.pth", "full.safetensors", "full.pth")
FILES = (*WEIGHTS, "README.md", "DATA_CARD.md", "LICENSE", "SHA256SUMS")
KEPT = (".git", ".gitattributes", ".cache")  # of a clone that an earlier release was uploaded from
APACHE = Path(__file__).resolve().parent.parent / "LICENSE"
# what of a run's settings the cards show; paths of the machine it ran on are not among them
RECIPE = (
    "model", "img_size", "mask_ratio", "norm_pix_loss", "epochs", "warmup_epochs", "effective_batch", "lr",
    "weight_decay", "crop_min", "context", "sim_weight", "kl_weight", "teacher_view", "seed",
)  # fmt: skip


def release(run_dir: str | Path, output: str | Path, *, name: str, licence: str) -> dict:
    """Write the folder, the sums last, because they vouch for the weights; a DATA_CARD.md and a LICENSE that are
    there already stay as they are. `licence`: SPDX identifier of the weights' licence."""
    run_dir, output = Path(run_dir), Path(output)
    content = read_checkpoint(run_dir / "checkpoint-last.pth")
    args = content.get("args", {})
    if "epoch" not in content or "mask_ratio" not in args:
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
    teacher = "none (plain MAE)"
    if args.get("teacher") and not args.get("no_distill"):
        teacher = f"{Path(args['teacher']).name}; what it has seen is part of what this model has seen"
    sums = "".join(f"{file_sha256(output / file)}  {file}\n" for file in WEIGHTS)
    texts = {"LICENSE": APACHE.read_text()} if licence == "Apache-2.0" else {}
    texts |= {"DATA_CARD.md": _data_card(args, teacher)}
    texts = {file: text for file, text in texts.items() if not (output / file).exists()}
    texts |= {"README.md": _model_card(name, licence, teacher, model, recipe), "SHA256SUMS": sums}
    for file, text in texts.items():
        write_atomic(output / file, lambda opened, text=text: opened.write(text.encode()))
    todo = "fill in DATA_CARD.md" + ", add the licence's text as LICENSE" * (not (output / "LICENSE").exists())
    return {
        "folder": str(output),
        "files": sorted(file for file in FILES if (output / file).is_file()),
        "sha256_encoder": sums[:64],
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


def _data_card(args: dict, teacher: str) -> str:
    return f"""# Data card

- Images: {args.get("images", "unknown")} in `{Path(args.get("data_path", "unknown")).name}` where this was trained
- Identity of the list: sha256 of paths and order `{args.get("images_sha", "unknown")}`
- Labels: none were used
- Teacher: {teacher}
- Sources, rights, people and licence plates in the pictures: **to be filled in by who publishes this**
- Overlap with benchmarks: **to be filled in**; `main_curate.py --exclude` removes test images
"""


def _model_card(name: str, licence: str, teacher: str, model, recipe: dict) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.items())
    return f"""---
license: {licence.lower()}
tags: [vehicle, masked-autoencoder, vision-transformer, cgd-mae]
---

# {name}

ViT {model.embed_dim} wide, {len(model.blocks)} blocks, patches of {model.patch_size} px, pre-trained without labels.
Teacher: {teacher}.

`encoder.safetensors` is for `load_encoder` and all tools here, `encoder.pth` for the loaders of MAE, TransReID, VTB and
others, `full.*` (with decoder and context head) for `--init` and reconstructions. `sha256sum -c SHA256SUMS` compares
the bytes; `python -m tools.checkpoint convert` writes the formats of others.

```python
from models_vit import load_encoder

features = load_encoder("encoder.safetensors").embed_images(["car.jpg"])["cls"]
```

| setting | value |
|---|---|
{rows}

Data: [DATA_CARD.md](DATA_CARD.md). Limits: nothing but vehicles was in view, and what the training images show too
rarely, it knows too little. It was not made to identify people or to read licence plates. Licence: {licence}.
"""
