"""Any published ViT file -> the encoder's tensors under MAE's names, and MAE's names -> those of others.

Recognised: CGD-MAE and MAE (encoder or whole), VehicleMAE, timm and DeiT, DINO and iBOT, MoCo v3, CLIP's image tower,
TransReID (ours and the original), Hugging Face's ViT and ViTMAE (a file or its folder), Google's ViT (.npz).
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from util.checkpoint import HEAD_KEYS, encoder_state, load_weights, read_checkpoint, read_safetensors_header
from util.errors import InputError
from util.files import read_json

PATCHES = "patch_embed.proj.weight"
# of several encoders in one file, the one whose name says that it is meant to be used
PREFERRED = ("", "base_encoder", "teacher", "visual", "backbone", "base")
DECODER = re.compile(r"mask_token$|decoder_pos_embed$|decoder_(embed|blocks|norm|pred)\.")  # of MAE
# what heads, decoders and losses of others are called; all else would change the features and is refused
OTHERS = re.compile(
    r"(head|fc(?!_norm)|pre_logits|dist_token|head_dist|proj|predictor|decode|mask_token|logit_scale|bottleneck|"
    r"classifier|pooler|b2|sie_embed|center|pos_embed_probs|get_token_probs|proj_encode_feature|distill_head)"
)
# what this encoder has no place for, by a name that only such a file has
LACKING = {
    r"dist_token$": "a second class token for distillation (a distilled DeiT), which takes part in every block",
    r"(reg_token|register_tokens|storage_tokens)$": "register tokens, which take part in every block",
    r"(rope_embed|rope)\.|.*\.rope\.": "rotary positions",
    r".*(relative_position|rel_pos)": "relative positions",
    r"blocks\.\d+\.(ls\d\.|gamma_\d)": "scales of its layers (LayerScale)",
    r"blocks\.\d+\.attn\.[qk]_norm": "norms of queries and keys",
    r"blocks\.\d+\.mlp\.(w\d+|gate|fc1_)": "gated layers (SwiGLU)",
}
NEEDED = {"cls_token": "no class token", "pos_embed": "no position table (rotary positions, or none)"}
# no model that anybody has is larger; it would only eat memory
LARGEST = {"depth": 1000, "embed_dim": 1 << 14, "num_heads": 1 << 10, "patch_size": 1 << 10, "stride": 1 << 10,
           "decoder_num_heads": 1 << 10, "num_classes": 1 << 24, "positions": 1 << 16}  # fmt: skip
# a part of the encoder: MAE's name, CLIP's, Hugging Face's, Google's
NAMES = (
    ("cls_token", "class_embedding", "embeddings.cls_token", "cls"),
    ("pos_embed", "positional_embedding", "embeddings.position_embeddings", "Transformer/posembed_input/pos_embedding"),
    ("patch_embed.proj", "conv1", "embeddings.patch_embeddings.projection", "embedding"),
    ("norm_pre", "ln_pre", "", ""),
    ("norm", "ln_post", "layernorm", "Transformer/encoder_norm"),
    ("dist_token", "", "embeddings.distillation_token", ""),
    ("mask_token", "", "embeddings.mask_token", ""),
)
# a part of a block; q, k and v are apart in the last two and one matrix in MAE's, rows in that order
BLOCK_NAMES = (
    ("norm1", "ln_1", "layernorm_before", "LayerNorm_0"),
    ("norm2", "ln_2", "layernorm_after", "LayerNorm_2"),
    ("attn.qkv", "attn.in_proj", "", ""),
    ("attn.q", "", "attention.attention.query", "MultiHeadDotProductAttention_1/query"),
    ("attn.k", "", "attention.attention.key", "MultiHeadDotProductAttention_1/key"),
    ("attn.v", "", "attention.attention.value", "MultiHeadDotProductAttention_1/value"),
    ("attn.proj", "attn.out_proj", "attention.output.dense", "MultiHeadDotProductAttention_1/out"),
    ("mlp.fc1", "mlp.c_fc", "intermediate.dense", "MlpBlock_3/Dense_0"),
    ("mlp.fc2", "mlp.c_proj", "output.dense", "MlpBlock_3/Dense_1"),
)
# names in the memory of transformers 5, which its files do not have
HF_MEMORY = {"attention.q_proj": "attn.q", "attention.k_proj": "attn.k", "attention.v_proj": "attn.v",
             "attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}  # fmt: skip
COLUMNS = {"clip": 1, "hf": 2, "google": 3}
QKV = ("attn.q", "attn.k", "attn.v")
BLOCKS = {"clip": "transformer.resblocks.{}.", "hf": "encoder.layer.{}.", "google": "Transformer/encoderblock_{}/"}
PATCHES_OF = {"hf": "embeddings.patch_embeddings.projection.weight", "google": "embedding/kernel", "mae": PATCHES,
              "clip": "conv1.weight"}  # fmt: skip
HF_CONFIG = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth", "norm_pix_loss": "norm_pix_loss",
             "mask_ratio": "mask_ratio", "decoder_num_attention_heads": "decoder_num_heads"}  # fmt: skip


@dataclass
class Pretrained:
    """state: {MAE's name: tensor}; origin: what the file is; config: the file's own, or empty; ignored: names that the
    encoder has no use for; decoder: MAE's, where the file has one."""

    state: dict[str, torch.Tensor]
    origin: str
    config: dict
    ignored: list[str] = field(default_factory=list)
    decoder: dict[str, torch.Tensor] = field(default_factory=dict)


def read_pretrained(file: str | Path) -> Pretrained:
    """Read a file of weights and bring its encoder under MAE's names."""
    return recognise(read_checkpoint(file), Path(file))


def recognise(content: dict, file: str | Path) -> Pretrained:
    """`read_pretrained` of what `read_checkpoint(file)` has returned."""
    whole = {k: v for k, v in content["model"].items() if isinstance(v, torch.Tensor)}
    peer, prefix = _find_encoder(whole, file)
    config = read_config(file, content)
    if peer == "hf":
        config = _hf_config(Path(file)) | config
    elif prefix + "head/kernel" in whole:  # Google's own, trained on pixels in [-1, 1]; ours have no head
        config = {"mean": [0.5] * 3, "std": [0.5] * 3} | config
    if peer in ("hf", "google"):
        whole, prefix = _under_maes_names(whole, peer, prefix, config, file), ""
    if "part_layer.norm1.weight" in whole:
        what = "its last block sees selected parts alone: give the encoder it was trained from"
        raise InputError(f"{file} is a TransFG model: {what}")
    state = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    ignored = [k for k in whole if not k.startswith(prefix)]
    if peer == "clip":
        state = _under_maes_names(state, peer, "", config, file)
        state["cls_token"], state["pos_embed"] = state["cls_token"].reshape(1, 1, -1), state["pos_embed"][None]
    elif prefix == "base." and any(k.startswith("b1.") for k in whole):
        # of TransReID's global branch, the trained ones (the original also keeps what they were copied from)
        last = max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")) + ("norm.weight" not in state)
        names = {"b1.0.": f"blocks.{last}.", "b1.1.": "norm."}
        state |= {names[k[:5]] + k[5:]: v for k, v in whole.items() if k[:5] in names}
        ignored = [k for k in ignored if not k.startswith("b1.")]
    if content.get("quick_gelu"):  # a TorchScript archive
        config = {"quick_gelu": True} | config
    _check_config(config, file)
    _check_parts(state, config, file)
    state.setdefault("patch_embed.proj.bias", torch.zeros(len(state[PATCHES])))  # CLIP has none
    encoder = {k: v for k, v in encoder_state(state).items() if not OTHERS.match(k)}
    decoder = {k: v for k, v in state.items() if DECODER.match(k)}
    decoder = {} if list(decoder) == ["mask_token"] else decoder  # iBOT's, which has no decoder
    origin = config.get("kind") or _origin(peer, prefix, state)
    return Pretrained(encoder, origin, config, ignored + [k for k in state if k not in encoder], decoder)


def _origin(peer: str, prefix: str, state: dict) -> str:
    has_decoder = "decoder_embed.weight" in state
    if peer == "clip" or "norm_pre.weight" in state:
        return "CLIP"
    if peer != "mae":
        return "Google ViT" if peer == "google" else "Hugging Face ViT" + "MAE" * has_decoder
    if prefix == "base." or prefix.endswith("base_encoder."):
        return "TransReID" if prefix == "base." else "MoCo v3"
    return "CGD-MAE" if any(k.startswith(HEAD_KEYS) for k in state) else "MAE" if has_decoder else "ViT"


def _find_encoder(whole: dict, file) -> tuple[str, str]:
    """(whose names a file has, prefix of the encoder's names), by its patch embedding."""
    found: dict[str, str] = {}
    for peer, ending in PATCHES_OF.items():
        for prefix in (key.removesuffix(ending) for key in whole if key.endswith(ending)):
            is_name = not prefix or prefix.endswith((".", "/"))
            if is_name and (peer != "clip" or prefix + "class_embedding" in whole):
                found.setdefault(prefix, peer)
    if not found:
        raise InputError(f"{file} is no ViT encoder: no name of {', '.join(list(whole)[:3])}, ... ends with {PATCHES}")

    def rank(prefix: str) -> tuple[int, int]:
        last = prefix.rstrip(".").split(".")
        return min((i for i, name in enumerate(PREFERRED) if name in last), default=len(PREFERRED)), len(last)

    prefix = min(found, key=rank)
    return found[prefix], prefix


def _under_maes_names(whole: dict, peer: str, prefix: str, config: dict, file) -> dict[str, torch.Tensor]:
    """Another project's tensors under MAE's names, where they have one; `config` gets num_heads where shapes tell."""
    top, block = ({row[COLUMNS[peer]]: row[0] for row in rows} for rows in (NAMES, BLOCK_NAMES))
    block |= HF_MEMORY
    # Hugging Face has its decoder's blocks in decoder.decoder_layers.N, and in memory its encoder's in layers.N
    blocks = re.escape(BLOCKS[peer]).replace(r"\{\}", r"(\d+)").replace(r"encoder\.layer", r"(?:encoder\.layer|layers)")
    pattern = re.compile(rf"(decoder\.decoder_)?(?:{blocks})?(.+?)(?:[._/](weight|bias|scale|kernel))?")
    tensors = {}
    for key, value in whole.items():
        short = key.removeprefix(prefix)
        in_decoder, number, theirs, leaf = pattern.fullmatch(short).groups()
        ours = (block if number else top).get(theirs)
        if peer == "google" and ours:
            if ours in QKV:
                config["num_heads"] = value.shape[-2]  # kernel [D, heads, D / heads], bias [heads, D / heads]
            value = _google_shape(ours, leaf, value)
        if ours and (number or not in_decoder):
            key = f"{'decoder_' * bool(in_decoder)}blocks.{number}.{ours}" if number else ours
            key += f".{'bias' if leaf == 'bias' else 'weight'}" if leaf else ""
        elif DECODER.match(short.removeprefix("decoder.")):
            key = short.removeprefix("decoder.")
        tensors[key] = value
    joined = {}
    for key, value in tensors.items():
        part = re.fullmatch(r"(.*\.attn\.)[qkv](\.(?:weight|bias))", key)
        if not part:
            joined[key] = value
        elif (whole_key := f"{part[1]}qkv{part[2]}") not in joined:
            try:
                joined[whole_key] = torch.cat([tensors[f"{part[1]}{letter}{part[2]}"] for letter in "qkv"])
            except (KeyError, RuntimeError) as error:
                raise InputError(f"{file}: {whole_key} needs q, k and v of one shape ({error})") from error
    return joined


def under_others_names(state: dict[str, torch.Tensor], peer: str, num_heads: int) -> dict[str, torch.Tensor]:
    """An encoder under MAE's names -> under those of "hf" or "google"; for Hugging Face with MAE's decoder, too."""
    column, vit = COLUMNS[peer], "vit." if "decoder_embed.weight" in state else ""
    split = ((key.replace(".qkv.", f".{letter}."), rows) for key, value in state.items()
             for letter, rows in (zip("qkv", value.chunk(3)) if ".attn.qkv." in key else [("qkv", value)]))  # fmt: skip
    renamed = {}
    for key, value in split:
        number, part, leaf = re.fullmatch(r"(?:(?:decoder_)?blocks\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", key).groups()
        theirs = next((row[column] for row in (BLOCK_NAMES if number else NAMES) if row[0] == part), "")
        name = (BLOCKS[peer].format(number) if number else "") + theirs
        if peer == "google":
            leaf = "scale" if leaf == "weight" and "norm" in part else "kernel" if leaf == "weight" else leaf
            name, value = name + (f"/{leaf}" if leaf else ""), _google_shape(part, leaf, value, num_heads)
        elif DECODER.match(key):
            name = f"decoder.decoder_layers.{number}.{theirs}.{leaf}" if number else f"decoder.{key}"
        else:
            name = vit + name + (f".{leaf}" if leaf else "")
        renamed[name] = value.contiguous()
    return renamed


def _google_shape(part: str, leaf: str | None, value: torch.Tensor, num_heads: int = 0) -> torch.Tensor:
    """A tensor as MAE shapes it; with `num_heads` the way back. Kernels are transposed, heads apart."""
    is_kernel = leaf == "kernel"
    if part == "patch_embed.proj" and is_kernel:  # [p, p, 3, D] there
        return value.permute((2, 3, 1, 0) if num_heads else (3, 2, 0, 1))
    # q, k, v are [D, heads, D / heads] there, and what follows them [heads, D / heads, D]
    axis = -1 if part in QKV else 0 if part == "attn.proj" and is_kernel else None
    if num_heads:
        value = value.T if is_kernel else value
        return value if axis is None else value.unflatten(axis, (num_heads, -1))
    if axis is not None:
        value = value.flatten(-2) if axis else value.flatten(0, 1)
    return value.T if is_kernel else value


def _hf_config(file: Path) -> dict:
    """What config.json and preprocessor_config.json beside a file say, in this project's words."""
    beside = (file.with_name(name) for name in ("config.json", "preprocessor_config.json"))
    theirs, pixels = (read_json(f, "fetch it again, or move it away") if f.is_file() else {} for f in beside)
    config = {ours: theirs[name] for name, ours in HF_CONFIG.items() if name in theirs}
    if (act := theirs.get("hidden_act", "gelu")) not in ("gelu", "quick_gelu"):
        raise InputError(f"{file.with_name('config.json')} asks for the activation {act!r}: give one of (quick_)gelu")
    config |= {"quick_gelu": True} if act == "quick_gelu" else {}
    if size := theirs.get("image_size"):
        config["img_size"] = list(size) if isinstance(size, list) else [size, size]
    if not pixels.get("do_normalize", True):
        return config | {"mean": [0.0] * 3, "std": [1.0] * 3}
    return config | {name: pixels[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in pixels}


def _check_parts(state: dict, config: dict, file) -> None:
    """Refuse other kinds of ViT in true words, and sizes that contradict each other or that nobody has."""
    lacking = [words for name, words in LACKING.items() if any(re.match(name, key) for key in state)]
    lacking += [words for name, words in NEEDED.items() if name not in state]
    pos_embed, weight = state.get("pos_embed"), state[PATCHES]
    if not lacking and (pos_embed.ndim != 3 or weight.ndim != 4 or pos_embed.shape[2] != len(weight)):
        lacking = [f"a position table of {tuple(pos_embed.shape)} and patches of {tuple(weight.shape)}"]
    if lacking:
        raise InputError(f"{file} is a ViT with {', '.join(lacking)}, which has no place here: give a plain ViT")
    rows, patch = pos_embed.shape[1], weight.shape[2]
    blocks = {int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)}
    depth = int(config.get("depth", max(blocks, default=-1) + 1))
    if rows > LARGEST["positions"] or depth > LARGEST["depth"]:
        raise InputError(f"{file} has {rows:,} positions and {depth:,} blocks, more than any ViT: it is refused")
    if size := config.get("img_size"):
        high, wide = ((side - patch) // config.get("stride", patch) + 1 for side in size)
        if 1 + high * wide != rows:
            raise InputError(
                f"{file} holds pos_embed with {rows} rows, and its config makes {1 + high * wide} of {size} px"
            )
    if absent := set(range(depth)) - blocks:
        raise InputError(f"{file} lacks blocks.{min(absent)} as a whole: it has {len(blocks)} blocks of {depth}")


def read_config(file: str | Path, content: dict) -> dict:
    """What a file of ours says of its model, in a .pth or a safetensors header; empty for the files of others."""
    config = content.get("config")
    if Path(file).suffix == ".safetensors":
        try:
            config = {"kind": ""} | json.loads(read_safetensors_header(file).get("config", "{}"))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{file} has a config in its header that is no JSON object: fetch it again") from error
        config = {name: value for name, value in config.items() if value != ""}
    elif not isinstance(config, dict) or "kind" not in config:
        return {}
    _check_config(config, file)
    return config


def _check_config(config: dict, file) -> None:
    """Refuse sizes that are none, before anything of that size is built."""
    size, most = config.get("img_size", (1, 1)), LARGEST["positions"]
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
    numbers = [(name, config.get(name, 1)) for name in LARGEST] + [("img_size", side) for side in sides]
    for name, value in numbers:
        if type(value) is not int or not 0 < value <= LARGEST.get(name, most):
            raise InputError(f"{file} says {name} {str(value)[:40]} in its config, which no model has: it is refused")
    step = min(config.get("patch_size", most), config.get("stride", most))
    if sides[0] * sides[-1] // step**2 > most:
        raise InputError(f"{file} says {size} px in its config, more patches than any ViT has: it is refused")
    for name in ("mean", "std"):
        values = config.get(name, (1, 1, 1))
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(abs(v) < 1e3 for v in values):
            raise InputError(f"{file} says {name} {str(values)[:40]} in its config: it must be three numbers")


def load_pretrained(model: torch.nn.Module, found: Pretrained, file, resized: list[str]) -> str:
    """Copy an encoder's tensors into a model of the same names and say what matched; `resized`: those of another size
    before. InputError: a block is not whole, below 95% of the tensors, shapes differ, or parts that this one lacks."""
    own = model.state_dict()
    if unknown := [k for k in found.state if k not in own]:
        words = f"parts that this encoder lacks ({len(unknown)} tensors, first {unknown[0]})"
        raise InputError(f"{file} is a ViT with {words}, so its features would be others: give a plain ViT")
    table = load_weights(model, found.state, file, needed="95%", resized=resized, ignored=found.ignored)
    return f"  {found.origin}, {len(found.state) / len(own):.0%} of the encoder\n{table}"
