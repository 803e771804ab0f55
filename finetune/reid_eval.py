"""Scoring a re-identification model: features of every test image, then the set's protocol."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from datasets.eval_images import WholeImages
from datasets.reid import ReidData, ReidImages
from finetune.predict import predict
from metrics.reid import FeatureSet, Protocol, evaluate
from models_transreid import TransReID
from util.dist import wait_for_main


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


def extract_reid(
    model: TransReID,
    images: ReidImages,
    title: str,
    *,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None = None,
) -> Features | None:
    """Features for search, [n, D], on rank 0; None elsewhere; see `predict`."""
    device = model.base.pos_embed.device
    camids, viewids = torch.from_numpy(images.camids), torch.from_numpy(images.viewids)
    found = predict(
        lambda imgs, index: model.encode(imgs, *model.side_ids(camids[index], viewids[index], device)),
        WholeImages(images.paths, np.arange(len(images)), model.base.img_size),
        device,
        title,
        width=model.feature_dim,
        batch_size=batch_size,
        num_workers=num_workers,
        amp_dtype=amp_dtype,
    )
    if found is None:
        return None
    return Features(images.take(found.rows) if found.unreadable else images, found.values, found.unreadable)


def evaluate_reid(
    model: TransReID,
    data: ReidData,
    protocols: dict[str, Protocol],
    *,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None = None,
    rerank: tuple[int, int, float] | None = None,
    columns: dict[str, slice] | None = None,
) -> dict[str, TestResult]:
    """Every test of a set by its protocol, on rank 0; empty elsewhere.

    Args:
        rerank: (k1, k2, lambda): the re-ranked numbers come beside the others, as test "NAME reranked".
        columns: parts of the feature that are scored each for itself, as test "PART NAME" (None: all of it).
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
        for part, cut in (columns or {"": slice(None)}).items():
            q = replace(query, values=query.values[:, cut])
            g = replace(gallery, values=gallery.values[:, cut]) if gallery else None
            rows = [FeatureSet(part.values, part.images.pids, part.images.camids) for part in (q, g) if part]
            for ending, used in ("", protocol), (" reranked", replace(protocol, rerank=rerank)):
                if used.rerank or not ending:
                    metrics = evaluate(used, *rows, device=device)
                    results[f"{part} {test}{ending}".strip()] = TestResult(used, metrics, q, g)
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
        if result.gallery:
            flat[f"{prefix}gallery"] = len(result.gallery.images)
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


def unreadable_of(results: dict[str, TestResult]) -> list[str]:
    """`path<tab>reason` of the test images that could not be read."""
    parts = [part for result in results.values() for part in (result.query, result.gallery) if part]
    return sorted({name for part in parts for name in part.unreadable})
