"""Which runtimes there are, and which one was measured to be the fastest on a kind of processor."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..precision import resolve_dtype

if TYPE_CHECKING:  # options need the names alone, at once
    import torch

RUNTIMES = ("torch", "openvino", "onnxruntime", "auto")
NEEDED = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}

# The fastest by kind of processor and dtype, as measured (docs/runtimes.md); where nothing was measured, torch.
FASTEST = {(kind, dtype): "openvino" for kind in ("amx", "avx512_bf16") for dtype in ("float32", "bfloat16")}


def resolve(runtime: str, dtype: str, device: torch.device | str = "cpu") -> tuple[str, torch.dtype]:
    """A runtime and a dtype by name -> those that are meant on this machine.

    "auto" is what the environment says in `BLSAM_RUNTIME`, else the fastest that is installed. ValueError where both, or
    the device, do not go together, ImportError where the runtime's package is missing.
    """
    import torch

    device, said = torch.device(device), "runtime"
    if runtime == "auto" and device.type == "cpu":
        runtime, said = os.environ.get("BLSAM_RUNTIME") or "auto", "BLSAM_RUNTIME"
    if runtime not in RUNTIMES:
        raise ValueError(f"{said} must be one of {', '.join(RUNTIMES)}, is {runtime!r}")
    if runtime == "onnxruntime" and dtype == "auto":
        dtype = "float32"
    resolved = resolve_dtype(dtype, device)
    if runtime == "auto":
        runtime = "torch"
        if device.type == "cpu":
            fastest = FASTEST.get((processor(), str(resolved).removeprefix("torch.")), "torch")
            runtime = fastest if find_spec(fastest) else "torch"
    if runtime == "torch":
        return runtime, resolved
    if device.type != "cpu":
        raise ValueError(
            f'runtime {runtime!r} runs on the CPU, not on {device}; give device="cpu", or runtime="torch"'
        )
    if runtime == "onnxruntime" and resolved != torch.float32:
        raise ValueError('onnxruntime multiplies in float32 on a CPU; give dtype="float32", or another runtime')
    require(*NEEDED[runtime])
    return runtime, resolved


def require(*modules: str) -> None:
    """ImportError in one line unless these packages of the extras `onnx` and `openvino` are there."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        extra = "openvino" if "openvino" in missing else "onnx"
        raise ImportError(f"{', '.join(missing)} not installed; pip install 'blsam[{extra}]'")


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
