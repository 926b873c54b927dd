"""Passes in other runtimes against torch's, and what they do when anything changes."""

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from blsam.build_sam import build_sam
from blsam.predictor import SamPredictor
from blsam.runtimes.backends import BACKENDS
from blsam.runtimes.engine import HELD, Engine
from tests.helpers import TINY, TINY_EXACT, gap, images, randomize

SIZE = 128  # whole windows and partial ones on both sides
CONFIGS = [TINY_EXACT, TINY]
SIZES = [(128, 128), (96, 128), (128, 70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared by the tests of this file: each encoder is compiled once."""
    return tmp_path_factory.mktemp("compiled")


def model(config=TINY, runtime=None, folder=None):
    torch.manual_seed(0)
    sam = build_sam(config, image_size=SIZE)
    randomize(sam.image_encoder)
    if runtime:
        sam.image_encoder.engine = Engine(runtime, folder)
    return sam


def batch():
    x = images(3, SIZE)
    for image, (height, width) in zip(x, SIZES):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return x


@torch.no_grad()
@pytest.mark.parametrize("runtime", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_gives_what_torch_gives(runtime, config, folder):
    x, ours, torchs = batch(), model(config, runtime, folder).image_encoder, model(config).image_encoder
    found, routing = ours.encode(x, true_sizes=SIZES)
    expected, own = torchs.encode(x, true_sizes=SIZES)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert gap(found, expected) < 1e-4
    assert len(routing.stages) == len(own.stages)
    for stage, other in zip(routing.stages, own.stages):
        assert torch.equal(stage.mask, other.mask) and torch.equal(stage.counts, other.counts)
        torch.testing.assert_close(stage.scores, other.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.encode(x)[0], found)  # it finds the padding itself


@torch.no_grad()
def test_products_in_bfloat16_are_close_to_torchs(folder):
    ours, exact = model(TINY_EXACT, "openvino", folder).image_encoder, model(TINY_EXACT).image_encoder
    ours.use_dtype(torch.bfloat16)
    found, expected = ours(batch()), exact(batch())
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


@torch.no_grad()
def test_a_ratio_for_one_call_and_all_tokens(folder):
    ours, torchs = model(TINY, "openvino", folder).image_encoder, model().image_encoder
    for ratio in (0.5, 1.0, 0.25):
        found, routing = ours.encode(batch(), true_sizes=SIZES, keep_ratio=ratio)
        expected, own = torchs.encode(batch(), true_sizes=SIZES, keep_ratio=ratio)
        assert gap(found, expected) < 1e-4, ratio
        assert torch.equal(routing.stages[0].mask, own.stages[0].mask)
        assert len(ours.engine._passes) <= HELD


@torch.no_grad()
def test_other_weights_are_another_pass(folder, caplog):
    ours, torchs = model(TINY_EXACT, "openvino", folder).image_encoder, model(TINY_EXACT).image_encoder
    before = ours(batch())
    caplog.clear()
    for encoder in (ours, torchs):
        encoder.blocks[0].mlp.lin1.weight.mul_(1.5)
    after = ours(batch())
    assert gap(before, after) > 0.01
    assert gap(after, torchs(batch())) < 1e-4
    assert [record.getMessage()[:15] for record in caplog.records] == ["blsam: compilin"]  # of the second alone


@torch.no_grad()
@pytest.mark.parametrize("runtime", BACKENDS)
def test_a_second_start_reads_what_the_first_compiled(runtime, folder, monkeypatch):
    first = model(TINY_EXACT, runtime, folder).image_encoder(batch())
    monkeypatch.setattr(BACKENDS[runtime], "make", None)
    second = model(TINY_EXACT, runtime, folder).image_encoder(batch())
    assert torch.equal(first, second)


@torch.no_grad()
def test_copies_have_an_engine_of_their_own(folder):
    ours = model(TINY_EXACT, "openvino", folder).image_encoder
    expected = ours(batch())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.engine is not ours.engine and not other.engine._passes
        torch.testing.assert_close(other(batch()), expected)


def test_gradients_training_and_a_routing_made_elsewhere_are_torchs(folder):
    ours, torchs = model(TINY, "openvino", folder).image_encoder, model().image_encoder
    x = batch().requires_grad_()
    ours(x).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        routing = torchs.encode(batch(), keep_ratio=0.5)[1]
        found, expected = (encoder.encode(batch(), routing=routing)[0] for encoder in (ours, torchs))
        assert torch.equal(found, expected)
        assert torch.equal(ours.train()(batch()), torchs.train()(batch()))
    assert not ours.engine._passes


def test_a_predictor_notices_nothing(folder):
    photo = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    ours, torchs = SamPredictor(model(TINY, "openvino", folder)), SamPredictor(model())
    for predictor in (ours, torchs):
        predictor.set_image(photo)
    assert gap(ours.features, torchs.features) < 1e-4
    box = np.array([10, 10, 80, 70])
    assert (ours.predict(box=box)[0] == torchs.predict(box=box)[0]).mean() > 0.999
    assert torch.equal(ours.routing.stages[0].mask, torchs.routing.stages[0].mask)


@torch.no_grad()
def test_other_windows_are_another_pass_and_values_behind_torchs_back_are_forgotten(folder):
    ours, torchs = model(TINY_EXACT, "openvino", folder).image_encoder, model(TINY_EXACT).image_encoder
    ours(batch())
    for encoder in (ours, torchs):
        encoder.blocks[0].window_size = 4
    assert gap(ours(batch()), torchs(batch())) < 1e-4
    for encoder in (ours, torchs):
        encoder.blocks[0].mlp.lin1.weight.data.mul_(1.5)
    ours.engine.forget()
    assert gap(ours(batch()), torchs(batch())) < 1e-4


def test_hooks_inside_and_gradients_of_weights_are_torchs(folder):
    ours, torchs = model(TINY_EXACT, "openvino", folder).image_encoder, model(TINY_EXACT).image_encoder
    assert ours(batch()).requires_grad
    with torch.no_grad():
        for encoder in (ours, torchs):
            encoder.blocks[0].register_forward_hook(lambda module, given, result: result * 0.5)
        assert torch.equal(ours(batch()), torchs(batch()))
    assert not ours.engine._passes


@torch.no_grad()
def test_compiled_under_autocast(tmp_path):
    ours = model(TINY, "openvino", tmp_path).image_encoder
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(batch())
    assert gap(found, model(TINY).image_encoder(batch())) < 1e-4


@torch.no_grad()
def test_ratios_that_are_not_worth_it_are_torchs(folder):
    ours, torchs = model(TINY, "openvino", folder).image_encoder, model().image_encoder
    ours.engine.only = frozenset((0.25,))
    assert torch.equal(ours.encode(batch(), keep_ratio=0.7)[0], torchs.encode(batch(), keep_ratio=0.7)[0])
    assert not ours.engine._passes


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, replace(TINY, name="tiny_pooled", e_pool=3)], ids=lambda config: config.name)
def test_a_routed_model_in_bfloat16(config, folder):
    ours, torchs = model(config, "openvino", folder).image_encoder, model(config).image_encoder
    ours.use_dtype(torch.bfloat16)
    (found, routing), (expected, own) = (encoder.encode(batch()) for encoder in (ours, torchs))
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
    for stage, other in zip(routing.stages, own.stages):
        assert (stage.mask & other.mask).sum() > 0.9 * other.mask.sum()


# --- what can go wrong -----------------------------------------------------------------------------------------------


def entry(folder):
    return next(folder.glob("encoder-tiny_exact-openvino-*"))


@torch.no_grad()
@pytest.mark.parametrize("how", ["cut", "another", "facts", "graph", "weights"])
def test_a_compiled_file_that_is_not_the_right_one(how, tmp_path):
    model(TINY_EXACT, "openvino", tmp_path).image_encoder(batch())
    here = entry(tmp_path)
    graph, weights, facts = (here / name for name in ("encoder.xml", "encoder.bin", "facts.json"))
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "another":  # the whole entry of other weights, under this one's name
        other = json.loads(facts.read_text())
        facts.write_text(json.dumps(other | {"weights": "0" * 64}))
    elif how == "facts":
        facts.write_text("{")
    elif how == "weights":
        weights.write_bytes(bytes(len(weights.read_bytes())))
    else:
        graph.write_bytes(bytes(len(graph.read_bytes())))
    with pytest.raises(ValueError, match="damaged or of another model; remove it") as raised:
        model(TINY_EXACT, "openvino", tmp_path).image_encoder(batch())
    assert str(here) in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with torch.no_grad(), pytest.raises(OSError, match="cannot be kept in .*BLSAM_CACHE, or give --no-cache"):
        model(TINY_EXACT, "openvino", tmp_path / "file" / "cache").image_encoder(batch())


@torch.no_grad()
def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = model(TINY_EXACT, "openvino", None).image_encoder(batch())
    assert gap(found, model(TINY_EXACT).image_encoder(batch())) < 1e-4
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_what_a_runtime_cannot_do_is_one_line(folder, monkeypatch):
    half = model(TINY_EXACT, "onnxruntime", folder).image_encoder.use_dtype(torch.bfloat16)
    with pytest.raises(ValueError, match="onnxruntime multiplies in float32 on a CPU"):
        half(batch())
    with pytest.raises(ValueError, match="was cast to torch.float16"):
        model(TINY_EXACT, "openvino", folder).image_encoder.use_dtype(torch.float16)(batch())
    with pytest.raises(ValueError, match="cannot draw tokens at random"):
        model(replace(TINY, score="random"), "openvino", folder).image_encoder(batch())

    def broken(*_):
        raise RuntimeError("no such operator\nat line 3")

    monkeypatch.setattr(BACKENDS["openvino"], "make", broken)
    with pytest.raises(ValueError, match="tiny cannot be compiled for openvino: no such operator$"):
        model(TINY, "openvino", None).image_encoder(batch())


@torch.no_grad()
def test_wrong_values_are_seen(monkeypatch):
    """A way that is wrong is followed by the next; if none is left, nothing is used."""
    right, tried = BACKENDS["openvino"].make.__func__, []

    def wrong_at_first(cls, graph, inputs, way, folder):
        tried.append(way)
        if len(tried) == 1:
            graph = copy.deepcopy(graph)
            graph.encoder.blocks[0].mlp.lin1.weight.mul_(1.5)
        right(cls, graph, inputs, way, folder)

    monkeypatch.setattr(BACKENDS["openvino"], "make", classmethod(wrong_at_first))
    found = model(TINY_EXACT, "openvino", None).image_encoder(batch())
    assert gap(found, model(TINY_EXACT).image_encoder(batch())) < 1e-4
    assert tried == list(BACKENDS["openvino"].ways)

    monkeypatch.setattr(BACKENDS["openvino"], "ways", ({},))
    tried.clear()
    with pytest.raises(ValueError, match="does not give what torch gives"):
        model(TINY_EXACT, "openvino", None).image_encoder(batch())


@torch.no_grad()
def test_a_wrong_choice_of_tokens_is_seen(monkeypatch):
    right = BACKENDS["openvino"].make.__func__

    def other_predictors(cls, graph, *rest):
        graph = copy.deepcopy(graph)
        for predictor in graph.encoder.predictors:
            predictor.linear.weight.mul_(-1)
        right(cls, graph, *rest)

    monkeypatch.setattr(BACKENDS["openvino"], "make", classmethod(other_predictors))
    with pytest.raises(ValueError, match="does not give what torch gives"):
        model(TINY, "openvino", None).image_encoder(batch())
