"""The builders: other sizes, warm starts."""

import pytest
import torch

from blsam import build_sam, sam_model_registry
from blsam import checkpoint as ckpt
from tests.helpers import TINY, TINY_EXACT, TINY_SIZE, gap, images, randomize


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


def test_auto_is_decided_for_the_device_that_is_asked_for():
    sam = build_sam(TINY, image_size=TINY_SIZE, dtype="auto", device="meta")  # has no instructions for bfloat16
    assert sam.device.type == "meta"
    assert {p.dtype for p in sam.image_encoder.parameters()} == {torch.float32}
