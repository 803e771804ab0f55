"""SETR: a ViT with a decoder for every pixel (Zheng et al., CVPR 2021, arXiv 2012.15840).

Letters as in models_vit.py; K classes, (h, w) the grid of patches, T taps (blocks whose outputs are used).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce

from metrics.seg import IGNORE
from models_vit import LayerNorm, VisionTransformer, run_blocks
from util.dist import get_world_size

# blocks of 12 whose outputs are used, from 0: the auxiliary heads' in order, the main head's (the last) last
TAPS = {"naive": (2, 5, 8, 11), "pup": (4, 7, 9, 11), "mla": (2, 5, 8, 11)}
CHANNELS, MLA_CHANNELS = 256, 128


class SETRConfig(NamedTuple):
    """decoder: naive, pup (progressive upsampling), mla (multi-level aggregation). aux: heads for the loss alone."""

    num_classes: int
    decoder: str = "pup"
    aux: bool = True


def scaled_taps(decoder: str, depth: int) -> tuple[int, ...]:
    """The taps of an encoder of any depth: block t of 12 becomes ceil((t + 1) depth / 12) - 1, so that 24
    blocks give SETR's own 5, 11, 17, 23 and the last stays the last. Shallow encoders use a block twice."""
    return tuple(-(-(tap + 1) * depth // 12) - 1 for tap in TAPS[decoder])


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the images of all ranks, equally many on each, for the CPU, which torch's
    SyncBatchNorm refuses (on CUDA `synchronized` takes that)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        world = get_world_size()
        if not self.training or world == 1:
            return super().forward(x)
        # torch's all_reduce with a gradient: each rank's loss depends on each rank's share
        mean = all_reduce(x.float().mean(dim=(0, 2, 3))) / world
        centred = x.float() - mean[:, None, None]
        var = all_reduce(centred.square().mean(dim=(0, 2, 3))) / world
        count = world * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with torch's SyncBatchNorm where there are several ranks with GPUs; names stay."""
    several = device.type == "cuda" and get_world_size() > 1
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model


def conv_bn_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the size, batch normalisation (which replaces its bias), ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, CpuSyncBatchNorm(outputs), nn.ReLU(inplace=True))


def as_map(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[N, h w, D] -> [N, D, h, w]."""
    return x.transpose(1, 2).unflatten(2, grid)


class UpHead(nn.Module):
    """LayerNorm; for each of `scales` a convolution to 256 channels and a bilinear enlargement; 1 x 1 to the classes
    (Sec. 3.2 of the paper: "naive" and "PUP")."""

    def __init__(self, dim: int, num_classes: int, kernel: int, scales: tuple[int, ...]):
        super().__init__()
        self.norm, self.scales = LayerNorm(dim), scales
        self.convs = nn.ModuleList(conv_bn_relu(CHANNELS if i else dim, CHANNELS, kernel) for i in range(len(scales)))
        self.classify = nn.Conv2d(CHANNELS, num_classes, 1)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[N, h w, D] -> [N, K, s h, s w], s the product of the scales."""
        x = as_map(self.norm(x), grid)
        for conv, scale in zip(self.convs, self.scales):
            x = conv(x)
            if scale > 1:
                x = F.interpolate(x, scale_factor=scale, mode="bilinear")
        return self.classify(x)


class MLAHead(nn.Module):
    """Multi-level aggregation (Sec. 3.2, "MLA"): each level to 256 channels, added up from the deepest to the
    shallowest, 3 x 3; two 3 x 3 to 128 channels and x 4 for each; all together 3 x 3 to the classes."""

    def __init__(self, dim: int, num_classes: int, levels: int, aux: bool):
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(dim) for _ in range(levels))
        self.lateral = nn.ModuleList(conv_bn_relu(dim, CHANNELS, 1) for _ in range(levels))
        self.smooth = nn.ModuleList(conv_bn_relu(CHANNELS, CHANNELS, 3) for _ in range(levels))
        two = (CHANNELS, MLA_CHANNELS), (MLA_CHANNELS, MLA_CHANNELS)
        self.branches = nn.ModuleList(nn.Sequential(*(conv_bn_relu(*of, 3) for of in two)) for _ in range(levels))
        self.classify = nn.Conv2d(levels * MLA_CHANNELS, num_classes, 3, padding=1)
        self.aux = nn.ModuleList(nn.Conv2d(CHANNELS, num_classes, 1, bias=False) for _ in range(levels if aux else 0))

    def forward(self, levels: list[torch.Tensor], grid: tuple[int, int]) -> list[torch.Tensor]:
        """[N, h w, D] of each level, shallow first -> [N, K, 4 h, 4 w], then [N, K, h, w] of each auxiliary head."""
        maps, total = [], 0
        for x, norm, lateral, smooth in reversed(list(zip(levels, self.norms, self.lateral, self.smooth))):
            total = lateral(as_map(norm(x), grid)) + total
            maps.insert(0, smooth(total))
        joined = torch.cat([branch(x) for branch, x in zip(self.branches, maps)], dim=1)
        main = self.classify(F.interpolate(joined, scale_factor=4, mode="bilinear", align_corners=True))
        return [main, *(head(x) for head, x in zip(self.aux, maps))]


class SETR(nn.Module):
    """Encoder and decoder. Features are outputs of blocks without the encoder's final norm, which it loses. The class
    token never reaches the heads: with `mla` it is dropped before the first block, as in SETR, else after each tap."""

    def __init__(self, encoder: VisionTransformer, config: SETRConfig):
        super().__init__()
        self.config, self.base = config, encoder
        encoder.norm = nn.Identity()
        encoder.pos_embed.requires_grad = True
        self.taps = scaled_taps(config.decoder, len(encoder.blocks))
        dim, classes = encoder.embed_dim, config.num_classes
        if config.decoder == "mla":
            self.decoder = MLAHead(dim, classes, len(self.taps), config.aux)
            self.backbone = ("base.", "decoder.norms.", "decoder.lateral.", "decoder.smooth.")  # SETR's own word for it
            return
        main, aux, count = ((3, (2, 2, 2, 1)), (3, (4,)), 4) if config.decoder == "pup" else ((1, (1,)), (1, (1,)), 3)
        self.decoder = UpHead(dim, classes, *main)
        self.aux = nn.ModuleList(UpHead(dim, classes, *aux) for _ in range(count if config.aux else 0))

    def features(self, imgs: torch.Tensor) -> list[torch.Tensor]:
        """[N, 3, H, W] uint8 or normalised float -> outputs of the taps, [N, L, D] each."""
        x, done, found = self.base.embed(imgs), 0, []
        if self.config.decoder == "mla":
            x = x[:, 1:]
        for tap in self.taps:
            x = run_blocks(self.base.blocks[done : tap + 1], x, self.base.grad_checkpoint)
            done = tap + 1
            found.append(x[:, -self.base.num_patches :])
        return found

    def forward(self, imgs: torch.Tensor, aux: bool = True) -> list[torch.Tensor]:
        """[N, 3, H, W] -> logits [N, K, H, W] of the main head; with `aux` those of the auxiliary heads after it."""
        levels, grid = self.features(imgs), self.base.grid_size
        if self.config.decoder == "mla":
            found = self.decoder(levels, grid)[: None if aux else 1]
        else:
            found = [self.decoder(levels[-1], grid), *(head(x, grid) for head, x in zip(self.aux, levels) if aux)]
        return [F.interpolate(x, imgs.shape[-2:], mode="bilinear") for x in found]

    def predict(self, imgs: torch.Tensor) -> torch.Tensor:
        """For answers: logits [N, K, H, W] of the main head."""
        return self(imgs, aux=False)[0]


def setr_loss(outputs: list[torch.Tensor], masks: torch.Tensor, aux_weight=0.4, smoothing=0.0) -> dict:
    """SETR's loss (Sec. 3.3): L = L_main + aux_weight sum_k L_aux_k, each a mean over all ranks' P labelled pixels

        - 1/P sum_{p: y_p != 255} log softmax(z_p)[y_p]

    Args:
        outputs: z of each head, [N, K, H, W], the main one's first. masks: y, [N, H, W] integers. smoothing: epsilon of
            Szegedy et al., 2016, Sec. 7.
    Returns:
        loss; main and aux, its parts; accuracy: share of labelled pixels that the main head names.
    """
    pixels, masks, world = (masks != IGNORE).sum().float(), masks.long(), get_world_size()
    if world > 1:
        dist.all_reduce(pixels)
    pixels = pixels.clamp_min(1) / world  # so that the mean of the ranks' losses is the mean over all P pixels
    options = {"ignore_index": IGNORE, "reduction": "sum", "label_smoothing": smoothing}
    main, *aux = [F.cross_entropy(x.float(), masks, **options) / pixels for x in outputs]
    terms = {"main": main, "loss": main, "accuracy": (outputs[0].argmax(dim=1) == masks).sum().float() / pixels}
    if aux:
        terms["aux"] = torch.stack(aux).sum()
        terms["loss"] = main + aux_weight * terms["aux"]
    return terms
