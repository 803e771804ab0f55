"""Images of fine-grained classes as training and test see them (TransFG's recipe for StanfordCars)."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import AutoAugment

from datasets.fgvc import FgvcImages
from datasets.images import open_reduced
from datasets.path_list import PathList
from datasets.train_items import TrainItems
from datasets.transforms import jpeg_reduction, whole_image
from engine_extract import WholeImages


@dataclass(frozen=True)
class CropFlipAugment:
    """The whole picture to `resize`, a random crop of `size`, perhaps mirrored; then AutoAugment's policy of
    ImageNet (Cubuk et al., 2019, arXiv 1805.09501).

    size, resize: (H, W) in px. flip: chance of mirroring. auto_augment: whether the policy is applied.
    """

    size: tuple[int, int]
    resize: tuple[int, int]
    flip: float = 0.5
    auto_augment: bool = True

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """An RGB picture -> [3, H, W] uint8, a function of the picture and of `rng`."""
        imgs = whole_image(image, self.resize)
        (height, width), (rows, columns) = self.size, self.resize
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        imgs = imgs[:, top : top + height, left : left + width]
        if rng.random() < self.flip:
            imgs = imgs.flip(2)
        return auto_augment(imgs, rng) if self.auto_augment else imgs.contiguous()


def auto_augment(imgs: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """One of AutoAugment's 25 sub-policies for ImageNet on [3, H, W] uint8, chosen by `rng`: torchvision
    draws from torch's global generator, which is set for this image and put back."""
    picture = Image.fromarray(imgs.permute(1, 2, 0).numpy())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(1 << 62)))
        picture = AutoAugment(fill=[128, 128, 128])(picture)  # grey, as the policy's authors have it
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


class FgvcTrainImages(TrainItems):
    """Training images: `imgs` [3, H, W] uint8, `labels` int64 scalar."""

    def __init__(self, images: FgvcImages, augment: CropFlipAugment, seed: int):
        super().__init__(len(images), seed)
        self.images, self.augment, self.paths = images, augment, images.paths

    def read(self, index: int) -> Image.Image:
        def reduction(width: int, height: int) -> int:
            return jpeg_reduction((0, 0, width, height), self.augment.resize)

        return open_reduced(self.paths[index], reduction)[0]

    def sample(self, content: Image.Image, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"imgs": self.augment(content, rng), "labels": torch.tensor(self.images.labels[index])}

    def relative(self, index: int) -> str:
        return self.paths.relative(index)

    def blank(self) -> Image.Image:
        return Image.new("RGB", self.augment.resize[::-1], "grey")


class CenterCrops(WholeImages):
    """Test images, all of a list: the whole picture to `resize`, its centre of `size`, both (H, W) in px."""

    def __init__(self, paths: PathList, size: tuple[int, int], resize: tuple[int, int]):
        super().__init__(paths, np.arange(len(paths)), resize)
        self.crop = size

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int, str]:
        """([3, H, W] uint8, number in the list, '' or why the picture is black)."""
        imgs, index, problem = super().__getitem__(item)
        (height, width), (rows, columns) = self.crop, self.size
        top, left = (rows - height) // 2, (columns - width) // 2
        return imgs[:, top : top + height, left : left + width].contiguous(), index, problem
