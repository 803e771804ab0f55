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
from safetensors.torch import save

from util.errors import InputError
from util.files import write_atomic

VOCABULARY = Path(__file__).with_name("vocabulary.json")


@dataclass(frozen=True)
class TeacherIdentity:
    """What a text bank or a cache must have been made with; kept in headers as plain values.

    `weights_sha256` also covers what else changes its answers: the activation, size, mean and standard
    deviation of its input. `tau` is the teacher's own temperature, 1 / exp(logit_scale).
    """

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
    """Texts of a .txt (one a line) or .jsonl (key `text`), duplicates removed, order kept."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"--text_bank {file} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    if file.suffix == ".jsonl":
        try:
            lines = [str(json.loads(line)["text"]).strip() for line in lines if line]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"--text_bank {file}: every line must be a JSON object with a key 'text' ({error})"
            ) from error
    texts = list(dict.fromkeys(line for line in lines if line))
    if len(texts) < 2:
        raise InputError(f"--text_bank {file} holds {len(texts)} texts: at least 2 are needed")
    return texts


def is_encoded(text_bank: Path) -> bool:
    """Whether a bank holds embeddings, so that no text tower is needed."""
    return text_bank.suffix == ".safetensors" or text_bank.is_dir()


def read_encoded(text_bank: Path, identity: TeacherIdentity) -> tuple[torch.Tensor, list[str], str]:
    """An encoded bank, file or folder -> (embeddings [T, D_t] float32 CPU unit rows, texts, what it is in words).

    Raises:
        InputError: it is damaged, or another teacher made it.
    """
    embeddings, texts, made_by = (_load_folder if text_bank.is_dir() else _load_file)(text_bank)
    if made_by != asdict(identity):
        raise InputError(
            f"--text_bank {text_bank} was made by teacher {made_by.get('model')} with weights "
            f"{str(made_by.get('weights_sha256'))[:12]}, but this run uses {identity.model} with "
            f"{identity.weights_sha256[:12]}: encode the texts again with this teacher"
        )
    return embeddings, texts, f"{len(texts)} encoded texts of {text_bank}"


def hash_texts(texts: list[str]) -> str:
    """sha256 of the texts, one a line."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def save_bank(file: Path, embeddings: torch.Tensor, texts: list[str], identity: TeacherIdentity) -> None:
    """Write an encoded bank with the identity of its teacher (atomic)."""
    header = {
        "kind": "cgd-mae text bank",
        "texts": "\n".join(texts),
        "texts_sha256": hash_texts(texts),
        "teacher": json.dumps(asdict(identity)),
    }
    data = save({"bank": embeddings.contiguous()}, header)
    write_atomic(file, lambda opened: opened.write(data))


def _load_file(file: Path) -> tuple[torch.Tensor, list[str], dict]:
    """What `save_bank` wrote: (embeddings, texts, teacher)."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if "teacher" not in header:
                raise InputError(f"--text_bank {file} has no teacher in its header: not a text bank")
            return opened.get_tensor("bank").float(), header["texts"].split("\n"), json.loads(header["teacher"])
    except SafetensorError as error:
        raise InputError(f"--text_bank {file} is damaged ({error}): make it again") from error


def _load_folder(folder: Path) -> tuple[torch.Tensor, list[str], dict]:
    """The output of main_describe.py, bank.json, bank.npy and texts.jsonl: (embeddings, texts, teacher)."""
    again = "give the --output of a finished main_describe.py"
    try:
        header = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
        made_by, texts_sha256, bank_sha256 = (header[k] for k in ("teacher", "texts_sha256", "bank_sha256"))
        bank, texts = np.load(folder / "bank.npy", allow_pickle=False), read_texts(folder / "texts.jsonl")
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise InputError(f"--text_bank {folder} is incomplete or damaged ({error}): {again}") from error
    if hash_texts(texts) != texts_sha256:
        raise InputError(
            f"--text_bank {folder}/texts.jsonl has changed since bank.npy was made: {again}, or pass texts.jsonl "
            "itself to have it encoded"
        )
    rows = (len(texts), made_by.get("embed_dim"))
    if hashlib.sha256(bank.tobytes()).hexdigest() != bank_sha256 or bank.shape != rows:
        raise InputError(f"--text_bank {folder}/bank.npy is not the one that bank.json describes: {again}")
    return torch.from_numpy(bank).float(), texts, made_by
