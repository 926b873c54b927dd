"""bfloat16 encoders: what is held in it, what is not, and how far the result may move."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from blsam import SamPredictor, sam_model_registry
from blsam.modeling.image_encoder import ImageEncoder
from blsam.options import shipped_checkpoint
from blsam.precision import has_bfloat16, resolve_dtype
from tests.helpers import TINY, TINY_EXACT, TINY_SIZE, randomize


def test_names():
    assert resolve_dtype("float32") == torch.float32 and resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("auto") == (torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32)
    assert resolve_dtype("auto", "meta") == torch.float32
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, auto, is 'float16'"):
        sam_model_registry["vit_t"](dtype="float16")


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
