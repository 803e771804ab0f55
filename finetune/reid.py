"""Re-identification: TransReID and its baseline, from flags to a task that can be trained and scored."""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from datasets.reid import ReidData, ReidImages, ReidTrainImages, read_reid
from datasets.samplers import PKBatches, count_used
from datasets.transforms import PadCropErase, erase_boxes
from finetune.encoder import build_encoder, check_trained
from finetune.predict import write_unreadable
from finetune.reid_eval import evaluate_reid, flat_metrics, result_lines, unreadable_of
from finetune.reid_model import KIND, in_the_models_numbers, load_reid, reid_config
from finetune.task import Task
from metrics.reid import draw_gallery, protocols_of
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
from util.optim import build_finetune_optimizer, transreid_lr
from util.precision import scoring

# up to which a published set numbers its cameras: train alone may not show the last
CAMERAS = {"veri776": 20, "veriwild": 175}

RECIPE = {  # TransReID's
    "input_size": "256", "drop_path": 0.1, "batch_size": 64, "epochs": 120, "warmup_epochs": 5.0,
    "opt": "sgd", "min_lr_ratio": 0.002, "warmup_lr_ratio": 0.01, "bias_lr_factor": 2.0,
    "head_lr_factor": 1.0, "weight_decay": 1e-4, "clip_grad": 0.0, "smoothing": 0.0,
}  # fmt: skip
FIXED = (  # beside what no task may change on resume
    "num_instances", "jpm", "jpm_shift", "sie_camera", "sie_view", "sie_weight", "id_weight",
    "triplet_weight", "center_weight", "erase",
)  # fmt: skip
KNOWN_SIDE = ("jpm", "jpm_shift", "sie_camera", "sie_view", "sie_weight")  # of a trained model


