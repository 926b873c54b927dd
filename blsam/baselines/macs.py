"""Multiply-adds of a ViT whose layers compute different numbers of tokens, counted as in `modeling.macs`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import ClassifierConfig
from ..modeling.macs import classifier_ends


@dataclass(frozen=True)
class LayerTokens:
    """How many tokens, class token and fused ones included, go into attention and into the feed-forward part of a
    layer; class_row: whether the class token's row of attention is computed beside."""

    attention: int
    feed_forward: int
    class_row: bool = False


def layers_macs(config: ClassifierConfig, patches: int, layers: Iterable[LayerTokens]) -> int:
    """MACs of a plain ViT with these layers, for one image."""
    return classifier_ends(config, patches) + sum(layer_macs(config.dim, layer) for layer in layers)


def layer_macs(dim: int, layer: LayerTokens) -> int:
    """4 n C^2 + 2 n^2 C of attention, 8 m C^2 of the feed-forward part, n C of the class token's row."""
    n, m = layer.attention, layer.feed_forward
    return 4 * n * dim**2 + 2 * n**2 * dim + 8 * m * dim**2 + (n * dim if layer.class_row else 0)
