"""What a run says of itself: a row every few steps, damaged photos, and how the routing moves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..data.views import Sample
from ..distributed import Stopwatch, World, peak_gb
from ..modeling.blocks import Fusion
from ..modeling.routing import Routing
from .objective import Losses

MOST_DAMAGED = 0.01  # share of the photos


class Rows:
    """Means since the last row over all processes: losses apart, prime tokens that change between stages; seconds a
    step by part, of this process."""

    def __init__(self, images: int, device: torch.device, world: World) -> None:
        self.images, self.device, self.world = images, device, world
        self._clear()

    def _clear(self) -> None:
        self.terms: dict[str, list[torch.Tensor]] = {}
        self.parts: dict[str, list[float]] = {}
        self.steps = 0

    def add(self, losses: Losses) -> None:
        """A pass."""
        terms = losses.terms | {"loss": losses.loss.detach()}
        moved = prime_moved(losses.routing)
        for name, value in (terms | ({} if moved is None else {"prime_moved": moved})).items():
            self.terms.setdefault(name, []).append(value)

    def step(self, grad_norm: torch.Tensor, watch: Stopwatch | None) -> None:
        """The end of a step: the gradient's norm before clipping, and its seconds, if they were taken."""
        self.steps += 1
        self.terms.setdefault("grad_norm", []).append(grad_norm)
        for name, seconds in (watch.seconds if watch else {}).items():
            self.parts.setdefault(name, []).append(seconds)

    def row(self, seconds: float) -> dict[str, float]:
        """The row of these steps, which took so many seconds together; begins a new one."""
        mine = {name: torch.stack(values).float().mean().item() for name, values in self.terms.items()}
        every = self.world.gather(mine)
        found = {name: round(float(np.mean([one[name] for one in every])), 5) for name in mine}
        found |= {f"s_{name.replace(' ', '_')}": round(float(np.mean(v)), 4) for name, v in self.parts.items()}
        found["images_per_second"] = round(self.steps * self.images / seconds, 2)
        found["peak_gb"] = round(peak_gb(self.device), 2)
        self._clear()
        return found


def prime_moved(routing: Routing) -> torch.Tensor | None:
    """Share of the prime tokens that were not prime in the stage before; None where there are no two stages."""
    masks = [stage.mask for stage in routing.stages]
    shares = [(after & ~before).sum() / after.sum().clamp(min=1) for before, after in pairwise(masks)]
    return torch.stack(shares).mean() if shares else None


def fusion_scalars(encoder: nn.Module) -> dict[str, list[float]]:
    """alpha and gamma of every routed layer, attention first: {} for an exact model."""
    found: dict[str, list[float]] = {}
    for module in encoder.modules():
        if isinstance(module, Fusion):
            for name, value in module.named_parameters():
                found.setdefault(name, []).extend(round(v, 6) for v in whole(value).tolist())
    return found


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor, put together from all processes where FSDP2 has sharded it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def jaccard(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Prime tokens of both over prime tokens of either, all photos and stages together."""
    both = sum(int((a & b).sum()) for a, b in zip(one, other))
    return both / sum(int((a | b).sum()) for a, b in zip(one, other))


class Damaged:
    """Damaged photos that were skipped, over all processes."""

    def __init__(self, photos: int, world: World, path: Path) -> None:
        self.photos, self.world, self.path = photos, world, path
        self.mine: dict[str, str] = {}
        self.all: dict[str, str] = {}

    def count(self, samples: Sequence[Sample]) -> None:
        self.mine |= {sample.id: sample.damaged for sample in samples if sample.damaged}

    def check(self) -> int:
        """How many there are, listed in a file; ValueError once they are more than 1 % of the photos."""
        for found in self.world.gather(self.mine):
            self.all |= found
        if self.all and self.world.is_main:
            self.path.write_text("".join(f"{reason}\n" for reason in self.all.values()))
        if len(self.all) > MOST_DAMAGED * self.photos:
            first = next(iter(self.all.values()))
            raise ValueError(f"{len(self.all)} of {self.photos} photos are damaged, all in {self.path}; first {first}")
        return len(self.all)
