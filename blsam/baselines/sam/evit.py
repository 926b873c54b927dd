"""EViT in SAM: tokens that receive little attention are dropped and fused window by window (arXiv 2202.07800).

The paper has a class token and one sequence; SAM has windows and owes an embedding of every token. Ours is what follows
from that. A token's score is the attention it receives in a global layer, a mean over heads and over all tokens that
ask: what class attention becomes where every token is asked for. In a global layer, between attention and the
feed-forward part, k = ceil(r * n) tokens stay. What a window drops becomes one token, sum a_i x_i / sum a_i: normalised,
since the raw weights of so many tokens would give next to nothing; a fused token that there is already joins with all it
stands for, and does not compete. It meets its window in window layers and all tokens in global ones. At the end dropped
tokens are put back as they were when they were dropped, and fused ones thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ...config import EViTRule
from ...modeling.routing import Stage
from ..base import gather
from ..evo_vit import split
from .attention import Places, attend, window_of
from .base import ReducedEncoder, padding_last, restored, window_means
from .macs import kept_of


@dataclass(frozen=True)
class Survivors:
    """What a pass carries: tokens x [B, m, C] and their places; mass [B, nW], the weight that fused tokens stand for;
    of each drop the tokens [B, d, C] and where they lie [B, d]."""

    x: torch.Tensor
    places: Places
    mass: torch.Tensor | None = None
    dropped: list[torch.Tensor] = field(default_factory=list)
    index: list[torch.Tensor] = field(default_factory=list)


class EViTEncoder(ReducedEncoder):
    """SAM's encoder with EViT's token reorganisation."""

    rule = EViTRule

    def reduce(
        self, grid: torch.Tensor, keep_ratio: float, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Stage]]:
        now, stages = Survivors(*self.before_choices(grid)), []
        for i in range(self.choices[0], self.config.depth):
            block, chooses = self.block(i), i in self.choices
            added, scores = attend(block.attn, block.norm1(now.x), now.places, received=chooses)
            now = replace(now, x=now.x + added)
            if chooses:
                count = kept_of(now.places.index.shape[1], keep_ratio)
                now = drop(now, scores, count, real, self.options.fuse)
                stages.append(self.stage(now.places.index, grid.shape))
            now = replace(now, x=now.x + block.feed_forward(now.x))
        return put_back(now, self.options.fill), stages


def drop(now: Survivors, scores: torch.Tensor, count: int, real: torch.Tensor | None, fuse: bool) -> Survivors:
    """Keep the `count` tokens that score highest, [B, m], extra ones aside; the others leave, fused window by window."""
    places, n = now.places, now.places.index.shape[1]
    real = None if real is None else real.gather(1, places.index)
    stay, leave = split(padding_last(scores[:, :n], real), count)
    x, gone, at = gather(now.x, stay), gather(now.x, leave), places.index.gather(1, leave)
    left, mass = replace(places, index=places.index.gather(1, stay)), None
    if fuse:
        before = None if now.mass is None else (now.x[:, n:], now.mass)
        windows = window_of(at, places.grid, places.window)
        extra, mass = window_means(gone, scores.gather(1, leave), windows, places.count, before)
        x, left = torch.cat([x, extra], dim=1), replace(left, live=mass > 0)
    return Survivors(x, left, mass, [*now.dropped, gone], [*now.index, at])


def put_back(now: Survivors, fill: bool) -> torch.Tensor:
    """All tokens in the order of the grid, [B, H*W, C]; fill: dropped ones as the fused token of their window is now."""
    places, n, dropped = now.places, now.places.index.shape[1], now.dropped
    if fill:
        dropped = [gather(now.x[:, n:], window_of(at, places.grid, places.window)) for at in now.index]
    return restored([now.x[:, :n], *dropped], [places.index, *now.index])
