"""What a model says of every test image: computed once each, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from datasets.eval_images import WholeImages
from datasets.images import UNREADABLE, open_rgb, why_unreadable
from engine_extract import extract_batches
from util.dist import get_rank, get_world_size, is_main_process
from util.errors import InputError
from util.files import write_atomic
from util.progress import Progress


@dataclass(frozen=True)
class Predictions:
    """Of the images that could be read: their rows [n] int64 in the list and the answers [n, D] float32 on
    the CPU. unreadable: `path<tab>reason` of the others."""

    rows: np.ndarray
    values: torch.Tensor
    unreadable: list[str]


@torch.inference_mode()
def predict(
    encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: WholeImages,
    device: torch.device,
    title: str,
    *,
    width: int,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None = None,
) -> Predictions | None:
    """Answers for all images of a list on rank 0; None elsewhere.

    The ranks share out whole batches of one fixed cut of the list, without padding or repeating: every image
    is computed once and in the same company on any number of ranks, so the numbers are equal to the last bit.

    Args:
        encode: ([n, 3, H, W] uint8 on the device, [n] int64 numbers in the list) -> [n, `width`].
        images: all of the list, in its order; a subclass may open them in its own way.
        title: of the progress line and of messages.
    Raises:
        InputError: not one image can be read, or the model answers with numbers that are not finite.
    """
    total, paths = len(images), images.paths
    chunks = np.arange(total) // batch_size
    mine = [np.flatnonzero(chunks % get_world_size() == rank) for rank in range(get_world_size())]
    rows = mine[get_rank()]
    progress = Progress(title, len(rows), shown=is_main_process())
    found, done = [], 0
    for index, answers, bad in extract_batches(
        lambda imgs, index: {"": encode(imgs, index)},
        torch.utils.data.Subset(images, rows.tolist()),
        device,
        batch_size=batch_size,
        num_workers=num_workers,
        amp_dtype=amp_dtype,
    ):
        lost = torch.tensor([[float(int(i) in bad)] for i in index])  # travels with the row
        found.append(torch.cat([torch.from_numpy(answers[""]), lost], dim=1))
        done += len(index)
        progress.update(done)
    progress.close()
    values = torch.cat(found) if found else torch.zeros(0, width + 1)
    values = _on_main(values, mine, total)
    if values is None:
        return None
    lost, values = values[:, -1].numpy() > 0, values[:, :-1]
    if lost.all():
        raise InputError(f"{title}: none of the {total} images could be read, e.g. {paths[0]}")
    readable = np.flatnonzero(~lost)
    finite = torch.isfinite(values[readable]).all(dim=1)
    if not finite.all():
        bad = paths.relative(int(readable[int((~finite).nonzero()[0])]))
        raise InputError(
            f"{title}: the answers for {int((~finite).sum())} images, e.g. {bad}, are not finite: the model "
            "has diverged, or needs --amp none"
        )
    reasons = [f"{paths.relative(i)}\t{_reason(paths[i])}" for i in np.flatnonzero(lost).tolist()]
    return Predictions(readable, values[readable] if reasons else values, reasons)


def _reason(file: Path) -> str:
    try:
        open_rgb(file)
    except UNREADABLE as error:
        return why_unreadable(error)
    return "was unreadable when it was needed"


def _on_main(values: torch.Tensor, rows: list[np.ndarray], total: int) -> torch.Tensor | None:
    """Rows of all ranks put in order on rank 0; they travel one rank at a time."""
    if not is_main_process():
        if len(values):
            dist.send(values.contiguous(), dst=0)
        return None
    whole = torch.empty(total, values.shape[1])
    whole[rows[0]] = values
    for rank in range(1, get_world_size()):
        if len(rows[rank]):
            part = torch.empty(len(rows[rank]), values.shape[1])
            dist.recv(part, src=rank)
            whole[rows[rank]] = part
    return whole


def write_unreadable(names: list[str], folder: Path) -> None:
    """Count the test images that could not be read and list them in a file; nothing where there are none."""
    if names:
        file = folder / "unreadable_test_images.txt"
        write_atomic(file, lambda opened: opened.write("".join(f"{n}\n" for n in sorted(set(names))).encode()))
        print(f"{len(set(names))} test images cannot be read: {file} lists them")
