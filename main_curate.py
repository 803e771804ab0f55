"""From a pool of vehicle images to a balanced sample: python main_curate.py --pool NAME=PATH --output DIR ...

Stages: index, quality, embed, vehicle, leaks, duplicates, cluster, sample, write, report. Each leaves files
that can be looked at and a record in stages/; a run that was stopped, or whose later settings changed, goes
on where that is possible. Under torchrun the ranks share index, embed and cluster. docs/CURATE.md explains
the files.
"""

import argparse
import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from curation.align import Aligner
from curation.cluster import build_trees, domains, draw_sample, load_tree
from curation.duplicates import Embedded, Likeness, find_duplicates, find_leaks
from curation.evidence import judge
from curation.index import build_index, load_index
from curation.manifest import write_manifest
from curation.measure import SIDE
from curation.near import MAX_BITS
from curation.quality import poor_images
from curation.removal import Removals, load_removal, save_removal
from curation.sources import JoinedImages, open_sources
from curation.stages import Stages
from curation.vehicles import not_vehicles, read_prompts
from datasets.benchmarks import recognise
from engine_extract import WholeImages, extract_to_file
from models_teacher import FrozenTeacher, encode_texts, load_clip
from models_vit import load_encoder
from reports.curation import Curated, write_curation_report
from util.cli import Parser, run_tool
from util.dist import is_main_process, launch
from util.errors import InputError
from util.files import write_atomic, write_json
from util.precision import pick_amp_dtype, pick_fused_attention
from util.progress import Progress

DROPS = ("quality", "vehicle", "leaks", "duplicates")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("main_curate.py", add_help=False, allow_abbrev=False)
    # fmt: off
    add = parser.add_argument_group("pool").add_argument
    add("--pool", nargs="+", required=True, action="extend", metavar="NAME=PATH",
        help="images to choose from: folders, manifests, packed sets; of a manifest with a column split its "
             "validation and test rows stay out")
    add("--exclude", nargs="+", default=[], action="extend", metavar="NAME=PATH",
        help="test, query, gallery and validation images of every benchmark: they and near copies leave the "
             "pool (default none)")
    add("--identity_column", default="pid", help="manifest column of the vehicle's identity (default pid)")
    add("--camera_column", default="camid", help="manifest column of the camera (default camid)")
    add("--box_column", default="box",
        help="manifest column with the vehicle's box, `left upper right lower` in px (default box)")
    add("--box_margin", default=0.05, type=float,
        help="added to each side of a box, fraction of its size (default 0.05)")
    add("--output", required=True, help="folder for everything that is made")

    add = parser.add_argument_group("quality").add_argument
    add("--min_side", default=64, type=int, help="shorter side at least, px (default 64)")
    add("--aspect", nargs=2, default=[0.3, 3.5], type=float, metavar=("LOW", "HIGH"),
        help="width / height from LOW to HIGH (default 0.3 3.5)")
    add("--brightness", nargs=2, default=[10.0, 245.0], type=float, metavar=("LOW", "HIGH"),
        help="mean grey value of 255 (default 10 245)")
    add("--min_contrast", default=8.0, type=float, help="deviation of the grey values of 255 (default 8)")
    add("--min_sharpness", default=3.0, type=float,
        help="deviation of the Laplacian at 256 px; lower is blurred (default 3)")

    add = parser.add_argument_group("embedding").add_argument
    add("--clip_model", default="ViT-L-14", help="open_clip name or JSON config (default ViT-L-14)")
    add("--clip_pretrained", default="openai", help="open_clip tag or weight file (default openai)")
    add("--checkpoint", default=None,
        help="embed with this encoder (mean of its patch tokens) instead of CLIP (default: CLIP)")
    add("--input_size", default=None, type=int, help="of --checkpoint, px (default: the checkpoint's)")
    add("--vehicle_filter", action="store_true", help="remove what CLIP takes for no vehicle (default off)")
    add("--vehicle_threshold", default=0.5, type=float,
        help="probability of the vehicle prompts at least (default 0.5)")
    add("--vehicle_prompts", default=None, help="JSON file of prompts (default: curation/prompts.json)")

    add = parser.add_argument_group("copies").add_argument
    add("--near_bits", default=6, type=int,
        help=f"perceptual hashes that differ in at most so many of 64 bits are near copies from "
             f"an agreement of 0.8, 0 to {MAX_BITS} (default 6)")
    add("--near_agreement", default=0.88, type=float,
        help="agreement of the pixels, once a crop or mirror is undone, that makes near copies: the "
             "correlation that three quarters of the tiles reach (default 0.88)")
    add("--near_cosine", default=0.97, type=float,
        help="with embeddings so alike an agreement of 0.8 is enough (default 0.97)")
    add("--leak_cosine", default=0.95, type=float, help="the same between pool and --exclude (default 0.95)")
    add("--group_cap", default=16, type=int, help="images that may count as copies of one (default 16)")
    add("--track_cap", default=4, type=int, help="images of one (identity, camera), if known (default 4)")

    add = parser.add_argument_group("clusters and sample").add_argument
    add("--target_size", default=1_000_000, type=int, help="images to choose (default 1000000)")
    add("--stratify", default="none", choices=("none", "source"),
        help="one tree of clusters for all, or one for each source (default none)")
    add("--quota", nargs="+", default=[], action="extend", metavar="NAME=SHARE",
        help="share of a source in the sample, with --stratify source (default: as equal as sizes allow)")
    add("--levels", nargs="+", default=None, type=int, metavar="K",
        help="clusters on each level, finest first (default: from the number of images)")
    add("--members", nargs="+", default=None, type=int, metavar="M",
        help="images of a cluster kept for resampling, one number a level (default: half the mean size)")
    add("--resampling", default=10, type=int, help="resampling steps on each level (default 10)")
    add("--resample", default="closest", choices=("closest", "random"),
        help="which images of a cluster are clustered again (default closest)")
    add("--iterations", default=50, type=int, help="of k-means, at most (default 50)")
    add("--init", default="auto", choices=("auto", "random", "kmeans++"),
        help="first centroids; auto is k-means++ up to 5,000 clusters on a CPU, 50,000 on CUDA, "
             "else random (default auto)")
    add("--spherical", action="store_true", help="cluster unit vectors, with unit centroids (default off)")
    add("--sample", default="random", choices=("random", "closest"),
        help="which images of a cluster are chosen (default random)")

    add = parser.add_argument_group("run").add_argument
    add("--seed", default=0, type=int, help="of every random choice (default 0)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--batch_size", default=128, type=int, help="images embedded at a time (default 128)")
    add("--num_workers", default=None, type=int, help="processes that open images (default: the cores)")
    add("--memory_gb", default=4.0, type=float,
        help="embeddings are kept in memory for clustering up to this size, GB a rank (default 4)")
    # fmt: on
    return parser


