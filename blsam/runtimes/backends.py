"""An encoder's pass in OpenVINO and in ONNX Runtime: made from torch into a folder, read from there, run.

Passes take one image, x [1, 3, S, S] float32, and of a routed encoder its extents, int64 [1, 2]. They give numpy arrays:
the embedding, and of a routed encoder its prime tokens and scores (`export.graphs.EncoderGraph`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from ..export.check import runner
from ..export.write import exported, import_openvino, is_large, quiet, save

Inputs = tuple[torch.Tensor, ...]
Pass = Callable[..., list[np.ndarray]]
Options = dict[str, str]
INPUTS = ("x", "extents")
OUTPUTS = ("image_embeddings", "prime", "scores")


class Backend(Protocol):
    """What a runtime is to the engine.

    dtypes: what it multiplies in. ways: options to compile with, the fastest first; where values are wrong, the next is
    tried. version: of the package, since files are of one version. make: the files of a module in float32, for inputs of
    these shapes, in one of the ways. read: the pass that they hold, multiplied in a dtype, with what speeds up the next
    reading kept beside them if it may; any error of the runtime's if they are damaged.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]]
    ways: ClassVar[tuple[Options, ...]]

    @staticmethod
    def version() -> str: ...

    @classmethod
    def make(cls, graph: nn.Module, inputs: Inputs, way: Options, folder: Path) -> None: ...

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype, keep: bool = False) -> Pass: ...


class OpenVINO:
    """The graph in float32; OpenVINO itself multiplies in bfloat16 where it is told to.

    Its fused subgraphs ("snippets") are wrong for some shapes of windows in 2026.4, hence the second way.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    ways: ClassVar[tuple[Options, ...]] = ({}, {"SNIPPETS_MODE": "DISABLE"})

    @staticmethod
    def version() -> str:
        return import_openvino().__version__

    @classmethod
    def make(cls, graph: nn.Module, inputs: Inputs, way: Options, folder: Path) -> None:
        openvino = import_openvino()
        openvino.save_model(cls.model(graph, inputs), folder / "encoder.xml", compress_to_fp16=False)
        (folder / "way.json").write_text(json.dumps(way))

    @staticmethod
    def model(graph: nn.Module, inputs: Inputs) -> Any:
        """The module as OpenVINO's own; its `convert_model` does the same, many times slower."""
        import_openvino()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        with torch.no_grad(), quiet():
            decoder = TorchScriptPythonDecoder(torch.jit.trace(graph, inputs, check_trace=False, strict=False))
            front = FrontEndManager().load_by_framework("pytorch")
            model = front.convert(front.load(decoder))  # which does not hold the decoder
        model.reshape({number: list(one.shape) for number, one in enumerate(inputs)})
        return model

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype, keep: bool = False) -> Pass:
        openvino = import_openvino()
        way = json.loads((folder / "way.json").read_text())
        options = cls.options(dtype, way)
        if keep:  # what compiling takes seconds for at every start; the weights stay in the file beside it
            options |= {"CACHE_DIR": str(folder / "compiled"), "CACHE_MODE": "OPTIMIZE_SIZE"}
        compiled = openvino.Core().compile_model(folder / "encoder.xml", "CPU", options)

        def run(*inputs: np.ndarray) -> list[np.ndarray]:
            found = compiled(list(inputs))
            return [found[output] for output in compiled.outputs]

        return run

    @staticmethod
    def options(dtype: torch.dtype, way: Options) -> dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            **way,
        }


class ONNXRuntime:
    """In float32, which is all that its kernels for CPUs multiply in."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    ways: ClassVar[tuple[Options, ...]] = ({},)

    @staticmethod
    def version() -> str:
        import onnxruntime

        return onnxruntime.__version__

    @classmethod
    def make(cls, graph: nn.Module, inputs: Inputs, way: Options, folder: Path) -> None:
        names = OUTPUTS[: len(OUTPUTS) if len(inputs) > 1 else 1]
        with torch.no_grad():
            model = exported(graph, dict(zip(INPUTS, inputs)), names)
        save(model, folder / "encoder.onnx", {}, is_large(graph))

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype, keep: bool = False) -> Pass:
        run = runner(folder / "encoder.onnx")
        return lambda *inputs: run(dict(zip(INPUTS, inputs)))


BACKENDS: dict[str, type[Backend]] = {"openvino": OpenVINO, "onnxruntime": ONNXRuntime}
