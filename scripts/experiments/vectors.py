"""Which database holds vectors beyond a million? One engine a process, so that its peak of memory is its own:

    for engine in exact lancedb usearch; do
        python scripts/experiments/vectors.py --engine $engine --size 100000 --output vectors_$engine.json
    done

exact is the index of tools.search, the others come by pip (lancedb; usearch). Vectors: identities of 20, whose
variances fall off as those of real embeddings do; a camera each, of 20. Recall at 10 is against numpy's exact answer:
over all, over one camera, over half of the cameras, and after 30% are removed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
K, CAMERAS, BLOCK = 10, 20, 10_000


def make_vectors(size: int, dim: int, queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gallery [N, D] float16, queries [Q, D] float32, both of unit length, cameras [N])"""
    rng, scale = np.random.default_rng(0), np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    centres = rng.standard_normal((max(1, size // 20), dim), dtype=np.float32)
    gallery = np.empty((size, dim), np.float16)
    for start in range(0, size, BLOCK):
        gallery[start : start + BLOCK] = draw(rng, centres, scale, min(BLOCK, size - start))
    return gallery, draw(rng, centres, scale, queries), rng.integers(0, CAMERAS, size)


def draw(rng, centres: np.ndarray, scale: np.ndarray, count: int) -> np.ndarray:
    x = centres[rng.integers(0, len(centres), count)]
    x = scale * (x + 0.7 * rng.standard_normal(x.shape, dtype=np.float32))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact_answer(gallery: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[Q, K] rows by exact cosine, block by block."""
    values, found = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(rows), BLOCK):
        own = rows[start : start + BLOCK]
        values = np.concatenate([values, queries @ gallery[own].astype(np.float32).T], axis=1)
        found = np.concatenate([found, np.broadcast_to(own, (len(queries), len(own)))], axis=1)
        best = np.argsort(-values, axis=1)[:, :K]
        values, found = np.take_along_axis(values, best, 1), np.take_along_axis(found, best, 1)
    return found


class Exact:
    def __init__(self, folder: Path, gallery: np.ndarray, cameras: np.ndarray):
        import torch

        from tools import gallery as live

        self.live, self.torch = live, torch
        live.claim_index(folder, {})
        self.index = live.Gallery(folder)
        for start in range(0, len(gallery), BLOCK):
            own = range(start, min(start + BLOCK, len(gallery)))
            rows = [{"path": str(i), "stamp": "", "columns": {"camid": str(cameras[i])}} for i in own]
            self.index.commit(rows, gallery[own.start : own.stop])
        self.index.tidy()

    def query(self, query: np.ndarray, below: int | None) -> list[int]:
        where = [] if below is None else [self.live.Condition(f"camid<{below}")]
        _, found, _ = self.index.search(self.torch.from_numpy(query[None]), K, where)
        return [int(row["path"]) for row in self.index.rows(found[0].tolist()).values()]

    def remove(self, rows: np.ndarray) -> None:
        gone = set(map(str, rows))
        self.index.commit([], None, [number for number, row in self.index.scan() if row["path"] in gone])


class LanceDB:
    def __init__(self, folder: Path, gallery: np.ndarray, cameras: np.ndarray):
        import lancedb
        import pyarrow
        from lancedb.index import IvfPq

        self.table = None
        for start in range(0, len(gallery), BLOCK):
            own = gallery[start : start + BLOCK]
            vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(own.ravel()), own.shape[1])
            columns = {"id": np.arange(start, start + len(own)), "camid": cameras[start : start + BLOCK]}
            batch = pyarrow.table(columns | {"vector": vectors})
            if self.table is None:
                self.table = lancedb.connect(folder).create_table("gallery", batch)
            else:
                self.table.add(batch)
        self.table.create_index("vector", config=IvfPq(distance_type="cosine"))

    def query(self, query: np.ndarray, below: int | None) -> list[int]:
        search = self.table.search(query).distance_type("cosine").refine_factor(10).select(["id"]).limit(K)
        return (search if below is None else search.where(f"camid < {below}")).to_arrow()["id"].to_pylist()

    def remove(self, rows: np.ndarray) -> None:
        for part in np.array_split(rows, -(-len(rows) // 1000)):
            self.table.delete(f"id in ({','.join(map(str, part))})")


class USearch:
    def __init__(self, folder: Path, gallery: np.ndarray, cameras: np.ndarray):
        from usearch.index import Index

        self.index, self.cameras, self.file = Index(ndim=gallery.shape[1], metric="cos", dtype="f16"), cameras, folder
        self.index.add(np.arange(len(gallery)), gallery)
        self.index.save(folder / "index.usearch")

    def query(self, query: np.ndarray, below: int | None) -> list[int]:
        count = K  # it has no filter: more are asked for until enough are left
        while True:
            found = self.index.search(query, count).keys.astype(int)
            kept = found if below is None else found[self.cameras[found] < below]
            if len(kept) >= K or count >= len(self.index):
                return kept[:K].tolist()
            count *= 4

    def remove(self, rows: np.ndarray) -> None:
        self.index.remove(rows)
        self.index.save(self.file / "index.usearch")


def memory_mb(what: str) -> float:
    """VmRSS: of this process now; VmHWM: its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def measure(args) -> dict:
    gallery, queries, cameras = make_vectors(args.size, args.dim, args.queries)
    everything, before = np.arange(args.size), memory_mb("VmRSS")
    count_peak_anew = lambda: Path("/proc/self/clear_refs").write_text("5")  # noqa: E731
    count_peak_anew()
    gone = np.random.default_rng(1).permutation(args.size)[: int(0.3 * args.size)]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        started = time.perf_counter(), time.process_time()
        engine = {"exact": Exact, "lancedb": LanceDB, "usearch": USearch}[args.engine](Path(folder), gallery, cameras)
        found = {"build_s": time.perf_counter() - started[0], "build_cpu_s": time.process_time() - started[1]}
        found["disk_mb"] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6
        found["build_mb"] = memory_mb("VmHWM") - before
        left = np.setdiff1d(everything, gone)
        for name, below, rows in (("all", None, everything), ("1/20", 1, everything), ("1/2", 10, everything),
                                  ("removed", None, left)):  # fmt: skip
            if name == "removed":
                started = time.perf_counter()
                engine.remove(gone)
                found["remove_s"] = time.perf_counter() - started
            truth = exact_answer(gallery, queries, rows if below is None else rows[cameras < below])
            engine.query(queries[0], below)
            count_peak_anew()
            started = time.perf_counter(), time.process_time()
            answers = [engine.query(query, below) for query in queries]
            found[f"{name}_ms"] = (time.perf_counter() - started[0]) / len(queries) * 1000
            found[f"{name}_cpu_ms"] = (time.process_time() - started[1]) / len(queries) * 1000
            found[f"{name}_recall"] = np.mean([len(set(a) & set(t)) / K for a, t in zip(answers, truth.tolist())])
            found[f"{name}_removed_found"] = int(np.isin(sum(answers, []), gone).sum()) if name == "removed" else 0
            found[f"{name}_mb"] = memory_mb("VmHWM") - before
    return {"engine": args.engine, "size": args.size, "dim": args.dim, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=("exact", "lancedb", "usearch"), help="what is measured")
    parser.add_argument("--size", default=10_000, type=int, help="vectors (default 10000)")
    parser.add_argument("--dim", default=768, type=int, help="numbers a vector (default 768)")
    parser.add_argument("--queries", default=100, type=int, help="queries, one at a time (default 100)")
    parser.add_argument("--scratch", default=None, help="folder for its files (default: the system's)")
    parser.add_argument("--output", default="vectors.json", help="file of the numbers (default vectors.json)")
    numbers = measure(parser.parse_args())
    Path(parser.parse_args().output).write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps(numbers))
