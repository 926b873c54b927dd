"""Transformer blocks: SAM's wide one (P), the narrow one (E), and the routed layer that fuses both.

    dE = E(norm_e(x))                      all tokens            (0 where the layer has no E-block)
    dP = P(norm_p(x)) * (1 + alpha * s)    prime tokens only
    x  = x + (1 - M) * dE + M * (dP + gamma * dE)

once for attention and once for the feed-forward part (the paper's Algorithm 1). Through alpha the score s gets a
gradient although the choice has none (Mixture-of-Depths, arXiv 2404.02258). Modules and parameters that SAM has keep
SAM's names; `e_block` and `fusion` are new.
"""

from __future__ import annotations

from typing import Any

import torch
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import Block as _Block
from torch import nn

from .layers import input_dtype
from .routing import Queries, Stage

NORM_EPS = 1e-6  # as SAM


class Block(_Block):
    """SAM's block: x [B, ..., C] -> the same shape.

    attn: from x, normalised, to the same shape, or with `Queries` to a row for each of them, [P, C]; its attribute
    `window` is 0 where it reaches over the whole image.
    """

    attn: Any  # Attention, or a module with its interface

    def __init__(self, dim: int, attn: nn.Module) -> None:
        nn.Module.__init__(self)  # SAM's own would make an attention of its own
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLPBlock(dim, 4 * dim)

    @property
    def window_size(self) -> int:
        """Tokens a side of the windows, 0: attention over the whole grid; may be set, as in SAM."""
        return self.attn.window

    @window_size.setter
    def window_size(self, value: int) -> None:
        self.attn.window = value

    def attention(self, x: torch.Tensor, queries: Queries | None = None) -> torch.Tensor:
        """What attention adds to all tokens, [B, ..., C] -> the same shape, or to the given ones: -> [P, C]."""
        return _attention(self, x, queries)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the feed-forward part adds, to tokens in any shape: [..., C] -> [..., C]."""
        return self.mlp(self.norm2(x).to(input_dtype(self.mlp)))

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens through the wide part alone: SAM's own layer."""
        x = x + self.attention(x)
        return x + self.feed_forward(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x)


