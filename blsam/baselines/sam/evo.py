"""Evo-ViT in SAM: half of the tokens on a slow path, the others follow their window's representative (arXiv 2108.01390).

As in the paper's stage mode, with SAM's global layers in the place of the class token (ours): tokens are ranked by g, the
attention that they receive there, a mean over heads and over all tokens that ask; after each global layer g of the tokens
that went through it moves half-way. The share `keep_ratio` with the highest g, the slow ones, run through the layers up
to and including the next global one; beside them one token for each window, the mean of its other tokens (placeholders)
weighted by g. At the end of the stage every placeholder adds what its window's token has gained, all are put back, and
the choice is made anew. The layers up to the first global one run on all tokens.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from ...config import EvoViTRule
from ...modeling.routing import Stage
from ..base import gather
from ..evo_vit import follow, split
from .attention import Places, attend, window_of
from .base import ReducedEncoder, padding_last, restored, window_means
from .macs import slow_of


class EvoViTEncoder(ReducedEncoder):
    """SAM's encoder with Evo-ViT's slow and fast paths."""

    rule = EvoViTRule

    def reduce(
        self, grid: torch.Tensor, keep_ratio: float, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Stage]]:
        (x, places), stages = self.before_choices(grid), []
        x, g = self.layer(self.choices[0], x, places, received=True)
        for before, last in pairwise([*self.choices, self.config.depth - 1]):
            slow, fast = split(padding_last(g, real), slow_of(x.shape[1], keep_ratio))
            stages.append(self.stage(slow, grid.shape, g))
            x, scores = self.two_paths(range(before + 1, last + 1), x, g, slow, fast, places)
            g = follow(g, slow, scores[:, : slow.shape[1]]) if last in self.choices else g
        return x, stages

    def two_paths(
        self, layers: range, x: torch.Tensor, g: torch.Tensor, slow: torch.Tensor, fast: torch.Tensor, whole: Places
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A stage: all tokens x [B, n, C], their g [B, n], and which are slow and fast [B, k], [B, n - k] int64 -> all
        tokens, and what attention those that ran received in the stage's last layer."""
        waiting, windows = gather(x, fast), window_of(fast, whole.grid, whole.window)
        running, places = gather(x, slow), replace(whole, index=slow)
        if self.options.rep:
            rep, weights = window_means(waiting, g.gather(1, fast), windows, whole.count)
            running, places = torch.cat([running, rep], dim=1), replace(places, live=weights > 0)
        for i in layers:
            running, scores = self.layer(i, running, places, received=i in self.choices)
        running, extra = running.split([slow.shape[1], running.shape[1] - slow.shape[1]], dim=1)
        if self.options.rep:  # what every sublayer since added to it
            waiting = waiting + gather(extra - rep, windows)
        return restored([running, waiting], [slow, fast]), scores

    def layer(self, i: int, x: torch.Tensor, places: Places, received: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer i on these tokens [B, m, C], and with `received` what attention each gets [B, m], float32."""
        block = self.block(i)
        added, scores = attend(block.attn, block.norm1(x), places, received)
        x = x + added
        return x + block.feed_forward(x), scores
