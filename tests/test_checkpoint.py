"""Checkpoints of every kind, good and bad."""

import os
from dataclasses import replace

import pytest
import torch

from blsam import build_sam, sam_model_registry
from blsam import checkpoint as ckpt
from blsam.files import write_atomically
from tests.helpers import TINY, TINY_EXACT, randomize


def make(config=TINY, **kwargs):
    torch.manual_seed(0)
    return randomize(build_sam(config, **{"image_size": 160, **kwargs}))


@pytest.mark.parametrize("suffix", ckpt.SUFFIXES)
def test_our_own_checkpoint_comes_back(tmp_path, suffix):
    sam, path = make(), tmp_path / f"tiny{suffix}"
    ckpt.save(path, sam.state_dict(), {"model": "tiny"})
    again = build_sam(TINY, path)
    assert again.image_encoder.img_size == 160 and not again.training
    for key, value in again.state_dict().items():
        assert torch.equal(value, sam.state_dict()[key]), key
    assert os.listdir(tmp_path) == [path.name]


def test_warm_start_leaves_only_new_keys(tmp_path):
    exact = make(TINY_EXACT)
    torch.save(exact.state_dict(), tmp_path / "sam.pth")
    torch.manual_seed(0)
    routed = build_sam(TINY, image_size=160)
    missing = ckpt.load(routed, TINY, ckpt.read(tmp_path / "sam.pth")[0])
    assert missing and all(ckpt.NEW.match(key) for key in missing)
    for key, value in exact.state_dict().items():
        assert torch.equal(routed.state_dict()[key], value), key


def test_sams_state_loads_strictly_into_a_routed_model():
    state = make(TINY_EXACT).state_dict()
    routed = build_sam(TINY, image_size=160)
    assert not any(routed.load_state_dict(state))
    for key, value in state.items():
        assert torch.equal(routed.state_dict()[key], value), key


def test_what_grow_adds_is_new_by_itself():
    """SAM's weights, and those of either kind that has one of the two: routing, a finer embedding."""
    fine = replace(TINY, grow=2)
    key = "image_encoder.neck.grow.weight"
    for config, new in (
        (TINY_EXACT, lambda k: ckpt.NEW.match(k)),
        (TINY, lambda k: k == key),
        (fine.dense, lambda k: ckpt.NEW.match(k) and k != key),
        (fine, lambda k: False),
    ):
        state = make(config).state_dict()
        model = build_sam(fine, image_size=160)
        missing = ckpt.load(model, fine, state)
        assert missing == [k for k in model.state_dict() if new(k)], config
        assert all(torch.equal(model.state_dict()[k], value) for k, value in state.items())
    refused(make(fine).state_dict(), message="does not know: image_encoder.neck.grow.weight; .*a finer embedding, as")


def refused(state, config=TINY, message=""):
    with pytest.raises(ckpt.CheckpointError, match=message):
        ckpt.load(build_sam(config, image_size=160), config, state)


def test_what_does_not_fit_is_refused_by_name():
    state = make().state_dict()
    key = "image_encoder.blocks.2.attn.qkv.weight"
    refused({k: v for k, v in state.items() if k != key}, message=f"lacks {key}")
    refused({**state, "head.weight": torch.zeros(1)}, message="head.weight")
    refused({**state, key: torch.zeros(3, 3)}, message=f"{key} has another shape")
    refused(
        {k: v for k, v in state.items() if ".e_block." not in k}, message="but lacks image_encoder.blocks.1.e_block"
    )
    refused(state, TINY_EXACT, message="made for a blsam")
    refused({"a": torch.zeros(1)}, message="not a SAM checkpoint.*its keys begin with a")
    refused({**state, key: state[key].to(torch.int8)}, message=f"{key} holds int8, as quantised models do")
    refused({**state, "image_encoder.pos_embed": torch.zeros(1, 10, 12, 64)}, message="not a SAM checkpoint")
    encoder = {k: v for k, v in state.items() if k.startswith("image_encoder.")}
    refused(encoder, message="holds SAM's image encoder alone; give a checkpoint with prompt encoder")
    bare = {k.removeprefix("image_encoder."): v for k, v in encoder.items()}
    refused(bare, message="not a SAM checkpoint.*it seems to be an image encoder alone")
    decoder = {k: v for k, v in state.items() if k.startswith("mask_decoder.")}
    refused(decoder, message="it seems to be prompt encoder and mask decoder alone")
    refused(state, replace(TINY_EXACT, depth=5), message="fits no model")


def test_another_width_names_the_model_it_fits(tmp_path):
    torch.save(sam_model_registry["vit_t"](image_size=64).state_dict(), tmp_path / "t.pth")
    with pytest.raises(ckpt.CheckpointError, match="it fits vit_t or vit_t_fine or blsam_vit_t"):
        sam_model_registry["vit_b"](tmp_path / "t.pth", image_size=64)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    ckpt.save(path, make().state_dict(), {})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ckpt.CheckpointError):
            ckpt.read(path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    target = tmp_path / "ran"
    torch.save({"model": Attack(str(target))}, tmp_path / "evil.pth")
    with pytest.raises(ckpt.CheckpointError, match="for safety"):
        ckpt.read(tmp_path / "evil.pth")
    assert not target.exists()


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ckpt.read(tmp_path / "none.pth")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ckpt.CheckpointError, match="is a folder; give the checkpoint in it, such as model.safetensors"
    ):
        ckpt.read(tmp_path)
    with pytest.raises(ckpt.CheckpointError, match="ends in"):
        ckpt.save(tmp_path / "model.onnx", {}, {})


@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float16, ".pth"), (torch.bfloat16, ".safetensors")], ids=str)
def test_other_dtypes_are_cast_to_the_models(tmp_path, dtype, suffix):
    sam, path = make(), tmp_path / f"half{suffix}"
    ckpt.save(path, sam.state_dict(), {}, dtype)
    for key, value in build_sam(TINY, path).state_dict().items():
        expected = sam.state_dict()[key].to(dtype).float()
        assert value.dtype == torch.float32 and torch.equal(value, expected), key


def test_another_image_size_resamples_positions_only():
    state = make().state_dict()
    larger = build_sam(TINY, image_size=224)
    ckpt.load(larger, TINY, state)
    new = larger.state_dict()
    assert new["image_encoder.pos_embed"].shape == (1, 14, 14, 64)
    table = state["image_encoder.blocks.1.attn.rel_pos_h"]
    expected = torch.nn.functional.interpolate(table.T[None], size=27, mode="linear")[0].T
    assert torch.equal(new["image_encoder.blocks.1.attn.rel_pos_h"], expected)
    assert new["image_encoder.blocks.1.e_block.attn.rel_pos_w"].shape[0] == 27
    same = "image_encoder.blocks.2.attn.rel_pos_h"
    assert torch.equal(new[same], state[same])


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    ckpt.save(path, {"a": torch.ones(2)}, {})
    with pytest.raises(ckpt.CheckpointError, match="not finite"):
        ckpt.save(path, {"a": torch.full((2,), 1e9)}, {}, torch.float16)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda temporary: 1 / 0)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert torch.equal(ckpt.read(path)[0]["a"], torch.ones(2))


@pytest.mark.parametrize("suffix", ckpt.SUFFIXES)
def test_nan_is_not_saved(tmp_path, suffix):
    with pytest.raises(ckpt.CheckpointError, match="not finite"):
        ckpt.save(tmp_path / f"model{suffix}", {"a": torch.tensor([1.0, float("nan")])}, {})
    assert os.listdir(tmp_path) == [], "something was left behind"
