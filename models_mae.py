"""The masked autoencoder of CGD-MAE: MAE's network and pixel loss (He et al., 2022), plus the global-context head.

Letters: N batch, C channels, p patch size, L patches without class token, D encoder width, D_dec decoder width, D_t
teacher width, T texts in the bank, len_keep visible patches. mask: 0 = keep, 1 = remove.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models_vit import LayerNorm, VisionTransformer, build_blocks, run_blocks
from util.checkpoint import encoder_state, load_weights, read_checkpoint
from util.errors import CONTEXTS, DECODER_SIZES, ENCODER_SIZES, MAE_MODELS, InputError
from util.pos_embed import sincos_pos_embed
from util.pretrained import read_config


def count_kept(num_patches: int, mask_ratio: float) -> int:
    """Count the visible patches of an image, MAE's int(L * (1 - mask_ratio))."""
    len_keep = int(num_patches * (1 - mask_ratio))
    if not 1 <= len_keep < num_patches:
        words = f"--mask_ratio {mask_ratio} keeps {len_keep} of {num_patches} patches"
        raise InputError(f"{words}: choose a value that keeps and removes at least one")
    return len_keep


def take_rows(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """x[n, ids[n, k]] for x [N, L, D] and ids [N, K] int64 -> [N, K, D]; on the CPU much faster than `gather`."""
    N, L, D = x.shape
    rows = ids + torch.arange(N, device=ids.device)[:, None] * L
    return x.reshape(N * L, D).index_select(0, rows.flatten()).view(N, -1, D)


class MaskedAutoencoderViT(VisionTransformer):
    """MAE with the CGD head: 254 tensors for ViT-B/16 without `distill_head.*`.

    Args:
        img_size, patch_size, embed_dim, depth, num_heads, mean, std: the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder.
        norm_pix_loss: score pixels normalised per patch (MAE, Sec. 3 "Reconstruction target").
        distill: keyword arguments of `GlobalContextHead` except the student's sizes; None for plain MAE. The head is
            built last, so that it does not change the MAE's initial weights.
    """

    def __init__(
        self, img_size=(224, 224), patch_size=16, embed_dim=768, depth=12, num_heads=12, *, decoder_embed_dim=512,
        decoder_depth=8, decoder_num_heads=16, norm_pix_loss=False, distill: dict | None = None, **pixel_stats,
    ):  # fmt: skip
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, initialize=False, **pixel_stats)
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        decoder_pos_embed = sincos_pos_embed(decoder_embed_dim, self.grid_size)[None]
        self.decoder_pos_embed = nn.Parameter(decoder_pos_embed, requires_grad=False)
        self.decoder_blocks = build_blocks(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * 3)
        self.initialize_weights()
        self.distill_head = None
        if distill is not None:
            sizes = {"embed_dim": embed_dim, "decoder_dim": decoder_embed_dim, "num_patches": self.num_patches}
            self.distill_head = GlobalContextHead(**sizes, **distill)

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, L, p * p * 3], each patch in (row, column, channel) order."""
        (rows, columns), p = self.grid_size, self.patch_size
        x = imgs.reshape(len(imgs), 3, rows, p, columns, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(len(imgs), rows * columns, p * p * 3)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """[N, L, p * p * 3] -> [N, 3, H, W]; undoes `patchify`."""
        (rows, columns), p = self.grid_size, self.patch_size
        x = x.reshape(len(x), rows, columns, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), 3, rows * p, columns * p)

    def random_masking(self, x: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None):
        """Keep the int(L * (1 - mask_ratio)) patches of each image that have the smallest noise.

        Args:
            x: [N, L, ...] patches. noise: [N, L] float; None draws it.
        Returns:
            (x of the kept patches [N, len_keep, ...], mask [N, L], ids_restore [N, L], ids_keep [N, len_keep]).
        """
        if noise is None:
            noise = torch.rand(x.shape[:2], device=x.device)
        len_keep = count_kept(x.shape[1], mask_ratio)
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, :len_keep]
        mask = (ids_restore >= len_keep).float()
        return take_rows(x, ids_keep), mask, ids_restore, ids_keep

    def forward_encoder(self, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None):
        """Embed and encode the kept patches only.

        Args:
            imgs: [N, 3, H, W] normalised.
        Returns:
            (latent [N, 1 + len_keep, D] after the final norm, mask [N, L], ids_restore [N, L]).
        """
        x, mask, ids_restore, ids_keep = self.random_masking(self.patchify(imgs), mask_ratio, noise)
        proj = self.patch_embed.proj
        # the patch embedding as a matrix product: removed patches are never embedded (no pre-norm, that is CLIP's)
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p * p * 3], as patches are laid
        x = F.linear(x, weight, proj.bias) + self.pos_embed[0, 1:][ids_keep]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # [N, 1 + len_keep, D]
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpoint)), mask, ids_restore

    def forward_decoder(self, latent: torch.Tensor, ids_restore: torch.Tensor):
        """Decode all patches in image order.

        Returns:
            (pred [N, L, p * p * 3] float32, decoded [N, 1 + L, D_dec] after decoder_norm).
        """
        x = self.decoder_embed(latent)
        num_removed = self.num_patches + 1 - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), num_removed, -1)
        patches = take_rows(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)  # unshuffled
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # [N, 1 + L, D_dec]
        decoded = self.decoder_norm(run_blocks(self.decoder_blocks, x, self.grad_checkpoint))
        return self.decoder_pred(decoded[:, 1:]).float(), decoded

    def forward_loss(self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Score the removed patches (MAE, Sec. 3).

        Returns:
            `pixel`: mean squared error; `pixel_baseline`: the same if every patch were predicted by its own mean.
        """
        target = self.patchify(imgs)
        centred = target - target.mean(dim=-1, keepdim=True)
        squares = centred.square().sum(dim=-1)  # [N, L]; torch.var is several times slower on a CPU
        var = squares / (target.shape[-1] - 1)  # unbiased, as in MAE
        baseline = squares / target.shape[-1]  # the error of predicting the mean
        if self.norm_pix_loss:
            target = centred * (var + 1e-6).rsqrt()[..., None]
            baseline = baseline / (var + 1e-6)
        error = F.mse_loss(pred, target, reduction="none").mean(dim=-1)  # [N, L]
        return {"pixel": (error * mask).sum() / mask.sum(), "pixel_baseline": (baseline * mask).sum() / mask.sum()}

    def forward(self, imgs: torch.Tensor, mask_ratio: float = 0.75, noise=None, teacher_embed=None) -> dict:
        """All loss terms of one batch, unweighted.

        Args:
            imgs: [N, 3, H, W], uint8 0..255 or float already normalised.
            mask_ratio: fraction of patches removed, in (0, 1).
            noise: [N, L] float, see `random_masking`.
            teacher_embed: [N, D_t] unit rows; required if there is a distillation head.
        Returns:
            dict, fp32: the scalars of `forward_loss` and the entries of `GlobalContextHead.forward`.
        """
        imgs = self.normalize(imgs)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred, decoded = self.forward_decoder(latent, ids_restore)
        terms = self.forward_loss(imgs, pred, mask)
        if self.distill_head is not None:
            terms |= self.distill_head(latent, decoded, teacher_embed)
        return terms


