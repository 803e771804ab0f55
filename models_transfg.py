"""TransFG: a ViT for fine-grained classes (He et al., AAAI 2022, arXiv 2103.07976).

Letters as in models_vit.py; T = 1 + L tokens, h heads, d = D / h, n blocks before the selection, K classes.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from models_vit import VisionTransformer, init_module, run_blocks
from util.errors import InputError

ROWS_AT_ONCE = 64  # of an attention matrix in memory: fastest, for one image and for eight


@torch.no_grad()
def class_token_row(
    blocks: Sequence[Block], inputs: Sequence[torch.Tensor], rows_at_once: int = ROWS_AT_ONCE
) -> torch.Tensor:
    """Row 0 of the product A_n A_{n-1} ... A_1 of attention matrices (Sec. 3.2), for each head, without
    identity and without a mean over the heads.

    Only that row is needed, so it goes backwards through the blocks, r = e_0 A_n, r A_{n-1}, ...: T^2
    products a block in place of T^3, and no matrix is kept. Sums are float32, also under autocast.

    Args:
        blocks: in order; inputs: [N, T, D] tokens as they enter each of them. rows_at_once: of A in memory.
    Returns:
        [N, h, T] float32; rows sum to 1.
    """
    row = None
    for block, x in zip(reversed(blocks), reversed(inputs)):
        attn, (N, T, D) = block.attn, x.shape
        weight, bias = attn.qkv.weight[: 2 * D], attn.qkv.bias[: 2 * D]  # no values: a third less work
        q, k = F.linear(block.norm1(x), weight, bias).view(N, T, 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q) * attn.scale, attn.k_norm(k)  # [N, h, T, d]
        with torch.autocast(x.device.type, enabled=False):
            q, k = q.float(), k.float().transpose(-2, -1)
            if row is None:  # e_0 A_n is a row of A_n
                row = (q[:, :, :1] @ k).softmax(dim=-1)[:, :, 0]
                continue
            parts = zip(row.split(rows_at_once, dim=2), q.split(rows_at_once, dim=2))  # of r, and rows of A
            row = sum((part[:, :, None] @ (rows @ k).softmax(dim=-1))[:, :, 0] for part, rows in parts)
    return row


class TransFG(nn.Module):
    """Encoder, part selection, and a linear classifier on the class token.

    Args:
        encoder: a ViT; it becomes part of this model.
        parts: its last block is replaced by one with fresh weights that sees the class token and, for each head, the
            patch that attention leads to (Sec. 3.2 "Part Selection Module"); its norm moves to `part_norm`. False:
            class token of the whole encoder and a linear classifier, the paper's ViT baseline.
    Raises:
        InputError: parts of an encoder of one block, which leaves nothing to select by.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, parts: bool = True):
        super().__init__()
        self.parts, self.base = parts, encoder
        encoder.pos_embed.requires_grad = True
        if parts:
            if len(encoder.blocks) < 2:
                raise InputError("part selection needs an encoder of two blocks or more: use --parts off")
            self.part_layer = copy.deepcopy(encoder.blocks[-1]).apply(init_module)
            self.part_norm = encoder.norm
            encoder.blocks, encoder.norm = encoder.blocks[:-1], nn.Identity()
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def features(self, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N, 3, H, W] uint8 or normalised float -> class token after the last norm [N, D], and the part
        patch of each head [N, h] int64, 0..L-1 in row order (heads may agree); None without parts."""
        x, checkpointed = self.base.embed(imgs), self.base.grad_checkpoint
        if not self.parts:
            return self.base.norm(run_blocks(self.base.blocks, x, checkpointed))[:, 0], None
        inputs = []  # autograd keeps them anyway
        for block in self.base.blocks:
            inputs.append(x.detach())
            x = run_blocks([block], x, checkpointed)
        ids = class_token_row(self.base.blocks, inputs)[:, :, 1:].argmax(dim=-1)  # [N, h]
        parts = x.gather(1, 1 + ids[:, :, None].expand(-1, -1, x.shape[2]))  # [N, h, D]
        x = run_blocks([self.part_layer], torch.cat([x[:, :1], parts], dim=1), checkpointed)
        return self.part_norm(x)[:, 0], ids

    def forward(self, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [N, K], class token [N, D]) of [N, 3, H, W] uint8 or normalised float images."""
        feature, _ = self.features(imgs)
        return self.head(feature), feature


def contrastive_loss(features: torch.Tensor, labels: torch.Tensor, margin: float = 0.4) -> torch.Tensor:
    """TransFG's contrastive loss (Sec. 3.2): with s_ij the cosine of class tokens i and j,

        1 / N^2 sum_i [ sum_{j: y_i = y_j} (1 - s_ij) + sum_{j: y_i != y_j} max(s_ij - margin, 0) ]

    Args:
        features: [N, D], not normalised. labels: [N] int64. margin: alpha of the paper.
    """
    z = F.normalize(features.double(), dim=1)  # double: neither autocast nor TF32 rounds it
    similar = z @ z.t()  # [N, N]
    same = labels[:, None] == labels[None]
    return torch.where(same, 1 - similar, (similar - margin).clamp_min(0)).mean().float()
