"""Attention among chosen tokens against the dense one, and against SAM's formula with the others left out."""

import pytest
import torch
from segment_anything.modeling.image_encoder import get_rel_pos

from blsam.baselines.base import project
from blsam.baselines.sam.attention import Places, attend, slots_of, window_of, with_positions
from tests.baselines.sam.models import SMALL, largest, small
from tests.helpers import gap

GRID = torch.Size((2, 10, 10))  # 160 pixels, windows of 7


def layer(i):
    return small(None).blocks[i].attn


def tokens(shape=GRID):
    return torch.randn(*shape, SMALL.dim, generator=torch.Generator().manual_seed(3))


def some(count, seed=0):
    """`count` of the grid's places, in any order, others in each image: [2, count]."""
    draws = torch.rand(2, 100, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(1)[:, :count]


def by_formula(attn, x, kept):
    """SAM's attention over padded windows, or the grid, in which tokens outside `kept` [B, 100] bool do not answer."""
    if attn.window:
        padded = torch.nn.functional.pad(x, (0, 0, 0, 4, 0, 4))  # 10 -> 14
        mask = torch.nn.functional.pad(kept.view(2, 10, 10), (0, 4, 0, 4), value=True)
        cut = padded.unflatten(2, (2, 7)).unflatten(1, (2, 7)).transpose(2, 3).flatten(0, 2).flatten(1, 2)
        mask = mask.unflatten(2, (2, 7)).unflatten(1, (2, 7)).transpose(2, 3).flatten(0, 2).flatten(1, 2)
    else:
        cut, mask = x.flatten(1, 2), kept
    side = attn.window or 10
    q, k, v = attn.qkv(cut).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    down, across = (get_rel_pos(side, side, table) for table in (attn.rel_pos_h, attn.rel_pos_w))
    grid = q.unflatten(2, (side, side))
    bias = torch.einsum("gnyxd,ykd->gnyxk", grid, down)[..., None] + torch.einsum(
        "gnyxd,xkd->gnyxk", grid, across
    ).unsqueeze(-2)
    weights = (q @ k.mT * attn.scale + bias.flatten(2, 3).flatten(3)).masked_fill(~mask[:, None, None], -torch.inf)
    weights = weights.softmax(-1)
    out = attn.proj((weights @ v).transpose(1, 2).flatten(2))
    if attn.window:
        out = out.unflatten(1, (7, 7)).unflatten(0, (2, 2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :10, :10]
        out = out.flatten(1, 2)
    return out, weights


@pytest.mark.parametrize("i", [0, 1], ids=["window", "global"])
@pytest.mark.parametrize("form", [None, "plain"])
@torch.no_grad()
def test_of_all_tokens_it_is_the_dense_attention_in_any_order(i, form):
    attn, x = layer(i), tokens()
    expected = attn(x).flatten(1, 2)
    attn.form = form
    order = some(100)
    for index in (torch.arange(100).expand(2, -1), order):
        there = index[..., None].expand(-1, -1, SMALL.dim)
        found, _ = attend(attn, x.flatten(1, 2).gather(1, there), Places(index, (10, 10), 7))
        difference = gap(found, expected.gather(1, there))
        assert difference < 1e-5, f"{difference:.1e} of the deviation"


@pytest.mark.parametrize("i", [0, 1], ids=["window", "global"])
@torch.no_grad()
def test_of_some_tokens_the_others_do_not_answer_and_padding_does(i):
    attn, x, index = layer(i), tokens(), some(40)
    kept = torch.zeros(2, 100, dtype=torch.bool).scatter(1, index, True)
    there = index[..., None].expand(-1, -1, SMALL.dim)
    expected, weights = by_formula(attn, x, kept)
    found, received = attend(attn, x.flatten(1, 2).gather(1, there), Places(index, (10, 10), 7), received=i == 1)
    difference = gap(found, expected.gather(1, there))
    assert difference < 1e-5, f"{difference:.1e} of the deviation"
    if i == 1:  # the mean over heads and over those that ask
        rows = torch.stack([w[:, k].mean((0, 1)) for w, k in zip(weights, kept)])
        assert largest(received, rows.gather(1, index)) < 1e-6 and largest(received.sum(1), torch.ones(2)) < 1e-5


@pytest.mark.parametrize("i", [0, 1], ids=["window", "global"])
@torch.no_grad()
def test_the_bias_of_two_survivors_is_that_of_the_stock_tables(i):
    attn, index = layer(i), some(40)
    x, d = torch.randn(2, 40, SMALL.dim), 16
    projected = project(attn, x)
    asked, answers = with_positions(attn, projected, Places(index, (10, 10), 7))
    found = asked[..., d:] @ answers[..., d:].mT
    side, window = attn.window or 10, attn.window or 10
    for a, b in ((0, 1), (5, 17), (39, 2)):
        (ya, xa), (yb, xb) = ((int(index[1, n]) // 10 % window, int(index[1, n]) % 10 % window) for n in (a, b))
        q = projected.q[1, :, a]  # [heads, d]
        stock = q @ attn.rel_pos_h[ya - yb + side - 1] + q @ attn.rel_pos_w[xa - xb + side - 1]
        assert largest(found[1, :, a, b], stock) < 1e-5, (found[1, :, a, b], stock)


@torch.no_grad()
def test_an_extra_token_has_no_place_and_is_seen_by_its_window_alone():
    index, x = some(40), torch.randn(2, 44, SMALL.dim)
    places = Places(index, (10, 10), 7, live=torch.tensor([[True, True, True, False]] * 2))
    asked, answers = with_positions(layer(0), project(layer(0), x), places)
    assert not asked[:, :, 40:, 16:].any() and not answers[:, :, 40:, 16:].any()
    other = x.clone()
    other[:, 40] += 1  # of window 0
    inside = places.windows() == 0
    moved = (attend(layer(0), other, places)[0] - attend(layer(0), x, places)[0]).abs().amax(-1) > 1e-6
    assert torch.equal(moved, inside), "others than those of the window have changed"
    moved = (attend(layer(1), other, places)[0] - attend(layer(1), x, places)[0]).abs().amax(-1) > 1e-7
    assert moved.all(), "in a global layer it is seen by all"
    other = x.clone()
    other[:, 43] += 1  # stands for nothing
    for i in (0, 1):
        one, two = (attend(layer(i), t, places, received=i == 1) for t in (x, other))
        difference = max(largest(one[0][:, :43], two[0][:, :43]), largest(one[1], two[1]) if i else 0)
        assert difference < 1e-6, f"layer {i}: {difference:.1e} by a token that stands for nothing"


def test_windows_without_a_token_give_finite_gradients():
    attn = layer(0)
    index = torch.tensor([[0, 1, 2, 8], [7, 8, 9, 17]])  # windows 0 and 1 of four
    x = torch.randn(2, 4, SMALL.dim, requires_grad=True)
    attend(attn, x, Places(index, (10, 10), 7))[0].square().sum().backward()
    whole = layer(0)
    attend(whole, x, Places(index, (7, 14), 7))[0].square().sum().backward()  # no padding either
    assert torch.isfinite(x.grad).all() and all(torch.isfinite(p.grad).all() for p in whole.parameters())


def test_every_token_has_a_slot_of_its_window():
    index = some(40)
    windows = window_of(index, (10, 10), 7)
    slots, live, back = slots_of(windows, 4)
    assert live.sum() == 80 and all(len(set(row.tolist())) == 40 for row in back)
    for b in range(2):
        for token, slot in enumerate(back[b].tolist()):
            window, place = divmod(slot, slots.shape[2])
            assert slots[b, window, place] == token and windows[b, token] == window and live[b, window, place]