def _attention(block: Block | EBlock, x: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    normalised = block.norm1(x)
    return block.attn(normalised) if queries is None else block.attn(normalised, queries)


class EBlock(nn.Module):
    """The narrow block, inner width C_e: linear layers match the dimensions at its entry and exit.

    attn: as a block's, but `inner` wide inside, with its last layer in `proj`. The last layer of each branch starts at
    zero (ours), so that a fresh E-block changes nothing.
    """

    attn: Any  # as a block's

    def __init__(self, dim: int, inner: int, attn: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.entry = nn.Linear(dim, inner)
        self.mlp = MLPBlock(inner, 4 * inner)
        self.exit = nn.Linear(inner, dim)
        for last in (self.attn.get_submodule("proj"), self.exit):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def attention(self, x: torch.Tensor, queries: Queries | None = None) -> torch.Tensor:
        """What attention adds to all tokens, [B, ..., C] -> the same shape, or to the given ones: -> [P, C]."""
        return _attention(self, x, queries)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the feed-forward part adds, to tokens in any shape: [..., C] -> [..., C]."""
        return self.exit(self.mlp(self.entry(self.norm2(x).to(input_dtype(self.entry)))))


class Fusion(nn.Module):
    """Adds both branches to x, with one learnt alpha and (beside an E-block) one gamma for each fusion of the layer.

    gamma False: prime tokens take nothing of the E-branch.
    """

    def __init__(self, fusions: int, gamma: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(fusions))
        self.gamma = nn.Parameter(torch.full((fusions,), 1e-4)) if gamma else None

    def forward(
        self,
        i: int,
        rows: torch.Tensor,
        d_e: torch.Tensor | None,
        d_p: torch.Tensor,
        scores: torch.Tensor,
        prime: Queries | None,
    ) -> torch.Tensor:
        """Fusion number i of the layer: x [N, C], dE of all tokens [N, C] or None, dP [P, C], s of all -> [N, C]."""
        new = take(rows, prime) + (1 + self.alpha[i] * take(scores.reshape(-1, 1), prime)) * d_p
        if d_e is not None and self.gamma is not None:
            new = new + self.gamma[i] * take(d_e, prime)
        new = new.to(rows.dtype)  # scores are float32 whatever the tokens are
        if prime is None:
            return new
        others = rows if d_e is None else rows + d_e
        if prime.rows is not None:
            return torch.cat([new, others]).index_select(0, prime.rows)
        if d_e is None:  # the rows are still needed as they are
            return rows.index_copy(0, prime.tokens, new)
        return others.index_copy_(0, prime.tokens, new)


class RoutedBlock(Block):
    """A layer whose wide part runs on the prime tokens: x [B, ..., C] -> the same shape.

    once: one fusion after both sublayers (the paper's figure 2) instead of one after each. gamma: as `Fusion`, beside an
    E-block. `window_size` may be read: the windows in which tokens were chosen are those of the model.
    """

    def __init__(
        self, dim: int, attn: nn.Module, e_block: EBlock | None, once: bool = False, gamma: bool = True
    ) -> None:
        super().__init__(dim, attn)
        self.once = once
        self.e_block = e_block
        self.fusion = Fusion(1 if once else 2, gamma and e_block is not None)

    @property
    def window_size(self) -> int:
        return self.attn.window

    @window_size.setter
    def window_size(self, value: int) -> None:
        if value != self.attn.window:
            raise ValueError(
                f"window_size of a routed block is that of its model's windows, {self.attn.window}, and cannot become "
                f"{value}; the exact models' can"
            )

    def prime(self, stage: Stage) -> Queries | None:
        """The stage's prime tokens, in the order of this layer's attention."""
        return stage.window if self.attn.window else stage.image

    def forward(self, x: torch.Tensor, stage: Stage | None = None) -> torch.Tensor:
        if stage is None:
            raise RuntimeError(
                "a routed block needs the choice of its stage's predictor: run the encoder (forward, or run_stage with a "
                "Stage), or block.dense(x) for all tokens through the wide part alone"
            )
        if not self.once:
            return self.fuse_feed_forward(self.fuse_attention(x, stage), stage)
        rows, prime = x.flatten(0, -2), self.prime(stage)
        d_p = self._wide_attention(x, prime)
        d_p = d_p + self.feed_forward(take(rows, prime) + d_p)
        d_e = None
        if self.e_block:
            d_e = self.e_block.attention(x).flatten(0, -2)
            d_e = d_e + self.e_block.feed_forward(rows + d_e)
        return self.fusion(0, rows, d_e, d_p, stage.scores, prime).view(x.shape)

    def fuse_attention(self, x: torch.Tensor, stage: Stage) -> torch.Tensor:
        """The layer's first half."""
        prime = self.prime(stage)
        d_p, d_e = self._wide_attention(x, prime), None
        if self.e_block:
            d_e = self.e_block.attention(x).flatten(0, -2)
        return self.fusion(0, x.flatten(0, -2), d_e, d_p, stage.scores, prime).view(x.shape)

    def fuse_feed_forward(self, x: torch.Tensor, stage: Stage) -> torch.Tensor:
        """The layer's second half."""
        rows, prime = x.flatten(0, -2), self.prime(stage)
        d_p = self.feed_forward(take(rows, prime))
        d_e = self.e_block.feed_forward(rows) if self.e_block else None
        return self.fusion(1, rows, d_e, d_p, stage.scores, prime).view(x.shape)

    def _wide_attention(self, x: torch.Tensor, prime: Queries | None) -> torch.Tensor:
        """dP of the prime tokens, or of all: -> [P, C]."""
        return self.attention(x, prime).flatten(0, -2)  # rows of prime tokens are rows already


def take(rows: torch.Tensor, prime: Queries | None) -> torch.Tensor:
    """The rows of the prime tokens, or all. Like `F.embedding` in attention: on a CPU several times faster than
    rows[tokens]."""
    return rows if prime is None else rows.index_select(0, prime.tokens)
