"""The threshold above which a search says that it has found the vehicle: how it was chosen, and for which model."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from metrics.open_set import FARS, SPLITS
from metrics.reid import Protocol
from metrics.whitening import Whitening
from util.checkpoint import weights_sha256, write_safetensors
from util.errors import InputError

OPEN_SET = "open_set.safetensors"


def open_lines(protocol: Protocol, numbers: dict[str, float], args) -> list[str]:
    """What `open_numbers` says, in words."""
    shares = (f"{100 * share:g}" for share in FARS)
    found = (
        f"DIR at FAR {share}% {100 * numbers[f'DIR_{share}']:.1f} "
        f"({100 * numbers[f'DIR_{share}_low']:.1f} to {100 * numbers[f'DIR_{share}_high']:.1f})"
        for share in shares
    )
    asked, far = f"{numbers['known']:,} known and {numbers['unknown']:,} unknown queries", 100 * args.far
    t = numbers["threshold"]
    few = f"no threshold: {numbers['unknown']:,} unknown queries are too few to promise it"
    chosen = f"threshold {t:.4f} on all of them" if np.isfinite(t) else few
    measured = f"measured {100 * numbers['FAR']:.2f}% +- {100 * numbers['FAR_std']:.2f}"
    return [
        f"open set, {protocol.name}, by {args.open_score}: {asked}",
        f"  {'  '.join(found)}  AUROC {100 * numbers['AUROC']:.1f}",
        f"  promised FAR {far:g}%: {measured} on vehicles not used to choose ({SPLITS} halves); {chosen}",
    ]


def model_identity(model: nn.Module) -> dict:
    """Weights and preprocessing of a re-id model, or of a plain encoder, whose class token is the feature."""
    is_reid = hasattr(model, "base")
    settings = (model.base if is_reid else model).settings()
    settings = {name: settings[name] for name in ("img_size", "mean", "std", "stride") if name in settings}
    return {"model_sha256": weights_sha256(model.state_dict(), settings), "feature": "reid" if is_reid else "cls"}


def write_open_set(file: Path, threshold: float, facts: dict, white: Whitening | None) -> None:
    """The threshold [1] float64, and `mean` [D], `scale` [D, D] where features are whitened before; facts: what it
    belongs to."""
    tensors = {"threshold": torch.tensor([threshold], dtype=torch.float64)} | (white._asdict() if white else {})
    write_safetensors(file, tensors, {"kind": "cgd-mae open set", "facts": json.dumps(facts)})


class OpenSet(NamedTuple):
    """threshold: what a score must exceed. facts: far, score, feature, gallery (its size) ... white: or None."""

    threshold: float
    facts: dict
    white: Whitening | None


def read_open_set(file: str | Path, identity: dict) -> OpenSet:
    """What `write_open_set` has written; InputError for a damaged file, and where another model chose it."""
    try:
        with safe_open(file, framework="pt") as opened:
            facts, tensors = json.loads(opened.metadata()["facts"]), {k: opened.get_tensor(k) for k in opened.keys()}
        threshold = tensors["threshold"].item()
        white = Whitening(tensors["mean"], tensors["scale"]) if "mean" in tensors else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        cure = f"give the {OPEN_SET} of main_finetune.py --task reid --eval --open_set"
        raise InputError(f"{file} holds no threshold ({error}): {cure}") from error
    if different := ", ".join(key for key in identity if facts.get(key) != identity[key]):
        cure = "choose one for this model with main_finetune.py --task reid --eval --open_set"
        raise InputError(f"{file} was chosen with another model (its {different} differ): {cure}")
    if not np.isfinite(threshold):
        raise InputError(f"{file}: too few queries to promise --far {facts['far']}: label more, or promise less")
    return OpenSet(threshold, facts, white)
