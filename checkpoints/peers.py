"""Any encoder that this project reads -> a file that another project's own loader takes.

The source is read by `util.pretrained`, so anything goes to anything; what is written is float32, contiguous,
without Python objects, and is read back and compared before anybody relies on it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoints import peer_files
from checkpoints.peer_files import Source
from models_vit import encoder_from
from util.checkpoint import read_checkpoint
from util.errors import InputError
from util.fetch import fetch
from util.pretrained import read_pretrained, recognise, weights_file


@dataclass(frozen=True)
class Target:
    """suffixes: of the output, "" for a folder; write: of `checkpoints.peer_files`; plain: no norm before the
    blocks and the erf GELU; square: as many rows of patches as columns; decoder: MAE's is written too."""

    suffixes: tuple[str, ...]
    write: Callable
    plain: bool = True
    square: bool = False
    decoder: bool = False


TARGETS = {
    "mae": Target((".pth",), peer_files.to_mae, square=True, decoder=True),
    "timm": Target((".pth", ".safetensors"), peer_files.to_timm, plain=False),
    "hf": Target(("",), peer_files.to_hf, decoder=True),
    "transreid": Target((".pth",), peer_files.to_transreid, square=True),
    "transfg": Target((".npz",), peer_files.to_transfg, square=True),
    "setr": Target((".pth",), peer_files.to_setr, square=True),
    "safetensors": Target((".safetensors",), peer_files.to_safetensors, plain=False),
}


def convert(
    file: str | Path, target: str, output: str | Path, *, input_size: tuple[int, int] | None = None
) -> dict[str, int | str]:
    """Write an encoder as a peer's loader wants it.

    Args:
        file: any file that `load_encoder` takes, or a folder of Hugging Face's.
        target: one of `TARGETS`.
        output: the file to write; for hf a folder.
        input_size: (H, W) in px that the position table is resized to (bicubic), default the file's own; for
            setr the crop, default 512 x 512 (bilinear, as SETR does), and only where it loads by `load_from`.
    Returns:
        What to print: target, source, output, input_size, tensors and parameters written, load (lines of code
        or a command), remark.
    Raises:
        InputError: a source that cannot be read or is incomplete, a target that cannot hold it, an output
            that cannot be written or reads back otherwise.
    """
    if target not in TARGETS:
        raise InputError(f"--to {target}: choose of {', '.join(TARGETS)}")
    rules, output = TARGETS[target], Path(output)
    file = fetch(file)
    _check_output(file, target, output)
    source = _read_source(file, None if target == "setr" else input_size, rules.decoder)
    _check_fit(source, target)
    written, load, remark = rules.write(source, output, input_size)
    _check_written(source, output, written)
    height, width = source.settings["img_size"]
    return {
        "target": target,
        "source": f"{file} ({source.found.origin})",
        "output": str(output),
        "input_size": f"{height} x {width}",
        "tensors": len(written),
        "parameters": sum(value.numel() for value in written.values()),
        "load": load,
        "remark": remark,
    }


def _read_source(file: Path, input_size: tuple[int, int] | None, with_decoder: bool) -> Source:
    found = read_pretrained(file)
    encoder = encoder_from(replace(found, state=dict(found.state)), file, input_size, fused_attn=False)
    state = {k: v.detach().float().contiguous() for k, v in encoder.state_dict().items()}
    absent = next((k for k in state if k not in found.state), None)
    if absent:
        raise InputError(f"{file} lacks {absent}, which would be made up in the copy: give a whole encoder")
    broken = next((k for k, v in state.items() if not v.isfinite().all()), None)
    if broken:
        raise InputError(f"{file} holds numbers in {broken} that are not finite: its training went wrong")
    decoder = _whole_decoder(found.decoder, state, file) if with_decoder and found.decoder else {}
    return Source(file, found, encoder, state, decoder)


