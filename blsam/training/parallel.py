"""The one place where a model is prepared for one process or many, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..distributed import World
from ..modeling.blocks import Block
from .objective import TrainedSam

STRATEGIES = ("ddp", "fsdp")


def prepare(model: TrainedSam, world: World, device: torch.device, *, strategy: str, checkpointing: bool) -> nn.Module:
    """Activation checkpointing, block by block, then the processes' share of it all.

    Blocks must be wrapped before they are sharded, and parameters have their last form before an optimiser sees them.
    The student is not compiled: its index lists change their shapes from step to step.
    """
    model = model.to(device)
    if checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    blocks = list(model.sam.image_encoder.blocks)
    if world.size > 1 and strategy == "fsdp":
        for block in blocks:
            fully_shard(block)
        fully_shard(model)  # in place
        return model
    return distributed(model, world, device)


def distributed(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """A model on its device, with DDP around it where there are several processes."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


@contextmanager
def last_pass_only(model: nn.Module, last: bool) -> Iterator[None]:
    """While gradients accumulate, processes exchange them in the last pass alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
