"""One training step, side by side in one run: MAE's published formulation and ours, with and without teacher.

    python -m tools.benchmark_pretrain --model mae_vit_base_patch16 --batch_size 16
    python -m tools.benchmark_pretrain --teacher ViT-L-14                # random weights: only time counts
    python -m tools.benchmark_pretrain --data_path PHOTOS                # the data path included

    mae           explicit attention, all patches embedded, decoded in image order and predicted, float32
                  normalised images given
    mae+teacher   the same, and an online teacher the plain way: normalised copies in float32 through the
                  whole open_clip model's encode_image, under the student's autocast
    ours          our step from uint8; ours-alt: with the attention that is not this device's default
    ours+teacher  our step with the online teacher as main_pretrain.py runs it
    ours+cache    our step with stored embeddings (tools.reinforce)

All have the same weights, noise and optimiser; their pixel losses are compared before anything is timed. The
variants take turns, so that a machine that is slow for a while is slow for all; medians are reported. Peak
memory is measured in a process of its own. TFLOP/s count the matrix products that the work needs (kept
patches embedded, removed ones predicted; the teacher's forward pass where it runs), the same for all
variants; the share is of this machine's measured matrix product in the same precision.
"""

import argparse
import itertools
import logging
import multiprocessing
import os
import platform
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from datasets.manifest import list_images
from datasets.pretrain import EpochBatches, PretrainDataset, build_loader
from models_mae import MODELS, MaskedAutoencoderViT, take_rows
from models_teacher import FrozenTeacher, TeacherIdentity
from tools.benchmark_data import mae_transform
from util.cli import Parser, parse_input_size, run_tool
from util.dist import pick_device
from util.errors import InputError
from util.optim import build_adamw
from util.precision import matmul_gflops, pick_amp_dtype, pick_fused_attention
from util.stop import init_worker

KINDS = ("mae", "mae+teacher", "ours", "ours-alt", "ours+teacher", "ours+cache")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EMBED_DIM, TEXTS, TAU = 768, 2304, 0.01  # of the stored embeddings where no teacher is named


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.benchmark_pretrain", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", default="mae_vit_base_patch16", choices=list(MODELS), metavar="NAME",
        help="architecture (default mae_vit_base_patch16)")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--batch_size", default=16, type=int, help="images a step (default 16)")
    add("--teacher", default="", help="open_clip name of a teacher, random weights (default: none)")
    add("--variants", nargs="+", default=list(KINDS), choices=KINDS, metavar="NAME",
        help=f"what to time, of {', '.join(KINDS)} (default all)")
    add("--precision", nargs="+", default=["fp32", "auto"], choices=["auto", *DTYPES],
        help="precisions to compare in; auto is the default of main_pretrain.py (default fp32 auto)")
    add("--compile", action="store_true", help="torch.compile our variants (default off)")
    add("--data_path", default="", help="images to read through each data path (default: ready batches)")
    add("--num_workers", default=None, type=int, help="data processes (default: the cores of this machine)")
    add("--rounds", default=5, type=int, help="timed steps of each variant (default 5)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--output", default="benchmark_pretrain.json", help="file (default benchmark_pretrain.json)")
    # fmt: on
    return parser


