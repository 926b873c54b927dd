"""Closed-form starts of narrow blocks: exact where nothing has to be cut, near where the wide block is of low rank."""

import copy

import pytest
import torch
from skimage import data

from blsam import SamPredictor, sam_model_registry
from blsam.modeling.attention import Attention, cell_means
from blsam.modeling.blocks import RoutedBlock
from blsam.modeling.classifier import TokenAttention
from blsam.modeling.image_encoder import build_block
from blsam.modeling.routing import route, route_sequence
from blsam.options import shipped_checkpoint
from blsam.training.starts import _gathered, start_attention, start_feed_forward
from tests.helpers import TINY, gap, randomize


def explained(found, expected):
    return 1 - ((found - expected).square().sum() / expected.square().sum()).item()


@pytest.fixture
def x():
    return torch.randn(2, 10, 10, TINY.dim, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.mark.parametrize("window", [0, 7])
@torch.no_grad()
def test_as_many_channels_give_the_same_attention(x, window):
    wide = randomize(Attention(TINY.dim, TINY.dim, 4, window, (10, 10)), 0.3)
    narrow = Attention(TINY.dim, TINY.dim, 4, window, (10, 10))
    start_attention(narrow, wide, x)
    assert explained(narrow(x), wide(x)) > 1 - 1e-6


@pytest.mark.parametrize("window", [0, 7])
@torch.no_grad()
def test_all_tokens_answer_also_where_those_that_ask_would_alone(x, window):
    wide = randomize(Attention(TINY.dim, TINY.dim, 4, window, (10, 10)), 0.3)
    among_themselves = copy.deepcopy(wide)
    among_themselves.semi_cross = False
    queries = half(x, window)
    for source in (wide, among_themselves):
        narrow = Attention(TINY.dim, TINY.dim, 4, window, (10, 10))
        start_attention(narrow, source, x, queries)
        assert explained(narrow(x), wide(x)) > 1 - 1e-6
    assert not among_themselves.semi_cross


@pytest.mark.parametrize("kind", ["window", "image", "sequence"])
@torch.no_grad()
def test_a_sample_of_the_tokens_gathers_as_it_does_among_all(x, kind):
    if kind == "sequence":
        x = x.flatten(1, 2)
        attention = TokenAttention(TINY.dim, 32, 2)
        places = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(2))
        queries = route_sequence(places, places, 0.5).image
    else:
        window = 7 if kind == "window" else 0
        attention, queries = Attention(TINY.dim, 32, 2, window, (10, 10)), half(x, window)
    randomize(attention, 0.3)
    directions = torch.eye(TINY.dim).double()
    some, every = _gathered(attention, x, queries, directions), _gathered(attention, x, None, directions)
    assert len(some) == len(every) == 2 and len(some[0]) < 0.6 * len(every[0])
    for a, b in zip(some, every):
        assert gap(a, b[queries.tokens]) < 1e-5, gap(a, b[queries.tokens])


def half(x, window):
    """Half of the tokens as queries."""
    places = torch.rand(x.shape[:3], generator=torch.Generator().manual_seed(2))
    stage = route(places, places, 7, 0.5, None)
    return stage.window if window else stage.image


@pytest.mark.parametrize("pool", [1, 2])
@torch.no_grad()
def test_what_a_head_gathers_is_its_softmax_times_the_tokens(x, pool):
    attention = randomize(Attention(TINY.dim, 32, 2, 0, (10, 10), pool=pool), 0.3)
    directions = torch.randn(
        TINY.dim, 20, generator=torch.Generator().manual_seed(3)
    ).double()  # a head has 16 channels
    q, k, _ = attention.qkv(x).split(32, dim=-1)
    q, k = (t.unflatten(-1, (2, 16)).permute(0, 3, 1, 2, 4) for t in (q, cell_means(k, pool)))  # [B, heads, h, w, d]
    down, across = attention._tables((10, 10), 1.0, x.dtype)
    logits = torch.einsum("bnyxd,bnuvd->bnyxuv", q, k) / 4
    logits = logits + torch.einsum("bnyxd,yud->bnyxu", q, down)[..., None]
    logits = logits + torch.einsum("bnyxd,xvd->bnyxv", q, across)[..., None, :]
    pattern = logits.flatten(-2).softmax(-1)  # [B, heads, h, w, keys]
    tokens = cell_means(x, pool).flatten(1, 2).double() @ directions
    expected = torch.einsum("bnyxk,bkr->nbyxr", pattern.double(), tokens).flatten(1, 3)
    for found, of_head in zip(_gathered(attention, x, None, directions), expected, strict=True):
        assert gap(found, of_head) < 1e-4, gap(found, of_head)


