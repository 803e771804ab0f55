"""What a downstream task is: read a set, build a model, train it, score it, show it."""

import importlib
import json
import math
from pathlib import Path

import torch
from torch.utils.data import Sampler

from datasets.samplers import epoch_batches
from engine_finetune import predict
from util.dist import is_main_process, wait_for_main
from util.files import write_atomic
from util.optim import transreid_lr
from util.precision import scoring


class Task:
    """A task on a set. finetune/reid.py has `Reid`, and so on; `finetune.encoder` calls, in this order:

        read(config)                 the set, with `name`, `notes`, and to train `train` and `sha256()`; to score
                                     a model (config: what built it, else None) numbered as that knows it
        describe(encoder)            plain values that `model_from` needs besides the encoder
        model_from(encoder, config)  the model, static; its `base` is the encoder
        prepare()                    what only training needs of the model
        items()                      training images: a Dataset; `order()` says which make up a batch

    The loop calls `loss(model or its DDP wrapper, batch on the device)` -> terms, scalars; "loss" is descended;
    and `lr(fractional epoch, factor of the peak)`. `evaluate` calls:

        answers(is_over)             what the model says of all test images, on rank 0
        score(found, is_over)        numbers by name, lines to print, and `path<tab>reason` of what is unreadable
        report(found, numbers, folder, facts)      pages; returns their files

    kind: of its models, in their files. shown: terms that a log line shows. config: builds the model again.
    """

    kind = ""
    shown: tuple[str, ...] = ("accuracy",)

    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        self.data = self.model = self.batches = self.dataset = self.optimizer = None
        self.config, self.header = {}, []

    def order(self) -> Sampler:
        return epoch_batches(len(self.data.train), self.args.batch_size, self.args.seed)

    def prepare(self) -> None:
        pass

    def facts(self) -> dict:
        """What a continued run must share."""
        return {"images": len(self.data.train), "images_sha": self.data.sha256()}

    def lr(self, epoch: float, peak: float = 1.0) -> float:
        """TransReID's learning rate, constant within an epoch; peak: factor of the highest, not of first and last."""
        args = self.args
        first, last = args.lr * args.warmup_lr_ratio, args.lr * args.min_lr_ratio
        return transreid_lr(math.floor(epoch) + 1, peak * args.lr, first, last, args.warmup_epochs, args.epochs)

    def data_lines(self) -> list[str]:
        return [f"data: {self.args.data_path} as {self.data.name}", *(f"  {note}" for note in self.data.notes)]

    def epoch_line(self) -> str:
        return f"  an epoch: {self.batches.batches_per_epoch} updates of {self.args.global_batch} images"

    def model_line(self) -> str:
        """What numbers of different settings must not be compared without."""
        return self.kind

    def predict(self, encode, images, title: str = "test images"):
        args = self.args
        return predict(encode, images, self.device, title, batch_size=args.batch_size, num_workers=args.num_workers)

    def evaluate(self, is_over: bool = True) -> dict:
        """All test images in float32 without TF32: numbers on rank 0, printed beside their protocol; the page once
        training `is_over`. Afterwards all ranks wait for rank 0."""
        args, folder = self.args, Path(self.args.output_dir)
        try:
            with scoring(self.model):
                found = self.answers(is_over)
                if not is_main_process():
                    return {}
                numbers, lines, unreadable = self.score(found, is_over)
                write_unreadable(unreadable, folder)
                print("\n".join(lines), flush=True)
                weights = (args.resume or args.finetune) if args.eval else folder / "model.pth"
                facts = {"set": args.data_path, "weights": weights, "seed": args.seed}
                if args.before and is_over:
                    facts["before and after"] = before_and_after(args.before, numbers)
                    print(facts["before and after"])
                if args.report and is_over:
                    for file in self.report(found, numbers, folder, facts):
                        print(f"report: {file}")
                return numbers
        finally:
            wait_for_main()


def before_and_after(file: str, numbers: dict) -> str:
    """The first three numbers that an earlier metrics.json has too, in percent."""
    earlier = json.loads(Path(file).read_text())
    shared = [name for name, value in numbers.items() if isinstance(value, float) and name in earlier][:3]
    return ", ".join(f"{name} {100 * earlier[name]:.1f} before, {100 * numbers[name]:.1f} after" for name in shared)


def write_unreadable(names: list[str], folder: Path) -> None:
    """Count the test images that could not be read and list them in a file; nothing where there are none."""
    if names:
        file, lines = folder / "unreadable_test_images.txt", sorted(set(names))
        write_atomic(file, lambda opened: opened.write("".join(f"{line}\n" for line in lines).encode()))
        print(f"{len(lines)} test images cannot be read: {file} lists them")


def task_class(name: str) -> type[Task]:
    """`Reid` of finetune/reid.py, and so on."""
    return getattr(importlib.import_module(f"{__package__}.{name}"), name.capitalize())
