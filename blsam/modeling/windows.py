"""Windows of a token grid, as pure functions of shapes.

SAM cuts the grid into windows of side `w` from the top left; those at the right and bottom edge may be partial and are
padded there. Global layers use the same windows to choose tokens. Windows are numbered row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    numbers: its windows, row by row, by their numbers in the grid.
    """

    rows: slice
    cols: slice
    count: tuple[int, int]
    shape: tuple[int, int]
    numbers: tuple[int, ...]

    def windows(self, grid: torch.Tensor) -> torch.Tensor:
        """A view, window by window: [B, H, W, ...] -> [down, across, B, h, w, ...]."""
        part = grid[:, self.rows, self.cols].unflatten(2, (-1, self.shape[1])).unflatten(1, (-1, self.shape[0]))
        return part.permute(1, 3, 0, 2, 4, *range(5, part.dim()))  # [B, down, h, across, w, ...] -> ...

    def filled(self, size: tuple[int, int]) -> Region:
        """The same windows with their padding, (h, w) tokens each, on a grid that holds it."""
        rows, cols = (slice(s.start, s.start + n * k) for s, n, k in zip((self.rows, self.cols), self.count, size))
        return replace(self, rows=rows, cols=cols, shape=size)


def regions(height: int, width: int, window: int) -> list[Region]:
    """Whole windows, those cut at the right, at the bottom and in the corner; window 0: one region, the grid itself."""
    if not window:
        return [Region(slice(0, height), slice(0, width), (1, 1), (height, width), (0,))]
    found, total = [], num_windows(height, width, window)[1]
    for rows, h in _spans(height, window):
        for cols, w in _spans(width, window):
            down, across = (rows.stop - rows.start) // h, (cols.stop - cols.start) // w
            first = rows.start // window * total + cols.start // window
            numbers = tuple(first + i * total + j for i in range(down) for j in range(across))
            found.append(Region(rows, cols, (down, across), (h, w), numbers))
    return found


def merge(pieces: Sequence[torch.Tensor], places: Sequence[Region]) -> torch.Tensor:
    """The grid whose windows these are: [down, across, B, h, w, ...] of every region -> [B, H, W, ...]."""
    like, last = pieces[0], places[-1]
    if not exporting():  # every value is copied once
        grid = like.new_empty(like.shape[2], last.rows.stop, last.cols.stop, *like.shape[5:])
        for piece, region in zip(pieces, places):
            region.windows(grid).copy_(piece)
        return grid
    bands: dict[int, list[torch.Tensor]] = {}
    for piece, region in zip(pieces, places):
        # [down, across, B, h, w, ...] -> [B, down, h, across, w, ...] -> [B, down*h, across*w, ...]
        part = piece.permute(2, 0, 3, 1, 4, *range(5, piece.dim())).flatten(3, 4).flatten(1, 2)
        bands.setdefault(region.rows.start, []).append(part)
    return torch.cat([torch.cat(band, dim=2) for band in bands.values()], dim=1)


def exporting() -> bool:
    """Whether this pass is being written down for another runtime (torch.export, torch.onnx, torch.jit.trace).

    Such graphs hold no writes into views and no scatter: runtimes run them badly or refuse them.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _spans(length: int, window: int) -> list[tuple[slice, int]]:
    """The whole windows along an axis, and what is left, each with its window's length."""
    whole = length // window * window
    spans = [(slice(0, whole), window), (slice(whole, length), length - whole)]
    return [(span, size) for span, size in spans if span.stop > span.start]


def unpadded_sizes(x: torch.Tensor) -> list[tuple[int, int]]:
    """(h, w) in pixels of what is left of each image [B, C, S, S] without the rows and columns of zeros at its end.

    SAM pads with zeros after normalisation, which no photo of integers has. An image of zeros counts as a whole one.
    """
    something = (x.detach() != 0).any(1)  # [B, S, S]
    sizes = []
    for along, length in ((2, x.shape[2]), (1, x.shape[3])):
        places = torch.arange(1, length + 1, device=x.device)
        sizes.append((something.any(along) * places).amax(1).tolist())
    return [(h, w) if h else (x.shape[2], x.shape[3]) for h, w in zip(*sizes)]


def real_counts(height: int, width: int, window: int, true_size: tuple[int, int]) -> list[int]:
    """Tokens of each window that are not wholly in the image's padding; `true_size` is (h, w) in pixels."""
    down, across = num_windows(height, width, window)
    real_h = min(height, math.ceil(true_size[0] / PATCH))
    real_w = min(width, math.ceil(true_size[1] / PATCH))
    rows = [min(window, max(0, real_h - i * window)) for i in range(down)]
    cols = [min(window, max(0, real_w - j * window)) for j in range(across)]
    return [r * c for r in rows for c in cols]


def real_tokens(height: int, width: int, true_sizes: torch.Tensor, patch: int = PATCH) -> torch.Tensor:
    """[B, H, W] bool: the tokens, or cells of an embedding of another `patch` size, that are not wholly in the padding,
    from int [B, 2] sizes (h, w) in pixels."""
    real = (true_sizes + patch - 1) // patch
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
