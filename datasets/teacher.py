"""What a teacher leaves on the disk: encoded banks of texts, embeddings of exactly the views that training draws."""

import hashlib
import itertools
import json
import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from datasets.images import Unreadable
from datasets.tables import iterate_table
from util.checkpoint import write_safetensors
from util.errors import InputError
from util.files import read_json, write_atomic, write_json

VOCABULARY = Path(__file__).with_name("vocabulary.json")
HEADER = "cache.json"
SHARD_IMAGES = 10_000
NPY_HEADER = 128  # bytes before the rows
SHRINK = 0.1  # of the mean variance, added in whitening: directions that hardly vary are noise
AGAIN = "run the same python -m tools.reinforce command again to complete it"


@dataclass(frozen=True)
class TeacherIdentity:
    """What a text bank or a cache must have been made with; kept in headers as plain values. weights_sha256: of
    weights, activation, and size, mean and deviation of its input. tau: the teacher's own, 1 / exp(logit_scale)."""

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
    """A file of `save_bank` or the output folder of main_describe.py -> (embeddings [T, D_t] float32 CPU unit rows,
    texts, what it is in words); InputError where it is damaged, or another teacher made it."""
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
    if odd := (~((bank.float().norm(dim=1) - 1).abs() < 0.01)).nonzero()[:, 0].tolist():
        raise InputError(f"{what}: {len(odd)} of {len(bank)} rows are no unit vectors, first {odd[0]}")


def hash_bank(bank: torch.Tensor) -> str:
    return hashlib.sha256(bank.contiguous().numpy().tobytes()).hexdigest()


