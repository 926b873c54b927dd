"""How long a calibration takes, from its first layer with an E-branch and one photo in each kind of layer (ours)."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from ..modeling.blocks import RoutedBlock
from ..precision import products_in


def minutes_in_all(
    blocks: Mapping[int, RoutedBlock],
    x: torch.Tensor,
    first: int,
    seconds: float,
    dtype: torch.dtype,
    in_stages: int,
    count: int,
) -> float:
    """Minutes of the fits of all layers, of those of the stages, and of the student's stream.

    blocks: by layer. x: one photo's tokens [1, *T, C]. seconds: what layer `first` took. dtype: of the fits' products.
    in_stages: photos of all steps of a stage. count: of photos.
    """
    exact = _through(blocks, x)
    # a step goes forth and back in about the time of a dense pass in the form of attention that has gradients
    with products_in(dtype, x.device), torch.enable_grad():
        step = sum(_through(blocks, x.clone().requires_grad_()).values())
    layers = sum(cost for i, cost in exact.items() if blocks[i].e_block is not None or i == first) / exact[first]
    # the student's stream of all photos takes less than the dense one
    return (seconds * layers + in_stages * step + count * sum(exact.values())) / 60


def _through(blocks: Mapping[int, RoutedBlock], x: torch.Tensor) -> dict[int, float]:
    """Seconds of a photo in the wide part of every layer; those of one window size take as long."""
    cost = {}
    for window, block in {block.window_size: block for block in blocks.values()}.items():
        block.dense(x).sum().item()  # once to warm up; .item() waits for the device
        began = time.perf_counter()
        block.dense(x).sum().item()
        cost[window] = time.perf_counter() - began
    return {i: cost[block.window_size] for i, block in blocks.items()}
