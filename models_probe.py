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


class ReadOuts(nn.Module):
    """Names and features of one unmasked pass.

    `cls`, `mean`: class token and mean of the patch tokens after the final norm.
    `context`: what pre-training compared with the teacher, the global context of all patches, projected to D_t.
    `layers`: `cls_block1`, `mean_block1` ... the same of the output of every block, each through the final norm, so
    that the last ones equal `cls` and `mean`.
    """

    def __init__(self, encoder: VisionTransformer, wanted: tuple[str, ...], mae: MaskedAutoencoderViT | None = None):
        super().__init__()
        self.encoder, self.mae, self.img_size = encoder, mae, encoder.img_size
        blocks = range(1, len(encoder.blocks) + 1) if "layers" in wanted else ()
        names = [name for name in ("cls", "mean", "context") if name in wanted]
        names += [f"{token}_block{block}" for block in blocks for token in ("cls", "mean")]
        self.widths = dict.fromkeys(names, encoder.embed_dim)
        if mae is not None:
            self.widths["context"] = mae.distill_head.bank.shape[1]

    def encode(self, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, 3, H, W] uint8 or normalised float -> {name: [N, its width]}."""
        x, found = self.encoder.embed(imgs), {}
        for number, block in enumerate(self.encoder.blocks, 1):
            x = block(x)
            if f"cls_block{number}" in self.widths:
                tokens = self.encoder.norm(x)
                found |= {f"cls_block{number}": tokens[:, 0], f"mean_block{number}": tokens[:, 1:].mean(dim=1)}
        latent = self.encoder.norm(x)  # [N, 1 + L, D]
        found |= {"cls": latent[:, 0], "mean": latent[:, 1:].mean(dim=1)}
        if self.mae is not None:
            found["context"] = self.context(latent)
        return {name: found[name] for name in self.widths}

    def context(self, latent: torch.Tensor) -> torch.Tensor:
        """[N, 1 + L, D] tokens after the final norm -> [N, D_t] of unit length."""
        head, decoded = self.mae.distill_head, None
        if head.context == "decoder":
            ids_restore = torch.arange(latent.shape[1] - 1, device=latent.device).expand(len(latent), -1)
            _, decoded = self.mae.forward_decoder(latent, ids_restore)
        return F.normalize(head.proj(head.pool(latent, decoded)).float(), dim=1)


class SearchReadOuts:
    """All read-outs beside each other, with the interface of a TransReID model without side information."""

    def __init__(self, read_outs: ReadOuts):
        self.base, self.read_outs = read_outs.encoder, read_outs
        ends = torch.tensor(list(read_outs.widths.values())).cumsum(0).tolist()
        self.columns = {name: slice(a, b) for name, a, b in zip(read_outs.widths, [0, *ends], ends)}
        self.feature_dim = ends[-1]

    def side_ids(self, camids, viewids, device) -> tuple[None, None]:
        return None, None

    def encode(self, imgs: torch.Tensor, camids=None, viewids=None) -> torch.Tensor:
        """[N, 3, H, W] -> [N, sum of the widths] float32; `columns` says where each read-out is."""
        return torch.cat([values.float() for values in self.read_outs.encode(imgs).values()], dim=1)


def load_read_outs(
    file: str | Path, wanted: tuple[str, ...], img_size: tuple[int, int] | None, device: torch.device | str
) -> tuple[ReadOuts, str]:
    """The encoder of any file that `load_encoder` reads, in eval mode, and what was loaded."""
    encoder = load_encoder(file, img_size, device)
    mae, report = None, encoder.report
    if "context" in wanted:
        mae = load_context(file, encoder.img_size)
        report += f"\n  context head: {mae.distill_head.context}, of a pre-training checkpoint"
    return ReadOuts(encoder, wanted, mae).to(device).eval(), report


def load_context(file: str | Path, img_size: tuple[int, int]) -> MaskedAutoencoderViT:
    """The model of a pre-training checkpoint, for its context head: without the blocks of its encoder."""
    content = read_checkpoint(file)
    state, args, config = content["model"], content.get("args"), content.get("config", {})
    last = [name for name in state if name.startswith("distill_head.proj.") and name.endswith(".weight")]
    if not last or not args or "model" not in config:
        raise InputError(
            f"--read_out context: {file} has no context head: give checkpoint-last.pth of a main_pretrain.py run with "
            "distillation"
        )
    bank = torch.zeros(1, len(state[max(last)]))  # only its width matters here
    distill = {"context": args["context"], "bank": bank, "tau": 1.0, "hidden": args.get("distill_hidden", 0)}
    mae = MODELS[config["model"]](img_size=img_size, distill=distill)
    load_weights(mae, state, file, needed="all")
    for name, own in mae.state_dict().items():
        if name.startswith(HEAD_KEYS) and (name not in state or state[name].shape != own.shape):
            raise InputError(f"--read_out context: {name} of {file} is for another size; leave --input_size out")
    mae.blocks = nn.ModuleList()  # the latent comes from the encoder that is probed
    return mae
