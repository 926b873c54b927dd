"""One layer's attention by itself."""

import pytest
import torch
import torch.nn.functional as F

from blsam.modeling.attention import Attention, cell_means, offsets, resampled
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.product import FORMS
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


# --- cells of tokens that answer as one ----------------------------------------------------------------------------


def pooled(t: torch.Tensor) -> torch.Tensor:
    """Means over cells of 2 x 2 of the last two axes."""
    return F.avg_pool2d(t.flatten(0, -3), 2, ceil_mode=True, count_include_pad=False).unflatten(0, t.shape[:-2])


def by_hand(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """The logits of all pairs, their means over cells, softmax, the means of the values."""
    batch, height, width, _ = x.shape
    q, k, v = attn.qkv(x).view(batch, height, width, 3, attn.num_heads, -1).unbind(3)  # [B, H, W, heads, d] each
    down, across = (
        resampled(table, 2 * size - 1)[offsets(size)]
        for table, size in ((attn.rel_pos_h, height), (attn.rel_pos_w, width))
    )
    logits = torch.einsum("byxhd,bmnhd->bhyxmn", q, k) * attn.scale
    logits = logits + torch.einsum("byxhd,ymd->bhyxm", q, down)[..., None]
    logits = pooled(logits + torch.einsum("byxhd,xnd->bhyxn", q, across)[..., None, :])
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return attn.proj(torch.einsum("bhyxmn,bhdmn->byxhd", weights, pooled(v.movedim((3, 4), (1, 2)))).flatten(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", [(8, 8), (7, 9)], ids=["whole cells", "cells cut at the edge"])
def test_cells_answer_as_the_means_of_their_tokens(form, grid):
    torch.manual_seed(0)
    attn = Attention(24, 12, 3, 0, (8, 8), pool=2)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    attn.form = form
    x = torch.randn(2, *grid, 24)
    with torch.no_grad():
        torch.testing.assert_close(attn(x), by_hand(attn, x), atol=1e-5, rtol=1e-5)


def test_a_wrapped_projection_is_called_and_answers_alike():
    torch.manual_seed(0)
    attn, x, calls = Attention(24, 12, 3, 0, (6, 6), pool=2), torch.randn(1, 6, 6, 24), []
    with torch.no_grad():
        plain = attn(x)
        attn.qkv.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(attn(x), plain)
    assert calls


def test_cell_means_of_a_cut_cell_are_of_what_is_there():
    grid = torch.arange(9.0).view(1, 3, 3, 1)
    assert cell_means(grid, 2).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]


@pytest.mark.parametrize("options", [{"window": 7}, {"window": 0, "semi_cross": False}])
def test_cells_answer_over_the_whole_grid_alone(options):
    with pytest.raises(ValueError, match="whole grid"):
        Attention(24, 12, 3, grid=(8, 8), pool=2, **options)
