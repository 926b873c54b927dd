"""Shapes of windows, by hand."""

import torch

from blsam.modeling import windows as win
from blsam.modeling.routing import keep_count


def test_partition_of_a_4x4_grid():
    grid = torch.arange(16).view(1, 4, 4)
    assert win.partition(grid, 3, fill=-1)[0].tolist() == [
        [0, 1, 2, 4, 5, 6, 8, 9, 10],
        [3, -1, -1, 7, -1, -1, 11, -1, -1],
        [12, 13, 14, -1, -1, -1, -1, -1, -1],
        [15, -1, -1, -1, -1, -1, -1, -1, -1],
    ]
    assert win.window_shapes(4, 4, 3) == [(3, 3), (3, 1), (1, 3), (1, 1)]


def test_sam_at_1024():
    shapes = win.window_shapes(64, 64, 14)
    assert {s: shapes.count(s) for s in set(shapes)} == {(14, 14): 16, (14, 8): 4, (8, 14): 4, (8, 8): 1}
    assert [keep_count(h * w, 0.25) for h, w in ((14, 14), (14, 8), (8, 14), (8, 8))] == [49, 28, 28, 16]


def test_a_4_to_3_photo_leaves_five_windows_empty():
    counts = win.real_counts(64, 64, 14, (768, 1024))
    assert counts.count(0) == 5 and sum(counts) == 48 * 64
    real = win.real_tokens(64, 64, torch.tensor([[768, 1024]]))
    assert win.partition(real.long(), 14).sum(-1)[0].tolist() == counts
