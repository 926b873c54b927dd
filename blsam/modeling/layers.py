"""Layers as others may have changed them: wrapped (LoRA), hooked, quantised, sharded, cast.

Where the encoder takes a layer's weights apart for speed, it asks here whether the layer is still the plain one.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(layer: nn.Module) -> bool:
    """Whether calling this is nothing but a product with its `weight` and its `bias`.

    Hooks on all modules at once do not count: they belong to profilers, which should see what runs without them.
    """
    if type(layer) is not nn.Linear or layer.bias is None or "forward" in vars(layer):
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return not any(hooks) and not is_traceable_wrapper_subclass(layer.weight)  # quantised or sharded values


def input_dtype(module: nn.Module) -> torch.dtype:
    """What a layer multiplies in: the type of its first floating-point parameter, float32 if it shows none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
