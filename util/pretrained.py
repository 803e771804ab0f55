"""Any published ViT file -> the encoder's tensors under MAE's names.

Recognised: CGD-MAE and MAE (encoder or whole), VehicleMAE, timm and DeiT, DINO and iBOT, MoCo v3, the image
tower of CLIP (OpenAI's and open_clip's names), TransReID (ours and the original), Hugging Face's ViT and
ViTMAE (a file or its folder), Google's ViT (.npz).
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from util.checkpoint import HEAD_KEYS, encoder_state, parts_of, read_checkpoint, read_safetensors_header
from util.errors import InputError
from util.peer_names import CLIP_PATCHES, DECODER, PATCHES, from_clip, under_mae_names

# of several encoders in one file, the one whose name says that it is meant to be used
PREFERRED = ("", "base_encoder", "teacher", "visual", "backbone", "base")
# what heads, decoders and losses of others are called; all else would change the features and is refused
OTHERS = re.compile(
    r"(head|fc|fc_norm|pre_logits|dist_token|head_dist|proj|predictor|decode|mask_token|logit_scale|bottleneck|"
    r"classifier|pooler|b2|sie_embed|center|pos_embed_probs|get_token_probs|proj_encode_feature|distill_head)"
)


@dataclass
class Pretrained:
    """state: {MAE's name: tensor}; origin: what the file is, in words; config: the file's own, or empty;
    ignored: names that the encoder has no use for; decoder: MAE's, where the file has one."""

    state: dict[str, torch.Tensor]
    origin: str
    config: dict
    ignored: list[str] = field(default_factory=list)
    decoder: dict[str, torch.Tensor] = field(default_factory=dict)


def read_pretrained(file: str | Path) -> Pretrained:
    """Read a file of weights and bring its encoder under MAE's names.

    Raises:
        InputError: unreadable, no ViT with class token, or one with parts that this encoder lacks.
    """
    return recognise(read_checkpoint(file), Path(file))


def recognise(content: dict, file: str | Path) -> Pretrained:
    """`read_pretrained` of what `read_checkpoint(file)` has returned."""
    tensors = {k: v for k, v in content["model"].items() if isinstance(v, torch.Tensor)}
    origin, whole, config = under_mae_names(tensors, Path(file))
    config = config | read_config(file, content)
    prefix, patches = _find_encoder(whole, file)
    if "part_layer.norm1.weight" in whole:
        raise InputError(
            f"{file} is a TransFG model: its last block has learned to see selected parts alone, so it is no "
            "encoder any more; give the encoder it was trained from, or a model of --parts off"
        )
    state = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    ignored = [k for k in whole if not k.startswith(prefix)]
    origin = origin or ("MAE" if "decoder_embed.weight" in state else "ViT")
    if any(k.startswith(HEAD_KEYS) for k in state):
        origin = "CGD-MAE"
    if patches == CLIP_PATCHES:
        origin, state = "CLIP", from_clip(state)
    elif prefix == "base." and any(k.startswith("b1.") for k in whole):
        origin, ignored = "TransReID with JPM", [k for k in ignored if not k.startswith("b1.")]
        state |= _last_block(whole)
    elif prefix == "base.":
        origin = "TransReID"
    if "dist_token" in state:  # DeiT: a second token before the patches
        origin = "DeiT"
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], dim=1)
    elif "norm_pre.weight" in state:
        origin = "CLIP"
    if prefix.endswith("base_encoder."):
        origin = "MoCo v3"
    if "patch_embed.proj.bias" not in state:  # CLIP has none
        state["patch_embed.proj.bias"] = torch.zeros(len(state[PATCHES]))
    encoder = {k: v for k, v in encoder_state(state).items() if not OTHERS.match(k)}
    _check_tables(encoder, config, file)
    decoder = {k: v for k, v in state.items() if DECODER.match(k)}
    if list(decoder) == ["mask_token"]:  # iBOT's, which has no decoder
        decoder = {}
    ignored += [k for k in state if k not in encoder]
    return Pretrained(encoder, config.get("kind") or origin, config, ignored, decoder)


