"""Files of weights: what they are, whether they are whole, and in everybody's formats.

    python -m tools.checkpoint inspect FILE
    python -m tools.checkpoint verify FILE
    python -m tools.checkpoint convert FILE --to timm --output encoder_timm.safetensors
    python -m tools.checkpoint download mae_vit_base
    python -m tools.checkpoint release RUN_DIR --output released --licence Apache-2.0

FILE may be a name of util/registry.json, https://... or hf://ORG/REPO/FILE, too: it is then
downloaded once.
Code inside a file is never run.
"""

import argparse
from pathlib import Path

from checkpoints.inspection import inspect_file, table
from checkpoints.onnx_file import export_onnx
from checkpoints.peers import TARGETS, convert
from checkpoints.release import push, release, repository
from checkpoints.verification import verify_file
from util.cli import Parser, parse_input_size, run_tool
from util.errors import InputError
from util.fetch import fetch, known


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.checkpoint", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, what: str = "file", what_help: str = "") -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        if what:
            found.add_argument(what, help=what_help or "file, registry name, https:// or hf:// address")
        found.add_argument("--cache", default=None, help="folder of downloads (default ~/.cache/cgd_mae)")
        found.add_argument("--metrics", default=None, help="write the printed JSON here, too (default: nowhere)")
        return found

    # fmt: off
    verb("inspect", "what a file is: kind, sizes, parts, settings, losses, licence, hash; runs nothing in it")
    verb("verify", "load it, run it, and compare with the reference embeddings inside")
    verb("download", "get a released checkpoint once; later calls need no network")
    verb("list", "the names that download knows", what="")
    add = verb("convert", "write it in the format of another code base").add_argument
    add("--to", required=True, choices=(*TARGETS, "onnx"), help="format")
    add("--output", required=True, help="file to write; for hf a folder")
    add("--input_size", default=None,
        help="pixels that the position table is made for: one side, or H,W (default: the file's; setr: 512)")
    add("--pictures", nargs="*", default=[], metavar="FILE",
        help="onnx: photos to compare on, beside the drawn ones (default none)")
    add = verb("release", "make a folder for others of a finished pre-training run", "run_dir",
               "--output_dir of main_pretrain.py").add_argument
    add("--output", required=True, help="folder to write: new, empty, or an earlier release")
    add("--licence", required=True, help="SPDX name of the weights' licence, e.g. Apache-2.0 or CC-BY-NC-4.0")
    add("--licence_file", default=None, metavar="FILE",
        help="text of that licence (default: Apache-2.0's own, else none)")
    add("--name", default=None, help="name in the cards (default: that of the run's folder)")
    add("--data_card", default=None, metavar="FILE",
        help="text on the training images (default: from the settings)")
    add("--pictures", nargs="*", default=[], metavar="FILE",
        help="photos for the sample reconstruction (default: drawn vehicles)")
    add("--push", default=None, metavar="hf://ORG/REPO", help="upload the folder there (default: do not)")
    # fmt: on
    return parser


def main(args) -> dict:
    if args.verb == "list":
        for name, row in known().items():
            print(f"{name:32} {row['what']} ({row['licence']}){'' if row['url'] else ' [no address yet]'}")
        return {"names": list(known())}
    if args.verb == "release":
        if args.push:
            repository(args.push)  # a wrong address is said before anything is written
        name = args.name or Path(args.run_dir).resolve().name
        result = release(
            args.run_dir, args.output, name=name, licence=args.licence, licence_file=args.licence_file,
            data_card=args.data_card, pictures=tuple(args.pictures),
        )  # fmt: skip
        return result | ({"pushed": push(args.output, args.push)} if args.push else {})
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
        return export_onnx(file, args.output, size, args.pictures)
    if args.pictures:
        raise InputError("--pictures: only --to onnx compares on pictures; drop it")
    result = convert(file, args.to, args.output, input_size=size)
    print(f"load it there:\n{result['load']}\n{result['remark']}")
    return result


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.metrics) if ARGS.metrics else None)
