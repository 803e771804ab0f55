"""Scoring a re-identification model: features of every test image, then the set's protocol."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from datasets.images import UNREADABLE, open_rgb, why_unreadable
from datasets.reid import ReidData, ReidImages
from engine_extract import WholeImages, extract_batches
from models_transreid import TransReID
from util.checkpoint import write_atomic
from util.dist import get_rank, get_world_size, is_main_process, wait_for_main
from util.errors import InputError
from util.progress import Progress
from util.protocols import Protocol, evaluate


@dataclass(frozen=True)
class Features:
    """Images that could be read, [n, D] float32 of them on the CPU, and of the others `path<tab>reason`."""

    images: ReidImages
    values: torch.Tensor
    unreadable: list[str]


@dataclass(frozen=True)
class TestResult:
    """One test of a set: its protocol, the numbers, and what they were made from."""

    protocol: Protocol
    metrics: dict[str, float]
    query: Features
    gallery: Features | None


@torch.inference_mode()
def extract_reid(
    model: TransReID,
    images: ReidImages,
    title: str,
    *,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None = None,
) -> Features | None:
    """Features for search, [n, D], on rank 0; None elsewhere.

    The ranks share out whole batches of one fixed cut of the list, without padding or repeating: every image
    is computed once and in the same company on any number of ranks, so the numbers are equal to the last bit.

    Raises:
        InputError: not one image can be read, or the model answers with numbers that are not finite.
    """
    chunks = np.arange(len(images)) // batch_size
    mine = [np.flatnonzero(chunks % get_world_size() == rank) for rank in range(get_world_size())]
    rows = mine[get_rank()]
    device = model.base.pos_embed.device
    camids, viewids = torch.from_numpy(images.camids), torch.from_numpy(images.viewids)

    def encode(imgs: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"": model.encode(imgs, *model.side_ids(camids[index], viewids[index], device))}

    progress = Progress(title, len(rows), shown=is_main_process())
    found, done = [], 0
    for index, features, bad in extract_batches(
        encode,
        WholeImages(images.paths, rows, model.base.img_size),
        device,
        batch_size=batch_size,
        num_workers=num_workers,
        amp_dtype=amp_dtype,
    ):
        lost = torch.tensor([[float(int(i) in bad)] for i in index])  # travels with the row
        found.append(torch.cat([torch.from_numpy(features[""]), lost], dim=1))
        done += len(index)
        progress.update(done)
    progress.close()
    values = torch.cat(found) if found else torch.zeros(0, model.feature_dim + 1)
    values = _on_main(values, mine, len(images))
    if values is None:
        return None
    lost, values = values[:, -1].numpy() > 0, values[:, :-1]
    if lost.all():
        raise InputError(f"{title}: none of the {len(images)} images could be read, e.g. {images.paths[0]}")
    readable = np.flatnonzero(~lost)
    finite = torch.isfinite(values[readable]).all(dim=1)
    if not finite.all():
        bad = images.paths.relative(int(readable[int((~finite).nonzero()[0])]))
        raise InputError(
            f"{title}: the features of {int((~finite).sum())} images, e.g. {bad}, are not finite: the model "
            "has diverged, or needs --amp none"
        )
    if not lost.any():
        return Features(images, values, [])
    reasons = [
        f"{images.paths.relative(i)}\t{_reason(images.paths[i])}" for i in np.flatnonzero(lost).tolist()
    ]
    return Features(images.take(readable), values[readable], reasons)


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


def evaluate_reid(
    model: TransReID,
    data: ReidData,
    protocols: dict[str, Protocol],
    *,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None = None,
    rerank: tuple[int, int, float] | None = None,
) -> dict[str, TestResult]:
    """Every test of a set by its protocol, on rank 0; empty elsewhere.

    Args:
        rerank: (k1, k2, lambda): the re-ranked numbers come beside the others, as test "NAME reranked".
    """
    results = {}
    device = model.base.pos_embed.device
    options = {"batch_size": batch_size, "num_workers": num_workers, "amp_dtype": amp_dtype}
    for test, (query_images, gallery_images) in data.tests.items():
        query = extract_reid(model, query_images, f"{test}: query", **options)
        gallery = None
        if gallery_images is not None:
            gallery = extract_reid(model, gallery_images, f"{test}: gallery", **options)
        if query is None:
            wait_for_main()
            continue
        protocol = protocols[test]
        gone = len(query.unreadable) + (len(gallery.unreadable) if gallery else 0)
        if gone:  # then it is another test, and says so
            protocol = replace(protocol, name=f"{protocol.name}/{gone}-unreadable-left-out")
        rows = (query.images, query.values, *((gallery.images, gallery.values) if gallery else (None, None)))
        results[test] = TestResult(protocol, evaluate(protocol, *rows, device=device), query, gallery)
        if rerank:
            protocol = replace(protocol, rerank=rerank)
            metrics = evaluate(protocol, *rows, device=device)
            results[f"{test} reranked"] = TestResult(protocol, metrics, query, gallery)
        wait_for_main()
    return results


def flat_metrics(results: dict[str, TestResult]) -> dict[str, float | str]:
    """Numbers by name for metrics.json: `mAP`, `R1` ... of a set's only test, else `800_mAP` ...; the
    protocol of each beside them."""
    flat: dict[str, float | str] = {}
    for test, result in results.items():
        words = [word for word in test.split() if word != "test"]
        prefix = "".join(f"{word}_" for word in words)
        flat |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
        flat[f"{prefix}protocol"] = result.protocol.line()
    return flat


def result_lines(results: dict[str, TestResult]) -> list[str]:
    """The numbers in percent, each line with the protocol that they belong to."""
    lines = []
    for result in results.values():
        m = result.metrics
        numbers = []
        for name in ("mAP", "R1", "R5", "R10", "mINP"):
            spread = f" +- {100 * m[f'{name}_std']:.2f}" if f"{name}_std" in m else ""
            numbers.append(f"{name} {100 * m[name]:.2f}{spread}")
        skipped = ""
        if m["queries_without_match"]:
            skipped = f"  ({m['queries_without_match']:g} queries without a match are not scored)"
        lines.append(f"{result.protocol.line()}\n  {'  '.join(numbers)}  queries {m['queries']:g}{skipped}")
    return lines


def write_unreadable(results: dict[str, TestResult], file: Path) -> int:
    """List the test images that could not be read; returns their number."""
    parts = [part for result in results.values() for part in (result.query, result.gallery) if part]
    names = sorted({name for part in parts for name in part.unreadable})
    if names:
        write_atomic(file, lambda opened: opened.write("".join(f"{n}\n" for n in names).encode()))
    return len(names)
