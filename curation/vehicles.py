"""Is this a vehicle seen from outside? CLIP's zero-shot answer (Radford et al., 2021, Sec. 3.1)."""

import json
from pathlib import Path

import numpy as np
import torch

from curation.duplicates import Embedded
from curation.removal import Removal, Removals
from util.errors import InputError

PROMPTS = Path(__file__).with_name("prompts.json")


def read_prompts(file: str | Path | None) -> tuple[list[str], list[str]]:
    """(prompts of what is wanted, prompts of everything else); None: the built-in ones."""
    path = Path(file or PROMPTS)
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
        wanted, other = prompts["vehicle"], prompts["other"]
    except FileNotFoundError as error:
        raise InputError(f"--vehicle_prompts {path} does not exist: give a JSON file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f'--vehicle_prompts {path}: write {{"vehicle": [texts], "other": [texts]}} ({error})'
        ) from error
    if not wanted or not other or not all(isinstance(text, str) for text in [*wanted, *other]):
        raise InputError(f"--vehicle_prompts {path}: both lists must hold texts")
    return wanted, other


def not_vehicles(
    embedded: Embedded,
    rows: np.ndarray,
    count: int,
    texts: torch.Tensor,
    wanted: int,
    tau: float,
    threshold: float,
    device: torch.device,
) -> Removal:
    """Remove images to which the teacher gives the best wanted prompt, against the best of the others, a
    probability below `threshold`.

    Args:
        embedded: of the teacher. rows: int64, of an index of `count`.
        texts: [T, D_t] unit rows, the `wanted` first ones being the wanted prompts. tau: the teacher's
        temperature.
    """
    out = Removals(count)
    texts = texts.to(device)
    for start in range(0, len(rows), 65_536):
        x = torch.from_numpy(embedded.data[embedded.place(rows[start : start + 65_536])]).to(device).float()
        logits = torch.nn.functional.normalize(x, dim=1) @ texts.t() / tau
        # the best prompt of each side speaks for it, so that the numbers of prompts do not matter
        margin = logits[:, :wanted].amax(dim=1) - logits[:, wanted:].amax(dim=1)
        probability = margin.sigmoid().cpu().numpy()
        low = probability < threshold
        out.add("not a vehicle (probability)", rows[start : start + 65_536][low], value=probability[low])
    return out.finish()
