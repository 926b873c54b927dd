"""The models by name: parameters, multiply-adds of the encoder at 1024 x 1024, and whether weights ship."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..config import MODELS, OUT_CHANNELS, EncoderConfig
from ..options import shipped_checkpoint
from ..precision import WIDE, processor, resolve_dtype
from ..runtimes.choice import resolve_for

if TYPE_CHECKING:
    import torch

PROMPTS_AND_DECODER = 6_220 + 4_058_340  # parameters of SAM's prompt encoder and mask decoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> None:
    """A table of the registry, GMACs at 1024."""
    import torch

    from ..baselines.sam.macs import config_macs
    from ..modeling.macs import sam_macs

    print(f"{'model':<16} {'parameters':>11} {'GMACs SAM':>10} {'GMACs ours':>11} {'keep ratio':>11}  weights  auto")
    for name, config in MODELS.items():
        keep = f"{config.keep_ratio:g}" if config.reduces else "-"
        has = "shipped" if shipped_checkpoint(name) else "-"
        dense, ours = sam_macs(config.dense) / 1e9, config_macs(config) / 1e9
        runtime, dtype = resolve_for(config, "auto", "auto")
        auto = f"{runtime}, {_name(dtype)}"
        print(
            f"{name:<16} {parameters(config) / 1e6:>9.1f} M {dense:>10.1f} {ours:>11.1f} {keep:>11}  {has:<7}  {auto}"
        )
    print(f"auto: what --runtime and --dtype come to on this processor ({processor()})", end="")
    if torch.cuda.is_available():
        print(f"; on its GPU torch, {_name(resolve_dtype('auto', 'cuda', WIDE))}", end="")
    print()
    print("GMACs of the encoder at 1024 x 1024: the dense model as segment_anything computes it, and ours")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parameters(config: EncoderConfig, image_size: int = 1024) -> int:
    """Of the whole model, from its configuration alone."""
    dim, e, side = config.dim, config.e_dim, image_size // 16
    total = PROMPTS_AND_DECODER
    total += 3 * 16 * 16 * dim + dim + side * side * dim  # patches, positions
    total += dim * OUT_CHANNELS + 9 * OUT_CHANNELS**2 + 4 * OUT_CHANNELS  # neck
    total += (config.grow * OUT_CHANNELS) ** 2 if config.grow > 1 else 0
    for layer in range(config.depth):
        reach = side if config.is_global(layer) else config.window
        total += 2 * dim + _attention(dim, dim, config.heads, reach)  # with its norm
        total += 2 * dim + _linear(dim, 4 * dim) + _linear(4 * dim, dim)
        if config.stage_of(layer) is not None:
            total += 2  # alpha of both sublayers
        if config.has_e_block(layer):
            total += 2 + 2 * dim + _attention(dim, e, config.e_heads_of(layer), reach)  # gamma of both, a norm
            total += 2 * dim + _linear(dim, e) + _linear(e, 4 * e) + _linear(4 * e, e) + _linear(e, dim)
    return total + len(config.predictor_layers) * (2 * dim + _linear(dim, 2))


def _attention(dim: int, inner: int, heads: int, reach: int) -> int:
    """Projections and both tables of relative positions."""
    return _linear(dim, 3 * inner) + _linear(inner, dim) + 2 * (2 * reach - 1) * (inner // heads)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
