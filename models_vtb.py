"""VTB: attributes recognised by image and text tokens together (Cheng et al., IEEE TCSVT 2022, "A Simple
Visual-Textual Baseline for Pedestrian Attribute Recognition").

Letters as in models_vit.py; A attributes, D_t numbers of a text vector.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models_vit import VisionTransformer, run_blocks
from util.dist import gather_rows


class AttributeClassifiers(nn.Module):
    """A classifiers of one output each, computed at once: logit_a = w_a . x_a + b_a; weight [A, D] and bias [A] are
    drawn as those of `nn.Linear`, uniform up to 1 / sqrt(D)."""

    def __init__(self, dim: int, num_attributes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_attributes, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.bias = nn.Parameter(torch.empty(num_attributes).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, A, D], the tokens of the attributes -> [N, A] float32."""
        return (x.float() * self.weight).sum(dim=-1) + self.bias


class VTB(nn.Module):
    """Visual tokens of all blocks but the last, without the final norm, beside one text token an attribute;
    the last block of the same encoder fuses them, its norm follows, and each attribute is read from its own
    text token. Nothing of the encoder is copied: block and norm are shared, not added.

        v = blocks[:-1](embed(image)) + vis_embed                     [N, 1 + L, D]
        t = word_embed(attr_vectors) + tex_embed                      [A, D]
        z = norm(blocks[-1]([t | v]))[:, :A]                          [N, A, D]
        attr_logits = BatchNorm(classifier(z))                        [N, A]

    Args:
        encoder: a ViT; it becomes part of this model.
        attr_vectors: [A, D_t] float, one fixed text vector an attribute. They are kept with the weights.
    """

    def __init__(self, encoder: VisionTransformer, attr_vectors: torch.Tensor):
        super().__init__()
        self.base = encoder
        encoder.pos_embed.requires_grad = True
        (self.num_attributes, text_dim), dim = attr_vectors.shape, encoder.embed_dim
        self.register_buffer("attr_vectors", attr_vectors.detach().float().clone())
        self.word_embed = nn.Linear(text_dim, dim)
        self.vis_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.tex_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.classifier = AttributeClassifiers(dim, self.num_attributes)
        self.bn = nn.BatchNorm1d(self.num_attributes)

    def fused(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] uint8 or normalised float -> [N, A + 1 + L, D]: text tokens, class token, patches."""
        blocks, again = self.base.blocks, self.base.grad_checkpoint
        x = run_blocks(blocks[:-1], self.base.embed(imgs), again) + self.vis_embed
        text = (self.word_embed(self.attr_vectors) + self.tex_embed).expand(len(x), -1, -1)  # [N, A, D]
        return self.base.norm(run_blocks(blocks[-1:], torch.cat([text.to(x.dtype), x], dim=1), again))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> attr_logits [N, A] float32. In training under DDP, N counts the images of all ranks: the norm
        of the logits sees the whole batch."""
        attr_logits = self.classifier(self.fused(imgs)[:, : self.num_attributes])
        return self.bn(gather_rows(attr_logits) if self.training else attr_logits)


def attribute_loss(attr_logits: torch.Tensor, labels: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Weighted binary cross-entropy, summed over attributes, averaged over images:

        1/N sum_i sum_a w_ia (-y_ia log p_ia - (1 - y_ia) log(1 - p_ia)),  p = sigmoid(attr_logits [N, A])

    w is exp(1 - r_a) where attribute a is true, exp(r_a) where it is not, 0 where that is not known (Li et al., ACPR
    2015, "Multi-attribute Learning for Pedestrian Attribute Recognition in Surveillance Scenarios", with sigma 1).

    Args:
        labels: [N, A] integers, 1 true, 0 not, -1 unknown. rates: r, [A] float, share of true training images.
    """
    true, rates = labels == 1, rates.expand(labels.shape)
    weights = torch.where(true, (1 - rates).exp(), rates.exp()) * (labels >= 0)
    each = F.binary_cross_entropy_with_logits(attr_logits.float(), true.float(), reduction="none")
    return (weights * each).sum() / len(labels)
