"""What the benchmarks time of this project, and how variants take turns.

With --against FOLDER another checkout takes part: a process of its own runs this very file on that checkout's modules
and prints a JSON line a turn. So this file imports the project inside of functions alone.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Turn = Callable[[], dict]  # does the work once; {"seconds": ..., what came out of it}


def timed(work: Callable, judge: Callable = lambda _: {}, count: int = 1, cpu: bool = False) -> Turn:
    """A turn is one `work()`, which does something `count` times; `judge` makes numbers of what it returns."""
    clock = time.process_time if cpu else time.perf_counter

    def turn() -> dict:
        started = clock()
        found = work()
        return {"seconds": (clock() - started) / count, **judge(found)}

    return turn


def pretrain_step(args: dict) -> Turn:
    """Training steps of the masked autoencoder with random weights."""
    from models_mae import MODELS

    torch.manual_seed(0)
    return train(MODELS[args["model"]](img_size=tuple(args["input_size"]), norm_pix_loss=True), args)


def train(model: torch.nn.Module, args: dict) -> Turn:
    """Steps of a model that is called as MAE's, forward, backward and AdamW, on the same images again and again."""
    device, dtype = torch.device(args["device"]), getattr(torch, args["precision"])
    model = model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05)
    generator, size = torch.Generator().manual_seed(1), (args["batch_size"], 3, *args["input_size"])
    imgs = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device)
    noise = torch.rand(args["batch_size"], args["patches"], generator=generator).to(device)

    def steps() -> float:
        for _ in range(args["steps"]):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(imgs, 0.75, noise)["pixel"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return timed(steps, lambda loss: {"loss": loss}, args["steps"])


def read_images(args: dict) -> Turn:
    """Items of the training data set, one thread: CPU seconds an image."""
    try:
        from datasets.items import PretrainDataset
        from datasets.path_list import list_images
    except ImportError:  # where they were in 03f0466
        from datasets.manifest import list_images
        from datasets.pretrain import PretrainDataset

    torch.set_num_threads(1)
    size, count = tuple(args["input_size"]), args["images"]
    images = PretrainDataset(list_images(args["data_path"]), size, size[0] * size[1] // 256, seed=0, min_area=0.2)
    return timed(lambda: [images[0, index] for index in range(count)], count=count, cpu=True)


def make_features(queries: int, gallery: int, identities: int, cameras: int, dim: int) -> tuple:
    """(query, gallery [*, dim] float32, pids and camids of both); identities overlap."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((identities, dim), dtype=np.float32)
    pids = np.arange(queries) % identities, rng.permutation(np.arange(gallery) % identities)
    noise = (3 * rng.standard_normal((len(ids), dim), dtype=np.float32) for ids in pids)
    features = [torch.from_numpy(centres[ids] + more) for ids, more in zip(pids, noise)]
    return *features, *pids, rng.integers(0, cameras, queries), rng.integers(0, cameras, gallery)


def rank_features(args: dict) -> Turn:
    """From features to mAP and R1."""
    from metrics.reid import cosine_blocks, rank_blocks, scores

    query, gallery, *labels = make_features(*args["sizes"])

    def rank() -> dict:
        return scores(rank_blocks(cosine_blocks(query, gallery, torch.device(args["device"])), *labels))

    return timed(rank, lambda found: {"mAP": found["mAP"], "R1": found["R1"]})


def rerank_features(args: dict) -> Turn:
    """From features to mAP and R1 after re-ranking; peak_gb: the most that the process has held so far."""
    from metrics.reid import FeatureSet, Protocol, rank, scores

    query, gallery, *ids = make_features(*args["sizes"])
    sides = FeatureSet(query, ids[0], ids[2]), FeatureSet(gallery, ids[1], ids[3])
    rule = Protocol("drawn", True, rerank=(20, 6, 0.3))

    def judge(found: dict) -> dict:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {"mAP": found["mAP"], "R1": found["R1"], "peak_gb": peak}

    return timed(lambda: scores(rank(rule, *sides, torch.device(args["device"]))), judge)


def mixture(args: dict) -> np.ndarray:
    """[points, dim] float32 of a mixture of Gaussians with twice as many centres as clusters."""
    rng = np.random.default_rng(0)
    middle = rng.standard_normal((2 * args["clusters"], args["dim"]), dtype=np.float32)
    x = rng.standard_normal((args["points"], args["dim"]), dtype=np.float32)
    return x + 1.5 * middle[rng.integers(0, len(middle), len(x))]


def cluster(args: dict) -> Turn:
    """Our k-means from random rows."""
    from curation.kmeans import Rows, kmeans, step_rng

    x = mixture(args)

    def centroids():
        rows = Rows(x, torch.device(args["device"]))
        return rows.restore(kmeans(rows, args["clusters"], iterations=args["iterations"], rng=step_rng(0, 1)).centroids)

    return timed(centroids, lambda found: {"inertia": inertia(x, found)})


def inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, the distances in float64."""
    c, total = torch.from_numpy(centroids), 0.0
    for part in torch.from_numpy(x).split(4096):
        nearest = torch.addmm(-0.5 * c.square().sum(dim=1), part, c.t()).argmax(dim=1)
        total += float((part.double() - c[nearest].double()).square().sum())
    return total


def other_checkout(folder: str, what: Callable[[dict], Turn], args: dict) -> Turn:
    """`what(args)` by the modules of another checkout, in a process that lives until this one ends."""
    command = [sys.executable, __file__, what.__name__, json.dumps(args)]
    env = os.environ | {"PYTHONPATH": str(Path(folder).resolve())}
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn() -> dict:
        from util.errors import InputError

        try:
            print("turn", file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise InputError(f"--against {folder}: its process ended with status {process.wait()}") from error

    return turn


def take_turns(variants: dict[str, Turn], what: Callable[[dict], Turn], work: dict, args) -> dict:
    """Each variant, ours and the other checkout's `what(work)` once to warm up, then in turns, so that a machine that
    is slow for a while is slow for all -> machine, versions, and a row a variant: what its first turn gave, median
    seconds, their spread, how many times as fast as the first variant it is (median over the rounds)."""
    variants = {**variants, "ours": what(work)}
    variants |= {"against": other_checkout(args.against, what, work)} if args.against else {}
    rows = {name: turn() for name, turn in variants.items()}
    seconds = [{name: turn()["seconds"] for name, turn in variants.items()} for _ in range(args.rounds)]
    seconds = seconds or [{name: row["seconds"] for name, row in rows.items()}]
    for name, row in rows.items():
        own = [found[name] for found in seconds]
        row["seconds"] = float(np.median(own))
        row["spread"] = (max(own) - min(own)) / row["seconds"]
        row["times_as_fast"] = float(np.median([found[next(iter(rows))] / found[name] for found in seconds]))
        values = "".join(f"  {key} {value:.6g}" for key, value in row.items() if key != "seconds")
        print(f"{name:16s} {row['seconds']:10.4g} s{values}", flush=True)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{os.cpu_count()} x {cpu}, {torch.get_num_threads()} threads, {gpu}"
    return {"machine": machine, "torch": torch.__version__, "numpy": np.__version__, **work, "rows": rows}


if __name__ == "__main__":  # of `other_checkout`: a turn for each line on stdin, its numbers as a line on stdout
    answers, sys.stdout = sys.stdout, sys.stderr
    served = globals()[sys.argv[1]](json.loads(sys.argv[2]))
    for _ in sys.stdin:
        print(json.dumps(served()), file=answers, flush=True)