def _whole_decoder(decoder: dict, state: dict, file: Path) -> dict:
    """MAE's decoder in float32, all of it; its blocks have the same parts as the encoder's."""
    blocks = {k.split(".")[1] for k in decoder if k.startswith("decoder_blocks.")}
    inner = [k.removeprefix("blocks.0.") for k in state if k.startswith("blocks.0.")]
    wanted = ["mask_token", "decoder_pos_embed"]
    wanted += [f"decoder_{part}.{kind}" for part in ("embed", "norm", "pred") for kind in ("weight", "bias")]
    wanted += [f"decoder_blocks.{number}.{k}" for number in range(max(len(blocks), 1)) for k in inner]
    absent = next((k for k in wanted if k not in decoder), None)
    if absent:
        raise InputError(f"{file} has a decoder without {absent}: give a whole file, or the encoder alone")
    return {k: v.float().contiguous() for k, v in decoder.items()}


def _check_output(file: Path, target: str, output: Path) -> None:
    suffixes = TARGETS[target].suffixes
    if output.suffix not in suffixes and "" not in suffixes:
        wanted = " or ".join(suffixes)
        raise InputError(f"--to {target} --output {output}: give a name that ends with {wanted}")
    if "" in suffixes and output.suffix in (".pth", ".pt", ".bin", ".safetensors", ".npz", ".onnx"):
        raise InputError(f"--to {target} --output {output}: it writes a folder, give the name of one")
    if "" in suffixes and output.is_file():
        raise InputError(f"--to {target} --output {output} is a file: give a folder, new or old")
    if "" not in suffixes and output.is_dir():
        raise InputError(f"--to {target} --output {output} is a folder: give a file name in it")
    if output.resolve() in (file.resolve(), file.resolve().parent if "" in suffixes else None):
        raise InputError(f"--to {target} --output {output} is the file that is converted: give another name")
    if target == "transreid" and "distilled" in str(output.absolute()):
        raise InputError(
            f"--to transreid --output {output.absolute()}: TransReID takes a path with 'distilled' in it for "
            "a DeiT with one more token and cuts the position table; choose another folder or name"
        )


def _check_fit(source: Source, target: str) -> None:
    rules, (rows, columns) = TARGETS[target], source.encoder.grid_size
    if rules.plain and (source.settings["pre_norm"] or source.settings["quick_gelu"]):
        raise InputError(
            f"{source.file} is CLIP's kind of ViT (a norm before its blocks, or OpenAI's GELU), which --to "
            f"{target} has no place for: use --to timm or --to safetensors"
        )
    if rows != columns and (rules.square or source.decoder):
        raise InputError(
            f"{source.file} has a position table of {rows} x {columns} patches, and --to {target} reads "
            "squares alone: resize it first, --to safetensors --input_size 224, and convert that file"
        )
    if source.decoder and source.decoder["decoder_pos_embed"].shape[1] != 1 + rows * columns:
        raise InputError(
            f"{source.file} holds a decoder for {source.decoder['decoder_pos_embed'].shape[1] - 1} patches, "
            f"and --input_size makes {rows * columns}: drop --input_size, or give the encoder alone"
        )


def _check_written(source: Source, output: Path, written: dict) -> None:
    """Read the output as any other file of weights: nothing lost, nothing changed."""
    file = weights_file(output)
    content = read_checkpoint(file)
    found = recognise(content, file)
    wanted, read = source.state | source.decoder, found.state | found.decoder
    wrong = [k for k, v in wanted.items() if k not in read or not torch.equal(read[k], v)]
    wrong += [k for k in read if k not in wanted]
    backbone = content.get("state_dict", {})
    wrong += [k for k, v in backbone.items() if not torch.equal(v, written[k])]
    count = len(content["model"]) + len(backbone)
    if wrong or count != len(written):
        raise InputError(
            f"{file} reads back with {count} tensors of {len(written)} written, {len(wrong)} of them changed "
            f"(first {', '.join(wrong[:1]) or 'none'}): disk or memory failed, remove it and convert again"
        )
