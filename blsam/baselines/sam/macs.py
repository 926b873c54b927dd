"""How many tokens the methods of this package compute in SAM's encoder, and what that costs, from its configuration.

Multiply-adds are counted as in `modeling.macs`: linear layers, convolutions, attention products, relative positions;
padded keys of partial windows count. Which tokens a window keeps depends on the image: here each keeps the same share,
and all extra tokens are there. Scores cost nothing beside the attention that they are read from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from ...config import EncoderConfig, EViTRule, EvoViTRule, SparseRule
from ...modeling.macs import attention_macs, encoder_ends, encoder_macs
from ...modeling.windows import PATCH, num_windows, window_shapes


def config_macs(
    config: EncoderConfig,
    image_size: int = 1024,
    keep_ratio: float | None = None,
    true_size: tuple[int, int] | None = None,
) -> int:
    """MACs of any encoder of this package for one image; keep_ratio None: the model's own. `true_size` as
    `encoder_macs`, with no effect on the methods of this package: they keep as many tokens of any image."""
    keep_ratio = config.keep_ratio if keep_ratio is None else keep_ratio
    if config.rule is None:
        return encoder_macs(config, image_size, keep_ratio, true_size)
    return reduced_macs(config, image_size, keep_ratio)


def reduced_macs(config: EncoderConfig, image_size: int, keep_ratio: float) -> int:
    """MACs of a method for one image."""
    if keep_ratio >= 1:
        return encoder_macs(config.dense, image_size)
    side, rule = image_size // PATCH, config.rule
    if isinstance(rule, SparseRule):
        of_layers = [sparse_layer_macs(config, i, side, keep_ratio, rule) for i in range(config.depth)]
    elif isinstance(rule, EViTRule):
        layers = evit_layers(config, side * side, keep_ratio, rule)
        of_layers = [layer_macs(config, i, side, tokens) for i, tokens in enumerate(layers)]
    elif isinstance(rule, EvoViTRule):
        layers = evo_layers(config, side * side, keep_ratio, rule)
        of_layers = [layer_macs(config, i, side, tokens) for i, tokens in enumerate(layers)]
    else:
        raise ValueError(f"{config.name} has no rule")
    return encoder_ends(config, side * side) + sum(of_layers)


# --- EViT and Evo-ViT ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of the grid, and extra ones of each window, in attention and in the feed-forward part of a layer."""

    attention: int
    feed_forward: int
    extra: int = 0
    extra_feed_forward: int = 0


def kept_of(n: int, keep_ratio: float) -> int:
    """EViT: how many of n tokens stay."""
    return math.ceil(keep_ratio * n - 1e-9)  # 0.55 * 100 is a little more than 55


def slow_of(n: int, keep_ratio: float) -> int:
    """Evo-ViT: how many of n tokens are slow."""
    return max(1, math.floor(keep_ratio * n + 1e-9))  # 0.29 * 100 is a little less than 29


def evit_layers(config: EncoderConfig, tokens: int, keep_ratio: float, rule: EViTRule) -> Iterator[LayerTokens]:
    n, extra = tokens, 0
    for i in range(config.depth):
        before, extra_before = n, extra
        if i in config.global_layers[:-1]:
            n, extra = kept_of(n, keep_ratio), int(rule.fuse)
        yield LayerTokens(before, n, extra_before, extra)


def evo_layers(config: EncoderConfig, tokens: int, keep_ratio: float, rule: EvoViTRule) -> Iterator[LayerTokens]:
    n, extra = slow_of(tokens, keep_ratio), int(rule.rep)
    for i in range(config.depth):
        yield LayerTokens(n, n, extra, extra) if i > config.global_layers[0] else LayerTokens(tokens, tokens)


def layer_macs(config: EncoderConfig, layer: int, side: int, tokens: LayerTokens) -> int:
    """A layer whose tokens meet one another: those of their window and its padding, or all."""
    dim, shapes = config.dim, window_shapes(side, side, config.window)
    asked, fed = (
        n + len(shapes) * extra
        for n, extra in ((tokens.attention, tokens.extra), (tokens.feed_forward, tokens.extra_feed_forward))
    )
    if config.is_global(layer):
        reach, pairs = (side, side), asked**2
    else:
        share, reach = Fraction(tokens.attention, side * side), (config.window, config.window)
        of_window = [(share * h * w + tokens.extra, math.prod(reach) - h * w) for h, w in shapes]
        pairs = round(sum(n * (n + padding) for n, padding in of_window))
    return attention_macs(asked, asked, reach, dim, dim, pairs) + 8 * fed * dim**2


# --- few keys --------------------------------------------------------------------------------------------------------

BLOCKS = {True: 64, False: 4}  # of the order of an image, of a window


def keys_of(n: int, keep_ratio: float, over_image: bool) -> tuple[int, int]:
    """Of n tokens of an image or a window: how many answer all, in whole blocks, and how many make a block."""
    block = max(1, n // BLOCKS[over_image])
    return block * max(1, math.floor(keep_ratio * n / block + 1e-9)), block


def fed_of(n: int, keep_ratio: float) -> int:
    """How many of n tokens go through the feed-forward part of a window layer."""
    return max(1, math.floor(keep_ratio * n + 0.5))


def sparse_layer_macs(config: EncoderConfig, layer: int, side: int, keep_ratio: float, rule: SparseRule) -> int:
    """A layer in which few keys answer; padding asks, too."""
    dim, tokens, over_image = config.dim, side * side, config.is_global(layer)
    reach = side if over_image else config.window
    windows = 1 if over_image else math.prod(num_windows(side, side, reach))
    n = reach * reach
    first, block = keys_of(n, keep_ratio, over_image)
    if rule.wide == "prime":
        pairs = first * n + (n - first) * first
    else:
        blocks, part = divmod(n - first, block)
        pairs = n * first + blocks * block**2 + part**2
    fed = tokens if over_image or layer < config.global_layers[0] else fed_of(tokens, keep_ratio)
    of_windows = windows * (n * dim * 2 * reach + 2 * pairs * dim)  # positions, both products
    return 4 * tokens * dim**2 + of_windows + 8 * fed * dim**2
