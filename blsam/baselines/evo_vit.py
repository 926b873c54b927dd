"""Evo-ViT: half of the patches on a slow path, the rest on a fast one (Xu et al., AAAI 2022, arXiv 2108.01390).

Patches are ranked by g, a moving average of the class token's attention. The best run through the block; the others,
placeholders, are summed into one representative token, weighted by g, which runs with them; what the block adds to it
is then added to every placeholder. Nothing is lost: all patches are there where the block ends, in their order.
In training the choice is made anew at every block (layer mode), later and at inference once a stage (stage mode).
The published code of DeiT has no representative token, that of LeViT has: `rep`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import ClassifierConfig
from ..modeling.blocks import NORM_EPS
from ..modeling.classifier import Classified
from ..modeling.layers import input_dtype
from .base import Baseline, BaselineOptions, Projected, Tokens, gather, weighted_sum
from .macs import LayerTokens

MOMENTUM = 0.5  # of the moving average, from the first stage on


@dataclass(frozen=True)
class EvoViTOptions(BaselineOptions):
    """keep_ratio: of the patches, on the slow path; 1: all. stages: their first blocks; those before run on all tokens.
    rep: with a representative token; False: placeholders wait unchanged. layer_mode: share of the epochs in which the
    choice is made at every block (the paper: 200 of 300)."""

    keep_ratio: float = 0.5
    stages: tuple[int, ...] = (4, 8)
    rep: bool = True
    layer_mode: float = 2 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages or list(self.stages) != sorted(set(self.stages)) or self.stages[0] < 1:
            raise ValueError(f"stages must rise and begin at 1 or later, are {self.stages}")


@dataclass(frozen=True)
class Paths:
    """What a pass carries: g [B, n] float32 of the patches in their order; inside a stage also which are slow [B, k]
    and fast [B, n - k] (int64), the latter as they wait [B, n - k, C], and the representative token as it went in
    [B, 1, C]."""

    g: torch.Tensor
    slow: torch.Tensor | None = None
    fast: torch.Tensor | None = None
    waiting: torch.Tensor | None = None
    rep: torch.Tensor | None = None


class EvoViT(Baseline):
    """A ViT with Evo-ViT's slow and fast paths. The answer is read from the mean over all patches.

    Beside a ViT's it has `norm_cls` and `head_cls`, which read the class token in training only; with a plain ViT's
    state they start as copies of its `norm` and `head`. Attributes: `by_layer`, whether training is in layer mode.
    """

    Options = EvoViTOptions
    options: EvoViTOptions

    def __init__(self, config: ClassifierConfig, options: EvoViTOptions | None = None, **vit: Any) -> None:
        super().__init__(config, options, **vit)
        if self.options.stages[-1] >= config.depth:
            raise ValueError(f"stages must begin before block {config.depth}, are {self.options.stages}")
        self.norm_cls = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.head_cls = self._new_head(self.num_classes)
        self.begin_epoch(0, 1)

    def begin_epoch(self, epoch: float, epochs: float) -> None:
        self.by_layer = epoch < self.options.layer_mode * epochs

    # --- where tokens part and meet again ----------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Patches on the slow path."""
        return max(1, math.floor(self.options.keep_ratio * self.patches + 1e-9))  # 0.29 * 100 is a little less than 29

    def choices(self) -> tuple[int, ...]:
        """The blocks before which patches are chosen."""
        if self.count == self.patches:
            return ()
        if self.training and self.by_layer:
            return tuple(range(self.options.stages[0], len(self.blocks)))
        return self.options.stages

    def looks(self, i: int) -> bool:
        """Whether a later choice depends on the class attention of block i."""
        return self.options.stages[0] - 1 <= i < max(self.choices(), default=0)

    def begin(self, x: torch.Tensor) -> Tokens:
        none_yet = x.new_zeros(x.shape[0], x.shape[1] - 1, dtype=torch.float32)
        return replace(super().begin(x), carried=Paths(none_yet))

    def before_block(self, i: int, tokens: Tokens) -> Tokens:
        if i not in self.choices():
            return tokens
        patches, g = tokens.x[:, 1:], tokens.carried.g
        slow, fast = split(g, self.count)
        waiting, found = gather(patches, fast), [tokens.x[:, :1], gather(patches, slow)]
        places, rep = [torch.zeros_like(slow[:, :1]), 1 + slow], None
        if self.options.rep:
            rep = represent(waiting, g.gather(1, fast))
            found.append(rep)
            places.append(torch.full_like(slow[:, :1], -1))
        paths = Paths(g, slow, fast, waiting, rep)
        return replace(tokens, x=torch.cat(found, dim=1), places=torch.cat(places, dim=1), carried=paths)

    def between(self, i: int, tokens: Tokens, projected: Projected) -> Tokens:
        if not self.looks(i):
            return tokens
        paths, g = tokens.carried, projected.class_attention().mean(dim=1)[:, 1:]
        if paths.slow is not None:  # which came first; the representative token has no g
            g = follow(paths.g, paths.slow, g[:, : self.count])
        return replace(tokens, carried=replace(paths, g=g))

    def after_block(self, i: int, tokens: Tokens) -> Tokens:
        paths = tokens.carried
        if paths.slow is None or not (i + 1 == len(self.blocks) or i + 1 in self.choices()):
            return tokens
        waiting = paths.waiting
        if paths.rep is not None:  # what every sublayer since added to it
            waiting = waiting + (tokens.x[:, -1:] - paths.rep)
        patches = in_order(torch.cat([tokens.x[:, 1 : 1 + self.count], waiting], dim=1), paths.slow, paths.fast)
        whole = super().begin(torch.cat([tokens.x[:, :1], patches], dim=1))
        return replace(tokens, x=whole.x, places=whole.places, carried=Paths(paths.g))

    # --- heads -------------------------------------------------------------------------------------------------------

    def finish(self, tokens: Tokens) -> Classified:
        """tokens: all, each through `norm`; in training the loss is half the class token's."""
        logits = self.forward_head(tokens.x)
        heads: tuple[tuple[float, torch.Tensor], ...] = ((1.0, logits),)
        if self.training:
            read = self.head_drop(self.norm_cls(tokens.x[:, 0]))
            heads = (0.5, logits), (0.5, self.head_cls(read.to(input_dtype(self.head_cls))).to(read.dtype))
        return Classified(logits, self.norm(tokens.x), tokens.places, heads, tokens.losses)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """As timm's where the mean is read: tokens [B, 1 + n, C], not normalised yet."""
        return self.walk(self.stem(x)).x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """As timm's where the mean is read: tokens [B, 1 + n, C], not normalised -> logits [B, classes]."""
        x = self.head_drop(self.norm(x[:, 1:].mean(dim=1)))
        return x if pre_logits else self.head(x.to(input_dtype(self.head))).to(x.dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_cls = self._new_head(num_classes).to(self.cls_token.device)

    def complete(self, state: dict[str, Any], prefix: str = "") -> None:
        super().complete(state, prefix)
        own = [name for name in self.state_dict() if name.startswith(("norm_cls.", "head_cls."))]
        if any(prefix + name in state for name in own):
            return
        for name in own:
            plain = prefix + name.replace("_cls.", ".")
            if plain in state:
                state[prefix + name] = state[plain].clone()

    def layer_tokens(self) -> list[LayerTokens]:
        first, last = self.options.stages[0], self.options.stages[-1]
        if self.count == self.patches:
            return super().layer_tokens()
        inside = 1 + self.count + self.options.rep
        sizes = [1 + self.patches if i < first else inside for i in range(len(self.blocks))]
        return [LayerTokens(n, n, class_row=first - 1 <= i < last) for i, n in enumerate(sizes)]


def split(g: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches are slow, those with the highest g [B, n], and which fast: [B, count] and [B, n - count] int64."""
    order = g.detach().argsort(dim=1, descending=True, stable=True)
    return order[:, :count], order[:, count:]


def represent(waiting: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The placeholders' representative token: waiting [B, m, C], their g [B, m] -> sum g_i x_i / sum g, [B, 1, C]."""
    return weighted_sum(waiting, g / g.sum(dim=1, keepdim=True)).to(waiting.dtype)


def follow(g: torch.Tensor, slow: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """g [B, n] after a block that saw the patches `slow` [B, k] with the class attention given, [B, k]; that of others
    stays."""
    return g.scatter(1, slow, (1 - MOMENTUM) * g.gather(1, slow) + MOMENTUM * attention)


def in_order(patches: torch.Tensor, slow: torch.Tensor, fast: torch.Tensor) -> torch.Tensor:
    """Patches [B, n, C], the slow ones and then the fast ones, as they lie in the image."""
    return gather(patches, torch.cat([slow, fast], dim=1).argsort(dim=1))
