"""Files against torch: what `check` says of them, and whether it can say no."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from blsam.build_sam import build_sam
from blsam.export import check, write
from blsam.export.tools import TOOLS, decoder_outputs
from tests.helpers import TINY, TINY_EXACT, randomize

pytestmark = pytest.mark.e2e
SIX = ["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size"]


def of(config, size):
    torch.manual_seed(0)
    sam = build_sam(config, image_size=size)
    randomize(sam.image_encoder)
    return sam


@pytest.fixture(scope="module", params=[TINY_EXACT, TINY], ids=lambda config: config.name)
def encoders(request, tmp_path_factory):
    """A model, and its encoder as a file for each kind of tool."""
    sam, folder = of(request.param, 160), tmp_path_factory.mktemp("encoders")
    paths = {name: folder / f"{name}.onnx" for name in ("blsam", "anylabeling")}
    for name, path in paths.items():
        write.encoder_onnx(sam.image_encoder, TOOLS[name], path, {"model": "tiny"})
    return sam, paths


@pytest.mark.parametrize("name", ["blsam", "anylabeling"])
def test_an_encoder_gives_what_torch_gives_and_another_does_not(encoders, name):
    sam, paths = encoders
    model = onnx.load(paths[name])
    assert {one.key: one.value for one in model.metadata_props}["model"] == "tiny"
    assert not [node.op_type for node in model.graph.node if "Scatter" in node.op_type or node.op_type == "Loop"]
    assert model.graph.output[0].name == "image_embeddings"
    run = check.runner(paths[name])
    found = check.check_encoder(sam, TOOLS[name], run)
    assert found.holds, found
    assert (found.same is None) == (not sam.image_encoder.config.routed)
    with torch.no_grad():
        weight = sam.image_encoder.blocks[-1].mlp.lin2.weight
        kept = weight.clone()
        weight *= 1.01
        other = check.check_encoder(sam, TOOLS[name], run)
        weight.copy_(kept)
    assert not other.holds, other


def test_an_encoder_takes_any_batch(encoders):
    session = onnxruntime.InferenceSession(encoders[1]["blsam"], providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, 3, 160, 160)).astype(np.float32)
    x[0, :, 120:] = 0
    x[1, :, :, 90:] = 0
    together = session.run(None, {"x": x})
    for i in range(3):
        for one, all_ in zip(session.run(None, {"x": x[i : i + 1]}), together):
            difference = np.abs(one[0].astype(float) - all_[i]).max()
            assert difference <= 1e-4, f"image {i}: {difference:.1e}"


@pytest.mark.parametrize("name", TOOLS)
def test_a_decoder_gives_what_torch_gives_and_another_does_not(name, tmp_path):
    sam, path = of(TINY, 160), tmp_path / "decoder.onnx"
    write.decoder_onnx(sam, TOOLS[name], path, {})
    graph = onnx.load(path).graph
    assert [one.name for one in graph.input] == SIX
    assert [one.name for one in graph.output] == list(decoder_outputs(TOOLS[name]))
    run = check.runner(path)
    found = check.check_decoder(sam, TOOLS[name], run)
    assert found.holds, found
    with torch.no_grad():
        sam.prompt_encoder.point_embeddings[1].weight += 0.5
        other = check.check_decoder(sam, TOOLS[name], run)
    assert not other.holds, other


def test_values_that_are_no_numbers_do_not_hold(tmp_path):
    sam, path = of(TINY, 160), tmp_path / "decoder.onnx"
    write.decoder_onnx(sam, TOOLS["blsam"], path, {})
    run = check.runner(path)
    for place in range(3):

        def broken(inputs, place=place):
            outputs = run(inputs)
            outputs[place] = np.full_like(outputs[place], np.nan)
            return outputs

        found = check.check_decoder(sam, TOOLS["blsam"], broken)
        assert not found.holds, (place, found)


def test_a_large_encoder_can_be_joined_with_what_prepares_photos(encoders, monkeypatch):
    def too_large(model, *_, **__):
        assert isinstance(model, str), "checked in memory, which fails beyond 2 GiB"

    monkeypatch.setattr(onnx.checker, "check_model", too_large)
    model = onnx.load(encoders[1]["blsam"])
    joined = write.with_photo(model, 160)
    assert [one.name for one in joined.graph.input] == ["input_image"]
    assert {name for node in joined.graph.node for name in node.input} >= {"x", "input_image", "photo_pixels"}


def test_openvino_gives_what_torch_gives(tmp_path):
    pytest.importorskip("openvino")
    # whole windows: OpenVINO 2026.4 is wrong on windows of 7 x 3 tokens, smaller than any real model's; at 160 it is 1.4
    # deviations off, which `check` says
    sam = of(TINY, 224)
    path = tmp_path / "tiny.encoder.onnx"
    write.encoder_onnx(sam.image_encoder, TOOLS["blsam"], path, {})
    path = write.to_openvino(path, path.with_suffix(".xml"), {"model": "tiny"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.encoder.bin", "tiny.encoder.xml"]
    assert sorted(write.files_of(path)) == sorted(tmp_path.iterdir())
    found = check.check_encoder(sam, TOOLS["blsam"], check.runner(path))
    assert found.holds, found
