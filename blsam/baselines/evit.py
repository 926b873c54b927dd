"""EViT: patches that the class token overlooks are fused into one (Liang et al., ICLR 2022, arXiv 2202.07800).

In a few blocks, between attention and the feed-forward part, k = ceil(r * others) tokens stay, those with the highest
class attention a (mean over heads). What is dropped becomes one token, sum a_i x_i, which competes with the rest in the
next such block. The weights are the attention itself, not normalised, in the paper and in its code. No parameters, no
loss; training and inference remove alike, and gradients reach x and a, not the choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import ClassifierConfig
from .base import Baseline, BaselineOptions, Projected, Tokens, gather, weighted_sum
from .macs import LayerTokens

START, SPAN = 10 / 300, 100 / 300  # of a training: where the keep ratio begins to fall, and for how long


@dataclass(frozen=True)
class EViTOptions(BaselineOptions):
    """keep_ratio: the paper's r, of the tokens beside the class token that reach a block of `drop_layers`; 1: all.
    fuse: what is dropped into one token; False: it vanishes. schedule: keep all at first, as in training from scratch
    (`scheduled_ratio`); False: r from the first step, as in fine-tuning."""

    keep_ratio: float = 0.7
    drop_layers: tuple[int, ...] = (3, 6, 9)
    fuse: bool = True
    schedule: bool = False


class EViT(Baseline):
    """A ViT with EViT's token reorganisation. Attributes: `ratio`, at which training is (see `begin_epoch`)."""

    Options = EViTOptions
    options: EViTOptions

    def __init__(self, config: ClassifierConfig, options: EViTOptions | None = None, **vit: Any) -> None:
        super().__init__(config, options, **vit)
        if not set(self.options.drop_layers) <= set(range(config.depth)):
            raise ValueError(f"drop_layers must lie in 0 ... {config.depth - 1}, are {self.options.drop_layers}")
        self.ratio = self.options.keep_ratio
        self.begin_epoch(0, 1)

    def begin_epoch(self, epoch: float, epochs: float) -> None:
        if self.options.schedule:
            self.ratio = scheduled_ratio(epoch, epochs, self.options.keep_ratio)

    def between(self, i: int, tokens: Tokens, projected: Projected) -> Tokens:
        others = tokens.x.shape[1] - 1
        count = self.count(i, others, self.ratio if self.training else self.options.keep_ratio)
        if count == others:
            return tokens
        attention = projected.class_attention().mean(dim=1)[:, 1:]  # of all but the class token itself
        x, kept = reorganise(tokens.x, attention, count, self.options.fuse)
        places = tokens.places.gather(1, kept)
        if self.options.fuse:
            places = torch.cat([places, torch.full_like(places[:, :1], -1)], dim=1)
        return replace(tokens, x=x, places=places)

    def count(self, i: int, others: int, ratio: float) -> int:
        """How many of the tokens beside the class token stay in block i."""
        if i not in self.options.drop_layers:
            return others
        return math.ceil(ratio * others - 1e-9)  # 0.55 * 100 is a little more than 55

    def layer_tokens(self) -> list[LayerTokens]:
        found, others = [], self.patches
        for i in range(len(self.blocks)):
            before, count = others, self.count(i, others, self.options.keep_ratio)
            if count < before:
                others = count + self.options.fuse
            found.append(LayerTokens(1 + before, 1 + others, class_row=count < before))
        return found


def reorganise(
    x: torch.Tensor, attention: torch.Tensor, count: int, fuse: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the class token and `count` of the others.

    x [B, 1 + m, C], the class token's attention to the others [B, m] -> tokens [B, 1 + count (+ 1), C], by falling
    attention, the fused one last, and which of x stayed [B, 1 + count] int64.
    """
    order = attention.detach().argsort(dim=1, descending=True, stable=True)
    stay, leave = order[:, :count], order[:, count:]
    kept = torch.cat([torch.zeros_like(order[:, :1]), 1 + stay], dim=1)
    found = [gather(x, kept)]
    if fuse:
        found.append(weighted_sum(gather(x, 1 + leave), attention.gather(1, leave)).to(x.dtype))
    return torch.cat(found, dim=1), kept


def scheduled_ratio(epoch: float, epochs: float, keep_ratio: float) -> float:
    """The keep ratio of an epoch: 1 at first, then down a cosine to `keep_ratio`. The paper's epochs 10 to 110 of 300,
    scaled to other lengths (ours)."""
    t = min(max((epoch - START * epochs) / (SPAN * epochs), 0.0), 1.0)
    return keep_ratio + (1 - keep_ratio) * (1 + math.cos(math.pi * t)) / 2
