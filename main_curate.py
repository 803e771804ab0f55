"""From a pool of vehicle images to a balanced sample: python main_curate.py --pool NAME=PATH --output DIR ...

Stages: index, quality, embed, vehicle, leaks, duplicates, cluster, sample, write, report. Each leaves files that can be
looked at and a record in stages/; a run that was stopped, or whose later settings changed, goes on where that is
possible. Under torchrun the ranks share index, embed and cluster. docs/CURATE.md explains the files.
"""

import argparse
import itertools
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from util.cli import Parser, check_numbers, run_tool
from util.errors import InputError

DROPS = ("quality", "vehicle", "leaks", "duplicates")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("main_curate.py", __doc__)
    # fmt: off
    add = parser.add_argument_group("pool").add_argument
    add("--pool", nargs="+", required=True, action="extend", metavar="NAME=PATH",
        help="folders, manifests, packed sets to choose from; validation and test rows by a column split stay out")
    add("--exclude", nargs="+", default=[], action="extend", metavar="NAME=PATH",
        help="evaluation images of every benchmark: they and near copies leave the pool (default none)")
    add("--identity_column", default="pid", help="manifest column of the vehicle's identity (default pid)")
    add("--camera_column", default="camid", help="manifest column of the camera (default camid)")
    add("--box_column", default="box", help="manifest column `left upper right lower` in px (default box)")
    add("--box_margin", default=0.05, type=float, help="added to each side, fraction of its size (default 0.05)")
    add("--output", required=True, help="folder for everything that is made")

    add = parser.add_argument_group("quality").add_argument
    pair = {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}
    add("--min_side", default=64, type=int, help="shorter side at least, px (default 64)")
    add("--aspect", default=[0.3, 3.5], **pair, help="width / height from LOW to HIGH (default 0.3 3.5)")
    add("--brightness", default=[10.0, 245.0], **pair, help="mean grey value of 255 (default 10 245)")
    add("--min_contrast", default=8.0, type=float, help="deviation of the grey values of 255 (default 8)")
    add("--min_sharpness", default=3.0, type=float, help="deviation of the Laplacian at 256 px (default 3)")

    add = parser.add_argument_group("embedding").add_argument
    add("--clip_model", default="ViT-L-14", help="open_clip name or JSON config (default ViT-L-14)")
    add("--clip_pretrained", default="openai", help="open_clip tag or weight file (default openai)")
    add("--checkpoint", default=None, help="embed with the mean patch token of this encoder (default: CLIP)")
    add("--input_size", default=None, type=int, help="of --checkpoint, px (default: the checkpoint's)")
    add("--vehicle_filter", action="store_true", help="remove what CLIP takes for no vehicle (default off)")
    add("--vehicle_threshold", default=0.5, type=float, help="least probability of the vehicle prompts (default 0.5)")
    add("--vehicle_prompts", default=None, help="JSON file of prompts (default: curation/prompts.json)")

    add = parser.add_argument_group("copies").add_argument
    add("--near_bits", default=6, type=int,
        help="hashes that differ in so many of 64 bits are near copies from an agreement of 0.8, 0 to 7 (default 6)")
    add("--near_agreement", default=0.88, type=float,
        help="agreement of the pixels, once a crop or mirror is undone, that makes near copies: the correlation that "
             "three quarters of the tiles reach (default 0.88)")
    add("--near_cosine", default=0.97, type=float,
        help="with embeddings so alike an agreement of 0.8 is enough (default 0.97)")
    add("--leak_cosine", default=0.95, type=float, help="the same between pool and --exclude (default 0.95)")
    add("--group_cap", default=16, type=int, help="images that may count as copies of one (default 16)")
    add("--track_cap", default=4, type=int, help="images of one (identity, camera), if known (default 4)")

    add = parser.add_argument_group("clusters and sample").add_argument
    add("--target_size", default=1_000_000, type=int, help="images to choose (default 1000000)")
    add("--stratify", default="none", choices=("none", "source"), help="a tree of clusters a source (default none)")
    add("--quota", nargs="+", default=[], action="extend", metavar="NAME=SHARE",
        help="share of a source in the sample, with --stratify source (default: as equal as sizes allow)")
    add("--levels", nargs="+", default=None, type=int, metavar="K",
        help="clusters on each level, finest first (default: from the number of images)")
    add("--resampling", default=10, type=int, help="resampling steps on each level (default 10)")
    add("--resample", default="closest", choices=("closest", "random"),
        help="which images of a cluster are clustered again (default closest)")
    add("--iterations", default=50, type=int, help="of k-means, at most (default 50)")
    add("--spherical", action="store_true", help="cluster unit vectors, with unit centroids (default off)")
    add("--sample", default="random", choices=("random", "closest"), help="images of a cluster (default random)")

    add = parser.add_argument_group("run").add_argument
    add("--seed", default=0, type=int, help="of every random choice (default 0)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--batch_size", default=128, type=int, help="images embedded at a time (default 128)")
    add("--num_workers", default=None, type=int, help="processes that open images (default: the cores)")
    add("--memory_gb", default=4.0, type=float, help="GB of embeddings kept in memory a rank (default 4)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import numpy as np
import torch

from curation.copies import Aligner, CopyFinder
from curation.filters import Removals, load_removal, poor_images, read_prompts, vehicle_probability
from curation.hierarchy import Tree, build_tree, load_tree, plan_levels
from curation.index import SIDE, build_index, load_index, write_manifest
from curation.rows import CHUNK, Embedded, Rows
from curation.sample import draw_sample, judge
from curation.sources import open_sources
from curation.stages import Stages
from datasets.benchmarks import recognise
from datasets.items import WholeImages
from engine_extract import extract_to_file
from models_teacher import FrozenTeacher, encode_texts, load_clip
from models_vit import load_encoder
from reports.curation import Curated, write_curation_report
from util.dist import is_main_process, launch
from util.files import file_sha256, write_atomic, write_json
from util.precision import pick_precision


def check_args(args) -> None:
    check_numbers(
        args,
        at_least_one="target_size group_cap track_cap iterations batch_size",
        not_negative="near_bits resampling box_margin near_cosine near_agreement leak_cosine vehicle_threshold",
    )
    if args.near_bits > 7:
        raise InputError(f"--near_bits {args.near_bits}: must be from 0 to 7")
    if args.quota and args.stratify == "none":
        raise InputError("--quota needs --stratify source: without it there is one tree for all sources")
    if args.checkpoint and args.vehicle_filter:
        raise InputError("--vehicle_filter asks CLIP, so it cannot go with --checkpoint: drop one of them")


class Curation:
    """The stages of one run, on files of `--output`."""

    def __init__(self, args, device: torch.device):
        self.args, self.device, self.folder = args, device, Path(args.output)
        columns = {"identity": args.identity_column, "camera": args.camera_column, "box": args.box_column}
        self.images = open_sources(args.pool, args.exclude, columns)
        self.stages = Stages(self.folder)

    def run(self) -> dict:
        args, run = self.args, self.stages.run

        def flags(names: str) -> dict:
            return {name: getattr(args, name) for name in names.split()}

        sources = {"sources": self.images.fingerprint(), "thumbnails": SIDE}
        counts = {"index": run("index", sources | flags("box_margin"), self.make_index, shared=True)}
        self.index = load_index(self.folder / "index.csv")
        self.check_excluded()
        limits = flags("min_side aspect brightness min_contrast min_sharpness")
        counts["quality"] = run("quality", limits, lambda _: self.drop("quality", poor_images(self.index, args)))
        counts["embed"] = run("embed", self.encoder_settings(), self.embed, shared=True)
        self.embedded = Embedded(self.array("embeddings", mmap_mode="r"), self.array("embedded_rows"))
        prompts = list(read_prompts(args.vehicle_prompts)) if args.vehicle_filter else None
        settings = flags("vehicle_filter vehicle_threshold") | {"prompts": prompts}
        counts["vehicle"] = run("vehicle", settings, self.drop_others)
        copies = "near_bits near_agreement"
        counts["leaks"] = run("leaks", flags(f"{copies} leak_cosine"), self.drop_leaks)
        settings = flags(f"{copies} near_cosine group_cap track_cap")
        counts["duplicates"] = run("duplicates", settings, self.drop_duplicates)
        settings = flags("stratify levels resampling resample iterations spherical seed")
        counts["cluster"] = run("cluster", settings, self.cluster, shared=True)
        counts["sample"] = run("sample", flags("target_size quota sample seed"), self.sample)
        counts["write"] = run("write", {}, self.write)
        if not is_main_process():
            return {}
        selection = self.array("selection")
        counts["evidence"], sizes = judge(self.embedded, self.domains(), selection, self.device, args.seed)
        write_json(self.folder / "curation.json", {"settings": vars(args), "stages": self.stages.records} | counts)
        self.report(selection, counts["evidence"], sizes)
        return counts

    def array(self, name: str, **how) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", **how)

    def report(self, selection: np.ndarray, evidence: dict, sizes: dict) -> None:
        removals = {
            name: load_removal(self.folder, name) for name in DROPS if name != "vehicle" or self.args.vehicle_filter
        }
        clusters = {name: (rows, tree.path()[:, :2][:, -1]) for name, (tree, rows) in self.trees().items()}
        found = (self.images, self.index, removals, selection, clusters, evidence, sizes, vars(self.args))
        write_curation_report(self.folder / "report.html", Curated(*found))

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
                raise InputError(
                    f"--exclude {source.name}: none of its {len(source.paths)} images can be read, so no "
                    f"copy of them could be found; {self.folder / 'index.csv'} says why"
                )

    def drop(self, name: str, removal: Removals) -> dict:
        removal.save(self.folder, name, self.images.name)
        return {"removed": len(removal.rows)} | removal.counts()

    def alive(self, before: str = "cluster") -> np.ndarray:
        """Pool rows that no stage before this one has removed, int64 ascending."""
        still = ~self.index.excluded & self.index.readable
        for name in itertools.takewhile(lambda name: name != before, DROPS):
            still[load_removal(self.folder, name).rows] = False
        return np.flatnonzero(still)

    @cached_property
    def clip(self):
        return load_clip(self.args.clip_model, self.args.clip_pretrained)

    def encoder_settings(self) -> dict:
        file = self.args.checkpoint
        if file is None:
            return {"clip": asdict(self.clip[2])}
        if not Path(file).is_file():
            raise InputError(f"--checkpoint {file} does not exist: give an encoder, or drop the flag for CLIP")
        return {"sha256": file_sha256(file), "input_size": self.args.input_size}

    def encoder(self):
        """([n, 3, H, W] uint8 -> [n, D], (H, W), precision of the autocast around it)."""
        args, device = self.args, self.device
        amp_dtype = pick_precision("auto" if device.type == "cuda" else "none", device)[0]
        if args.checkpoint is None:
            clip, _, identity = self.clip
            teacher = FrozenTeacher(clip.to(device), identity, amp_dtype or torch.float32).to(device)
            return teacher, teacher.size, None
        size = (args.input_size, args.input_size) if args.input_size else None
        model = load_encoder(args.checkpoint, size, device)
        return lambda imgs: model.encode(imgs)["mean"], model.img_size, amp_dtype

    def embed(self, job: str) -> dict:
        args = self.args
        pool = self.alive(before="vehicle")
        if not len(pool):
            raise InputError(
                f"no image is left to choose from: {self.folder / 'quality.csv'} says why each was removed"
            )
        rows = np.union1d(pool, np.flatnonzero(self.index.excluded & self.index.readable))
        encode, size, amp_dtype = self.encoder()
        result = extract_to_file(
            encode, WholeImages(self.images, rows, size, self.index.box), self.device, self.folder / "embeddings",
            {"job": job}, dtype=np.float16, batch_size=args.batch_size, amp_dtype=amp_dtype,
            num_workers=2 if args.num_workers is None else args.num_workers,
        )  # fmt: skip
        if result is None:
            return {}
        (count, dim), problems = result
        if problems:
            raise InputError(
                f"{len(problems)} images could be read when they were indexed but not now, first "
                f"{self.images.name(min(problems))}: bring them back, or remove {self.folder}/stages and index again"
            )
        write_atomic(self.folder / "embedded_rows.npy", lambda f: np.save(f, rows))
        return {"images": count, "dim": dim}

    def drop_others(self, job: str) -> dict:
        removal, rows = Removals(len(self.index)), self.alive(before="vehicle")
        if self.args.vehicle_filter:
            clip, tokenizer, identity = self.clip
            texts = [encode_texts(clip, tokenizer, t).to(self.device) for t in read_prompts(self.args.vehicle_prompts)]
            for part in np.split(rows, range(CHUNK, len(rows), CHUNK)):
                x = torch.from_numpy(self.embedded.data[self.embedded.place(part)]).to(self.device).float()
                probability = vehicle_probability(x, *texts, identity.tau).cpu().numpy()
                low = probability < self.args.vehicle_threshold
                removal.add("not a vehicle (probability)", part[low], value=probability[low])
        return self.drop("vehicle", removal)

    def finder(self, cosine: float) -> CopyFinder:
        aligner = Aligner(self.array("thumbnails", mmap_mode="r"), self.device)
        return CopyFinder(self.index, self.embedded, aligner, self.args.near_bits, cosine, self.args.near_agreement)

    def drop_leaks(self, job: str) -> dict:
        finder = self.finder(self.args.leak_cosine)
        return self.drop("leaks", finder.leaks(self.alive("leaks"), lambda row: recognise(self.images.name(row))))

    def drop_duplicates(self, job: str) -> dict:
        finder, leaked = self.finder(self.args.near_cosine), load_removal(self.folder, "leaks").rows
        removal = finder.duplicates(self.alive("duplicates"), leaked, self.args.group_cap, self.args.track_cap)
        return self.drop("duplicates", removal)

    def domains(self) -> dict[str, np.ndarray]:
        """Index rows of the images that get a tree of their own: all, or those of each source, which then cannot crowd
        out another."""
        rows = self.alive()
        if self.args.stratify == "none":
            return {"all": rows}
        found = {name: rows[self.index.source[rows] == number] for number, name in enumerate(self.index.sources)}
        return {name: mine for name, mine in found.items() if len(mine)}

    def cluster(self, job: str) -> dict:
        args, domains = self.args, self.domains()
        folder = Path("clusters", job[:12])
        counts = {"folder": str(folder), "images": sum(map(len, domains.values()))}
        for number, (name, mine) in enumerate(domains.items()):
            ks = plan_levels(len(mine), args.levels, clip=len(domains) > 1)
            place, memory = self.embedded.place(mine), args.memory_gb * 1e9
            rows = Rows(self.embedded.data, self.device, place, args.spherical, resident_bytes=memory)
            tree = build_tree(
                rows, ks, self.folder / folder / name, seed=args.seed, tree_number=number,
                resampling=args.resampling, iterations=args.iterations, resample=args.resample,
            )  # fmt: skip
            if is_main_process():
                tree.save(self.folder / folder / name, mine)
            counts[f"levels of {name}"] = " > ".join(map(str, tree.sizes))
        return counts

    def trees(self) -> dict[str, tuple[Tree, np.ndarray]]:
        """Name -> (tree, index rows of its images)."""
        folder = self.folder / self.stages.records["cluster"]["counts"]["folder"]
        return {name: load_tree(folder / name) for name in self.domains()}

    def sample(self, job: str) -> dict:
        selection, shares = draw_sample(self.trees(), self.args)
        write_atomic(self.folder / "selection.npy", lambda f: np.save(f, selection))
        return {"images": len(selection)} | {f"from {name}": share for name, share in shares.items()}

    def write(self, job: str) -> dict:
        """Write the manifest, with the cluster of each image on every level (-1 beyond a smaller tree)."""
        selection, trees = self.array("selection"), self.trees().values()
        clusters = np.full((len(selection), max(len(tree.sizes) for tree, _ in trees)), -1, dtype=np.int32)
        distance = np.zeros(len(selection), dtype=np.float32)
        for tree, rows in trees:
            mine = np.isin(selection, rows)
            place = np.searchsorted(rows, selection[mine])
            clusters[mine, : len(tree.sizes)] = tree.path()[place]
            distance[mine] = tree.distance[place]
        cut_folder = self.stages.records["index"]["fingerprint"][:12]
        return write_manifest(self.folder, cut_folder, self.images, selection, clusters, distance)


def main(args) -> dict:
    check_args(args)
    return launch(args.device, args.output, lambda device: Curation(args, device).run())


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