def hash_texts(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def save_bank(file: Path, embeddings: torch.Tensor, texts: list[str], identity: TeacherIdentity) -> None:
    """Write an encoded bank with the identity of its teacher (atomic)."""
    check_unit(embeddings, "what the teacher makes of the texts")
    header = {"kind": "cgd-mae text bank", "texts": "\n".join(texts), "texts_sha256": hash_texts(texts)}
    header |= {"bank_sha256": hash_bank(embeddings), "teacher": json.dumps(asdict(identity))}
    write_safetensors(file, {"bank": embeddings}, header)


class TeacherCache:
    """Reads `view<k>_shard<s>.npy` files ([up to SHARD_IMAGES, D_t] float16, unit rows; of zeros: the picture could not
    be read). Epoch e trains on view e mod K: crop and flip are a function of (seed, view, index), so nothing but the
    embedding needs storing. With the teacher view "full" there is one vector an image."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / HEADER).is_file():
            raise InputError(f"--teacher_cache {folder} holds no {HEADER}: build it with python -m tools.reinforce")
        self.header = read_json(self.folder / HEADER, "build the cache again with python -m tools.reinforce")
        self.identity = TeacherIdentity(**self.header["teacher"])
        self.is_full, self.num_views = self.header["teacher_view"] == "full", self.header["views"]
        files = [shard_file(self.folder, *shard) for shard in shards(self.header)]
        if missing := sum(not file.is_file() for file in files):
            what = f"{missing} of {len(files)} files are missing"
            raise InputError(f"--teacher_cache {folder} is unfinished: {what}; {AGAIN}")
        for shard in shards(self.header):
            read_shard(self.folder, self.header, *shard)

    def view_of(self, epoch: int) -> int:
        """The view that epoch e trains on; where the teacher saw whole images, every epoch draws new crops."""
        return epoch if self.is_full else epoch % self.num_views

    def read(self, epoch: int, index: int) -> torch.Tensor:
        """[D_t] float16: the teacher's embedding of this image in this epoch's view; raises `Unreadable`."""
        size, file = 2 * self.identity.embed_dim, shard_file(self.folder, epoch % self.num_views, index)
        with open(file, "rb") as opened:  # not as a memory map, which ends the process where a file is cut short
            data = os.pread(opened.fileno(), size, NPY_HEADER + index % SHARD_IMAGES * size)
        if not any(data):
            raise Unreadable(f"no embedding in the teacher cache: {AGAIN}")
        return torch.frombuffer(bytearray(data), dtype=torch.float16)

    def whitening(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [D_t], map [D_t, D_t]) float32 over the embeddings of the first view.

        (f - mean) map is centred and varies alike in all directions: map = V (E + SHRINK mean(E))^(-1/2) V^T of the
        covariance V E V^T, as PHI-S (Ranzinger et al., 2024) treats its teachers: few directions carry most of a CLIP's
        variance.
        """
        width = self.identity.embed_dim
        count, total, products = 0, np.zeros(width), np.zeros((width, width))
        for view, first in shards(self.header):
            if view == 0:
                rows = read_shard(self.folder, self.header, view, first).astype(np.float64)
                rows = rows[rows.any(axis=1)]
                count, total, products = count + len(rows), total + rows.sum(axis=0), products + rows.T @ rows
        if count < 2:
            raise InputError(f"{self.folder} holds {count} embeddings: --teacher_norm needs at least 2")
        mean = total / count
        values, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
        values = values.clip(0)
        scale = (vectors * (values + SHRINK * values.mean()) ** -0.5) @ vectors.T
        return torch.from_numpy(mean).float(), torch.from_numpy(scale).float()

    def check(self, expected: dict) -> None:
        """Refuse a cache made for something else: `expected` holds entries of its header as this run has them."""
        # an embedding of the whole image does not depend on how the student's crops are drawn
        free, differ = ("seed", "crop_min", "input_size") if self.is_full else (), []
        for key in (key for key in expected if key not in free):
            if self.header[key] != expected[key]:
                differ.append(f"{key} {str(self.header[key])[:24]} in the cache, {str(expected[key])[:24]} here")
        if differ:
            cure = "set the flags back or build a cache with python -m tools.reinforce"
            raise InputError(f"--teacher_cache {self.folder} was made for other views ({', '.join(differ)}): {cure}")

    def bank(self, text_bank: str | None):
        """The encoded text bank: the one stored in the cache, or an encoded file of the same teacher."""
        file = Path(text_bank) if text_bank else self.folder / "text_bank.safetensors"
        if not file.exists():
            raise InputError(f"--text_bank {file} does not exist: give an encoded bank, or build the cache again")
        if not is_encoded(file):
            what = "is not encoded and --teacher_cache brings no text tower: pass the texts to tools.reinforce"
            raise InputError(f"--text_bank {file} {what}, or give an encoded bank")
        return read_encoded(file, self.identity)


def shard_file(folder: Path, view: int, index: int) -> Path:
    """Where the embedding of image `index` lies."""
    return folder / f"view{view:03d}_shard{index // SHARD_IMAGES:05d}.npy"


def shards(header: dict) -> list[tuple[int, int]]:
    """(view, first image) of every file."""
    return [(view, first) for view in range(header["views"]) for first in range(0, header["images"], SHARD_IMAGES)]


def write_shard(folder: Path, view: int, first: int, rows: np.ndarray) -> None:
    """rows: [n, D_t] float16, and beside them their checksum."""
    file = shard_file(folder, view, first)
    write_json(file.with_suffix(".json"), {"crc32": zlib.crc32(np.ascontiguousarray(rows))})
    write_atomic(file, lambda opened: np.save(opened, rows))


def read_shard(folder: Path, header: dict, view: int, first: int) -> np.ndarray:
    """[n, D_t] float16; InputError where size, checksum or the length of a row are wrong."""
    file, cure = shard_file(folder, view, first), "remove it and run the same python -m tools.reinforce command again"
    wanted = min(SHARD_IMAGES, header["images"] - first), header["teacher"]["embed_dim"]
    crc = read_json(file.with_suffix(".json"), cure).get("crc32")
    try:
        rows = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is damaged ({error}): {cure}") from error
    if rows.shape != wanted or rows.dtype != np.float16 or zlib.crc32(rows) != crc:
        raise InputError(f"{file} is damaged (its checksum differs): {cure}")
    check_unit(torch.from_numpy(rows[rows.any(axis=1)]), f"{file} is damaged, {cure}")
    return rows
