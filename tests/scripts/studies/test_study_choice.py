"""The rules by which tokens are chosen, by hand and beside the model's own ways."""

from dataclasses import replace

import pytest
import torch

from blsam.build_sam import build_sam
from blsam.config import CONFIGS
from scripts.studies.study_choice import CHOICES, Scene, anywhere, by_box, narrowed, received_in_windows, run
from tests.helpers import randomize


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    model = build_sam(CONFIGS["blsam_vit_t"], image_size=256)  # 16 x 16 tokens, windows of 8 x 8
    randomize(model.image_encoder, std=0.05)
    return model


def image():
    return torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))


SIZES = [(256, 256)]


@torch.no_grad()
@pytest.mark.parametrize("choice", ["predictor", "norm"])
def test_a_walk_by_rules_is_the_encoder_s_own(sam, choice):
    encoder = sam.image_encoder
    before = encoder.config
    encoder.config = replace(before, score=choice)
    expected, routing = encoder.encode(image(), true_sizes=SIZES, keep_ratio=0.25)
    encoder.config = before
    tokens, found = run(encoder, image(), SIZES, 0.25, choice)
    for number, (a, b) in enumerate(zip(found.stages, routing.stages)):
        assert torch.equal(a.mask, b.mask), f"stage {number}: {(a.mask != b.mask).sum()} tokens differ"
    assert torch.allclose(encoder.compared(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_rule_keeps_as_many_tokens(sam, choice):
    _, found = run(sam.image_encoder, image(), SIZES, 0.25, choice, box=(2.0, 3.0, 6.0, 7.0))
    counts = [int(stage.mask.sum()) for stage in found.stages]
    assert counts == [64] * 4
    if choice != "box, any window":
        assert all(stage.counts.flatten().tolist() == [16] * 4 for stage in found.stages)


def test_turns_take_every_token_once(sam):
    _, found = run(sam.image_encoder, image(), SIZES, 0.25, "turns")
    times = torch.stack([stage.mask for stage in found.stages]).sum(0)
    assert (times > 0).float().mean() > 0.85, times  # windows hold more or fewer of a quarter of the draws


def scene(sam, box):
    scores = torch.zeros(1, 16, 16)
    return Scene(sam.image_encoder, 0, scores, scores, scores, box, seed=3)


def test_the_box_comes_before_what_lies_around_it(sam):
    rank = by_box(scene(sam, (2.0, 3.0, 5.0, 5.0)))[0]
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[3:5, 2:5] = True
    assert rank[inside].min() > rank[~inside].max()
    near = torch.zeros(16, 16, dtype=torch.bool)
    near[2:6, 1:6] = True
    assert rank[near].min() > rank[~near].max()
    mask = anywhere(sam.image_encoder, rank[None], 4 / 256, SIZES).mask[0]
    assert int(mask.sum()) == 4  # one in each of four windows is the least
    assert inside[mask].all()


@torch.no_grad()
def test_attention_received_by_hand(sam):
    """The mean over heads and queries of the softmax that SAM's formula gives."""
    attn = sam.image_encoder.blocks[0].attn
    x = torch.randn(1, 8, 8, 192, generator=torch.Generator().manual_seed(2))
    q, k, _ = attn.qkv(x).view(64, 3, 3, 64).unbind(1)  # [tokens, heads, d]
    expected = torch.zeros(64)
    places = [(i // 8, i % 8) for i in range(64)]
    for head in range(3):
        logits = q[:, head] @ k[:, head].T / 8
        for a, (ya, xa) in enumerate(places):
            for b, (yb, xb) in enumerate(places):
                logits[a, b] += q[a, head] @ (attn.rel_pos_h[ya - yb + 7] + attn.rel_pos_w[xa - xb + 7])
        expected += logits.softmax(1).mean(0) / 3
    found = received_in_windows(attn, x).flatten()
    assert torch.allclose(found, expected, atol=1e-6), (found - expected).abs().max()


@torch.no_grad()
def test_residual_is_what_the_narrow_blocks_leave(sam):
    """A model whose narrow blocks are none: the squared length of what the wide ones add."""
    torch.manual_seed(0)
    bare = build_sam(narrowed(CONFIGS["blsam_vit_t"], 0), image_size=256).image_encoder
    x = torch.randn(1, 16, 16, 192)
    found = CHOICES["residual"](Scene(bare, 0, x, x, torch.zeros(1, 16, 16), None, 0))
    expected = torch.zeros(1, 16, 16)
    for i in (1, 2, 3):
        a = x + bare.blocks[i].attention(x)
        b = a + bare.blocks[i].feed_forward(a)
        expected += ((a - x) ** 2).sum(-1) + ((b - a) ** 2).sum(-1)
        x = b
    assert torch.allclose(found, expected, rtol=1e-4)
