"""Layers that others have wrapped, hooked, quantised or cast: called as modules, with what SAM gives and takes."""

import copy
from dataclasses import replace

import pytest
import segment_anything.modeling.image_encoder as sa
import torch
from torch import nn

from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.layers import is_plain
from scripts.benchmarks.benchmark_row import reference_encoder
from tests.helpers import TINY, TINY_EXACT, TINY_SIZE, gap, images, randomize, tiny


@pytest.fixture(scope="module")
def pair():
    """segment_anything's encoder and ours, with its weights."""
    reference = randomize(reference_encoder(TINY_EXACT, TINY_SIZE))
    ours = ImageEncoder(TINY_EXACT, TINY_SIZE).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


class LoRA(nn.Module):
    """As fine-tuning tools wrap `qkv`: called with [B, H, W, dim], cut along the last dimension."""

    def __init__(self, qkv, dim):
        super().__init__()
        generator = torch.Generator().manual_seed(dim)
        self.wrapped, self.dim = qkv, dim
        self.down = nn.Parameter(0.1 * torch.randn(dim, 4, generator=generator))
        self.up = nn.Parameter(0.1 * torch.randn(4, dim, generator=generator))

    def forward(self, x):
        qkv = self.wrapped(x)
        qkv[:, :, :, : self.dim] += x @ self.down @ self.up
        return qkv


@torch.no_grad()
def test_a_wrapped_projection_is_called_as_in_sam(pair):
    pair = copy.deepcopy(pair)
    plain = pair[1](images())
    for encoder in pair:
        for block in encoder.blocks:
            block.attn.qkv = LoRA(block.attn.qkv, TINY_EXACT.dim)
    reference, ours = (encoder(images()) for encoder in pair)
    assert gap(plain, reference) > 0.01, "the wrapper does nothing"
    assert gap(ours, reference) <= 1e-4, gap(ours, reference)


@torch.no_grad()
def test_a_wrapper_that_does_nothing_changes_nothing_where_tokens_are_chosen():
    for changes in ({}, {"semi_cross": False}):
        encoder = tiny(replace(TINY, **changes))
        sizes = [(120, 160), (160, 100)]
        plain, routing = encoder.encode(images(2), true_sizes=sizes)
        for module in list(encoder.modules()):
            if isinstance(module, sa.Attention):
                module.qkv = nn.Sequential(module.qkv)
        wrapped = encoder.encode(images(2), true_sizes=sizes, routing=routing)[0]
        assert gap(wrapped, plain) <= 1e-5, f"{changes}: {gap(wrapped, plain):.1e}"


@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda config: config.name)
@torch.no_grad()
def test_hooks_see_every_layer_once(config):
    encoder, calls = tiny(config), {}

    def hook(name):
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    layers = {
        name for name, module in encoder.named_modules() if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d)
    }
    for name in layers:
        encoder.get_submodule(name).register_forward_hook(hook(name))
    encoder(images())
    assert calls == dict.fromkeys(layers, 1)


@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda config: config.name)
@torch.no_grad()
def test_quantised_layers_are_used(config):
    encoder = tiny(config)
    plain, routing = encoder.encode(images())
    quantised = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8)
    assert not is_plain(quantised.blocks[0].attn.qkv)
    found = quantised.encode(images(), routing=routing)[0]
    cosine = torch.cosine_similarity(found, plain, dim=1).mean()
    assert 0.98 < cosine < 0.99999, f"cosine {cosine}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda config: config.name)
@torch.no_grad()
def test_a_model_that_was_cast_runs_in_what_it_was_cast_to(config, dtype):
    encoder = tiny(config)
    plain, routing = encoder.encode(images(2))
    cast = copy.deepcopy(encoder).to(dtype)
    found, of_cast = cast.encode(images(2).to(dtype), routing=routing)
    assert found.dtype == dtype
    assert all(stage.scores.dtype == torch.float32 for stage in of_cast.stages)
    cosine = torch.cosine_similarity(found.double(), plain.double(), dim=1).mean()
    assert cosine > 0.999, f"cosine {cosine}"
    cast(images(2).to(dtype))  # choosing for itself


@torch.no_grad()
def test_cast_as_segment_anything(pair):
    reference, ours = (copy.deepcopy(encoder).to(torch.bfloat16) for encoder in pair)
    x = images().to(torch.bfloat16)
    found, expected = ours(x), reference(x)
    assert found.dtype == expected.dtype and found.is_contiguous() == expected.is_contiguous()
    assert torch.cosine_similarity(found.float(), expected.float(), dim=1).mean() > 0.999


def test_what_is_plain():
    layer = nn.Linear(4, 4)
    assert is_plain(layer)
    assert not is_plain(nn.Linear(4, 4, bias=False)) and not is_plain(nn.Sequential(layer))
    layer.register_forward_hook(lambda *_: None)
    assert not is_plain(layer)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert not is_plain(layer)


def test_blocks_are_segment_anythings_to_programs_that_ask(pair):
    ours = pair[1]
    assert isinstance(ours, sa.ImageEncoderViT) and isinstance(ours.blocks[0], sa.Block)
    assert isinstance(ours.blocks[0].attn, sa.Attention)
    for mine, theirs in zip(ours.blocks, pair[0].blocks):
        assert mine.window_size == theirs.window_size
        assert (mine.attn.num_heads, mine.attn.scale) == (theirs.attn.num_heads, theirs.attn.scale)


