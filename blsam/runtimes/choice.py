"""Which runtimes there are, and which one was measured to be the fastest on a kind of processor."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..precision import has_bfloat16, resolve_dtype

if TYPE_CHECKING:  # options need the names alone, at once
    import torch

RUNTIMES = ("torch", "openvino", "onnxruntime", "auto")

# The fastest by kind of processor and dtype, from docs/speed.md; where nothing was measured, torch.
FASTEST = {
    ("avx512_bf16", "float32"): "openvino",
    ("avx512_bf16", "bfloat16"): "openvino",
}


def resolve(runtime: str, dtype: str, device: torch.device | str = "cpu") -> tuple[str, torch.dtype]:
    """A runtime and a dtype by name -> those that are meant on this machine.

    "auto" takes the fastest that is installed. ValueError where both, or the device, do not go together, ImportError
    where the runtime's package is missing.
    """
    import torch

    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, is {runtime!r}")
    device = torch.device(device)
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
    missing = [name for name in NEEDED[runtime] if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; pip install 'blsam[{EXTRAS[runtime]}]'")
    return runtime, resolved


NEEDED = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
EXTRAS = {"openvino": "openvino", "onnxruntime": "onnx"}


def processor() -> str:
    """The kind of this processor, by its instructions for matrices: "amx", "avx512_bf16", "avx512", or "other"."""
    import torch

    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if found.get("amx_bf16"):
        return "amx"
    if has_bfloat16(torch.device("cpu")):
        return "avx512_bf16" if found.get("avx512_bf16", True) else "other"
    return "avx512" if found.get("avx512_f") or found.get("avx512") else "other"
