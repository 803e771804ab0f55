"""Fixed 2-D sine-cosine position table of MAE, for square and rectangular grids."""

import numpy as np
import torch
import torch.nn.functional as F


def sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int]) -> torch.Tensor:
    """Position table with a zero row for the class token (MAE, Sec. 3; Vaswani et al., Sec. 3.5).

    The first half of the channels encodes the *column*, the second half the *row*; each half is
    [sin(pos * w), cos(pos * w)] with w_k = 10000^(-k / (embed_dim / 4)). Tokens are row-major.

    Args:
        embed_dim: D, a multiple of 4. grid_size: (rows, columns) of patches.
    Returns:
        [1 + rows * columns, D] float32; computed in float64.
    """
    (rows, columns), quarter = grid_size, embed_dim // 4
    omega = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    column_angle = np.tile(np.arange(columns), rows)[:, None] * omega  # [L, D/4]
    row_angle = np.repeat(np.arange(rows), columns)[:, None] * omega  # [L, D/4]
    table = np.concatenate([np.sin(column_angle), np.cos(column_angle), np.sin(row_angle), np.cos(row_angle)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, embed_dim)), table])).float()


def resize_pos_embed(pos_embed: torch.Tensor, old_grid: tuple, new_grid: tuple, mode: str = "bicubic") -> torch.Tensor:
    """Position table [1, 1 + L, D] of `old_grid` (rows, columns) for another one; class row untouched.

    mode: bicubic as in MAE's fine-tuning, or bilinear as in TransReID.
    """
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    grid = F.interpolate(grid.float(), tuple(new_grid), mode=mode, align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
