"""The text side of the teacher: texts of vehicles -> one unit vector each."""

import hashlib
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models_teacher import TeacherIdentity, encode_texts
from util.checkpoint import write_safetensors
from util.errors import InputError

VOCABULARY = Path(__file__).with_name("vocabulary.json")


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
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
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


def build_bank(text_bank: str | None, clip, tokenizer, identity: TeacherIdentity):
    """The bank U of the distillation.

    Args:
        text_bank: .txt or .jsonl of texts, an encoded bank (.safetensors), or None for the
            built-in vehicle vocabulary.
        clip, tokenizer, identity: the teacher; only used to encode where the file is not encoded.
    Returns:
        (embeddings [T, D_t] float32 CPU unit rows, texts, one line that says what it is).
    Raises:
        InputError: no such file, too few texts, or a bank that another teacher made.
    """
    if text_bank is None:
        texts, source = built_in_texts(), "built-in vehicle vocabulary"
    else:
        file, source = Path(text_bank), str(text_bank)
        if not file.is_file():
            raise InputError(f"--text_bank {file} does not exist: give texts, one a line (.txt)")
        if file.suffix == ".safetensors":
            embeddings, texts = load_bank(file, identity)
            return embeddings, texts, f"{len(texts)} encoded texts of {source}"
        if file.suffix not in (".txt", ".jsonl"):
            raise InputError(f"--text_bank {file}: the ending must be .txt, .jsonl or .safetensors")
        texts = read_texts(file)
    embeddings = encode_texts(clip, tokenizer, texts).cpu()
    return embeddings, texts, f"{len(texts)} texts of {source}"


def save_bank(file: Path, embeddings: torch.Tensor, texts: list[str], identity) -> None:
    """Write an encoded bank with the identity of its teacher (atomic)."""
    joined = "\n".join(texts)
    header = {
        "kind": "cgd-mae text bank",
        "texts": joined,
        "texts_sha256": hashlib.sha256(joined.encode()).hexdigest(),
        "teacher": json.dumps(asdict(identity)),
    }
    write_safetensors(file, {"bank": embeddings}, header)


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
    made_by = json.loads(header["teacher"])
    if made_by != asdict(identity):
        raise InputError(
            f"--text_bank {file} was made by teacher {made_by['model']} with weights "
            f"{made_by['weights_sha256'][:12]}, but this run uses {identity.model} with "
            f"{identity.weights_sha256[:12]}: encode the texts again with this teacher"
        )
    return embeddings, header["texts"].split("\n")
