"""Analytic MACs against the published counts and against torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blsam.config import CLASSIFIERS, CONFIGS
from blsam.modeling.classifier import BLVisionTransformer
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.macs import classifier_macs, encoder_macs, sam_macs, sequence_layer
from tests.helpers import TINY, TINY_SIZE

OURS = {"vit_b": 468.8, "vit_l": 1418.5, "vit_h": 2820.9, "blsam_vit_b": 265.7, "blsam_vit_h": 2144.2}
SAMS = {"vit_b": 486.0, "vit_l": 1492.8, "vit_h": 2980.5}


def test_against_the_design():
    for name, giga in OURS.items():
        assert encoder_macs(CONFIGS[name]) / 1e9 == pytest.approx(giga, rel=0.005), name
    for name, giga in SAMS.items():
        assert sam_macs(CONFIGS[name]) / 1e9 == pytest.approx(giga, rel=0.005), name


def counted(config, size, keep, sizes=None):
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder = ImageEncoder(config, size)
        counter = FlopCounterMode(display=False)
        with counter:
            encoder(torch.empty(1, 3, size, size), keep_ratio=keep, true_sizes=sizes)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_analytic_equals_counted(name, keep):
    assert encoder_macs(CONFIGS[name], 1024, keep) == counted(CONFIGS[name], 1024, keep)


@pytest.mark.parametrize(
    "change",
    [{}, {"semi_cross": False}, {"fuse": "block"}, {"e_block": False}, {"grow": 2}, {"e_pool": 2}, {"e_pool": 3}],
    ids=str,
)
def test_analytic_equals_counted_with_padding_and_ablations(change):
    config = replace(TINY, **change)
    assert encoder_macs(config, TINY_SIZE, 0.25, (100, 160)) == counted(config, TINY_SIZE, 0.25, [(100, 160)])


# --- classifiers -----------------------------------------------------------------------------------------------------

CLASSIFIERS_GIGA = {  # published for DeiT; design.md, section 9
    "vit_base_patch16_224": 17.564,
    "vit_small_patch16_224": 4.599,
    "vit_tiny_patch16_224": 1.254,
    "blvit_base_tiny_patch16_224": 10.26,
}
ABLATIONS = [{}, {"semi_cross": False}, {"fuse": "block"}, {"e_block": False}, {"classes": 7}]


def test_classifiers_against_the_design():
    for name, giga in CLASSIFIERS_GIGA.items():
        assert classifier_macs(CLASSIFIERS[name]) / 1e9 == pytest.approx(giga, abs=0.005), name
    blvit = CLASSIFIERS["blvit_base_tiny_patch16_224"]
    assert classifier_macs(blvit, keep_ratio=1) > classifier_macs(blvit.dense)  # the narrow blocks come on top


def classifier_counted(config, size, keep):
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model, counter = BLVisionTransformer(config, img_size=size), FlopCounterMode(display=False)
        with counter:
            model(torch.empty(1, 3, *model.img_size), keep_ratio=keep)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_analytic_equals_counted_of_classifiers(name, keep):
    assert classifier_macs(CLASSIFIERS[name], keep_ratio=keep) == classifier_counted(CLASSIFIERS[name], None, keep)


@pytest.mark.parametrize("change", ABLATIONS, ids=str)
@pytest.mark.parametrize("size", [None, 48])
def test_analytic_equals_counted_of_classifiers_with_ablations(change, size):
    config = replace(CLASSIFIERS["blvit_mini_patch4_32"], **change)
    for keep in (0.25, 1.0):
        assert classifier_macs(config, size, keep) == classifier_counted(config, size, keep)


def test_a_layer_costs_what_the_paper_counts():
    """Narrow width C/4, a quarter of the tokens prime, no class token: 6.5 N C^2 + N^2 C against 12 N C^2 + 2 N^2 C."""
    for n, c in ((196, 768), (4096, 1280)):
        assert sequence_layer(c, n, n // 4, c // 4) == 13 * n * c * c // 2 + n * n * c
        assert sequence_layer(c, n, n) == 12 * n * c * c + 2 * n * n * c
    c = 10**6  # so wide that the products do not count, as in the paper's "1.84x"
    assert sequence_layer(c, 196, 196) / sequence_layer(c, 196, 49, c // 4) == pytest.approx(1.84, abs=0.01)
