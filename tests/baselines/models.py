"""What these tests share: a small plain ViT, methods on it with weights that are not at zero, and timm's twin of it."""

from dataclasses import replace

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from blsam.baselines import BASELINES, build_baseline
from blsam.config import CLASSIFIERS
from blsam.modeling.classifier import BLVisionTransformer
from tests.helpers import images, randomize

MINI = replace(CLASSIFIERS["vit_mini_patch4_32"], name="small", dim=24)  # 64 patches
EVERYTHING = {"keep_ratio": 1.0}
NOTHING_REMOVED = dict.fromkeys(("evit", "evo_vit", "dynamic_vit", "a_vit", "ada_vit", "tome"), EVERYTHING)
NOTHING_REMOVED["ats"] = {"first": 12}  # with as many points as patches some still fall together
ADDED = ("norm_cls.", "head_cls.", "predictors.", "gate", "searched")  # what methods have beside a plain ViT's state
VARIANTS = [
    ("evit", {}),
    ("evit", {"fuse": False, "keep_ratio": 0.5}),
    ("evit", {"drop_layers": (0, 5, 11)}),
    ("evo_vit", {}),
    ("evo_vit", {"rep": False}),
    ("evo_vit", {"stages": (1, 3, 9), "keep_ratio": 0.3}),
    ("dynamic_vit", {}),
    ("dynamic_vit", {"stages": (0, 5, 11), "keep_ratio": 0.5}),
    ("ats", {}),
    ("ats", {"first": 1, "keep_ratio": 0.5}),
    ("ats", {"released": True}),
    ("a_vit", {"search": False}),
    ("a_vit", {"search": False, "center": 2.0, "scale": 0.3, "released": True}),
    ("ada_vit", {}),
    ("tome", {}),
    ("tome", {"falling": True, "keep_ratio": 0.5}),
]
FIXED = [(name, options) for name, options in VARIANTS if not BASELINES[name].by_image]
BY_IMAGE = [(name, options) for name, options in VARIANTS if BASELINES[name].by_image]


def build(name, **options):
    """Weights so far from zero that attention has a choice to make."""
    torch.manual_seed(0)
    model = randomize(build_baseline(name, MINI, **options), std=0.25)
    if name == "ada_vit":  # decisions that are neither all alike nor the same for every image
        for parameter in model.predictors.parameters():
            parameter.data = 0.2 * parameter.data if parameter.dim() > 1 else torch.full_like(parameter, 0.6)
    return model


def dense():
    torch.manual_seed(0)
    return randomize(BLVisionTransformer(MINI), std=0.25)


def photos(n=2):
    return images(n, MINI.image_size)


def plain_state(model):
    """Of the ViT in a method."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith(ADDED)}


def timms(model):
    """timm's ViT with the model's weights."""
    twin = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=MINI.dim, depth=12, num_heads=3, num_classes=10
    ).eval()
    twin.load_state_dict(plain_state(model))
    return twin


def full_attention(block, x):
    """Of timm's block, x [B, n, C]: what it adds and its weights [B, heads, n, n], without any fused product."""
    attn = block.attn
    b, n, c = x.shape
    q, k, v = attn.qkv(block.norm1(x)).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-2, -1) / (c // attn.num_heads) ** 0.5, dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(b, n, c)), weights


def sizes(model, x):
    """How many tokens go into attention and into the feed-forward part of every block."""
    seen = []
    hooks = [
        norm.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
        for block in model.blocks
        for norm in (block.norm1, block.norm2)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return list(zip(seen[::2], seen[1::2]))


def counted(model, size):
    """MACs by torch's counter; for a model on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2
