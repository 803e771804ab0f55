"""Re-identification: TransReID and its baseline, from flags to a task that can be trained and scored."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.items import WholeImages
from datasets.reid import UNKNOWN, ReidData, ReidImages, ReidTrainImages, read_reid
from datasets.samplers import PKBatches, count_used
from datasets.transforms import PadCropErase, erase_boxes
from engine_finetune import Task, evaluation, predict, write_unreadable
from finetune.encoder import Trained, build_encoder, build_optimizer, transreid_schedule
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
from util.dist import gather_rows, get_rank, get_world_size, is_main_process, print_main, wait_for_main
from util.errors import InputError

# up to which a published set numbers its cameras: train alone may not show the last
CAMERAS = {"veri776": 20, "veriwild": 175}


def build(args, device: torch.device, amp_dtype) -> Task:
    """Data, model, optimiser and losses of a training run."""
    data = chosen_tests(read_reid(args.data_path, args.format), args)
    rank, world = get_rank(), get_world_size()
    batches = PKBatches(data.train.pids, args.batch_size, args.num_instances, rank, world, args.seed)
    torch.manual_seed(args.seed)
    encoder, report = build_encoder(args)
    depth = len(encoder.blocks)
    model = build_model(args, data, encoder).to(device)
    return Task(
        model,
        build_optimizer(model, depth, args),
        ReidTrainImages(data.train, PadCropErase(args.img_size, erase=args.erase), args.seed),
        batches,
        loss=lambda wrapped, batch: reid_loss(wrapped, model, batch, args),
        shown=("id", "triplet", "accuracy"),
        lr=transreid_schedule(args),
        evaluate=lambda is_over: score(model, data, args, amp_dtype, is_over),
        config=reid_config(encoder, data, model.config) | {"depth": depth},
        facts={"images": len(data.train), "images_sha": data.sha256(), "num_classes": data.classes},
        header=header_lines(args, data, model, batches, report),
    )


def build_model(args, data: ReidData, encoder: VisionTransformer) -> TransReID:
    """TransReID on an encoder, with the tables of side information that flags and data ask for.

    Raises:
        InputError: a test image from a camera or view that no table has a row for.
    """
    sizes = side_information(args, data)
    config = TransReIDConfig(**sizes, jpm=args.jpm, shift=args.jpm_shift, sie_weight=args.sie_weight)
    model = TransReID(encoder, data.classes, config)
    if args.center_weight:
        model.register_buffer("centers", torch.zeros(data.classes, encoder.embed_dim))
    unseen = model.forget_unseen(*side_of(data.train))
    tested = [part for test in data.tests.values() for part in test if part]
    rows = [model.side_rows(*side_of(part)) for part in tested]
    untrained = sum(int(torch.isin(row, unseen).sum()) for row in rows if row is not None)
    if untrained:
        data.notes.append(
            f"{untrained} test images come from cameras or views that training does not show: their side "
            "information is zero"
        )
    return model


def header_lines(args, data: ReidData, model: TransReID, batches: PKBatches, report: str) -> list[str]:
    """What is printed before the start."""
    used, encoder = count_used(data.train.pids, batches.rows), model.base
    return [
        f"data: {args.data_path} as {data.name}",
        *(f"  {note}" for note in data.notes),
        f"  an epoch: about {used['batches']} batches of {batches.rows.shape[1]}, {used['vehicles']} "
        f"vehicles x {args.num_instances}, {used['images']} of {len(data.train)} images",
        f"encoder: {report}",
        f"TransReID: {data.classes} classes, {encoder.num_patches} patches ({encoder.grid_size[0]} x "
        f"{encoder.grid_size[1]}, stride {encoder.stride}), features of {model.feature_dim}, "
        f"{'JPM' if args.jpm else 'no JPM'}, {side_line(model.config)}",
    ]


def side_information(args, data: ReidData) -> dict:
    """Sizes of the tables of side information that flags and data ask for.

    Raises:
        InputError: a table of something that the set does not know.
    """
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
        sizes["views"] = known + unknown
        sizes["unknown_view"] = bool(unknown)
    return sizes


def side_line(config: TransReIDConfig) -> str:
    """SIE in words: what numbers of different settings must not be compared without."""
    used = [f"{count} {name}" for name, count in (("cameras", config.cameras), ("views", config.views)) if count]
    return f"SIE on ({', '.join(used)}, weight {config.sie_weight:g})" if used else "SIE off"


def reid_config(encoder: VisionTransformer, data: ReidData, config: TransReIDConfig) -> dict:
    """What builds the model again, and whose cameras and views it knows, as plain values."""
    return {
        "kind": "CGD-MAE TransReID", "task": "reid", **encoder.settings(), "num_classes": data.classes,
        "reid": asdict(config), "set": data.name, "camera_names": data.camera_names, "view_names": data.view_names,
    }  # fmt: skip


def model_from(encoder: VisionTransformer, config: dict) -> TransReID:
    """The model that `reid_config` describes."""
    return TransReID(encoder, config["num_classes"], TransReIDConfig(**config["reid"]))


def reid_loss(wrapped: nn.Module, model: TransReID, batch: dict, args) -> dict[str, torch.Tensor]:
    """TransReID's loss (eq. 9 and 10): identity + triplet over the branches; scalars of the whole batch of
    all ranks, and the share of images whose vehicle the global branch names."""
    imgs = erase_boxes(model.base.normalize(batch["imgs"]), batch["erase"])
    camids, viewids = (
        batch[name] if count else None
        for name, count in (("camids", model.config.cameras), ("viewids", model.config.views))
    )
    logits, features = wrapped(imgs, camids, viewids)
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


def evaluate(found: Trained | None, args, device: torch.device, amp_dtype) -> dict:
    """Score a trained model, or with None the class token of the encoder that the flags ask for."""
    data = chosen_tests(read_reid(args.data_path, args.format, need_train=False), args)
    file = args.resume or args.finetune
    if found:
        model, report = found.model, found.report
        data = renumber_cameras(data, found.config, file)
    else:
        encoder, report = build_encoder(args)
        model = TransReID(encoder, 1, TransReIDConfig()).to(device)
    print_main(f"data: {args.data_path} as {data.name}", *(f"  {note}" for note in data.notes))
    print_main(f"model {file}:\n{report}\n{side_line(model.config)}")
    return score(model, data, args, amp_dtype)


def chosen_tests(data: ReidData, args) -> ReidData:
    """The set with the tests that --tests names.

    Raises:
        InputError: it has no such test.
    """
    for name in args.tests or ():
        if name not in data.tests:
            raise InputError(f"--tests {name}: {args.data_path} has {', '.join(data.tests)}")
    return replace(data, tests={name: data.tests[name] for name in args.tests}) if args.tests else data


def side_of(images: ReidImages) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] int64 camids and viewids."""
    return torch.from_numpy(images.camids), torch.from_numpy(images.viewids)


