"""Any encoder that this project reads -> a file that another project's own loader takes; ONNX.

What is written is float32, contiguous, without Python objects; it is read back, and the tensors are compared before
anybody relies on it. A writer returns (its tensors, the lines that load them there, a remark).
"""

import json
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from finetune.task import load_model
from models_vit import ENCODER_SIZES, FEATURES, encoder_from
from util.checkpoint import not_finite, read_checkpoint, write_safetensors, write_torch
from util.errors import InputError
from util.fetch import fetch, weights_file
from util.files import write_atomic, write_json
from util.pos_embed import resize_pos_embed
from util.pretrained import read_pretrained, recognise, under_others_names

ONE_FILE_BYTES = 1 << 30  # more goes to NAME.onnx.data beside it: ONNX files end at 2 GiB
TOLERANCE = 1e-3  # |onnx - torch| / |torch| of a feature
PIXELS = "mean {:.4g} {:.4g} {:.4g}, std {:.4g} {:.4g} {:.4g}"
SETR_CROP = (512, 512)
# the name under which SETR looks for its weights in $TORCH_HOME/hub/checkpoints, by its config's model_name
SETR_NAMES = (
    "vit_base_p16_224-4e355ebd.pth (vit_base_patch16_224), jx_vit_base_p16_384-83fb41ba.pth "
    "(vit_base_patch16_384), deit_base_distilled_patch16_384-d0272ac0.pth (deit_base_distilled_path16_384)"
)


class Source:
    """What is converted. state, decoder: MAE's names, float32 and contiguous; the decoder is empty where the file has
    none or the target does not want it. size: --input_size."""

    def __init__(self, file: Path, target: str, size: tuple[int, int] | None):
        self.size, self.found = size, read_pretrained(file)
        self.encoder = encoder_from(self.found, file, None if target == "setr" else size)
        self.settings = self.encoder.settings()
        self.state = {k: v.detach().float().contiguous() for k, v in self.encoder.state_dict().items()}
        if lost := next((name for name in self.state if name not in self.found.state), None):
            raise InputError(f"{file} lacks {lost}, which would be made up in the copy: give a whole encoder")
        decoder = self.found.decoder if target in ("mae", "hf") else {}
        self.decoder = {k: v.float().contiguous() for k, v in decoder.items()}
        if bad := not_finite(decoder):
            raise InputError(f"{file} holds numbers that are not finite in {bad[0]}: its training went wrong")
        why, cure = self._what_has_no_place(target)
        if why:
            raise InputError(f"{file} {why}, which --to {target} has no place for: {cure}")
        self.pixels = "pixels: " + PIXELS.format(*self.settings["mean"], *self.settings["std"])
        sizes = tuple(self.settings[name] for name in ("embed_dim", "depth", "num_heads"))
        self.size_name = next((name for name, row in ENCODER_SIZES.items() if row[:3] == sizes), "")

    def _what_has_no_place(self, target: str) -> tuple[str, str]:
        """(why not, what to do instead), in words; empty where the target takes it."""
        rows, columns = self.encoder.grid_size
        patches = len(self.decoder["decoder_pos_embed"][0]) - 1 if self.decoder else rows * columns
        any_vit, others = target in ("timm", "safetensors"), "use --to timm or safetensors"
        if not any_vit and ("norm_pre.weight" in self.state or self.settings["quick_gelu"]):
            return "is CLIP's kind of ViT (a norm before its blocks, or OpenAI's GELU)", others
        if not any_vit and "fc_norm.weight" in self.state:
            return "has its final norm after the mean over patches (fc_norm)", others
        if rows != columns and not any_vit and (target != "hf" or self.decoder):
            cure = "resize it first, --to safetensors --input_size 224, and convert that file"
            return f"has a position table of {rows} x {columns} patches, no square", cure
        if patches != rows * columns:
            why = f"holds a decoder for {patches} patches, and --input_size makes {rows * columns}"
            return why, "drop --input_size, or give the encoder alone"
        return "", ""


