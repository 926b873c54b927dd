"""DynamicViT: patches are dropped by small predictors, trained through masks (Rao et al., NeurIPS 2021, arXiv 2106.02034).

Before a few blocks a predictor looks at every patch and at the mean of those that are left, and says whether it stays.
In training keep or drop is drawn (Gumbel-softmax, straight-through) and dropped patches stay where they are, but nobody
attends to them; a loss holds the share kept to r, r^2, r^3 of all patches. At inference the best so many are kept and
the others are not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ClassifierConfig
from ..modeling.blocks import NORM_EPS
from ..modeling.classifier import Classified
from ..modeling.layers import input_dtype
from .base import Baseline, BaselineOptions, Projected, Tokens, full_precision, gather, log_odds
from .macs import LayerTokens

EPS = 1e-6  # of the masked softmax


@dataclass(frozen=True)
class DynamicViTOptions(BaselineOptions):
    """keep_ratio: the paper's rho: stage s of 1, 2, ... keeps rho^s of the image's patches; 1: all. stages: the blocks
    before which patches are dropped. ratio_weight: of the loss on the share kept (the released code: 5 for DeiT-B)."""

    keep_ratio: float = 0.7
    stages: tuple[int, ...] = (3, 6, 9)
    ratio_weight: float = 2.0


class KeepPredictor(nn.Module):
    """Which patches stay: x [B, m, C] and the mask so far [B, m] -> log-probabilities [B, m, 2] float32, keep first.

    Half of a patch's features are its own, the other half the mean over the patches that are left. At first a share
    `keep` of all draws stays (ours: the paper's start keeps half, and a short training does not leave that).
    """

    def __init__(self, dim: int, keep: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.entry = nn.Linear(dim, dim)
        half, quarter, last = dim // 2, dim // 4, nn.Linear(dim // 4, 2)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([log_odds(keep), 0.0]))
        self.exit = nn.Sequential(nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), last)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with full_precision(x.device):
            own, others = F.gelu(self.entry(self.norm(x.float()).to(input_dtype(self)))).chunk(2, dim=-1)
            features = torch.cat([own, masked_mean(others, mask)[:, None].expand_as(others)], dim=-1)
            return self.exit(features).float().log_softmax(dim=-1)

    @staticmethod
    def macs(dim: int) -> int:
        """Of a patch."""
        return dim**2 + dim * (dim // 2) + (dim // 2) * (dim // 4) + (dim // 4) * 2


class DynamicViT(Baseline):
    """A ViT with DynamicViT's predictors (`predictors`). In training all tokens are computed, as in the paper.

    Ours: its teacher terms, KL of the logits and squared error of the tokens that are left, are the trainer's own
    feature distillation, the same for all methods; dropped tokens have no place and do not count in it. All parameters
    learn at one rate, where the paper has the backbone at a hundredth of the predictors'.
    """

    Options = DynamicViTOptions
    options: DynamicViTOptions

    def __init__(self, config: ClassifierConfig, options: DynamicViTOptions | None = None, **vit: Any) -> None:
        super().__init__(config, options, **vit)
        if not set(self.options.stages) <= set(range(config.depth)):
            raise ValueError(f"stages must lie in 0 ... {config.depth - 1}, are {self.options.stages}")
        self.predictors = nn.ModuleList(
            KeepPredictor(config.dim, self.options.keep_ratio) for _ in self.options.stages
        )

    def count(self, stage: int) -> int:
        """Patches that are left after stage 0, 1, ..."""
        return max(1, math.floor(self.target(stage) * self.patches + 1e-9))

    def target(self, stage: int) -> float:
        return self.options.keep_ratio ** (stage + 1)

    def before_block(self, i: int, tokens: Tokens) -> Tokens:
        if i not in self.options.stages or self.options.keep_ratio == 1:
            return tokens
        stage, patches = self.options.stages.index(i), tokens.x[:, 1:]
        so_far = torch.ones_like(patches[..., 0]) if tokens.carried is None else tokens.carried
        scores = self.predictors[stage](patches, so_far)
        if not self.training:
            best = scores[..., 0].argsort(dim=1, descending=True, stable=True)[:, : self.count(stage)]
            index = torch.cat([torch.zeros_like(best[:, :1]), 1 + best], dim=1)
            return replace(tokens, x=gather(tokens.x, index), places=tokens.places.gather(1, index))
        keep = self.draw(stage, scores) * so_far  # what was dropped stays dropped
        loss = self.options.ratio_weight / len(self.options.stages) * ratio_loss(keep, self.target(stage))
        return replace(tokens, carried=keep, losses={"ratio": tokens.losses.get("ratio", 0) + loss})

    def draw(self, stage: int, scores: torch.Tensor) -> torch.Tensor:
        """Keep (1) or drop (0) in training, [B, n], with the gradient of a softmax of temperature 1."""
        return F.gumbel_softmax(scores, tau=1.0, hard=True)[..., 0]

    def attend(self, i: int, tokens: Tokens, projected: Projected) -> torch.Tensor:
        if tokens.carried is None:
            return super().attend(i, tokens, projected)
        q, k, v = projected
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        return masked_softmax(logits, F.pad(tokens.carried, (1, 0), value=1.0)).to(v.dtype) @ v

    def finish(self, tokens: Tokens) -> Classified:
        if tokens.carried is not None:  # dropped tokens are there, and nobody is to look at them
            kept = F.pad(tokens.carried.detach(), (1, 0), value=1.0) > 0
            tokens = replace(tokens, places=tokens.places.where(kept, -1))
        return super().finish(tokens)

    def layer_tokens(self) -> list[LayerTokens]:
        found, patches = [], self.patches
        for i in range(len(self.blocks)):
            more = 0
            if i in self.options.stages and self.options.keep_ratio < 1:
                more = patches * KeepPredictor.macs(self.config.dim)
                patches = self.count(self.options.stages.index(i))
            found.append(LayerTokens(1 + patches, 1 + patches, more=more))
        return found


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over the tokens of the mask: x [B, m, C], mask [B, m] -> [B, C]."""
    return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def masked_softmax(logits: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Attention to the tokens that are kept, and of every token to itself: logits [B, heads, m, m], keep [B, m] of 0 and
    1 -> weights [B, heads, m, m] float32. A dropped token still has a gradient to `keep`."""
    n = logits.shape[-1]
    itself = torch.eye(n, dtype=keep.dtype, device=keep.device)
    seen = keep[:, None, None] * (1 - itself) + itself  # [B, 1, m, m]
    logits = logits.float()
    weights = (logits - logits.amax(dim=-1, keepdim=True).detach()).exp() * seen
    return (weights + EPS / n) / (weights.sum(dim=-1, keepdim=True) + EPS)


def ratio_loss(keep: torch.Tensor, target: float) -> torch.Tensor:
    """Squared distance of the share kept [B, n] to its target, a mean over images."""
    return (keep.mean(dim=1) - target).square().mean()
