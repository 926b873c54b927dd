"""Facts of the design that need zero E-blocks, one layer alone, or the way through the builders."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_EXACT, TINY_SIZE, gap, randomize

from blsam import SamPredictor, build_sam, sam_model_registry
from blsam import checkpoint as ckpt
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.routing import route


def images(n=1, size=TINY_SIZE):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fuse", ["sublayer", "block"])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
@torch.no_grad()
def test_fresh_e_blocks_leave_tokens_never_prime_unchanged(keep, fuse):
    torch.manual_seed(0)
    encoder = ImageEncoder(replace(TINY, fuse=fuse), TINY_SIZE).eval()
    seen = {}
    encoder.blocks[1].register_forward_pre_hook(lambda _, args: seen.update(entered=args[0]))
    encoder.blocks[-1].register_forward_hook(lambda _, __, out: seen.update(left=out))
    _, routing = encoder.encode(images(2), true_sizes=[(120, 160), (160, 100)], keep_ratio=keep)
    never = ~torch.stack([stage.mask for stage in routing.stages]).any(0)
    assert never.any() and (~never).any()
    difference = (seen["entered"] - seen["left"]).abs().amax(-1)
    assert difference[never].max() == 0, f"a token never prime moved by {difference[never].max():.1e}"
    assert difference[~never].min() > 0, "a prime token did not move"


@pytest.mark.parametrize("layer", [1, 2], ids=["global", "window"])
@torch.no_grad()
def test_semi_cross_attention_is_rows_of_full_attention(layer):
    encoder = randomize(ImageEncoder(TINY, TINY_SIZE))
    x = torch.randn(2, 10, 10, TINY.dim, generator=torch.Generator().manual_seed(2))
    scores = torch.rand(2, 10, 10, generator=torch.Generator().manual_seed(3))
    chosen = route(scores, scores, TINY.window, 0.25, [(120, 160), (160, 100)])
    block = encoder.blocks[layer]
    full = block.attention(x).reshape(200, TINY.dim)
    difference = gap(block.attention(x, block.prime(chosen)), full[block.prime(chosen).tokens])
    assert difference <= 1e-4, f"{difference:.1e} of the standard deviation"


@pytest.mark.parametrize("score", ["norm", "random"])
@torch.no_grad()
def test_scores_of_ablations_do_not_depend_on_the_batch(score):
    encoder, x = randomize(ImageEncoder(replace(TINY, score=score), TINY_SIZE)), images(2)
    both = encoder.encode(x)[1].stages
    for i in range(2):
        for stage, alone in zip(both, encoder.encode(x[i : i + 1])[1].stages):
            assert torch.equal(stage.mask[i], alone.mask[0]), f"{score}: image {i} is routed otherwise in a batch"


@torch.no_grad()
def test_build_at_another_size():
    sam = sam_model_registry["blsam_vit_t"](image_size=128, keep_ratio=0.5)
    embedding, routing = sam.image_encoder.encode(images(1, 128))
    assert embedding.shape == (1, 256, 8, 8) and torch.isfinite(embedding).all()
    assert [s.counts.tolist() for s in routing.stages] == [[[32]]] * 4


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_warm_start_through_the_builder_at_keep_1(tmp_path, suffix):
    exact, path = randomize(build_sam(TINY_EXACT, image_size=TINY_SIZE)), tmp_path / f"exact{suffix}"
    ckpt.save(path, exact.state_dict(), {})
    for sizes in (None, [(120, 160)]):
        a = build_sam(TINY, path, keep_ratio=1.0).image_encoder(images(), true_sizes=sizes)
        difference = gap(a, exact.image_encoder(images()))
        assert difference <= 1e-4, f"{difference:.1e} with true_sizes {sizes}"
    larger = build_sam(TINY, path, image_size=224).state_dict()
    assert larger["image_encoder.pos_embed"].shape == (1, 14, 14, TINY.dim)


@pytest.mark.parametrize("suffix", ckpt.SUFFIXES)
def test_nan_is_not_saved(tmp_path, suffix):
    with pytest.raises(ckpt.CheckpointError, match="not finite"):
        ckpt.save(tmp_path / f"model{suffix}", {"a": torch.tensor([1.0, float("nan")])}, {})
    assert os.listdir(tmp_path) == [], "something was left behind"


def test_a_mask_input_of_another_size_is_a_value_error():
    predictor = SamPredictor(sam_model_registry["blsam_vit_t"](image_size=128))
    predictor.set_image(np.zeros((90, 128, 3), np.uint8))
    predictor.predict(mask_input=np.zeros((1, 32, 32), np.float32))
    with pytest.raises(ValueError, match="mask_input"):
        predictor.predict(mask_input=np.zeros((1, 10, 10), np.float32))
