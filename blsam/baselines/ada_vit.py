"""AdaViT: which patches, heads and sublayers a block computes is decided from its input (Meng et al., CVPR 2022,
arXiv 2111.15668).

In every block a linear layer looks at each patch, from the second block on two more look at the class token and decide
on its heads, its attention and its feed-forward part. What is off in a block passes it unchanged and may be on in the
next. In training decisions are drawn (Gumbel-sigmoid of temperature 5, straight-through) and used as factors; at
inference they are thresholds, of the published code. A loss holds the mean use of each kind to a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ClassifierConfig
from ..modeling.classifier import Classified, TokenAttention
from ..modeling.layers import input_dtype
from .base import Baseline, BaselineOptions, Projected, Tokens, full_precision, log_odds, project
from .macs import LayerTokens

TAU = 5.0  # temperature of the relaxed decisions
ON, PATCH_ON = 0.5, 0.6  # above which heads and sublayers, and patches, are on


@dataclass(frozen=True)
class AdaViTOptions(BaselineOptions):
    """keep_ratio: the target for the use of patches, heads and sublayers, each (the published code's 0.5); 1: all.
    usage_weight: of the loss; patches count by the square of their distance, the others by the distance."""

    keep_ratio: float = 0.5
    usage_weight: float = 2.0


@dataclass(frozen=True)
class Decisions:
    """Of a block, 1 on and 0 off: patches [B, 1 + n], the class token always on; heads [B, H]; sublayers [B, 2],
    attention and feed-forward part."""

    patches: torch.Tensor
    heads: torch.Tensor
    sublayers: torch.Tensor


@dataclass(frozen=True)
class Taken:
    """What a pass carries: the decisions of all blocks so far; inside a block that is computed of some tokens alone
    also which these are, [k] int64, and all of them [1, 1 + n, C]."""

    decisions: tuple[Decisions, ...] = ()
    active: torch.Tensor | None = None
    whole: torch.Tensor | None = None


class Policy(nn.Module):
    """The linear layers that decide on a block; in the first one on patches alone."""

    def __init__(self, dim: int, heads: int, first: bool, use: float) -> None:
        """use: the share that is on in training at first, of each kind (ours: their target)."""
        super().__init__()
        self.patches = nn.Linear(dim, 1)
        self.units = None if first else nn.Linear(dim, heads + 2)
        for layer, threshold in ((self.patches, PATCH_ON), (self.units, ON)):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.constant_(layer.bias, log_odds(use) + TAU * log_odds(threshold))

    def forward(self, x: torch.Tensor, normalised: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of patches [B, n] and of heads and sublayers [B, H + 2], from tokens [B, 1 + n, C] as they are and as
        the block's first norm makes them; float32."""
        with full_precision(x.device):
            kind = input_dtype(self)
            patches = self.patches(normalised[:, 1:].to(kind)).float()[..., 0]
            return patches, None if self.units is None else self.units(x[:, 0].to(kind)).float()


class AdaViT(Baseline):
    """A ViT with AdaViT's decisions (`predictors`). At inference a single image has only what is on computed; several at
    once, and training, compute all and multiply by the decisions.

    A head that is off adds nothing to attention, and the feed-forward part does not read its channels. Ours: of the two
    uses of a patch's decision, as a mask of attention and as a factor, the first has no gradient, as in the published
    code; the factor of a head stands once, behind attention, not at queries, keys and values each.
    """

    Options = AdaViTOptions
    options: AdaViTOptions
    by_image = True

    def __init__(self, config: ClassifierConfig, options: AdaViTOptions | None = None, **vit: Any) -> None:
        super().__init__(config, options, **vit)
        self.predictors = nn.ModuleList(
            Policy(config.dim, config.heads, i == 0, self.options.keep_ratio) for i in range(config.depth)
        )

    # --- decisions ---------------------------------------------------------------------------------------------------

    def begin(self, x: torch.Tensor) -> Tokens:
        return replace(super().begin(x), carried=Taken())

    def before_block(self, i: int, tokens: Tokens) -> Tokens:
        if self.options.keep_ratio == 1:
            full = torch.full_like(tokens.places[:, 0], tokens.x.shape[1])
            return replace(tokens, computed=(*tokens.computed, LayerTokens(full, full)))
        taken = self.decide(i, tokens.x)
        computed = (*tokens.computed, self.layer(i, taken))
        carried = Taken((*tokens.carried.decisions, taken))
        if self.training or len(tokens.x) > 1:
            return replace(tokens, carried=carried, computed=computed)
        active = taken.patches[0].nonzero()[:, 0]
        carried = replace(carried, active=active, whole=tokens.x)
        return replace(tokens, x=tokens.x[:, active], carried=carried, computed=computed)

    def decide(self, i: int, x: torch.Tensor) -> Decisions:
        """From the tokens [B, 1 + n, C] that come into block i."""
        patches, units = self.predictors[i](x, self.block(i).norm1(x))
        step = relaxed if self.training else hard
        heads = self.config.heads
        on = x.new_ones(len(x), heads + 2, dtype=torch.float32) if units is None else step(units, ON)
        return Decisions(F.pad(step(patches, PATCH_ON), (1, 0), value=1.0), on[:, :heads], on[:, heads:])

    def layer(self, i: int, taken: Decisions) -> LayerTokens:
        """What block i computes of each image."""
        tokens, heads = taken.patches.detach().sum(dim=1).long(), taken.heads.detach().sum(dim=1).long()
        attention, feed_forward = taken.sublayers.detach().long().unbind(dim=1)
        dim, units = self.config.dim, (self.config.heads + 2 if i else 0)
        width = heads * (dim // self.config.heads)
        more = (self.patches + units) * dim
        return LayerTokens(tokens * attention, tokens * feed_forward, width=width, more=more)

    # --- a block -----------------------------------------------------------------------------------------------------

    def attention(self, i: int, tokens: Tokens) -> tuple[Tokens, Projected]:
        taken = now(tokens)
        if taken is None:
            return super().attention(i, tokens)
        block = self.block(i)
        if tokens.carried.active is None:
            projected = project(block.attn, block.norm1(tokens.x))
            factor = taken.patches[..., None] * taken.sublayers[:, :1, None]  # [B, m, 1]
            return replace(tokens, x=tokens.x + factor * self.added(i, self.attend(i, tokens, projected))), projected
        heads = taken.heads[0].nonzero()[:, 0]
        if not taken.sublayers[0, 0]:
            heads = heads[:0]
        projected = project_heads(block.attn, block.norm1(tokens.x), heads)
        if not taken.sublayers[0, 0]:
            return tokens, projected
        return replace(tokens, x=tokens.x + add_heads(block.attn, projected, heads)), projected

    def attend(self, i: int, tokens: Tokens, projected: Projected) -> torch.Tensor:
        taken = now(tokens)
        if taken is None:
            return super().attend(i, tokens, projected)
        mask = visible(taken.patches.detach() > 0)[:, None]  # [B, m, m] -> [B, 1, m, m]
        factor = taken.heads[:, :, None, None].to(projected.v.dtype)
        return F.scaled_dot_product_attention(*projected, attn_mask=mask) * factor

    def feed_forward(self, i: int, tokens: Tokens) -> Tokens:
        taken = now(tokens)
        if taken is None:
            return super().feed_forward(i, tokens)
        block, each = self.block(i), self.config.dim // self.config.heads
        normalised = block.norm2(tokens.x)
        if tokens.carried.active is not None:
            if not taken.sublayers[0, 1]:
                return tokens
            channels = channels_of(taken.heads[0].nonzero()[:, 0], each)
            hidden = block.mlp.act(partial_linear(block.mlp.fc1, normalised[..., channels], columns=channels))
            return replace(tokens, x=tokens.x + block.mlp.fc2(hidden))
        read = normalised * taken.heads.repeat_interleave(each, dim=1)[:, None]
        factor = taken.patches[..., None] * taken.sublayers[:, 1:, None]  # [B, m, 1]
        added = self.drop_path(i, block.mlp(read.to(input_dtype(block.mlp))))
        return replace(tokens, x=tokens.x + factor * added)

    def after_block(self, i: int, tokens: Tokens) -> Tokens:
        """The tokens of which a block was computed, back among the others."""
        carried = tokens.carried
        if carried.active is None:
            return tokens
        x = carried.whole.index_copy(1, carried.active, tokens.x.to(carried.whole.dtype))
        return replace(tokens, x=x, carried=replace(carried, active=None, whole=None))

    def finish(self, tokens: Tokens) -> Classified:
        if self.training and tokens.carried.decisions:
            usage = usage_loss(tokens.carried.decisions, self.options.keep_ratio)
            tokens = replace(tokens, losses={"usage": self.options.usage_weight * usage})
        return super().finish(tokens)


def now(tokens: Tokens) -> Decisions | None:
    """Of the block that the tokens are in; None where all is computed."""
    return tokens.carried.decisions[-1] if tokens.carried.decisions else None


def hard(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """1 where the probability is above the threshold, 0 elsewhere."""
    return (logits.sigmoid() > threshold).to(logits.dtype)


def relaxed(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """0 or 1 as drawn with Gumbel noise, with the gradient of the soft decision, s (1 - s) / tau."""
    noise = -torch.empty(2, *logits.shape, device=logits.device).exponential_().log()
    soft = ((logits + noise[0] - noise[1]) / TAU).sigmoid()
    return (soft > threshold).to(soft.dtype) + soft - soft.detach()


def visible(active: torch.Tensor) -> torch.Tensor:
    """Whom each token may attend to: active ones to each other, all to themselves; [B, m] bool -> [B, m, m] bool."""
    itself = torch.eye(active.shape[1], dtype=torch.bool, device=active.device)
    return (active[:, :, None] & active[:, None]) | itself


def usage_loss(decisions: Sequence[Decisions], target: float) -> torch.Tensor:
    """|use of heads - target| + |use of sublayers - target| + (use of patches - target)^2, means over images, blocks and
    units: heads of blocks that are not off as a whole, heads and sublayers from the second block on, where they are
    decided."""
    patches = torch.stack([one.patches[:, 1:] for one in decisions]).mean()
    loss = (patches - target).square()
    if len(decisions) > 1:
        sublayers = torch.stack([one.sublayers for one in decisions[1:]])  # [L - 1, B, 2]
        heads = torch.stack([one.heads for one in decisions[1:]]).mean(dim=2)  # [L - 1, B]
        runs = (sublayers.detach().sum(dim=2) > 0).to(heads.dtype)
        of_heads = (heads * runs).sum() / runs.sum().clamp(min=1)
        loss = loss + (of_heads - target).abs() + (sublayers.mean() - target).abs()
    return loss


# --- a block of one image, in part -----------------------------------------------------------------------------------


def channels_of(heads: torch.Tensor, each: int) -> torch.Tensor:
    """The channels of these heads [h], of `each` channels: [h * each] int64."""
    return (heads[:, None] * each + torch.arange(each, device=heads.device)).flatten()


def partial_linear(
    layer: nn.Linear, x: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer's outputs `rows` of its inputs `columns`, which x [..., columns] holds; None: all."""
    weight = layer.weight if rows is None else layer.weight[rows]
    weight = weight if columns is None else weight[:, columns]
    return F.linear(x.to(weight.dtype), weight, layer.bias if rows is None else layer.bias[rows])


def project_heads(attn: TokenAttention, x: torch.Tensor, heads: torch.Tensor) -> Projected:
    """As `project`, of these heads alone: x [1, m, C] -> [1, h, m, d] each."""
    each = attn.inner // attn.num_heads
    channels = channels_of(heads, each)
    rows = torch.cat([channels + i * attn.inner for i in range(3)])
    qkv = partial_linear(attn.qkv, x, rows=rows).unflatten(-1, (3, len(heads), each))
    return Projected(*qkv.permute(2, 0, 3, 1, 4))  # [1, m, 3, h, d] -> [3, 1, h, m, d]


def add_heads(attn: TokenAttention, projected: Projected, heads: torch.Tensor) -> torch.Tensor:
    """What attention of these heads adds: [1, h, m, d] each -> [1, m, C]; without any, the last layer's bias."""
    attended = F.scaled_dot_product_attention(*projected) if len(heads) else projected.v
    attended = attended.transpose(1, 2).flatten(2)  # [1, h, m, d] -> [1, m, h * d]
    return partial_linear(attn.proj, attended, columns=channels_of(heads, attn.inner // attn.num_heads))
