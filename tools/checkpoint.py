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

    def verb(name: str, text: str, what: str = "file", what_help: str = "") -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=text, description=text)
        if what:
            found.add_argument(what, help=what_help or "file, registry name, https:// or hf:// address")
        found.add_argument("--cache", default=None, help="folder of downloads (default ~/.cache/cgd_mae)")
        found.add_argument("--metrics", default=None, help="write the printed JSON here, too (default: nowhere)")
        return found

    # fmt: off
    verb("inspect", "what a file is: kind, sizes, parts, settings, licence, hash; runs nothing in it")
    verb("verify", "whether it can be read, is finite, fits its model, and has the sha256 beside it")
    verb("download", "get a released checkpoint once; later calls need no network")
    verb("list", "the names that download knows", what="")
    add = verb("convert", "write it in the format of another code base").add_argument
    add("--to", required=True, choices=FORMATS, help="format")
    add("--output", required=True, help="file to write; for hf a folder")
    add("--input_size", default=None,
        help="pixels that the position table is made for: one side, or H,W (default: the file's; setr: 512)")
    add = verb("release", "make a folder for others of a finished pre-training run", "run_dir",
               "--output_dir of main_pretrain.py").add_argument
    add("--output", required=True, help="folder: new, or an earlier release (its DATA_CARD.md and LICENSE stay)")
    add("--licence", required=True, help="SPDX name of the weights' licence, e.g. Apache-2.0 or CC-BY-NC-4.0")
    add("--name", default=None, help="name in the cards (default: that of the run's folder)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import torch

from finetune.encoder import load_model
from tools.convert import convert
from tools.export_onnx import export_onnx, onnx_facts
from tools.release import release
from util.checkpoint import read_checkpoint, read_safetensors_header
from util.fetch import fetch, known
from util.files import file_digests, file_sha256
from util.pretrained import read_config, recognise


def inspect_file(file: str | Path) -> dict:
    """Everything that can be said of a file of weights.

    Returns:
        Plain values, empty ones left out: bytes, sha256, registry (the row with this hash), python_objects (names that
        would be imported), kind, tensors, parameters, parts {part: [tensors, parameters]}, dtypes, not_finite,
        finished_epochs, args, config, licence, data, trained.
    """
    file = fetch(file)
    digests = file_digests(file, ("sha256", "md5"))
    facts: dict = {"file": str(file), "bytes": file.stat().st_size, "sha256": digests["sha256"]}
    for name, row in known().items():
        if any(row.get(kind) and value.startswith(row[kind]) for kind, value in digests.items()):
            facts |= {"registry": f"{name}: {row['what']}", "licence": row["licence"]}
    if file.suffix == ".onnx":
        return facts | onnx_facts(file)
    try:
        content = read_checkpoint(file)
    except InputError as error:
        if "Python objects" not in str(error):
            raise
        kind = "refused: it holds Python objects, which could run code"
        return facts | {"kind": kind, "python_objects": _python_objects(file, error.__cause__)}
    state = {k: v for k, v in content["model"].items() if isinstance(v, torch.Tensor)}
    header = read_safetensors_header(file) if file.suffix == ".safetensors" else {}
    config, args = read_config(file, content), content.get("args") or {}
    facts |= {
        "kind": _kind(file, content, config),
        "tensors": len(state),
        "parameters": sum(v.numel() for v in state.values()),
        "parts": by_part(state),
        "dtypes": sorted({str(v.dtype).removeprefix("torch.") for v in state.values()}),
        "not_finite": _not_finite(state)[:5],
        "args": args if isinstance(args, dict) else vars(args),  # MAE keeps a Namespace
        "config": config,
        **{name: header[name] for name in ("licence", "data", "trained") if name in header},
    }
    if isinstance(content.get("epoch"), int):
        facts["finished_epochs"] = content["epoch"] + 1
    return {name: value for name, value in facts.items() if value not in ("", None, {}, [])}


def _python_objects(file: Path, error: Exception) -> list[str]:
    """Names that a file would import; of a format before torch 1.6 the first one, which torch has named."""
    if not zipfile.is_zipfile(file):
        return re.findall(r"GLOBAL (\S+)", str(error))
    with torch.serialization.safe_globals([argparse.Namespace]):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))


