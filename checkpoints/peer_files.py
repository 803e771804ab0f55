"""Writers of others' files: one function a peer, each `(source, output, input_size)` -> what was written.

They return (tensors by name as written, lines that load them in the peer, a remark); `checkpoints.peers`
checks before and after.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from checkpoints.reference import reference_of
from models_vit import ENCODER_SIZES, VisionTransformer
from util.checkpoint import write_safetensors, write_torch
from util.errors import InputError
from util.files import write_atomic, write_json
from util.peer_names import google_names, hf_names
from util.pos_embed import resize_pos_embed
from util.pretrained import Pretrained

OURS = "CGD-MAE encoder"
SETR_CROP = (512, 512)
# the name under which SETR looks for its weights in $TORCH_HOME/hub/checkpoints, by its config's model_name
SETR_NAMES = (
    "vit_base_p16_224-4e355ebd.pth (vit_base_patch16_224), jx_vit_base_p16_384-83fb41ba.pth "
    "(vit_base_patch16_384), deit_base_distilled_patch16_384-d0272ac0.pth (deit_base_distilled_path16_384)"
)


@dataclass
class Source:
    """What is converted. state: the encoder's tensors under MAE's names, float32 and contiguous; decoder: the
    same of MAE's decoder, empty where the file has none or the target does not want it."""

    file: Path
    found: Pretrained
    encoder: VisionTransformer
    state: dict[str, torch.Tensor]
    decoder: dict[str, torch.Tensor]

    @property
    def settings(self) -> dict:
        return self.encoder.settings()


def to_mae(source: Source, output: Path, size) -> tuple[dict, str, str]:
    """{"model": encoder, and MAE's decoder where there is one}: facebook's file."""
    state = source.state | source.decoder
    write_torch(output, {"model": state})
    strict = "" if source.decoder else ", strict=False"
    load = f"model.load_state_dict(torch.load('{output}', weights_only=True)['model']{strict})"
    what = "encoder and decoder" if source.decoder else "encoder alone: the decoder is drawn anew"
    return state, load, f"{what}; {_pixels(source)}"


def to_timm(source: Source, output: Path, size) -> tuple[dict, str, str]:
    """A bare state dict for timm.create_model(..., checkpoint_path=...)."""
    state, settings = dict(source.state), source.settings
    if settings["pre_norm"]:  # timm's CLIP towers have no such bias
        if state.pop("patch_embed.proj.bias").any():
            raise InputError(
                f"{source.file} has a bias in its patch embedding and a norm before its blocks, and timm has "
                "no model with both: use --to safetensors"
            )
    if output.suffix == ".safetensors":
        write_safetensors(output, state, {"format": "pt", "config": json.dumps(_config(source))})
    else:
        write_torch(output, state)
    name, more = timm_model(settings)
    default = timm.get_pretrained_cfg(name)
    stats = {"mean": tuple(settings["mean"]), "std": tuple(settings["std"])}
    remark = _pixels(source)
    if (tuple(default.mean), tuple(default.std)) != (stats["mean"], stats["std"]):
        more["pretrained_cfg_overlay"] = stats
        remark += f"; timm's default for {name} is mean {_stats(default.mean)}, std {_stats(default.std)}"
    if settings["pre_norm"] and not settings["quick_gelu"]:
        remark += "; of OpenAI's own weights the model is the one with clip_quickgelu in its name"
    arguments = {"num_classes": 0, "checkpoint_path": str(output)} | more
    words = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    return state, f"model = timm.create_model('{name}', {words})", remark


def timm_model(settings: dict) -> tuple[str, dict]:
    """timm's model of these sizes, or its ViT-B with other sizes, and the arguments that it needs."""
    patch, pre_norm, quick = settings["patch_size"], settings["pre_norm"], settings["quick_gelu"]
    kind = ("_clip" + "_quickgelu" * quick) * pre_norm
    more = {} if pre_norm or not quick else {"act_layer": "quick_gelu"}
    name = f"vit_{_size_name(settings)}_patch{patch}{kind}_224"
    if not timm.is_model(name):
        name = f"vit_base_patch16{kind}_224"
        more |= {k: settings[k] for k in ("patch_size", "embed_dim", "depth", "num_heads")}
    if settings["img_size"] != [224, 224]:
        more["img_size"] = tuple(settings["img_size"])
    return name, more


def _size_name(settings: dict) -> str:
    sizes = tuple(settings[name] for name in ("embed_dim", "depth", "num_heads"))
    return next((name for name, row in ENCODER_SIZES.items() if row[:3] == sizes), "")


