"""A training step: MAE's published formulation, ours and, with --against, another checkout's, in one run.

    python -m benchmarks.step --model mae_vit_base_patch16 --batch_size 16
    python -m benchmarks.step --model mae_vit_tiny_patch16 --input_size 128 --batch_size 128 --against ../before

`mae` is written from the paper with timm's blocks: explicit attention, all patches embedded, decoded and predicted.
All have the same weights, images, noise and optimiser; their losses are compared before anything is timed.
"""

import argparse
from pathlib import Path

from util.cli import Parser, parse_input_size, run_tool
from util.names import MAE_MODELS


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.step", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", default="mae_vit_base_patch16", choices=list(MAE_MODELS), help="(default mae_vit_base_patch16)")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--batch_size", default=16, type=int, help="images a step (default 16)")
    add("--steps", default=1, type=int, help="steps a turn, 20 on a GPU (default 1)")
    add("--precision", default="float32", choices=("float32", "bfloat16"), help="(default float32)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--rounds", default=5, type=int, help="turns of each variant (default 5)")
    add("--against", default="", metavar="FOLDER", help="another checkout to time beside this one (default none)")
    add("--output", default="benchmark_step.json", help="file of the numbers (default benchmark_step.json)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from benchmarks.turns import pretrain_step, take_turns, train
from models_mae import MODELS, MaskedAutoencoderViT
from util.errors import InputError


class PublishedMAE(nn.Module):
    """MAE as published (He et al., 2022), with the weights of ours: nothing is left out, tokens in image order."""

    def __init__(self, ours: MaskedAutoencoderViT):
        super().__init__()
        self.ours = ours  # parameters and pixel statistics
        for blocks in (ours.blocks, ours.decoder_blocks):
            for number, block in enumerate(blocks):
                width, heads = block.attn.qkv.in_features, block.attn.num_heads
                plain = Block(width, heads, qkv_bias=True, norm_layer=type(block.norm1))
                plain.load_state_dict(block.state_dict())
                plain.norm1.eps = plain.norm2.eps = 1e-6
                plain.attn.fused_attn = False
                blocks[number] = plain

    def forward(self, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [N, 3, H, W], [N, L] -> {"pixel": loss over removed patches}."""
        m, (N, L) = self.ours, noise.shape
        len_keep = int(L * (1 - mask_ratio))
        imgs = (imgs.float() / 255 - m.pixel_mean) / m.pixel_std
        x = m.patch_embed(imgs) + m.pos_embed[:, 1:]
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        x = torch.gather(x, 1, ids_shuffle[:, :len_keep, None].expand(-1, -1, x.shape[2]))
        mask = (ids_restore >= len_keep).float()
        x = torch.cat([(m.cls_token + m.pos_embed[:, :1]).expand(N, -1, -1), x], dim=1)
        for block in m.blocks:
            x = block(x)
        x = m.decoder_embed(m.norm(x))
        x_ = torch.cat([x[:, 1:], m.mask_token.to(x.dtype).expand(N, L - len_keep, -1)], dim=1)
        x_ = torch.gather(x_, 1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], x_], dim=1) + m.decoder_pos_embed
        for block in m.decoder_blocks:
            x = block(x)
        pred = m.decoder_pred(m.decoder_norm(x))[:, 1:].float()
        target = m.patchify(imgs)
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
        loss = F.mse_loss(pred, target, reduction="none").mean(dim=-1)
        return {"pixel": (loss * mask).sum() / mask.sum()}


def main(args) -> dict:
    size = parse_input_size(args.input_size)
    torch.manual_seed(0)
    reference = PublishedMAE(MODELS[args.model](img_size=size, norm_pix_loss=True))
    names = ("model", "batch_size", "steps", "precision", "device")
    work = {name: getattr(args, name) for name in names} | {"input_size": size, "patches": reference.ours.num_patches}
    result = take_turns({"mae": train(reference, work)}, pretrain_step, work, args)
    losses = {name: row["loss"] for name, row in result["rows"].items()}
    tolerance = 1e-4 if args.precision == "float32" else 2e-2
    if max(losses.values()) - min(losses.values()) > tolerance * losses["mae"]:
        raise InputError(f"the losses differ ({losses}), so there is nothing to compare")
    return result


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output))
