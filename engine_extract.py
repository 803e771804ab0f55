"""Images through a frozen encoder: embeddings in input order."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.images import UNREADABLE, open_rgb
from datasets.path_list import PathList
from datasets.transforms import whole_image
from models_vit import VisionTransformer
from util.stop import init_worker

POOLS = ("mean", "cls", "tokens")


class WholeImages(Dataset):
    """Item i -> ([3, H, W] uint8 of the whole picture, index, problem: '' or why it is black)."""

    def __init__(self, paths: PathList, indices: np.ndarray, size: tuple[int, int]):
        self.paths, self.indices, self.size = paths, indices, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int):
        index = int(self.indices[item])
        try:
            return whole_image(open_rgb(self.paths[index]), self.size), index, ""
        except UNREADABLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return torch.zeros(3, *self.size, dtype=torch.uint8), index, reason


@torch.inference_mode()
def extract_batches(
    model: VisionTransformer,
    paths: PathList,
    indices: np.ndarray,
    pools: tuple[str, ...],
    *,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], dict[int, str]]]:
    """Yield (indices [n], {pool: float32 [n, D] or [n, L, D]}, {index: problem}) batch by batch.

    The whole image is scaled to the model's (H, W), nothing is masked or cropped. Rows of unreadable
    images are NaN, so that nobody takes them for embeddings.
    """
    device = model.pos_embed.device
    loader = DataLoader(
        WholeImages(paths, indices, model.img_size),
        batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=init_worker,
    )
    for imgs, index, problem in loader:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            features = model.encode(imgs.to(device, non_blocking=True))
        rows = {pool: features[pool].float().cpu().numpy() for pool in pools}
        problems = {int(i): p for i, p in zip(index, problem) if p}
        for values in rows.values():
            values[[bool(p) for p in problem]] = np.nan
        yield index.numpy(), rows, problems


def extract_features(
    model: VisionTransformer,
    paths: PathList,
    pools: tuple[str, ...],
    *,
    batch_size: int = 128,
    num_workers: int = 2,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """All embeddings in memory: ({pool: [len(paths), ...] float32}, {index: problem})."""
    collected: dict[str, list[np.ndarray]] = {pool: [] for pool in pools}
    problems: dict[int, str] = {}
    done = 0
    for index, rows, bad in extract_batches(
        model,
        paths,
        np.arange(len(paths)),
        pools,
        batch_size=batch_size,
        num_workers=num_workers,
        amp_dtype=amp_dtype,
    ):
        for pool in pools:
            collected[pool].append(rows[pool])
        problems |= bad
        done += len(index)
        progress(done)
    return {pool: np.concatenate(parts) for pool, parts in collected.items()}, problems
