"""k-means: ours, faiss's and, with --against, another checkout's, in one run.

    pip install faiss-cpu
    python -m benchmarks.kmeans

A mixture of Gaussians with twice as many centres as clusters; the same iterations, no resampling, all from random rows.
faiss is left out where it is not installed.
"""

import argparse
from pathlib import Path

from util.cli import Parser, run_tool


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.kmeans", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--points", default=200_000, type=int, help="vectors (default 200000)")
    add("--dim", default=256, type=int, help="numbers a vector (default 256)")
    add("--clusters", default=2000, type=int, help="k (default 2000)")
    add("--iterations", default=10, type=int, help="of Lloyd's algorithm (default 10)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--rounds", default=5, type=int, help="turns of each variant (default 5)")
    add("--against", default="", metavar="FOLDER", help="another checkout to time beside this one (default none)")
    add("--output", default="benchmark_kmeans.json", help="file of the numbers (default benchmark_kmeans.json)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import importlib.util
from functools import partial

import numpy as np
import torch

from benchmarks.turns import cluster, inertia, mixture, take_turns, timed


def with_faiss(x: np.ndarray, args) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    found = faiss.Kmeans(args.dim, args.clusters, niter=args.iterations, seed=0, max_points_per_centroid=10**9)
    found.train(x)
    found.assign(x)  # ours ends with the assignment too
    return np.ascontiguousarray(found.centroids)


def main(args) -> dict:
    work = {name: getattr(args, name) for name in ("points", "dim", "clusters", "iterations", "device")}
    x, variants = mixture(work), {}
    if importlib.util.find_spec("faiss"):
        variants["faiss"] = timed(partial(with_faiss, x, args), lambda found: {"inertia": inertia(x, found)})
    return take_turns(variants, cluster, work, args)


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output))