@pytest.mark.parametrize("window", [0, 4, 14])
@torch.no_grad()
def test_window_size_may_be_set(pair, window):
    pair = copy.deepcopy(pair)
    for encoder in pair:
        for block in encoder.blocks:
            block.window_size = window
    reference, ours = (encoder(images()) for encoder in pair)
    assert gap(ours, reference) <= 1e-4, gap(ours, reference)


@pytest.mark.parametrize("grid", [(5, 5), (10, 6), (16, 16)])
@torch.no_grad()
def test_blocks_by_hand_on_another_grid(pair, grid):
    x = torch.randn(2, *grid, TINY_EXACT.dim, generator=torch.Generator().manual_seed(0))
    for number, (theirs, mine) in enumerate(zip(pair[0].blocks, pair[1].blocks)):
        assert gap(mine(x), theirs(x)) <= 1e-4, f"block {number}: {gap(mine(x), theirs(x)):.1e}"


@torch.no_grad()
def test_attention_by_hand_on_windows(pair):
    for theirs, mine in zip(pair[0].blocks, pair[1].blocks):
        x = torch.randn(2, 10, 10, TINY_EXACT.dim, generator=torch.Generator().manual_seed(0))
        windows = sa.window_partition(x, 7)[0] if theirs.window_size else x
        found, expected = mine.attn(windows), theirs.attn(windows)
        assert found.shape == expected.shape and gap(found, expected) <= 1e-4


@torch.no_grad()
def test_patches_and_positions_may_be_replaced(pair):
    """As Cellpose-SAM does, for another grid and global attention everywhere."""
    pair = copy.deepcopy(pair)
    for encoder in pair:
        torch.manual_seed(0)
        encoder.patch_embed.proj = nn.Conv2d(3, TINY_EXACT.dim, kernel_size=8, stride=8)
        encoder.pos_embed = nn.Parameter(encoder.pos_embed[:, :8, :8] + 0)
        for block in encoder.blocks:
            block.window_size = 0
    x = images(size=64)
    assert gap(pair[1](x), pair[0](x)) <= 1e-4, gap(pair[1](x), pair[0](x))
    with pytest.raises(ValueError, match=r"must be \[B, 3, 64, 64\]"):
        pair[1](images())


def test_a_routed_block_by_hand_says_what_it_needs():
    block = tiny().blocks[1]
    with pytest.raises(RuntimeError, match=r"needs the choice .* block\.dense"):
        block(torch.zeros(1, 10, 10, TINY.dim))
    block.window_size = block.window_size
    with pytest.raises(ValueError, match="window_size of a routed block"):
        block.window_size = 4


@torch.no_grad()
def test_padding_is_found_where_no_extents_are_given():
    encoder, sizes = tiny(), [(120, 160), (160, 100), (40, 30), (160, 160)]
    x = images(4)
    for image, (h, w) in zip(x, sizes):
        image[:, h:] = 0
        image[:, :, w:] = 0
    found, by_itself = encoder.encode(x)
    expected, told = encoder.encode(x, true_sizes=sizes)
    for a, b in zip(by_itself.stages, told.stages):
        assert torch.equal(a.mask, b.mask)
    assert gap(found, expected) <= 1e-6
    assert encoder.encode(torch.zeros(1, 3, 160, 160))[1].stages[0].counts.sum() > 4, "an empty photo is whole"


def test_sams_state_loads_strictly_and_warm_starts(pair):
    state = pair[0].state_dict()
    torch.manual_seed(0)
    routed = ImageEncoder(TINY, TINY_SIZE)
    before = {name: value.clone() for name, value in routed.state_dict().items()}
    routed.load_state_dict(state)
    for name, value in routed.state_dict().items():
        assert torch.equal(value, state[name] if name in state else before[name]), name
    with torch.no_grad():
        assert gap(routed.eval()(images(), keep_ratio=1), pair[0](images())) <= 1e-4
    lacking = {k: v for k, v in state.items() if k != "pos_embed"}
    with pytest.raises(RuntimeError, match="pos_embed"):
        routed.load_state_dict(lacking)
    own = {k: v for k, v in routed.state_dict().items() if k != "predictors.0.linear.bias"}
    with pytest.raises(RuntimeError, match=r"predictors\.0\.linear\.bias"):
        routed.load_state_dict(own)


@torch.no_grad()
def test_other_patches_and_no_positions(pair):
    pair = copy.deepcopy(pair)
    for encoder in pair:
        torch.manual_seed(0)
        encoder.patch_embed = nn.Sequential(nn.Conv2d(3, 64, 16, 16), nn.Flatten(2), Grid())
        encoder.pos_embed = None
    for size in (160, 96):
        assert gap(pair[1](images(size=size)), pair[0](images(size=size))) <= 1e-4


class Grid(nn.Module):
    def forward(self, x):
        side = round(x.shape[2] ** 0.5)
        return x.unflatten(2, (side, side)).permute(0, 2, 3, 1)
