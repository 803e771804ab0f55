"""Re-identification: TransReID and its baseline, trained and scored."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.items import WholeImages
from datasets.reid import UNKNOWN, ReidData, ReidImages, ReidTrainImages, read_reid
from datasets.samplers import PKBatches, count_used
from datasets.transforms import PadCropErase, erase_boxes
from engine_finetune import predict
from finetune.task import Task
from metrics.reid import FeatureSet, Protocol, draw_gallery, protocols_of
from metrics.reid import evaluate as evaluate_features
from models_transreid import (
    TransReID,
    TransReIDConfig,
    center_loss,
    hard_triplet_loss,
    identity_loss,
    move_centers,
    over_branches,
)
from models_vit import VisionTransformer
from reports.reid import ReidTest, write_reid_report
from util.dist import gather_rows, get_rank, get_world_size, wait_for_main
from util.errors import InputError

# up to which a published set numbers its cameras: train alone may not show the last
CAMERAS = {"veri776": 20, "veriwild": 175}
SIDE = (("camids", "cameras"), ("viewids", "views"))  # an image's ids, and how many of them a model knows


class Reid(Task):
    """TransReID on a set of vehicles."""

    kind = "CGD-MAE TransReID"
    shown = ("id", "triplet", "accuracy")
    alone = {"num_classes": 1, "reid": asdict(TransReIDConfig())}  # config of an encoder as it is

    def read(self, config: dict | None) -> ReidData:
        args = self.args
        data = read_reid(args.data_path, args.format, need_train=config is None)
        for name in args.tests or ():
            if name not in data.tests:
                raise InputError(f"--tests {name}: {args.data_path} has {', '.join(data.tests)}")
        data = replace(data, tests={name: data.tests[name] for name in args.tests or data.tests})
        self.sizes = {} if config else side_information(args, data)
        return renumber_cameras(data, config, args.resume) if config else data

    def order(self) -> PKBatches:
        args, ranks = self.args, (get_rank(), get_world_size())
        return PKBatches(self.data.train.pids, args.batch_size, args.num_instances, *ranks, args.seed)

    def describe(self, encoder: VisionTransformer) -> dict:
        args, data = self.args, self.data
        config = TransReIDConfig(**self.sizes, jpm=args.jpm, shift=args.jpm_shift, sie_weight=args.sie_weight)
        return reid_config(data, config)

    @staticmethod
    def model_from(encoder: VisionTransformer, config: dict) -> TransReID:
        return TransReID(encoder, config["num_classes"], TransReIDConfig(**config["reid"]))

    def prepare(self) -> None:
        """Centres; side information that nothing trains becomes zero, and test images that need it are counted."""
        data, model = self.data, self.model
        if self.args.center_weight:
            model.register_buffer("centers", torch.zeros(data.classes, model.base.embed_dim))
        unseen = model.forget_unseen(*side_of(data.train))
        tested = [part for test in data.tests.values() for part in test if part]
        rows = [model.side_rows(*side_of(part)) for part in tested] if len(unseen) else []
        if untrained := sum(int(torch.isin(row, unseen).sum()) for row in rows):
            data.notes.append(
                f"{untrained} test images come from cameras or views that training does not show: their side "
                "information is zero"
            )

    def items(self) -> ReidTrainImages:
        augment = PadCropErase(self.args.img_size, erase=self.args.erase)
        return ReidTrainImages(self.data.train, augment, self.args.seed)

    def facts(self) -> dict:
        return super().facts() | {"num_classes": self.data.classes}

    def epoch_line(self) -> str:
        used = count_used(self.data.train.pids, self.batches.rows)
        return (
            f"{super().epoch_line()}: {used['vehicles']} vehicles x {self.args.num_instances}, {used['images']} of "
            f"{len(self.data.train)} images"
        )

    def model_line(self) -> str:
        model, config = self.model, self.model.config
        jpm = "JPM" if config.jpm else "no JPM"
        return (
            f"TransReID: {model.base.num_patches} patches, features of {model.feature_dim}, {jpm}, {side_line(config)}"
        )

    def loss(self, wrapped: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """TransReID's loss (eq. 9 and 10): identity + triplet over the branches; scalars of the whole batch of
        all ranks, and the share of images whose vehicle the global branch names."""
        args, model = self.args, self.model
        imgs = erase_boxes(model.base.normalize(batch["imgs"]), batch["erase"])
        side = (batch[ids] if getattr(model.config, what) else None for ids, what in SIDE)
        logits, features = wrapped(imgs, *side)
        pids = gather_rows(batch["pids"])
        terms = {
            "id": over_branches(lambda x, y: identity_loss(x, y, args.smoothing), logits, pids),
            "triplet": over_branches(hard_triplet_loss, features, pids),
        }
        terms["loss"] = args.id_weight * terms["id"] + args.triplet_weight * terms["triplet"]
        if args.center_weight:
            terms["center"] = center_loss(features[0], pids, model.centers)
            terms["loss"] = terms["loss"] + args.center_weight * terms["center"]
            move_centers(model.centers, features[0].detach(), pids)
        terms["accuracy"] = (logits[0].argmax(dim=1) == pids).float().mean()
        return terms

    def answers(self, is_over: bool) -> dict[str, "TestResult"]:
        args, data = self.args, self.data
        rerank = (args.rerank_k1, args.rerank_k2, args.rerank_lambda) if args.rerank and is_over else None
        protocols = protocols_of(data.name, data.tests, args.keep_same_camera, args.protocol_seed)
        loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
        return evaluate_reid(self.model, data, protocols, rerank=rerank, **loading)

    def score(self, found: dict[str, "TestResult"], is_over: bool) -> tuple[dict, list[str], list[str]]:
        side = side_line(self.model.config)
        lines = [*([side] if side != "SIE off" else []), *result_lines(found)]
        return flat_metrics(found) | {"sie": side}, lines, unreadable_of(found)

    def report(self, found: dict[str, "TestResult"], numbers: dict, folder: Path, facts: dict) -> list[Path]:
        """One page a test; VehicleID's shows its first draw."""
        model, files = self.model, []
        facts |= {"SIE": side_line(model.config), "feature": f"{model.feature_dim} numbers"}
        for test, result in found.items():
            if result.protocol.rerank:
                continue
            query, gallery = result.query, result.gallery
            if gallery is None:
                kept, asked = draw_gallery(query.images.pids, result.protocol.seed, 0)
                query, gallery = query.take(asked), query.take(kept)
            rows = (query.images, query.values, gallery.images, gallery.values)
            files.append(folder / ("report.html" if test == "test" else f"report_{test}.html"))
            told = ReidTest(result.protocol, result.metrics, *rows, self.data.pid_names)
            write_reid_report(files[-1], facts, told, model.base.pos_embed.device)
        return files


