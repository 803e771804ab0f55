"""Time two ways of the same work in turns, in one run: docs/PERFORMANCE.md.

    python -m benchmarks.run step --model mae_vit_base_patch16 --batch_size 16
    python -m benchmarks.run ranking --size veriwild --rounds 1 --against ../before

step: a training step as MAE published it, written from the paper with timm's blocks (explicit attention, all patches
embedded, decoded and predicted), and ours; the same weights, images, noise and optimiser, the losses are compared.
data: the data path of one thread, CPU seconds an image: MAE's transforms by torchvision, ours, ours on a packed set.
ranking: from features to mAP and R1: a sort of the whole distance matrix as in published code, and ours; or after
re-ranking: `ranking --rerank --size veriwild --rounds 0` is the largest published test, once.
kmeans: faiss, where it is installed (pip install faiss-cpu), and ours, on a mixture of Gaussians.
"""

import argparse
from pathlib import Path

from util.cli import Parser, parse_input_size, run_tool
from util.errors import MAE_MODELS

SIZES = {  # queries, gallery, identities, cameras
    "small": (60, 400, 20, 4),
    "middle": (2000, 10_000, 1000, 20),
    "veri": (1678, 11_579, 200, 20),
    "veriwild": (10_000, 128_517, 10_000, 174),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks.run", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str):
        add = verbs.add_parser(name, help=text, description=text).add_argument
        add("--device", default="cpu", help="cpu or cuda (default cpu)")
        add("--rounds", default=5, type=int, help="turns of each variant; 0: the warm-up is timed (default 5)")
        add("--against", default="", metavar="FOLDER", help="another checkout to time beside this one (default none)")
        add("--output", default=f"benchmark_{name}.json", help=f"file of the numbers (default benchmark_{name}.json)")
        return add

    add = verb("step", "a training step")
    add("--model", default="mae_vit_base_patch16", choices=MAE_MODELS, help="(default mae_vit_base_patch16)")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--batch_size", default=16, type=int, help="images a step (default 16)")
    add("--steps", default=1, type=int, help="steps a turn, 20 on a GPU (default 1)")
    add("--precision", default="float32", choices=("float32", "bfloat16"), help="(default float32)")
    add = verb("data", "the data path of one core")
    add("--data_path", required=True, help="folder or manifest, as for main_pretrain.py")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--images", default=512, type=int, help="images a turn, spread over the list (default 512)")
    add = verb("ranking", "scoring re-identification")
    add("--size", default="veri", choices=SIZES, help="published size of a set (default veri)")
    add("--dim", default=768, type=int, help="numbers a feature (default 768)")
    add("--rerank", action="store_true", help="after k-reciprocal re-ranking, ours alone, and its memory (default off)")
    add = verb("kmeans", "k-means")
    add("--points", default=200_000, type=int, help="vectors (default 200000)")
    add("--dim", default=256, type=int, help="numbers a vector (default 256)")
    add("--clusters", default=2000, type=int, help="k (default 2000)")
    add("--iterations", default=10, type=int, help="of Lloyd's algorithm (default 10)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()

import contextlib
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Block
from torch import nn
from torchvision import transforms

from benchmarks import turns
from benchmarks.turns import take_turns, timed
from datasets.path_list import list_images
from models_mae import MODELS, MaskedAutoencoderViT
from models_vit import LayerNorm
from tools import pack
from util.errors import InputError


class PublishedMAE(nn.Module):
    """MAE as published (He et al., 2022), with the weights of ours: nothing is left out, tokens in image order."""

    def __init__(self, ours: MaskedAutoencoderViT):
        super().__init__()
        self.ours = ours  # parameters and pixel statistics
        for blocks in (ours.blocks, ours.decoder_blocks):
            for number, block in enumerate(blocks):
                width, heads = block.attn.qkv.in_features, block.attn.num_heads
                plain = Block(width, heads, qkv_bias=True, norm_layer=LayerNorm)
                plain.load_state_dict(block.state_dict())
                plain.attn.fused_attn = False
                blocks[number] = plain

    def forward(self, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [N, 3, H, W], [N, L] -> {"pixel": loss over removed patches}."""
        m, (N, L) = self.ours, noise.shape
        len_keep = int(L * (1 - mask_ratio))
        imgs = (imgs.float() / 255 - m.pixel_mean) / m.pixel_std
        x = m.patch_embed(imgs) + m.pos_embed[:, 1:]
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        x = torch.gather(x, 1, ids_shuffle[:, :len_keep, None].expand(-1, -1, x.shape[2]))
        mask = (ids_restore >= len_keep).float()
        x = torch.cat([(m.cls_token + m.pos_embed[:, :1]).expand(N, -1, -1), x], dim=1)
        for block in m.blocks:
            x = block(x)
        x = m.decoder_embed(m.norm(x))
        x_ = torch.cat([x[:, 1:], m.mask_token.to(x.dtype).expand(N, L - len_keep, -1)], dim=1)
        x_ = torch.gather(x_, 1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], x_], dim=1) + m.decoder_pos_embed
        for block in m.decoder_blocks:
            x = block(x)
        pred = m.decoder_pred(m.decoder_norm(x))[:, 1:].float()
        target = m.patchify(imgs)
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
        loss = F.mse_loss(pred, target, reduction="none").mean(dim=-1)
        return {"pixel": (loss * mask).sum() / mask.sum()}


def time_step(args) -> dict:
    size = parse_input_size(args.input_size)
    torch.manual_seed(0)
    reference = PublishedMAE(MODELS[args.model](img_size=size, norm_pix_loss=True))
    work = vars(args) | {"input_size": size, "patches": reference.ours.num_patches}
    result = take_turns({"mae": turns.train(reference, work)}, turns.pretrain_step, work, args)
    losses = [row["loss"] for row in result["rows"].values()]
    if max(losses) - min(losses) > (1e-4 if args.precision == "float32" else 2e-2) * losses[0]:
        raise InputError(f"the losses differ ({losses}), so there is nothing to compare")
    return result


def time_data(args) -> dict:
    paths, size = list_images(args.data_path), parse_input_size(args.input_size)
    order = np.linspace(0, len(paths), min(args.images, len(paths)), endpoint=False).astype(int)
    files = [Path(paths[i]).resolve() for i in order]
    crop = transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])
    with tempfile.TemporaryDirectory() as folder:
        listed, packed = f"{folder}/list.txt", f"{folder}/packed"
        Path(listed).write_text("\n".join(map(str, files)))
        pack.main(pack.get_args_parser().parse_args(["--data_path", listed, "--output", packed]))
        work = vars(args) | {"data_path": listed, "input_size": size, "images": len(files)}
        mae = timed(lambda: [transform(Image.open(file).convert("RGB")) for file in files], count=len(files), cpu=True)
        variants = {"mae": mae, "packed": turns.read_images(work | {"data_path": packed})}
        return take_turns(variants, turns.read_images, work, args) | {"data_path": args.data_path}


def by_sorting(case: tuple) -> dict[str, float]:
    """mAP and R1 by the steps of TransReID's code: all distances, every row sorted, junk out query by query."""
    query, gallery, q_pids, g_pids, q_camids, g_camids = case
    q, g = F.normalize(query, dim=1), F.normalize(gallery, dim=1)
    squared = q.square().sum(dim=1, keepdim=True) + g.square().sum(dim=1)
    indices = np.argsort(squared.addmm_(q, g.t(), beta=1, alpha=-2).numpy(), axis=1)
    matches = (g_pids[indices] == q_pids[:, None]).astype(np.int32)
    aps, first = [], []
    for i, found in enumerate(matches):
        found = found[(found == 0) | (g_camids[indices[i]] != q_camids[i])]
        if found.any():
            hits = found.cumsum()
            first.append(hits[0])
            aps.append((hits / np.arange(1.0, len(hits) + 1) * found).sum() / found.sum())
    return {"mAP": float(np.mean(aps)), "R1": float(np.mean(first))}


def time_ranking(args) -> dict:
    work = vars(args) | {"sizes": (*SIZES[args.size], args.dim)}
    if args.rerank:
        return take_turns({}, turns.rerank_features, work, args)
    case = turns.make_features(*work["sizes"])
    return take_turns({"sorting": timed(lambda: by_sorting(case), dict)}, turns.rank_features, work, args)


def time_kmeans(args) -> dict:
    x, variants = turns.mixture(vars(args)), {}

    def with_faiss() -> np.ndarray:
        faiss.omp_set_num_threads(torch.get_num_threads())
        found = faiss.Kmeans(args.dim, args.clusters, niter=args.iterations, seed=0, max_points_per_centroid=10**9)
        found.train(x)
        found.assign(x)  # ours ends with the assignment too
        return np.ascontiguousarray(found.centroids)

    with contextlib.suppress(ImportError):
        import faiss

        variants["faiss"] = timed(with_faiss, lambda found: {"inertia": turns.inertia(x, found)})
    return take_turns(variants, turns.cluster, vars(args), args)


def main(args) -> dict:
    return {"step": time_step, "data": time_data, "ranking": time_ranking, "kmeans": time_kmeans}[args.verb](args)


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output))
