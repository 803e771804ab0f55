"""Names and shapes of others' ViTs: CLIP's, Hugging Face's and Google's (JAX), to and from MAE's.

Google's and Hugging Face's have q, k and v apart; MAE's have them in one matrix, rows in that order.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from util.errors import InputError

PATCHES, CLIP_PATCHES = "patch_embed.proj.weight", "conv1.weight"
HF_PATCHES, GOOGLE_PATCHES = "embeddings.patch_embeddings.projection.weight", "embedding/kernel"
DECODER = re.compile(r"mask_token$|decoder_pos_embed$|decoder_(embed|blocks|norm|pred)\.")  # of MAE
CLIP_NAMES = {
    "class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1.weight": PATCHES,
    "ln_pre": "norm_pre", "ln_post": "norm", "transformer.resblocks": "blocks", "ln_1": "norm1",
    "ln_2": "norm2", "attn.in_proj_weight": "attn.qkv.weight", "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
# in a block: MAE's, Hugging Face's in files and transformers 4, its in the memory of transformers 5, Google's
BLOCK_NAMES = (
    ("norm1", "layernorm_before", "layernorm_before", "LayerNorm_0"),
    ("norm2", "layernorm_after", "layernorm_after", "LayerNorm_2"),
    ("attn.q", "attention.attention.query", "attention.q_proj", "MultiHeadDotProductAttention_1/query"),
    ("attn.k", "attention.attention.key", "attention.k_proj", "MultiHeadDotProductAttention_1/key"),
    ("attn.v", "attention.attention.value", "attention.v_proj", "MultiHeadDotProductAttention_1/value"),
    ("attn.proj", "attention.output.dense", "attention.o_proj", "MultiHeadDotProductAttention_1/out"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1", "MlpBlock_3/Dense_0"),
    ("mlp.fc2", "output.dense", "mlp.fc2", "MlpBlock_3/Dense_1"),
)
TO_HF, TO_GOOGLE = ({row[0]: row[i] for row in BLOCK_NAMES} for i in (1, 3))
FROM_HF = {name: row[0] for row in BLOCK_NAMES for name in row[1:3]}
FROM_GOOGLE = {row[3]: row[0] for row in BLOCK_NAMES}
HF_TOP = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": HF_PATCHES, "patch_embed.proj.bias": HF_PATCHES.replace("weight", "bias"),
    "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias",
    "dist_token": "embeddings.distillation_token", "mask_token": "embeddings.mask_token",
}  # fmt: skip
GOOGLE_TOP = {
    "cls_token": "cls", "pos_embed": "Transformer/posembed_input/pos_embedding",
    "patch_embed.proj.weight": GOOGLE_PATCHES, "patch_embed.proj.bias": "embedding/bias",
    "norm.weight": "Transformer/encoder_norm/scale", "norm.bias": "Transformer/encoder_norm/bias",
}  # fmt: skip
# 5.23 writes a decoder's blocks as decoder_encoder.layer, all others as decoder_layers
HF_BLOCK = re.compile(r"(decoder\.decoder_|)(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
MAE_BLOCK = re.compile(r"(decoder_|)blocks\.(\d+)\.(.+)\.(weight|bias)")
GOOGLE_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)/(scale|kernel|bias)")
QKV = ("attn.q", "attn.k", "attn.v")


@dataclass
class Renamed:
    """tensors: {MAE's name, or the file's own where it is unknown: tensor}; names: {MAE's: the file's};
    config: what is known of the encoder beside its tensors."""

    origin: str
    tensors: dict[str, torch.Tensor]
    names: dict[str, str] = field(default_factory=dict)
    config: dict = field(default_factory=dict)


def under_mae_names(whole: dict[str, torch.Tensor], file: Path) -> Renamed:
    """A file's tensors under MAE's names if it has Hugging Face's or Google's, else as they are.

    Raises:
        InputError: a name or a shape is wrong, or what lies beside the file cannot be read.
    """
    for ending, rename in ((HF_PATCHES, _from_hf), (GOOGLE_PATCHES, _from_google)):
        for key in whole:
            prefix = key.removesuffix(ending)
            if key == prefix + ending and (not prefix or prefix.endswith((".", "/"))):
                return rename(whole, prefix, file)
    return Renamed("", whole)


def from_clip(state: dict) -> dict:
    """An image tower of OpenAI's or open_clip's names -> MAE's."""
    renamed = {}
    for key, value in state.items():
        for theirs, ours in CLIP_NAMES.items():
            key = re.sub(rf"(^|\.){re.escape(theirs)}(\.|$)", rf"\g<1>{ours}\g<2>", key)
        renamed[key] = value
    renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    renamed["pos_embed"] = renamed["pos_embed"][None]
    return renamed


