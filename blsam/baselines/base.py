"""What methods that drop, merge or park tokens share: one walk through the blocks of a plain ViT, with hooks.

A method is a subclass that overrides the steps it changes; each takes the tokens of a pass and returns them:

    begin            after patches and positions
    before_block     choose or remove (DynamicViT, Evo-ViT), decide (AdaViT)
    attention        the first sublayer; `attend` is what lies between its linear layers (masks, sampled rows)
    between          remove or merge, with the layer's queries, keys and values at hand (EViT, ToMe)
    feed_forward     the second sublayer
    after_block      halt (A-ViT), put back (Evo-ViT)
    finish           what the head reads, and what training looks at

At inference what a method drops is not computed, unless its class says otherwise. Parameters keep timm's names, so that
DeiT's weights load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torchvision.ops import stochastic_depth

from ..config import ClassifierConfig
from ..modeling.attention import Attention
from ..modeling.blocks import Block
from ..modeling.classifier import BLVisionTransformer, Classified, TokenAttention
from ..modeling.layers import input_dtype
from ..modeling.routing import Routing
from .macs import LayerTokens, layers_macs


@dataclass(frozen=True)
class Tokens:
    """The tokens of a pass, between two steps.

    x [B, m, C], the class token first; places [B, m] int64, which of the 1 + n tokens each is, -1 for one made of
    several and for what fills up an image that has fewer than others of its batch; losses: terms of the loss so far,
    weighted, scalars; carried: what a method takes along; computed: the layers so far, where an image decides how
    much they compute.
    """

    x: torch.Tensor
    places: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    carried: Any = None
    computed: tuple[LayerTokens, ...] = ()


class Projected(NamedTuple):
    """Queries, keys and values of a layer, [B, heads, m, d] each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def class_attention(self) -> torch.Tensor:
        """How the class token looks at all: softmax(q_cls k^T / sqrt d), [B, heads, m], float32.

        One row, computed beside the fused product, which returns no weights; not rounded, or scores tie and ties
        decide which tokens are kept.
        """
        with full_precision(self.q.device):
            logits = self.q[:, :, :1].float() @ self.k.float().transpose(2, 3)
            return (logits * self.q.shape[-1] ** -0.5).softmax(dim=-1)[:, :, 0]


@dataclass(frozen=True)
class BaselineOptions:
    """What can be chosen of a method; each has its own, with the paper's values as defaults.

    keep_ratio: how much is computed, in what the method counts; 1: all.
    """

    keep_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be above 0 and at most 1, is {self.keep_ratio}")


