"""One process or many: the process group, and the one place where a model is prepared for it, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..evaluation.runner import processes
from ..modeling.blocks import Block
from .objective import TrainedSam

STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all processes, so that all take the same turn."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def gather(self, value: object) -> list:
        """The value of every process, in order of rank, on all of them."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, or this one alone; gloo carries the CPU's tensors, NCCL those of GPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with processes(backend, timedelta(minutes=30)) as (rank, size):
        yield World(rank, size)


def prepare(
    model: TrainedSam, world: World, device: torch.device, *, strategy: str, checkpointing: bool, compiled: bool
) -> nn.Module:
    """Activation checkpointing, then compilation, block by block; then the processes' share of it all.

    Blocks must be wrapped before they are compiled, and compiled before they are sharded: each step works on what the
    one before made, and parameters must have their last form before an optimiser sees them.
    """
    model = model.to(device)
    if checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    blocks = list(model.sam.image_encoder.blocks)
    if compiled:
        for block in blocks:
            block.compile()
    if world.size == 1:
        return model
    if strategy == "fsdp":
        for block in blocks:
            fully_shard(block)
        return fully_shard(model)
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
