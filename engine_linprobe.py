"""What can be read out of a frozen encoder, and MAE's linear probe of it (He et al., 2022, Appendix A.1): one linear
layer on frozen features, trained by LARS.

All heads (read-outs x label columns) are trained side by side, so that each image passes the encoder once.
Letters: N batch, L patches without class token, D width, D_t teacher width.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.items import PretrainDataset, build_loader
from datasets.samplers import EpochBatches
from models_mae import MODELS, MaskedAutoencoderViT
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import HEAD_KEYS, load_weights, read_checkpoint
from util.cli import Progress
from util.dist import init_worker
from util.errors import InputError
from util.optim import LARS, cosine_lr, set_lr

Batches = Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]  # (numbers of the images [B], {read-out: [B, D]})


class ReadOuts(nn.Module):
    """Names and features of one unmasked pass.

    `cls`, `mean`: class token and mean of the patch tokens after the final norm.
    `context`: what pre-training compared with the teacher, the global context of all patches, projected to D_t.
    `layers`: `cls_block1`, `mean_block1` ... the same of the output of every block, each through the final norm, so
    that the last ones equal `cls` and `mean`.
    """

    def __init__(self, encoder: VisionTransformer, wanted: Sequence[str], mae: MaskedAutoencoderViT | None = None):
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
        ends = np.cumsum([0, *read_outs.widths.values()]).tolist()
        self.columns = {name: slice(*ends[i : i + 2]) for i, name in enumerate(read_outs.widths)}

    def side_ids(self, camids, viewids, device) -> tuple[None, None]:
        return None, None

    def encode(self, imgs: torch.Tensor, camids=None, viewids=None) -> torch.Tensor:
        """[N, 3, H, W] -> [N, sum of the widths] float32; `columns` says where each read-out is."""
        return torch.cat([values.float() for values in self.read_outs.encode(imgs).values()], dim=1)


def load_read_outs(file: str | Path, wanted: Sequence[str], img_size, device) -> tuple[ReadOuts, str]:
    """The encoder of any file that `load_encoder` reads, in eval mode, and what was loaded; img_size: (H, W), None: the
    file's. `context` needs a pre-training checkpoint, of whose model the head is taken, and the decoder."""
    encoder = load_encoder(file, img_size, device)
    if "context" not in wanted:
        return ReadOuts(encoder, wanted).to(device).eval(), encoder.report
    content = read_checkpoint(file)
    state, args, config = content["model"], content.get("args"), content.get("config", {})
    last = [name for name in state if name.startswith("distill_head.proj.") and name.endswith(".weight")]
    if not last or not args or "model" not in config:
        cure = "give checkpoint-last.pth of a main_pretrain.py run with distillation"
        raise InputError(f"--read_out context: {file} has no context head: {cure}")
    bank = torch.zeros(1, len(state[max(last)]))  # only its width matters here
    distill = {"context": args["context"], "bank": bank, "tau": 1.0, "hidden": args.get("distill_hidden", 0)}
    mae = MODELS[config["model"]](img_size=encoder.img_size, distill=distill)
    load_weights(mae, state, file, needed="all")
    for name, own in mae.state_dict().items():
        if name.startswith(HEAD_KEYS) and (name not in state or state[name].shape != own.shape):
            raise InputError(f"--read_out context: {name} of {file} is for another size; leave --input_size out")
    mae.blocks = nn.ModuleList()  # the latent comes from the encoder that is probed
    report = f"{encoder.report}\n  context head: {mae.distill_head.context}, of a pre-training checkpoint"
    return ReadOuts(encoder, wanted, mae).to(device).eval(), report


def stored_batches(epoch: int, order: EpochBatches, rows: np.ndarray, features: dict[str, torch.Tensor]) -> Batches:
    """The updates of an epoch on images `rows` [m] int64, of features [n, D] that were extracted once."""
    for step in range(order.batches_per_epoch):
        chosen = rows[order.global_batch(epoch, step)]
        at = torch.from_numpy(chosen).to(next(iter(features.values())).device)
        yield chosen, {name: values[at] for name, values in features.items()}


