"""A training step of re-identification and its feature extraction: images/s and memory, in one run.

    python -m tools.benchmark_finetune                  # ViT-B/16, 256 px, batch 64: the published setting
    python -m tools.benchmark_finetune --model vit_tiny_patch16 --input_size 128 --batch_size 16

Rows: the ViT baseline, TransReID (JPM), TransReID* (JPM, stride 12), both with camera and view embedding of
VeRi-776's sizes. Each in float32 as it is, and in the device's half precision with compiled blocks (on a CPU
without fast half precision: float32 compiled). Weights are random, images uint8 on the device. The variants
take turns; medians.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from finetune.encoder import encoder_models
from models_transreid import TransReID, TransReIDConfig
from models_vit import VisionTransformer
from util.cli import Parser, parse_input_size, run_tool
from util.dist import pick_device
from util.losses import hard_triplet_loss, identity_loss, over_branches
from util.meter import peak_gigabytes
from util.optim import build_finetune_optimizer
from util.precision import pick_amp_dtype, pick_fused_attention

ROWS = {  # stride, side information and JPM
    "baseline": (None, TransReIDConfig()),
    "transreid": (None, TransReIDConfig(cameras=20, views=8, jpm=True)),
    "transreid_star": (12, TransReIDConfig(cameras=20, views=8, jpm=True)),
}
CLASSES = 575


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.benchmark_finetune", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", default="vit_base_patch16", choices=list(encoder_models()), metavar="NAME",
        help="encoder (default vit_base_patch16)")
    add("--input_size", default="256", help="pixels: one side, or H,W (default 256)")
    add("--batch_size", default=64, type=int, help="images a step, a multiple of 4 (default 64)")
    add("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="(default all)")
    add("--rounds", default=5, type=int, help="turns of each variant (default 5)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--output", default="benchmark_finetune.json", help="file (default benchmark_finetune.json)")
    # fmt: on
    return parser


class Variant:
    """One row in one mode, ready to be timed."""

    def __init__(self, row: str, compiled: bool, args, device: torch.device):
        self.device = device
        self.dtype = pick_amp_dtype("auto", device)[0] if compiled else None
        stride, config = ROWS[row]
        width, depth, heads, patch = encoder_models()[args.model]
        torch.manual_seed(0)
        encoder = VisionTransformer(
            parse_input_size(args.input_size), patch, width, depth, heads, stride=stride, drop_path=0.1,
            fused_attn=pick_fused_attention(device, self.dtype),
        )  # fmt: skip
        self.model = TransReID(encoder, CLASSES, config).to(device)
        self.optimizer = build_finetune_optimizer(self.model, depth, "sgd", 1e-3, 1e-4, bias_lr_factor=2)
        if compiled:
            for block in self.model.base.blocks:
                block.compile()
        shape = (args.batch_size, 3, *encoder.img_size)
        self.imgs = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.pids = torch.arange(args.batch_size, device=device) // 4
        ids = torch.zeros(args.batch_size, dtype=torch.int64, device=device)
        self.side = (ids, ids) if config.cameras else (None, None)

    def step(self) -> None:
        self.model.train()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits, features = self.model(self.imgs, *self.side)
            loss = over_branches(identity_loss, logits, self.pids)
            loss = loss + over_branches(hard_triplet_loss, features, self.pids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def extract(self) -> None:
        self.model.eval()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            self.model.encode(self.imgs, *self.side)


def seconds_of(work, device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main(args) -> dict:
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    half = str(pick_amp_dtype("auto", device)[0] or torch.float32).removeprefix("torch.")
    variants = {}
    memory = {}
    for row in args.rows:
        for mode, compiled in (("float32 eager", False), (f"{half} compiled", True)):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device) / 1e9
            variant = variants[row, mode] = Variant(row, compiled, args, device)
            for _ in range(2):  # compiles, and finds kernels
                variant.step()
                variant.extract()
            if device.type == "cuda":
                memory[row, mode] = peak_gigabytes(device) - before
    timed: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(args.rounds):
        for (row, mode), variant in variants.items():
            for what in ("step", "extract"):
                seconds = seconds_of(getattr(variant, what), device)
                timed.setdefault((row, mode, what), []).append(args.batch_size / seconds)
    result: dict = {"model": args.model, "input_size": args.input_size, "batch_size": args.batch_size}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    result |= {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}
    print(f"{'row':16s}{'mode':18s}{'train img/s':>12s}{'extract img/s':>15s}{'GB':>7s}")
    for row, mode in variants:
        speeds = [statistics.median(timed[row, mode, what]) for what in ("step", "extract")]
        key = f"{row} {mode}"
        result[f"{key} train_images_per_s"], result[f"{key} extract_images_per_s"] = speeds
        gigabytes = memory.get((row, mode))
        if gigabytes is not None:
            result[f"{key} gigabytes"] = gigabytes
        print(f"{row:16s}{mode:18s}{speeds[0]:12.1f}{speeds[1]:15.1f}"
              f"{'' if gigabytes is None else f'{gigabytes:7.2f}'}")  # fmt: skip
    return result


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output))
