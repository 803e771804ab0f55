"""The encoder: a plain ViT with MAE's keys, shapes and features, never masked.

    encoder = load_encoder("output_dir/encoder.pth")
    features = encoder.embed_images([Image.open("car.jpg")])["cls"]  # [1, D]

Letters: N batch, C channels, H and W pixels, p patch size, L patches without class token, D width.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from timm.layers import DropPath, PatchEmbed, get_act_layer
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from datasets.images import Unreadable, is_turned, open_rgb, to_rgb
from datasets.transforms import whole_image
from util.dist import get_rank, get_world_size, pick_device
from util.errors import ENCODER_SIZES, InputError
from util.fetch import fetch
from util.pos_embed import resize_pos_embed, sincos_pos_embed
from util.precision import scoring
from util.pretrained import Pretrained, load_pretrained, read_pretrained

FEATURES = ("cls", "mean", "tokens")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, grad_checkpoint: bool) -> torch.Tensor:
    """[N, T, D] through all blocks; `grad_checkpoint`: the backward pass computes each again (Chen et al., 2016)."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if grad_checkpoint and x.requires_grad else block(x)
    return x


def patch_grid(img_size: tuple[int, int], patch_size: int, stride: int | None = None) -> tuple[int, int]:
    """(rows, columns) of patches that begin every `stride` px, by default one beside the other."""
    (height, width), stride = img_size, stride or patch_size
    for side, name in ((height, "height"), (width, "width")) if stride == patch_size else ():
        if side <= 0 or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            cure = f"use --input_size {below} or {below + patch_size}"
            raise InputError(f"input {name} {side} px is not a multiple of the patch size {patch_size}: {cure}")
    if not 0 < stride <= patch_size or min(img_size) < patch_size:
        cure = f"give a stride from 1 to the patch size {patch_size}, and images no smaller than a patch"
        raise InputError(f"--stride {stride} at {height} x {width} px: {cure}")
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


class SameOnAnyRanksDropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training a sample skips the branch with chance `rate`, the others are
    scaled by 1 / (1 - rate). Draws for the images of all ranks and takes this rank's: one seed, one result."""

    def __init__(self, rate: float):
        super().__init__()
        # a tensor: torch.compile would compile a block anew for each block's own number
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> the same shape."""
        if not self.training:
            return x
        kept = torch.rand(get_world_size(), len(x), 1, 1, device=x.device)[get_rank()] >= self.rate
        return x * kept / (1 - self.rate)


def build_blocks(dim: int, depth: int, num_heads: int, drop_path: float = 0.0, quick_gelu: bool = False):
    """MAE's pre-norm blocks: mlp ratio 4, qkv bias, erf GELU, LayerNorm eps 1e-6, no dropout.

    Args:
        drop_path: chance that a sample skips the last block (Huang et al., 2016); grows linearly from 0.
        quick_gelu: OpenAI's x * sigmoid(1.702 x) in place of the erf GELU.
    """
    block = partial(Block, dim, num_heads, qkv_bias=True, norm_layer=LayerNorm)
    act, last = get_act_layer("quick_gelu" if quick_gelu else "gelu"), max(depth - 1, 1)
    blocks = nn.ModuleList(block(drop_path=drop_path * i / last, act_layer=act) for i in range(depth))
    for name, module in list(blocks.named_modules()):
        if isinstance(module, DropPath):
            blocks.set_submodule(name, SameOnAnyRanksDropPath(module.drop_prob))
    return blocks


class VisionTransformer(nn.Module):
    """MAE's encoder as a feature extractor (150 tensors for ViT-B/16).

    Args:
        img_size: (H, W) in pixels, multiples of `patch_size` unless patches overlap.
        mean, std: per-channel statistics of pixels scaled to [0, 1].
        drop_path, quick_gelu: see `build_blocks`. pre_norm: a norm before the first block, as in CLIP's image tower.
        fc_norm: the final norm comes after the mean over patches, as in MAE's fine-tuning with --global_pool.
        stride: px from patch to patch; less than `patch_size`: they overlap (None: `patch_size`).
        initialize: draw MAE's initial weights; a subclass with more modules does it itself.
    """

    def __init__(
        self, img_size: tuple[int, int] = (224, 224), patch_size: int = 16, embed_dim: int = 768, depth: int = 12,
        num_heads: int = 12, *, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD,
        drop_path: float = 0.0, stride: int | None = None, pre_norm: bool = False, quick_gelu: bool = False,
        fc_norm: bool = False, initialize: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.img_size, self.patch_size, self.embed_dim = tuple(img_size), patch_size, embed_dim
        self.stride = stride or patch_size
        self._settings = {
            "img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim, "depth": depth,
            "num_heads": num_heads, "mean": mean, "std": std, "stride": self.stride, "pre_norm": pre_norm,
            "quick_gelu": quick_gelu, **({"fc_norm": True} if fc_norm else {}),
        }  # fmt: skip
        self.grid_size = patch_grid(self.img_size, patch_size, stride)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.grad_checkpoint, self.report = False, ""  # the report is of `load_encoder`
        # timm's module holds the weights, so that keys and default initialisation are MAE's
        self.patch_embed = PatchEmbed(self.img_size, patch_size, 3, embed_dim)
        self.patch_embed.proj.stride = (self.stride, self.stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = sincos_pos_embed(embed_dim, self.grid_size)[None]  # [1, 1 + L, D]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = build_blocks(embed_dim, depth, num_heads, drop_path, quick_gelu)
        self.norm_pre = LayerNorm(embed_dim) if pre_norm else nn.Identity()
        self.norm = nn.Identity() if fc_norm else LayerNorm(embed_dim)
        self.fc_norm = LayerNorm(embed_dim) if fc_norm else nn.Identity()
        for norm in (module for module in self.modules() if pre_norm and isinstance(module, nn.LayerNorm)):
            norm.eps = 1e-5  # CLIP's
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        if initialize:
            self.initialize_weights()

    def settings(self) -> dict:
        """The arguments that build this encoder again, as plain values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in self._settings.items()}

    def set_pixel_stats(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Other statistics of pixels in [0, 1] for `normalize`."""
        self._settings |= {"mean": mean, "std": std}
        self.pixel_mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
        self.pixel_std.copy_(torch.tensor(std).view(1, 3, 1, 1))

    def initialize_weights(self):
        """MAE's initial weights, in MAE's order, so that one seed gives the same tensors."""
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.normal_(self.cls_token, std=0.02)
        if hasattr(self, "mask_token"):
            nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_module)

    def normalize(self, imgs: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] in 0..255 -> float32 normalised; float input is taken as normalised."""
        if imgs.dtype != torch.uint8:
            return imgs
        return imgs.float().div_(255).sub_(self.pixel_mean).div_(self.pixel_std)  # in place: a third of the time

    def embed(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] uint8 or normalised float -> [N, 1 + L, D] tokens with their positions."""
        x = self.patch_embed(self.normalize(imgs)) + self.pos_embed[:, 1:]  # [N, L, D]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return self.norm_pre(torch.cat([cls_token, x], dim=1))

    def forward_features(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] uint8 or normalised float -> [N, 1 + L, D] tokens after the final norm."""
        return self.norm(run_blocks(self.blocks, self.embed(imgs), self.grad_checkpoint))

    def encode(self, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unmasked, deterministic features: {"cls": [N, D], "mean": [N, D], "tokens": [N, L, D]}."""
        x = self.forward_features(imgs)
        return {"cls": self.fc_norm(x[:, 0]), "mean": self.fc_norm(x[:, 1:].mean(dim=1)), "tokens": x[:, 1:]}

    @torch.inference_mode()
    def embed_images(self, images, batch_size=64, read_outs: tuple[str, ...] = FEATURES) -> dict[str, torch.Tensor]:
        """Pictures -> their features: taken whole, resized by an antialiased bicubic filter, nothing masked, float32.

        Args:
            images: one or more Pillow images of any mode, files, or [3, H, W] uint8 tensors, also mixed and
                of different sizes; or a batch [N, 3, H, W] uint8.
        Returns:
            those of `read_outs`: {"cls": [N, D], "mean": [N, D] of the patch tokens, "tokens": [N, L, D]} on the CPU.
        """
        images = [images] if isinstance(images, (Image.Image, str, Path)) or getattr(images, "ndim", 0) == 3 else images
        if not len(images):
            raise InputError("embed_images was given no picture: give at least one")
        collected: dict[str, list[torch.Tensor]] = {name: [] for name in read_outs}
        device = self.cls_token.device
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads, scoring(self):
            ahead = threads.map(self._whole, images[:batch_size])  # decoded while the encoder is busy
            for end in range(batch_size, len(images) + batch_size, batch_size):
                batch, ahead = torch.stack(list(ahead)), threads.map(self._whole, images[end : end + batch_size])
                with torch.autocast(device.type, enabled=False):
                    features = self.encode(batch.to(device, non_blocking=True))
                for name in read_outs:  # contiguous: a class token is a view that would keep all tokens in memory
                    collected[name].append(features[name].float().cpu().contiguous())
        return {name: torch.cat(values) for name, values in collected.items()}

    def _whole(self, image) -> torch.Tensor:
        """A picture, a file or [3, H, W] uint8 -> [3, H, W] uint8 of this encoder's size."""
        try:
            if isinstance(image, (str, Path)):
                image = open_rgb(image)
            elif isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
                image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            elif not isinstance(image, Image.Image):
                raise InputError(f"a picture is a {type(image).__name__}: give Pillow images, files or uint8 tensors")
            elif is_turned(image):
                image = ImageOps.exif_transpose(image)
            return whole_image(to_rgb(image), self.img_size)
        except Unreadable as error:
            raise InputError(f"picture {image} cannot be read: {error}") from error


def init_module(module: nn.Module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def load_encoder(
    source: str | Path, img_size: tuple[int, int] | None = None, device: torch.device | str = "cpu", **more
) -> VisionTransformer:
    """A ready encoder in eval mode, from any file that `util.pretrained` recognises; its `report`: what was loaded.

    Sizes come from the tensors, pixel statistics and (H, W) from the file's config where it has one (else CLIP's for
    CLIP, ImageNet's for all others, and a square grid). Another `img_size` or `stride` resizes the position table.

    Args:
        source: a file, a name of util/registry.json, https://..., or hf://ORG/REPO/FILE.
        img_size: (H, W) in px, default the file's. device: a torch device, or "auto": CUDA where there is one.
        more: stride, drop_path, quick_gelu (see `VisionTransformer`), pos_resize (see `resize_pos_embed`);
            fc_norm=False makes a final norm after the mean one of each token.
    """
    file = fetch(source)
    device = pick_device("auto") if device == "auto" else torch.device(device)
    return encoder_from(read_pretrained(file), file, img_size, **more).to(device)


def encoder_from(
    found: Pretrained, file: str | Path, img_size: tuple[int, int] | None = None, *, pos_resize: str = "bicubic",
    fc_norm: bool | None = None, **more,
) -> VisionTransformer:  # fmt: skip
    """`load_encoder` of a file that has been read, on the CPU."""
    state, config = found.state, found.config
    width, _, _, patch_size = state["patch_embed.proj.weight"].shape
    known = {w: h for w, _, h, _ in ENCODER_SIZES.values()}
    heads = config.get("num_heads", known.get(width))
    if found.origin == "MoCo v3" and width == 384:
        heads = 12  # its ViT-S has twice the heads of the others'
    if heads is None:
        raise InputError(f"{file} has width {width}: the known encoders are {', '.join(map(str, known))} wide")
    if fc_norm is False:  # for who reads tokens: each gets the norm of the mean
        state = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in state.items()}
    mean, std = CLIP_STATS if found.origin == "CLIP" else (IMAGENET_MEAN, IMAGENET_STD)
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    table = state["pos_embed"]
    own_size, own_grid = _source_grid(config, table.shape[1] - 1, patch_size, img_size, more.get("stride"), file)
    more["quick_gelu"] = more.get("quick_gelu") or config.get("quick_gelu", False)
    model = VisionTransformer(
        tuple(img_size or own_size), patch_size, width, depth, heads, mean=tuple(config.get("mean", mean)),
        std=tuple(config.get("std", std)), pre_norm="norm_pre.weight" in state,
        fc_norm="fc_norm.weight" in state and "norm.weight" not in state, **more,
    )  # fmt: skip
    resized = [] if own_grid == model.grid_size else ["pos_embed"]
    table = resize_pos_embed(table, own_grid, model.grid_size, pos_resize)
    model.report = load_pretrained(model, replace(found, state=state | {"pos_embed": table}), file, resized)
    if resized:
        model.report += "\n  pos_embed from {} x {} to {} x {}, {}".format(*own_grid, *model.grid_size, pos_resize)
    return model.eval()


def _source_grid(config: dict, patches: int, patch: int, asked: tuple | None, stride: int | None, file) -> tuple:
    """((H, W) in px, (rows, columns)) that a position table was made for: what the file's config says, the grid that
    was asked for if it has as many patches, or a square; InputError where none or two fit."""
    if size := config.get("img_size"):
        return tuple(size), patch_grid(tuple(size), patch, config.get("stride"))
    side = round(patches**0.5)
    square = [((side * patch, side * patch), (side, side))] if side * side == patches else []
    if asked:
        grid = patch_grid(tuple(asked), patch, stride)
        if grid[0] * grid[1] == patches:
            return tuple(asked), grid
        beside = (asked[0] // patch, asked[1] // patch)  # the same pixels, before patches overlapped
        if beside[0] * beside[1] == patches and beside not in [found[1] for found in square]:
            square.append(((beside[0] * patch, beside[1] * patch), beside))
    if len(square) == 1:
        return square[0]
    fits = "which fits {} x {} and {} x {}".format(*square[0][1], *square[1][1]) if square else "which is no square"
    if round((patches + 1) ** 0.5) ** 2 == patches + 1:
        fits += f" ({patches + 1} without a row for the class token would be, as flexivit's: no place for that here)"
    cure = "give --input_size (and --stride) of its training, or convert it with them (tools.checkpoint convert)"
    raise InputError(f"{file} has a position table for {patches} patches, {fits}, and does not say its grid: {cure}")
