"""Scoring re-identification: ours, a sort of the whole distance matrix as in published code and, with --against,
another checkout's, in one run.

    python -m benchmarks.ranking --size veri
    python -m benchmarks.ranking --size veriwild --rounds 1 --against ../before

From features to mAP and R1; random features of a set's published size, with clusters for vehicles.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool

SIZES = {  # queries, gallery, identities, cameras
    "small": (60, 400, 20, 4),
    "veri": (1678, 11_579, 200, 20),
    "vehicleid": (17_377, 2400, 2400, 1),
    "veriwild": (10_000, 128_517, 10_000, 174),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.ranking", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--size", default="veri", choices=SIZES, help="published size of a set (default veri)")
    add("--dim", default=768, type=int, help="numbers a feature (default 768)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--rounds", default=5, type=int, help="turns of each variant (default 5)")
    add("--against", default="", metavar="FOLDER", help="another checkout to time beside this one (default none)")
    add("--output", default="benchmark_ranking.json", help="file of the numbers (default benchmark_ranking.json)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import numpy as np
import torch.nn.functional as F

from benchmarks.turns import make_features, rank_features, take_turns, timed


def by_sorting(case: tuple) -> dict[str, float]:
    """mAP and R1 by the steps of TransReID's code: all distances, every row sorted, junk out query by query."""
    query, gallery, q_pids, g_pids, q_camids, g_camids = case
    q, g = F.normalize(query, dim=1), F.normalize(gallery, dim=1)
    squared = q.square().sum(dim=1, keepdim=True) + g.square().sum(dim=1)
    indices = np.argsort(squared.addmm_(q, g.t(), beta=1, alpha=-2).numpy(), axis=1)
    matches = (g_pids[indices] == q_pids[:, None]).astype(np.int32)
    aps, first = [], []
    for i, found in enumerate(matches):
        if q_camids is not None:
            found = found[(found == 0) | (g_camids[indices[i]] != q_camids[i])]
        if not found.any():
            continue
        hits = found.cumsum()
        first.append(hits[0])
        aps.append((hits / np.arange(1.0, len(hits) + 1) * found).sum() / found.sum())
    return {"mAP": float(np.mean(aps)), "R1": float(np.mean(first))}


def main(args) -> dict:
    work = {"sizes": (*SIZES[args.size], args.dim), "device": args.device}
    case = make_features(*work["sizes"])
    return take_turns({"sorting": timed(lambda: by_sorting(case), dict)}, rank_features, work, args)


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output))
