"""Counts against the published ones and against torch's own counter."""

import pytest
import torch

from blsam.baselines import build_baseline
from blsam.baselines.macs import LayerTokens, layer_macs
from blsam.config import CLASSIFIERS
from tests.baselines.models import counted

GIGA = [  # of DeiT-B and DeiT-S
    ("evit", {"keep_ratio": 0.9}, 15.40, 4.02),
    ("evit", {"keep_ratio": 0.8}, 13.33, 3.48),
    ("evit", {}, 11.61, 3.03),
    ("evit", {"keep_ratio": 0.6}, 10.09, 2.64),
    ("evit", {"keep_ratio": 0.5}, 8.82, 2.31),
    ("evit", {"fuse": False}, 11.49, 3.00),
    ("evit", {"keep_ratio": 1.0}, 17.56, 4.60),
    ("evo_vit", {}, 11.72, 3.05),
    ("evo_vit", {"rep": False}, 11.66, 3.03),
    ("evo_vit", {"keep_ratio": 1.0}, 17.56, 4.60),
    ("dynamic_vit", {}, 11.48, 2.98),
    ("tome", {"keep_ratio": 0.51}, 13.11, 3.42),
    ("tome", {}, 10.37, 2.71),
]


@pytest.mark.parametrize("name, options, base, small", GIGA, ids=str)
def test_against_the_papers_and_the_counter(name, options, base, small):
    for size, giga in (("base", base), ("small", small)):
        with torch.device("meta"):
            model = build_baseline(name, CLASSIFIERS[f"vit_{size}_patch16_224"], **options)
        assert model.macs() / 1e9 == pytest.approx(giga, abs=0.006)
        assert model.macs() == counted(model, 224)


def test_of_another_size_and_other_classes():
    with torch.device("meta"):
        model = build_baseline("evit", CLASSIFIERS["vit_tiny_patch16_224"], image_size=96, num_classes=7)
    assert model.macs() == counted(model, 96)


def test_by_hand():
    n, m, c = 5, 3, 2
    projections, products, feed_forward, row = 4 * n * c * c, 2 * n * n * c, 8 * m * c * c, n * c
    assert layer_macs(c, LayerTokens(n, m)) == projections + products + feed_forward
    assert layer_macs(c, LayerTokens(n, m, class_row=True)) == projections + products + feed_forward + row
    asked = 3 * n * c * c + 2 * m * n * c + m * c * c  # rows of m tokens alone
    assert layer_macs(c, LayerTokens(n, m, queries=m, more=7)) == asked + feed_forward + 7
    half = (projections + products) // 2 + m * (4 * c + 4 * c * c)  # one of two heads, one channel each
    assert layer_macs(c, LayerTokens(n, m, width=1)) == half
    of_two = layer_macs(c, LayerTokens(torch.tensor([n, 1]), torch.tensor([m, 1])))
    assert of_two.tolist() == [layer_macs(c, LayerTokens(n, m)), layer_macs(c, LayerTokens(1, 1))]
