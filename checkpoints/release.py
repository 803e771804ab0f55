"""A run -> a folder for others: weights, what they are, how to check them, what they were made of."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoints.inspection import inspect_file, table
from checkpoints.reference import reference_of
from checkpoints.verification import verify_file
from datasets.demo_render import render
from datasets.images import UNREADABLE, open_rgb, why_unreadable
from datasets.transforms import mask_noise, whole_image
from models_mae import load_autoencoder
from models_vit import VisionTransformer
from util.checkpoint import (
    encoder_state,
    file_sha256,
    read_checkpoint,
    write_atomic,
    write_json,
    write_safetensors,
    write_torch,
)
from util.errors import InputError
from util.panels import draw_panel, panel_caption, reconstruction_columns

RUN_FILES = ("checkpoint-last.pth", "args.json")
LICENCE_FILES = {"Apache-2.0": Path(__file__).resolve().parent.parent / "LICENSE"}
# what of a run's settings the cards show; paths of the machine it ran on are not among them
RECIPE = (
    "model", "img_size", "mask_ratio", "norm_pix_loss", "epochs", "warmup_epochs", "effective_batch", "lr",
    "weight_decay", "crop_min", "context", "sim_weight", "kl_weight", "teacher_view", "seed",
)  # fmt: skip
LAST_LOG = (
    "train_loss",
    "train_loss_pixel",
    "train_pixel_baseline",
    "train_cos",
    "train_cos_baseline",
    "train_loss_sim",
)


def release(
    run_dir: str | Path,
    output: str | Path,
    *,
    name: str,
    licence: str,
    data_card: str | Path | None = None,
    pictures: tuple[str, ...] = (),
) -> dict:
    """Write the folder; every file is checked as a user would check it before this returns.

    Args:
        run_dir: a finished run of main_pretrain.py.
        name: what the model is called in the cards.
        licence: SPDX identifier of the weights' licence.
        data_card: text on the training images to use instead of the one made from the run's settings.
        pictures: files to reconstruct for the sample; default four drawn vehicles, so that no photo is
        published.
    Returns:
        {"folder", "files", "bytes", "verdict"}.
    Raises:
        InputError: not a finished run of pre-training, a folder that has other files, unreadable pictures.
    """
    run_dir, output = Path(run_dir), Path(output)
    content, args = _read_run(run_dir)
    if output.exists() and any(output.iterdir()) and not (output / "SHA256SUMS").is_file():
        raise InputError(f"--output {output} exists and is no release: give an empty or a new folder")
    text = _data_text(data_card, args)
    model = load_autoencoder(run_dir / "checkpoint-last.pth")
    images = _sample(pictures, model.img_size)
    output.mkdir(parents=True, exist_ok=True)
    for old in output.iterdir():  # of an earlier release
        old.unlink()
    env = _json(run_dir / "env.json")
    log = [json.loads(line) for line in (run_dir / "log.txt").read_text().splitlines()]
    config = content["config"] | model.settings()
    state = {k: v.detach().float().contiguous() for k, v in content["model"].items()}
    encoder = encoder_state(state)
    plain = VisionTransformer(**model.settings(), initialize=False)
    plain.load_state_dict(encoder)
    header = {
        "format": "pt", "config": json.dumps(config), "licence": licence,
        "trained": json.dumps(_recipe(args)),
        "data": f"{args.get('images', '?')} images, list {str(args.get('images_sha', ''))[:16]}",
        "reference": json.dumps(reference_of(plain.eval())),
    }  # fmt: skip
    write_torch(output / "encoder.pth", {"model": encoder})
    write_safetensors(output / "encoder.safetensors", encoder, header)
    write_torch(output / "full.pth", {"model": state, "config": config})
    write_safetensors(output / "full.safetensors", state, header)
    write_json(
        output / "config.json", {"name": name, "licence": licence, "config": config, "recipe": _recipe(args)}
    )
    noise = torch.from_numpy(np.stack([mask_noise(0, 0, i, model.num_patches) for i in range(len(images))]))
    ratio = config.get("mask_ratio", 0.75)
    sheet = draw_panel(
        reconstruction_columns(model, torch.stack(images), ratio, noise), panel_caption(model, ratio, name)
    )
    write_atomic(output / "reconstruction.png", lambda opened: sheet.save(opened, format="PNG"))
    if licence in LICENCE_FILES:
        shutil.copyfile(LICENCE_FILES[licence], output / "LICENSE")
    _write_text(output / "DATA_CARD.md", text)
    facts = inspect_file(output / "full.pth")
    _write_text(output / "README.md", _model_card(name, licence, facts, args, env, log, bool(pictures)))
    sums = "".join(
        f"{file_sha256(f)}  {f.name}\n" for f in sorted(output.iterdir()) if f.name != "SHA256SUMS"
    )
    _write_text(output / "SHA256SUMS", sums)
    verdict = verify_file(output / "encoder.safetensors")
    verify_file(output / "full.safetensors")
    print(table(inspect_file(output / "encoder.safetensors")))
    files = sorted(output.iterdir())
    return {
        "folder": str(output),
        "files": [f.name for f in files],
        "bytes": sum(f.stat().st_size for f in files),
        "verdict": verdict["verdict"],
        "sha256_encoder": file_sha256(output / "encoder.safetensors"),
    }


def push(folder: str | Path, address: str) -> str:
    """Upload a released folder to hf://ORG/REPO (a new private repository where there is none): its URL.

    Raises:
        InputError: another address, no login, no network.
    """
    parts = address.removeprefix("hf://").strip("/").split("/")
    if not address.startswith("hf://") or len(parts) != 2:
        raise InputError(f"--push {address}: give hf://ORG/REPO")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repo = "/".join(parts)
    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Release"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--push {address} failed ({reason}): log in with `hf auth login`, check the name and the "
            "network; "
            f"{folder} is complete and can be uploaded later"
        ) from error


def _read_run(run_dir: Path) -> tuple[dict, dict]:
    missing = [name for name in (*RUN_FILES, "log.txt", "encoder.pth") if not (run_dir / name).is_file()]
    if missing:
        raise InputError(
            f"{run_dir} is no finished run of main_pretrain.py: {missing[0]} is missing; give its "
            "--output_dir, and "
            "let the run end"
        )
    content, args = read_checkpoint(run_dir / "checkpoint-last.pth"), _json(run_dir / "args.json")
    if "decoder_embed.weight" not in content["model"]:
        raise InputError(f"{run_dir} is a run of main_finetune.py: a release is made of pre-training runs")
    if content["epoch"] + 1 < args.get("epochs", 0):
        raise InputError(
            f"{run_dir} has finished {content['epoch'] + 1} of {args['epochs']} epochs: let the run end "
            "(--resume auto)"
        )
    return content, args


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _recipe(args: dict) -> dict:
    return {name: args[name] for name in RECIPE if args.get(name) not in (None, "")}


def _sample(pictures: tuple[str, ...], size: tuple[int, int]) -> list[torch.Tensor]:
    images: list[Image.Image] = [render(seed=7, pid=i, camid=i, viewid=i, shot=0, size=256) for i in range(4)]
    if pictures:
        images = []
        for file in pictures:
            try:
                images.append(open_rgb(file))
            except UNREADABLE as error:
                raise InputError(f"--pictures {file} cannot be read: {why_unreadable(error)}") from error
    return [whole_image(image, size) for image in images]


def _write_text(file: Path, text: str) -> None:
    write_atomic(file, lambda opened: opened.write(text.encode()))


def _data_text(data_card: str | Path | None, args: dict) -> str:
    if data_card is not None:
        try:
            return Path(data_card).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--data_card {data_card} cannot be read: {error}") from error
    data = Path(str(args.get("data_path", "unknown"))).name
    return f"""# Data card