def _find_encoder(whole: dict, file) -> tuple[str, str]:
    """(prefix of the encoder's names, name of its patch embedding behind it)."""
    found = {}
    for ending in (PATCHES, CLIP_PATCHES):
        for key in whole:
            prefix = key.removesuffix(ending)
            if key == prefix + ending and (not prefix or prefix.endswith(".")):
                if ending == PATCHES or prefix + "class_embedding" in whole:
                    found.setdefault(prefix, ending)
    if not found:
        raise InputError(
            f"{file} is no ViT encoder: no name in it ends with {PATCHES}, and it starts with "
            f"{', '.join(list(whole)[:3]) or 'nothing'}"
        )

    def rank(prefix: str) -> tuple[int, int]:
        last = prefix.rstrip(".").split(".")
        return min((i for i, name in enumerate(PREFERRED) if name in last), default=len(PREFERRED)), len(last)

    prefix = min(found, key=rank)
    return prefix, found[prefix]


def _last_block(whole: dict) -> dict:
    """The block and norm of TransReID's global branch: the trained ones (the original also keeps those that
    they were copied from in its encoder, ours does not)."""
    last = max(int(k.split(".")[2]) for k in whole if k.startswith("base.blocks."))
    last += "base.norm.weight" not in whole
    block = {f"blocks.{last}.{k[5:]}": v for k, v in whole.items() if k.startswith("b1.0.")}
    return block | {f"norm.{k[5:]}": v for k, v in whole.items() if k.startswith("b1.1.")}


def _check_tables(state: dict, config: dict, file) -> None:
    pos_embed, weight = state.get("pos_embed"), state[PATCHES]
    if pos_embed is None or "cls_token" not in state:
        raise InputError(f"{file} is no ViT with a class token and a position table: it lacks pos_embed or cls_token")
    if size := config.get("img_size"):
        patch = weight.shape[2]
        rows, columns = ((side - patch) // config.get("stride", patch) + 1 for side in size)
        if 1 + rows * columns != pos_embed.shape[1]:
            raise InputError(
                f"{file} holds pos_embed with {pos_embed.shape[1]} rows, and its config says {size[0]} x "
                f"{size[1]} px, which makes {1 + rows * columns}: one of them is of another model"
            )
    blocks = {int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)}
    absent = set(range(config.get("depth", max(blocks, default=0) + 1))) - blocks
    if absent:
        raise InputError(
            f"{file} lacks blocks.{min(absent)} as a whole: it has {len(blocks)} blocks of "
            f"{len(blocks) + len(absent)}, so it was cut or is of another architecture"
        )


def read_config(file: str | Path, content: dict) -> dict:
    """What a file of ours says of its model: `config` in a .pth, or in a safetensors header; empty for the
    files of others, whose entries of that name mean something else."""
    if Path(file).suffix == ".safetensors":
        return json.loads(read_safetensors_header(file).get("config", "{}"))
    config = content.get("config")
    return config if isinstance(config, dict) and "kind" in config else {}


def load_pretrained(model: torch.nn.Module, found: Pretrained, file, resized: list[str]) -> str:
    """Copy an encoder's tensors into a model of the same names; `resized` names those brought to another size before.

    Returns:
        A table: loaded, new (kept at their initial values), resized, ignored.
    Raises:
        InputError: a block is not whole, less than 95% of the encoder's tensors are there, shapes differ, or
            the file has parts inside its encoder that this one lacks.
    """
    own = model.state_dict()
    if unknown := [k for k in found.state if k not in own]:
        raise InputError(
            f"{file} is a ViT with parts that this encoder lacks ({len(unknown)} tensors, first {unknown[0]}), and "
            "without them its features would be others: give a plain ViT"
        )
    if wrong := [k for k, v in found.state.items() if v.shape != own[k].shape]:
        k = wrong[0]
        raise InputError(
            f"{file} holds another architecture: {k} is {tuple(found.state[k].shape)}, the model wants "
            f"{tuple(own[k].shape)} ({len(wrong)} tensors differ); check --model and --input_size"
        )
    new = [k for k in own if k not in found.state]
    share = 1 - len(new) / len(own)
    if share < 0.95:
        raise InputError(
            f"{file} has {len(own) - len(new)} of the encoder's {len(own)} tensors ({share:.0%}, at least "
            f"95% are needed); the first that is missing is {new[0]}"
        )
    if in_block := next((k for k in new if k.startswith("blocks.")), None):
        raise InputError(f"{file} lacks {in_block}: a block that is random in part would spoil the features")
    model.load_state_dict(found.state, strict=False)
    rows = (("loaded", list(found.state)), ("new", new), ("resized", resized), ("ignored", found.ignored))
    table = [f"  {title:8s} {len(keys):4d} tensors{parts_of(keys)}" for title, keys in rows]
    return "\n".join([f"  {found.origin}, {share:.0%} of the encoder", *table])
