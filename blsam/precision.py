"""Which number format a model multiplies in: float32, bfloat16, or what was measured to be faster on the processor."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # options need the names alone, at once
    import torch

DTYPES = ("float32", "bfloat16", "auto")
WIDE = 768  # of ViT-B
TINY = 192  # of vit_t

# By kind of processor and runtime: the width of tokens from which bfloat16 was measured to be faster than float32
# (docs/speed.md). Where nothing was measured float32 is taken.
FASTER_FROM = {
    ("amx", "torch"): 0,
    ("amx", "openvino"): 0,
    ("avx512_bf16", "torch"): TINY,
    ("avx512_bf16", "openvino"): 0,
}


def resolve_dtype(name: str, device: torch.device | str, width: int, runtime: str = "torch") -> torch.dtype:
    """The dtype a name stands for on a device, for a model whose tokens are so wide; ValueError for other names.

    "auto" is bfloat16 on the processors of `FASTER_FROM`, and, not measured, on GPUs with instructions for it.
    "bfloat16" works everywhere, without such hardware slowly.
    """
    import torch

    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, is {name!r}")
    if name == "auto":
        device = torch.device(device)
        if device.type == "cuda":
            faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            least = FASTER_FROM.get((processor(), runtime)) if device.type == "cpu" else None
            faster = least is not None and width >= least
        name = "bfloat16" if faster else "float32"
    return getattr(torch, name)


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to a dtype, or for float32 what was there before."""
    import torch

    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def processor() -> str:
    """The kind of this processor, by its instructions for products: "amx", "avx512_bf16", "avx512", else its name."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 and later
        found = torch.cpu.get_capabilities()
        names = {"amx": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512_f"}
        return next((kind for kind, name in names.items() if found.get(name)), platform.machine())
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else platform.machine()
