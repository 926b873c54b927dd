"""What the methods inside SAM's image encoder share: how they are called, and what they do with tokens."""

from __future__ import annotations

from typing import Any

import torch

from ...config import EncoderConfig
from ...modeling.blocks import Block
from ...modeling.image_encoder import ImageEncoder
from ...modeling.routing import Routing, Stage, TrueSizes
from ...modeling.staged import checked_ratio
from ...modeling.windows import exporting
from ..base import gather
from .attention import Places
from .macs import reduced_macs


class ReducedEncoder(ImageEncoder):
    """SAM's encoder, with its weights and no other, on fewer tokens. A method overrides `reduce`.

    Called as any `ImageEncoder`, in training and evaluation alike. At keep ratio 1 and more it is the exact model. Where
    tokens of the image are ranked, those wholly in its padding come last, as in bLSAM (ours). It runs in torch, eagerly.
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig, img_size: int = 1024, keep_ratio: float | None = None) -> None:
        super().__init__(config, img_size, config.keep_ratio if keep_ratio is None else keep_ratio)
        if len(config.global_layers) < 2:
            raise ValueError(f"{config.name} has no two global layers between which tokens could be fewer")

    def run(
        self, x: torch.Tensor, keep_ratio: float | None, true_sizes: TrueSizes, routing: Routing | None
    ) -> tuple[torch.Tensor, Routing]:
        if routing is not None:
            raise ValueError(f"{self.config.name} chooses its tokens itself: no routing can be supplied")
        if exporting():
            raise ValueError(f"{self.config.name} is there for comparison and runs in torch alone: it has no export")
        keep_ratio = self.keep_ratio if keep_ratio is None else checked_ratio(keep_ratio)
        grid = self.stem(x)
        if keep_ratio >= 1:
            return self.run_stage(grid, None), Routing()
        real = None
        if true_sizes is not None:
            real = self.asked(torch.as_tensor(true_sizes, device=x.device)).flatten(1)
        tokens, stages = self.reduce(grid, keep_ratio, real)
        return tokens.view_as(grid), Routing(tuple(stages))

    def reduce(
        self, grid: torch.Tensor, keep_ratio: float, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Stage]]:
        """All layers: patches with their positions [B, H, W, C] -> what comes out of the last [B, H*W, C], and which tokens
        were kept, choice by choice. real [B, H*W] bool: not wholly in the image's padding; None: all."""
        raise NotImplementedError

    def macs(self, keep_ratio: float | None = None) -> int:
        """Multiply-adds of an image without padding, windows evenly filled; see `baselines.sam.macs`."""
        return reduced_macs(self.config, self.img_size, self.keep_ratio if keep_ratio is None else keep_ratio)

    # --- what methods use --------------------------------------------------------------------------------------------

    @property
    def options(self) -> Any:
        """The configuration's rule, of the method's own kind."""
        return self.config.rule

    @property
    def choices(self) -> tuple[int, ...]:
        """The layers after which tokens are chosen: those that reach over the whole image, without the last (ours). In
        B and H they lie where a quarter, a half and three quarters of the depth fall."""
        return self.config.global_layers[:-1]

    def before_choices(self, grid: torch.Tensor) -> tuple[torch.Tensor, Places]:
        """The layers before the first choice, on all tokens: grid [B, H, W, C] -> [B, H*W, C], and where they lie."""
        for i in range(self.choices[0]):
            grid = self.run_layer(i, grid, None)
        return grid.flatten(1, 2), Places.all(grid.shape[:3], self.config.window, grid.device)

    def block(self, i: int) -> Block:
        found: Any = self.blocks[i]
        return found

    def stage(self, kept: torch.Tensor, shape: torch.Size, scores: torch.Tensor | None = None) -> Stage:
        """What was kept of a grid [B, H, W, ...], [B, k] int64, as a stage that can be drawn and counted."""
        mask = torch.zeros(shape[0], shape[1] * shape[2], dtype=torch.bool, device=kept.device)
        mask = mask.scatter(1, kept, True).view(shape[:3])
        scores = None if scores is None else scores.detach().view(shape[:3])
        return Stage.from_mask(mask, self.config.window, scores)


def padding_last(scores: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Scores to rank by, [B, n]: those of padding below all others."""
    scores = scores.detach()
    return scores if real is None else scores.masked_fill(~real, torch.finfo(scores.dtype).min)


def restored(pieces: list[torch.Tensor], index: list[torch.Tensor]) -> torch.Tensor:
    """Tokens in the order of the grid: pieces [B, n, C] and where each lies [B, n] -> [B, H*W, C].

    Every place of the grid is in exactly one piece.
    """
    return gather(torch.cat(pieces, dim=1), torch.cat(index, dim=1).argsort(dim=1))


def window_means(
    x: torch.Tensor,
    weights: torch.Tensor,
    windows: torch.Tensor,
    count: int,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Window by window sum w_i x_i / sum w_i [B, nW, C], 0 of none, and sum w_i [B, nW].

    x [B, n, C], w [B, n], windows [B, n] int64, of which there are `count`; before: a token [B, nW, C] and a weight [B, nW]
    of each window that join.
    """
    totals = weights.new_zeros(len(x), count).scatter_add(1, windows, weights)
    sums = weights.new_zeros(len(x), count, x.shape[2])
    sums = sums.scatter_add(1, windows[..., None].expand_as(x), weights[..., None] * x)
    if before is not None:
        sums, totals = sums + before[1][..., None] * before[0], totals + before[1]
    return (sums / totals.clamp(min=torch.finfo(totals.dtype).tiny)[..., None]).to(x.dtype), totals
