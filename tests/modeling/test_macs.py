"""Analytic MACs against the published counts and against torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blsam.config import CONFIGS
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.macs import encoder_macs, sam_macs
from tests.helpers import TINY, TINY_SIZE

OURS = {"vit_b": 468.8, "vit_l": 1418.5, "vit_h": 2820.9, "blsam_vit_b": 265.7, "blsam_vit_h": 2144.2}
SAMS = {"vit_b": 486.0, "vit_l": 1492.8, "vit_h": 2980.5}


def test_against_the_design():
    for name, giga in OURS.items():
        assert encoder_macs(CONFIGS[name]) / 1e9 == pytest.approx(giga, rel=0.005), name
    for name, giga in SAMS.items():
        assert sam_macs(CONFIGS[name]) / 1e9 == pytest.approx(giga, rel=0.005), name


def counted(config, size, keep, sizes=None):
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder = ImageEncoder(config, size)
        counter = FlopCounterMode(display=False)
        with counter:
            encoder(torch.empty(1, 3, size, size), keep_ratio=keep, true_sizes=sizes)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_analytic_equals_counted(name, keep):
    assert encoder_macs(CONFIGS[name], 1024, keep) == counted(CONFIGS[name], 1024, keep)


@pytest.mark.parametrize(
    "change", [{}, {"semi_cross": False}, {"fuse": "block"}, {"e_block": False}, {"grow": 2}], ids=str
)
def test_analytic_equals_counted_with_padding_and_ablations(change):
    config = replace(TINY, **change)
    assert encoder_macs(config, TINY_SIZE, 0.25, (100, 160)) == counted(config, TINY_SIZE, 0.25, [(100, 160)])
