"""Blocks and their fusion: what a token that is never prime goes through."""

from dataclasses import replace

import pytest
import torch

from blsam.modeling.image_encoder import ImageEncoder
from tests.helpers import TINY, TINY_SIZE, images


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.7])
@torch.no_grad()
def test_without_e_blocks_tokens_never_prime_pass_unchanged(keep):
    encoder = ImageEncoder(replace(TINY, e_block=False), TINY_SIZE).eval()
    seen = {}
    encoder.blocks[1].register_forward_pre_hook(lambda _, args: seen.update(entered=args[0]))
    encoder.blocks[-1].register_forward_hook(lambda _, __, out: seen.update(left=out))
    _, routing = encoder.encode(images(), keep_ratio=keep)
    never = ~torch.stack([stage.mask for stage in routing.stages]).any(0)
    assert never.any() and torch.equal(seen["entered"][never], seen["left"][never])
    assert not torch.equal(seen["entered"][~never], seen["left"][~never])


@pytest.mark.parametrize("fuse", ["sublayer", "block"])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
@torch.no_grad()
def test_fresh_e_blocks_leave_tokens_never_prime_unchanged(keep, fuse):
    torch.manual_seed(0)
    encoder = ImageEncoder(replace(TINY, fuse=fuse), TINY_SIZE).eval()
    seen = {}
    encoder.blocks[1].register_forward_pre_hook(lambda _, args: seen.update(entered=args[0]))
    encoder.blocks[-1].register_forward_hook(lambda _, __, out: seen.update(left=out))
    _, routing = encoder.encode(images(2), true_sizes=[(120, 160), (160, 100)], keep_ratio=keep)
    never = ~torch.stack([stage.mask for stage in routing.stages]).any(0)
    assert never.any() and (~never).any()
    difference = (seen["entered"] - seen["left"]).abs().amax(-1)
    assert difference[never].max() == 0, f"a token never prime moved by {difference[never].max():.1e}"
    assert difference[~never].min() > 0, "a prime token did not move"
