"""Names and shapes of others' ViTs -> MAE's: CLIP's, Hugging Face's and Google's (JAX).

Google's and Hugging Face's have q, k and v apart; MAE's have them in one matrix, rows in that order.
"""

import json
import re
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
GOOGLE_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)/(scale|kernel|bias)")
HF_CONFIG = {
    "num_attention_heads": "num_heads", "num_hidden_layers": "depth", "norm_pix_loss": "norm_pix_loss",
    "mask_ratio": "mask_ratio", "decoder_num_attention_heads": "decoder_num_heads",
}  # fmt: skip


def under_mae_names(whole: dict[str, torch.Tensor], file: Path) -> tuple[str, dict[str, torch.Tensor], dict]:
    """A file's tensors under MAE's names if it has Hugging Face's or Google's, else as they are.

    Returns:
        (what the file is, "" for neither; {MAE's name, or the file's own where it is unknown: tensor}; what is
        known of the encoder beside its tensors).
    """
    for ending, rename in ((HF_PATCHES, _from_hf), (GOOGLE_PATCHES, _from_google)):
        for key in whole:
            prefix = key.removesuffix(ending)
            if key == prefix + ending and (not prefix or prefix.endswith((".", "/"))):
                return rename(whole, prefix, file)
    return "", whole, {}


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


def _from_hf(whole: dict, prefix: str, file: Path) -> tuple[str, dict, dict]:
    top = {theirs: ours for ours, theirs in HF_TOP.items()}
    tensors = {}
    for key, value in whole.items():
        short = key.removeprefix(prefix)
        block = HF_BLOCK.fullmatch(short)
        ours = top.get(short, key)
        if block and block[3] in FROM_HF:
            ours = f"{'decoder_' if block[1] else ''}blocks.{block[2]}.{FROM_HF[block[3]]}.{block[4]}"
        elif short.startswith("decoder.") and DECODER.match(short.removeprefix("decoder.")):
            ours = short.removeprefix("decoder.")
        tensors[ours] = value
    origin = "Hugging Face ViTMAE" if "decoder_embed.weight" in tensors else "Hugging Face ViT"
    return origin, _join_qkv(tensors, file), _hf_config(file)


def _hf_config(file: Path) -> dict:
    """What config.json and preprocessor_config.json beside a file say, in this project's words."""
    found = []
    for beside in (file.with_name(name) for name in ("config.json", "preprocessor_config.json")):
        try:
            found.append(json.loads(beside.read_text()) if beside.is_file() else {})
        except ValueError as error:
            raise InputError(f"{beside} is damaged ({error}): fetch it again, or move it away") from error
    theirs, pixels = found
    config = {ours: theirs[name] for name, ours in HF_CONFIG.items() if name in theirs}
    act = theirs.get("hidden_act", "gelu")
    if act not in ("gelu", "quick_gelu"):
        raise InputError(
            f"{file.with_name('config.json')} asks for the activation {act!r}: only gelu and quick_gelu go"
        )
    config |= {"quick_gelu": True} if act == "quick_gelu" else {}
    if size := theirs.get("image_size"):
        config["img_size"] = list(size) if isinstance(size, list) else [size, size]
    if not pixels.get("do_normalize", True):
        config |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    elif "image_mean" in pixels and "image_std" in pixels:
        config |= {"mean": pixels["image_mean"], "std": pixels["image_std"]}
    return config


def _from_google(whole: dict, prefix: str, file: Path) -> tuple[str, dict, dict]:
    top = {theirs: ours for ours, theirs in GOOGLE_TOP.items()}
    tensors, config = {}, {}
    for key, value in whole.items():
        short = key.removeprefix(prefix)
        block = GOOGLE_BLOCK.fullmatch(short)
        ours = top.get(short, key)
        if short == GOOGLE_PATCHES:
            value = value.permute(3, 2, 0, 1)
        if block and block[2] in FROM_GOOGLE:
            number, part, leaf = block[1], FROM_GOOGLE[block[2]], block[3]
            ours = f"blocks.{number}.{part}.{'bias' if leaf == 'bias' else 'weight'}"
            if part in ("attn.q", "attn.k", "attn.v"):
                config["num_heads"] = value.shape[-2]  # kernel [D, heads, D / heads], bias [heads, D / heads]
                value = value.flatten(-2)
            elif part == "attn.proj" and leaf == "kernel":
                value = value.flatten(0, 1)  # [heads, D / heads, D]
            value = value.T if leaf == "kernel" else value
        tensors[ours] = value
    if prefix + "head/kernel" in whole:  # Google's own, trained on pixels in [-1, 1]; ours have no head
        config |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    return "Google ViT", _join_qkv(tensors, file), config


def _join_qkv(tensors: dict, file: Path) -> dict:
    """q, k and v of each block -> one tensor."""
    joined = {}
    for key, value in tensors.items():
        part = re.fullmatch(r"(.*\.attn\.)[qkv](\.(?:weight|bias))", key)
        if not part:
            joined[key] = value
        elif (whole := f"{part[1]}qkv{part[2]}") not in joined:
            try:
                joined[whole] = torch.cat([tensors[f"{part[1]}{letter}{part[2]}"] for letter in "qkv"])
            except (KeyError, RuntimeError) as error:
                raise InputError(f"{file}: {whole} needs q, k and v of one shape ({error})") from error
    return joined
