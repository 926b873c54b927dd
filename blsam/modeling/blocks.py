"""Transformer blocks: SAM's wide one (P), the narrow one (E), and the routed layer that fuses both.

    dE = E(norm_e(x))                      all tokens            (0 where the layer has no E-block)
    dP = P(norm_p(x)) * (1 + alpha * s)    prime tokens only
    x  = x + (1 - M) * dE + M * (dP + gamma * dE)

once for attention and once for the feed-forward part (the paper's Algorithm 1). Through alpha the score s gets a
gradient although the choice has none (Mixture-of-Depths, arXiv 2404.02258). Modules and parameters that SAM has keep
SAM's names; `e_block` and `fusion` are new.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.common import MLPBlock
from torch import nn

from ..config import EncoderConfig
from .attention import Attention
from .routing import Selection, Stage

NORM_EPS = 1e-6  # as SAM


class Block(nn.Module):
    """SAM's block: x [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, config: EncoderConfig, layer: int, grid: tuple[int, int]) -> None:
        super().__init__()
        dim = config.dim
        self.window = 0 if config.is_global(layer) else config.window
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, dim, config.heads, self.window, grid, config.semi_cross)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLPBlock(dim, 4 * dim)

    def attention(self, x: torch.Tensor, tokens: Selection) -> torch.Tensor:
        """What attention adds to the given tokens: [P, C]."""
        return self.attn(self.norm1(x), tokens.window if self.window else tokens.image)

    def feed_forward(self, rows: torch.Tensor) -> torch.Tensor:
        """What the feed-forward part adds: [P, C] -> [P, C]."""
        return self.mlp(self.norm2(rows))

    def forward(self, x: torch.Tensor, everything: Selection) -> torch.Tensor:
        x = x + self.attention(x, everything).view(x.shape)
        return x + self.feed_forward(x)


class EBlock(nn.Module):
    """The narrow block, inner width C_e: linear layers match the dimensions at its entry and exit.

    The last layer of each branch starts at zero (ours), so that a fresh E-block changes nothing.
    """

    def __init__(self, config: EncoderConfig, layer: int, grid: tuple[int, int]) -> None:
        super().__init__()
        dim, inner = config.dim, config.e_dim
        self.window = 0 if config.is_global(layer) else config.window
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, inner, config.e_heads, self.window, grid)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.entry = nn.Linear(dim, inner)
        self.mlp = MLPBlock(inner, 4 * inner)
        self.exit = nn.Linear(inner, dim)
        for last in (self.attn.proj, self.exit):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def attention(self, x: torch.Tensor, everything: Selection) -> torch.Tensor:
        """What attention adds to all tokens: [B, H, W, C] -> [B*H*W, C]."""
        return self.attn(self.norm1(x), everything.window if self.window else everything.image)

    def feed_forward(self, rows: torch.Tensor) -> torch.Tensor:
        """What the feed-forward part adds: [N, C] -> [N, C]."""
        return self.exit(self.mlp(self.entry(self.norm2(rows))))


class Fusion(nn.Module):
    """Adds both branches to x, with one learnt alpha and (beside an E-block) one gamma for each fusion of the layer."""

    def __init__(self, fusions: int, e_block: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(fusions))
        self.gamma = nn.Parameter(torch.full((fusions,), 1e-4)) if e_block else None

    def forward(
        self, i: int, x: torch.Tensor, d_p: torch.Tensor, d_e: torch.Tensor | None, stage: Stage
    ) -> torch.Tensor:
        """x [B, H, W, C], d_p [P, C] of the prime tokens, d_e [B*H*W, C] or None -> [B, H, W, C]; i: which fusion."""
        rows, tokens = x.flatten(0, 2), stage.selection.tokens
        if d_e is not None:
            share = torch.where(stage.mask.view(-1, 1), self.gamma[i], 1.0)
            rows = rows + share * d_e.to(x.dtype)
        weight = 1 + self.alpha[i] * stage.scores.view(-1, 1)
        if tokens is None:
            return (rows + weight * d_p).view(x.shape)
        d_p = weight[tokens] * d_p
        if stage.selection.live is not None:
            d_p = d_p * stage.selection.live[:, None]
        return rows.index_add(0, tokens, d_p.to(x.dtype)).view(x.shape)


class RoutedBlock(Block):
    """A layer whose wide part runs on the prime tokens: x [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, config: EncoderConfig, layer: int, grid: tuple[int, int]) -> None:
        super().__init__(config, layer, grid)
        self.once = config.fuse == "block"
        self.e_block = EBlock(config, layer, grid) if config.has_e_block(layer) else None
        self.fusion = Fusion(1 if self.once else 2, self.e_block is not None)

    def forward(self, x: torch.Tensor, everything: Selection, stage: Stage) -> torch.Tensor:
        if self.once:
            return self._fuse_once(x, everything, stage)
        d_e = self.e_block.attention(x, everything) if self.e_block else None
        d_p = self.attention(x, stage.selection)
        x = self.fusion(0, x, d_p, d_e, stage)

        rows = x.flatten(0, 2)
        d_e = self.e_block.feed_forward(rows) if self.e_block else None
        d_p = self.feed_forward(_take(rows, stage.selection.tokens))
        return self.fusion(1, x, d_p, d_e, stage)

    def _fuse_once(self, x: torch.Tensor, everything: Selection, stage: Stage) -> torch.Tensor:
        """The paper's figure 2: both branches run through, then one fusion."""
        rows, d_e = x.flatten(0, 2), None
        if self.e_block:
            d_e = self.e_block.attention(x, everything)
            d_e = d_e + self.e_block.feed_forward(rows + d_e)
        d_p = self.attention(x, stage.selection)
        d_p = d_p + self.feed_forward(_take(rows, stage.selection.tokens) + d_p)
        return self.fusion(0, x, d_p, d_e, stage)


def _take(rows: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    return rows if tokens is None else rows[tokens]
