"""What several test files share: tiny models, random weights everywhere, the reference encoder, the data folder."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from blsam.config import EncoderConfig
from scripts.benchmarks.benchmark_row import reference_encoder  # noqa: F401 (for several test files)

torch.set_num_threads(2)  # other work shares the machine

TINY = EncoderConfig(
    "tiny",
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

DATA = Path(os.environ.get("BLSAM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


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