class Baseline(BLVisionTransformer):
    """A plain ViT that computes fewer tokens as it goes. This class itself changes nothing.

    A pass looks at the options in training and evaluation alike, unless a method says otherwise. Stochastic depth is
    drawn for each sublayer, as DeiT does: tokens before a block and after it may not be the same.

    Attributes: `Options`, the dataclass of the method; `options`, one of them; `by_image`, whether an image decides how
    much is computed of it.
    """

    Options: ClassVar[type[BaselineOptions]] = BaselineOptions
    by_image: ClassVar[bool] = False
    options: Any

    def __init__(self, config: ClassifierConfig, options: BaselineOptions | None = None, **vit: Any) -> None:
        """config: of a plain ViT; options: None, the defaults; vit: the other arguments of `BLVisionTransformer`."""
        if config.routed:
            raise ValueError(
                f"{type(self).__name__} runs on a plain ViT: {config.name} is routed, take its dense model"
            )
        super().__init__(config, **vit)
        self.options = self.Options() if options is None else options

    # --- the walk ----------------------------------------------------------------------------------------------------

    def walk(self, x: torch.Tensor) -> Tokens:
        """All blocks: patches with their positions [B, 1 + n, C] -> what comes out of the last."""
        tokens = self.begin(x)
        for i in range(len(self.blocks)):
            tokens = self.before_block(i, tokens)
            tokens, projected = self.attention(i, tokens)
            tokens = self.between(i, tokens, projected)
            tokens = self.feed_forward(i, tokens)
            tokens = self.after_block(i, tokens)
        return tokens

    def begin(self, x: torch.Tensor) -> Tokens:
        return Tokens(x, torch.arange(x.shape[1], device=x.device).expand(len(x), -1))

    def before_block(self, i: int, tokens: Tokens) -> Tokens:
        return tokens

    def attention(self, i: int, tokens: Tokens) -> tuple[Tokens, Projected]:
        """The tokens with what attention adds to them, and what it was made of."""
        block = self.block(i)
        projected = project(block.attn, block.norm1(tokens.x))
        return replace(tokens, x=tokens.x + self.added(i, self.attend(i, tokens, projected))), projected

    def attend(self, i: int, tokens: Tokens, projected: Projected) -> torch.Tensor:
        """softmax(q k^T / sqrt d) v: [B, heads, m, d]."""
        return F.scaled_dot_product_attention(*projected)

    def added(self, i: int, attended: torch.Tensor) -> torch.Tensor:
        """What attention adds, of what `attend` returned: [B, heads, m, d] -> [B, m, C]."""
        return self.drop_path(i, self.block(i).attn.proj(attended.transpose(1, 2).flatten(2)))  # [B, m, heads * d]

    def between(self, i: int, tokens: Tokens, projected: Projected) -> Tokens:
        """projected: of the tokens as they were before attention."""
        return tokens

    def feed_forward(self, i: int, tokens: Tokens) -> Tokens:
        return replace(tokens, x=tokens.x + self.drop_path(i, self.block(i).feed_forward(tokens.x)))

    def after_block(self, i: int, tokens: Tokens) -> Tokens:
        return tokens

    def finish(self, tokens: Tokens) -> Classified:
        normalised = self.norm(tokens.x)
        logits = self.forward_head(normalised)
        macs = layers_macs(self.counted_config, self.patches, tokens.computed) if self.by_image else None
        return Classified(logits, normalised, tokens.places, ((1.0, logits),), tokens.losses, macs=macs)

    # --- what steps use ----------------------------------------------------------------------------------------------

    @property
    def patches(self) -> int:
        """n, of an image."""
        return self.grid[0] * self.grid[1]

    def block(self, i: int) -> Block:
        found: Any = self.blocks[i]
        return found

    def drop_path(self, i: int, added: torch.Tensor) -> torch.Tensor:
        """What a sublayer of block i adds, [B, m, C]; in training not for every image."""
        rate = self.drop_path_rate * i / max(1, len(self.blocks) - 1)
        return stochastic_depth(added, rate, "row", self.training)

    # --- as every classifier -----------------------------------------------------------------------------------------

    def forward(
        self, x: torch.Tensor, keep_ratio: float | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]; how much is kept is said by `options`, not for a call."""
        return self.classify(x, keep_ratio=keep_ratio, routing=routing).logits

    def encode(
        self, x: torch.Tensor, *, keep_ratio: float | None = None, routing: Routing | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """Normalised tokens [B, m, C], those that are left, and an empty routing."""
        return self.classify(x, keep_ratio=keep_ratio, routing=routing).tokens, Routing()

    def classify(
        self, x: torch.Tensor, *, keep_ratio: float | None = None, routing: Routing | None = None
    ) -> Classified:
        if keep_ratio is not None or routing is not None:
            raise ValueError(
                f"{type(self).__name__} chooses tokens by its options: give none of keep_ratio and routing with a call"
            )
        return self.finish(self.walk(self.stem(x)))

    def layer_tokens(self) -> list[LayerTokens]:
        """What each layer computes of an image at inference, of methods of which no image decides it."""
        return [LayerTokens(1 + self.patches, 1 + self.patches)] * len(self.blocks)

    @torch.no_grad()
    def macs(self, images: torch.Tensor | None = None) -> float:
        """Multiply-adds of an image at inference; agrees with torch's FlopCounterMode / 2.

        images [B, 3, H, W]: where an image decides, the mean over these; ValueError without them.
        """
        if not self.by_image:
            return layers_macs(self.counted_config, self.patches, self.layer_tokens())
        if images is None:
            raise ValueError(f"what {type(self).__name__} computes depends on the image: give images")
        found: Any = self.classify(images).macs
        return found.double().mean().item()

    @property
    def counted_config(self) -> ClassifierConfig:
        """The configuration with the classes that there are."""
        return replace(self.config, classes=self.num_classes)


def project(attn: TokenAttention | Attention, x: torch.Tensor) -> Projected:
    """Queries, keys and values of normalised tokens [B, m, C]."""
    qkv = attn.qkv(x.to(input_dtype(attn.qkv))).unflatten(-1, (3, attn.num_heads, -1))
    return Projected(*qkv.permute(2, 0, 3, 1, 4))  # [B, m, 3, heads, d] -> [3, B, heads, m, d]


def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens of every image: x [B, m, C], index [B, k] int64 -> [B, k, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def pack(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The chosen tokens of every image, in their order: chosen [B, m] bool -> index [B, k] int64, k of the image that
    has most, and which of it are chosen, [B, k] bool; None where all are, as of a single image."""
    counts = chosen.sum(dim=1)
    index = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    real = chosen.gather(1, index)
    return index, None if bool(real.all()) else real


def key_mask(real: torch.Tensor | None) -> torch.Tensor | None:
    """For the fused product: which tokens answer, [B, m] bool -> [B, 1, 1, m]. An image without any has all of them,
    whose answers nobody reads: none would make them NaN."""
    return None if real is None else (real | ~real.any(dim=1, keepdim=True))[:, None, None]


def full_precision(device: torch.device) -> torch.autocast:
    """Without autocast: where rounded scores would tie."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"  # "meta" has none
    return torch.autocast(kind, enabled=False)


def log_odds(p: float) -> float:
    """The logit of a probability, of at most 0.99."""
    p = min(p, 0.99)
    return math.log(p / (1 - p))


def weighted_sum(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One token of many: x [B, m, C], weights [B, m] -> [B, 1, C]."""
    return (weights[..., None] * x).sum(dim=1, keepdim=True)
