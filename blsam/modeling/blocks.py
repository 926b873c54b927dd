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

    def attention(self, x: torch.Tensor, tokens: Selection | None = None) -> torch.Tensor:
        """What attention adds to the given tokens, or to all: [B, H, W, C] -> [P, C]."""
        queries = None if tokens is None else tokens.window if self.window else tokens.image
        return self.attn(self.norm1(x), queries)

    def feed_forward(self, rows: torch.Tensor) -> torch.Tensor:
        """What the feed-forward part adds: [P, C] -> [P, C]."""
        return self.mlp(self.norm2(rows).to(self.mlp.lin1.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 2) + self.attention(x)
        return (rows + self.feed_forward(rows)).view(x.shape)


class EBlock(nn.Module):
    """The narrow block, inner width C_e: linear layers match the dimensions at its entry and exit.

    The last layer of each branch starts at zero (ours), so that a fresh E-block changes nothing.
    """

    def __init__(self, config: EncoderConfig, layer: int, grid: tuple[int, int]) -> None:
        super().__init__()
        dim, inner = config.dim, config.e_dim
        self.window = 0 if config.is_global(layer) else config.window
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, inner, config.e_heads_of(layer), self.window, grid)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.entry = nn.Linear(dim, inner)
        self.mlp = MLPBlock(inner, 4 * inner)
        self.exit = nn.Linear(inner, dim)
        for last in (self.attn.proj, self.exit):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """What attention adds to all tokens: [B, H, W, C] -> [B*H*W, C]."""
        return self.attn(self.norm1(x))

    def feed_forward(self, rows: torch.Tensor) -> torch.Tensor:
        """What the feed-forward part adds: [N, C] -> [N, C]."""
        return self.exit(self.mlp(self.entry(self.norm2(rows).to(self.entry.weight.dtype))))


class Fusion(nn.Module):
    """Adds both branches to x, with one learnt alpha and (beside an E-block) one gamma for each fusion of the layer."""

    def __init__(self, fusions: int, e_block: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(fusions))
        self.gamma = nn.Parameter(torch.full((fusions,), 1e-4)) if e_block else None

    def forward(
        self, i: int, rows: torch.Tensor, d_e: torch.Tensor | None, d_p: torch.Tensor, stage: Stage
    ) -> torch.Tensor:
        """Fusion number i of the layer: x [N, C], dE of all tokens [N, C] or None, dP [P, C] -> [N, C]."""
        selection = stage.selection
        prime = _take(rows, selection) + (1 + self.alpha[i] * _take(stage.scores.view(-1, 1), selection)) * d_p
        if d_e is not None:
            prime = prime + self.gamma[i] * _take(d_e, selection)
        if selection is None:
            return prime
        others = rows if d_e is None else rows + d_e
        if selection.live is not None:  # unused slots of the static form keep what stands there
            prime = torch.where(selection.live[:, None] > 0, prime, _take(others, selection))
        if d_e is None:  # the rows are still needed as they are
            return rows.index_copy(0, selection.tokens, prime)
        return others.index_copy_(0, selection.tokens, prime)


class RoutedBlock(Block):
    """A layer whose wide part runs on the prime tokens: x [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, config: EncoderConfig, layer: int, grid: tuple[int, int]) -> None:
        super().__init__(config, layer, grid)
        self.once = config.fuse == "block"
        self.e_block = EBlock(config, layer, grid) if config.has_e_block(layer) else None
        self.fusion = Fusion(1 if self.once else 2, self.e_block is not None)

    def forward(self, x: torch.Tensor, stage: Stage) -> torch.Tensor:
        if self.once:  # the paper's figure 2: both branches run through, then one fusion
            rows, d_p = x.flatten(0, 2), self.attention(x, stage.selection)
            d_p = d_p + self.feed_forward(_take(rows, stage.selection) + d_p)
            d_e = self.e_block.attention(x) if self.e_block else None
            d_e = d_e + self.e_block.feed_forward(rows + d_e) if self.e_block else None
            return self.fusion(0, rows, d_e, d_p, stage).view(x.shape)
        return self.fuse_feed_forward(self.fuse_attention(x, stage), stage)

    def fuse_attention(self, x: torch.Tensor, stage: Stage) -> torch.Tensor:
        """The layer's first half: [B, H, W, C] -> [B, H, W, C]."""
        d_p, d_e = self.attention(x, stage.selection), self.e_block.attention(x) if self.e_block else None
        return self.fusion(0, x.flatten(0, 2), d_e, d_p, stage).view(x.shape)

    def fuse_feed_forward(self, x: torch.Tensor, stage: Stage) -> torch.Tensor:
        """The layer's second half: [B, H, W, C] -> [B, H, W, C]."""
        rows = x.flatten(0, 2)
        d_p = self.feed_forward(_take(rows, stage.selection))
        d_e = self.e_block.feed_forward(rows) if self.e_block else None
        return self.fusion(1, rows, d_e, d_p, stage).view(x.shape)


def _take(rows: torch.Tensor, selection: Selection | None) -> torch.Tensor:
    """The selected rows, or all. Like `F.embedding` in attention: on a CPU several times faster than rows[tokens]."""
    return rows if selection is None else rows.index_select(0, selection.tokens)
