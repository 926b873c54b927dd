"""Optimiser, learning rate, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW on what is trained; biases, norms, positions and the scalars of the fusion do not decay."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.dim() < 2 or "pos" in name or "fusion" in name else decay).append(p)
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.98))


def rate(lr: float, step: int, progress: float, steps: int) -> float:
    """Linear warm-up over 100 steps or a tenth of the run's `steps`, and a cosine to zero; progress in 0 ... 1."""
    warm_up = min(100, math.ceil(steps / 10))
    return lr * min(1, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1, progress)))


class Average:
    """Moving average of the trained weights with decay 0.999, less at first so that a short run does not ship its
    start. `averaged`: name -> tensor, sharded where the model's parameters are; `seen`: updates so far."""

    def __init__(self, model: nn.Module) -> None:
        self.averaged = {name: p.detach().clone() for name, p in _trained(model).items()}
        self.seen = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(0.999, (1 + self.seen) / (10 + self.seen))
        self.seen += 1
        for name, p in _trained(model).items():
            self.averaged[name].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights within, its own again after."""
        if isinstance(model, FSDPModule):
            model.reshard()
        own = {name: p.detach().clone() for name, p in _trained(model).items()}
        self._write(model, self.averaged)
        try:
            yield
        finally:
            self._write(model, own)

    @staticmethod
    @torch.no_grad()
    def _write(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
        if isinstance(model, FSDPModule):  # a forward pass without a backward one leaves its parameters whole
            model.reshard()
        for name, p in _trained(model).items():
            p.copy_(values[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have without wrappers."""
    wrappers = ("_checkpoint_wrapped_module.", "module.")  # the longer one first
    found = {}
    for name, p in model.named_parameters():
        for wrapper in wrappers:
            name = name.replace(wrapper, "")
        if p.requires_grad:
            found[name] = p
    return found
