"""A run -> a folder for others: weights, what they are, how to check them, what they were made of."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from checkpoints.inspection import inspect_file, table
from checkpoints.reference import TOLERANCE, compare, reference_of
from checkpoints.verification import verify_file
from datasets.images import open_given
from datasets.transforms import mask_noise, whole_image
from demo.render import render
from models_mae import load_autoencoder
from models_vit import VisionTransformer, load_encoder
from reports.panels import draw_panel, panel_caption, reconstruction_columns
from util.checkpoint import encoder_state, read_checkpoint, read_safetensors_header, write_safetensors, write_torch
from util.errors import InputError
from util.files import file_sha256, write_atomic, write_json

RUN_FILES = ("args.json", "log.txt", "checkpoint-last.pth", "encoder.pth")
FILES = (  # of a release; the sums last, because they vouch for the others
    "README.md", "DATA_CARD.md", "LICENSE", "config.json", "encoder.pth", "encoder.safetensors", "full.pth",
    "full.safetensors", "reconstruction.png", "SHA256SUMS",
)  # fmt: skip
KEPT = (".git", ".gitattributes", ".cache")  # of a clone that an earlier release was uploaded from
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
    licence_file: str | Path | None = None,
    data_card: str | Path | None = None,
    pictures: tuple[str, ...] = (),
) -> dict:
    """Write the folder. It is made beside `output`, checked as a user would check it, and then moved there.

    Args:
        run_dir: a finished run of main_pretrain.py.
        name: what the model is called in the cards.
        licence: SPDX identifier of the weights' licence.
        licence_file: its text (default: that of Apache-2.0 where this is the licence, else none).
        data_card: text on the training images to use instead of the one made from the run's settings.
        pictures: files to reconstruct for the sample; default four drawn vehicles: no photo is published.
    Returns:
        {"folder", "files", "bytes", "verdict", "licence_text", "sha256_encoder"}.
    Raises:
        InputError: no finished run of pre-training, a folder with other files, an unreadable input.
    """
    run_dir, output = Path(run_dir), Path(output)
    content, args, log = _read_run(run_dir)
    _check_output(output)
    data_text = _given_text(data_card, "--data_card") if data_card else _data_card(args)
    licence_file = licence_file or LICENCE_FILES.get(licence)
    licence_text = _given_text(licence_file, "--licence_file") if licence_file else ""
    model = load_autoencoder(run_dir / "checkpoint-last.pth")
    images = _sample(pictures, model.img_size)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
            folder = Path(temporary)
            _write_weights(folder, content, model, args, licence)
            config = {"name": name, "licence": licence, "config": content["config"] | model.settings()}
            write_json(folder / "config.json", config | {"recipe": _recipe(args)})
            _write_sample(folder, model, images, content["config"].get("mask_ratio", 0.75), name)
            if licence_text:
                _write_text(folder / "LICENSE", licence_text)
            _write_text(folder / "DATA_CARD.md", data_text)
            facts, env = inspect_file(folder / "full.pth"), _env(run_dir)
            card = _model_card(name, licence, facts, args, env, log[-1] if log else {}, bool(pictures))
            _write_text(folder / "README.md", card)
            verdict = _verify(folder)
            sums = "".join(f"{file_sha256(f)}  {f.name}\n" for f in sorted(folder.iterdir()))
            _write_text(folder / "SHA256SUMS", sums)
            output.mkdir(exist_ok=True)
            for file in FILES:
                if (folder / file).is_file():
                    os.replace(folder / file, output / file)
                else:
                    (output / file).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the release {output}: {error.strerror or error}") from error
    print(table(inspect_file(output / "encoder.safetensors")))
    files = [output / file for file in FILES if (output / file).is_file()]
    return {
        "folder": str(output),
        "files": sorted(f.name for f in files),
        "bytes": sum(f.stat().st_size for f in files),
        "verdict": verdict,
        "licence_text": "LICENSE" if licence_text else f"none: add the text of {licence} with --licence_file",
        "sha256_encoder": file_sha256(output / "encoder.safetensors"),
    }


def _check_output(output: Path) -> None:
    if output.is_file():
        raise InputError(f"--output {output} is a file: give a new or an empty folder")
    others = sorted(p.name for p in output.iterdir() if p.name not in FILES + KEPT) if output.is_dir() else []
    if others:
        raise InputError(
            f"--output {output} holds {others[0]}, which is no file of a release: give a new or empty folder"
        )


def _write_weights(folder: Path, content: dict, model, args: dict, licence: str) -> None:
    state = {k: v.detach().float().contiguous() for k, v in content["model"].items()}
    encoder, config = encoder_state(state), content["config"] | model.settings()
    plain = VisionTransformer(**model.settings(), initialize=False)
    plain.load_state_dict(encoder)
    header = {
        "format": "pt", "config": json.dumps(config), "licence": licence,
        "trained": json.dumps(_recipe(args)),
        "data": f"{args.get('images', '?')} images, list {str(args.get('images_sha', ''))[:16]}",
        "reference": json.dumps(reference_of(plain.eval())),
    }  # fmt: skip
    write_torch(folder / "encoder.pth", {"model": encoder})
    write_safetensors(folder / "encoder.safetensors", encoder, header)
    write_torch(folder / "full.pth", {"model": state, "config": config})
    write_safetensors(folder / "full.safetensors", state, header)


def _verify(folder: Path) -> str:
    """All four files of weights give the features of the reference; the verdict on encoder.safetensors."""
    verdict = verify_file(folder / "encoder.safetensors")["verdict"]
    verify_file(folder / "full.safetensors")
    reference = json.loads(read_safetensors_header(folder / "encoder.safetensors")["reference"])
    for name in ("encoder.pth", "full.pth"):
        difference = max(compare(reference, load_encoder(folder / name), name).values())
        if not difference <= TOLERANCE:
            raise InputError(f"{name} differs from encoder.safetensors by {difference:.2g}: nothing is released")
    return verdict


def _write_sample(folder: Path, model, images: list[torch.Tensor], ratio: float, name: str) -> None:
    noise = torch.from_numpy(np.stack([mask_noise(0, 0, i, model.num_patches) for i in range(len(images))]))
    columns = reconstruction_columns(model, torch.stack(images), ratio, noise)
    sheet = draw_panel(columns, panel_caption(model, ratio, name))
    write_atomic(folder / "reconstruction.png", lambda opened: sheet.save(opened, format="PNG"))


def repository(address: str) -> str:
    """hf://ORG/REPO -> ORG/REPO; InputError for anything else."""
    parts = address.removeprefix("hf://").strip("/").split("/")
    if not address.startswith("hf://") or len(parts) != 2 or not all(parts):
        raise InputError(f"--push {address}: give hf://ORG/REPO")
    return "/".join(parts)