def by_part(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """{first word of the names: [tensors, parameters]}."""
    parts: dict[str, list[int]] = {}
    for key, value in state.items():
        count = parts.setdefault(key.split(".")[0], [0, 0])
        count[0] += 1
        count[1] += value.numel()
    return parts


def _not_finite(state: dict[str, torch.Tensor]) -> list[str]:
    return [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v.float()).all()]


def _kind(file: Path, content: dict, config: dict) -> str:
    """What a file is and the sizes of its encoder, in words."""
    kind = "checkpoint of a run, " * ("optimizer" in content)
    try:
        found = recognise(content, file)
    except InputError as error:
        return kind + (config.get("kind") or f"not an encoder: {error}")
    width, _, patch, _ = found.state["patch_embed.proj.weight"].shape
    blocks = len({k.split(".")[1] for k in found.state if k.startswith("blocks.")})
    kind += f"{found.origin}: ViT {width} wide, {blocks} blocks, patches of {patch} px, "
    kind += f"{found.state['pos_embed'].shape[1] - 1} positions"
    if found.decoder:
        depth = len({k.split(".")[1] for k in found.decoder if k.startswith("decoder_blocks.")})
        kind += f"; decoder {len(found.decoder['decoder_embed.weight'])} wide, {depth} blocks"
    return kind


def verify_file(file: str | Path) -> dict:
    """Load a file into its model: readable, finite, every tensor there and of the right shape; and compare its sha256
    where one was published: in SHA256SUMS or FILE.sha256 beside it.

    Returns:
        file, kind, parameters, sha256 (what it was compared with), verdict.
    """
    file = Path(file)
    content = read_checkpoint(file)["model"]
    broken = _not_finite({k: v for k, v in content.items() if isinstance(v, torch.Tensor)})
    if broken:
        raise InputError(
            f"{file} holds numbers that are not finite in {len(broken)} tensors, first {broken[0]}: the "
            "training diverged or the file is damaged"
        )
    found = load_model(file)
    parameters = sum(p.numel() for p in found.model.parameters())
    result = {"file": str(file), "kind": found.config.get("kind", "encoder of others"), "parameters": parameters}
    for record in (file.with_name("SHA256SUMS"), Path(f"{file}.sha256")):
        for line in record.read_text().splitlines() if record.is_file() else []:
            wanted, name = line.split(maxsplit=1)
            if name == file.name and wanted != file_sha256(file):
                raise InputError(f"{file} has another sha256 than {record} says: fetch or copy it again")
            if name == file.name:
                return result | {"sha256": str(record), "verdict": "whole: the bytes that were published"}
    return result | {"verdict": "loads into its model and is finite; no sha256 beside it to compare with"}


def table(facts: dict) -> str:
    """`inspect_file` for people: a line a fact."""
    lines = []
    for name, value in facts.items():
        if name == "parts":
            value = "".join(f"\n{'':16}{part}: {count} tensors, {size:,}" for part, (count, size) in value.items())
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        lines.append(f"{name:15} {value:,}" if isinstance(value, int) else f"{name:15} {value}")
    return "\n".join(lines)


def main(args) -> dict:
    if args.verb == "list":
        for name, row in known().items():
            print(f"{name:32} {row['what']} ({row['licence']}){'' if row['url'] else ' [no address yet]'}")
        return {"names": list(known())}
    if args.verb == "release":
        name = args.name or Path(args.run_dir).resolve().name
        return release(args.run_dir, args.output, name=name, licence=args.licence)
    file = fetch(args.file, args.cache)
    if args.verb == "download":
        return {"file": str(file), "bytes": file.stat().st_size}
    if args.verb == "inspect":
        facts = inspect_file(file)
        print(table(facts))
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
    run_tool(main, ARGS, Path(ARGS.metrics) if ARGS.metrics else None)