class GlobalContextHead(nn.Module):
    """Pools the student into one global token and compares it with the CLIP teacher.

    Readings of the paper's "global context" (`context`; docs/DIFFERENCES.md):
        attention: class token + bottleneck(sum_j a_j x_j), a = softmax_j(w x_j) over visible tokens
            (the global-context block of Cao et al., 2019, GCNet);
        cls: the class token; mean: mean of the visible patch tokens;
        decoder: sum over all patches of the decoded tokens with one learned weight per position
            (VehicleMAE, Wang et al., 2024).
    The token is projected to D_t and L2-normalised.

    Args:
        context: one of `CONTEXTS`.
        embed_dim, decoder_dim, num_patches: D, D_dec and L of the student.
        bank: [T, D_t] float32, unit rows: text embeddings of the same teacher.
        tau: temperature of both softmaxes over the bank.
        hidden: width of a hidden GELU layer in the projection; 0 for one linear layer.
        target: (mean [D_t], map [D_t, D_t]) of `TeacherCache.whitening`: the student is compared with (f - mean) map,
            L2-normalised, in place of f, and there is no KL: the texts lie elsewhere. None: f as it is.
    """

    def __init__(
        self, context: str, embed_dim: int, decoder_dim: int, num_patches: int, bank: torch.Tensor, tau: float,
        hidden=0, target: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):  # fmt: skip
        super().__init__()
        if context not in CONTEXTS:
            raise ValueError(f"context {context!r} is not one of {', '.join(CONTEXTS)}")
        self.context, self.tau = context, tau
        dim = decoder_dim if context == "decoder" else embed_dim
        if context == "attention":
            bottleneck = max(embed_dim // 8, 48)
            self.key = nn.Linear(embed_dim, 1)
            self.transform = nn.Sequential(
                nn.Linear(embed_dim, bottleneck), LayerNorm(bottleneck), nn.ReLU(), nn.Linear(bottleneck, embed_dim)
            )
        elif context == "decoder":
            self.position_weight = nn.Parameter(torch.full((num_patches,), 1 / num_patches))
            self.position_bias = nn.Parameter(torch.zeros(1))
        widen = [nn.Linear(dim, hidden), nn.GELU()] if hidden else []
        last = nn.Linear(hidden or dim, bank.shape[1])
        self.proj = nn.Sequential(*widen, last) if hidden else last
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if context == "attention":  # starts as the class token alone, as GCNet's additive fusion does
            nn.init.zeros_(self.transform[-1].weight)
        self.register_buffer("bank", bank, persistent=False)
        for name, values in zip(("target_mean", "target_map"), target or (None, None)):
            self.register_buffer(name, values, persistent=False)

    def pool(self, latent: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """The global token, [N, D] (or [N, D_dec] for `decoder`).

        Args:
            latent: [N, 1 + len_keep, D] encoder tokens after the final norm.
            decoded: [N, 1 + L, D_dec] decoder tokens after decoder_norm.
        """
        if self.context == "cls":
            return latent[:, 0]
        if self.context == "mean":
            return latent[:, 1:].mean(dim=1)
        if self.context == "attention":
            visible = latent[:, 1:]
            weight = self.key(visible).float().softmax(dim=1).to(visible.dtype)  # [N, len_keep, 1]
            return latent[:, 0] + self.transform((weight * visible).sum(dim=1))
        return (self.position_weight[:, None] * decoded[:, 1:]).sum(dim=1) + self.position_bias

    def forward(self, latent: torch.Tensor, decoded: torch.Tensor, teacher_embed: torch.Tensor) -> dict:
        """Both distillation terms and what they are compared with.

        Args:
            latent, decoded: see `pool`.
            teacher_embed: [N, D_t] float, unit rows: the teacher's image embeddings f.
        Returns:
            dict: `sim` = mean(1 - cos(z, f)); without `target` `kl` = mean KL(softmax(f U^T / tau) ||
            softmax(z U^T / tau)) over the bank U; for the trivial baselines, without gradient:
            `teacher_embed_mean` [D_t], `teacher_marginal` [T], `teacher_entropy` (nats).
        """
        token = self.proj(self.pool(latent, decoded))
        with torch.autocast(token.device.type, enabled=False):
            z = F.normalize(token.float(), dim=1)  # [N, D_t]
            f = teacher_embed.float()
            if self.target_map is not None:
                f = F.normalize((f - self.target_mean) @ self.target_map, dim=1)
                return {"sim": (1 - (z * f).sum(dim=1)).mean(), "teacher_embed_mean": f.mean(dim=0)}
            log_p = F.log_softmax(f @ self.bank.T / self.tau, dim=1)  # [N, T]
            log_q = F.log_softmax(z @ self.bank.T / self.tau, dim=1)
            p = log_p.exp()
            return {
                "sim": (1 - (z * f).sum(dim=1)).mean(),
                "kl": (p * (log_p - log_q)).sum(dim=1).mean(),
                "teacher_embed_mean": f.mean(dim=0),
                "teacher_marginal": p.mean(dim=0),
                "teacher_entropy": -(p * log_p).sum(dim=1).mean(),
            }


def build_mae(size: str, **kwargs) -> MaskedAutoencoderViT:
    """Build one of `util.errors.ENCODER_SIZES` with its decoder; kwargs go to `MaskedAutoencoderViT`."""
    names = (
        "embed_dim",
        "depth",
        "num_heads",
        "patch_size",
        *(f"decoder_{n}" for n in ("embed_dim", "depth", "num_heads")),
    )
    return MaskedAutoencoderViT(**dict(zip(names, ENCODER_SIZES[size] + DECODER_SIZES[size])), **kwargs)


MODELS = {name: partial(build_mae, size) for name, size in MAE_MODELS.items()}


def load_autoencoder(file: str | Path, model_name: str | None = None, norm_pix_loss: bool | None = None, **kwargs):
    """The MAE of a checkpoint, decoder included, in eval mode.

    Args:
        model_name, norm_pix_loss: for files that do not say them; default the file's.
        kwargs: of `MaskedAutoencoderViT`, as img_size; size and pixel statistics default to the file's.
    """
    content = read_checkpoint(file)
    state, config = content["model"], read_config(file, content)
    if len(encoder_state(state)) == len(state):
        raise InputError(
            f"{file} holds an encoder only; a reconstruction needs the decoder: use checkpoint-last.pth of the run, or "
            "a *_full.pth"
        )
    name = model_name or config.get("model")
    if name not in MODELS:
        raise InputError(f"{file} does not say its architecture: pass --model, one of {', '.join(MODELS)}")
    if norm_pix_loss is None and (norm_pix_loss := config.get("norm_pix_loss")) is None:
        raise InputError(f"{file} does not say its target: pass --norm_pix_loss or --no-norm_pix_loss")
    said = {key: tuple(config[key]) for key in ("img_size", "mean", "std") if key in config}
    model = MODELS[name](norm_pix_loss=norm_pix_loss, **(said | kwargs))
    load_weights(model, state, file, needed="all")
    return model.eval()
