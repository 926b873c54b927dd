"""Windows of a token grid, as pure functions of shapes.

SAM cuts the grid into windows of side `w` from the top left; those at the right and bottom edge may be partial and are
padded there. Global layers use the same windows to choose tokens. Windows are numbered row by row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

PATCH = 16  # pixels along a token's side


def num_windows(height: int, width: int, window: int) -> tuple[int, int]:
    """Windows down and across a grid of height x width tokens."""
    return math.ceil(height / window), math.ceil(width / window)


def window_shapes(height: int, width: int, window: int) -> list[tuple[int, int]]:
    """The (rows, columns) of the grid that each window covers; what is missing to w x w is padding."""
    down, across = num_windows(height, width, window)
    rows = [min(window, height - i * window) for i in range(down)]
    cols = [min(window, width - j * window) for j in range(across)]
    return [(r, c) for r in rows for c in cols]


def real_counts(height: int, width: int, window: int, true_size: tuple[int, int]) -> list[int]:
    """Tokens of each window that are not wholly in the image's padding; `true_size` is (h, w) in pixels."""
    down, across = num_windows(height, width, window)
    real_h = min(height, math.ceil(true_size[0] / PATCH))
    real_w = min(width, math.ceil(true_size[1] / PATCH))
    rows = [min(window, max(0, real_h - i * window)) for i in range(down)]
    cols = [min(window, max(0, real_w - j * window)) for j in range(across)]
    return [r * c for r in rows for c in cols]


def real_tokens(height: int, width: int, true_sizes: torch.Tensor) -> torch.Tensor:
    """[B, H, W] bool: the tokens that are not wholly in the padding, from int [B, 2] sizes (h, w) in pixels."""
    real = (true_sizes + PATCH - 1) // PATCH
    rows = torch.arange(height, device=true_sizes.device) < real[:, :1]
    cols = torch.arange(width, device=true_sizes.device) < real[:, 1:]
    return rows[:, :, None] & cols[:, None, :]


def partition(x: torch.Tensor, window: int, fill: float = 0.0) -> torch.Tensor:
    """[B, H, W] -> [B, nW, w*w], missing places of partial windows filled with `fill`."""
    b, height, width = x.shape
    down, across = num_windows(height, width, window)
    x = F.pad(x, (0, across * window - width, 0, down * window - height), value=fill)
    x = x.view(b, down, window, across, window)
    return x.transpose(2, 3).reshape(b, down * across, window * window)  # [B, nH, w, nW, w] -> [B, nH*nW, w*w]


def window_tokens(height: int, width: int, window: int, device: torch.device) -> torch.Tensor:
    """[nW, w*w] int64: which token of the grid (row-major) sits at each place of each window; -1 in padding."""
    grid = torch.arange(height * width, device=device).view(1, height, width)
    return partition(grid, window, fill=-1)[0]
