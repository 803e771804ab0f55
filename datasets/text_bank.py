"""Banks of texts: what to say of vehicles, and the encoded form that the distillation reads."""

import hashlib
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from datasets.tables import iterate_table
from util.checkpoint import write_safetensors
from util.errors import InputError

VOCABULARY = Path(__file__).with_name("vocabulary.json")


@dataclass(frozen=True)
class TeacherIdentity:
    """What a text bank or a cache must have been made with; kept in headers as plain values. weights_sha256: also of
    the activation, size, mean and deviation of its input. tau: the teacher's own, 1 / exp(logit_scale)."""

    model: str
    weights_sha256: str
    embed_dim: int
    tau: float


def built_in_texts() -> list[str]:
    """Every template of `vocabulary.json` filled with every combination of the words it names."""
    vocabulary = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    texts = []
    for template in vocabulary["templates"]:
        names = re.findall(r"{(\w+)}", template)
        for words in itertools.product(*(vocabulary["words"][name] for name in names)):
            text = template.format(**dict(zip(names, words)))
            texts.append(re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text))
    return list(dict.fromkeys(texts))


def read_texts(file: Path) -> list[str]:
    """Texts of a .txt (one a line) or of a table (.jsonl .csv .tsv, key `text`), duplicates removed, order kept."""
    key = "path" if file.suffix == ".txt" else "text"
    texts = list(dict.fromkeys(row[key].strip() for row in iterate_table(file, key=key)))
    if len(texts) < 2:
        raise InputError(f"--text_bank {file} holds {len(texts)} texts: at least 2 are needed")
    return texts


def is_encoded(text_bank: Path) -> bool:
    """Whether a bank holds embeddings, so that no text tower is needed."""
    return text_bank.suffix == ".safetensors" or text_bank.is_dir()


def read_encoded(text_bank: Path, identity: TeacherIdentity) -> tuple[torch.Tensor, list[str], str]:
    """An encoded bank, a file of `save_bank` or the output folder of main_describe.py (bank.json, bank.npy and
    texts.jsonl) -> (embeddings [T, D_t] float32 CPU unit rows, texts, what it is in words).

    Raises:
        InputError: it is damaged, or another teacher made it.
    """
    is_folder = text_bank.is_dir()
    again = "give the --output of a finished main_describe.py" if is_folder else "make it again"
    try:
        if is_folder:
            header = json.loads((text_bank / "bank.json").read_text(encoding="utf-8"))
            bank = torch.from_numpy(np.load(text_bank / "bank.npy", allow_pickle=False))
            texts = read_texts(text_bank / "texts.jsonl")
        else:
            with safe_open(text_bank, framework="pt") as opened:
                header, bank = dict(opened.metadata() or {}), opened.get_tensor("bank")
            header["teacher"], texts = json.loads(header["teacher"]), header["texts"].split("\n")
        made_by, texts_sha256, bank_sha256 = (header[key] for key in ("teacher", "texts_sha256", "bank_sha256"))
        rows = (len(texts), made_by["embed_dim"])
    except (SafetensorError, ValueError, KeyError, TypeError, EOFError, OSError, RecursionError) as error:
        raise InputError(f"--text_bank {text_bank} is no text bank, or incomplete ({error}): {again}") from error
    if hash_texts(texts) != texts_sha256:
        raise InputError(f"the texts of --text_bank {text_bank} have changed since they were encoded: {again}")
    if bank.shape != rows or hash_bank(bank) != bank_sha256:
        raise InputError(f"--text_bank {text_bank}: its embeddings are not those that its header describes: {again}")
    check_unit(bank, f"--text_bank {text_bank}")
    if made_by != asdict(identity):
        other = f"{made_by.get('model')} with weights {str(made_by.get('weights_sha256'))[:12]}"
        raise InputError(f"--text_bank {text_bank} was made by teacher {other}, not this run's: encode it again")
    return bank.float(), texts, f"{len(texts)} encoded texts of {text_bank}"


def check_unit(bank: torch.Tensor, what: str) -> None:
    """Refuse rows [T, D] that are no unit vectors; NaN is none."""
    odd = ~((bank.float().norm(dim=1) - 1).abs() < 0.01)
    if odd.any():
        counts = f"{int(odd.sum())} of {len(bank)} rows are no unit vectors, first {int(odd.int().argmax())}"
        raise InputError(f"{what}: {counts}")


def hash_bank(bank: torch.Tensor) -> str:
    """sha256 of the numbers."""
    return hashlib.sha256(bank.contiguous().numpy().tobytes()).hexdigest()


def hash_texts(texts: list[str]) -> str:
    """sha256 of the texts, one a line."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def save_bank(file: Path, embeddings: torch.Tensor, texts: list[str], identity: TeacherIdentity) -> None:
    """Write an encoded bank with the identity of its teacher (atomic)."""
    check_unit(embeddings, "what the teacher makes of the texts")
    header = {"kind": "cgd-mae text bank", "texts": "\n".join(texts), "texts_sha256": hash_texts(texts)}
    header |= {"bank_sha256": hash_bank(embeddings), "teacher": json.dumps(asdict(identity))}
    write_safetensors(file, {"bank": embeddings}, header)
