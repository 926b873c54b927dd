"""Which number format the encoder multiplies in: float32, bfloat16, or what suits the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # options need the names alone, at once
    import torch

DTYPES = ("float32", "bfloat16", "auto")


def resolve_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype a name stands for on a device; ValueError for other names.

    "auto" is bfloat16 where the hardware multiplies it, else float32. "bfloat16" works everywhere, without such
    hardware slowly.
    """
    import torch

    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, is {name!r}")
    if name == "auto":
        name = "bfloat16" if has_bfloat16(torch.device(device)) else "float32"
    return getattr(torch, name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch 2.10 and later
    if get_capabilities is not None:
        found = get_capabilities()
        return any(found.get(key, False) for key in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
