"""Files of weights: what they are, whether they are whole, in everybody's formats, and released.

    python -m tools.checkpoint inspect FILE
    python -m tools.checkpoint verify FILE
    python -m tools.checkpoint convert FILE --to timm --output encoder_timm.safetensors
    python -m tools.checkpoint download mae_vit_base
    python -m tools.checkpoint list
    python -m tools.checkpoint release RUN_DIR --output released --licence Apache-2.0

FILE may be a name of util/registry.json, https://... or hf://ORG/REPO/FILE, too: it is then downloaded once.
Code inside a file is never run.
"""

import argparse
import json
import re
import zipfile
from pathlib import Path

from util.cli import Parser, parse_input_size, run_tool
from util.errors import FORMATS, InputError

RELEASED = ("encoder.safetensors", "encoder.pth", "full.pth")
# what of a run's settings the card shows; paths of the machine it ran on are not among them
RECIPE = (
    "model img_size mask_ratio norm_pix_loss epochs warmup_epochs effective_batch lr weight_decay crop_min context "
    "sim_weight kl_weight teacher_view seed"
).split()
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


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.checkpoint", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str):
        found = verbs.add_parser(name, help=text, description=text)
        if name not in ("list", "release"):
            found.add_argument("file", help="file, registry name, https:// or hf:// address")
            found.add_argument("--cache", default=None, help="folder of downloads (default ~/.cache/cgd_mae)")
        return found.add_argument

    verb("inspect", "what a file is: kind, sizes, parts, settings, licence, hash; runs nothing in it")
    verb("verify", "whether it can be read, is finite, fits its model, and has the sha256 beside it")
    verb("list", "the names that download knows")
    add = verb("download", "get a released checkpoint once; later calls need no network")
    add("--allow_http", action="store_true", help="also unencrypted addresses (default off)")
    add = verb("convert", "write it in the format of another code base")
    add("--to", required=True, choices=FORMATS, help="format")
    add("--output", required=True, help="file to write; for hf a folder")
    add("--input_size", default=None, help="pixels of the positions: one side, or H,W (default: the file's; setr: 512)")
    add = verb("release", "make a folder for others of a finished pre-training run")
    add("run_dir", help="--output_dir of main_pretrain.py")
    add("--output", required=True, help="folder: new, or an earlier release (its README.md stays)")
    add("--licence", required=True, help="SPDX name of the weights' licence, e.g. Apache-2.0 or CC-BY-NC-4.0")
    add("--name", default=None, help="name in the cards (default: that of the run's folder)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import torch

from finetune.task import load_model
from models_mae import load_autoencoder
from tools.convert import check_written, convert, export_onnx
from util.checkpoint import not_finite, read_checkpoint, read_safetensors_header, write_safetensors, write_torch
from util.fetch import fetch, known
from util.files import file_digests, file_sha256, write_atomic
from util.pretrained import read_config, read_pretrained, recognise


def inspect_file(file: str | Path) -> dict:
    """Everything that can be said of a file of weights, in plain values, empty ones left out."""
    file = fetch(file)
    digests = file_digests(file, ("sha256", "md5"))
    facts: dict = {"file": str(file), "bytes": file.stat().st_size, "sha256": digests["sha256"]}
    for name, row in known().items():
        if any(row.get(kind) and value.startswith(row[kind]) for kind, value in digests.items()):
            facts |= {"registry": f"{name}: {row['what']}", "licence": row["licence"]}
    try:
        content = read_checkpoint(file)
    except InputError as error:
        if "Python objects" not in str(error):
            raise
        names = re.findall(r"GLOBAL (\S+)", str(error.__cause__))  # of old files the first, which torch has named
        if zipfile.is_zipfile(file):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        return facts | {"kind": "refused: it holds Python objects, which could run code", "python_objects": names}
    state = {k: v for k, v in content["model"].items() if isinstance(v, torch.Tensor)}
    header = read_safetensors_header(file) if file.suffix == ".safetensors" else {}
    args, epoch = content.get("args") or {}, content.get("epoch")
    numbers = [(key.split(".")[0], value.numel()) for key, value in state.items()]
    parts = {part: [n for name, n in numbers if name == part] for part in dict.fromkeys(name for name, _ in numbers)}
    facts |= {
        "kind": "checkpoint of a run, " * ("optimizer" in content) + kind_of(file, content),
        "tensors": len(state),
        "parameters": sum(n for _, n in numbers),
        "parts": {part: [len(found), sum(found)] for part, found in parts.items()},  # tensors and parameters
        "dtypes": sorted({str(v.dtype).removeprefix("torch.") for v in state.values()}),
        "not_finite": not_finite(state)[:5],
        "finished_epochs": epoch + 1 if isinstance(epoch, int) else None,
        "args": args if isinstance(args, dict) else vars(args),  # MAE keeps a Namespace
        "config": read_config(file, content),
        **{name: header[name] for name in ("licence", "trained") if name in header},
    }
    return {name: value for name, value in facts.items() if value not in ("", None, {}, [])}


def kind_of(file: Path, content: dict) -> str:
    """What a file is and the sizes of its encoder, in words."""
    try:
        found = recognise(content, file)
    except InputError as error:
        return read_config(file, content).get("kind") or f"not an encoder: {error}"
    width, _, patch, _ = found.state["patch_embed.proj.weight"].shape
    depth, decoder_depth = (sum(k.endswith(".norm1.weight") for k in state) for state in (found.state, found.decoder))
    positions = found.state["pos_embed"].shape[1] - 1
    kind = f"{found.origin}: ViT {width} wide, {depth} blocks, patches of {patch} px, {positions} positions"
    if found.decoder:
        kind += f"; decoder {len(found.decoder['decoder_embed.weight'])} wide, {decoder_depth} blocks"
    return kind


def verify_file(file: str | Path) -> dict:
    """Load a file into its model: readable, finite, every tensor there and of the right shape; and compare its sha256
    where one was published: in SHA256SUMS or FILE.sha256 beside it."""
    file = Path(file)
    found = load_model(file)
    kind = found.config.get("kind") or kind_of(file, read_checkpoint(file))
    result = {"file": str(file), "kind": kind, "parameters": sum(p.numel() for p in found.model.parameters())}
    for record in (file.with_name("SHA256SUMS"), Path(f"{file}.sha256")):
        lines = [line.split() for line in record.read_text().splitlines()] if record.is_file() else []
        for wanted in (line[0] for line in lines if line[1:] == [file.name]):
            if wanted != file_sha256(file):
                raise InputError(f"{file} has another sha256 than {record} says: fetch or copy it again")
            return result | {"sha256": str(record), "verdict": "whole: the bytes that were published"}
    return result | {"verdict": "loads into its model and is finite; no sha256 beside it to compare with"}


def release(run_dir: str | Path, output: str | Path, name: str, licence: str) -> dict:
    """A finished pre-training run -> a folder for others: weights, read back and compared with the run's, a card (a
    README.md that is there already stays), and last the sums, because they vouch for the weights."""
    run_dir, output = Path(run_dir), Path(output)
    content = read_checkpoint(run_dir / "checkpoint-last.pth")
    args = content.get("args", {})
    if "epoch" not in content or "mask_ratio" not in args:
        raise InputError(f"{run_dir} is no run of main_pretrain.py: give its --output_dir")
    if content["epoch"] + 1 < args["epochs"]:
        done = f"{content['epoch'] + 1} of {args['epochs']} epochs"
        raise InputError(f"{run_dir} has finished {done}: let the run end (--resume auto)")
    model = load_autoencoder(run_dir / "checkpoint-last.pth")
    recipe = {key: args[key] for key in RECIPE if args.get(key) not in (None, "")}
    (output / "SHA256SUMS").unlink(missing_ok=True)  # it would vouch for other files
    state = {k: v.detach().float().contiguous() for k, v in content["model"].items()}
    encoder = {key: state[key] for key in read_pretrained(run_dir / "checkpoint-last.pth").state}
    config = content["config"] | model.settings()
    header = {"format": "pt", "config": json.dumps(config), "licence": licence, "trained": json.dumps(recipe)}
    write_safetensors(output / "encoder.safetensors", encoder, header)
    write_torch(output / "encoder.pth", {"model": encoder})
    write_torch(output / "full.pth", {"model": state, "config": config})
    for file in RELEASED:
        check_written(output / file, encoder)
    teacher = "none (plain MAE)"
    if args.get("teacher") and not args.get("no_distill"):
        teacher = f"{Path(args['teacher']).name}, and what it has seen is part of what this model has seen"
    sizes = {"width": model.embed_dim, "depth": len(model.blocks), "patch": model.patch_size}
    data = {key: args.get(key, "?") for key in ("images", "images_sha")}
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.items())
    card = CARD.format(name=name, licence=licence.lower(), teacher=teacher, rows=rows, **sizes, **data)
    if not (output / "README.md").exists():
        write_atomic(output / "README.md", lambda opened: opened.write(card.encode()))
    sums = "".join(f"{file_sha256(output / file)}  {file}\n" for file in RELEASED)
    write_atomic(output / "SHA256SUMS", lambda opened: opened.write(sums.encode()))
    todo = f"fill in README.md, add the licence's text; then publish: hf upload ORG/REPO {output} --private"
    return {"folder": str(output), "files": [*RELEASED, "README.md", "SHA256SUMS"], "to_do": todo}


def main(args) -> dict:
    if args.verb == "list":
        for name, row in known().items():
            print(f"{name:32} {row['what']} ({row['licence']}){'' if row['url'] else ' [no address yet]'}")
        return {"names": list(known())}
    if args.verb == "release":
        return release(args.run_dir, args.output, args.name or Path(args.run_dir).resolve().name, args.licence)
    file = fetch(args.file, args.cache, getattr(args, "allow_http", False))
    if args.verb == "download":
        return {"file": str(file), "bytes": file.stat().st_size}
    if args.verb == "verify":
        return verify_file(file)
    if args.verb == "inspect":
        facts = inspect_file(file)
        for name, value in facts.items():
            print(f"{name:15} {value:,}" if isinstance(value, int) else f"{name:15} {value}")
        return facts
    size = parse_input_size(args.input_size) if args.input_size else None
    if args.to == "onnx":
        return export_onnx(file, args.output, size)
    result = convert(file, args.to, args.output, size)
    print(f"load it there:\n{result['load']}\n{result['remark']}")
    return result


if __name__ == "__main__":
    run_tool(main, ARGS, None)
