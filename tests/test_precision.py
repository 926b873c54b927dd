"""bfloat16 encoders: what is held in it, what is not, and how far the result may move."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from blsam import SamAutomaticMaskGenerator, SamPredictor, build_sam, precision, sam_model_registry
from blsam.build_classifier import build_classifier
from blsam.config import CLASSIFIERS, CONFIGS
from blsam.modeling.image_encoder import ImageEncoder
from blsam.options import shipped_checkpoint
from blsam.precision import resolve_dtype
from tests.helpers import TINY, TINY_EXACT, TINY_SIZE, randomize


def test_names():
    assert {resolve_dtype(name, "cpu", 192) for name in ("float32", "bfloat16")} == {torch.float32, torch.bfloat16}
    assert resolve_dtype("auto", "meta", 768) == torch.float32
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, auto, is 'float16'"):
        sam_model_registry["vit_t"](dtype="float16")


CASES = [
    ("amx", "torch", 192, torch.bfloat16),
    ("amx", "openvino", 192, torch.bfloat16),
    ("avx512_bf16", "torch", 96, torch.float32),
    ("avx512_bf16", "torch", 192, torch.bfloat16),
    ("avx512_bf16", "torch", 768, torch.bfloat16),
    ("avx512_bf16", "openvino", 192, torch.bfloat16),
    ("avx512", "torch", 768, torch.float32),
    ("aarch64", "torch", 1280, torch.float32),
    ("amx", "onnxruntime", 768, torch.float32),  # which has no kernels for it
]


@pytest.mark.parametrize(("kind", "runtime", "width", "dtype"), CASES)
def test_auto_is_what_was_measured_to_be_faster(monkeypatch, kind, runtime, width, dtype):
    monkeypatch.setattr(precision, "processor", lambda: kind)
    assert resolve_dtype("auto", "cpu", width, runtime) == dtype


def test_the_builders_ask_for_their_own_width(monkeypatch):
    """And the mask generator for the decoder's, 256."""
    monkeypatch.setattr(precision, "processor", lambda: "avx512_bf16")
    monkeypatch.setitem(precision.FASTER_FROM, ("avx512_bf16", "torch"), precision.WIDE)
    with torch.device("meta"):
        found = {name: build_sam(CONFIGS[name], dtype="auto", image_size=64) for name in ("vit_t", "vit_b")}
    weights = {name: sam.image_encoder.blocks[0].mlp.lin1.weight.dtype for name, sam in found.items()}
    assert weights == {"vit_t": torch.float32, "vit_b": torch.float32}  # no processor at all
    found = {name: build_sam(CONFIGS[name], dtype="auto", image_size=64) for name in ("vit_t", "vit_b")}
    weights = {name: sam.image_encoder.blocks[0].mlp.lin1.weight.dtype for name, sam in found.items()}
    assert weights == {"vit_t": torch.float32, "vit_b": torch.bfloat16}
    assert SamAutomaticMaskGenerator(found["vit_b"], decoder_dtype="auto").decoder_dtype == torch.float32
    wide, narrow = (
        build_classifier(CLASSIFIERS[name], dtype="auto") for name in ("vit_base_patch16_224", "vit_mini_patch4_32")
    )
    assert wide.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert narrow.blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_only_products_are_held_in_half_precision():
    encoder = ImageEncoder(TINY, TINY_SIZE)
    before = sum(p.numel() * p.element_size() for p in encoder.parameters())
    encoder.use_dtype(torch.bfloat16)
    for name, parameter in encoder.named_parameters():
        owner = encoder.get_submodule(name.rpartition(".")[0])
        half = isinstance(owner, torch.nn.Linear | torch.nn.Conv2d) and "predictors" not in name
        assert parameter.dtype == (torch.bfloat16 if half else torch.float32), name
    assert sum(p.numel() * p.element_size() for p in encoder.parameters()) < 0.62 * before


@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda c: c.name)
@torch.no_grad()
def test_the_embedding_moves_little(config):
    encoder = randomize(ImageEncoder(config, TINY_SIZE))
    x = torch.randn(2, 3, TINY_SIZE, TINY_SIZE, generator=torch.Generator().manual_seed(1))
    full, routing = encoder.encode(x, true_sizes=[(160, 160), (120, 160)])
    half, half_routing = encoder.use_dtype(torch.bfloat16).encode(x, routing=routing if routing.stages else None)
    cosine = F.cosine_similarity(full, half, dim=1).mean().item()
    assert half.dtype == torch.float32 and cosine > 0.9995, cosine
    static = encoder(x, true_sizes=torch.tensor([[160, 160], [120, 160]]))
    eager = encoder(x, true_sizes=[(160, 160), (120, 160)])
    assert F.cosine_similarity(static, eager, dim=1).min().item() > 0.9999


def test_the_predictor_gives_nearly_the_same_masks_in_half_precision():
    box, masks = np.array([160, 10, 400, 245]), {}
    for dtype in ("float32", "bfloat16"):
        predictor = SamPredictor(sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), dtype=dtype))
        predictor.set_image(data.coffee())
        assert predictor.features.dtype == torch.float32
        masks[dtype] = predictor.predict(box=box)[0][0]
    a, b = masks.values()
    assert (a & b).sum() / (a | b).sum() > 0.97
