"""What people do to a model whatever the program: adapters, hooks, quantised or compiled parts, an encoder of their own."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import blsam
from blsam.build_sam import build_sam
from tests.helpers import TINY_EXACT, TINY_SIZE, gap, randomize
from tests.photos import PHOTOS

PHOTO = PHOTOS["landscape"]
PROMPT = {"point_coords": np.array([[220, 110]]), "point_labels": np.array([1])}


class Adapter(nn.Module):
    """Round a linear layer, as PEFT's: the layer's own attributes are not passed on."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(base.in_features)
        self.lora_a = nn.Parameter(0.05 * torch.randn(rank, base.in_features, generator=generator))
        self.lora_b = nn.Parameter(0.05 * torch.randn(base.out_features, rank, generator=generator))

    def forward(self, x):
        return self.base_layer(x) + x @ self.lora_a.T @ self.lora_b.T


def linear_layers(module):
    return [(name, one) for name, one in module.named_modules() if isinstance(one, nn.Linear)]


def test_adapters_round_every_linear_layer(sides):
    def program(side):
        predictor = side.predictor()
        for name, layer in linear_layers(predictor.model):
            predictor.model.set_submodule(name, Adapter(layer))
        predictor.set_image(PHOTO)
        return predictor.features, predictor.predict(**PROMPT)

    sides.compare(program)


@pytest.mark.parametrize("method", ["adapter", "parametrization"])
def test_a_change_of_the_linear_layers_changes_the_embedding(sides, method):
    predictor = sides.ours.predictor(PHOTO)
    before, encoder = predictor.features, predictor.model.image_encoder
    for name, layer in linear_layers(encoder.blocks):
        if method == "adapter":
            encoder.blocks.set_submodule(name, Adapter(layer))
        else:
            nn.utils.parametrizations.weight_norm(layer)
            layer.parametrizations.weight.original0.data *= 1.1
    predictor.set_image(PHOTO)
    assert (predictor.features - before).abs().max() > 0.01 * before.std()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation(sides):
    def program(side):
        sam = side.build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sam = torch.ao.quantization.quantize_dynamic(sam, {nn.Linear}, dtype=torch.qint8)
        predictor = side.api.SamPredictor(sam)
        predictor.set_image(PHOTO)
        return predictor.features, predictor.predict(**PROMPT)

    stock, ours = program(sides.stock)[0], program(sides.ours)[0]
    assert stock.shape == ours.shape
    if sides.exact:  # rounding of every activation amplifies the last digit's differences
        difference = (stock - ours).abs().mean() / stock.std()
        assert difference <= 0.05, f"{difference:.1e}"


def test_hooks_on_linear_layers_run_once_a_layer(sides):
    def program(side):
        encoder, called = side.build().image_encoder, {}

        def count(name):
            def hook(module, inputs, output):
                called[name] = called.get(name, 0) + 1
                assert output.shape[-1] == module.out_features and inputs[0].shape[-1] == module.in_features

            return hook

        names = [f"blocks.{i}.{part}" for i in range(12) for part in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")]
        for name in names:
            encoder.get_submodule(name).register_forward_hook(count(name))
        x = torch.rand(1, 3, encoder.img_size, encoder.img_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            encoder(x)
        return dict(sorted(called.items()))

    assert set(sides.compare(program).values()) == {1}


def test_a_hook_on_the_encoder_sees_what_the_predictor_gets(sides):
    def program(side):
        predictor, seen = side.predictor(), []
        predictor.model.image_encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
        predictor.set_image(PHOTO)
        assert torch.equal(seen[0], predictor.features)
        return seen

    sides.compare(program)


class Wrapped(nn.Module):
    """As what `torch.compile` and data-parallel wrappers make: another module, which passes attributes on."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs):
        self.calls += 1
        return 2 * self.module(*args, **kwargs)


@pytest.mark.parametrize("how", ["wrapped", "forward exchanged"])
def test_what_is_put_in_the_place_of_the_encoder_is_used(sides, how):
    def program(side):
        predictor = side.predictor()
        encoder, calls = predictor.model.image_encoder, []
        if how == "wrapped":
            predictor.model.image_encoder = Wrapped(encoder)
        else:
            forward = encoder.forward
            encoder.forward = lambda *args, **kwargs: calls.append(args) or 2 * forward(*args, **kwargs)
        predictor.set_image(PHOTO)
        assert len(calls) + getattr(predictor.model.image_encoder, "calls", 0) == 1
        return predictor.features, predictor.predict(**PROMPT)

    sides.compare(program)


def test_a_compiled_encoder_is_used():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    sam = build_sam(TINY_EXACT, image_size=TINY_SIZE)
    randomize(sam.image_encoder)
    predictor = blsam.SamPredictor(sam)
    predictor.set_image(PHOTO)
    expected = predictor.features
    sam.image_encoder = torch.compile(sam.image_encoder, backend=backend)
    predictor.set_image(PHOTO)
    assert graphs and gap(predictor.features, expected) <= 1e-5


class OwnEncoder(nn.Module):
    """What SAM asks of an encoder: a side, and an embedding of an image."""

    img_size = 320

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 256, 16, 16)
        self.seen = []
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02)

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return self.proj(x)


def test_an_encoder_of_ones_own(sides):
    def program(side):
        sam = side.build()
        sam.image_encoder = OwnEncoder()
        predictor = side.api.SamPredictor(sam)
        predictor.set_image(PHOTO)
        record = {"image": torch.as_tensor(predictor.transform.apply_image(PHOTO)).permute(2, 0, 1)}
        record |= {"original_size": PHOTO.shape[:2], "boxes": torch.tensor([[10.0, 10, 90, 90]])}
        generator = side.api.SamAutomaticMaskGenerator(sam, points_per_side=2, pred_iou_thresh=0.999)
        found = generator.generate(PHOTO)
        return predictor.features, predictor.predict(**PROMPT), sam([record], True), found, sam.image_encoder.seen

    sides.compare(program)


def test_two_images_in_one_tensor(sides):
    """`set_torch_image` takes a batch, as SAM does, and `predict_torch` then answers one set of prompts an image."""

    def program(side):
        predictor = side.predictor()
        images = [
            torch.as_tensor(predictor.transform.apply_image(one)).permute(2, 0, 1) for one in (PHOTO, PHOTO[::-1])
        ]
        predictor.set_torch_image(torch.stack(images), PHOTO.shape[:2])
        return predictor.features, predictor.input_size, predictor.original_size

    sides.compare(program)


@pytest.mark.parametrize("labels", [[2, 3], [1, -1], [0, 2]], ids=str)
def test_labels_beyond_0_and_1(sides, labels):
    """2 and 3 are a box's corners in the exported decoder; in the predictor SAM takes them for plain points."""

    def program(side):
        return side.predictor(PHOTO).predict(
            point_coords=np.array([[120.0, 20], [300, 280]]), point_labels=np.array(labels), multimask_output=False
        )

    sides.compare(program)


@pytest.mark.parametrize("layers", [0, 1])
def test_nothing_found_is_an_empty_list(sides, layers):
    def program(side):
        generator = side.api.SamAutomaticMaskGenerator(
            side.build(), points_per_side=2, pred_iou_thresh=2.0, crop_n_layers=layers
        )
        return generator.generate(PHOTO)

    if layers:  # where SAM fails on the boxes of no crop
        assert program(sides.ours) == []
    else:
        assert sides.compare(program) == []
