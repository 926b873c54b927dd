"""Shares of tokens on objects, by hand."""

import numpy as np
import pytest
import torch

from scripts.studies.routing_on_objects import coverage, figures


def test_coverage_of_a_quarter_of_a_token():
    mask = np.zeros((16, 32), bool)
    mask[:4, :4] = True  # a photo of 16 x 32 that fills 32 x 64 of the frame: 8 x 8 pixels of the first token
    found = coverage(mask, (32, 64), 64)
    expected = torch.zeros(1, 4, 4)
    expected[0, 0, 0] = 0.25
    torch.testing.assert_close(found, expected)


def test_gain_lies_between_area_and_best():
    # one stage; real tokens: 2 of 10 covered, prime: 1 of 2, best: 2 of 2
    photo = np.array([[[2.0, 10], [1, 2], [2, 2]]])
    row = figures(np.stack([photo, photo]))[0]
    assert (row["area"], row["prime"], row["best"]) == (20, 50, 100)
    assert row["gain"] == pytest.approx(100 * 30 / 80) and row["gain_interval_95"] == [37.5, 37.5]
