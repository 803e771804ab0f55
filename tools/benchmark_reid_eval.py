"""Our evaluation of re-identification beside a sort of the whole distance matrix, in one run.

    python -m tools.benchmark_reid_eval
    python -m tools.benchmark_reid_eval --size veriwild --rounds 1 --only ours

From features to mAP and CMC, random features of each set's published size with clusters for identities. The
sorting variant follows the steps of published code: the full matrix of squared distances, numpy's argsort
of every row, and a loop over the queries. The variants take turns; medians. "product" is what no variant can
do without: features to length 1, and one product.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from metrics.reid import cosine_blocks, rank_hits, scores
from util.cli import Parser, run_tool
from util.meter import peak_gigabytes

SIZES = {  # queries, gallery, identities, cameras
    "veri": (1678, 11_579, 200, 20),
    "vehicleid": (17_377, 2400, 2400, 1),
    "veriwild": (10_000, 128_517, 10_000, 174),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.benchmark_reid_eval", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--size", default="veri", choices=SIZES, help="published size of a set (default veri)")
    add("--dim", default=768, type=int, help="numbers a feature (default 768)")
    add("--rounds", default=5, type=int, help="turns of each variant; of sort_lists one (default 5)")
    add("--only", default=None, choices=("ours", "sort", "sort_lists", "product"),
        help="one variant (default all)")
    add("--device", default="cpu", help="of ours: cpu or cuda (default cpu)")
    add("--output", default="benchmark_reid_eval.json", help="file (default benchmark_reid_eval.json)")
    # fmt: on
    return parser


def make_features(size: str, dim: int) -> tuple:
    """(query, gallery [*, dim] float32, pids and camids of both); identities overlap."""
    queries, gallery, identities, cameras = SIZES[size]
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((identities, dim), dtype=np.float32)
    q_pids, g_pids = np.arange(queries) % identities, rng.permutation(np.arange(gallery) % identities)
    features = [
        torch.from_numpy(centres[pids] + 3 * rng.standard_normal((len(pids), dim), dtype=np.float32))
        for pids in (q_pids, g_pids)
    ]
    camids = (rng.integers(0, cameras, queries), rng.integers(0, cameras, gallery))
    return (*features, q_pids, g_pids, *(camids if cameras > 1 else (None, None)))


def by_sorting(query, gallery, q_pids, g_pids, q_camids, g_camids, *, lists: bool) -> dict[str, float]:
    """mAP and R1 by the steps of published code (TransReID's and its ancestors'): squared distances
    by one product, every row sorted, matches of the whole matrix, then query by query the junk out, the CMC
    curve to rank 50 and the precision at every place: as an array (TransReID), or as a Python list
    (torchreid, FastReID's Python evaluator)."""
    q, g = torch.nn.functional.normalize(query, dim=1), torch.nn.functional.normalize(gallery, dim=1)
    squared = q.square().sum(dim=1, keepdim=True) + g.square().sum(dim=1)
    distances = squared.addmm_(q, g.t(), beta=1, alpha=-2).numpy()
    indices = np.argsort(distances, axis=1)
    matches = (g_pids[indices] == q_pids[:, None]).astype(np.int32)
    aps, curves = [], []
    for i in range(len(q_pids)):
        found = matches[i]
        if q_camids is not None:
            order = indices[i]
            junk = (g_pids[order] == q_pids[i]) & (g_camids[order] == q_camids[i])
            found = found[~junk]
        if not found.any():
            continue
        curve = found.cumsum()
        curve[curve > 1] = 1
        curves.append(curve[:50].astype(np.float32))
        hits = found.cumsum()
        if lists:
            precision = np.asarray([hit / (place + 1.0) for place, hit in enumerate(hits)])
        else:
            precision = hits / (np.arange(1, len(hits) + 1) * 1.0)
        aps.append((precision * found).sum() / found.sum())
    return {"mAP": float(np.mean(aps)), "R1": float(np.mean(curves, axis=0)[0])}


def product(query: torch.Tensor, gallery: torch.Tensor) -> dict[str, float]:
    """Cosines of all pairs, in the fastest known order: into memory that is taken once."""
    for _ in cosine_blocks(query, gallery, torch.device("cpu")):
        pass
    return {}


def main(args) -> dict:
    case = make_features(args.size, args.dim)
    variants = {
        "ours": lambda: scores(rank_hits(*case, device=args.device)),
        "sort": lambda: by_sorting(*case, lists=False),
        "sort_lists": lambda: by_sorting(*case, lists=True),
        "product": lambda: product(*case[:2]),
    }
    if args.only:
        variants = {args.only: variants[args.only]}
    before = peak_gigabytes(torch.device("cpu"))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    found: dict[str, dict] = {}
    for turn in range(args.rounds):
        for name, variant in variants.items():
            if turn and name == "sort_lists" and len(variants) > 1:
                continue  # it takes half a minute
            started = time.perf_counter()
            found[name] = variant()
            seconds[name].append(time.perf_counter() - started)
    result: dict = {"size": args.size, "dim": args.dim, "torch": torch.__version__}
    result |= {"threads": torch.get_num_threads(), "gigabytes_features": before}
    for name in variants:
        result[f"{name}_seconds"] = statistics.median(seconds[name])
        if name != "product":
            result |= {f"{name}_mAP": found[name]["mAP"], f"{name}_R1": found[name]["R1"]}
    if not args.only:
        # of the turns, so that a moment in which the machine is slow weighs on both sides
        for name in ("sort", "sort_lists"):
            turns = [other / ours for other, ours in zip(seconds[name], seconds["ours"])]
            result[f"ratio_{name}"] = statistics.median(turns)
    return result | {"gigabytes_peak": peak_gigabytes(torch.device("cpu"))}


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output))