- Images: {args.get("images", "unknown"):,}, in `{data}` where this was trained
- Identity of the list: sha256 of paths and order `{args.get("images_sha", "unknown")}`
- Labels: none were used
- Teacher: {args.get("teacher") or "none (plain MAE)"}; what it has seen is part of what this model has seen
- Sources, rights, people and licence plates in the pictures: **to be filled in by who publishes this**
- Overlap with benchmarks: **to be filled in**; `main_curate.py --exclude` removes test images
"""


def _model_card(name, licence, facts, args, env, log, photos: bool) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in _recipe(args).items())
    last = log[-1] if log else {}
    losses = "\n".join(
        f"| {key.removeprefix('train_')} | {last[key]:.4f} |" for key in LAST_LOG if key in last
    )
    parts = "\n".join(
        f"| `{part}` | {count} | {numbers:,} |" for part, (count, numbers) in facts["parts"].items()
    )
    method = (
        "Pre-trained with CGD-MAE" if args.get("teacher") else "Pre-trained as a plain MAE, without teacher"
    )
    shown = "Pictures" if photos else "Drawn vehicles"
    return f"""---
license: {licence.lower()}
tags: [vehicle, masked-autoencoder, vision-transformer, cgd-mae]
---

# {name}

{facts["architecture"]}. {method}, no labels.

| file | what | for |
|---|---|---|
| `encoder.safetensors` | encoder, its config, reference embeddings | `load_encoder`, all tools here |
| `encoder.pth` | `{{"model": encoder}}`, MAE's names | MAE, TransReID, VTB and others' loaders |
| `full.pth`, `full.safetensors` | with decoder and context head | `--init`, reconstructions |

```python
from models_vit import load_encoder

encoder = load_encoder("encoder.safetensors")
features = encoder.embed_images(["car.jpg"])["cls"]
```

`python -m tools.checkpoint verify encoder.safetensors` compares the features of this installation with those
of the machine that wrote the file; `sha256sum -c SHA256SUMS` compares the bytes. `convert` writes the formats
of timm, Hugging Face, TransReID, TransFG, SETR and ONNX.

![reconstruction](reconstruction.png)

{shown}: input, masked, reconstruction, reconstruction over the visible patches.

## How it was trained

| setting | value |
|---|---|
{rows}

| last epoch | |
|---|---|
{losses}

Code at commit `{env.get("commit", "unknown")}`, torch {env.get("torch", "?")}, timm {env.get("timm", "?")}.
Data: [DATA_CARD.md](DATA_CARD.md).

## Parts

| part | tensors | parameters |
|---|---|---|
{parts}

## Limits

Features of vehicles; nothing else was in view. What the training images show too rarely, it knows too little.
It was not made to identify people or to read licence plates. Licence of the weights: {licence}.
"""
