"""A frozen encoder and what can be read out of one pass through it.

Letters: N batch, L patches without class token, D width, D_t teacher width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models_mae import MODELS, MaskedAutoencoderViT
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import HEAD_KEYS, load_weights, read_checkpoint
from util.errors import InputError

READ_OUTS = ("cls", "mean", "context", "layers")


class ContextReadOut(nn.Module):
    """What CGD-MAE's pre-training compared with the teacher: the global context (`GlobalContextHead.pool`),
    here of all patches, projected to the teacher's width, of unit length.

    Args:
        mae: a model with a distillation head; its encoder is not kept.
    """

    def __init__(self, mae: MaskedAutoencoderViT):
        super().__init__()
        mae.blocks = nn.ModuleList()  # the latent comes from the encoder that is probed
        self.mae = mae

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """[N, 1 + L, D] tokens after the final norm -> [N, D_t]."""
        head, decoded = self.mae.distill_head, None
        ids_shuffle = torch.arange(latent.shape[1] - 1, device=latent.device).expand(len(latent), -1)
        if head.context == "decoder":
            decoded = self.mae.decoder_norm(self.mae.forward_decoder(latent, ids_shuffle))
        return F.normalize(head.proj(head.pool(latent, decoded, ids_shuffle)).float(), dim=1)


class ReadOuts(nn.Module):
    """Names and features of one unmasked pass.

    `cls`, `mean`: class token and mean of the patch tokens after the final norm. `context`: see
    `ContextReadOut`. `layers`: `cls_block1`, `mean_block1` ... the same of the output of every block, each
    through the final norm, so that the last ones equal `cls` and `mean`.

    Args:
        wanted: some of `READ_OUTS`. context: where `context` is wanted.
    """

    def __init__(self, encoder: VisionTransformer, wanted: tuple[str, ...], context: ContextReadOut | None):
        super().__init__()
        self.encoder, self.context = encoder, context
        self.widths = {name: encoder.embed_dim for name in ("cls", "mean") if name in wanted}
        if context is not None:
            self.widths["context"] = context.mae.distill_head.bank.shape[1]
        self.has_layers = "layers" in wanted
        if self.has_layers:
            for block in range(1, len(encoder.blocks) + 1):
                self.widths |= {f"{token}_block{block}": encoder.embed_dim for token in ("cls", "mean")}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.widths)

    @property
    def img_size(self) -> tuple[int, int]:
        return self.encoder.img_size

    @property
    def pos_embed(self) -> torch.Tensor:
        return self.encoder.pos_embed

    def encode(self, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, 3, H, W] uint8 or normalised float -> {name: [N, its width]}."""
        x, found = self.encoder.embed(imgs), {}
        for number, block in enumerate(self.encoder.blocks, 1):
            x = block(x)
            if self.has_layers:
                tokens = self.encoder.norm(x)
                found[f"cls_block{number}"] = tokens[:, 0]
                found[f"mean_block{number}"] = tokens[:, 1:].mean(dim=1)
        latent = self.encoder.norm(x)  # [N, 1 + L, D]
        found |= {"cls": latent[:, 0], "mean": latent[:, 1:].mean(dim=1)}
        if self.context is not None:
            found["context"] = self.context(latent)
        return {name: found[name] for name in self.names}


class SearchReadOuts:
    """All read-outs beside each other, with the interface of a TransReID model without side information."""

    def __init__(self, read_outs: ReadOuts):
        self.base, self.read_outs = read_outs.encoder, read_outs
        ends = torch.tensor(list(read_outs.widths.values())).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.feature_dim = ends[-1]
        self.columns = {name: slice(a, b) for name, a, b in zip(read_outs.names, starts, ends)}

    def side_ids(self, camids, viewids, device) -> tuple[None, None]:
        return None, None

    def encode(self, imgs: torch.Tensor, camids=None, viewids=None) -> torch.Tensor:
        """[N, 3, H, W] -> [N, sum of the widths] float32; `columns` says where each read-out is."""
        return torch.cat([values.float() for values in self.read_outs.encode(imgs).values()], dim=1)


def load_read_outs(
    file: str | Path,
    wanted: tuple[str, ...],
    img_size: tuple[int, int] | None,
    device: torch.device | str,
    fused_attn: bool = True,
) -> tuple[ReadOuts, str]:
    """The encoder of any file that `load_encoder` reads, in eval mode, and what was loaded.

    Raises:
        InputError: see `load_encoder`; `context` is wanted of a file without a context head.
    """
    encoder = load_encoder(file, img_size, device, fused_attn)
    report = encoder.report
    context = None
    if "context" in wanted:
        context = load_context(file, encoder.img_size)
        report += f"\n  context head: {context.mae.distill_head.context}, of a pre-training checkpoint"
    return ReadOuts(encoder, wanted, context).to(device).eval(), report


def load_context(file: str | Path, img_size: tuple[int, int]) -> ContextReadOut:
    """The context head of a pre-training checkpoint (and the decoder, which `--context decoder` pools).

    Raises:
        InputError: the file has none, or one for another number of patches.
    """
    content = read_checkpoint(file)
    state, args, config = content["model"], content.get("args", {}), content.get("config", {})
    last = [name for name in state if name.startswith("distill_head.proj.") and name.endswith(".weight")]
    if not last or not isinstance(args, dict) or "model" not in config:
        what = "it is of a run with --no_distill" if args and args.get("no_distill") else (
            "exported encoders and the files of others hold none"
        )  # fmt: skip
        raise InputError(
            f"--read_out context: {file} has no context head ({what}); give checkpoint-last.pth of a "
            "main_pretrain.py run with distillation"
        )
    hidden = args.get("distill_hidden", 0)
    bank = torch.zeros(1, len(state[max(last)]))  # only its width matters here
    distill = {"context": args["context"], "bank": bank, "tau": 1.0, "hidden": hidden}
    mae = MODELS[config["model"]](img_size=img_size, distill=distill)
    load_weights(mae, state, file, needed="all")
    own = mae.state_dict()
    other = [k for k in own if k.startswith(HEAD_KEYS) and (k not in state or state[k].shape != own[k].shape)]
    if other:
        size = " x ".join(map(str, img_size))
        raise InputError(
            f"--read_out context at {size} px: {other[0]} of {file} is for another size; leave --input_size out"
        )
    return ContextReadOut(mae)
