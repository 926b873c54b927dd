"""Modules to files: ONNX, or OpenVINO's pair of .xml and .bin made from it."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..modeling.image_encoder import ImageEncoder
from ..modeling.sam import Sam
from .graphs import OPSET, DecoderGraph, EncoderGraph, photo_graph
from .tools import Tool, decoder_outputs

MOST_BYTES = 1_800_000_000  # of weights inside an ONNX file; protobuf's limit is 2 GiB


def import_openvino() -> Any:
    """The package `openvino`, without the one by which it sends usage data, at its import already."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporters say of constants and of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@torch.no_grad()
def encoder_onnx(encoder: ImageEncoder, tool: Tool, path: Path, facts: Mapping[str, str]) -> None:
    """Write an encoder as ONNX: `x` [B, 3, S, S] (for AnyLabeling `input_image` [H, W, 3]) -> `image_embeddings`, and of
    a routed model `prime`. Weights beyond 1.8 GB lie beside it, in a file of the same name with `.data` behind."""
    size = encoder.img_size
    names = ["image_embeddings", "prime"][: 2 if encoder.config.routed else 1]
    x = torch.randn(2, 3, size, size)  # of two: torch.export makes a constant of one
    batch = torch.export.Dim("batch", min=1, max=64)
    model = exported(EncoderGraph(encoder), {"x": x}, names, {"x": {0: batch}})
    if tool.photo:
        model = with_photo(model, size)
    save(model, path, facts, is_large(encoder))


def exported(
    graph: torch.nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str], shapes: Any = None
) -> Any:
    """A module as a model of ONNX, by torch.export."""
    with quiet():
        program = torch.onnx.export(
            graph, tuple(inputs.values()), dynamo=True, input_names=list(inputs), output_names=list(outputs),
            opset_version=OPSET, dynamic_shapes=shapes, verbose=False, optimize=False,
        )  # fmt: skip
        assert program is not None  # it is where no file is named
        slim(program.model)
    return program.model_proto


def slim(model: Any) -> None:
    """Fold what is constant and drop what is not used, in place. The exporter's own optimisation does so twice, and looks
    for patterns to rewrite, which takes longer than all else and gains nothing here."""
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def is_large(module: torch.nn.Module) -> bool:
    """Whether the weights are too many for one file."""
    return sum(p.nbytes for p in module.parameters()) > MOST_BYTES


def with_photo(model: Any, size: int) -> Any:
    """Put what resizes, normalises and pads a photo before an encoder; joined here, since onnx's own way of joining checks
    the whole model in memory, which fails beyond 2 GiB."""
    import onnx

    before = onnx.parser.parse_model(photo_graph(size)).graph
    for node in before.node:  # its names apart from the encoder's
        for names in (node.input, node.output):
            names[:] = [name and rename_photo(name) for name in names]
    nodes = [*before.node, *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(before.input)
    for output in model.graph.output:  # a photo is one image
        output.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def rename_photo(name: str) -> str:
    """A value of what stands before an encoder, in the encoder's graph: its input, or a name of its own."""
    return {"input_image": name, "prepared": "x"}.get(name, f"photo_{name}")


@torch.no_grad()
def decoder_onnx(sam: Sam, tool: Tool, path: Path, facts: Mapping[str, str]) -> None:
    """Write prompt encoder, mask decoder and postprocessing as ONNX, with SAM's six inputs."""
    graph_onnx(DecoderGraph(sam, tool).eval(), decoder_outputs(tool), path, facts)


@torch.no_grad()
def graph_onnx(
    graph: DecoderGraph, outputs: Sequence[str], path: Path, facts: Mapping[str, str], opset: int = OPSET
) -> None:
    """Write a decoder with `outputs` by name; the number of points is free."""
    import onnx

    inputs, axes = graph.example(), {"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}}
    content: Any = io.BytesIO()
    with quiet():  # traced: the older exporter takes sizes that are values, which torch.export does not
        torch.onnx.export(
            graph, tuple(inputs.values()), content, dynamo=False, opset_version=opset, do_constant_folding=True,
            input_names=list(inputs), output_names=list(outputs), dynamic_axes=axes,
        )  # fmt: skip
    save(onnx.load_from_string(content.getvalue()), path, facts)


def save(model: Any, path: Path, facts: Mapping[str, str], large: bool = False) -> None:
    """One file with `facts` as its metadata, or two where the weights are too many for one."""
    import onnx

    onnx.helper.set_model_props(model, dict(facts))
    model.producer_name = "blsam"
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)
    onnx.checker.check_model(str(path))


def to_openvino(onnx_path: Path, path: Path, facts: Mapping[str, str]) -> Path:
    """OpenVINO's form of an ONNX file, in float32: `path` (.xml) and the .bin beside it, in place of the ONNX file."""
    openvino = import_openvino()
    model = openvino.Core().read_model(onnx_path)
    for key, value in facts.items():
        model.set_rt_info(value, ["blsam", key])
    openvino.save_model(model, path, compress_to_fp16=False)
    for file in files_of(onnx_path):
        file.unlink()
    return path


def files_of(path: Path) -> list[Path]:
    """The files that one export consists of."""
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(f"{path.name}.data")
    return [path, beside] if beside.is_file() else [path]
