"""What tests share: tiny models, random weights everywhere, the data folder."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blsam.config import EncoderConfig
from blsam.modeling.image_encoder import ImageEncoder

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("BLSAM_DATA", ROOT.parent / "shared" / "data"))
COCO = ("--annotations", DATA / "coco" / "instances_val2017.json", "--images", DATA / "coco" / "val2017")
needs_data = pytest.mark.skipif(not (DATA / "coco").is_dir(), reason="no coco photos (BLSAM_DATA)")

TINY = EncoderConfig(
    name="tiny",
    dim=64,
    depth=4,
    heads=4,
    global_layers=(1, 3),
    window=7,
    e_dim=16,
    e_heads=4,
    e_layers=(1, 3),
    predictor_layers=(0, 2),
)
TINY_EXACT = replace(TINY, name="tiny_exact", e_dim=0, e_heads=0, e_layers=(), predictor_layers=())
TINY_SIZE = 160


def tiny(config=TINY):
    torch.manual_seed(0)
    return randomize(ImageEncoder(config, TINY_SIZE))


def images(n=1, size=TINY_SIZE):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def randomize(model, std=0.05, seed=0):
    """Move every parameter, so that nothing hides behind a zero (positions, last linears, alpha, gamma)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def gap(a, b):
    """Largest difference over the standard deviation of b."""
    return ((a - b).abs().max() / b.std()).item()
