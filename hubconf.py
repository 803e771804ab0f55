"""torch.hub: encoders and whole autoencoders without a clone of one's own.

    encoder = torch.hub.load("ORG/cgd-mae", "encoder", "mae_vit_base")
    features = encoder.embed_images(["car.jpg"])["cls"]                 # [1, 768]
    mae = torch.hub.load("ORG/cgd-mae", "mae", "mae_vit_base_patch16", "mae_vit_base_full",
                         norm_pix_loss=True)

With a folder in place of ORG/cgd-mae add `source="local"`; `model=` and `source=` are torch.hub's own, so the
arguments here have other names. This project has packages `datasets` and `util`: a process that has imported
others of these names (as Hugging Face's `datasets`) cannot load it.
"""

import difflib

# modules, not their functions: torch.hub takes every function of this file for an entry
import models_mae
import models_vit
from util import errors
from util import fetch as downloads

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "tqdm"]


def encoder(checkpoint, **kwargs):
    """An encoder in eval mode with preprocessing and `embed_images`: of a file, a name of util/registry.json, https://...,
    or hf://ORG/REPO/FILE; kwargs: of `models_vit.load_encoder`, as `img_size=(H, W)` in px and `device`."""
    return models_vit.load_encoder(checkpoint, **kwargs)


def mae(name="mae_vit_base_patch16", checkpoint="", **kwargs):
    """A masked autoencoder in eval mode: `name` of `models_mae.MODELS`, weights of a file with a decoder (given as for
    `encoder`) or initial ones; kwargs: of `load_autoencoder`; facebook's files do not say norm_pix_loss=True."""
    if name not in models_mae.MODELS:
        nearest = difflib.get_close_matches(name, models_mae.MODELS, n=1, cutoff=0)
        raise errors.InputError(f"no model {name!r}: did you mean {nearest[0]}? {', '.join(models_mae.MODELS)}")
    if not checkpoint:
        return models_mae.MODELS[name](**kwargs).eval()
    return models_mae.load_autoencoder(downloads.fetch(checkpoint), name, **kwargs)
