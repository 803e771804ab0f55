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
FOLDER_FILES = ("bank.json", "bank.npy", "texts.jsonl")


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


def read_encoded(text_bank: Path, identity: TeacherIdentity):
    """An encoded bank, file or folder -> what `build_bank` returns."""
    load = load_bank_folder if text_bank.is_dir() else load_bank
    embeddings, texts = load(text_bank, identity)
    return embeddings, texts, f"{len(texts)} encoded texts of {text_bank}"


def hash_texts(texts: list[str]) -> str:
    """sha256 of the texts, one a line."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def save_bank(file: Path, embeddings: torch.Tensor, texts: list[str], identity) -> None:
    """Write an encoded bank with the identity of its teacher (atomic)."""
    header = {
        "kind": "cgd-mae text bank",
        "texts": "\n".join(texts),
        "texts_sha256": hash_texts(texts),
        "teacher": json.dumps(asdict(identity)),
    }
    data = save({"bank": embeddings.contiguous()}, header)
    write_atomic(file, lambda opened: opened.write(data))


def load_bank(file: Path, identity: TeacherIdentity) -> tuple[torch.Tensor, list[str]]:
    """Read an encoded bank; InputError if it is none or belongs to another teacher."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if "teacher" not in header:
                raise InputError(f"--text_bank {file} has no teacher in its header: not a text bank")
            embeddings = opened.get_tensor("bank").float()
    except SafetensorError as error:
        raise InputError(f"--text_bank {file} is damaged ({error}): make it again") from error
    _check_teacher(file, json.loads(header["teacher"]), identity)
    return embeddings, header["texts"].split("\n")


def load_bank_folder(folder: Path, identity: TeacherIdentity) -> tuple[torch.Tensor, list[str]]:
    """Read the output folder of main_describe.py: bank.json, bank.npy and texts.jsonl.

    Raises:
        InputError: a file is missing or damaged, the three do not belong together, another teacher.
    """
    for name in FOLDER_FILES:
        if not (folder / name).is_file():
            raise InputError(f"--text_bank {folder} has no {name}: give the --output of a finished main_describe.py")
    try:
        header = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
        made_by, texts_sha256, bank_sha256 = (header[k] for k in ("teacher", "texts_sha256", "bank_sha256"))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--text_bank {folder}/bank.json is damaged ({error}): run main_describe.py again") from error
    _check_teacher(folder, made_by, identity)
    texts = read_texts(folder / "texts.jsonl")
    if hash_texts(texts) != texts_sha256:
        raise InputError(
            f"--text_bank {folder}/texts.jsonl has changed since bank.npy was made: run main_describe.py "
            "again, or pass texts.jsonl itself to have it encoded"
        )
    try:
        bank = np.load(folder / "bank.npy", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"--text_bank {folder}/bank.npy is damaged ({error}): run main_describe.py again") from error
    if hashlib.sha256(bank.tobytes()).hexdigest() != bank_sha256 or bank.shape != (len(texts), identity.embed_dim):
        raise InputError(
            f"--text_bank {folder}/bank.npy is not the one that bank.json describes: run main_describe.py again"
        )
    return torch.from_numpy(bank).float(), texts


def _check_teacher(source: Path, made_by: dict, identity: TeacherIdentity) -> None:
    if made_by != asdict(identity):
        raise InputError(
            f"--text_bank {source} was made by teacher {made_by.get('model')} with weights "
            f"{str(made_by.get('weights_sha256'))[:12]}, but this run uses {identity.model} with "
            f"{identity.weights_sha256[:12]}: encode the texts again with this teacher"
        )
