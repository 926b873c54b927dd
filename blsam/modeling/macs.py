"""Multiply-adds of an image encoder or a classifier, from its configuration alone.

Counted: linear layers, convolutions and attention products, relative positions included; not counted: norms, softmax,
activations, sorting, gathering. Padded keys of partial windows count (w*w keys a window), padded queries do not. For
a batch of one; agrees with torch's FlopCounterMode / 2.
"""

from __future__ import annotations

from ..config import OUT_CHANNELS, ClassifierConfig, EncoderConfig
from . import windows as win
from .routing import keep_count


def encoder_macs(
    config: EncoderConfig,
    image_size: int = 1024,
    keep_ratio: float = 0.25,
    true_size: tuple[int, int] | None = None,
) -> int:
    """MACs of this package's encoder for one image; `true_size` (h, w) in pixels as in `ImageEncoder.forward`."""
    side = image_size // win.PATCH
    tokens, dim, w = side * side, config.dim, config.window
    real = win.real_counts(side, side, w, true_size or (image_size, image_size))
    prime = [keep_count(n, keep_ratio) for n in real]

    total = encoder_ends(config, tokens)
    for layer in range(config.depth):
        reach = (side, side) if config.is_global(layer) else (w, w)
        queries = tokens
        if config.stage_of(layer) is None or keep_ratio >= 1:
            total += attention_macs(tokens, tokens, reach, dim, dim)
        else:
            queries = sum(prime)
            if config.semi_cross:
                total += attention_macs(queries, tokens, reach, dim, dim)
            else:
                total += attention_macs(queries, queries, reach, dim, dim, _pairs(prime, config.is_global(layer)))
        total += queries * 8 * dim * dim
        if config.has_e_block(layer):
            e = config.e_dim
            met = win.num_windows(*reach, config.e_pool_of(layer))  # rows and columns of keys
            total += attention_macs(tokens, tokens, met, dim, e) + tokens * (2 * dim * e + 8 * e * e)
        if layer in config.predictor_layers:
            total += tokens * dim * 2
    return total


def sam_macs(config: EncoderConfig, image_size: int = 1024) -> int:
    """MACs of a dense encoder as `segment_anything` computes it: padding goes through window layers as if real."""
    side, w, dim = image_size // win.PATCH, config.window, config.dim
    tokens = side * side
    down, across = win.num_windows(side, side, w)
    padded = down * across * w * w
    total = encoder_ends(config, tokens)
    for layer in range(config.depth):
        if config.is_global(layer):
            total += attention_macs(tokens, tokens, (side, side), dim, dim)
        else:
            total += attention_macs(padded, padded, (w, w), dim, dim)
        total += tokens * 8 * dim * dim
    return total


def classifier_macs(config: ClassifierConfig, image_size: int | None = None, keep_ratio: float = 0.25) -> int:
    """MACs of a classifier for one image of image_size x image_size pixels (None: the preset's)."""
    patches = ((image_size or config.image_size) // config.patch) ** 2
    total = classifier_ends(config, patches)
    for layer in range(config.depth):
        queries = 1 + patches
        if config.stage_of(layer) is not None and keep_ratio < 1:
            queries = 1 + keep_count(patches, keep_ratio)
        e_dim = config.e_dim if config.has_e_block(layer) else 0
        total += sequence_layer(config.dim, 1 + patches, queries, e_dim, config.semi_cross)
        if layer in config.predictor_layers:
            total += patches * config.dim * 2
    return total


def classifier_ends(config: ClassifierConfig, patches: int) -> int:
    """Patch embedding and head of a classifier."""
    return patches * 3 * config.patch**2 * config.dim + config.classes * config.dim


def sequence_layer(dim: int, tokens: int, queries: int, e_dim: int = 0, semi_cross: bool = True) -> int:
    """A layer on a sequence without relative positions, `queries` of its tokens prime: 12 n C^2 + 2 n^2 C with all n of
    them and no narrow block (e_dim 0)."""
    keys = tokens if semi_cross else queries
    total = attention_macs(queries, keys, (0, 0), dim, dim, queries * keys) + queries * 8 * dim * dim
    if e_dim:
        total += attention_macs(tokens, tokens, (0, 0), dim, e_dim, tokens * tokens)
        total += tokens * (2 * dim * e_dim + 8 * e_dim * e_dim)
    return total


def encoder_ends(config: EncoderConfig, tokens: int) -> int:
    """Patch embedding and neck."""
    grown = config.grow**2 if config.grow > 1 else 0
    return tokens * (3 * win.PATCH**2 * config.dim + config.dim * OUT_CHANNELS + (9 + grown) * OUT_CHANNELS**2)


def attention_macs(
    queries: int, keys: int, reach: tuple[int, int], dim: int, inner: int, pairs: int | None = None
) -> int:
    """Projections, relative positions and both products; every query meets all keys of its reach unless pairs says."""
    projections = 2 * queries * dim * inner + 2 * keys * dim * inner
    positions = queries * inner * (reach[0] + reach[1])
    pairs = queries * reach[0] * reach[1] if pairs is None else pairs
    return projections + positions + 2 * pairs * inner


def _pairs(prime: list[int], is_global: bool) -> int:
    return sum(prime) ** 2 if is_global else sum(k * k for k in prime)
