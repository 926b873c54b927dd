"""Cellpose-SAM: SAM's encoder taken apart: smaller patches, another grid, attention over the whole image everywhere."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

PATCH, SIDE = 8, 16  # its patches in pixels, its grid in patches


def taken_apart(encoder):
    """As Cellpose does it: new patches, positions of another grid, no windows."""
    w = encoder.patch_embed.proj.weight.detach()
    encoder.patch_embed.proj = nn.Conv2d(3, w.shape[0], stride=PATCH, kernel_size=PATCH)
    encoder.patch_embed.proj.weight.data = w[:, :, :: 16 // PATCH, :: 16 // PATCH]
    encoder.patch_embed.proj.bias.data.zero_()
    encoder.pos_embed = nn.Parameter(encoder.pos_embed[:, :SIDE, :SIDE], requires_grad=True)
    for block in encoder.blocks:
        block.window_size = 0
    return encoder


def run(encoder, x):
    x = F.conv2d(x, encoder.patch_embed.proj.weight.data, bias=encoder.patch_embed.proj.bias.data, stride=PATCH)
    x = x.permute(0, 2, 3, 1)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    for block in encoder.blocks:
        x = block(x)
    return encoder.neck(x.permute(0, 3, 1, 2))


def picture(batch=2):
    return torch.rand(batch, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(0))


def test_global_attention_on_another_grid(exact):
    def program(side):
        encoder = taken_apart(side.build().image_encoder)
        with torch.no_grad():
            return run(encoder, picture()), encoder.neck[-2].weight.shape[0]

    exact.compare(program)


def test_it_learns(exact):
    def program(side):
        encoder = taken_apart(side.build().image_encoder)
        run(encoder, picture(1)).square().mean().backward()
        return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}

    found, expected = program(exact.ours), program(exact.stock)
    assert set(found) == set(expected)
    for name, gradient in expected.items():  # through twelve layers of float32
        gap = (found[name] - gradient).abs().max() / gradient.std()
        assert gap <= 1e-2, f"{name}: {gap:.1e}"


def test_in_bfloat16(exact):
    def program(side):
        encoder = taken_apart(side.build().image_encoder).to(torch.bfloat16)
        with torch.no_grad():
            return run(encoder, picture().to(torch.bfloat16)).float()

    found, expected = program(exact.ours), program(exact.stock)
    gap = (found - expected).abs().mean() / expected.std()
    assert gap <= 0.05, f"{gap:.1e}"


@pytest.mark.parametrize("window", [0, 5])
def test_windows_may_be_changed(exact, window):
    """SAM resamples the tables of relative positions to whatever they meet."""

    def program(side):
        encoder = side.build().image_encoder
        for block in encoder.blocks[:3]:
            block.window_size = window
        x = torch.rand(1, 18, 12, 192, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for block in encoder.blocks[:4]:
                x = block(x)
        return x

    exact.compare(program)


def test_a_changed_model_can_be_copied(exact):
    def program(side):
        encoder = copy.deepcopy(taken_apart(side.build().image_encoder))
        with torch.no_grad():
            return run(encoder, picture(1)), [block.window_size for block in encoder.blocks]

    exact.compare(program)


def test_a_routed_block_by_hand_says_what_it_needs(both):
    encoder = both("blsam_vit_t").ours.build().image_encoder
    x = torch.rand(1, 20, 20, 192)
    with torch.no_grad():
        assert encoder.blocks[0](x).shape == x.shape  # before the first predictor, all tokens
        with pytest.raises(RuntimeError, match="stage"):
            encoder.blocks[1](x)
