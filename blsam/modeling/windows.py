"""Windows of a token grid, as pure functions of shapes.

SAM cuts the grid into windows of side `w` from the top left; those at the right and bottom edge may be partial and are
padded there. Global layers use the same windows to choose tokens. Windows are numbered row by row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Region:
    """A rectangle of the grid cut into equal windows: count (down, across) windows of shape (h, w) tokens.

    numbers: the places of its windows when regions follow one another, each row by row.
    """

    rows: slice
    cols: slice
    count: tuple[int, int]
    shape: tuple[int, int]
    numbers: slice

    def windows(self, grid: torch.Tensor) -> torch.Tensor:
        """A view, window by window: [B, H, W, heads, d] -> [B, down, across, heads, h, w, d]."""
        part = grid[:, self.rows, self.cols].unflatten(2, (-1, self.shape[1])).unflatten(1, (-1, self.shape[0]))
        return part.permute(0, 1, 3, 5, 2, 4, 6)


def regions(height: int, width: int, window: int) -> list[Region]:
    """Whole windows, those cut at the right, at the bottom and in the corner; window 0: one region, the grid itself."""
    if not window:
        return [Region(slice(0, height), slice(0, width), (1, 1), (height, width), slice(0, 1))]
    found, start = [], 0
    for rows, h in _spans(height, window):
        for cols, w in _spans(width, window):
            count = ((rows.stop - rows.start) // h, (cols.stop - cols.start) // w)
            found.append(Region(rows, cols, count, (h, w), slice(start, start + count[0] * count[1])))
            start = found[-1].numbers.stop
    return found


def region_order(height: int, width: int, window: int) -> list[int]:
    """The windows' numbers, row by row over the whole grid, in the order in which regions hold them."""
    across = num_windows(height, width, window)[1]
    order = []
    for region in regions(height, width, window):
        top, left = region.rows.start // window, region.cols.start // window
        order += [(top + i) * across + left + j for i in range(region.count[0]) for j in range(region.count[1])]
    return order


def _spans(length: int, window: int) -> list[tuple[slice, int]]:
    """The whole windows along an axis, and what is left, each with its window's length."""
    whole = length // window * window
    spans = [(slice(0, whole), window), (slice(whole, length), length - whole)]
    return [(span, size) for span, size in spans if span.stop > span.start]


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
