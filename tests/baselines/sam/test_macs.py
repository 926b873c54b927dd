"""Counts against those of the methods' definition, and against torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blsam.baselines.sam import evit, evo
from blsam.baselines.sam.macs import config_macs
from blsam.config import MODELS
from blsam.modeling.macs import encoder_macs, sam_macs
from tests.baselines.sam.models import RULES, small
from tests.helpers import images

GIGA = [
    ("evit_vit_b", 0.9, 393),
    ("evit_vit_b", 0.8, 327),
    ("evit_vit_b", 0.7, 274),
    ("evit_vit_b", 0.6, 231),
    ("evit_vit_b", 0.5, 197),
    ("evit_vit_h", 0.7, 1770),
    ("evo_vit_b", 0.5, 281),
    ("evo_vit_l", 0.5, 883),
    ("evo_vit_h", 0.5, 1778),
]
SPARSE = {"vit_b": 319, "vit_l": 991, "vit_h": 1984}  # at a quarter, SAM's padding through every linear layer


@pytest.mark.parametrize("name, keep, giga", GIGA, ids=str)
def test_against_the_definition(name, keep, giga):
    assert config_macs(MODELS[name], 1024, keep) / 1e9 == pytest.approx(giga, rel=0.03)


@pytest.mark.parametrize("dense, giga", SPARSE.items())
def test_of_few_keys_against_the_definition(dense, giga):
    padding = sam_macs(MODELS[dense]) - encoder_macs(MODELS[dense])
    assert (config_macs(MODELS[f"sparse_{dense}"], 1024, 0.25) + padding) / 1e9 == pytest.approx(giga, rel=0.005)


def test_of_all_tokens_they_are_the_dense_models():
    for name in ("evit_vit_b", "evo_vit_b", "sparse_vit_b", "strided_vit_b"):
        config = MODELS[name]
        assert config_macs(config, 1024, 1.0) == encoder_macs(MODELS["vit_b"])
        almost = config_macs(config, 1024, 0.99999)
        assert 0.9 * encoder_macs(MODELS["vit_b"]) < almost < 1.1 * sam_macs(MODELS["vit_b"]), almost / 1e9
        assert config_macs(config) == config_macs(config, 1024, config.rule.keep_ratio)


def evenly(scores, count):
    """In the place of `split`: as many tokens of every 7 x 7 window of a 14 x 14 grid. The order is such that the first
    of what stays are so again."""
    n = scores.shape[1]
    order = torch.arange(n).expand(len(scores), -1)
    if n == 196:
        y, x = order // 14, order % 14
        order = ((y % 7 * 7 + x % 7) * 4 + y // 7 * 2 + x // 7).argsort(1)
    return order[:, :count], order[:, count:]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_counted(rule, monkeypatch):
    monkeypatch.setattr(evit, "split", evenly)
    monkeypatch.setattr(evo, "split", evenly)
    encoder = small(rule, 224, keep_ratio=4 / 7).use_form("plain")  # 196, 112, 64 tokens
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(images(1, 224))
    counted = counter.get_total_flops() // 2
    assert encoder.macs() == counted, f"{encoder.macs():,} analytic, {counted:,} counted"
    assert encoder.macs() < encoder_macs(replace(encoder.config, rule=None), 224)