def renumber_cameras(data: ReidData, config: dict, file: str | Path) -> ReidData:
    """Number a set's cameras and views as a model with side information has learned them.

    Raises:
        InputError: the model has learned those of another set, or not all of these.
    """
    reid = config["reid"]
    if not reid["cameras"] and not reid["views"]:
        return data
    if data.name != config["set"]:
        raise InputError(
            f"{file} was trained with side information, the cameras or views of {config['set']}, and means "
            f"nothing on {data.name}: train without --sie_camera and --sie_view to search across sets"
        )
    maps = {}
    for ids, column, what in (("camids", "camera_names", "cameras"), ("viewids", "view_names", "views")):
        here, there = getattr(data, column), config[column]
        if not reid[what] or not here or here == there:
            continue
        missing = [name for name in here if name not in there]
        if missing:
            raise InputError(
                f"{file} knows the {what} {', '.join(there)[:80]}, not {missing[0]}: it was trained with "
                "side information on another table"
            )
        maps[ids] = np.array([there.index(name) for name in here] + [UNKNOWN])  # the last is for -1

    def renumbered(images: ReidImages | None) -> ReidImages | None:
        return images and replace(images, **{ids: numbers[getattr(images, ids)] for ids, numbers in maps.items()})

    tests = {name: tuple(renumbered(part) for part in pair) for name, pair in data.tests.items()}
    return replace(data, train=renumbered(data.train), tests=tests)


