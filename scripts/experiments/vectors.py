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
K, DIM, CAMERAS, BLOCK = 10, 768, 20, 10_000


def make_vectors(size: int, dim: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(gallery [N, D] float16, queries [Q, D] float32), of unit length"""
    rng, scale = np.random.default_rng(0), np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    centres, found = rng.standard_normal((max(1, size // 20), dim), dtype=np.float32), np.empty((size, dim), np.float16)
    for start in [*range(0, size, BLOCK), size]:
        count = min(BLOCK, size - start) or queries
        x = scale * (
            centres[rng.integers(0, len(centres), count)] + 0.7 * rng.standard_normal((count, dim), np.float32)
        )
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        found[start : start + count] = x[: size - start]
    return found, x


def exact_answer(gallery: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> list[list[int]]:
    """K rows a query, by exact cosine."""
    blocks = (gallery[own].astype(np.float32) for own in np.array_split(rows, -(-len(rows) // BLOCK)))
    cosines = np.concatenate([queries @ block.T for block in blocks], axis=1)
    return rows[np.argpartition(-cosines, K - 1, axis=1)[:, :K]].tolist()


class Exact:
    def __init__(self, folder: Path, gallery: np.ndarray, cameras: np.ndarray):
        from tools import gallery as live

        live.claim_index(folder, {})
        self.live, self.index = live, live.Gallery(folder)
        for start in range(0, len(gallery), BLOCK):
            own = enumerate(cameras[start : start + BLOCK].tolist(), start)
            rows = [{"path": str(i), "stamp": "", "columns": {"camid": str(camera)}} for i, camera in own]
            self.index.commit(rows, gallery[start : start + BLOCK])
        self.index.tidy()

    def query(self, query: np.ndarray, below: int) -> list[int]:
        import torch

        where = [self.live.Condition(f"camid<{below}")] if below < CAMERAS else []
        numbers = self.index.search(torch.from_numpy(query[None]), K, where)[1][0].tolist()
        return [int(row["path"]) for row in self.index.rows(numbers).values()]

    def remove(self, rows: np.ndarray) -> None:
        gone = set(map(str, rows))
        self.index.commit([], None, [number for number, row in self.index.scan() if row["path"] in gone])


class LanceDB:
    def __init__(self, folder: Path, gallery: np.ndarray, cameras: np.ndarray):
        import lancedb
        import pyarrow
        from lancedb.index import IvfPq

        def batches():
            for start in range(0, len(gallery), BLOCK):
                own, camids = gallery[start : start + BLOCK], cameras[start : start + BLOCK]
                vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(own.ravel()), own.shape[1])
                yield pyarrow.table({"id": np.arange(start, start + len(own)), "camid": camids, "vector": vectors})

        tables = batches()
        self.table = lancedb.connect(folder).create_table("gallery", next(tables))
        for table in tables:
            self.table.add(table)
        self.table.create_index("vector", config=IvfPq(distance_type="cosine"))

    def query(self, query: np.ndarray, below: int) -> list[int]:
        search = self.table.search(query).distance_type("cosine").refine_factor(10).select(["id"]).limit(K)
        return (search.where(f"camid < {below}") if below < CAMERAS else search).to_arrow()["id"].to_pylist()

    def remove(self, rows: np.ndarray) -> None:
        for part in np.array_split(rows, -(-len(rows) // 1000)):
            self.table.delete(f"id in ({','.join(map(str, part))})")


class USearch:
    def __init__(self, folder: Path, gallery: np.ndarray, cameras: np.ndarray):
        from usearch.index import Index

        self.index, self.cameras, self.file = Index(ndim=gallery.shape[1], metric="cos", dtype="f16"), cameras, folder
        self.index.add(np.arange(len(gallery)), gallery)
        self.index.save(folder / "index.usearch")

    def query(self, query: np.ndarray, below: int) -> list[int]:
        count = K  # it has no filter: more are asked for until enough are left
        while True:
            found = self.index.search(query, count).keys.astype(int)
            kept = found[self.cameras[found] < below]
            if len(kept) >= K or count >= len(self.index):
                return kept[:K].tolist()
            count *= 4

    def remove(self, rows: np.ndarray) -> None:
        self.index.remove(rows)
        self.index.save(self.file / "index.usearch")


def timed(job) -> tuple:
    """(what the job returns, seconds, CPU seconds, peak of memory in MB)"""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    started, cpu = time.perf_counter(), time.process_time()
    found, lines = job(), Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return found, time.perf_counter() - started, time.process_time() - cpu, peak


def measure(engine: str, size: int, count: int) -> dict:
    gallery, queries = make_vectors(size, DIM, count)
    rng, before = np.random.default_rng(1), timed(lambda: None)[-1]
    cameras, is_left = rng.integers(0, CAMERAS, size), rng.random(size) > 0.3
    kind = {"exact": Exact, "lancedb": LanceDB, "usearch": USearch}[engine]
    with tempfile.TemporaryDirectory() as folder:
        index, seconds, cpu, peak = timed(lambda: kind(Path(folder), gallery, cameras))
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6
        found = {"engine": engine, "size": size, "build_s": seconds, "build_cpu_s": cpu, "build_mb": peak - before}
        for name, below in (("all", CAMERAS), ("1/20", 1), ("1/2", CAMERAS // 2), ("removed", CAMERAS)):
            if name == "removed":
                found["remove_s"] = timed(lambda: index.remove(np.flatnonzero(~is_left)))[1]
            rows = np.flatnonzero((cameras < below) & (is_left | (name != "removed")))
            truth = exact_answer(gallery, queries, rows)
            index.query(queries[0], below)
            answers, seconds, cpu, peak = timed(lambda below=below: [index.query(query, below) for query in queries])
            recall = np.mean([len(set(a) & set(t)) / K for a, t in zip(answers, truth)])
            wrong = len(set(sum(answers, [])) - set(rows.tolist()))  # removed, or of another camera
            ms = {"ms": seconds / count * 1000, "cpu_ms": cpu / count * 1000, "mb": peak - before}
            found[name] = {"recall": recall, "wrong": wrong, **ms}
    return found | {"disk_mb": disk}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=("exact", "lancedb", "usearch"), help="what is measured")
    parser.add_argument("--size", default=10_000, type=int, help="vectors (default 10000)")
    parser.add_argument("--queries", default=100, type=int, help="queries, one at a time (default 100)")
    parser.add_argument("--output", default="vectors.json", help="file of the numbers (default vectors.json)")
    args = parser.parse_args()
    numbers = json.dumps(measure(args.engine, args.size, args.queries))
    Path(args.output).write_text(f"{numbers}\n")
    print(numbers)