def check_args(args) -> None:
    """Values that no stage could use stop the run before it touches an image."""
    for name, low, high in (
        ("target_size", 1, 10**10), ("near_bits", 0, MAX_BITS), ("near_cosine", 0.5, 1.0),
        ("near_agreement", 0.8, 1.0),
        ("leak_cosine", 0.5, 1.0), ("group_cap", 1, 10**9), ("track_cap", 1, 10**9), ("resampling", 0, 1000),
        ("iterations", 1, 10_000), ("box_margin", 0.0, 2.0), ("vehicle_threshold", 0.0, 1.0),
        ("batch_size", 1, 10**6),
    ):  # fmt: skip
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name} {getattr(args, name)}: must be from {low} to {high}")
    if args.quota and args.stratify == "none":
        raise InputError("--quota needs --stratify source: without it there is one tree for all sources")
    if args.checkpoint and args.vehicle_filter:
        raise InputError("--vehicle_filter asks CLIP, so it cannot go with --checkpoint: drop one of them")


class Curation:
    """The stages of one run, on files of `--output`."""

    def __init__(self, args, device: torch.device):
        self.args, self.device, self.folder = args, device, Path(args.output)
        self.images: JoinedImages = open_sources(
            args.pool,
            args.exclude,
            {"identity": args.identity_column, "camera": args.camera_column, "box": args.box_column},
        )
        self.stages = Stages(self.folder)
        self._clip = None

    def settings(self, *names: str) -> dict:
        return {name: getattr(self.args, name) for name in names}

    def run(self) -> dict:
        args, run = self.args, self.stages.run
        counts = {"index": run("index", self.index_settings(), self.make_index, shared=True)}
        self.index = load_index(self.folder / "index.csv")
        self.check_excluded()
        quality = ("min_side", "aspect", "brightness", "min_contrast", "min_sharpness")
        counts["quality"] = run("quality", self.settings(*quality), self.drop_poor)
        counts["embed"] = run("embed", self.encoder_settings(), self.embed, shared=True)
        self.embedded = Embedded(
            np.load(self.folder / "embeddings.npy", mmap_mode="r"), np.load(self.folder / "embedded_rows.npy")
        )
        vehicle = self.settings("vehicle_filter", "vehicle_threshold") | {"prompts": self.prompts()}
        counts["vehicle"] = run("vehicle", vehicle, self.drop_others)
        copies = ("near_bits", "near_agreement", "seed")
        counts["leaks"] = run("leaks", self.settings(*copies, "leak_cosine"), self.drop_leaks)
        names = (*copies, "near_cosine", "group_cap", "track_cap")
        counts["duplicates"] = run("duplicates", self.settings(*names), self.drop_duplicates)
        names = ("stratify", "levels", "members", "resampling", "resample", "iterations", "init", "spherical", "seed")
        counts["cluster"] = run("cluster", self.settings(*names), self.cluster, shared=True)
        names = ("target_size", "quota", "sample", "seed")
        counts["sample"] = run("sample", self.settings(*names), self.sample)
        counts["write"] = run("write", {}, self.write)
        if not is_main_process():
            return {}
        evidence, sizes = judge(
            self.embedded, self.domains(), np.load(self.folder / "selection.npy"), self.device, args.seed
        )
        counts["evidence"] = evidence
        write_json(self.folder / "curation.json", {"settings": vars(args), "stages": self.stages.records} | counts)
        self.write_report(evidence, sizes)
        return counts

    def write_report(self, evidence: dict, sizes: dict) -> None:
        stages = ("quality", *(["vehicle"] if self.args.vehicle_filter else []), "leaks", "duplicates")
        clusters = {}
        for domain in self.domains():
            tree, rows = load_tree(self.trees_folder() / domain.name)
            clusters[domain.name] = rows, tree.path()[:, min(1, len(tree.sizes) - 1)]
        found = Curated(
            self.images, self.index, {name: load_removal(self.folder, name) for name in stages}, self.alive(),
            np.load(self.folder / "selection.npy"), clusters, evidence, sizes, vars(self.args),
        )  # fmt: skip
        write_curation_report(self.folder / "report.html", found)

    # index

    def index_settings(self) -> dict:
        return {"sources": self.images.fingerprint(), "thumbnails": SIDE} | self.settings("box_margin")

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
        number_of = {name: number for number, name in enumerate(self.index.sources)}
        for source in self.images.sources:
            mine = self.index.excluded & (self.index.source == number_of[source.name])
            if source.role == "exclude" and not self.index.readable[mine].any():
                raise InputError(
                    f"--exclude {source.name}: none of its {len(source.paths)} images can be read, so no "
                    f"copy of them could be found; {self.folder / 'index.csv'} says why"
                )

    def drop(self, name: str, removal) -> dict:
        save_removal(self.folder, name, removal, self.images.name)
        return {"removed": len(removal.rows)} | removal.counts()

    def drop_poor(self, job: str) -> dict:
        a = self.args
        removal = poor_images(
            self.index, min_side=a.min_side, aspect=a.aspect, brightness=a.brightness,
            min_contrast=a.min_contrast, min_sharpness=a.min_sharpness,
        )  # fmt: skip
        return self.drop("quality", removal)

    def alive(self, *, before: str = "cluster") -> np.ndarray:
        """Pool rows that no stage before this one has removed, int64 ascending."""
        still = ~self.index.excluded & self.index.readable
        for name in DROPS:
            if name == before:
                break
            still[load_removal(self.folder, name).rows] = False
        return np.flatnonzero(still)

    # embed

    def clip(self):
        if self._clip is None:
            self._clip = load_clip(self.args.clip_model, self.args.clip_pretrained)
        return self._clip

    def encoder_settings(self) -> dict:
        if self.args.checkpoint:
            file = Path(self.args.checkpoint)
            if not file.is_file():
                raise InputError(f"--checkpoint {file} does not exist: give an encoder, or drop the flag for CLIP")
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            return {"sha256": digest} | self.settings("input_size")
        _, _, identity = self.clip()
        return {"clip": asdict(identity)}

    def embed(self, job: str) -> dict:
        a = self.args
        pool = self.alive(before="vehicle")
        rows = np.union1d(pool, np.flatnonzero(self.index.excluded & self.index.readable))
        if not len(pool):
            raise InputError(
                f"no image is left to choose from: {self.folder / 'quality.csv'} says why each was removed"
            )
        amp_dtype = pick_amp_dtype("auto", self.device)[0] if self.device.type == "cuda" else None
        if a.checkpoint:
            size = (a.input_size, a.input_size) if a.input_size else None
            model = load_encoder(a.checkpoint, size, self.device, pick_fused_attention(self.device, amp_dtype))
            size = model.img_size

            def encode(imgs):
                return model.encode(imgs)["mean"]

        else:
            clip, _, identity = self.clip()
            teacher = FrozenTeacher(clip.to(self.device), identity, amp_dtype or torch.float32).to(self.device)
            size, encode, amp_dtype = teacher.size, teacher, None
        images = WholeImages(self.images, rows, size, self.index.box)
        workers = 2 if a.num_workers is None else a.num_workers
        result = extract_to_file(
            encode, images, self.device, self.folder / "embeddings", {"job": job}, dtype=np.float16,
            batch_size=a.batch_size, num_workers=workers, amp_dtype=amp_dtype,
        )  # fmt: skip
        if result is None:
            return {}
        shape, problems = result
        if problems:
            raise InputError(
                f"{len(problems)} images could be read when they were indexed but not now, first "
                f"{self.images.name(min(problems))}: bring them back, or remove "
                f"{self.folder}/stages and index again"
            )
        write_atomic(self.folder / "embedded_rows.npy", lambda f: np.save(f, rows))
        return {"images": shape[0], "dim": shape[1]}

    # removals that need embeddings

    def prompts(self) -> list | None:
        return list(read_prompts(self.args.vehicle_prompts)) if self.args.vehicle_filter else None

    def drop_others(self, job: str) -> dict:
        if not self.args.vehicle_filter:
            return self.drop("vehicle", Removals(len(self.index)).finish())
        clip, tokenizer, identity = self.clip()
        wanted, other = read_prompts(self.args.vehicle_prompts)
        pool = self.alive(before="vehicle")
        removal = not_vehicles(
            self.embedded, pool, len(self.index),
            encode_texts(clip, tokenizer, [*wanted, *other]), len(wanted), identity.tau,
            self.args.vehicle_threshold, self.device,
        )  # fmt: skip
        return self.drop("vehicle", removal)

    def aligner(self) -> Aligner:
        return Aligner(np.load(self.folder / "thumbnails.npy", mmap_mode="r"), self.device)

    def drop_leaks(self, job: str) -> dict:
        a = self.args
        removal = find_leaks(
            self.index, self.embedded, self.alive(before="leaks"),
            lambda row: recognise(self.images.name(row)),
            like=Likeness(a.near_bits, a.leak_cosine, a.near_agreement), aligner=self.aligner(),
            seed=a.seed,
        )  # fmt: skip
        return self.drop("leaks", removal)

    def drop_duplicates(self, job: str) -> dict:
        a = self.args
        removal = find_duplicates(
            self.index, self.embedded, self.alive(before="duplicates"),
            load_removal(self.folder, "leaks").rows,
            like=Likeness(a.near_bits, a.near_cosine, a.near_agreement), aligner=self.aligner(),
            group_cap=a.group_cap, track_cap=a.track_cap, seed=a.seed,
        )  # fmt: skip
        return self.drop("duplicates", removal)

    # clusters and sample

    def domains(self):
        return domains(self.alive(), self.index.source, self.index.sources, self.args.stratify)

    def cluster(self, job: str) -> dict:
        folder = self.folder / "clusters" / job[:12]
        found = self.domains()
        trees = build_trees(found, self.embedded, folder, self.device, self.args, self.args.memory_gb * 1e9)
        return {"folder": str(folder.relative_to(self.folder)), "images": sum(len(d.rows) for d in found)} | {
            f"levels of {domain.name}": " > ".join(map(str, tree.sizes)) for domain, tree in zip(found, trees)
        }

    def trees_folder(self) -> Path:
        return self.folder / self.stages.records["cluster"]["counts"]["folder"]

    def sample(self, job: str) -> dict:
        a = self.args
        selection, shares = draw_sample(self.domains(), self.trees_folder(), a.target_size, a.quota, a.seed, a.sample)
        write_atomic(self.folder / "selection.npy", lambda f: np.save(f, selection))
        return {"images": len(selection)} | {f"from {name}": share for name, share in shares.items()}

    def write(self, job: str) -> dict:
        selection = np.load(self.folder / "selection.npy")
        clusters, distance = self.clusters_of(selection)
        progress = Progress("written", len(selection))
        cut_folder = self.stages.records["index"]["fingerprint"][:12]
        counts = write_manifest(self.folder, cut_folder, self.images, selection, clusters, distance, progress.update)
        progress.close()
        return counts

    def clusters_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, levels] int32 cluster numbers (-1 beyond a smaller tree) and [n] float32 squared distances."""
        trees = [load_tree(self.trees_folder() / domain.name) for domain in self.domains()]
        levels = max(len(tree.sizes) for tree, _ in trees)
        clusters = np.full((len(rows), levels), -1, dtype=np.int32)
        distance = np.zeros(len(rows), dtype=np.float32)
        for tree, members in trees:
            mine = np.isin(rows, members)
            place = np.searchsorted(members, rows[mine])
            clusters[mine, : len(tree.sizes)] = tree.path()[place]
            distance[mine] = tree.distance[place]
        return clusters, distance


def main(args) -> dict:
    check_args(args)
    return launch(args.device, args.output, lambda device: Curation(args, device).run())


if __name__ == "__main__":
    ARGS = Parser("main_curate.py", __doc__, parents=[get_args_parser()]).parse_args()
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