class ReferenceMAE(MaskedAutoencoderViT):
    """MAE as published: nothing is left out, tokens are decoded in image order."""

    def forward(self, imgs, mask_ratio=0.75, noise=None, teacher_embed=None):
        """imgs: [N, 3, H, W] float32 normalised -> {"pixel": loss over removed patches}."""
        N, L = noise.shape
        len_keep = int(L * (1 - mask_ratio))
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        x = take_rows(x, ids_shuffle[:, :len_keep])
        mask = (ids_restore >= len_keep).float()
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(N, -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        latent = self.norm(x)
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.to(x.dtype).expand(N, L - len_keep, -1)
        patches = take_rows(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()
        target = self.normalize_target(self.patchify(imgs))
        loss = F.mse_loss(pred, target, reduction="none").mean(dim=-1)
        terms = {"pixel": (loss * mask).sum() / mask.sum()}
        if self.distill_head is not None:
            terms |= self.distill_head(latent, x, ids_shuffle, teacher_embed)
        return terms


class Variant:
    """A model with its optimiser, teacher and inputs, ready to step."""

    def __init__(self, kind: str, precision: str, args):
        self.device = pick_device(args.device)
        self.dtype = DTYPES[precision]
        self.is_mae = kind.startswith("mae")
        self.size = parse_input_size(args.input_size)
        fused = pick_fused_attention(self.device, self.dtype) ^ (kind == "ours-alt") and not self.is_mae
        self.clip = build_clip(args.teacher).to(self.device) if kind.endswith("+teacher") else None
        width = self.clip.visual.output_dim if self.clip else EMBED_DIM
        distill = None
        if "+" in kind:
            bank = F.normalize(torch.randn(TEXTS, width, generator=torch.Generator().manual_seed(2)), dim=1)
            distill = {"context": "attention", "bank": bank, "tau": TAU}
        torch.manual_seed(0)
        self.model = MODELS[args.model](img_size=self.size, norm_pix_loss=True, fused_attn=fused, distill=distill)
        if self.is_mae:
            self.model.__class__ = ReferenceMAE
        self.model.to(self.device).train()
        self.teacher = None
        if self.clip and not self.is_mae:
            dtype = self.dtype if self.device.type == "cuda" and self.dtype else torch.float32
            identity = TeacherIdentity(args.teacher, "random", width, TAU)
            self.teacher = FrozenTeacher(self.clip, identity, dtype).to(self.device)
        if args.compile and not self.is_mae:
            for block in [*self.model.blocks, *self.model.decoder_blocks]:
                block.compile()
            if self.teacher:
                self.teacher.compile()
        self.optimizer = build_adamw(self.model, 1e-4, 0.05)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.batches = self.ready_batches(args, kind) if not args.data_path else self.read_batches(args, kind)

    def ready_batches(self, args, kind: str):
        """The same batch again and again, on the device."""
        N, generator = args.batch_size, torch.Generator().manual_seed(1)
        imgs = torch.randint(0, 256, (N, 3, *self.size), dtype=torch.uint8, generator=generator)
        batch = {"imgs": imgs.to(self.device), "noise": torch.rand(N, self.model.num_patches, generator=generator)}
        if self.is_mae:
            batch["imgs"] = self.model.normalize(batch["imgs"])
        if kind == "ours+cache":
            batch["teacher_embed"] = stored_embeddings(N, generator)
        return itertools.repeat({name: value.to(self.device) for name, value in batch.items()})

    def read_batches(self, args, kind: str):
        """Epoch after epoch of real images through MAE's transforms, or through our data set."""
        paths = list_images(args.data_path)
        workers = args.num_workers or os.cpu_count() or 1
        batches = EpochBatches(len(paths), args.batch_size, 0, 1, 0)
        if batches.batches_per_epoch < 1:
            raise InputError(f"{args.data_path} has {len(paths)} images, less than --batch_size {args.batch_size}")
        pin = self.device.type == "cuda"
        if self.is_mae:
            dataset = MaeImages(paths, self.size, self.model.num_patches)
            loader = DataLoader(
                dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, worker_init_fn=init_worker
            )
        else:
            dataset = PretrainDataset(paths, self.size, self.model.num_patches, seed=0, min_area=0.2)
            loader = build_loader(dataset, batches, workers, pin, init_worker)
        generator = torch.Generator().manual_seed(1)
        for epoch in itertools.count():
            batches.set_epoch(epoch)
            for batch in loader:
                if kind == "ours+cache":
                    batch["teacher_embed"] = stored_embeddings(args.batch_size, generator)
                yield {
                    name: value.to(self.device, non_blocking=True) for name, value in batch.items() if name != "problem"
                }

    def step(self) -> torch.Tensor:
        """One update; returns the pixel loss before it."""
        batch = next(self.batches)
        embed = batch.get("teacher_embed")
        if self.teacher:
            embed = self.teacher(batch["imgs"])
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            if self.clip and not self.teacher:
                with torch.no_grad():
                    imgs = batch["imgs"]
                    if imgs.shape[-1] != 224:
                        imgs = F.interpolate(imgs, (224, 224), mode="bicubic", antialias=True)
                    embed = F.normalize(self.clip.encode_image(imgs).float(), dim=1)
            terms = self.model(batch["imgs"], 0.75, batch["noise"], embed)
            loss = terms["pixel"]
            if "sim" in terms:
                loss = loss + 2 * terms["sim"] + 0.05 * terms["kl"]
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return terms["pixel"].detach()

    def seconds(self, steps: int) -> float:
        """Seconds a step, with the device's work done."""
        self.finish()
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.finish()
        return (time.perf_counter() - started) / steps

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class MaeImages(Dataset):
    """Items as MAE's loader makes them: float32, normalised."""

    def __init__(self, paths, size: tuple[int, int], num_patches: int):
        self.paths, self.num_patches, self.transform = paths, num_patches, mae_transform(size)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        with Image.open(self.paths[item[1]]) as image:
            return {"imgs": self.transform(image.convert("RGB")), "noise": torch.rand(self.num_patches)}


def build_clip(name: str) -> torch.nn.Module:
    known = open_clip.list_models()
    if name not in known:
        raise InputError(f"--teacher {name}: open_clip knows {', '.join(known[:4])}, ... ({len(known)} names)")
    logging.disable(logging.WARNING)  # it would warn that the weights are random
    clip = open_clip.create_model(name)
    logging.disable(logging.NOTSET)
    return clip.eval().requires_grad_(False)


def stored_embeddings(count: int, generator: torch.Generator) -> torch.Tensor:
    return F.normalize(torch.randn(count, EMBED_DIM, generator=generator), dim=1).half()


def needed_gflops(args) -> dict[str, float]:
    """Matrix-product GFLOP an image that the work needs: of the student's update, the teacher's forward."""
    size = parse_input_size(args.input_size)
    counts = {}
    model = MODELS[args.model](img_size=size, fused_attn=False)
    imgs, noise = torch.zeros(1, 3, *size), torch.rand(1, model.num_patches)
    with FlopCounterMode(display=False) as counter:
        model(imgs, 0.75, noise)["pixel"].backward()
    counts["student"] = counter.get_total_flops() / 1e9
    if args.teacher:
        clip = build_clip(args.teacher)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            clip.encode_image(torch.zeros(1, 3, 224, 224))
        counts["teacher"] = counter.get_total_flops() / 1e9
    return counts


def peak_gigabytes(kind: str, precision: str, args) -> float:
    """Peak memory of two steps in a process of its own: resident on a CPU, allocated on CUDA."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (kind, precision, args))


def _measure_memory(kind: str, precision: str, args) -> float:
    args.data_path = ""  # daemonic processes may have no workers, and batches are small beside the model
    variant = Variant(kind, precision, args)
    variant.step()
    variant.step()
    if variant.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # VmHWM starts anew with the process; ru_maxrss would count the parent's memory too
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def main(args) -> dict:
    device = pick_device(args.device)
    auto_dtype, auto_reason = pick_amp_dtype("auto", device)
    names = {v: k for k, v in DTYPES.items()}
    precisions = list(dict.fromkeys(names[auto_dtype] if p == "auto" else p for p in args.precision))
    kinds = [kind for kind in args.variants if args.teacher or not kind.endswith("+teacher")]
    if "mae" not in kinds:
        raise InputError("--variants: everything is compared with mae, so name it too")
    print(f"default precision here: {auto_reason}; torch {torch.__version__}; {torch.get_num_threads()} threads")
    flops = needed_gflops(args)
    rows = {}
    for precision in precisions:
        rows |= compare(kinds, precision, flops, device, args)
    base = rows.get("mae fp32", next(iter(rows.values())))["images_per_s"]
    titles = ("img/s", "best", "x mae", "x mae fp32", "x b", "TFLOP/s", "share", "spread", "GB")
    widths = (8, 8, 7, 11, 7, 8, 6, 7, 6)
    print(f"\n{'variant':18s} " + "".join(f"{t:>{w}s} " for t, w in zip(titles, widths)))
    for name, row in rows.items():
        precision = name.split()[1]
        row["ratio_same_precision"] = row["images_per_s"] / rows[f"mae {precision}"]["images_per_s"]
        row["ratio"] = row["images_per_s"] / base
        naive = rows.get(f"mae+teacher {precision}")
        row["ratio_naive_teacher"] = row["images_per_s"] / naive["images_per_s"] if naive else None
        to_naive = f"{row['ratio_naive_teacher']:7.3f}" if naive else "      -"
        print(
            f"{name:18s} {row['images_per_s']:8.2f} {row['images_per_s_best']:8.2f} "
            f"{row['ratio_same_precision']:7.3f} {row['ratio']:11.3f} {to_naive} {row['tflops']:8.3f} "
            f"{row['share_of_peak']:6.0%} {row['spread']:7.0%} {row['peak_gb']:6.2f}"
        )
    print("x mae: to mae in the same precision; x b: to mae+teacher in the same precision")
    return {
        "model": args.model,
        "input_size": args.input_size,
        "batch_size": args.batch_size,
        "teacher": args.teacher,
        "data_path": args.data_path,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "torch": torch.__version__,
        "gflop_per_image": flops,
        "rows": rows,
    }


def compare(kinds: list[str], precision: str, flops: dict, device: torch.device, args) -> dict[str, dict]:
    """Rows of one precision."""
    variants = {kind: Variant(kind, precision, args) for kind in kinds}
    losses = {kind: variant.step().item() for kind, variant in variants.items()}
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    if not args.data_path and max(losses.values()) - min(losses.values()) > tolerance * losses["mae"]:
        raise InputError(f"{precision}: the losses differ ({losses}), so there is nothing to compare")
    steps = 20 if device.type == "cuda" else 1
    times: dict[str, list[float]] = {kind: [] for kind in variants}
    if args.compile or device.type == "cuda":
        for variant in variants.values():
            variant.seconds(3)
    peaks = []
    for _ in range(args.rounds):
        peaks.append(matmul_gflops(DTYPES[precision] or torch.float32, 2048, 0.3, device))
        for kind, variant in variants.items():
            times[kind].append(variant.seconds(steps))
    del variants
    rows = {}
    for kind, seconds in times.items():
        median = sorted(seconds)[len(seconds) // 2]
        needed = flops["student"] + (flops["teacher"] if kind.endswith("+teacher") else 0)
        tflops = needed * args.batch_size / median / 1e3
        rows[f"{kind} {precision}"] = {
            "images_per_s": args.batch_size / median,
            "images_per_s_best": args.batch_size / min(seconds),
            "spread": (max(seconds) - min(seconds)) / median,
            "peak_gb": peak_gigabytes(kind, precision, args),
            "loss": losses[kind],
            "tflops": tflops,
            "share_of_peak": tflops * 1e3 / sorted(peaks)[len(peaks) // 2],
        }
    return rows


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output))
