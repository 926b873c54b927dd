"""Fits one after the other by AdamW, in a time that may be limited."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from ..precision import products_in, resolve_dtype

FITTING = 0.7  # share of the time left that goes to the fits; the rest moves the photos on
WARM_UP = 20  # steps


class Descent:
    """minutes: wall time for all fits and what lies between them, or None; weight: the sum of those of all fits.

    dtype: of the products, "auto" decided for the device and the width of the tokens. `seconds` have passed since
    `start`, earlier runs included.
    """

    def __init__(self, minutes: float | None, weight: int, dtype: str, device: torch.device, width: int) -> None:
        self.minutes, self.weight, self.device = minutes, weight, device
        self.dtype = resolve_dtype(dtype, device, width)
        self.start(0, 0.0)

    def start(self, done: int, seconds: float) -> None:
        """From here on time counts; `done` of the weight and `seconds` are behind us."""
        self.done, self.spent, self.began = done, seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    def fit(self, parameters: list, loss: Callable[[int], torch.Tensor], steps: int, lr: float, weight: int) -> float:
        """AdamW with a cosine to zero over the steps; the mean loss of the last tenth of them.

        With a time limit the fit takes its share of what is left, `weight` out of those of all fits to come.
        """
        began, limit = time.monotonic(), float("inf")
        if self.minutes is not None:
            left = FITTING * (60 * self.minutes - self.seconds)
            limit = max(1e-9, left * weight / (self.weight - self.done))
        self.done += weight
        optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=1e-4)
        losses = []
        for step in range(steps):
            progress = max(step / steps, (time.monotonic() - began) / limit)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * progress))
            with products_in(self.dtype, self.device):
                value = loss(step)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            optimizer.step()
            losses.append(value.item())
        for parameter in parameters:
            parameter.grad = None
        if not losses:
            with torch.no_grad():
                losses = [loss(0).item()]
        return float(np.mean(losses[-max(1, len(losses) // 10) :]))