def to_hf(source: Source, output: Path, size) -> tuple[dict, str, str]:
    """A folder for from_pretrained: weights, config and preprocessor, under the names of transformers 4,
    which 5 reads too."""
    decoder, settings = source.decoder, source.settings
    state = hf_names(source.state, decoder)
    height, width = settings["img_size"]
    config = {
        "architectures": ["ViTMAEForPreTraining" if decoder else "ViTModel"],
        "model_type": "vit_mae" if decoder else "vit",
        "hidden_size": settings["embed_dim"],
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["num_heads"],
        "intermediate_size": len(source.state["blocks.0.mlp.fc1.weight"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width],
        "patch_size": settings["patch_size"],
        "num_channels": 3,
        "qkv_bias": True,
    }
    remark = _pixels(source)
    if decoder:
        config |= _hf_decoder_config(source)
        if "norm_pix_loss" not in source.found.config:
            remark += "; whether it was trained with norm_pix_loss is not known, config.json says no"
    pixels = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": settings["mean"],
        "image_std": settings["std"],
    }
    write_safetensors(output / "model.safetensors", state, {"format": "pt"})
    write_json(output / "config.json", config)
    write_json(output / "preprocessor_config.json", pixels)
    load = "model = transformers." + (
        f"ViTMAEForPreTraining.from_pretrained('{output}')" if decoder
        else f"ViTModel.from_pretrained('{output}', add_pooling_layer=False)"
    )  # fmt: skip
    load += f"\nprocessor = transformers.AutoImageProcessor.from_pretrained('{output}')"
    return state, load, remark


def _hf_decoder_config(source: Source) -> dict:
    known, width = source.found.config, len(source.decoder["decoder_embed.weight"])
    if width % 32 and "decoder_num_heads" not in known:
        raise InputError(
            f"{source.file} has a decoder of width {width} and does not say how many heads: MAE's are 32 wide"
        )
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": 1 + max(
            int(k.split(".")[1]) for k in source.decoder if k.startswith("decoder_blocks.")
        ),
        "decoder_num_attention_heads": known.get("decoder_num_heads", width // 32),
        "decoder_intermediate_size": len(source.decoder["decoder_blocks.0.mlp.fc1.weight"]),
        "mask_ratio": known.get("mask_ratio", 0.75),
        "norm_pix_loss": known.get("norm_pix_loss", False),
    }  # fmt: skip


def to_transreid(source: Source, output: Path, size) -> tuple[dict, str, str]:
    """{"model": the encoder's tensors and no others}: an unknown name is a KeyError there (also in VTB)."""
    write_torch(output, {"model": source.state})
    load = f"python train.py ... MODEL.PRETRAIN_CHOICE \"('imagenet')\" MODEL.PRETRAIN_PATH \"('{output}')\""
    remark = f"{_pixels(source)}: INPUT.PIXEL_MEAN and INPUT.PIXEL_STD of its config (0.5 for its ViTs)"
    return source.state, load, remark


def to_transfg(source: Source, output: Path, size) -> tuple[dict, str, str]:
    """Google's names and shapes in an .npz, as `model.load_from(np.load(FILE))` reads."""
    arrays = google_names(source.state, source.settings["num_heads"])
    write_atomic(output, lambda opened: np.savez(opened, **{k: v.numpy() for k, v in arrays.items()}))
    load = f"python train.py ... --pretrained_dir {output}"
    return arrays, load, f"{_pixels(source)} (TransFG has ImageNet's)"


def to_setr(source: Source, output: Path, size) -> tuple[dict, str, str]:
    """One file for both of its ways: "model" for its cache, with a head that it deletes; "state_dict" for
    load_from, with the position table of the crop."""
    height, width = size or SETR_CROP
    patch = source.settings["patch_size"]
    if height != width or height % patch:
        raise InputError(
            f"--to setr --input_size {height} {width}: SETR's crops are squares of a multiple of the patch "
            f"size {patch}, such as {32 * patch}"
        )
    dim = source.settings["embed_dim"]
    head = {"head.weight": torch.zeros(1000, dim), "head.bias": torch.zeros(1000)}
    grid = (height // patch, width // patch)
    table = resize_pos_embed(source.state["pos_embed"], source.encoder.grid_size, grid, "bilinear")
    crop = source.state | {"pos_embed": table.contiguous()}
    content = {"model": source.state | head, "state_dict": {f"backbone.{k}": v for k, v in crop.items()}}
    write_torch(output, content)
    load = (
        f"model = dict(backbone=dict(random_init=True)); load_from = '{output}'  # config, crop {height}\n"
        f"cp {output} $TORCH_HOME/hub/checkpoints/NAME  # or, without a change of the config"
    )
    remark = f"{_pixels(source)} (its configs have ImageNet's); NAME is by model_name {SETR_NAMES}"
    return content["model"] | content["state_dict"], load, remark


def to_safetensors(source: Source, output: Path, size) -> tuple[dict, str, str]:
    """Our own: MAE's names; in the header the config, and the encoder's answer to the reference pictures."""
    header = {
        "format": "pt",
        "config": json.dumps(_config(source)),
        "reference": json.dumps(reference_of(source.encoder)),
    }
    write_safetensors(output, source.state, header)
    return source.state, f"encoder = models_vit.load_encoder('{output}')", _pixels(source)


def _config(source: Source) -> dict:
    """The fields of a run's encoder.safetensors as far as they are known, and those that build the ViT."""
    origin, settings = source.found.origin, source.settings
    kind = origin if origin == OURS else "encoder of " + origin.removeprefix("encoder of ")
    size = _size_name(settings)
    name = f"mae_vit_{size}_patch{settings['patch_size']}"
    known = {k: source.found.config[k] for k in ("norm_pix_loss", "mask_ratio") if k in source.found.config}
    return ({"model": name} if size else {}) | settings | known | {"kind": kind}


def _pixels(source: Source) -> str:
    return f"pixels: mean {_stats(source.settings['mean'])}, std {_stats(source.settings['std'])}"


def _stats(values) -> str:
    return " ".join(f"{value:.4g}" for value in values)