@torch.no_grad()
def test_a_head_that_adds_nothing_is_the_one_left_out(x):
    wide = randomize(Attention(TINY.dim, TINY.dim, 4, 7, (10, 10)), 0.3)
    wide.proj.weight[:, 16:32] = 0
    narrow = Attention(TINY.dim, 48, 3, 7, (10, 10))
    start_attention(narrow, wide, x)
    assert explained(narrow(x), wide(x)) > 1 - 1e-6


@torch.no_grad()
def test_heads_of_low_rank_are_cut_without_loss(x):
    wide = randomize(Attention(TINY.dim, TINY.dim, 4, 7, (10, 10)), 0.3)
    for of_heads in (wide.qkv.weight.view(12, 16, TINY.dim), wide.qkv.bias.view(12, 16)):
        of_heads[:, 4:] = 0
    for table in (wide.rel_pos_h, wide.rel_pos_w):
        table[:, 4:] = 0
    narrow = Attention(TINY.dim, TINY.e_dim, 4, 7, (10, 10))  # 4 channels a head
    start_attention(narrow, wide, x)
    assert explained(narrow(x), wide(x)) > 1 - 1e-6


@torch.no_grad()
def test_feed_forward_of_low_rank_is_cut_without_loss():
    torch.manual_seed(0)
    wide = build_block(TINY, 1, (10, 10))
    narrow = wide.e_block
    wide.mlp.lin1.weight[64:] = 0  # 64 hidden units that matter, on 16 directions in and 16 out
    wide.mlp.lin1.bias[64:] = -100
    wide.mlp.lin1.weight[:64] = torch.randn(64, 16) @ torch.randn(16, TINY.dim) / 8
    wide.mlp.lin2.weight.copy_(torch.randn(TINY.dim, 16) @ torch.randn(16, 4 * TINY.dim) / 8)
    rows = torch.randn(3000, TINY.dim)
    start_feed_forward(narrow, wide, rows)
    narrow.norm2 = wide.norm2 = torch.nn.Identity()
    assert explained(narrow.feed_forward(rows), wide.feed_forward(rows)) > 1 - 1e-5


@torch.no_grad()
def test_what_is_degenerate_gives_numbers_all_the_same(x):
    wide = randomize(Attention(TINY.dim, TINY.dim, 4, 7, (10, 10)), 0.3)
    wide.qkv.weight[: TINY.dim] = 0  # every query the same
    narrow = Attention(TINY.dim, TINY.e_dim, 4, 7, (10, 10))
    start_attention(narrow, wide, x)
    assert explained(narrow(x), wide(x)) > 0.3
    block = build_block(TINY, 1, (10, 10))
    e = block.e_block
    block.mlp.lin1.bias.fill_(-100)  # no unit ever fires
    start_feed_forward(e, block, x.flatten(0, 2))
    assert torch.isfinite(e.feed_forward(x.flatten(0, 2))).all()


@torch.no_grad()
def test_most_of_a_trained_model_s_blocks_is_found():
    sam = sam_model_registry["blsam_vit_t"](shipped_checkpoint("vit_t"), image_size=256)
    encoder, shares = sam.image_encoder, {}
    predictor = SamPredictor(sam)
    image = predictor.transform.apply_image(data.coffee())
    x = sam.preprocess(torch.as_tensor(image).permute(2, 0, 1))[None]
    x = encoder.patch_embed(x) + encoder.pos_embed
    for i, block in enumerate(encoder.blocks):
        if isinstance(block, RoutedBlock):
            e = block.e_block
            start_attention(e.attn, block.attn, block.norm1(x))
            shares[f"{i}.attention"] = explained(e.attn(block.norm1(x)), block.attention(x))
            middle = (x + block.attention(x)).flatten(0, 2)
            start_feed_forward(e, block, block.norm2(middle))
            e.norm2.load_state_dict(block.norm2.state_dict())
            shares[f"{i}.feed_forward"] = explained(e.feed_forward(middle), block.feed_forward(middle))
        x = block.dense(x)
    assert min(shares.values()) > 0.8, shares
