"""Train a miniature CLIP on captioned pictures: a stand-in for the real teacher where that cannot be had.

    python -m tools.train_teacher --data_path demo/labels.csv --output teacher

Model and loss are open_clip's own. Writes teacher/MiniCLIP.json, teacher/weights.safetensors (pass them
as --clip_model and --clip_pretrained) and teacher/texts.txt, the captions it has learned from (pass it as
--text_bank). A teacher that has seen a few thousand pictures knows nothing else: for real work use a
published CLIP.
"""

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import open_clip
import torch

from datasets.images import UNREADABLE, open_rgb
from datasets.manifest import read_manifest
from datasets.path_list import PathList
from datasets.transforms import CROP_STREAM, crop_resize, random_crop_box, sample_rng
from util.checkpoint import write_safetensors
from util.cli import Parser, run_tool
from util.dist import pick_device
from util.errors import InputError
from util.files import write_atomic, write_json
from util.optim import cosine_lr, set_lr
from util.progress import Progress

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 24, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.train_teacher", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--data_path", required=True, help="table with columns path, captions and, optionally, split")
    add("--caption_column", default="caption", help="column of the captions (default caption)")
    add("--output", required=True, help="folder to write")
    add("--epochs", default=8, type=int, help="passes over the captioned pictures (default 8)")
    add("--batch_size", default=128, type=int, help="pairs per step (default 128)")
    add("--lr", default=1e-3, type=float, help="peak learning rate of AdamW (default 1e-3)")
    add("--seed", default=0, type=int, help="seed of weights, order and crops (default 0)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    # fmt: on
    return parser


def read_pairs(file: Path, column: str) -> tuple[list, list[str]]:
    """-> (RGB pictures, captions) of the training rows; unreadable pictures are named and left out."""
    rows = read_manifest(file)
    if column not in rows[0]:
        raise InputError(f"{file} has no column '{column}' (--caption_column): it has {', '.join(rows[0])}")
    rows = [row for row in rows if row.get("split", "train") == "train"]
    paths = PathList(file.parent, [row["path"] for row in rows])
    pictures, captions = [], []
    for index, row in enumerate(rows):
        try:
            pictures.append(open_rgb(paths[index]))
            captions.append(row[column])
        except UNREADABLE as error:
            print(f"unreadable, left out: {paths[index]}: {error}")
    return pictures, captions


def main(args) -> dict:
    device = pick_device(args.device)
    output = Path(args.output)
    config = output / "MiniCLIP.json"
    write_json(config, CONFIG)
    open_clip.add_model_config(config)
    torch.manual_seed(args.seed)
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random: they are meant to be
    model = open_clip.create_model(config.stem, device=device, output_dict=True)
    logging.disable(logging.NOTSET)
    tokenizer = open_clip.get_tokenizer(config.stem)
    criterion = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)

    pictures, captions = read_pairs(Path(args.data_path), args.caption_column)
    if len(pictures) < args.batch_size:
        raise InputError(
            f"{args.data_path} has {len(pictures)} readable training pairs: lower --batch_size "
            f"{args.batch_size} to at most that"
        )
    tokens = tokenizer(captions).to(device)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    mean = torch.tensor(preprocess["mean"], device=device).view(1, 3, 1, 1)
    std = torch.tensor(preprocess["std"], device=device).view(1, 3, 1, 1)
    steps = len(pictures) // args.batch_size
    progress = Progress("teacher", args.epochs * steps)
    started, losses, hits = time.perf_counter(), [], []
    model.train()
    for epoch in range(args.epochs):
        order = np.random.Generator(np.random.Philox(key=[args.seed, epoch])).permutation(len(pictures))
        for step in range(steps):
            chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
            imgs = torch.stack([crop(pictures[i], args.seed, epoch, i) for i in chosen])
            set_lr(optimizer, cosine_lr(epoch + step / steps, args.lr, 0.0, 1.0, args.epochs))
            x = (imgs.to(device).float() / 255 - mean) / std
            out = model(x, tokens[torch.from_numpy(chosen).to(device)])
            features, texts, scale = out["image_features"], out["text_features"], out["logit_scale"]
            loss = criterion(features, texts, scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
                match = (features @ texts.T).argmax(dim=1) == torch.arange(len(chosen), device=device)
            losses.append(loss.item())
            hits.append(match.float().mean().item())
            if (step + 1) % 10 == 0 or step + 1 == steps:
                progress.update(epoch * steps + step + 1, f"loss {losses[-1]:.3f}")
    progress.close()
    state = {k: v.detach().cpu() for k, v in model.eval().state_dict().items()}
    write_safetensors(output / "weights.safetensors", state, {"format": "pt"})
    texts_file = "\n".join(sorted(set(captions))) + "\n"
    write_atomic(output / "texts.txt", lambda opened: opened.write(texts_file.encode()))
    return {
        "pairs": len(pictures),
        "texts": len(set(captions)),
        "loss_first_epoch": float(np.mean(losses[:steps])),
        "loss_last_epoch": float(np.mean(losses[-steps:])),
        "retrieval_in_batch": float(np.mean(hits[-steps:])),
        "seconds": time.perf_counter() - started,
    }


def crop(picture, seed: int, epoch: int, index: int) -> torch.Tensor:
    """A large random crop at the teacher's size, [3, H, W] uint8; never flipped: sides are in the texts."""
    rng = sample_rng(seed, epoch, int(index), CROP_STREAM)
    box, _ = random_crop_box(rng, *picture.size, min_area=0.6)
    size = CONFIG["vision_cfg"]["image_size"]
    return crop_resize(picture, box, (size, size), flip=False)


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
