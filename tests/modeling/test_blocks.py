"""Blocks and their fusion: what a token that is never prime goes through."""

from dataclasses import replace

import pytest
import timm.models.vision_transformer as vit
import torch
import torch.nn.functional as F

from blsam.modeling.blocks import Block, EBlock, RoutedBlock
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.routing import Group, Queries, Stage
from tests.helpers import TINY, TINY_SIZE, gap, images, randomize


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


class PlainAttention(torch.nn.Module):
    """Attention of a ViT, without positions or windows, over a sequence that may begin with a class token."""

    window = 0

    def __init__(self, dim, inner, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, torch.nn.Linear(dim, 3 * inner), torch.nn.Linear(inner, dim)

    def forward(self, x, queries=None):
        b = len(x)
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [B, n, ...] -> [3, B, heads, n, d]
        if queries is not None:  # the same number in every image
            places = (queries.tokens % x.shape[1]).view(b, 1, -1, 1).expand(-1, self.heads, -1, q.shape[-1])
            q = q.gather(2, places)
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y if queries is None else y.flatten(0, 1)


@torch.no_grad()
def test_a_block_takes_another_attention():
    reference = randomize(vit.Block(32, 4, qkv_bias=True))
    block = Block(32, PlainAttention(32, 32, 4))
    names = {"mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"}
    weights = {}
    for key in block.state_dict():
        of, kind = key.rsplit(".", 1)
        weights[key] = reference.state_dict()[f"{names.get(of, of)}.{kind}"]
    block.load_state_dict(weights)
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))  # 16 tokens and one of the class
    assert gap(block(x), reference(x)) < 1e-5, gap(block(x), reference(x))


@torch.no_grad()
def test_a_routed_block_takes_another_attention():
    torch.manual_seed(0)
    e_block = EBlock(32, 8, PlainAttention(32, 8, 2))
    block = randomize(RoutedBlock(32, PlainAttention(32, 32, 4), e_block))
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    tokens, mask = torch.tensor([0, 3, 9, 17, 19, 33]), torch.zeros(2, 17, dtype=torch.bool)
    mask.view(-1)[tokens] = True
    scores = torch.rand(2, 17, generator=torch.Generator().manual_seed(1))
    prime = Queries(tokens, (Group(0, slice(0, 2), 2, 3),), tokens % 17, tokens % 17)
    found = block(x, Stage(mask, scores, mask.sum(1, keepdim=True), image=prime))

    expected, alpha, gamma = x, block.fusion.alpha, block.fusion.gamma
    for i, (wide, narrow) in enumerate(
        ((block.attention, e_block.attention), (block.feed_forward, e_block.feed_forward))
    ):
        given = expected if i == 0 else expected.flatten(0, 1)
        d_p, d_e = wide(given).view(x.shape), narrow(given).view(x.shape)
        fused = d_p * (1 + alpha[i] * scores[..., None]) + gamma[i] * d_e
        expected = expected + torch.where(mask[..., None], fused, d_e)
    assert gap(found, expected) < 1e-5, gap(found, expected)


def test_without_gamma_prime_tokens_take_nothing_of_the_narrow_block():
    """The others do; with gamma at zero it is the same."""
    with_gamma, without = (randomize(ImageEncoder(replace(TINY, gamma=gamma), TINY_SIZE)) for gamma in (True, False))
    without.load_state_dict({k: v for k, v in with_gamma.state_dict().items() if not k.endswith("gamma")})
    with torch.no_grad():
        for block in with_gamma.blocks:
            if getattr(block, "fusion", None) is not None and block.fusion.gamma is not None:
                block.fusion.gamma.zero_()
    x = images()
    assert torch.equal(with_gamma(x), without(x))
    assert not any(name.endswith("gamma") for name, _ in without.named_parameters())