@torch.no_grad()
def crop_batches(
    epoch: int, order: EpochBatches, rows: np.ndarray, images: PretrainDataset, read_outs: ReadOuts,
    *, batch_size: int, num_workers: int,
) -> Batches:  # fmt: skip
    """The updates of an epoch, of random resized crops that pass the frozen encoder, `batch_size` at a time. A crop is
    a function of (seed, epoch, place among `rows` [m] int64); `images` holds these alone."""
    device = next(read_outs.parameters()).device
    steps = [order.global_batch(epoch, step) for step in range(order.batches_per_epoch)]
    cuts = [np.split(places, range(batch_size, len(places), batch_size)) for places in steps]
    pieces = [[(epoch, place) for place in part.tolist()] for parts in cuts for part in parts]
    loader = iter(build_loader(images, pieces, num_workers, device.type == "cuda", init_worker))
    for places, parts in zip(steps, cuts):
        found = []
        for batch in islice(loader, len(parts)):
            if problem := next(filter(None, batch["problem"]), ""):
                raise InputError(f"an image was readable and is no longer: {problem}")
            features = read_outs.encode(batch["imgs"].to(device, non_blocking=True))
            # contiguous: a class token is a view that would keep the tokens of all patches in memory
            found.append({name: values.float().contiguous() for name, values in features.items()})
        yield rows[places], {name: torch.cat([part[name] for part in found]) for name in found[0]}


def build_head(width: int, num_classes: int, seed: int) -> nn.Sequential:
    """BatchNorm without scale and shift, and a linear layer: weights normal with deviation 0.01, biases 0. Statistics
    for testing are the plain mean over all updates: a moving average as in MAE needs many."""
    linear = nn.Linear(width, num_classes)
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, momentum=None, affine=False), linear)


def train_heads(
    batches: Callable[[int], Batches], order: EpochBatches, widths: dict[str, int],
    labels: dict[str, tuple[torch.Tensor, int]], args, device: torch.device,
) -> dict[tuple[str, str], nn.Sequential]:  # fmt: skip
    """Train one head for every (read-out, label column), in float32; they come back in eval mode.

    MAE's recipe, Table 9: lr = blr x batch / 256, linear warm-up, a cosine to 0; no weight decay, momentum 0.9.

    Args:
        batches: epoch -> its updates, in the order of `order`.
        widths: {read-out: D}. labels: {column: ([n] int64 on the CPU, -1 for images to leave out, classes)}.
        args: blr, epochs, warmup_epochs, seed.
    """
    pairs = [(name, column) for name in widths for column in labels]
    heads = {(name, of): build_head(widths[name], labels[of][1], args.seed).to(device) for name, of in pairs}
    optimizer = LARS([weight for head in heads.values() for weight in head.parameters()])
    lr, progress = args.blr * order.batch_size / 256, Progress("linear probe, epochs", args.epochs)
    for epoch in range(args.epochs):
        for step, (rows, features) in enumerate(batches(epoch)):
            now = epoch + step / order.batches_per_epoch
            set_lr(optimizer, cosine_lr(now, lr, 0.0, args.warmup_epochs, args.epochs))
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            for (name, column), head in heads.items():
                target = labels[column][0][rows]
                known = target >= 0
                if known.sum() > 1:  # what BatchNorm needs
                    loss = F.cross_entropy(head(features[name][known.to(device)]), target[known].to(device))
                    loss.backward()  # head by head: only one graph is held
                    total += loss.detach()
            optimizer.step()
        mean = (total / len(heads)).item()
        if not np.isfinite(mean):
            raise InputError(f"the probe's loss is {mean} in epoch {epoch}: lower --blr {args.blr:g}")
        progress.update(epoch + 1, f"loss {mean:.4f}" if (epoch + 1) % 10 == 0 else "")
    progress.close()
    return {key: head.eval().requires_grad_(False) for key, head in heads.items()}
