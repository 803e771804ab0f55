"""Images as an evaluation shows them: whole, nothing random."""

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import UNREADABLE, open_rgb, why_unreadable
from datasets.transforms import whole_image


class WholeImages(Dataset):
    """Item i -> ([3, H, W] uint8 of the whole picture, index, problem: '' or why it is black).

    Args:
        paths: image files by number: a PathList, PackedImages, or anything like them.
        boxes: [len(paths), 4] int32 (left, upper, right, lower) in px to cut out; an empty box is the whole picture.
    """

    def __init__(self, paths, indices: np.ndarray, size: tuple[int, int], boxes: np.ndarray | None = None):
        self.paths, self.indices, self.size, self.boxes = paths, indices, size, boxes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int, str]:
        index = int(self.indices[item])
        try:
            image = open_rgb(self.paths[index])
            if self.boxes is not None and self.boxes[index, 2] > 0:
                image = image.crop(tuple(self.boxes[index].tolist()))
            return whole_image(image, self.size), index, ""
        except UNREADABLE as error:
            return torch.zeros(3, *self.size, dtype=torch.uint8), index, why_unreadable(error)


class CenterCrops(WholeImages):
    """All images of a list: the whole picture to `resize`, its centre of `size`, both (H, W) in px."""

    def __init__(self, paths, size: tuple[int, int], resize: tuple[int, int]):
        super().__init__(paths, np.arange(len(paths)), resize)
        self.crop = size

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int, str]:
        imgs, index, problem = super().__getitem__(item)
        (height, width), (rows, columns) = self.crop, self.size
        top, left = (rows - height) // 2, (columns - width) // 2
        return imgs[:, top : top + height, left : left + width].contiguous(), index, problem
