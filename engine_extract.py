"""Images through a frozen encoder: embeddings in input order, in memory or as a resumable file."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from datasets.items import WholeImages
from util.cli import Progress
from util.dist import Parts, init_worker, is_main_process, run_lock
from util.files import read_array, read_json, write_atomic, write_json

PART_IMAGES = 4096
Encode = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


@torch.inference_mode()
def extract_batches(
    encode: Encode, images: WholeImages, device: torch.device, *, batch_size: int, num_workers: int,
    amp_dtype: torch.dtype | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], dict[int, str]]]:  # fmt: skip
    """Yield (indices [n], {name: float32 [n, D] or [n, L, D]}, {index: problem}) batch by batch.

    `encode` gets the images on the device and their numbers [n] int64 on the CPU. Rows of unreadable images are NaN,
    so that nobody takes them for features.
    """
    loading = {"num_workers": num_workers, "pin_memory": device.type == "cuda", "worker_init_fn": init_worker}
    for imgs, index, problem in DataLoader(images, batch_size, **loading):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            features = encode(imgs.to(device, non_blocking=True), index)
        # contiguous: a class token is a view that would keep the tokens of all patches in memory
        rows = {name: values.float().cpu().contiguous().numpy() for name, values in features.items()}
        problems = {int(i): p for i, p in zip(index, problem) if p}
        for values in rows.values():
            values[[bool(p) for p in problem]] = np.nan
        yield index.numpy(), rows, problems


def extract_features(
    encode: Encode, images: WholeImages, device: torch.device, progress: Progress, **loading
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """All of `extract_batches` in memory: ({name: float32 [len(images), ...]}, {index: problem})."""
    parts: list[dict[str, np.ndarray]] = []
    problems: dict[int, str] = {}
    for index, rows, bad in extract_batches(encode, images, device, **loading):
        parts.append(rows)
        problems |= bad
        progress.update(progress.done + len(index))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, problems


def extract_to_file(
    encode: Callable[[torch.Tensor], torch.Tensor], images: WholeImages, device: torch.device, output: Path,
    job: dict, *, dtype: type = np.float32, **loading,
) -> tuple[tuple[int, ...], dict[int, str]] | None:  # fmt: skip
    """Embeddings of `images` as OUTPUT.npy, row for row; the ranks share the work, a killed run goes on.

    Args:
        encode: uint8 [n, 3, H, W] -> [n, D] or [n, L, D].
        job: what the file depends on; parts of another job are refused.
        loading: batch_size, num_workers, amp_dtype of `extract_batches`.
    Returns:
        (shape, {index: problem}) on rank 0, None elsewhere.
    """
    folder = output.with_name(output.name + ".parts")
    with run_lock(folder):
        parts = Parts(folder, job, "unfinished extraction", len(images), PART_IMAGES, ".npy")
        progress = Progress("images", parts.items_to_do(), shown=is_main_process())
        for start in parts.todo:
            chosen = WholeImages(images.paths, images.indices[start : parts.stop(start)], images.size)
            features, problems = extract_features(
                lambda imgs, _: {"": encode(imgs)}, chosen, device, progress, **loading
            )
            values = features[""].astype(dtype)
            write_json(parts.file(start).with_suffix(".json"), problems)
            write_atomic(parts.file(start), lambda opened, v=values: np.save(opened, v))
        progress.close()
        if not parts.complete():
            return None
        again = f"remove {folder} and run the same command again"
        first = read_array(parts.file(0), again)
        shape = (parts.total, *first.shape[1:])
        about = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}

        def join(opened) -> None:  # in order: a memory map would end in SIGBUS where the disk is full
            np.lib.format.write_array_header_1_0(opened, about)
            for start in parts.starts:
                opened.write(read_array(parts.file(start), again).tobytes())

        write_atomic(output.with_name(output.name + ".npy"), join)
        bad = [read_json(parts.file(start).with_suffix(".json"), again) for start in parts.starts]
        parts.remove()
        return shape, {int(index): problem for part in bad for index, problem in part.items()}
