"""bLViT under timm's tools."""

import pytest
import torch

timm = pytest.importorskip("timm")

from blsam.config import CLASSIFIERS  # noqa: E402
from blsam.integrations import timm as registered  # noqa: E402
from blsam.modeling.classifier import BLVisionTransformer  # noqa: E402

NAMES = [name for name, config in CLASSIFIERS.items() if config.routed]
MINI = "blvit_mini_patch4_32"


def test_every_routed_classifier_is_registered():
    assert set(timm.list_models("blvit*")) == set(NAMES) == set(registered.ROUTED)
    for name in NAMES:
        assert timm.is_model(name)
        with torch.device("meta"):
            model = timm.create_model(name)
        assert isinstance(model, BLVisionTransformer) and model.pretrained_cfg["input_size"][1] == model.img_size[0]


def test_arguments_of_create_model():
    model = timm.create_model(MINI, num_classes=7, img_size=64, in_chans=1, drop_path_rate=0.1, keep_ratio=0.5)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7) and model.keep_ratio == 0.5
    assert timm.create_model(MINI, num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 96)
    assert timm.create_model(MINI, features_only=False).num_features == 96
    with pytest.raises(ValueError, match="no pyramid"):
        timm.create_model(MINI, features_only=True)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(MINI, pretrained=True)


def test_weights_of_timms_own_vit_from_a_file(tmp_path):
    """Both ways of timm: its own loader, which leaves another head out, and `checkpoint_path`."""
    theirs = timm.models.VisionTransformer(32, 4, num_classes=10, embed_dim=96, depth=12, num_heads=3).eval()
    path, x = tmp_path / "vit.pth", torch.randn(2, 3, 32, 32)
    torch.save(theirs.state_dict(), path)
    same = timm.create_model(MINI, checkpoint_path=path, keep_ratio=1.0).eval()
    overlay = {"file": str(path), "num_classes": 10}
    other = timm.create_model(MINI, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, keep_ratio=1.0)
    with torch.no_grad():
        assert torch.equal(same(x), theirs(x))
        assert torch.equal(other.eval().forward_features(x), theirs.forward_features(x))
        assert other(x).shape == (2, 3)


def test_timms_optimiser_knows_what_does_not_decay():
    from timm.optim import create_optimizer_v2

    model = timm.create_model(MINI)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    plain = [name for name, p in model.named_parameters() if id(p) not in decaying]
    assert {"pos_embed", "cls_token", "blocks.1.fusion.alpha", "norm.bias"} <= set(plain)
    layers = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in layers.param_groups for p in group["params"]}
    of = dict(model.named_parameters())
    assert rates[id(of["blocks.0.attn.qkv.weight"])] < rates[id(of["blocks.5.attn.qkv.weight"])]
    assert len(rates) == len(of)


def test_timms_data_config():
    config = timm.data.resolve_model_data_config(timm.create_model("blvit_small_tiny_patch16_224"))
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.875
