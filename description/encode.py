"""Texts and images through the frozen teacher, stored part by part so that a stopped run goes on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from datasets.eval_images import WholeImages
from datasets.text_bank import hash_texts
from models_teacher import FrozenTeacher, encode_texts
from util.errors import InputError
from util.files import write_atomic, write_json
from util.parallel import claim
from util.progress import Progress
from util.stop import init_worker

PART = 4096  # rows of one stored part


def embed_texts(clip, tokenizer, texts: list[str], folder: Path, batch_size: int) -> torch.Tensor:
    """[T, D] float32 unit rows on the CPU, stored in `folder`."""

    def compute(start: int, end: int):
        return encode_texts(clip, tokenizer, texts[start:end], batch_size).cpu().numpy(), {}

    rows, _ = _stored(folder, {"texts": hash_texts(texts)}, len(texts), compute, "texts")
    return torch.from_numpy(rows)


def embed_images(
    teacher: FrozenTeacher, paths, indices: np.ndarray, folder: Path, *, batch_size: int, num_workers: int
) -> tuple[torch.Tensor, dict[int, str]]:
    """Whole images, as `--teacher_view full` shows them to the teacher.

    Returns:
        ([n, D] float32 on the CPU, unreadable rows NaN; {row: what was wrong}).
    """
    device = teacher.mean.device

    def compute(start: int, end: int):
        loader = DataLoader(
            WholeImages(paths, indices[start:end], teacher.size),
            batch_size,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=init_worker,
        )
        rows, problems = [], []
        for imgs, _, problem in loader:
            rows.append(teacher(imgs.to(device, non_blocking=True)).cpu())
            problems += problem
        values = torch.cat(rows).numpy()
        values[[bool(p) for p in problems]] = np.nan
        return values, {str(start + i): p for i, p in enumerate(problems) if p}

    header = {
        "images": paths.sha256(),
        "root": str(Path(paths.root).resolve()),
        "chosen": hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest(),
    }
    rows, problems = _stored(folder, header, len(indices), compute, "images")
    return torch.from_numpy(rows), {int(row): problem for row, problem in problems.items()}


def mean_of_wordings(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Average of each description's normalised wordings, renormalised (CLIP's prompt ensembling).

    Args:
        rows: [sum(sizes), D] unit rows, description after description.
    """
    return torch.stack([F.normalize(part.mean(dim=0), dim=0) for part in rows.split(sizes)])


def _stored(folder: Path, header: dict, total: int, compute: Callable, what: str):
    """Rows in parts of `PART`: read what an earlier run stored, compute and store the rest."""
    header = header | {"rows": total, "part": PART}
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
    folder = folder / f"{what}-{key}"
    claim(folder / "header.json", header, f"set of {what}")
    starts = range(0, total, PART)
    files = [folder / f"part{start // PART:05d}.npy" for start in starts]
    done = sum(min(PART, total - start) for start, file in zip(starts, files) if file.is_file())
    progress = Progress(what, total, done)
    rows, problems = [], {}
    for start, file in zip(starts, files):
        end = min(start + PART, total)
        beside = file.with_suffix(".json")
        if file.is_file():
            values = _read_part(file, end - start)
            problems |= json.loads(beside.read_text()) if beside.is_file() else {}
        else:
            values, bad = compute(start, end)
            if bad:
                write_json(beside, bad)
            write_atomic(file, lambda opened, v=values: np.save(opened, v))
            problems |= bad
            done += end - start
            progress.update(done)
        rows.append(values)
    progress.close()
    return np.concatenate(rows), problems


def _read_part(file: Path, rows: int) -> np.ndarray:
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}): remove it, it will be computed again") from error
    if values.ndim != 2 or len(values) != rows or values.dtype != np.float32:
        raise InputError(f"{file} does not hold {rows} rows of float32: remove it, it will be computed again")
    return values
