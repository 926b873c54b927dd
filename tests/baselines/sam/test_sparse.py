"""Few keys: their order, which queries see which, and which tokens the feed-forward parts are on."""

import pytest
import torch

from blsam.baselines.sam.macs import fed_of, keys_of
from blsam.baselines.sam.sparse import cell_scores, few_answer, order_of, projections, whole
from blsam.config import SparseRule
from tests.baselines.sam.models import largest, small
from tests.baselines.sam.test_attention import layer, tokens
from tests.helpers import gap, images


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (10, 6)])
def test_the_order_takes_one_token_of_every_cell_after_the_other(size):
    h, w = size
    order = order_of(torch.randn(3, 2, h, w, 16))
    assert torch.equal(order.sort(2).values, torch.arange(h * w).expand(3, 2, -1)), "each token once"
    cells = -(-h // 2) * -(-w // 2)
    for row in order.flatten(0, 1)[:, :cells].tolist():
        assert {(n // w // 2, n % w // 2) for n in row} == {
            (a, b) for a in range(-(-h // 2)) for b in range(-(-w // 2))
        }
        assert all(n // w % 2 == 0 and n % w % 2 == 0 for n in row)
    assert not torch.equal(order[0, 0], order[0, 1]), "each head has its own"


def test_a_cell_that_differs_comes_first():
    k = torch.randn(1, 1, 1, 1, 8).expand(1, 1, 8, 8, 8).clone() + 0.01 * torch.randn(1, 1, 8, 8, 8)
    k[:, :, 4:6, 2:4] += torch.randn(2, 2, 8)
    assert cell_scores(k).argmax() == 2 * 4 + 1 and order_of(k)[0, 0, 0] == 4 * 8 + 2


@pytest.mark.parametrize("i", [0, 1], ids=["window", "global"])
@torch.no_grad()
def test_if_all_answer_it_is_the_dense_attention(i):
    attn, x = layer(i), tokens()
    q, k, v = projections(attn, x)
    heads = few_answer(attn, q, k, v, order_of(k), k.shape[2] * k.shape[3], 1, False)
    difference = gap(attn.proj(whole(heads, x.shape)), attn(x))
    assert difference < 1e-5, f"{difference:.1e} of the deviation"


@pytest.mark.parametrize("form", [None, "plain"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("first, block", [(24, 12), (20, 7)])
@torch.no_grad()
def test_who_sees_whom(wide, first, block, form):
    """Against the whole map with the rest masked."""
    attn = layer(0)
    q, k, v = projections(attn, tokens())
    attn.form = form
    order, n = order_of(k), 49
    found = few_answer(attn, q, k, v, order, first, block, wide).flatten(2, 3)
    place = order.argsort(2)  # of every token in the order
    asks, answers = place[..., :, None], place[..., None, :]
    sees = answers < first
    if wide:
        sees = sees | (asks < first)
    else:
        sees = sees | ((asks >= first) & ((asks - first) // block == (answers - first) // block))
    down, across = (table[attn.offsets_h] for table in (attn.rel_pos_h, attn.rel_pos_w))
    bias = (
        torch.einsum("gnyxd,ykd->gnyxk", q, down)[..., None]
        + torch.einsum("gnyxd,xkd->gnyxk", q, across)[..., None, :]
    )
    logits = q.flatten(2, 3) @ k.flatten(2, 3).mT * attn.scale + bias.flatten(2, 3).flatten(3)
    expected = logits.masked_fill(~sees, -torch.inf).softmax(-1) @ v.flatten(2, 3)
    assert sees.sum(-1).amin() < n
    difference = largest(found, expected)
    assert difference < 1e-5, f"{difference:.1e}"


def test_how_many():
    assert [keys_of(4096, keep, True) for keep in (0.5, 0.25, 0.1)] == [(2048, 64), (1024, 64), (384, 64)]
    assert [keys_of(196, keep, False) for keep in (0.5, 0.25, 0.1)] == [(98, 49), (49, 49), (49, 49)]
    assert [keys_of(n, 0.5, True) for n in (9, 100, 1024)] == [(4, 1), (50, 1), (512, 16)]
    assert fed_of(4096, 0.25) == 1024 and fed_of(10, 0.01) == 1


@torch.no_grad()
def test_feed_forward_parts_of_window_layers_are_on_the_first_tokens():
    encoder, fed = small(SparseRule(), keep_ratio=0.25), []
    for block in encoder.blocks:
        block.mlp.register_forward_hook(lambda _, args, out: fed.append(args[0].shape[-2]))
    _, routing = encoder.encode(images(2))
    assert fed == [10, 10, 25, 10, 25, 10], "rows of the grid where all are fed"
    (stage,) = routing.stages
    y, x = stage.mask[0].nonzero().T
    assert stage.mask.sum() == 50 and not (y % 2).any() and not (x % 2).any(), "at a quarter, one token a cell"
