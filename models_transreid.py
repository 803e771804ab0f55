"""TransReID: a ViT for re-identification (He et al., ICCV 2021, arXiv 2102.04378).

Letters as in models_vit.py; K vehicles to tell apart in training.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models_vit import VisionTransformer, run_blocks
from util.dist import gather_rows
from util.errors import InputError


@dataclass(frozen=True)
class TransReIDConfig:
    """What is added to the encoder; with the defaults nothing: the paper's ViT baseline.

    cameras, views: rows of the table of side information (SIE, Sec. 3.3): the largest id + 1; 0: not used.
    unknown_view: the last of the `views` rows is for images whose view is not known (-1). sie_weight: lambda of eq. 8.
    jpm: the jigsaw patch module (Sec. 3.2): beside the global branch, `parts` local ones that share a block.
    shift, groups: of `jigsaw_order`.
    """

    cameras: int = 0
    views: int = 0
    unknown_view: bool = False
    sie_weight: float = 3.0
    jpm: bool = False
    shift: int = 8
    groups: int = 2
    parts: int = 4


def jigsaw_order(num_patches: int, shift: int, groups: int) -> torch.Tensor:
    """[num_patches or a little more] int64: patches before they are cut into parts, rolled by `shift` - 1, then dealt
    from `groups` equal runs in turn, a0, b0, a1 ...; where they do not go in evenly, the last but one is repeated."""
    order = torch.arange(num_patches).roll(1 - shift)
    order = torch.cat([order, order[-2].repeat(-num_patches % groups)])
    return order.view(groups, -1).t().flatten()


class TransReID(nn.Module):
    """Encoder, branches, and for each branch a BNNeck (Luo et al., 2019) and a classifier. The encoder becomes part of
    this model (its last block and norm move into the branches of JPM)."""

    def __init__(self, encoder: VisionTransformer, num_classes: int, config: TransReIDConfig):
        super().__init__()
        self.config, self.base = config, encoder
        encoder.pos_embed.requires_grad = True
        dim, branches = encoder.embed_dim, 1 + config.jpm * config.parts
        self.sie_embed = None
        if config.cameras or config.views:
            self.sie_embed = nn.Parameter(torch.zeros(max(config.cameras, 1) * max(config.views, 1), 1, dim))
            nn.init.trunc_normal_(self.sie_embed, std=0.02)
        if config.jpm:
            if encoder.num_patches < 2 * config.parts or not 1 <= config.shift <= encoder.num_patches:
                what = f"be shifted by {config.shift} and cut into {config.parts} parts"
                cure = "larger images, a smaller --stride, or no --jpm"
                raise InputError(f"{encoder.num_patches} patches cannot {what}: {cure}")
            last = nn.Sequential(encoder.blocks[-1], encoder.norm)
            self.b1, self.b2 = copy.deepcopy(last), copy.deepcopy(last)
            encoder.blocks, encoder.norm = encoder.blocks[:-1], nn.Identity()
            length = encoder.num_patches // config.parts
            order = jigsaw_order(encoder.num_patches, config.shift, config.groups)[: config.parts * length]
            self.register_buffer("order", 1 + order.view(config.parts, length), persistent=False)  # of the tokens
        self.bottleneck = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(branches))
        self.classifier = nn.ModuleList(nn.Linear(dim, num_classes, bias=False) for _ in range(branches))
        for neck, classifier in zip(self.bottleneck, self.classifier):
            neck.bias.requires_grad = False
            nn.init.normal_(classifier.weight, std=0.001)

    def side_rows(self, camids: torch.Tensor | None, viewids: torch.Tensor | None) -> torch.Tensor:
        """[N] int64 rows of the table of side information; InputError for an id that it has no row for."""
        rows = 0
        if self.config.unknown_view and viewids is not None:
            viewids = torch.where(viewids < 0, self.config.views - 1, viewids)
        for ids, count, flag in ((camids, self.config.cameras, "camera"), (viewids, self.config.views, "view")):
            if not count:
                continue
            # on a GPU a look would stop the device; the ONNX export has no numbers to look at
            looks = ids is not None and ids.device.type == "cpu" and not torch.compiler.is_compiling()
            if ids is None or looks and (ids.min() < 0 or ids.max() >= count):
                what = "none is given" if ids is None else f"they reach from {ids.min()} to {ids.max()}"
                known = f"the {flag} embedding knows the {flag} ids 0 to {count - 1}, but {what}"
                raise InputError(f"{known}: evaluate on the set it was trained for, or train without --sie_{flag}")
            rows = rows * count + ids
        return rows

    @torch.no_grad()
    def forget_unseen(self, camids: torch.Tensor, viewids: torch.Tensor) -> torch.Tensor:
        """Rows of the table of side information that no training image shows (camids, viewids: [n] int64) would stay
        random: set them to zero. Returns [*] int64, those rows."""
        if self.sie_embed is None:
            return torch.zeros(0, dtype=torch.int64)
        rows = torch.arange(len(self.sie_embed))
        unseen = rows[~torch.isin(rows, self.side_rows(camids, viewids))]
        self.sie_embed[unseen.to(self.sie_embed.device)] = 0.0
        return unseen

    @property
    def feature_dim(self) -> int:
        return self.base.embed_dim * len(self.bottleneck)

    def side_ids(self, camids: torch.Tensor, viewids: torch.Tensor, device: torch.device) -> tuple:
        """[N] int64 camids and viewids on the CPU -> those this model uses, checked, on the device; None for others."""
        self.side_rows(camids, viewids)
        used = (camids, self.config.cameras), (viewids, self.config.views)
        return tuple(ids.to(device, non_blocking=True) if count else None for ids, count in used)

    def branches(self, imgs: torch.Tensor, camids=None, viewids=None) -> list[torch.Tensor]:
        """[N, 3, H, W] -> features before the BNNeck, [N, D] each: global, then the parts of JPM."""
        x = self.base.embed(imgs)
        if self.sie_embed is not None:
            x = x + self.config.sie_weight * self.sie_embed[self.side_rows(camids, viewids)]
        x = run_blocks(self.base.blocks, x, self.base.grad_checkpoint)
        if not self.config.jpm:
            return [self.base.norm(x)[:, 0]]
        parts = x[:, self.order]  # [N, parts, length, D]
        cls_token = x[:, None, :1].expand(-1, self.config.parts, -1, -1)
        local = self.b2(torch.cat([cls_token, parts], dim=2).flatten(0, 1))[:, 0]
        return [self.b1(x)[:, 0], *local.view(x.shape[0], self.config.parts, -1).unbind(dim=1)]

    def forward(self, imgs: torch.Tensor, camids=None, viewids=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For training: (logits [N, K] after the BNNeck, features [N, D] before it), one of each a branch. Under DDP,
        N counts the images of all ranks: BNNecks and triplets see the whole batch."""
        features = gather_rows(torch.stack(self.branches(imgs, camids, viewids), dim=1)).unbind(dim=1)
        logits = [classifier(neck(x)) for x, neck, classifier in zip(features, self.bottleneck, self.classifier)]
        return logits, list(features)

    def encode(self, imgs: torch.Tensor, camids=None, viewids=None) -> torch.Tensor:
        """For search: [N, D], with JPM [N, (1 + parts) D]: the global feature and a `parts`-th of each local
        one, before the BNNeck."""
        first, *local = self.branches(imgs, camids, viewids)
        return torch.cat([first, *(x / self.config.parts for x in local)], dim=1)