def convert(file: str | Path, target: str, output: str | Path, input_size: tuple[int, int] | None = None) -> dict:
    """Write an encoder as a peer's loader wants it.

    Args:
        file: any file that `load_encoder` takes, or a folder of Hugging Face's. target: one of `TARGETS`.
        output: the file to write; for hf a folder.
        input_size: (H, W) in px that the position table is resized to (bicubic), default the file's own; for
            setr the crop, default 512 x 512 (bilinear, as SETR does), and only where it loads by `load_from`.
    """
    (write, *suffixes), file, output = TARGETS[target], fetch(file), Path(output)
    if suffixes and output.suffix not in suffixes:
        raise InputError(f"--to {target} --output {output}: give a name that ends with {' or '.join(suffixes)}")
    if file.resolve() in (output.resolve(), output.resolve() / file.name):
        raise InputError(f"--to {target} --output {output} is the file that is converted: give another name")
    source = Source(file, target, input_size)
    written, load, remark = write(source, output)
    check_written(weights_file(output), source.state | source.decoder, len(written))
    size = "{} x {}".format(*source.settings["img_size"])
    result = {"source": f"{file} ({source.found.origin})", "output": str(output), "input_size": size}
    return result | {"tensors": len(written), "load": load, "remark": remark}


def check_written(file: Path, wanted: dict[str, torch.Tensor], written: int | None = None) -> None:
    """Read weights back: InputError where a tensor is lost or changed, or where there are not `written`."""
    content = read_checkpoint(file)
    found = recognise(content, file)
    read, count = found.state | found.decoder, len(content["model"]) + len(content.get("state_dict", {}))
    wrong = [k for k in wanted | found.state if k not in wanted or k not in read or not torch.equal(read[k], wanted[k])]
    if wrong or count != (written or count):
        raise InputError(
            f"{file} reads back with {count} tensors of {written or count} written, {len(wrong)} of them changed "
            f"(first {', '.join(wrong[:1]) or 'none'}): disk or memory failed, remove it and try again"
        )


def to_mae(source: Source, output: Path) -> tuple[dict, str, str]:
    """{"model": encoder, and MAE's decoder where there is one}: facebook's file."""
    state = source.state | source.decoder
    write_torch(output, {"model": state})
    strict, what = ", strict=False", "encoder alone: the decoder is drawn anew"
    if source.decoder:
        strict, what = "", "encoder and decoder"
    load = f"model.load_state_dict(torch.load('{output}', weights_only=True)['model']{strict})"
    return state, load, f"{what}; {source.pixels}"


def to_timm(source: Source, output: Path) -> tuple[dict, str, str]:
    """A bare state dict for timm.create_model(..., checkpoint_path=...)."""
    state, settings = dict(source.state), source.settings
    patch, pre_norm, quick = settings["patch_size"], settings["pre_norm"], settings["quick_gelu"]
    if pre_norm:
        del state["patch_embed.proj.bias"]  # timm's CLIP towers have none; CLIP's is 0
    if output.suffix == ".safetensors":
        to_safetensors(source, output, state)
    else:
        write_torch(output, state)
    kind = ("_clip" + "_quickgelu" * quick) * pre_norm
    more = {} if pre_norm or not quick else {"act_layer": "quick_gelu"}
    name = f"vit_{source.size_name}_patch{patch}{kind}_224"
    if not timm.is_model(name):  # its ViT-B with other sizes
        name = f"vit_base_patch16{kind}_224"
        more |= {k: settings[k] for k in ("patch_size", "embed_dim", "depth", "num_heads")}
    if settings.get("fc_norm"):
        more |= {"global_pool": "avg", "fc_norm": True}
    if settings["img_size"] != [224, 224]:
        more["img_size"] = tuple(settings["img_size"])
    default, stats = timm.get_pretrained_cfg(name), {k: tuple(settings[k]) for k in ("mean", "std")}
    remark = source.pixels
    if (tuple(default.mean), tuple(default.std)) != (stats["mean"], stats["std"]):
        more["pretrained_cfg_overlay"] = stats
        remark += f"; timm's default for {name} is {PIXELS.format(*default.mean, *default.std)}"
    if pre_norm and not quick:
        remark += "; of OpenAI's own weights the model is the one with clip_quickgelu in its name"
    arguments = {"num_classes": 0, "checkpoint_path": str(output)} | more
    words = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    return state, f"model = timm.create_model('{name}', {words})", remark


