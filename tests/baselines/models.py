"""What these tests share: a small plain ViT, methods on it with weights that are not at zero, and timm's twin of it."""

from dataclasses import replace

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from blsam.baselines import build_baseline
from blsam.config import CLASSIFIERS
from blsam.modeling.classifier import BLVisionTransformer
from tests.helpers import images, randomize

MINI = replace(CLASSIFIERS["vit_mini_patch4_32"], name="small", dim=24)  # 64 patches
NOTHING_REMOVED = {"evit": {"keep_ratio": 1.0}, "evo_vit": {"keep_ratio": 1.0}}
VARIANTS = [
    ("evit", {}),
    ("evit", {"fuse": False, "keep_ratio": 0.5}),
    ("evit", {"drop_layers": (0, 5, 11)}),
    ("evo_vit", {}),
    ("evo_vit", {"rep": False}),
    ("evo_vit", {"stages": (1, 3, 9), "keep_ratio": 0.3}),
]


def build(name, **options):
    """Weights so far from zero that attention has a choice to make."""
    torch.manual_seed(0)
    return randomize(build_baseline(name, MINI, **options), std=0.25)


def dense():
    torch.manual_seed(0)
    return randomize(BLVisionTransformer(MINI), std=0.25)


def photos(n=2):
    return images(n, MINI.image_size)


def timms(model):
    """timm's ViT with the model's weights."""
    twin = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=MINI.dim, depth=12, num_heads=3, num_classes=10
    ).eval()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if "_cls." not in key})
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
