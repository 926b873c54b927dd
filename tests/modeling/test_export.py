"""Encoders as graphs for other runtimes: any batch, the same values, nothing that runtimes run badly."""

import warnings
from dataclasses import replace

import pytest
import torch

from blsam.config import CONFIGS
from blsam.modeling.image_encoder import ImageEncoder
from tests.helpers import TINY, TINY_EXACT, gap, images, tiny

POOLED = replace(TINY, name="tiny_pooled", e_pool=3)  # on 10 x 10 tokens, so that cells are cut at the edge
SIZES = torch.tensor([[120, 160], [160, 100], [90, 50]])
WRITES = ("scatter", "index_put", "index_copy", "copy_", "masked_fill_", "add_.", "sort.")


def graph(encoder, with_sizes):
    batch = torch.export.Dim("batch", min=1, max=64)
    arguments, shapes = {}, {"x": {0: batch}}
    if with_sizes:
        arguments, shapes = {"true_sizes": SIZES[:2]}, shapes | {"true_sizes": {0: batch}}
    with torch.no_grad():
        return torch.export.export(encoder, (images(2, encoder.img_size),), arguments, dynamic_shapes=shapes)


@pytest.mark.parametrize("with_sizes", [False, True], ids=["whole", "extents"])
@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda config: config.name)
def test_a_graph_takes_any_batch(config, with_sizes):
    encoder = tiny(config)
    program = graph(encoder, with_sizes)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called for write in WRITES if write in name]
    for batch in (1, 3):
        x = images(batch)
        of_call = {"true_sizes": SIZES[:batch]} if with_sizes else {}
        with torch.no_grad():
            eager = encoder(x, true_sizes=SIZES[:batch].tolist() if with_sizes else None)
            difference = gap(program.module()(x, **of_call), eager)
        assert difference <= 1e-5, f"batch {batch}: {difference:.1e}"


def test_an_exported_graph_has_no_loop_over_blocks_of_logits():
    sizes = (160, 1616)  # 10 x 10 and 101 x 101 tokens, with partial windows both; the larger has 50 blocks a layer
    with torch.device("meta"):
        graphs = [graph(ImageEncoder(TINY_EXACT, size).eval(), False) for size in sizes]
    calls = [sum(node.op == "call_function" for node in program.graph.nodes) for program in graphs]
    assert calls[1] <= calls[0] * 1.05, calls


@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda config: config.name)
def test_traced_with_gradients_on(config):
    encoder, x = tiny(config), images(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the checks, which are constants of the graph
        traced = torch.jit.trace(encoder, (x,), check_trace=False)
    other = images(2).flip(0)
    with torch.no_grad():
        assert gap(traced(other), encoder(other)) <= 1e-5, gap(traced(other), encoder(other))


def test_extents_as_integers_are_constants_of_a_graph():
    encoder, x, sizes = tiny(), images(2), SIZES[:2].tolist()
    with torch.no_grad():
        program = torch.export.export(encoder, (x,), {"true_sizes": sizes})
        difference = gap(program.module()(x, true_sizes=sizes), encoder(x, true_sizes=sizes))
    assert difference <= 1e-5, difference


@pytest.mark.e2e
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "torch.jit"])
@pytest.mark.parametrize("config", [TINY_EXACT, TINY, POOLED], ids=lambda config: config.name)
def test_onnx_gives_the_same_values(config, dynamo, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    encoder, path = tiny(config), tmp_path / "encoder.onnx"
    to_onnx(encoder, images(2), path, dynamo)
    if dynamo:
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        assert "MatMul" in kinds and not [kind for kind in kinds if "Scatter" in kind or kind == "Loop"], kinds
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3) if dynamo else (2,):
        x = images(batch)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        with torch.no_grad():
            difference = gap(found, encoder(x))
        assert difference <= 1e-4, f"batch {batch}: {difference:.1e}"


@pytest.mark.slow
def test_no_scatter_in_the_onnx_of_the_small_model(tmp_path):
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    to_onnx(ImageEncoder(CONFIGS["blsam_vit_t"], 208).eval(), images(2, 208), tmp_path / "encoder.onnx", True)
    kinds = {node.op_type for node in onnx.load(tmp_path / "encoder.onnx").graph.node}
    assert "MatMul" in kinds and not [kind for kind in kinds if "Scatter" in kind or kind == "Loop"], kinds


def to_onnx(encoder, x, path, dynamo):
    # the example has a batch of two: torch.export makes a constant of one
    options = {"dynamo": True, "dynamic_shapes": {"x": {0: torch.export.Dim("batch", min=1, max=64)}}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(encoder, (x,), path, verbose=False, **options if dynamo else {"dynamo": False})