def to_hf(source: Source, output: Path) -> tuple[dict, str, str]:
    """A folder for from_pretrained: weights, config and preprocessor (what differs from their defaults), under the
    names of transformers 4, which 5 reads too."""
    decoder, settings, known = source.decoder, source.settings, source.found.config
    height, width = settings["img_size"]
    model = "ViTMAEForPreTraining" if decoder else "ViTModel"
    config = {
        "architectures": [model], "model_type": "vit_mae" if decoder else "vit", "hidden_size": settings["embed_dim"],
        "num_hidden_layers": settings["depth"], "num_attention_heads": settings["num_heads"],
        "intermediate_size": len(source.state["blocks.0.mlp.fc1.weight"]), "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width], "patch_size": settings["patch_size"],
    }  # fmt: skip
    if decoder:
        dim = len(decoder["decoder_embed.weight"])
        config |= {"mask_ratio": known.get("mask_ratio", 0.75), "norm_pix_loss": known.get("norm_pix_loss", False)}
        config["decoder_hidden_size"] = dim
        config["decoder_num_hidden_layers"] = sum(k.endswith(".norm1.weight") for k in decoder)
        config["decoder_num_attention_heads"] = known.get("decoder_num_heads", dim // 32)  # MAE's are 32 wide
        config["decoder_intermediate_size"] = len(decoder["decoder_blocks.0.mlp.fc1.weight"])
    pixels = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width},
              "resample": 3, "image_mean": settings["mean"], "image_std": settings["std"]}  # fmt: skip
    state = under_others_names(source.state | decoder, "hf", settings["num_heads"])
    write_safetensors(output / "model.safetensors", state, {"format": "pt"})
    write_json(output / "config.json", config)
    write_json(output / "preprocessor_config.json", pixels)  # resample 3: bicubic
    load = f"model = transformers.{model}.from_pretrained('{output}'{'' if decoder else ', add_pooling_layer=False'})"
    load += f"\nprocessor = transformers.AutoImageProcessor.from_pretrained('{output}')"
    unknown = "; whether it was trained with norm_pix_loss is not known, config.json says no"
    return state, load, source.pixels + unknown * (bool(decoder) and "norm_pix_loss" not in known)


def to_transreid(source: Source, output: Path) -> tuple[dict, str, str]:
    """{"model": the encoder's tensors and no others}: an unknown name is a KeyError there (also in VTB)."""
    if "distilled" in str(output.absolute()):  # there a DeiT with one more token, whose table is cut
        raise InputError(f"--to transreid --output {output.absolute()}: choose a path without 'distilled' in it")
    write_torch(output, {"model": source.state})
    load = f"python train.py ... MODEL.PRETRAIN_CHOICE \"('imagenet')\" MODEL.PRETRAIN_PATH \"('{output}')\""
    remark = f"{source.pixels}: INPUT.PIXEL_MEAN and INPUT.PIXEL_STD of its config (0.5 for its ViTs)"
    return source.state, load, remark


def to_transfg(source: Source, output: Path) -> tuple[dict, str, str]:
    """Google's names and shapes in an .npz, as `model.load_from(np.load(FILE))` reads."""
    arrays = under_others_names(source.state, "google", source.settings["num_heads"])
    write_atomic(output, lambda opened: np.savez(opened, **{k: v.numpy() for k, v in arrays.items()}))
    return arrays, f"python train.py ... --pretrained_dir {output}", f"{source.pixels} (TransFG has ImageNet's)"


