"""One layer's attention by itself."""

import pytest
import torch

from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.routing import route
from tests.helpers import TINY, TINY_SIZE, gap, randomize


@pytest.mark.parametrize("layer", [1, 2], ids=["global", "window"])
@torch.no_grad()
def test_semi_cross_attention_is_rows_of_full_attention(layer):
    encoder = randomize(ImageEncoder(TINY, TINY_SIZE))
    x = torch.randn(2, 10, 10, TINY.dim, generator=torch.Generator().manual_seed(2))
    scores = torch.rand(2, 10, 10, generator=torch.Generator().manual_seed(3))
    chosen = route(scores, scores, TINY.window, 0.25, [(120, 160), (160, 100)])
    block = encoder.blocks[layer]
    full = block.attention(x).reshape(200, TINY.dim)
    difference = gap(block.attention(x, block.prime(chosen)), full[block.prime(chosen).tokens])
    assert difference <= 1e-4, f"{difference:.1e} of the standard deviation"
