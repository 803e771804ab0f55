"""Files of weights: what they are, whether they are whole, and in everybody's formats.

    python -m tools.checkpoint inspect FILE
    python -m tools.checkpoint verify FILE
    python -m tools.checkpoint convert FILE --to timm --output encoder_timm.safetensors
    python -m tools.checkpoint download mae_vit_base
    python -m tools.checkpoint list
    python -m tools.checkpoint release RUN_DIR --output released --licence Apache-2.0

FILE may be a name of util/registry.json, https://... or hf://ORG/REPO/FILE, too: it is then
downloaded once.
Code inside a file is never run.
"""

import argparse
import re
import zipfile
from pathlib import Path

from util.cli import Parser, parse_input_size, run_tool
from util.errors import InputError
from util.names import FORMATS


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.checkpoint", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, text: str, what: str = "file", what_help: str = "file, registry name, https:// or hf:// address"
    ):
        found = verbs.add_parser(name, help=text, description=text)
        if what:
            found.add_argument(what, help=what_help)
            found.add_argument("--cache", default=None, help="folder of downloads (default ~/.cache/cgd_mae)")
        return found.add_argument

    # fmt: off
    verb("inspect", "what a file is: kind, sizes, parts, settings, licence, hash; runs nothing in it")
    verb("verify", "whether it can be read, is finite, fits its model, and has the sha256 beside it")
    add = verb("download", "get a released checkpoint once; later calls need no network")
    add("--allow_http", action="store_true", help="also unencrypted addresses (default off)")
    verb("list", "the names that download knows", what="")
    add = verb("convert", "write it in the format of another code base")
    add("--to", required=True, choices=FORMATS, help="format")
    add("--output", required=True, help="file to write; for hf a folder")
    add("--input_size", default=None,
        help="pixels that the position table is made for: one side, or H,W (default: the file's; setr: 512)")
    add = verb("release", "make a folder for others of a finished pre-training run", "run_dir",
               "--output_dir of main_pretrain.py")
    add("--output", required=True, help="folder: new, or an earlier release (its README.md stays)")
    add("--licence", required=True, help="SPDX name of the weights' licence, e.g. Apache-2.0 or CC-BY-NC-4.0")
    add("--name", default=None, help="name in the cards (default: that of the run's folder)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import torch

from finetune.task import load_model
from tools.convert import convert
from tools.export_onnx import export_onnx
from tools.release import release
from util.checkpoint import not_finite, read_checkpoint, read_safetensors_header
from util.fetch import fetch, known
from util.files import file_digests
from util.pretrained import read_config, recognise


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
    args = content.get("args") or {}
    parts: dict[str, list[int]] = {}  # tensors and parameters
    for key, value in state.items():
        count = parts.setdefault(key.split(".")[0], [0, 0])
        count[:] = count[0] + 1, count[1] + value.numel()
    facts |= {
        "kind": "checkpoint of a run, " * ("optimizer" in content) + kind_of(file, content),
        "tensors": len(state),
        "parameters": sum(v.numel() for v in state.values()),
        "parts": parts,
        "dtypes": sorted({str(v.dtype).removeprefix("torch.") for v in state.values()}),
        "not_finite": not_finite(state)[:5],
        "finished_epochs": content["epoch"] + 1 if isinstance(content.get("epoch"), int) else None,
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
    blocks = len({k.split(".")[1] for k in found.state if k.startswith("blocks.")})
    positions = found.state["pos_embed"].shape[1] - 1
    kind = f"{found.origin}: ViT {width} wide, {blocks} blocks, patches of {patch} px, {positions} positions"
    if found.decoder:
        depth = len({k.split(".")[1] for k in found.decoder if k.startswith("decoder_blocks.")})
        kind += f"; decoder {len(found.decoder['decoder_embed.weight'])} wide, {depth} blocks"
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
            if wanted != file_digests(file, ("sha256",))["sha256"]:
                raise InputError(f"{file} has another sha256 than {record} says: fetch or copy it again")
            return result | {"sha256": str(record), "verdict": "whole: the bytes that were published"}
    return result | {"verdict": "loads into its model and is finite; no sha256 beside it to compare with"}


def main(args) -> dict:
    if args.verb == "list":
        for name, row in known().items():
            print(f"{name:32} {row['what']} ({row['licence']}){'' if row['url'] else ' [no address yet]'}")
        return {"names": list(known())}
    if args.verb == "release":
        name = args.name or Path(args.run_dir).resolve().name
        return release(args.run_dir, args.output, name=name, licence=args.licence)
    file = fetch(args.file, args.cache, getattr(args, "allow_http", False))
    if args.verb == "download":
        return {"file": str(file), "bytes": file.stat().st_size}
    if args.verb == "inspect":
        facts = inspect_file(file)
        for name, value in facts.items():
            print(f"{name:15} {value:,}" if isinstance(value, int) else f"{name:15} {value}")
        return facts
    if args.verb == "verify":
        return verify_file(file)
    size = parse_input_size(args.input_size) if args.input_size else None
    if args.to == "onnx":
        return export_onnx(file, args.output, size)
    result = convert(file, args.to, args.output, size)
    print(f"load it there:\n{result['load']}\n{result['remark']}")
    return result


if __name__ == "__main__":
    run_tool(main, ARGS, None)