def hard_triplet_loss(features: torch.Tensor, pids: torch.Tensor) -> torch.Tensor:
    """Batch-hard triplets with a soft margin (Hermans et al., 2017, arXiv 1703.07737, eq. 5 and Sec. 3):

        mean_a log(1 + exp(max_p d(a, p) - min_n d(a, n)))

    d is the Euclidean distance of features [N, D] that are not normalised; p are images of a's vehicle (a too), n the
    others, of one other vehicle at least. pids: [N] int64.
    """
    features = features.double()  # neither autocast nor TF32 rounds it; squares of fp16 numbers overflow
    squared, same = features.square().sum(dim=1), pids[:, None] == pids[None]
    distance = (squared[:, None] + squared[None] - 2 * features @ features.t()).clamp_min(1e-12).sqrt()
    farthest = distance.masked_fill(~same, -torch.inf).amax(dim=1)
    nearest = distance.masked_fill(same, torch.inf).amin(dim=1)
    return F.softplus(farthest - nearest).mean().float()


def over_branches(loss, outputs: list[torch.Tensor], pids: torch.Tensor) -> torch.Tensor:
    """TransReID's sum over branches, as in its code: the global one counts as much as the mean of the local ones."""
    first, *local = [loss(output, pids) for output in outputs]
    return (first + torch.stack(local).mean()) / 2 if local else first
