"""load_encoder and embed_images beside timm's own ViT with the same weights and transforms, in one run.

    python -m tools.benchmark_embed --data_path PHOTOS                             # ViT-B/16, random weights
    python -m tools.benchmark_embed --data_path PHOTOS --checkpoint encoder.pth --count 1000

Each turn is what a user would do: load the file, open the photos, resize the whole picture to the encoder's
size by a bicubic filter, normalise, embed in float32. timm loads what `tools.checkpoint convert` writes with
its own loader; its pictures go through torchvision's Resize, ToTensor and Normalize. The two take turns;
medians. Features are compared: they differ by the rounding of resized pixels alone.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from torchvision import transforms

from checkpoints.peer_files import timm_model
from checkpoints.peers import convert
from datasets.manifest import list_images
from finetune.encoder import encoder_models
from models_vit import VisionTransformer, load_encoder
from util.checkpoint import write_torch
from util.cli import Parser, parse_input_size, run_tool
from util.dist import pick_device
from util.errors import InputError
from util.fetch import fetch


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("tools.benchmark_embed", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--data_path", required=True, help="folder or manifest of photos")
    add("--count", default=1000, type=int, help="photos of it, from the first (default 1000)")
    add("--checkpoint", default="", help="encoder (default: random weights of --model)")
    add("--model", default="vit_base_patch16", choices=list(encoder_models()), metavar="NAME",
        help="without --checkpoint (default vit_base_patch16)")
    add("--input_size", default="224", help="pixels without --checkpoint: one side, or H,W (default 224)")
    add("--batch_size", default=64, type=int, help="photos at a time (default 64)")
    add("--rounds", default=3, type=int, help="turns of each (default 3)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--output", default="benchmark_embed.json", help="file (default benchmark_embed.json)")
    # fmt: on
    return parser


def embed_with_timm(file: Path, like: VisionTransformer, photos: list[str], batch_size: int, device):
    """Class tokens [N, D] after the final norm, as timm's documentation shows it."""
    name, more = timm_model(like.settings())
    model = timm.create_model(name, num_classes=0, checkpoint_path=str(file), **more)
    model = model.to(device).eval()
    transform = transforms.Compose(
        [
            transforms.Resize(like.img_size, transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(like.pixel_mean.flatten(), like.pixel_std.flatten()),
        ]
    )
    found = []
    with torch.inference_mode():
        for start in range(0, len(photos), batch_size):
            part = photos[start : start + batch_size]
            batch = torch.stack([transform(Image.open(photo).convert("RGB")) for photo in part])
            found.append(model.forward_features(batch.to(device))[:, 0].cpu())
    return torch.cat(found)


def main(args) -> dict:
    if min(args.rounds, args.count, args.batch_size) < 1:
        raise InputError("--rounds, --count and --batch_size must be at least 1")
    device = pick_device(args.device)
    paths = list_images(args.data_path)
    photos = [str(paths[i]) for i in range(min(args.count, len(paths)))]
    with tempfile.TemporaryDirectory() as folder:
        if args.checkpoint:
            file = fetch(args.checkpoint)
        else:
            file = Path(folder) / "random.pth"
            width, depth, heads, patch = encoder_models()[args.model]
            torch.manual_seed(0)
            random = VisionTransformer(parse_input_size(args.input_size), patch, width, depth, heads)
            write_torch(file, {"model": random.state_dict()})
        theirs_file = Path(folder) / "timm.pth"
        convert(file, "timm", theirs_file)
        like = load_encoder(file)
        seconds: dict[str, list[float]] = {"ours": [], "timm": []}
        for _ in range(args.rounds):
            started = time.perf_counter()
            ours = load_encoder(file, device=device).embed_images(photos, args.batch_size, ("cls", "mean"))["cls"]
            seconds["ours"].append(time.perf_counter() - started)
            started = time.perf_counter()
            theirs = embed_with_timm(theirs_file, like, photos, args.batch_size, device)
            seconds["timm"].append(time.perf_counter() - started)
    difference = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max().item()
    rates = {f"{name}_images_per_s": len(photos) / statistics.median(took) for name, took in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["timm"])]
    return {
        "photos": len(photos),
        "encoder": f"{like.embed_dim} wide, {like.img_size[0]} x {like.img_size[1]} px",
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        **rates,
        "times_timm": statistics.median(ratios),
        "largest_difference": difference,
    }


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()
    run_tool(main, ARGS, Path(ARGS.output))
