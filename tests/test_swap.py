"""Ours in the place of segment_anything's."""

import importlib
import sys

import pytest
import segment_anything
import segment_anything.automatic_mask_generator
import segment_anything.predictor

import blsam
from tests.photos import PHOTOS

STOCK = sys.modules["segment_anything.build_sam"]
NAMES = {
    "segment_anything": "SamPredictor SamAutomaticMaskGenerator sam_model_registry build_sam build_sam_vit_h "
    "build_sam_vit_l build_sam_vit_b",
    "segment_anything.predictor": "SamPredictor",
    "segment_anything.automatic_mask_generator": "SamAutomaticMaskGenerator SamPredictor",
    "segment_anything.build_sam": "sam_model_registry build_sam build_sam_vit_h build_sam_vit_l build_sam_vit_b",
}


@pytest.fixture(autouse=True)
def as_before():
    before = {
        (module, name): getattr(sys.modules[module], name) for module, names in NAMES.items() for name in names.split()
    }
    registry = dict(segment_anything.sam_model_registry)
    yield before
    blsam.uninstall()
    assert {key: getattr(sys.modules[key[0]], key[1]) for key in before} == before
    assert segment_anything.sam_model_registry == registry


def test_every_module_has_ours(as_before):
    held = segment_anything.sam_model_registry
    blsam.install()
    for module, name in as_before:
        found = getattr(sys.modules[module], name)
        expected = blsam.build_sam_vit_h if name == "build_sam" else getattr(blsam, name)
        if name == "sam_model_registry":
            assert found is held and found == expected
        else:
            assert found is expected, f"{module}.{name}"
    assert set(held) == set(blsam.sam_model_registry)


def test_a_program_imported_afterwards_gets_ours(tmp_path, monkeypatch):
    (tmp_path / "client_of_sam.py").write_text(
        "from segment_anything import SamPredictor, sam_model_registry\n"
        "from segment_anything.automatic_mask_generator import SamAutomaticMaskGenerator\n"
        "from segment_anything.build_sam import build_sam_vit_b\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with blsam.install():
        client = importlib.import_module("client_of_sam")
    sys.modules.pop("client_of_sam")
    assert client.SamPredictor is blsam.SamPredictor and client.build_sam_vit_b is blsam.build_sam_vit_b
    assert client.SamAutomaticMaskGenerator is blsam.SamAutomaticMaskGenerator
    assert client.sam_model_registry is STOCK.sam_model_registry and "blsam_vit_t" not in STOCK.sam_model_registry


def test_options_and_routed_models():
    with blsam.install(routed=True, image_size=64, keep_ratio=0.5):
        sam = segment_anything.sam_model_registry["vit_t"]()
        predictor = segment_anything.SamPredictor(sam)
        predictor.set_image(PHOTOS["landscape"])
        assert predictor.routing.stages and sam.image_encoder.keep_ratio == 0.5
        assert sam.image_encoder.img_size == 64
        assert segment_anything.sam_model_registry["default"].func is blsam.build_blsam_vit_h


def test_twice_is_as_once(as_before):
    blsam.install()
    blsam.install(image_size=64)
    blsam.uninstall()
    blsam.uninstall()


@pytest.mark.parametrize(("options", "error"), [({"dtyp": "auto"}, TypeError), ({"dtype": "bf16"}, ValueError)])
def test_options_are_looked_at_at_once(options, error):
    with pytest.raises(error):
        blsam.install(**options)
    assert segment_anything.SamPredictor is not blsam.SamPredictor