def hf_names(state: dict, decoder: dict) -> dict[str, torch.Tensor]:
    """An encoder -> names of a ViTModel's file; with MAE's decoder, those of ViTMAEForPreTraining."""
    renamed = {}
    for key, value in _split_qkv(state | decoder).items():
        block = MAE_BLOCK.fullmatch(key)
        in_decoder = bool(DECODER.match(key))
        if block:
            _, number, part, kind = block.groups()
            layers = "decoder.decoder_layers" if in_decoder else "encoder.layer"
            name = f"{layers}.{number}.{TO_HF[part]}.{kind}"
        else:
            name = f"decoder.{key}" if in_decoder else HF_TOP[key]
        renamed[name if in_decoder or not decoder else f"vit.{name}"] = value.contiguous()
    return renamed


def google_names(state: dict, num_heads: int) -> dict[str, torch.Tensor]:
    """An encoder -> names and shapes of Google's ViT (vit_jax), which TransFG reads."""
    renamed = {}
    for key, value in _split_qkv(state).items():
        if key in GOOGLE_TOP:
            name, value = GOOGLE_TOP[key], value.permute(2, 3, 1, 0) if value.ndim == 4 else value
        else:
            _, number, part, kind = MAE_BLOCK.fullmatch(key).groups()
            leaf = "bias" if kind == "bias" else "scale" if part.startswith("norm") else "kernel"
            name = f"Transformer/encoderblock_{number}/{TO_GOOGLE[part]}/{leaf}"
            value = value.T if value.ndim == 2 else value
            if part in QKV:
                value = value.unflatten(-1, (num_heads, -1))  # [D, heads, D / heads]
            elif part == "attn.proj" and leaf == "kernel":
                value = value.unflatten(0, (num_heads, -1))  # [heads, D / heads, D]
        renamed[name] = value.contiguous()
    return renamed


def _from_hf(whole: dict, prefix: str, file: Path) -> Renamed:
    top = {theirs: ours for ours, theirs in HF_TOP.items()}
    tensors, names = {}, {}
    for key, value in whole.items():
        short = key.removeprefix(prefix)
        block = HF_BLOCK.fullmatch(short)
        ours = top.get(short, key)
        if block and block[3] in FROM_HF:
            ours = f"{'decoder_' if block[1] else ''}blocks.{block[2]}.{FROM_HF[block[3]]}.{block[4]}"
        elif short.startswith("decoder.") and DECODER.match(short.removeprefix("decoder.")):
            ours = short.removeprefix("decoder.")
        tensors[ours], names[ours] = value, key
    origin = "Hugging Face ViTMAE" if "decoder_embed.weight" in tensors else "Hugging Face ViT"
    return Renamed(origin, _join_qkv(tensors, names, file), names, _hf_config(file))


def _hf_config(file: Path) -> dict:
    """What config.json and preprocessor_config.json beside a file say, in this project's words."""
    theirs, pixels = (_read_json(file.parent / n) for n in ("config.json", "preprocessor_config.json"))
    act = theirs.get("hidden_act", "gelu")
    if act not in ("gelu", "quick_gelu"):
        raise InputError(
            f"{file.parent / 'config.json'} asks for the activation {act!r}, and this encoder has gelu and "
            "quick_gelu: its features would be others"
        )
    names = {
        "num_attention_heads": "num_heads", "num_hidden_layers": "depth", "norm_pix_loss": "norm_pix_loss",
        "mask_ratio": "mask_ratio", "decoder_num_attention_heads": "decoder_num_heads",
    }  # fmt: skip
    config = {ours: theirs[name] for name, ours in names.items() if name in theirs}
    if "image_size" in theirs:
        size = theirs["image_size"]
        config["img_size"] = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if act == "quick_gelu":
        config["quick_gelu"] = True
    if "image_mean" in pixels and "image_std" in pixels:
        used = pixels.get("do_normalize", True)
        config |= {"mean": pixels["image_mean"], "std": pixels["image_std"]} if used else {
            "mean": [0.0] * 3, "std": [1.0] * 3
        }  # fmt: skip
    return config


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged ({error}): fetch it again, or move it away") from error
    return content if isinstance(content, dict) else {}


