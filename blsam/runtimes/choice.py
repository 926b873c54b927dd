"""Which runtimes there are, and which one was measured to be the fastest on a kind of processor."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .. import precision
from ..config import EncoderConfig

if TYPE_CHECKING:  # options need the names alone, at once
    import torch

RUNTIMES = ("torch", "openvino", "onnxruntime", "auto")
NEEDED = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}

# The fastest by kind of processor, in both dtypes, as measured (docs/runtimes.md); where nothing was measured, torch.
FASTEST = {"amx": "openvino", "avx512_bf16": "openvino"}


def resolve_for(
    config: EncoderConfig, runtime: str, dtype: str, device: torch.device | str = "cpu"
) -> tuple[str, torch.dtype]:
    """`resolve` for a segmenter; those of `REDUCED` run in torch alone."""
    if config.rule is not None:
        if runtime not in ("torch", "auto"):
            raise ValueError(f"{config.name} is there for comparison and runs in torch alone, not in {runtime}")
        runtime = "torch"
    return resolve(runtime, dtype, device, config.dim)


def resolve(runtime: str, dtype: str, device: torch.device | str, width: int) -> tuple[str, torch.dtype]:
    """A runtime and a dtype by name -> those that are meant on this machine, for an encoder whose tokens are so wide.

    "auto" is what the environment says in `BLSAM_RUNTIME`, else the fastest that is installed. ValueError where both, or
    the device, do not go together, ImportError where the runtime's package is missing.
    """
    import torch

    device, said = torch.device(device), "runtime"
    if runtime == "auto" and device.type == "cpu":
        runtime, said = os.environ.get("BLSAM_RUNTIME") or "auto", "BLSAM_RUNTIME"
    if runtime not in RUNTIMES:
        raise ValueError(f"{said} must be one of {', '.join(RUNTIMES)}, is {runtime!r}")
    if runtime == "auto":
        fastest = FASTEST.get(precision.processor(), "torch") if device.type == "cpu" else "torch"
        runtime = fastest if find_spec(fastest) else "torch"
    resolved = precision.resolve_dtype(dtype, device, width, runtime)
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
