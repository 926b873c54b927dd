"""Tiny dense encoders under each method, random weights everywhere."""

from dataclasses import replace

import torch

from blsam.baselines.sam.build import build_encoder
from blsam.config import EViTRule, EvoViTRule, SparseRule
from tests.helpers import TINY_EXACT, TINY_SIZE, randomize

RULES = {
    "evit": EViTRule(),
    "evit without fusion": EViTRule(fuse=False),
    "evit filled": EViTRule(fill=True),
    "evo": EvoViTRule(),
    "evo without representatives": EvoViTRule(rep=False),
    "sparse": SparseRule(),
    "strided": SparseRule(wide="prime"),
}
SMALL = replace(TINY_EXACT, name="small", depth=6, global_layers=(1, 3, 5))  # tokens are chosen twice


def small(rule, size=TINY_SIZE, keep_ratio=None, config=SMALL):
    """Windows of 7 x 7 on a grid of 10 x 10 tokens: 7x7, 7x3, 3x7 and 3x3."""
    torch.manual_seed(0)
    return randomize(build_encoder(replace(config, rule=rule), size, keep_ratio))


def largest(a, b):
    """Largest difference, absolute."""
    return (a - b).abs().max().item()
