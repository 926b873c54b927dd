"""ATS: tokens are sampled by what the class token takes from them (Fayyaz et al., ECCV 2022, arXiv 2111.15667).

A patch's score is the class token's attention to it times the length of its value, normalised over patches. K fixed
points on the scores' cumulative sum pick the tokens that go on; one that is picked several times is one token, so that
an image with few patches that matter keeps fewer. In such a block all tokens answer and only the sampled ones ask:
a token that is dropped is read once more. No parameters, no loss, no randomness; training and inference sample alike,
and gradients reach the tokens, not the choice. It works on a trained ViT as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .base import Baseline, BaselineOptions, Projected, Tokens, gather, key_mask, pack, project
from .macs import LayerTokens


@dataclass(frozen=True)
class ATSOptions(BaselineOptions):
    """keep_ratio: K over the image's patches, at most so many are kept; 1 is the paper's. first: the first block that
    samples; all after it do. released: pick as the published code does (`released_sample`), not by the paper's formula."""

    keep_ratio: float = 1.0
    first: int = 3
    released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 0:
            raise ValueError(f"first must be 0 or more, is {self.first}")


class ATS(Baseline):
    """A ViT with ATS. Tokens keep their order; images of a batch that keep fewer are filled up with tokens that answer
    nobody and have no place.

    Ours where paper and code differ: the score sums attention times length over heads, as in the paper; the published
    code multiplies the sum of the attention by the length over all heads.
    """

    Options = ATSOptions
    options: ATSOptions
    by_image = True

    @property
    def points(self) -> int:
        """K."""
        return max(1, math.floor(self.options.keep_ratio * self.patches + 1e-9))

    def attention(self, i: int, tokens: Tokens) -> tuple[Tokens, Projected]:
        """carried: which of the tokens are of their image, [B, m] bool; None: all."""
        before = alive(tokens)
        if i < self.options.first:
            tokens, projected = super().attention(i, tokens)
            return replace(tokens, computed=(*tokens.computed, LayerTokens(before.sum(1), before.sum(1)))), projected
        block = self.block(i)
        projected = project(block.attn, block.norm1(tokens.x))
        scores = significance(projected.class_attention(), projected.v, before)
        picked = (released_sample if self.options.released else sample)(scores, self.points)
        index, real = pack(F.pad(picked, (1, 0), value=True))  # the class token always
        _, heads, _, d = projected.q.shape
        asking = projected.q.gather(2, index[:, None, :, None].expand(-1, heads, -1, d))  # -> [B, heads, k, d]
        attended = self.attend(i, tokens, projected._replace(q=asking))
        places = tokens.places.gather(1, index)
        tokens = replace(
            tokens,
            x=gather(tokens.x, index) + self.added(i, attended),
            places=places if real is None else places.where(real, -1),
            carried=real,
        )
        n, m = before.sum(1), alive(tokens).sum(1)
        return replace(tokens, computed=(*tokens.computed, LayerTokens(n, m, True, queries=m))), projected

    def attend(self, i: int, tokens: Tokens, projected: Projected) -> torch.Tensor:
        return F.scaled_dot_product_attention(*projected, attn_mask=key_mask(tokens.carried))


def alive(tokens: Tokens) -> torch.Tensor:
    """Which tokens are of their image: [B, m] bool."""
    return torch.ones_like(tokens.places, dtype=torch.bool) if tokens.carried is None else tokens.carried


def significance(attention: torch.Tensor, v: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Scores of the tokens beside the class token: its attention [B, heads, m], values [B, heads, m, d], which tokens
    are of their image [B, m] bool -> [B, m - 1] float32, of sum 1."""
    row = attention.detach() * real[:, None]
    row = row / row.sum(dim=-1, keepdim=True)  # over the image's own tokens
    scores = (row * v.detach().float().norm(dim=-1)).sum(dim=1)[:, 1:]
    return scores / scores.sum(dim=1, keepdim=True).clamp(min=1e-20)


def sample(scores: torch.Tensor, points: int) -> torch.Tensor:
    """The tokens whose cumulative score is nearest to (2 m - 1) / 2K, m = 1 ... K: scores [B, n], 0 of a token that is
    not of its image -> [B, n] bool."""
    wanted = (2 * torch.arange(points, device=scores.device) + 1) / (2 * points)
    return nearest(scores.cumsum(dim=1), wanted.expand(len(scores), -1))


def released_sample(scores: torch.Tensor, points: int) -> torch.Tensor:
    """As the published code: scores in rising order, their cumulative sum stretched to 0 ... 1, points spread evenly
    from its smallest value above 0 to 1. The lowest score is never picked. Shapes as `sample`."""
    rising, order = scores.sort(dim=1, stable=True)
    lowest = rising.where(rising > 0, torch.inf).amin(dim=1, keepdim=True)
    total = (rising.cumsum(dim=1) - lowest) / (1 - lowest).clamp(min=1e-20)
    start = total.where(total > 1e-6, 1.0).amin(dim=1, keepdim=True)
    steps = torch.linspace(0, 1, points, device=scores.device)
    picked = nearest(total, start + (1 - start) * steps)
    return torch.zeros_like(picked).scatter(1, order, picked)


def nearest(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Which values [B, n] lie nearest to one of those wanted [B, K], the first of equals: [B, n] bool."""
    hits = (values[:, None] - wanted[..., None]).abs().argmin(dim=2)  # [B, K, n] -> [B, K]
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, hits, True)
