"""Our k-means beside faiss's and scikit-learn's, on the same vectors, in one run.

    pip install faiss-cpu scikit-learn
    python -m tools.benchmark_kmeans
    python -m tools.benchmark_kmeans --growth 100000 300000 1000000    # three levels: time and memory

A mixture of Gaussians with twice as many centres as clusters; the same iterations, no resampling, all from
random rows. The variants take turns; medians. `inertia` is recomputed in float64 for all. faiss and
scikit-learn are needed by the first form only.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from curation.hierarchy import build_tree, plan_levels, step_rng
from curation.kmeans import BLOCK, kmeans, memory_bytes
from curation.rows import Rows
from util.cli import Parser, run_tool
from util.errors import InputError


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.benchmark_kmeans", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--points", default=200_000, type=int, help="vectors (default 200000)")
    add("--dim", default=256, type=int, help="numbers a vector (default 256)")
    add("--clusters", default=2000, type=int, help="k (default 2000)")
    add("--iterations", default=10, type=int, help="of Lloyd's algorithm (default 10)")
    add("--rounds", default=3, type=int, help="turns of each variant (default 3)")
    add("--growth", nargs="+", default=[], type=int, metavar="N",
        help="instead: a three-level hierarchy of so many random vectors (default: the comparison)")
    add("--device", default="cpu", help="of ours: cpu or cuda (default cpu)")
    add("--output", default="benchmark_kmeans.json", help="file (default benchmark_kmeans.json)")
    # fmt: on
    return parser


def mixture(points: int, dim: int, centres: int) -> np.ndarray:
    """[points, dim] float32."""
    rng = np.random.default_rng(0)
    middle = rng.standard_normal((centres, dim), dtype=np.float32)
    x = rng.standard_normal((points, dim), dtype=np.float32)
    x += 1.5 * middle[rng.integers(0, centres, points)]
    return x


def true_inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, the distances in float64."""
    c = torch.from_numpy(centroids)
    offset, total = -0.5 * c.square().sum(dim=1), 0.0
    for start in range(0, len(x), 4096):
        part = torch.from_numpy(x[start : start + 4096])
        nearest = torch.addmm(offset, part, c.t()).argmax(dim=1)
        total += float((part.double() - c[nearest].double()).square().sum())
    return total


def run_ours(x, args) -> np.ndarray:
    rows = Rows(x, torch.device(args.device))
    found = kmeans(rows, args.clusters, iterations=args.iterations, rng=step_rng(0, 1))
    return rows.restore(found.centroids)


def run_faiss(x, args) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    found = faiss.Kmeans(args.dim, args.clusters, niter=args.iterations, seed=0, max_points_per_centroid=10**9)
    found.train(x)
    found.assign(x)  # ours ends with the assignment too
    return np.ascontiguousarray(found.centroids)


def run_mini_batch(x, args) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(
        args.clusters, init="random", n_init=1, max_iter=args.iterations, batch_size=8192, random_state=0,
        max_no_improvement=None, tol=0.0,
    )  # fmt: skip
    found.fit(x)
    return np.ascontiguousarray(found.cluster_centers_, dtype=np.float32)


VARIANTS = {"ours": run_ours, "faiss": run_faiss, "MiniBatchKMeans": run_mini_batch}


def compare(args) -> list[dict]:
    try:
        import faiss  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install faiss-cpu scikit-learn") from error
    x = mixture(args.points, args.dim, 2 * args.clusters)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    inertia: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, run in VARIANTS.items():
            started = time.perf_counter()
            centroids = run(x, args)
            seconds[name].append(time.perf_counter() - started)
            if name not in inertia:
                inertia[name] = true_inertia(x, centroids)
    rows = []
    for name, values in seconds.items():
        row = {
            "variant": name,
            "seconds": statistics.median(values),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "inertia": inertia[name],
            "time_ratio": statistics.median(values) / statistics.median(seconds["faiss"]),
            "inertia_ratio": inertia[name] / inertia["faiss"],
        }
        rows.append(row)
        took = f"{row['seconds']:8.2f} s, spread {row['spread']:.0%}, {row['time_ratio']:.3f} x faiss"
        print(f"{name:16s} {took}; inertia {row['inertia']:.6g}, {row['inertia_ratio']:.4f} x faiss", flush=True)
    return rows


def grow(args) -> list[dict]:
    rows = []
    for count in args.growth:
        context = multiprocessing.get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=one_tree, args=(count, args, send))
        process.start()
        row = receive.recv()
        process.join()
        rows.append(row)
        print(
            f"{count:9d} vectors, levels {row['levels']}: {row['seconds']:.1f} s, {row['peak_mb']:.0f} MB "
            f"beside the program, formula {row['formula_mb']:.0f} MB, N x k {row['matrix_mb']:.0f} MB",
            flush=True,
        )
    return rows


def one_tree(count: int, args, send) -> None:
    """In a process of its own: a hierarchy over a memory map, and what it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16, (count, args.dim))
        rng = np.random.default_rng(0)
        for start in range(0, count, 65_536):
            part = file[start : start + 65_536]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32)
        file.flush()
        del file
        data = np.load(folder / "x.npy", mmap_mode="r")
        rows = Rows(data, torch.device(args.device), resident_bytes=0)  # nothing kept: the smallest memory
        levels = [max(count // 200, 3), max(count // 2000, 2), max(count // 20_000, 1)]
        plan = plan_levels(count, levels, None, 1)
        before = own_memory("RssAnon")
        started = time.perf_counter()
        watch = PeakWatch()
        build_tree(rows, plan, folder / "tree", seed=0, iterations=args.iterations, init="random")
        peak = watch.stop()
        send.send(
            {
                "points": count,
                "levels": " > ".join(map(str, levels)),
                "seconds": time.perf_counter() - started,
                "peak_mb": peak - before,
                "formula_mb": memory_bytes(rows, levels[0]) / 1e6,
                "matrix_mb": count * levels[0] * 4 / 1e6,
            }
        )


def own_memory(field: str) -> float:
    """MB of this process; RssAnon leaves the pages of memory maps out, which the system can drop at will."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1e3


class PeakWatch:
    """The largest RssAnon of this process, looked at every 20 ms by a thread."""

    def __init__(self):
        self.peak, self.going = 0.0, True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while self.going:
            self.peak = max(self.peak, own_memory("RssAnon"))
            time.sleep(0.02)

    def stop(self) -> float:
        self.going = False
        self.thread.join()
        return self.peak


def main(args) -> dict:
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    facts |= {"block": BLOCK[torch.device(args.device).type]}
    return facts | {"rows": grow(args) if args.growth else compare(args)}


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output))
