"""One training step, side by side: MAE's published formulation and ours, in one run.

    python -m tools.benchmark_pretrain --model mae_vit_base_patch16 --batch_size 16

`reference` is written from the paper: explicit attention, all patches embedded, decoded in image order and
predicted, float32 normalised images given. `ours` starts from uint8. Both have the same weights, noise and
optimiser; their losses are compared before anything is timed. `ours-alt` is ours with the attention that is
not the default of this device (explicit instead of fused, or the other way round). The variants take turns,
so that a machine that is slow for a while is slow for all; medians are reported. Each variant's peak memory
is measured in a process of its own.
"""

import argparse
import multiprocessing
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from models_mae import MODELS, MaskedAutoencoderViT, take_rows
from util.dist import pick_device
from util.errors import InputError
from util.optim import build_adamw
from util.precision import matmul_gflops, pick_amp_dtype, pick_fused_attention
from util.resolve import parse_input_size
from util.tool import run_tool, tool_parser

KINDS = ("reference", "ours", "ours-alt")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def get_args_parser() -> argparse.ArgumentParser:
    parser = tool_parser("tools.benchmark_pretrain", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", default="mae_vit_base_patch16", choices=list(MODELS), metavar="NAME",
        help="architecture (default mae_vit_base_patch16)")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--batch_size", default=16, type=int, help="images a step (default 16)")
    add("--precision", nargs="+", default=["fp32", "auto"], choices=["auto", *DTYPES],
        help="precisions to compare in; auto is the default of main_pretrain.py (default fp32 auto)")
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
        x = self.decoder_embed(self.norm(x))
        mask_tokens = self.mask_token.to(x.dtype).expand(N, L - len_keep, -1)
        patches = take_rows(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()
        target = self.normalize_target(self.patchify(imgs))
        loss = F.mse_loss(pred, target, reduction="none").mean(dim=-1)
        return {"pixel": (loss * mask).sum() / mask.sum()}


class Variant:
    """A model with its optimiser and its inputs, ready to step."""

    def __init__(self, kind: str, precision: str, args):
        self.device = pick_device(args.device)
        self.dtype = DTYPES[precision]
        size = parse_input_size(args.input_size)
        fused = {
            "reference": False,
            "ours": pick_fused_attention(self.device, self.dtype),
            "ours-alt": not pick_fused_attention(self.device, self.dtype),
        }[kind]
        torch.manual_seed(0)
        self.model = MODELS[args.model](img_size=size, norm_pix_loss=True, fused_attn=fused)
        if kind == "reference":
            self.model.__class__ = ReferenceMAE
        self.model.to(self.device).train()
        self.optimizer = build_adamw(self.model, 1e-4, 0.05)
        torch.manual_seed(1)
        imgs = torch.randint(0, 256, (args.batch_size, 3, *size), dtype=torch.uint8).to(self.device)
        self.imgs = self.model.normalize(imgs) if kind == "reference" else imgs
        self.noise = torch.rand(args.batch_size, self.model.num_patches).to(self.device)

    def step(self) -> float:
        """One update; returns the loss before it."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.model(self.imgs, 0.75, self.noise)["pixel"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def seconds(self) -> float:
        started = time.perf_counter()
        self.step()
        return time.perf_counter() - started


def peak_gigabytes(kind: str, precision: str, args) -> float:
    """Peak memory of two steps in a process of its own: resident on a CPU, allocated on CUDA."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (kind, precision, args))


def _measure_memory(kind: str, precision: str, args) -> float:
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
    peak = matmul_gflops(torch.float32, 2048, 0.5) if device.type == "cpu" else None
    print(
        f"default precision here: {auto_reason}; torch {torch.__version__}; {torch.get_num_threads()} threads"
    )
    rows = {}
    for precision in precisions:
        variants = {kind: Variant(kind, precision, args) for kind in KINDS}
        losses = {kind: variant.step() for kind, variant in variants.items()}
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        if max(losses.values()) - min(losses.values()) > tolerance * losses["reference"]:
            raise InputError(f"{precision}: the losses differ ({losses}), so there is nothing to compare")
        times: dict[str, list[float]] = {kind: [] for kind in variants}
        for _ in range(args.rounds):
            for kind, variant in variants.items():
                times[kind].append(variant.seconds())
        del variants
        for kind, seconds in times.items():
            median = sorted(seconds)[len(seconds) // 2]
            rows[f"{kind} {precision}"] = {
                "images_per_s": args.batch_size / median,
                "images_per_s_best": args.batch_size / min(seconds),
                "spread": (max(seconds) - min(seconds)) / median,
                "peak_gb": peak_gigabytes(kind, precision, args),
                "loss": losses[kind],
            }
    base = rows.get("reference fp32", next(iter(rows.values())))["images_per_s"]
    titles = ("img/s", "best", "x same precision", "x MAE fp32", "spread", "GB")
    print(f"\n{'variant':16s} " + "".join(f"{t:>{w}s} " for t, w in zip(titles, (8, 8, 17, 11, 7, 6))))
    for name, row in rows.items():
        same = rows["reference " + name.split()[1]]["images_per_s"]
        row |= {"ratio_same_precision": row["images_per_s"] / same, "ratio": row["images_per_s"] / base}
        speed = f"{row['images_per_s']:8.2f} {row['images_per_s_best']:8.2f}"
        ratios = f"{row['ratio_same_precision']:17.3f} {row['ratio']:11.3f}"
        print(f"{name:16s} {speed} {ratios} {row['spread']:7.0%} {row['peak_gb']:6.2f}")
    return {
        "model": args.model,
        "input_size": args.input_size,
        "batch_size": args.batch_size,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "torch": torch.__version__,
        "matmul_gflops_fp32": peak,
        "rows": rows,
    }


if __name__ == "__main__":
    run_tool(get_args_parser(), main, lambda args: Path(args.output))
