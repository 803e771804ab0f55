"""Re-identification: TransReID and its baseline, trained and scored."""

import hashlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.items import WholeImages
from datasets.reid import UNKNOWN, ReidData, ReidImages, ReidTrainImages, read_reid
from datasets.samplers import PKBatches
from datasets.transforms import PadCropErase, erase_boxes
from engine_finetune import predict
from finetune.open_set import OPEN_SET, model_identity, open_lines, write_open_set
from finetune.task import Task
from metrics.open_set import Answers, open_answers, open_numbers
from metrics.reid import FeatureSet, Protocol, evaluate_queries, protocols_of
from metrics.tracks import pool_tracks, sharpness
from metrics.whitening import Whitening
from models_transreid import TransReID, TransReIDConfig, hard_triplet_loss, over_branches
from models_vit import VisionTransformer
from reports.reid import ReidFeatures, ReidTest, write_reid_report
from util.checkpoint import write_safetensors
from util.dist import gather_rows, get_rank, get_world_size, wait_for_main
from util.errors import InputError

QUERIES = "queries.safetensors"
SIDE = (("camids", "cameras"), ("viewids", "views"))  # an image's ids, and how many of them a model knows


class Reid(Task):
    """TransReID on a set of vehicles."""

    kind = "CGD-MAE TransReID"
    shown = ("id", "triplet", "accuracy")
    alone = {"num_classes": 1, "reid": asdict(TransReIDConfig())}
    fitted: Whitening | None = None

    def __init__(self, args, device: torch.device):
        super().__init__(args, device)
        self.open_answers: dict[str, Answers] = {}  # of each test that was scored with --open_set

    @property
    def is_trained(self) -> bool:
        """Whether the model is one of main_finetune.py, or an encoder as it is."""
        return not (self.args.eval and self.args.finetune)

    def read(self, config: dict | None) -> ReidData:
        args = self.args
        data = read_reid(args.data_path, args.format, need_train=config is None)
        if {"aqe", "alpha"} <= {*(args.expand or ())}:
            raise InputError("--expand aqe alpha: both expand the queries: choose one")
        if unknown := [name for name in args.tests or () if name not in data.tests]:
            raise InputError(f"--tests {unknown[0]}: {args.data_path} has {', '.join(data.tests)}")
        data = replace(data, tests={name: data.tests[name] for name in args.tests or data.tests})
        if config is None:
            self.sizes = side_information(args, data)
        return renumber_cameras(data, config, args.resume) if config else data

    def order(self) -> PKBatches:
        args, ranks = self.args, (get_rank(), get_world_size())
        return PKBatches(self.data.train.pids, args.batch_size, args.num_instances, *ranks, args.seed)

    def describe(self, encoder: VisionTransformer) -> dict:
        args, data = self.args, self.data
        config = TransReIDConfig(**self.sizes, jpm=args.jpm, shift=args.jpm_shift, sie_weight=args.sie_weight)
        names = {"set": data.name, "trained_on": set_name(data, args.data_path)}
        names |= {"camera_names": data.camera_names, "view_names": data.view_names}
        return {"num_classes": data.classes, "reid": asdict(config)} | names

    @staticmethod
    def model_from(encoder: VisionTransformer, config: dict) -> TransReID:
        return TransReID(encoder, config["num_classes"], TransReIDConfig(**config["reid"]))

    def prepare(self) -> None:
        """Side information that nothing trains becomes zero, and test images that need it are counted."""
        unseen = self.model.forget_unseen(*side_of(self.data.train))
        rows = [self.model.side_rows(*side_of(part)) for part in all_parts(self.data)[1:]] if len(unseen) else []
        if untrained := sum(int(torch.isin(row, unseen).sum()) for row in rows):
            note = "cameras or views that training does not show: their side information is zero"
            self.data.notes.append(f"{untrained} test images come from {note}")

    def items(self) -> ReidTrainImages:
        augment = PadCropErase(self.args.img_size, erase=self.args.erase)
        return ReidTrainImages(self.data.train, augment, self.args.seed)

    def model_line(self) -> str:
        model, config = self.model, self.model.config
        about = f"TransReID: {model.base.num_patches} patches, features of {model.feature_dim}"
        return f"{about}, {'JPM' if config.jpm else 'no JPM'}, {side_line(config)}"

    def loss(self, wrapped: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """TransReID's loss (eq. 9 and 10): identity + triplet over the branches; scalars of the whole batch of
        all ranks, and the share of images whose vehicle the global branch names."""
        args, model = self.args, self.model
        imgs = erase_boxes(model.base.normalize(batch["imgs"]), batch["erase"])
        logits, features = wrapped(imgs, *(batch[ids] if getattr(model.config, what) else None for ids, what in SIDE))
        pids = gather_rows(batch["pids"])
        loss_of = partial(F.cross_entropy, label_smoothing=args.smoothing)
        identity = over_branches(loss_of, [x.float() for x in logits], pids)
        triplet = over_branches(hard_triplet_loss, features, pids)
        terms = {"id": identity, "triplet": triplet, "accuracy": (logits[0].argmax(dim=1) == pids).float().mean()}
        return terms | {"loss": args.id_weight * identity + args.triplet_weight * triplet}

    def answers(self) -> dict[str, ReidTest]:
        args, data = self.args, self.data
        rerank = args.rerank and {"rerank": (args.rerank_k1, args.rerank_k2, args.rerank_lambda)}
        expand = args.expand and {"expand": (tuple(sorted({*args.expand})), args.expand_k, args.expand_alpha)}
        more = {" expanded": expand, " reranked": rerank, " expanded reranked": expand and rerank and expand | rerank}
        protocols = protocols_of(data.name, data.tests, args.keep_same_camera, args.protocol_seed)
        across = across_sets(self.config, data, args.data_path)
        protocols = {test: replace(protocol, across=across) for test, protocol in protocols.items()}
        white = self.whitening() if args.whiten else None
        pooling = {"white": white, "track_pool": args.track_pool}
        return evaluate_reid(self.model, data, protocols, more=more, **pooling, **self.loading)

    def whitening(self) -> Whitening | None:
        """Fitted on the train images, which need no labels for it; on rank 0."""
        source = self.data.train if len(self.data.train) else next(iter(self.data.tests.values()))[-1]
        if source is None or len(source) < 2:
            raise InputError(f"--whiten: {self.args.data_path} has no train and no gallery images to fit on: drop it")
        found = extract_reid(self.model, source, "whitening", **self.loading)
        self.fitted = found and Whitening.of(found.values)
        return self.fitted

    def score(self, found: dict[str, ReidTest]) -> tuple[dict, list[str], list[str]]:
        flat, lines, unreadable = summary(found)
        write_queries(Path(self.args.output_dir) / QUERIES, found)
        if self.args.open_set:
            told, words = self.score_open(found)
            flat, lines = flat | told, lines + words
        side = side_line(self.model.config)
        return flat | {"sie": side}, [side, *lines] if side != "SIE off" else lines, unreadable

    def score_open(self, found: dict[str, ReidTest]) -> tuple[dict[str, float | str], list[str]]:
        """Numbers of `open_numbers` as `open_NAME`, and lines; the threshold of the first test goes into a file."""
        args, flat, lines = self.args, {"open_score": self.args.open_score}, []
        for name, test in found.items():
            changed = test.protocol.rerank or test.protocol.expand
            if test.gallery is None or changed or bool(args.whiten) != name.endswith("whitened"):
                continue
            sides = [FeatureSet.of(side.values, side.images) for side in (test.query, test.gallery)]
            answers = open_answers(test.protocol, *sides, args.open_score, self.device)
            numbers = open_numbers(answers, args.far)
            if not lines:
                facts = {"far": args.far, "score": args.open_score, "unknown": numbers["unknown"]}
                facts |= {"gallery": len(sides[1].pids), "protocol": test.protocol.line()}
                facts |= model_identity(self.model if self.is_trained else self.model.base)
                write_open_set(Path(args.output_dir) / OPEN_SET, numbers["threshold"], facts, self.fitted)
            self.open_answers[name] = answers
            prefix = "".join(f"{word}_" for word in name.split() if word not in ("test", "whitened"))
            flat |= {f"{prefix}open_{key}": value for key, value in numbers.items() if np.isfinite(value)}
            lines += open_lines(test.protocol, numbers, args)
        if not lines:
            raise InputError("--open_set needs a gallery that is given; VehicleID's is drawn: drop it")
        return flat, [*lines, f"  {Path(args.output_dir) / OPEN_SET} keeps the threshold for tools.search"]

    def report(self, found: dict[str, ReidTest], numbers: dict, folder: Path, facts: dict) -> list[Path]:
        """One page a test, as it was before re-ranking and expansion."""
        facts |= {"SIE": side_line(self.model.config), "feature": f"{self.model.feature_dim} numbers"}
        files = []
        for name, test in found.items():
            if not (test.protocol.rerank or test.protocol.expand):
                ending = "" if name == "test" else f"_{name.removeprefix('test ')}"
                files.append(folder / f"report{ending.replace(' ', '_')}.html")
                answers = self.open_answers.get(name)
                names = self.data.pid_names
                write_reid_report(files[-1], facts, test, names, self.device, answers, self.data.track_names)
        return files


def all_parts(data: ReidData) -> list[ReidImages]:
    """Train, then the tests."""
    return [data.train, *(part for test in data.tests.values() for part in test if part)]


def side_information(args, data: ReidData) -> dict:
    """Sizes of the tables of side information that flags and data ask for."""
    sizes, (camids, viewids) = {}, (np.concatenate([getattr(part, ids) for part in all_parts(data)]) for ids, _ in SIDE)
    if args.sie_camera:
        if (data.train.camids < 0).any():
            raise InputError(f"--sie_camera: {args.data_path} does not say which camera took what; drop it")
        sizes["cameras"] = 1 + int(camids.max())
    if args.sie_view:
        if not (data.train.viewids >= 0).any():
            hint = "; put keypoint_train.txt and keypoint_test.txt there" if data.name == "veri776" else ""
            raise InputError(f"--sie_view: {args.data_path} knows no viewpoints{hint}, or drop --sie_view")
        unknown = bool((viewids < 0).any())
        sizes |= {"views": 1 + int(viewids.max()) + unknown, "unknown_view": unknown}
    return sizes


def side_line(config: TransReIDConfig) -> str:
    """SIE in words: what numbers of different settings must not be compared without."""
    used = [f"{getattr(config, what)} {what}" for _, what in SIDE if getattr(config, what)]
    return f"SIE on ({', '.join(used)}, weight {config.sie_weight:g})" if used else "SIE off"


def side_of(images: ReidImages) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] int64 camids and viewids."""
    return torch.from_numpy(images.camids), torch.from_numpy(images.viewids)


def renumber_cameras(data: ReidData, config: dict, file: str | Path) -> ReidData:
    """Number a set's cameras and views as a model with side information has learned them; InputError where it has
    learned those of another set, or not all of these."""
    used = [(*side, names) for side, names in zip(SIDE, ("camera_names", "view_names")) if config["reid"][side[1]]]
    if used and data.name != config["set"]:
        what = f"{file} was trained with side information, the cameras or views of {config['set']}, and means nothing"
        raise InputError(f"{what} on {data.name}: train without --sie_camera and --sie_view to search across sets")
    maps = {}
    for ids, what, names in used:
        here, there = getattr(data, names) or [], config[names] or []
        if missing := [name for name in here if name not in there]:
            known = f"{file} knows the {what} {', '.join(there)[:80]}, not {missing[0]}"
            raise InputError(f"{known}: it was trained with side information on another table")
        if here:
            maps[ids] = np.array([*map(there.index, here), UNKNOWN])  # the last is for -1

    def renumbered(images: ReidImages | None) -> ReidImages | None:
        return images and replace(images, **{ids: numbers[getattr(images, ids)] for ids, numbers in maps.items()})

    return replace(data, tests={name: tuple(map(renumbered, pair)) for name, pair in data.tests.items()})


def set_name(data: ReidData, path: str | Path) -> str:
    """What a model keeps of the set that it was trained on; tables are told apart by their training images."""
    digits = f"#{data.sha256()[:8]}" if len(data.train) else ""
    return data.name if data.name != "table" else f"{Path(path).stem}{digits}"


def across_sets(config: dict, data: ReidData, path: str | Path) -> tuple[str, str] | None:
    """(the set that a model was trained on, this one) where they differ; None too for an encoder as it is."""
    here, known = set_name(data, path), config.get("trained_on")
    if known is None:  # of an older model: the layout alone
        known = config.get("set") if config.get("set") != data.name else None
    return (known, here) if known not in (None, here) else None


def extract_reid(model: TransReID, images: ReidImages, title: str, **loading) -> ReidFeatures | None:
    """Features for search, [n, D], on rank 0; None elsewhere; see `predict`."""
    device, (camids, viewids) = model.base.pos_embed.device, side_of(images)

    def encode(imgs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        features = model.encode(imgs, *model.side_ids(camids[rows], viewids[rows], device)).float()
        return features if images.tracks is None else torch.cat([features, sharpness(imgs)[:, None]], dim=1)

    whole = WholeImages(images.paths, np.arange(len(images)), model.base.img_size)
    found = predict(encode, whole, device, title, **loading)
    if found is None:
        return None
    kept, values = images.take(found.rows), found.values
    values, quality = (values, None) if images.tracks is None else (values[:, :-1], values[:, -1])
    return ReidFeatures(kept, values, found.unreadable, quality)


def pooled(side: ReidFeatures, how: str) -> ReidFeatures:
    """A feature a track, as if it were one image, its first."""
    values, rows = pool_tracks(side.values, side.images.tracks, how, side.quality)
    images = side.images.take(rows)
    return ReidFeatures(replace(images, files=images.tracks), values, [])


def evaluate_reid(
    model: TransReID,
    data: ReidData,
    protocols: dict[str, Protocol],
    *,
    more=None,
    white=None,
    columns=None,
    track_pool="mean",
    **loading,
) -> dict[str, ReidTest]:
    """Every test of a set by its protocol, by name, on rank 0; empty elsewhere.

    Args:
        more: {" reranked": {"rerank": ...}}: fields of the protocol, or nothing; the numbers come beside the others, as
            test "NAME reranked".
        white: a `Whitening`: the numbers of whitened features come beside, as test "NAME whitened".
        columns: {part: slice} of the feature that are scored each for itself, as test "PART NAME" (None: all of it).
        track_pool: of `pool_tracks`: where a test has tracks, they are searched for tracks, as test "NAME tracks".
        loading: batch_size, num_workers.
    """
    results = {}
    for test, pair in data.tests.items():
        parts = zip(("query", "gallery"), pair)
        found = [images and extract_reid(model, images, f"{test}: {what}", **loading) for what, images in parts]
        if found[0] is not None:
            gone, protocol = sum(len(side.unreadable) for side in found if side), protocols[test]
            if gone:  # then it is another test, and says so
                protocol = replace(protocol, name=f"{protocol.name}/{gone}-unreadable-left-out")
            rules = {end: replace(protocol, **fields) for end, fields in (more or {}).items() if fields}
            rules = {"": protocol} | rules
            rules |= {" whitened": replace(protocol, name=f"{protocol.name}/whitened")} if white else {}
            if pair[0].tracks is not None:
                words = f"/track-to-track-{track_pool}"
                rules |= {f" tracks{ending}": replace(rule, name=rule.name + words) for ending, rule in rules.items()}
            for part, cut in (columns or {"": slice(None)}).items():
                for ending, rule in rules.items():
                    move = white if ending.endswith(" whitened") else lambda values: values
                    sides = [side and side._replace(values=move(side.values[:, cut])) for side in found]
                    if ending.startswith(" tracks"):
                        sides = [pooled(side, track_pool) for side in sides]
                    rows = [FeatureSet.of(side.values, side.images) for side in sides if side]
                    metrics, by_query = evaluate_queries(rule, *rows, device=model.base.pos_embed.device)
                    results[f"{part} {test}{ending}".strip()] = ReidTest(rule, metrics, *sides, by_query)
        wait_for_main()
    return results


def write_queries(file: Path, results: dict[str, ReidTest]) -> None:
    """What `tools.results_table` tests two runs with: `TEST mAP` and `TEST R1` [Q] float32 of each query, NaN without a
    match; in the header of each test the identity of its queries and gallery."""
    tensors, header = {}, {"kind": "cgd-mae queries"}
    for test, (protocol, _, *sides, by_query) in results.items():
        test = test.removeprefix("test ")  # as `summary` calls its numbers
        tensors |= {f"{test} {name}": torch.from_numpy(values).float() for name, values in by_query.items()}
        header[test] = hashlib.sha256(
            "".join([protocol.line(), *(s.images.sha256() for s in sides if s)]).encode()
        ).hexdigest()
    if tensors:
        write_safetensors(file, tensors, header)


def summary(results: dict[str, ReidTest]) -> tuple[dict[str, float | str], list[str], list[str]]:
    """Numbers by name: `mAP`, `R1` ... of a set's only test, else `800_mAP` ..., the protocol of each beside them; the
    same in percent in lines; `path<tab>reason` of images that could not be read."""
    flat, lines, unreadable = {}, [], set()
    for test, (protocol, m, *sides, _) in results.items():
        told = m | ({"gallery": len(sides[1].images)} if sides[1] else {}) | {"protocol": protocol.line()}
        prefix = "".join(f"{word}_" for word in test.split() if word != "test")
        flat |= {f"{prefix}{name}": value for name, value in told.items()}
        spread = {name: f" +- {100 * m[f'{name}_std']:.2f}" for name in m if f"{name}_std" in m}
        ends = {name: [100 * m[f"{name}_{end}"] for end in ("low", "high")] for name in m if f"{name}_low" in m}
        spread |= {name: f" ({low:.1f} to {high:.1f})" for name, (low, high) in ends.items()}
        numbers = [f"{x} {100 * m[x]:.2f}{spread.get(x, '')}" for x in ("mAP", "R1", "R5", "R10", "mINP")]
        numbers.append(f"queries {m['queries']:g}")
        if lost := m["queries_without_match"]:
            numbers.append(f"({lost:g} without a match are not scored)")
        lines += [protocol.line(), f"  {'  '.join(numbers)}"]
        unreadable.update(name for side in sides if side for name in side.unreadable)
    return flat, lines, sorted(unreadable)
