"""The encoder: a plain ViT with MAE's keys, shapes and features, never masked.

Letters: N batch, C channels, H and W pixels, p patch size, L patches without class token, D width.
"""

import json
from functools import partial
from pathlib import Path

import torch
from timm.layers import PatchEmbed, set_fused_attn
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from util.checkpoint import encoder_state, load_weights, read_checkpoint, read_safetensors_header
from util.errors import InputError
from util.pos_embed import resize_pos_embed, sincos_pos_embed

# size: (width, blocks, heads, patch); base, large and huge as in MAE, Table 8 and Dosovitskiy et al.
ENCODER_SIZES = {
    "tiny": (192, 12, 3, 16),
    "small": (384, 12, 6, 16),
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def check_img_size(img_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return (rows, columns) of the patch grid; InputError when the patch does not divide."""
    for side, name in zip(img_size, ("height", "width")):
        if side <= 0 or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            raise InputError(
                f"input {name} {side} px is not a multiple of the patch size {patch_size}: "
                f"use --input_size {below} or {below + patch_size}"
            )
    return img_size[0] // patch_size, img_size[1] // patch_size


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, grad_checkpoint: bool) -> torch.Tensor:
    """[N, T, D] through all blocks; with `grad_checkpoint` the backward pass computes each block again
    instead of keeping its activations (Chen et al., 2016)."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if grad_checkpoint and x.requires_grad else block(x)
    return x


def patch_grid(img_size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """(rows, columns) of patches that begin every `stride` px; InputError where there is none, and where
    they do not overlap and do not cover the image."""
    if stride == patch_size:
        return check_img_size(img_size, patch_size)
    if not 0 < stride < patch_size or min(img_size) < patch_size:
        raise InputError(
            f"--stride {stride} at {img_size[0]} x {img_size[1]} px: give a stride from 1 to the patch size "
            f"{patch_size}, and images no smaller than a patch"
        )
    return (img_size[0] - patch_size) // stride + 1, (img_size[1] - patch_size) // stride + 1


def build_blocks(
    dim: int, depth: int, num_heads: int, fused_attn: bool, drop_path: float = 0.0
) -> nn.ModuleList:
    """MAE's pre-norm blocks: mlp ratio 4, qkv bias, erf GELU, LayerNorm eps 1e-6, no dropout.

    Args:
        fused_attn: torch's scaled_dot_product_attention (fast on CUDA) or explicit products.
        drop_path: chance that a sample skips the last block (Huang et al., 2016); grows linearly from 0.
    """
    set_fused_attn(fused_attn)
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    return nn.ModuleList(
        Block(dim, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=LayerNorm, drop_path=rate)
        for rate in rates
    )


class VisionTransformer(nn.Module):
    """MAE's encoder as a feature extractor (150 tensors for ViT-B/16).

    Args:
        img_size: (H, W) in pixels, multiples of `patch_size` unless patches overlap.
        patch_size, embed_dim, depth, num_heads: p, D, number of blocks, attention heads.
        mean, std: per-channel statistics of pixels scaled to [0, 1].
        fused_attn, drop_path: see `build_blocks`.
        stride: px from patch to patch; less than `patch_size`: they overlap (None: `patch_size`).
        initialize: draw MAE's initial weights; a subclass with more modules passes False and
            calls `initialize_weights` itself once all of them exist.
    Raises:
        InputError: the patch size does not divide the image size.
    """

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        fused_attn: bool = True,
        drop_path: float = 0.0,
        stride: int | None = None,
        initialize: bool = True,
    ):
        super().__init__()
        self.img_size = tuple(img_size)
        self.patch_size = patch_size
        self.stride = stride or patch_size
        self.grid_size = patch_grid(self.img_size, patch_size, self.stride)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.embed_dim = embed_dim
        self.grad_checkpoint = False

        # timm's module holds the weights, so that keys and default initialisation are MAE's
        self.patch_embed = PatchEmbed(self.img_size, patch_size, 3, embed_dim)
        self.patch_embed.proj.stride = (self.stride, self.stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        pos_embed = sincos_pos_embed(embed_dim, self.grid_size)[None]
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)  # [1, 1 + L, D]
        self.blocks = build_blocks(embed_dim, depth, num_heads, fused_attn, drop_path)
        self.norm = LayerNorm(embed_dim)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if initialize:
            self.initialize_weights()

    def initialize_weights(self):
        """MAE's initial weights, in MAE's order, so that one seed gives the same tensors."""
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.normal_(self.cls_token, std=0.02)
        if hasattr(self, "mask_token"):
            nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_init_module)

    def normalize(self, imgs: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] in 0..255 -> float32 normalised; float input is taken as normalised."""
        if imgs.dtype != torch.uint8:
            return imgs
        return (imgs.float() / 255 - self.pixel_mean) / self.pixel_std

    def embed(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] uint8 or normalised float -> [N, 1 + L, D] tokens with their positions."""
        x = self.patch_embed(self.normalize(imgs)) + self.pos_embed[:, 1:]  # [N, L, D]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls_token, x], dim=1)

    def forward_features(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] uint8 or normalised float -> [N, 1 + L, D] tokens after the final norm."""
        return self.norm(run_blocks(self.blocks, self.embed(imgs), self.grad_checkpoint))

    def encode(self, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unmasked, deterministic features: {"cls": [N, D], "mean": [N, D], "tokens": [N, L, D]}."""
        x = self.forward_features(imgs)
        return {"cls": x[:, 0], "mean": x[:, 1:].mean(dim=1), "tokens": x[:, 1:]}


def _init_module(module: nn.Module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def load_encoder(
    file: str | Path,
    img_size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    fused_attn: bool = True,
) -> tuple[VisionTransformer, str]:
    """A ready encoder from a checkpoint: ours (`encoder.*`, `checkpoint-*.pth`) or MAE's files.

    Sizes come from the tensors, pixel statistics and (H, W) from the file's config where it has one
    (else ImageNet's and a square grid). Another `img_size` resizes the position table, bicubic.

    Returns:
        (model in evaluation mode on `device`, a table of loaded / new / ignored tensors).
    Raises:
        InputError: unreadable file, or tensors that are not those of a ViT this project knows.
    """
    content = read_checkpoint(file)
    config = content.get("config") or _safetensors_config(file)
    state = dict(content["model"])
    pos_embed, patch = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if pos_embed is None or patch is None or pos_embed.ndim != 3 or patch.ndim != 4:
        raise InputError(
            f"{file} is no ViT encoder: it lacks pos_embed or patch_embed.proj.weight, and starts with "
            f"{', '.join(list(state)[:3])}"
        )
    width, patch_size = patch.shape[0], patch.shape[2]
    heads = {w: h for w, _, h, _ in ENCODER_SIZES.values()}.get(width)
    if heads is None:
        known = ", ".join(str(w) for w, *_ in ENCODER_SIZES.values())
        raise InputError(f"{file} has width {width}: the known encoders are {known} wide")
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    own_size = config.get("img_size")
    if own_size is None:
        side = round((pos_embed.shape[1] - 1) ** 0.5)
        own_size = (side * patch_size, side * patch_size)
    size = tuple(img_size or own_size)
    model = VisionTransformer(
        size,
        patch_size,
        width,
        depth,
        heads,
        mean=tuple(config.get("mean", IMAGENET_MEAN)),
        std=tuple(config.get("std", IMAGENET_STD)),
        fused_attn=fused_attn,
    )
    own_grid = (own_size[0] // patch_size, own_size[1] // patch_size)
    state["pos_embed"] = resize_pos_embed(pos_embed, own_grid, model.grid_size)
    report = load_weights(model, encoder_state(state), file, needed="all")
    ignored = len(state) - len(encoder_state(state))
    if ignored:
        report += f"\n  {'left out':8s} {ignored:4d} tensors of decoder and distillation head"
    return model.to(device).eval(), report


def _safetensors_config(file: str | Path) -> dict:
    if Path(file).suffix != ".safetensors":
        return {}
    return json.loads(read_safetensors_header(file).get("config", "{}"))