def side_information(args, data: ReidData) -> dict:
    """Sizes of the tables of side information that flags and data ask for; InputError for one of something that the
    set does not know."""
    train, sizes = data.train, {}
    if args.sie_camera:
        if not train.has_cameras():
            raise InputError(f"--sie_camera: {args.data_path} does not say which camera took what; drop it")
        names = data.camera_names
        sizes["cameras"] = len(names) if names else max(CAMERAS.get(data.name, 0), int(train.camids.max()) + 1)
    if args.sie_view:
        if not (train.viewids >= 0).any():
            hint = "; put keypoint_train.txt and keypoint_test.txt there" if data.name == "veri776" else ""
            raise InputError(f"--sie_view: {args.data_path} knows no viewpoints{hint}, or drop --sie_view")
        parts = [train, *(part for test in data.tests.values() for part in test if part)]
        unknown = any((part.viewids < 0).any() for part in parts)
        known = len(data.view_names) if data.view_names else int(train.viewids.max()) + 1
        sizes |= {"views": known + unknown, "unknown_view": bool(unknown)}
    return sizes


def side_line(config: TransReIDConfig) -> str:
    """SIE in words: what numbers of different settings must not be compared without."""
    used = [f"{count} {name}" for name, count in (("cameras", config.cameras), ("views", config.views)) if count]
    return f"SIE on ({', '.join(used)}, weight {config.sie_weight:g})" if used else "SIE off"


def reid_config(data: ReidData, config: TransReIDConfig) -> dict:
    """What builds the model again, and whose cameras and views it knows, as plain values."""
    return {
        "num_classes": data.classes, "reid": asdict(config), "set": data.name,
        "camera_names": data.camera_names, "view_names": data.view_names,
    }  # fmt: skip


