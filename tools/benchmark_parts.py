"""Part selection by the class token's row beside the full product of attention matrices, in one run.

    python -m tools.benchmark_parts          # ViT-B/16, 448 px, stride 12: 1,369 patches and the class token
    python -m tools.benchmark_parts --train --device cuda --batch_size 16

Variants: "row" is models_transfg.py (fused attention; a row goes backwards through the blocks); "full" keeps
the attention matrices of all blocks but the last and multiplies them, as published code does; "none" is the
same blocks with fused attention and no selection: what nobody can do without. Each turn of a variant is a
process of its own, so that its peak memory is its own; the variants take turns; medians. "full" also compares
its first row with that of "row". Weights are random, with sharpened attention; images are random uint8.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from finetune.encoder import encoder_models
from models_transfg import TransFG, TransFGConfig, class_token_row
from models_vit import VisionTransformer
from util.cli import Parser, parse_input_size, run_tool
from util.dist import pick_device
from util.errors import InputError
from util.meter import peak_gigabytes
from util.precision import pick_amp_dtype

VARIANTS = ("none", "row", "full")
MEASURES = ("seconds", "cpu_seconds", "gigabytes")  # CPU time does not count what other programs take
SHARPER = 4.0  # of the weights that make queries and keys: random attention would be even


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.benchmark_parts", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", default="vit_base_patch16", choices=list(encoder_models()), metavar="NAME",
        help="encoder (default vit_base_patch16)")
    add("--input_size", default="448", help="pixels: one side, or H,W (default 448)")
    add("--stride", default=12, type=int, help="px from patch to patch (default 12)")
    add("--batch_size", default=1, type=int, help="images (default 1)")
    add("--train", action="store_true", help="forward and backward in place of forward alone (default off)")
    add("--rounds", default=3, type=int, help="turns of each variant (default 3)")
    add("--only", default=None, choices=VARIANTS, help="one turn of one, in this process (default all)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--amp", default="none", choices=("auto", "bf16", "fp16", "none"), help="precision (default none)")
    add("--output", default="benchmark_parts.json", help="file (default benchmark_parts.json)")
    # fmt: on
    return parser


def build(args, device: torch.device) -> tuple[TransFG, torch.Tensor]:
    """The model, and images [N, 3, H, W] uint8."""
    width, depth, heads, patch = encoder_models()[args.model]
    torch.manual_seed(0)
    size = parse_input_size(args.input_size)
    encoder = VisionTransformer(size, patch, width, depth, heads, stride=args.stride)
    for block in encoder.blocks:
        block.attn.qkv.weight.data[: 2 * width] *= SHARPER
    model = TransFG(encoder, 196, TransFGConfig()).to(device).train(args.train)
    return model, torch.randint(0, 256, (args.batch_size, 3, *size), dtype=torch.uint8, device=device)


def without_selection(model: TransFG, imgs: torch.Tensor) -> torch.Tensor:
    """[N, D]: the class token after the blocks before the selection, and the part layer on it alone."""
    x = model.base.embed(imgs)
    for block in model.base.blocks:
        x = block(x)
    return model.part_norm(model.part_layer(x[:, :1]))[:, 0]


def by_full_product(model: TransFG, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list]:
    """([N, D] feature, [N, h, T] first row of the product, the tokens that enter each block), by the steps of
    published code: every block returns its attention, [N, h, T, T]; then they are multiplied."""
    x, maps, inputs = model.base.embed(imgs), [], []
    for block in model.base.blocks:
        inputs.append(x.detach())
        attn, (N, T, D) = block.attn, x.shape
        q, k, v = attn.qkv(block.norm1(x)).view(N, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        maps.append((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1))
        x = x + attn.proj((maps[-1] @ v).transpose(1, 2).reshape(N, T, D))
        x = x + block.mlp(block.norm2(x))
    with torch.no_grad():
        product = maps[0]
        for attention in maps[1:]:
            product = attention @ product
    ids = 1 + product[:, :, 0, 1:].argmax(dim=-1)
    parts = x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))
    feature = model.part_norm(model.part_layer(torch.cat([x[:, :1], parts], dim=1)))[:, 0]
    return feature, product[:, :, 0].clone(), inputs


def one_turn(args) -> dict:
    """Seconds and peak memory of one variant in this process."""
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("highest")
    dtype, _ = pick_amp_dtype(args.amp, device)
    model, imgs = build(args, device)
    before, result = peak_gigabytes(device), {}
    started, worked = time.perf_counter(), time.process_time()
    with torch.set_grad_enabled(args.train), torch.autocast(device.type, dtype, enabled=dtype is not None):
        if args.only == "full":
            feature, row, inputs = by_full_product(model, imgs)
        else:
            feature = without_selection(model, imgs) if args.only == "none" else model.features(imgs)[0]
    if args.train:
        feature.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    result |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    result["gigabytes"] = peak_gigabytes(device) - before
    if args.only == "full":
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            ours = class_token_row(model.base.blocks, inputs)
        result["largest_difference"] = (ours - row.float()).abs().max().item()
        result["largest_weight"] = row.max().item()
        same = ours[:, :, 1:].argmax(dim=-1) == row[:, :, 1:].argmax(dim=-1)
        result["same_parts"] = same.float().mean().item()
    return result


def in_own_process(variant: str, args) -> dict:
    """One turn in a fresh process.

    Raises:
        InputError: it failed; with its last line.
    """
    names = ("model", "input_size", "stride", "batch_size", "device", "amp")
    flags = [f"--{name}={getattr(args, name)}" for name in names] + ["--train"] * args.train
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "turn.json"
        command = [sys.executable, "-m", "tools.benchmark_parts", "--only", variant, "--output", str(file)]
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
            raise InputError(f"{variant} failed with status {done.returncode}: {last}")
        return json.loads(file.read_text())


def main(args) -> dict:
    if args.only:
        return one_turn(args)
    turns: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name in VARIANTS:
            turns[name].append(in_own_process(name, args))
    device = pick_device(args.device)
    result: dict = {"model": args.model, "input_size": args.input_size, "stride": args.stride}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result |= {"batch_size": args.batch_size, "train": args.train, "amp": args.amp, "device": name}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"{'variant':10s}{'seconds':>9s}{'CPU s':>9s}{'GB':>8s}")
    for name, found in turns.items():
        medians = {what: statistics.median(turn[what] for turn in found) for what in MEASURES}
        result |= {f"{name}_{what}": value for what, value in medians.items()}
        print(f"{name:10s}{medians['seconds']:9.2f}{medians['cpu_seconds']:9.2f}{medians['gigabytes']:8.3f}")
    for what in ("largest_difference", "largest_weight", "same_parts"):
        result[what] = turns["full"][0][what]
    return result


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output))
