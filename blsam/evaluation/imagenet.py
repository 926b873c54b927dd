"""Classifiers on labelled images: top-1 and top-5, multiply-adds, images a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ..data.imagenet import EvaluationImages, LabelledImages, checked, collate
from ..distributed import World, synchronize
from .classifiers import Measured


@dataclass(frozen=True)
class Correct:
    """How many of so many images had their class first, and among the first five; macs: multiply-adds of all, of a
    model that computes more of some than of others (0: of another)."""

    first: int
    five: int
    images: int
    macs: int = 0

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * self.first / self.images

    @property
    def top5(self) -> float:
        """In percent."""
        return 100 * self.five / self.images

    @property
    def gmacs(self) -> float:
        """10^9 multiply-adds of an image, the mean over all."""
        return self.macs / self.images / 1e9

    @staticmethod
    def together(parts: Sequence[Correct]) -> Correct:
        """Of all processes."""
        return Correct(*(sum(getattr(one, name) for one in parts) for name in ("first", "five", "images", "macs")))


@torch.no_grad()
def count_correct(
    classify: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Any], device: torch.device
) -> Correct:
    """classify: images [B, 3, S, S] -> logits [B, classes]; where it is a model of which an image decides how much is
    computed (`by_image`), multiply-adds are counted too. batches: of `data.imagenet.collate`. ValueError in one line for
    a damaged image."""
    first = five = total = macs = 0
    for batch in batches:
        images, labels = (part.to(device, non_blocking=True) for part in checked(batch))
        if getattr(classify, "by_image", False):
            found: Any = classify.classify(images)  # type: ignore[attr-defined]
            logits, macs = found.logits, macs + int(found.macs.sum())
        else:
            logits = classify(images)
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # [B, 5]
        first += int(best[:, 0].sum())
        five += int(best.sum())
        total += len(labels)
    return Correct(first, five, total, macs)


def accuracy(
    measured: Measured, images: LabelledImages, batch: int, workers: int, device: torch.device, world: World
) -> Correct:
    """Of a model on all images, which the processes share; ValueError in one line for a damaged image."""
    mine = EvaluationImages(images, measured.transform, world.rank, world.size)
    loader = DataLoader(mine, batch_size=batch, num_workers=workers, collate_fn=collate)
    return Correct.together(world.gather(count_correct(measured.model, loader, device)))


def some_images(measured: Measured, images: LabelledImages | None, count: int) -> torch.Tensor:
    """Images [n, 3, S, S] as a model sees them, spread over all there are; noise where there are none."""
    if images is None:
        return torch.randn(count, 3, measured.size, measured.size, generator=torch.Generator().manual_seed(0))
    places = sorted({i * len(images) // count for i in range(count)})
    return torch.stack([measured.transform(images.read(i)) for i in places])


@torch.no_grad()
def counted_macs(model: nn.Module, images: torch.Tensor) -> float:
    """Multiply-adds of an image, by counting what a pass does: linear layers, convolutions and attention products.

    images [n, 3, S, S] go through one by one, the mean is returned: exact for every model, also where an image decides
    how much is done.
    """
    total = 0
    for image in images:
        # fused attention is not counted on a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(image[None])
        total += counter.get_total_flops()
    return total / 2 / len(images)


@torch.no_grad()
def images_a_second(model: Callable[..., Any], images: torch.Tensor, seconds: float = 2.0, least: int = 3) -> float:
    """Of passes of this batch, the median of as many as fit into so many seconds, `least` in any case, after one more."""
    model(images)
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        synchronize(images.device)
        start = time.perf_counter()
        model(images)
        synchronize(images.device)
        taken.append(time.perf_counter() - start)
    return len(images) / sorted(taken)[len(taken) // 2]
