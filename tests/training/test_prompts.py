"""Clicks in the loop."""

import torch

from blsam.training.prompts import boxes_of, corrective_clicks


def test_corrective_clicks_lie_in_the_error():
    target = torch.zeros(3, 4, 4)
    target[0, 1, 2] = 1  # missed: positive
    logits = torch.full((3, 4, 4), -1.0)
    logits[1, 3, 0] = 1  # extra: negative; the third is right: no point
    points, labels = corrective_clicks(logits, target, torch.Generator().manual_seed(0))
    assert labels[:, 0].tolist() == [1, 0, -1]
    assert points[0, 0].tolist() == [10, 6] and points[1, 0].tolist() == [2, 14]
    points, labels = corrective_clicks(logits, target, torch.Generator().manual_seed(0), pixels=2)
    assert labels[:, 0].tolist() == [1, 0, -1] and points[:2, 0].tolist() == [[5, 3], [1, 7]]


def test_boxes_end_behind_the_last_cell():
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2] = masks[0, 2, 4] = True  # the second is empty: the whole image
    assert boxes_of(masks, 4).tolist() == [[8, 4, 20, 12], [0, 0, 24, 16]]