def push(folder: str | Path, address: str) -> str:
    """Upload a released folder to hf://ORG/REPO (a new private repository where there is none): its URL.

    Raises:
        InputError: another address, no login, no network.
    """
    repo = repository(address)
    from huggingface_hub import HfApi, errors

    broken = (errors.HfHubHTTPError, errors.HTTPError, OSError, ValueError)
    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Release"))
    except broken as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--push {address} failed ({reason}): log in with `hf auth login`, check the name and the "
            f"network; {folder} is complete and can be uploaded later"
        ) from error


def _read_run(run_dir: Path) -> tuple[dict, dict, list[dict]]:
    """(its last checkpoint, its settings, its log)."""
    missing = [name for name in RUN_FILES[:-1] if not (run_dir / name).is_file()]
    if missing:
        raise InputError(f"{run_dir} is no run of main_pretrain.py ({missing[0]} is missing): give its --output_dir")
    try:
        args = json.loads((run_dir / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir / 'args.json'} is damaged ({error}): restore it from {run_dir}") from error
    if "task" in args:
        raise InputError(f"{run_dir} is a run of main_finetune.py: a release is made of pre-training runs")
    content = read_checkpoint(run_dir / "checkpoint-last.pth")
    if not isinstance(args.get("epochs"), int) or "config" not in content or "epoch" not in content:
        raise InputError(f"{run_dir} is no run of this project's main_pretrain.py: give its --output_dir")
    if content["epoch"] + 1 < args["epochs"] or not (run_dir / "encoder.pth").is_file():
        raise InputError(
            f"{run_dir} has finished {content['epoch'] + 1} of {args['epochs']} epochs: let the run end (--resume auto)"
        )
    log = []
    for line in (run_dir / "log.txt").read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a full disk has cut
            log.append(json.loads(line))
    return content, args, log


def _env(run_dir: Path) -> dict:
    """Versions of a run; empty where it has none, which the card then says."""
    try:
        return json.loads((run_dir / "env.json").read_text())
    except (OSError, ValueError):
        return {}


def _recipe(args: dict) -> dict:
    return {name: args[name] for name in RECIPE if args.get(name) not in (None, "")}


def _sample(pictures: tuple[str, ...], size: tuple[int, int]) -> list[torch.Tensor]:
    images = [open_given(file, "--pictures") for file in pictures]
    images = images or [render(seed=7, pid=i, camid=i, viewid=i, shot=0, size=256) for i in range(4)]
    return [whole_image(image, size) for image in images]


def _write_text(file: Path, text: str) -> None:
    write_atomic(file, lambda opened: opened.write(text.encode()))


def _given_text(file: str | Path, flag: str) -> str:
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {file} cannot be read: {error}") from error


def _data_card(args: dict) -> str:
    data, count = Path(str(args.get("data_path", "unknown"))).name, args.get("images", "unknown")
    return f"""# Data card

- Images: {count} in `{data}` where this was trained
- Identity of the list: sha256 of paths and order `{args.get("images_sha", "unknown")}`
- Labels: none were used
- Teacher: {_teacher(args)}
- Sources, rights, people and licence plates in the pictures: **to be filled in by who publishes this**
- Overlap with benchmarks: **to be filled in**; `main_curate.py --exclude` removes test images
"""


def _is_plain(args: dict) -> bool:
    return bool(args.get("no_distill")) or str(args.get("teacher") or "none").startswith("none")


def _teacher(args: dict) -> str:
    if _is_plain(args):
        return "none (plain MAE)"
    return f"{Path(str(args.get('teacher'))).name}; what it has seen is part of what this model has seen"


def _model_card(name, licence, facts, args, env, last: dict, photos: bool) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in _recipe(args).items())
    losses = "\n".join(f"| {key.removeprefix('train_')} | {last[key]:.4f} |" for key in LAST_LOG if key in last)
    parts = "\n".join(f"| `{part}` | {count} | {numbers:,} |" for part, (count, numbers) in facts["parts"].items())
    plain = "Pre-trained as a plain MAE, without teacher"
    method = plain if _is_plain(args) else "Pre-trained with CGD-MAE"
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