def _from_google(whole: dict, prefix: str, file: Path) -> Renamed:
    top = {theirs: ours for ours, theirs in GOOGLE_TOP.items()}
    tensors, names = {}, {}
    config = {}
    for key, value in whole.items():
        short = key.removeprefix(prefix)
        block = GOOGLE_BLOCK.fullmatch(short)
        ours = top.get(short, key)
        if short == GOOGLE_PATCHES:
            value = _with_dims(value, 4, key, file).permute(3, 2, 0, 1)
        if block and block[2] in FROM_GOOGLE:
            number, part, leaf = block[1], FROM_GOOGLE[block[2]], block[3]
            ours = f"blocks.{number}.{part}.{'bias' if leaf == 'bias' else 'weight'}"
            if part in QKV:
                value = _with_dims(value, 2 if leaf == "bias" else 3, key, file)
                config["num_heads"] = value.shape[-2]
                value = value.flatten(-2)
            elif part == "attn.proj" and leaf == "kernel":
                value = _with_dims(value, 3, key, file).flatten(0, 1)
            value = value.T if leaf == "kernel" else value
        tensors[ours], names[ours] = value, key
    if prefix + "head/kernel" in whole:  # Google's own, trained on pixels in [-1, 1]; ours have no head
        config |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    return Renamed("Google ViT", _join_qkv(tensors, names, file), names, config)


def _with_dims(value: torch.Tensor, dims: int, key: str, file: Path) -> torch.Tensor:
    if value.ndim != dims:
        raise InputError(f"{file} holds {key} as {tuple(value.shape)}: a Google ViT has {dims} dimensions there")
    return value


def _split_qkv(state: dict) -> dict:
    split = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for part, rows in zip("qkv", value.chunk(3)):
                split[key.replace(".attn.qkv.", f".attn.{part}.")] = rows
        else:
            split[key] = value
    return split


def _join_qkv(tensors: dict, names: dict, file: Path) -> dict:
    """q, k and v of each block -> one tensor; the parts' names stay in `names` under the whole's."""
    joined = {}
    for key, value in tensors.items():
        part = re.fullmatch(r"(.*\.attn\.)([qkv])(\.(?:weight|bias))", key)
        if not part:
            joined[key] = value
            continue
        whole = f"{part[1]}qkv{part[3]}"
        if whole in joined:
            continue
        three = [f"{part[1]}{letter}{part[3]}" for letter in "qkv"]
        absent = next((name for name in three if name not in tensors), None)
        if absent:
            raise InputError(f"{file} lacks {_alike(names[key], key, absent)}: {whole} needs q, k and v")
        wrong = next((name for name in three if tensors[name].shape != value.shape), None)
        if wrong:
            raise InputError(
                f"{file} holds {names[key]} as {tuple(value.shape)} and {names[wrong]} as "
                f"{tuple(tensors[wrong].shape)}: q, k and v of a block have one shape"
            )
        joined[whole] = torch.cat([tensors[name] for name in three])
        names[whole] = names[three[0]]
    return joined


def _alike(theirs: str, ours: str, other: str) -> str:
    """The file's name of `other`, by the file's name `theirs` of `ours`: both of q, k and v of one block."""
    mine, its = (next(row for row in BLOCK_NAMES if f".{row[0]}." in name) for name in (ours, other))
    for here, there in zip(mine[1:], its[1:]):
        if here in theirs:
            return theirs.replace(here, there)
    return other