def score(model: TransReID, data: ReidData, args, amp_dtype, is_over: bool = True) -> dict:
    """All tests of the set: numbers printed beside their protocol; re-ranking and the report where asked for,
    once training `is_over`."""
    with evaluation(model):
        results = evaluate_reid(
            model,
            data,
            protocols_of(data.name, data.cameras(), args.keep_same_camera, args.protocol_seed),
            rerank=(args.rerank_k1, args.rerank_k2, args.rerank_lambda) if args.rerank and is_over else None,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            amp_dtype=amp_dtype,
        )
        if not is_main_process():
            return {}
        folder = Path(args.output_dir)
        write_unreadable(unreadable_of(results), folder)
        print("\n".join([f"SIE: {side_line(model.config)}", *result_lines(results)]), flush=True)
        if args.report and is_over:
            weights = args.resume if args.eval else folder / "model.pth"
            about = {"set": args.data_path, "weights": weights or args.finetune, "seed": args.seed}
            write_reports(model, data, results, folder, about)
        return flat_metrics(results) | {"sie": side_line(model.config)}


def write_reports(model: TransReID, data: ReidData, results: dict, folder: Path, about: dict) -> None:
    """One page a test; VehicleID's shows its first draw."""
    facts = about | {"SIE": side_line(model.config), "feature": f"{model.feature_dim} numbers"}
    for test, result in results.items():
        if result.protocol.rerank:
            continue
        query, gallery = result.query, result.gallery
        if gallery is None:
            kept, asked = draw_gallery(query.images.pids, result.protocol.seed, 0)
            query, gallery = query.take(asked), query.take(kept)
        rows = (query.images, query.values, gallery.images, gallery.values)
        file = folder / ("report.html" if test == "test" else f"report_{test}.html")
        write_reid_report(file, facts, ReidTest(result.protocol, result.metrics, *rows, data.pid_names), model)
        print(f"report: {file}")


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
    if found is None:
        return None
    return Features(images.take(found.rows) if found.unreadable else images, found.values, found.unreadable)


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
        loading: batch_size, num_workers, amp_dtype of `extract_batches`.
    """
    results = {}
    for test, (query_images, gallery_images) in data.tests.items():
        query = extract_reid(model, query_images, f"{test}: query", **loading)
        gallery = None
        if gallery_images is not None:
            gallery = extract_reid(model, gallery_images, f"{test}: gallery", **loading)
        if query is not None:
            gone = len(query.unreadable) + (len(gallery.unreadable) if gallery else 0)
            protocol = protocols[test]
            if gone:  # then it is another test, and says so
                protocol = replace(protocol, name=f"{protocol.name}/{gone}-unreadable-left-out")
            for part, cut in (columns or {"": slice(None)}).items():
                q = replace(query, values=query.values[:, cut])
                g = gallery and replace(gallery, values=gallery.values[:, cut])
                rows = [FeatureSet(side.values, side.images.pids, side.images.camids) for side in (q, g) if side]
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
        skipped = ""
        if m["queries_without_match"]:
            skipped = f"  ({m['queries_without_match']:g} queries without a match are not scored)"
        lines.append(f"{result.protocol.line()}\n  {'  '.join(numbers)}  queries {m['queries']:g}{skipped}")
    return lines


def unreadable_of(results: dict[str, TestResult]) -> list[str]:
    """`path<tab>reason` of the test images that could not be read."""
    parts = [part for result in results.values() for part in (result.query, result.gallery) if part]
    return sorted({name for part in parts for name in part.unreadable})
