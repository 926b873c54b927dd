"""Multiply-adds of a ViT whose layers compute different numbers of tokens, counted as in `modeling.macs`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..config import ClassifierConfig
from ..modeling.macs import classifier_ends

Count = Any  # int of every image, or int64 [B] of those of a pass


@dataclass(frozen=True)
class LayerTokens:
    """How many tokens, class token and fused ones included, go into attention and into the feed-forward part of a
    layer.

    class_row: whether the class token's row of attention is computed beside. queries: tokens whose rows attention
    computes; None: all. width: channels of the heads that are computed; None: all. more: multiply-adds of what else
    the method does in the layer (predictors, matching).
    """

    attention: Count
    feed_forward: Count
    class_row: bool = False
    queries: Count | None = None
    width: Count | None = None
    more: Count = 0


def layers_macs(config: ClassifierConfig, patches: int, layers: Iterable[LayerTokens]) -> Count:
    """MACs of a plain ViT with these layers, for one image or for each of a pass."""
    return classifier_ends(config, patches) + sum(layer_macs(config.dim, layer) for layer in layers)


def layer_macs(dim: int, layer: LayerTokens) -> Count:
    """With all rows and heads 4 n C^2 + 2 n^2 C of attention, 8 m C^2 of the feed-forward part; n C of the class
    token's row."""
    n, m = layer.attention, layer.feed_forward
    queries = n if layer.queries is None else layer.queries
    width = dim if layer.width is None else layer.width
    attention = 3 * n * dim * width + 2 * queries * n * width + queries * width * dim
    feed_forward = m * (4 * width * dim + 4 * dim**2)
    return attention + feed_forward + (n * dim if layer.class_row else 0) + layer.more