def to_setr(source: Source, output: Path) -> tuple[dict, str, str]:
    """One file for both of its ways: "model" for its cache, with a head that it deletes; "state_dict" for
    load_from, with the position table of the crop."""
    (height, width), patch = source.size or SETR_CROP, source.settings["patch_size"]
    if height != width or height % patch:
        crops = f"squares of a multiple of the patch size {patch}, such as {32 * patch}"
        raise InputError(f"--to setr --input_size {height} {width}: SETR's crops are {crops}")
    head = {"head.weight": torch.zeros(1000, source.encoder.embed_dim), "head.bias": torch.zeros(1000)}
    grid = (height // patch, width // patch)
    table = resize_pos_embed(source.state["pos_embed"], source.encoder.grid_size, grid, "bilinear")
    crop = source.state | {"pos_embed": table.contiguous()}
    content = {"model": source.state | head, "state_dict": {f"backbone.{k}": v for k, v in crop.items()}}
    write_torch(output, content)
    load = f"model = dict(backbone=dict(random_init=True)); load_from = '{output}'  # config, crop {height}\n"
    load += f"cp {output} $TORCH_HOME/hub/checkpoints/NAME  # or, without a change of the config"
    remark = f"{source.pixels} (its configs have ImageNet's); NAME is by model_name {SETR_NAMES}"
    return content["model"] | content["state_dict"], load, remark


def to_safetensors(source: Source, output: Path, state: dict | None = None) -> tuple[dict, str, str]:
    """Our own: MAE's names; in the header what builds the ViT, and what the source says of its training."""
    known, name, origin = source.found.config, source.size_name, source.found.origin
    config = {"model": f"mae_vit_{name}_patch{source.settings['patch_size']}"} if name else {}
    config |= source.settings | {k: known[k] for k in ("norm_pix_loss", "mask_ratio") if k in known}
    config["kind"] = origin if origin == "CGD-MAE encoder" else "encoder of " + origin.removeprefix("encoder of ")
    write_safetensors(output, state or source.state, {"format": "pt", "config": json.dumps(config)})
    return source.state, f"encoder = models_vit.load_encoder('{output}')", source.pixels


TARGETS = {  # its writer, suffixes of the output; a folder for hf
    "mae": (to_mae, ".pth"), "timm": (to_timm, ".pth", ".safetensors"), "hf": (to_hf,), "transfg": (to_transfg, ".npz"),
    "setr": (to_setr, ".pth"), "transreid": (to_transreid, ".pth"), "safetensors": (to_safetensors, ".safetensors"),
}  # fmt: skip


class _Features(nn.Module):
    """images -> cls, mean, tokens of an encoder, or the embedding of a model that may want `ids` of camera and view."""

    def __init__(self, model: nn.Module, ids: list[str]):
        super().__init__()
        self.model, self.ids = model, ids

    def forward(self, images, *ids):
        found = self.model.encode(images, **dict(zip(self.ids, ids)))
        return tuple(found[name] for name in FEATURES) if isinstance(found, dict) else (found,)


def export_onnx(file: str | Path, output: str | Path, input_size: tuple[int, int] | None = None) -> dict:
    """Write `output` (.onnx): uint8 pictures [N, 3, H, W] RGB in, any N, resized to the model's H x W
    (`datasets.transforms.whole_image`), features out; it is compared with torch under onnxruntime before it is kept.

    Args:
        file: what `load_encoder` reads, or a model.pth of `--task reid`. input_size: (H, W) of an encoder in px.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise InputError(f"no package {error.name}: pip install onnx onnxscript onnxruntime") from error
    output = Path(output)
    if output.suffix != ".onnx":
        raise InputError(f"--output {output}: give a file name that ends in .onnx")
    found = load_model(file, img_size=input_size)
    kind, base, ids, outputs = found.config.get("kind", "encoder"), found.model, [], FEATURES
    if found.task == "reid":
        base, outputs, known = base.base, ("embedding",), base.config
        ids = [name for name, count in (("camids", known.cameras), ("viewids", known.views)) if count]
    elif found.task:
        raise InputError(f"{file} is a {kind}: only encoders and models of --task reid go to ONNX")
    model, (height, width) = _Features(found.model, ids).eval(), base.img_size
    generator = torch.Generator().manual_seed(0)
    inputs = {"images": torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8, generator=generator)}
    inputs |= {name: torch.zeros(5, dtype=torch.int64) for name in ids}
    batch = {0: torch.export.Dim("batch", min=1)}
    shapes: dict = {"images": batch} | ({"ids": (batch,) * len(ids)} if ids else {})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
        names = {"input_names": list(inputs), "output_names": list(outputs)}
        program = torch.onnx.export(program, **names, dynamo=True, verbose=False)
    external = sum(p.numel() * 4 for p in model.parameters()) > ONE_FILE_BYTES
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        program.save(written, external_data=external)
        largest = _largest_difference(model, onnxruntime.InferenceSession(written), inputs)
        if not largest < TOLERANCE:  # also NaN
            raise InputError(
                f"{file} gives other features under onnxruntime {onnxruntime.__version__} (relative difference "
                f"{largest:.2g}, at most {TOLERANCE}): nothing was written; try other versions of torch and onnxruntime"
            )
        pixels = f"RGB uint8 [N, 3, {height}, {width}], resized whole by an antialiased bicubic filter"
        config = json.dumps(found.config if found.task else base.settings())
        facts = {"kind": kind, "config": config, "largest_difference": f"{largest:.3g}", "preprocessing": pixels}
        program.model.metadata_props.update(facts)
        program.save(written, external_data=external)
        for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights first, then what needs them
            os.replace(part, output.with_name(part.name))
    return {"outputs": list(outputs), "largest_difference": largest, "bytes": output.stat().st_size}


@torch.inference_mode()
def _largest_difference(model, session, inputs: dict) -> float:
    """Largest |onnx - torch| / |torch| of a feature, in batches of one and of all."""
    differences, expected = [], model(*inputs.values())
    for rows in (slice(0, 1), slice(None)):
        found = session.run(None, {name: value[rows].numpy() for name, value in inputs.items()})
        for ours, theirs in zip(expected, found):
            a, b = ours[rows].flatten(1).numpy(), theirs.reshape(len(theirs), -1)
            differences.append(np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1))
    return float(np.concatenate(differences).max())
