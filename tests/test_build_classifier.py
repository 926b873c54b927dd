"""Classifiers from files: whose weights load, and what is said of those that do not."""

from dataclasses import replace

import pytest
import torch

from blsam.build_classifier import build_classifier
from blsam.checkpoint import CheckpointError, save
from blsam.config import ClassifierConfig
from blsam.modeling.classifier import BLVisionTransformer
from tests.helpers import randomize

SMALL = ClassifierConfig(
    name="small", dim=32, depth=4, heads=4, e_dim=8, e_heads=2, e_layers=(1, 3), predictor_layers=(0, 2),
    patch=4, image_size=24, classes=5,
)  # fmt: skip
PLAIN = SMALL.dense


def weights(config=PLAIN, **options):
    torch.manual_seed(0)
    return randomize(BLVisionTransformer(config, **options)).state_dict()


def written(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "around",
    [
        lambda state: state,
        lambda state: {"model": state},  # DeiT's
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        lambda state: {"state_dict": {k: v + 9 for k, v in state.items()}, "state_dict_ema": state},  # timm's
        lambda state: {f"model.{k}": v for k, v in state.items()},  # Lightning's
    ],
)
def test_a_plain_vit_starts_plain_and_routed_models(tmp_path, around):
    state, x = weights(), torch.randn(2, 3, 24, 24)
    path = written(tmp_path / "vit.pth", around(state))
    dense = build_classifier(PLAIN, path)
    assert torch.equal(dense.state_dict()["blocks.2.mlp.fc1.weight"], state["blocks.2.mlp.fc1.weight"])
    routed = build_classifier(SMALL, path, keep_ratio=1.0)
    assert torch.equal(routed(x), dense(x)) and not routed.training


def test_ours_comes_back(tmp_path):
    path = tmp_path / "ours.safetensors"
    state = weights(SMALL)
    save(path, state, {"model": "small"})
    again = build_classifier(SMALL, path, dtype="bfloat16")
    assert torch.equal(again.predictors[1].linear.weight, state["predictors.1.linear.weight"])
    assert again.blocks[1].e_block.exit.weight.dtype == torch.bfloat16


def test_classes_are_the_checkpoints_or_a_fresh_head(tmp_path):
    path = written(tmp_path / "vit.pth", weights(num_classes=7))
    assert build_classifier(SMALL, path).num_classes == 7
    other = build_classifier(SMALL, path, num_classes=3)
    assert other.head.weight.shape == (3, 32) and other.head.bias.abs().max() == 0
    assert build_classifier(SMALL, path, num_classes=0)(torch.randn(1, 3, 24, 24)).shape == (1, 32)
    assert build_classifier(SMALL).num_classes == 5


def test_another_image_size(tmp_path):
    assert build_classifier(SMALL, written(tmp_path / "large.pth", weights(img_size=40))).img_size == (40, 40)
    path = written(tmp_path / "vit.pth", weights())
    assert build_classifier(SMALL, path, image_size=32)(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s | {"dist_token": torch.zeros(1)}, "has dist_token, which small does not know"),
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "lacks norm.bias"),
        (lambda s: {k: v for k, v in s.items() if "head" not in k}, "lacks head.weight"),  # a random one says nothing
        (lambda s: s | {"blocks.1.fusion.alpha": torch.zeros(2)}, "lacks blocks.1.e_block.norm1.weight .and 43 more"),
        (lambda s: weights(replace(PLAIN, dim=16)), r"has patches of \[16, 3, 4, 4\], small of \[32, 3, 4, 4\]"),
        (lambda s: weights(replace(PLAIN, depth=5)), "has blocks.4.norm1.weight, which small"),
        (lambda s: s | {"norm.weight": torch.zeros(9)}, "does not fit small: size mismatch for norm.weight"),
        (lambda s: {"a": torch.zeros(1)}, "no vision transformer"),
        (lambda s: {"one": s, "two": {k: v + 1 for k, v in s.items()}}, "several models, one, two"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, change, words):
    path = written(tmp_path / "vit.pth", change(weights()))
    with pytest.raises(CheckpointError, match=words) as error:
        build_classifier(SMALL, path)
    assert "\n" not in str(error.value)


def test_no_file():
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        build_classifier(SMALL, "nowhere.pth")