def side_of(images: ReidImages) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] int64 camids and viewids."""
    return torch.from_numpy(images.camids), torch.from_numpy(images.viewids)


def renumber_cameras(data: ReidData, config: dict, file: str | Path) -> ReidData:
    """Number a set's cameras and views as a model with side information has learned them; InputError where it has
    learned those of another set, or not all of these."""
    reid = config["reid"]
    if not reid["cameras"] and not reid["views"]:
        return data
    if data.name != config["set"]:
        raise InputError(
            f"{file} was trained with side information, the cameras or views of {config['set']}, and means "
            f"nothing on {data.name}: train without --sie_camera and --sie_view to search across sets"
        )
    maps = {}
    for (ids, what), column in zip(SIDE, ("camera_names", "view_names")):
        here, there = getattr(data, column), config[column]
        if not reid[what] or not here or here == there:
            continue
        if missing := [name for name in here if name not in there]:
            raise InputError(
                f"{file} knows the {what} {', '.join(there)[:80]}, not {missing[0]}: it was trained with "
                "side information on another table"
            )
        maps[ids] = np.array([there.index(name) for name in here] + [UNKNOWN])  # the last is for -1

    def renumbered(images: ReidImages | None) -> ReidImages | None:
        return images and replace(images, **{ids: numbers[getattr(images, ids)] for ids, numbers in maps.items()})

    tests = {name: tuple(renumbered(part) for part in pair) for name, pair in data.tests.items()}
    return replace(data, train=renumbered(data.train), tests=tests)


@dataclass(frozen=True)
class Features:
    """Images that could be read, [n, D] float32 of them on the CPU, and of the others `path<tab>reason`."""

    images: ReidImages
    values: torch.Tensor
    unreadable: list[str]

    def take(self, rows: np.ndarray) -> "Features":
        return Features(self.images.take(rows), self.values[rows], self.unreadable)


@dataclass(frozen=True)
class TestResult:
    """One test of a set: its protocol, the numbers, and what they were made from."""

    protocol: Protocol
    metrics: dict[str, float]
    query: Features
    gallery: Features | None


def extract_reid(model: TransReID, images: ReidImages, title: str, **loading) -> Features | None:
    """Features for search, [n, D], on rank 0; None elsewhere; see `predict`."""
    device, (camids, viewids) = model.base.pos_embed.device, side_of(images)
    found = predict(
        lambda imgs, index: model.encode(imgs, *model.side_ids(camids[index], viewids[index], device)),
        WholeImages(images.paths, np.arange(len(images)), model.base.img_size),
        device,
        title,
        **loading,
    )
    return found and Features(images.take(found.rows), found.values, found.unreadable)


def evaluate_reid(
    model: TransReID,
    data: ReidData,
    protocols: dict[str, Protocol],
    *,
    rerank: tuple[int, int, float] | None = None,
    columns: dict[str, slice] | None = None,
    **loading,
) -> dict[str, TestResult]:
    """Every test of a set by its protocol, on rank 0; empty elsewhere.

    Args:
        rerank: (k1, k2, lambda): the re-ranked numbers come beside the others, as test "NAME reranked".
        columns: parts of the feature that are scored each for itself, as test "PART NAME" (None: all of it).
        loading: batch_size, num_workers.
    """
    results = {}
    for test, (query_images, gallery_images) in data.tests.items():
        query = extract_reid(model, query_images, f"{test}: query", **loading)
        gallery = gallery_images and extract_reid(model, gallery_images, f"{test}: gallery", **loading)
        if query is not None:
            gone = len(query.unreadable) + (len(gallery.unreadable) if gallery else 0)
            protocol = protocols[test]
            if gone:  # then it is another test, and says so
                protocol = replace(protocol, name=f"{protocol.name}/{gone}-unreadable-left-out")
            for part, cut in (columns or {"": slice(None)}).items():
                q = replace(query, values=query.values[:, cut])
                g = gallery and replace(gallery, values=gallery.values[:, cut])
                rows = [FeatureSet.of(side.values, side.images) for side in (q, g) if side]
                for ending, used in ("", protocol), (" reranked", replace(protocol, rerank=rerank)):
                    if used.rerank or not ending:
                        metrics = evaluate_features(used, *rows, device=model.base.pos_embed.device)
                        results[f"{part} {test}{ending}".strip()] = TestResult(used, metrics, q, g)
        wait_for_main()
    return results


def flat_metrics(results: dict[str, TestResult]) -> dict[str, float | str]:
    """Numbers by name for metrics.json: `mAP`, `R1` ... of a set's only test, else `800_mAP` ...; the
    protocol of each beside them."""
    flat: dict[str, float | str] = {}
    for test, result in results.items():
        words = [word for word in test.split() if word != "test"]
        prefix = "".join(f"{word}_" for word in words)
        flat |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
        if result.gallery:
            flat[f"{prefix}gallery"] = len(result.gallery.images)
        flat[f"{prefix}protocol"] = result.protocol.line()
    return flat


def result_lines(results: dict[str, TestResult]) -> list[str]:
    """The numbers in percent, each line with the protocol that they belong to."""
    lines = []
    for result in results.values():
        m = result.metrics
        numbers = []
        for name in ("mAP", "R1", "R5", "R10", "mINP"):
            spread = f" +- {100 * m[f'{name}_std']:.2f}" if f"{name}_std" in m else ""
            numbers.append(f"{name} {100 * m[name]:.2f}{spread}")
        lost = m["queries_without_match"]
        skipped = f"  ({lost:g} queries without a match are not scored)" if lost else ""
        lines.append(f"{result.protocol.line()}\n  {'  '.join(numbers)}  queries {m['queries']:g}{skipped}")
    return lines


def unreadable_of(results: dict[str, TestResult]) -> list[str]:
    """`path<tab>reason` of the test images that could not be read."""
    parts = [part for result in results.values() for part in (result.query, result.gallery) if part]
    return sorted({name for part in parts for name in part.unreadable})
