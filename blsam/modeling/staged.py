"""What image encoder and classifier share: layers in stages, each routed by what its predictor chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import LayersConfig
from .routing import SCORERS, Routing, Stage, TrueSizes


class Staged(nn.Module):
    """Blocks and predictors, and the walk through them.

    Attributes: `config`; `blocks`; `predictors`; `keep_ratio`, the share of tokens that run through the wide blocks when
    a call does not say otherwise (1 or more: all; others than above 0 are a ValueError).

    Tokens are [B, *T, C], with T = (H, W) of a grid or (n,) of a sequence; "places" below are [B, *T].
    """

    config: Any  # of the kind of its model
    blocks: nn.ModuleList
    predictors: nn.ModuleList

    @property
    def keep_ratio(self) -> float:
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        self._keep_ratio = checked_ratio(value)

    def use_dtype(self, dtype: torch.dtype) -> Staged:
        """Hold and multiply the linear and convolution weights in `dtype`; returns self.

        Norms, residual stream, softmax, positions and importance scores stay float32, as do input and output.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and not name.startswith("predictors"):
                module.to(dtype)
        return self

    # --- what each model says for itself -------------------------------------------------------------------------

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Patches and their positions: [B, 3, S, S] -> [B, *T, C]."""
        raise NotImplementedError

    def compared(self, tokens: torch.Tensor) -> torch.Tensor:
        """What comes out of the last block, as teacher and student are compared: [B, *T, C] -> [B, C', *cells]."""
        raise NotImplementedError

    def scores(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        """How important predictor `number` takes each token to be: -> places, float32."""
        raise NotImplementedError

    def choose(
        self, scores: torch.Tensor, rank_by: torch.Tensor, keep_ratio: float, true_sizes: TrueSizes = None
    ) -> Stage:
        """The stage of these scores, the highest of `rank_by` prime (both places)."""
        raise NotImplementedError

    def accept(self, supplied: Stage, scores: torch.Tensor, name: str) -> Stage:
        """The stage of a routing made elsewhere, with these scores where it has none; ValueError says what of `name`
        does not fit."""
        raise NotImplementedError

    def asked(self, true_sizes: torch.Tensor) -> torch.Tensor:
        """The places that a predictor chooses among, bool; int [B, 2] sizes (h, w) in pixels."""
        raise NotImplementedError

    def real_cells(self, true_sizes: torch.Tensor) -> torch.Tensor:
        """The cells of `compared` that are of the image, bool [B, *cells]; int [B, 2] sizes (h, w) in pixels."""
        raise NotImplementedError

    # --- the walk ------------------------------------------------------------------------------------------------

    def run(
        self, x: torch.Tensor, keep_ratio: float | None, true_sizes: TrueSizes, routing: Routing | None
    ) -> tuple[torch.Tensor, Routing]:
        """All layers: images [B, 3, S, S] -> what comes out of the last block, [B, *T, C], and what was chosen."""
        keep_ratio = self.keep_ratio if keep_ratio is None else checked_ratio(keep_ratio)
        if routing is not None and len(routing.stages) != len(self.predictors):
            raise ValueError(f"routing must have {len(self.predictors)} stages, has {len(routing.stages)}")
        tokens = self.run_stage(self.stem(x), None)
        stages: list[Stage] = []
        for number in range(len(self.predictors)):
            scores = self.scores(number, tokens)
            if routing is not None:
                stage = self.accept(routing.stages[number], scores, f"routing.stages[{number}]")
            else:
                rank_by = SCORERS[self.config.score](tokens, scores, x, number)
                stage = self.choose(scores, rank_by, keep_ratio, true_sizes)
            tokens = self.run_stage(tokens, number, stage)
            stages.append(stage)
        return tokens, Routing(tuple(stages))

    def run_stage(self, x: torch.Tensor, number: int | None, stage: Stage | None = None) -> torch.Tensor:
        """The layers of stage `number` (None: those before the first predictor): [B, *T, C] -> the same.

        Routed by `stage`; None: every token through the wide blocks alone, as the dense model does.
        """
        for i in self.config.layers_of(number):
            x = self.run_layer(i, x, stage)
        return x

    def run_layer(self, i: int, x: torch.Tensor, stage: Stage | None) -> torch.Tensor:
        """Layer i, routed by `stage`, or with None its wide part alone on every token."""
        # a Block, or what training wrapped it in; called, so that wrappers and hooks see it
        block: Any = self.blocks[i]
        if stage is not None:
            return block(x, stage)
        return block(x) if self.config.stage_of(i) is None else block.dense(x)


def checked_ratio(keep_ratio: float) -> float:
    """The keep ratio; ValueError unless it is above 0."""
    if not keep_ratio > 0:
        raise ValueError(f"keep ratio must be above 0 (1: all tokens), is {keep_ratio}")
    return float(keep_ratio)


def checked_scorer(config: LayersConfig) -> None:
    """ValueError if tokens are to be ranked by something that there is not."""
    if config.score not in SCORERS:
        raise ValueError(f"score must be one of {', '.join(SCORERS)}, is {config.score!r}")
