"""From a pool of vehicle images to a balanced sample: python main_curate.py --pool NAME=PATH --output DIR ...

Stages: index, quality, embed, vehicle, leaks, duplicates, cluster, sample, report. Each leaves files and a record in
stages/; a run that was stopped, or whose later settings changed, goes on from there. docs/CURATE.md explains the files.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from util.cli import Parser, add_teacher_flags, check_numbers, run_tool
from util.errors import InputError

DROPS = ("quality", "vehicle", "leaks", "duplicates")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("main_curate.py", __doc__)
    # fmt: off
    add = parser.add_argument_group("pool").add_argument
    named, pair = {"nargs": "+", "action": "extend"}, {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}
    add("--pool", required=True, **named, metavar="NAME=PATH", help="folders, manifests, packed sets to choose from")
    add("--exclude", default=[], **named, metavar="NAME=PATH", help="test images; they and copies leave (default none)")
    add("--identity_column", default="pid", help="manifest column of the vehicle's identity (default pid)")
    add("--camera_column", default="camid", help="manifest column of the camera (default camid)")
    add("--box_column", default="box", help="manifest column `left upper right lower` in px (default box)")
    add("--box_margin", default=0.05, type=float, help="added to each side, fraction of its size (default 0.05)")
    add("--output", required=True, help="folder for everything that is made")

    add = parser.add_argument_group("quality").add_argument
    add("--min_side", default=64, type=int, help="shorter side at least, px (default 64)")
    add("--aspect", default=[0.3, 3.5], **pair, help="width / height from LOW to HIGH (default 0.3 3.5)")
    add("--brightness", default=[10.0, 245.0], **pair, help="mean grey value of 255 (default 10 245)")
    add("--min_contrast", default=8.0, type=float, help="deviation of the grey values of 255 (default 8)")
    add("--min_sharpness", default=3.0, type=float, help="deviation of the Laplacian at 256 px (default 3)")

    add = parser.add_argument_group("embedding").add_argument
    add_teacher_flags(add)
    add("--vehicle_filter", action="store_true", help="remove what CLIP takes for no vehicle (default off)")
    add("--vehicle_threshold", default=0.5, type=float, help="least probability of the vehicle prompts (default 0.5)")
    add("--vehicle_prompts", default=None, help="JSON file of prompts (default: curation/prompts.json)")

    add = parser.add_argument_group("copies").add_argument
    add("--near_bits", default=6, type=int, help="of 64 bits of near hashes that may differ (default 6)")
    add("--near_agreement", default=0.88, type=float, help="agreement that makes near copies by itself (default 0.88)")
    add("--near_cosine", default=0.97, type=float, help="of embeddings, where agreement 0.8 is enough (default 0.97)")
    add("--leak_cosine", default=0.95, type=float, help="the same between pool and --exclude (default 0.95)")
    add("--group_cap", default=16, type=int, help="images that may count as copies of one (default 16)")
    add("--track_cap", default=4, type=int, help="images of one (identity, camera), if known (default 4)")

    add = parser.add_argument_group("clusters and sample").add_argument
    add("--target_size", default=1_000_000, type=int, help="images to choose (default 1000000)")
    add("--stratify", default="none", choices=("none", "source"), help="a tree of clusters a source (default none)")
    add("--levels", nargs="+", default=None, type=int, metavar="K", help="clusters, finest level first (default: auto)")
    add("--resampling", default=10, type=int, help="resampling steps on each level (default 10)")
    add("--spherical", action="store_true", help="cluster unit vectors, with unit centroids (default off)")
    add("--sample", default="random", choices=("random", "closest"), help="images of a cluster (default random)")

    add = parser.add_argument_group("run").add_argument
    add("--seed", default=0, type=int, help="of every random choice (default 0)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--batch_size", default=128, type=int, help="images embedded at a time (default 128)")
    add("--num_workers", default=None, type=int, help="processes that open images (default: the cores)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import datetime
import time

import numpy as np
import torch

from curation.copies import Aligner, CopyFinder
from curation.filters import Removals, load_removal, poor_images, read_prompts, vehicle_probability
from curation.index import JoinedImages, build_index, load_index, open_sources, write_manifest
from curation.kmeans import CHUNK, Embedded, Rows, Tree, build_tree, load_tree, plan_levels
from curation.sample import draw_sample, judge
from curation.stages import Stages
from datasets.benchmarks import benchmark_of
from datasets.items import WholeImages
from engine_extract import extract_to_file
from models_teacher import FrozenTeacher, encode_texts, load_teacher
from reports.automobile1m import Curated, write_curation_report
from util.dist import is_main_process, launch
from util.files import write_atomic, write_json
from util.precision import pick_precision


class Curation:
    """The stages of one run, on files of `--output`."""

    def __init__(self, args, device: torch.device):
        self.args, self.device, self.folder = args, device, Path(args.output)
        self.prompts = read_prompts(args.vehicle_prompts) if args.vehicle_filter else None
        columns = {"identity": args.identity_column, "camera": args.camera_column, "box": args.box_column}
        self.images, self.stages = open_sources(args.pool, args.exclude, columns), Stages(self.folder)
        listed = sum(len(source.paths) for source in self.images.sources if source.role == "pool")
        if args.target_size > listed:
            raise InputError(f"--target_size {args.target_size}: the pools hold {listed} images: lower it or add pools")
        self.clip = load_teacher(args)

    def run(self) -> dict:
        counts, started = {}, time.time()

        def stage(name: str, work, files: str, flags: str, shared: bool = False, **more) -> None:
            settings = {flag: getattr(self.args, flag) for flag in flags.split()} | more
            counts[name] = self.stages.run(name, settings, work, files, shared)

        def drop(name: str, work, flags: str, **more) -> None:
            stage(name, lambda _: work().save(self.folder, name, self.images.name), f"{name}.npz", flags, **more)

        listed = self.images.fingerprint()
        stage("index", self.make_index, "index.csv thumbnails.npy", "box_margin", True, sources=listed)
        self.index = load_index(self.folder / "index.csv")
        self.check_excluded()
        limits = "min_side aspect brightness min_contrast min_sharpness"
        drop("quality", lambda: poor_images(self.index, self.args), limits)
        stage("embed", self.embed, "embed*.npy", "", True, clip=asdict(self.clip[2]))
        data = np.load(self.folder / "embeddings.npy", mmap_mode="r")
        self.embedded = Embedded(data, np.load(self.folder / "embedded_rows.npy"))
        drop("vehicle", self.others, "vehicle_filter vehicle_threshold", prompts=self.prompts)
        drop("leaks", self.leaks, "near_bits near_agreement leak_cosine")
        drop("duplicates", self.duplicates, "near_bits near_agreement near_cosine group_cap track_cap")
        stage("cluster", self.cluster, "clusters/{job:.12}/*/*.npy", "stratify levels resampling spherical seed")
        stage("sample", self.sample, "selection.npy manifest.csv", "target_size sample seed")
        if not is_main_process():
            return {}
        selection, settings = np.load(self.folder / "selection.npy"), vars(self.args)
        counts["evidence"], _ = judge(self.embedded, self.domains(), selection, self.device, self.args.seed)
        write_json(self.folder / "curation.json", {"settings": settings, "stages": self.stages.records} | counts)
        removals = {name: load_removal(self.folder, name) for name in DROPS if name != "vehicle" or self.prompts}
        clusters = {name: (rows, tree.path()[:, :2][:, -1]) for name, (tree, rows) in self.trees().items()}
        found = Curated(self.images, self.index, removals, selection, clusters, counts["evidence"], settings)
        write_curation_report(self.folder / "report.html", found)
        duration, page = datetime.timedelta(seconds=int(time.time() - started)), self.folder / "report.html"
        print(f"done in {duration}: {self.folder / 'manifest.csv'} lists {len(selection):,} images, {page} shows why")
        return counts

    def make_index(self, job: str) -> dict:
        build_index(self.images, self.folder, {"job": job}, self.args.box_margin, self.args.num_workers)
        counts = {"images": len(self.images)}
        for source in self.images.sources:
            counts[f"{source.role} {source.name}"] = len(source.paths)
            if source.left_out:
                counts[f"{source.role} {source.name}, rows of the other split"] = source.left_out
        return counts

    def check_excluded(self) -> None:
        """An exclusion that cannot be read would pass every leak."""
        for source in self.images.sources:
            mine = self.index.excluded & (self.index.source == self.index.sources.index(source.name))
            if source.role == "exclude" and not self.index.readable[mine].any():
                words = f"--exclude {source.name}: none of its {len(source.paths)} images can be read, so no copy of"
                raise InputError(f"{words} them could be found; {self.folder}/index.csv says why")

    def alive(self, before: str = "cluster") -> np.ndarray:
        """Pool rows that no stage before this one has removed, int64 ascending."""
        still = ~self.index.excluded & self.index.readable
        for name in [*DROPS, before][: [*DROPS, before].index(before)]:
            still[load_removal(self.folder, name).rows] = False
        return np.flatnonzero(still)

    def embed(self, job: str) -> dict:
        pool = self.alive("vehicle")
        if not len(pool):
            raise InputError(f"no image is left to choose from: {self.folder}/quality.csv says why each was removed")
        rows = np.union1d(pool, np.flatnonzero(self.index.excluded & self.index.readable))
        dtype = pick_precision("auto" if self.device.type == "cuda" else "none", self.device)[0] or torch.float32
        teacher = FrozenTeacher(self.clip[0].to(self.device), self.clip[2], dtype).to(self.device)
        items = WholeImages(JoinedImages(self.images.sources, self.index.box), rows, teacher.size)
        how = {"dtype": np.float16, "batch_size": self.args.batch_size}
        how["num_workers"] = 2 if self.args.num_workers is None else self.args.num_workers
        result = extract_to_file(teacher, items, self.device, self.folder / "embeddings", {"job": job}, **how)
        if result is None:
            return {}
        (count, dim), problems = result
        if problems:
            words = f"{len(problems)} images can no longer be read, first {self.images.name(min(problems))}"
            raise InputError(f"{words}: bring them back, or remove {self.folder}/stages and index again")
        x = np.load(self.folder / "embeddings.npy", mmap_mode="r")
        if not all(np.isfinite(x[start : start + CHUNK]).all() for start in range(0, count, CHUNK)):
            raise InputError("embeddings are not finite: check --clip_pretrained, or try --device cpu")
        write_atomic(self.folder / "embedded_rows.npy", lambda f: np.save(f, rows))
        return {"images": count, "dim": dim}

    def others(self) -> Removals:
        removal, rows, (clip, tokenizer, identity) = Removals(len(self.index)), self.alive("vehicle"), self.clip
        if self.prompts:
            texts = [encode_texts(clip, tokenizer, texts).to(self.device) for texts in self.prompts]
            for part in np.split(rows, range(CHUNK, len(rows), CHUNK)):
                x = torch.from_numpy(self.embedded.data[self.embedded.place(part)]).to(self.device).float()
                value = vehicle_probability(x, *texts, identity.tau).cpu().numpy()
                low = value < self.args.vehicle_threshold
                removal.add("not a vehicle (probability)", part[low], value=value[low])
        return removal

    def finder(self, cosine: float) -> CopyFinder:
        aligner = Aligner(np.load(self.folder / "thumbnails.npy", mmap_mode="r"), self.device)
        return CopyFinder(self.index, self.embedded, aligner, self.args.near_bits, cosine, self.args.near_agreement)

    def leaks(self) -> Removals:
        found = self.finder(self.args.leak_cosine)
        return found.leaks(self.alive("leaks"), lambda row: benchmark_of(self.images.name(row)))

    def duplicates(self) -> Removals:
        found, leaked = self.finder(self.args.near_cosine), load_removal(self.folder, "leaks").rows
        return found.duplicates(self.alive("duplicates"), leaked, self.args.group_cap, self.args.track_cap)

    def domains(self) -> dict[str, np.ndarray]:
        """Index rows of the images that get a tree of their own: all, or those of each source."""
        rows = self.alive()
        if self.args.stratify == "none":
            return {"all": rows}
        sources = enumerate(self.index.sources)
        return {name: mine for i, name in sources if len(mine := rows[self.index.source[rows] == i])}

    def cluster(self, job: str) -> dict:
        folder, domains, sizes = Path("clusters", job[:12]), self.domains(), {}
        for number, (name, mine) in enumerate(domains.items()):
            ks = plan_levels(len(mine), self.args.levels, clip=len(domains) > 1)
            rows = Rows(self.embedded.data, self.device, self.embedded.place(mine), self.args.spherical)
            tree = build_tree(rows, ks, self.folder / folder / name, self.args, number)
            tree.save(self.folder / folder / name, mine)
            sizes[f"levels of {name}"] = " > ".join(map(str, tree.sizes))
        return {"images": sum(map(len, domains.values()))} | sizes

    def trees(self) -> dict[str, tuple[Tree, np.ndarray]]:
        folder = self.folder / "clusters" / self.stages.records["cluster"]["fingerprint"][:12]
        return {name: load_tree(folder / name) for name in self.domains()}

    def sample(self, job: str) -> dict:
        """Choose, and write the manifest with the cluster of each image on every level (-1 beyond a smaller tree)."""
        trees = self.trees()
        selection, shares = draw_sample(trees, self.args)
        write_atomic(self.folder / "selection.npy", lambda f: np.save(f, selection))
        clusters = np.full((len(self.index), max(len(tree.sizes) for tree, _ in trees.values())), -1, dtype=np.int32)
        distance = np.zeros(len(self.index), dtype=np.float32)
        for tree, rows in trees.values():
            clusters[rows, : len(tree.sizes)], distance[rows] = tree.path(), tree.distance
        extra = {f"cluster{level}": values.tolist() for level, values in enumerate(clusters[selection].T, start=1)}
        extra["distance"] = [f"{value:.6g}" for value in distance[selection]]
        cut_folder = self.stages.records["index"]["fingerprint"][:12]
        written = write_manifest(self.folder, cut_folder, self.images, selection, extra)
        return {"images": len(selection), **{f"from {name}": n for name, n in shares.items()}, "written files": written}


def main(args) -> dict:
    shares = "box_margin near_cosine near_agreement leak_cosine vehicle_threshold near_bits resampling"
    check_numbers(args, at_least_one="target_size group_cap track_cap batch_size", not_negative=shares)
    plan_levels(sys.maxsize, args.levels)  # before hours of work: levels that shrink
    return launch(args.device, args.output, lambda device: Curation(args, device).run())


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