def default_lr(args) -> float:
    """Learning rate at the recipe's batch."""
    return 5e-4 if args.opt == "adamw" else 0.01 if args.jpm else 0.008


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this task."""
    # fmt: off
    add = parser.add_argument_group("re-identification (--task reid)").add_argument
    add("--format", default="auto", choices=("auto", "veri776", "vehicleid", "veriwild", "table"),
        help="layout of --data_path (default auto: by the files that are there)")
    add("--num_instances", default=4, type=int, help="K, images of a vehicle in a batch (default 4)")
    add("--jpm", action="store_true", help="jigsaw patch module: four local branches (default off)")
    add("--jpm_shift", default=8, type=int, help="patches are rolled by this less one (default 8)")
    add("--sie_camera", action="store_true", help="side information: camera embedding (default off)")
    add("--sie_view", action="store_true", help="side information: view embedding (default off)")
    add("--sie_weight", default=3.0, type=float, help="lambda of the embedding (default 3)")
    add("--id_weight", default=1.0, type=float, help="weight of the identity loss (default 1)")
    add("--triplet_weight", default=1.0, type=float, help="weight of the triplet loss (default 1)")
    add("--center_weight", default=0.0, type=float,
        help="weight of the centre loss of the global feature; Luo et al. take 5e-4 (default 0: off)")
    add("--erase", default=0.5, type=float, help="chance that a rectangle is erased (default 0.5)")
    add("--tests", nargs="+", default=None, metavar="NAME",
        help="which tests of the set, for example 800 1600 2400 (default: all)")
    add("--keep_same_camera", action="store_true",
        help="score the variant that keeps same-camera matches; under another name (default off)")
    add("--protocol_seed", default=0, type=int, help="seed of VehicleID's ten draws (default 0)")
    add("--rerank", action="store_true", help="also score after k-reciprocal re-ranking (default off)")
    add("--rerank_k1", default=20, type=int, help="neighbours that may be reciprocal (default 20)")
    add("--rerank_k2", default=6, type=int, help="neighbours averaged over (default 6)")
    add("--rerank_lambda", default=0.3, type=float, help="share of the first distance (default 0.3)")
    # fmt: on


def check(args) -> None:
    """Contradictions among the flags of this task.

    Raises:
        InputError: one sentence on the first.
    """
    for name in ("id_weight", "triplet_weight", "center_weight", "sie_weight", "protocol_seed"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} {getattr(args, name)}: must not be negative")
    if args.id_weight == args.triplet_weight == 0:
        raise InputError("--id_weight 0 and --triplet_weight 0 leave nothing to learn: set one of them")
    if not 0 <= args.erase <= 1 or not 0 <= args.rerank_lambda <= 1:
        raise InputError("--erase and --rerank_lambda are shares: give numbers from 0 to 1")
    if args.num_instances < 2 or args.rerank_k1 < 1 or args.rerank_k2 < 1:
        raise InputError("--num_instances must be at least 2, --rerank_k1 and --rerank_k2 at least 1")


def build(args, device: torch.device, amp_dtype) -> Task:
    """Data, model, optimiser and losses of a training run."""
    data = chosen_tests(read_reid(args.data_path, args.format), args)
    rank, world = get_rank(), get_world_size()
    batches = PKBatches(data.train.pids, args.batch_size, args.num_instances, rank, world, args.seed)
    torch.manual_seed(args.seed)
    encoder, report = build_encoder(args)
    depth = len(encoder.blocks)
    model = build_model(args, data, encoder).to(device)
    optimizer = build_finetune_optimizer(
        model, depth, args.opt, args.lr, args.weight_decay,
        layer_decay=args.layer_decay, bias_lr_factor=args.bias_lr_factor, head_lr_factor=args.head_lr_factor,
    )  # fmt: skip

    def lr(epoch: float) -> float:
        first, last = args.lr * args.warmup_lr_ratio, args.lr * args.min_lr_ratio
        return transreid_lr(math.floor(epoch) + 1, args.lr, first, last, args.warmup_epochs, args.epochs)

    return Task(
        model,
        optimizer,
        ReidTrainImages(data.train, PadCropErase(args.img_size, erase=args.erase), args.seed),
        batches,
        loss=lambda wrapped, batch: reid_loss(wrapped, model, batch, args),
        shown=lambda values: [f"{name} {values[name]:.4f}" for name in ("id", "triplet", "accuracy")],
        lr=lr,
        evaluate=lambda is_over: score(model, data, args, amp_dtype, is_over),
        config=reid_config(encoder, data, model.config) | {"depth": depth},
        facts={
            "images": len(data.train), "images_sha": data.sha256(), "num_classes": data.classes,
        },
        header=header_lines(args, data, model, batches, report),
    )  # fmt: skip


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


def evaluate_file(args, device: torch.device, amp_dtype) -> dict:
    """`--eval`: score a trained model or a plain encoder.

    Raises:
        InputError: a file of the other kind, or flags that would change a trained model.
    """
    data = chosen_tests(read_reid(args.data_path, args.format, need_train=False), args)
    file = args.resume or args.finetune
    is_trained = bool(args.resume)
    check_trained(args, KIND, KNOWN_SIDE, encoder_alone="its class token is the feature then")
    if is_trained:
        model, config, report = load_reid(file, device)
        data = in_the_models_numbers(data, config, file)
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


def score(model: TransReID, data: ReidData, args, amp_dtype, is_over: bool = True) -> dict:
    """All tests of the set: numbers printed beside their protocol; re-ranking and the report where asked for,
    once training `is_over`. Products are not rounded to TF32."""
    try:
        with scoring(model):
            return score_as_is(model, data, args, amp_dtype, is_over)
    finally:
        wait_for_main()


def score_as_is(model: TransReID, data: ReidData, args, amp_dtype, is_over: bool) -> dict:
    results = evaluate_reid(
        model,
        data,
        protocols_of(data.name, data.cameras(), args.keep_same_camera, args.protocol_seed),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        amp_dtype=amp_dtype,
        rerank=(args.rerank_k1, args.rerank_k2, args.rerank_lambda) if args.rerank and is_over else None,
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
        query, gallery = result.query.images, result.gallery.images if result.gallery else None
        values = result.query.values, result.gallery.values if result.gallery else None
        if gallery is None:
            kept, asked = draw_gallery(query.pids, result.protocol.seed, 0)
            query, gallery = query.take(asked), query.take(kept)
            values = values[0][asked], values[0][kept]
        file = folder / ("report.html" if test == "test" else f"report_{test}.html")
        found = ReidTest(result.protocol, result.metrics, query, values[0], gallery, values[1], data.pid_names)
        write_reid_report(file, facts, found, model)
        print(f"report: {file}")
