"""Train a miniature CLIP on captioned pictures: a stand-in for the real teacher where that cannot be had.

    python -m tools.train_teacher --data_path demo/labels.csv --output teacher

Model and loss are open_clip's own. Writes teacher/MiniCLIP.json and teacher/weights.safetensors (--clip_model and
--clip_pretrained of main_pretrain.py) and teacher/texts.txt, the captions (--text_bank). A teacher that has seen a few
thousand pictures knows nothing else: for real work use a published CLIP.
"""

import argparse
import logging
from pathlib import Path

from util.cli import Parser, run_tool
from util.errors import InputError


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.train_teacher", __doc__)
    add = parser.add_argument
    add("--data_path", required=True, help="table with the columns path, caption and, optionally, split")
    add("--output", required=True, help="folder to write")
    add("--epochs", default=8, type=int, help="passes over the captioned pictures (default 8)")
    add("--batch_size", default=128, type=int, help="pairs per step (default 128)")
    add("--lr", default=1e-3, type=float, help="peak learning rate of AdamW (default 1e-3)")
    add("--seed", default=0, type=int, help="seed of weights, order and crops (default 0)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

import numpy as np
import open_clip
import torch

from datasets.images import Unreadable, boxed, open_rgb
from datasets.tables import iterate_table
from datasets.transforms import CROP_STREAM, crop_resize, random_crop_box, sample_rng
from util.checkpoint import write_safetensors
from util.cli import Progress
from util.dist import pick_device
from util.files import write_atomic, write_json
from util.optim import cosine_lr, set_lr

SIDE = 64  # px
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 24, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def crop(picture, seed: int, epoch: int, index: int) -> torch.Tensor:
    """A large random crop at the teacher's size, [3, H, W] uint8; never flipped: sides are in the texts."""
    box, _ = random_crop_box(sample_rng(seed, epoch, index, CROP_STREAM), *picture.size, min_area=0.6)
    return crop_resize(picture, box, (SIDE, SIDE), flip=False)


def main(args) -> dict:
    device, output = pick_device(args.device), Path(args.output)
    pictures, captions, file = [], [], Path(args.data_path)
    for row in iterate_table(file, ("caption",)):
        if row.get("split", "train") == "train":
            try:
                pictures.append(open_rgb(boxed(file.parent / row["path"], row.get("box"))))
                captions.append(row["caption"])
            except Unreadable as error:
                print(f"unreadable, left out: {row['path']}: {error}")
    if len(pictures) < args.batch_size:
        raise InputError(f"--batch_size {args.batch_size}: {args.data_path} has {len(pictures)} readable pairs")
    config = output / "MiniCLIP.json"
    write_json(config, CONFIG)
    open_clip.add_model_config(config)
    torch.manual_seed(args.seed)
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random: they are meant to be
    model = open_clip.create_model(config.stem, device=device, output_dict=True).train()
    logging.disable(logging.NOTSET)
    criterion, tokens = open_clip.ClipLoss(), open_clip.get_tokenizer(config.stem)(captions).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(preprocess[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))

    steps, losses = len(pictures) // args.batch_size, []
    progress = Progress("teacher", args.epochs * steps)
    for epoch in range(args.epochs):
        order = np.random.Generator(np.random.Philox(key=[args.seed, epoch])).permutation(len(pictures))
        for step, chosen in enumerate(order[: steps * args.batch_size].reshape(steps, -1)):
            set_lr(optimizer, cosine_lr(epoch + step / steps, args.lr, 0.0, 1.0, args.epochs))
            imgs = torch.stack([crop(pictures[i], args.seed, epoch, int(i)) for i in chosen])
            out = model((imgs.to(device).float() / 255 - mean) / std, tokens[torch.from_numpy(chosen).to(device)])
            loss = criterion(out["image_features"], out["text_features"], out["logit_scale"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.logit_scale.data.clamp_(0, np.log(100))
            losses.append(loss.item())
        progress.update((epoch + 1) * steps, f"loss {np.mean(losses[-steps:]):.3f}")
    progress.close()
    write_safetensors(output / "weights.safetensors", model.cpu().state_dict(), {"format": "pt"})
    texts = sorted(set(captions))
    write_atomic(output / "texts.txt", lambda opened: opened.write(("\n".join(texts) + "\n").encode()))
    first, last = (float(np.mean(part)) for part in (losses[:steps], losses[-steps:]))
    return {"pairs": len(pictures), "texts": len(texts), "loss_first_epoch": first, "loss_last_epoch": last}


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
