"""An image classifier of the same blocks: DeiT's ViT, plain or big.LITTLE (the paper's bLViT, half of its tables).

No windows and no relative positions: the patches of the whole image are ranked together, once a stage. The class token
runs through the wide blocks always; it is asked for no score (its s is 1), counted in no ratio, and the narrow blocks
update it as they do any prime token. Modules and parameters have timm's names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import PatchEmbed
from torch import nn

from ..config import ClassifierConfig
from .blocks import NORM_EPS, Block, EBlock, RoutedBlock, take
from .layers import input_dtype, is_plain
from .routing import ImportancePredictor, Queries, Routing, Stage, TrueSizes, route_sequence, route_sequence_supplied
from .staged import Staged, checked_scorer

ADDED = re.compile(r"(blocks\.\d+\.(e_block|fusion)|predictors)\.")  # what a plain ViT has not


class TokenAttention(nn.Module):
    """Multi-head attention of a sequence, in which some tokens may ask and all answer (semi-cross).

    dim is the width of the tokens, inner that of queries, keys and values. `semi_cross=False` takes keys and values
    from the tokens that ask alone.
    """

    window = 0  # tokens a side: the whole sequence
    position_tables: tuple[nn.Parameter, ...] = ()  # no relative positions

    def __init__(self, dim: int, inner: int, num_heads: int, semi_cross: bool = True) -> None:
        super().__init__()
        self.num_heads, self.inner, self.semi_cross = num_heads, inner, semi_cross
        self.qkv = nn.Linear(dim, 3 * inner)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: torch.Tensor, queries: Queries | None = None) -> torch.Tensor:
        """x [B, n, dim], normalised -> the same shape, or [P, dim] with a row for each of P queries."""
        x = x.to(input_dtype(self.qkv))
        if queries is None:
            q, k, v = (self._by_head(part) for part in self.qkv(x).split(self.inner, dim=-1))
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        q, kv = self._projections(x, queries)
        out, sizes = [], [group.num_windows * group.count for group in queries.groups]
        mine = kv.split(sizes) if not self.semi_cross else [kv] * len(sizes)
        for group, asking, answering in zip(queries.groups, q.split(sizes), mine):
            here = answering[group.windows] if self.semi_cross else answering.unflatten(0, (-1, group.count))
            k, v = (self._by_head(part) for part in here.split(self.inner, dim=-1))
            heads = self._by_head(asking.unflatten(0, (-1, group.count)))
            y = F.scaled_dot_product_attention(heads, k, v)
            out.append(y.transpose(1, 2).flatten(2).flatten(0, 1))  # [G, heads, k, d] -> [G*k, inner]
        return self.proj(torch.cat(out))

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, n, inner] -> [B, heads, n, d]

    def _projections(self, x: torch.Tensor, queries: Queries) -> tuple[torch.Tensor, torch.Tensor]:
        """q [P, inner] of the queries, and kv [B, n, 2 * inner], or [P, 2 * inner] of the queries alone."""
        sizes = [self.inner, 2 * self.inner]
        if not is_plain(self.qkv):  # called whole, as others know it
            q, kv = self.qkv(x).split(sizes, dim=-1)
            return take(q.flatten(0, 1), queries), kv if self.semi_cross else take(kv.flatten(0, 1), queries)
        wq, wkv = self.qkv.weight.split(sizes)
        bq, bkv = self.qkv.bias.split(sizes)
        chosen = take(x.flatten(0, 1), queries)
        return F.linear(chosen, wq, bq), F.linear(x if self.semi_cross else chosen, wkv, bkv)


class Mlp(MLPBlock):
    """The blocks' feed-forward part under timm's names, `fc1` and `fc2`."""

    def __init__(self, dim: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    @property
    def lin1(self) -> nn.Module:
        return self.fc1

    @property
    def lin2(self) -> nn.Module:
        return self.fc2


@dataclass(frozen=True)
class Classified:
    """What a pass says of its images, for training and for baselines that remove tokens.

    logits [B, classes]: the answer. tokens [B, m, C]: normalised, the class token first; places [B, m] int64: which
    of the 1 + n tokens each is, -1 for one made of several; None: all of them, in order. heads: what training asks of
    the classes, (weight, logits) each; losses: further terms of the loss, weighted, scalars. routing: of a big.LITTLE
    model. macs [B] int64: multiply-adds of each image, where an image decides.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor | None = None
    heads: tuple[tuple[float, torch.Tensor], ...] = ()
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    routing: Routing = field(default_factory=Routing)
    macs: torch.Tensor | None = None


def build_layer(config: ClassifierConfig, layer: int) -> Block:
    """A layer of the classifier: the plain ViT's, or routed where a predictor stands before it."""
    attn = TokenAttention(config.dim, config.dim, config.heads, config.semi_cross)
    if config.stage_of(layer) is None:
        block = Block(config.dim, attn)
    else:
        e_block = None
        if config.has_e_block(layer):
            narrow = TokenAttention(config.dim, config.e_dim, config.e_heads_of(layer))
            e_block = EBlock(config.dim, config.e_dim, narrow)
        block = RoutedBlock(config.dim, attn, e_block, once=config.fuse == "block", gamma=config.gamma)
    block.mlp = Mlp(config.dim, 4 * config.dim)
    return block


class BLVisionTransformer(Staged):
    """An image [B, 3, H, W], normalised, to class logits.

    Weights of DeiT and of timm's plain ViT load into any of these models, `strict` or not; their positions are
    resampled to the model's image size, and what routing adds stays as it is where they have nothing of it. Fresh
    weights are drawn as timm draws them, those of narrow blocks and predictors as in `ImageEncoder`.

    Args:
        config: a row of `CLASSIFIERS`, or one of your own.
        img_size: (height, width) or side in pixels, multiples of the patch; None: the preset's.
        num_classes: outputs; None: the preset's, 0: no head, the class token's features.
        keep_ratio: share of the patches that run through the wide blocks unless a call says otherwise.
        drop_path_rate: of the last layer in training, linearly less in those before it (stochastic depth; ours: of
            whole layers, both sublayers of an image together).
        drop_rate: dropout before the head. in_chans: of the image. global_pool: "token", the class token's.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        *,
        img_size: int | tuple[int, int] | None = None,
        num_classes: int | None = None,
        keep_ratio: float = 0.25,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        checked_scorer(config)
        img_size = config.image_size if img_size is None else img_size
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if any(side < config.patch or side % config.patch for side in self.img_size):
            raise ValueError(f"image size must be multiples of {config.patch}, is {self.img_size}")
        if global_pool != "token":
            raise ValueError(f"global_pool must be token, is {global_pool!r}")
        self.config, self.keep_ratio, self.drop_path_rate = config, keep_ratio, drop_path_rate
        self.num_classes = config.classes if num_classes is None else num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = config.dim  # as timm calls them
        self.grid = self.img_size[0] // config.patch, self.img_size[1] // config.patch
        patch = (config.patch, config.patch)
        self.patch_embed = PatchEmbed(patch, patch, (0, 0), in_chans, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], config.dim))
        self.blocks = nn.ModuleList(build_layer(config, i) for i in range(config.depth))
        self.predictors = nn.ModuleList(ImportancePredictor(config.dim) for _ in config.predictor_layers)
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(self.num_classes)
        self._draw()
        self.register_load_state_dict_pre_hook(_fit_to_model)

    def _draw(self) -> None:
        """Fresh weights as timm's ViT has them."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not ADDED.match(name + "."):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    # --- a pass ------------------------------------------------------------------------------------------------------

    def forward(
        self, x: torch.Tensor, keep_ratio: float | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]; keep_ratio and routing for this call only, as in `encode`."""
        return self.forward_head(self.encode(x, keep_ratio=keep_ratio, routing=routing)[0])

    def classify(
        self, x: torch.Tensor, *, keep_ratio: float | None = None, routing: Routing | None = None
    ) -> Classified:
        """As `forward`, with all that training looks at."""
        tokens, found = self.encode(x, keep_ratio=keep_ratio, routing=routing)
        logits = self.forward_head(tokens)
        return Classified(logits, tokens, heads=((1.0, logits),), routing=found)

    def begin_epoch(self, epoch: float, epochs: float) -> None:
        """Training is at `epoch` of so many: for methods that change as it goes on."""

    def encode(
        self, x: torch.Tensor, *, keep_ratio: float | None = None, routing: Routing | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """Normalised tokens [B, 1 + n, C], the class token first, and the routing of every stage.

        The masks [B, 1 + n] of a routing are True at the class token. A `routing` supplied replaces the choice, its
        scores the predictors' where they are not None. ValueError where shapes, ratio or routing do not fit.
        """
        tokens, found = self.run(x, keep_ratio, None, routing)
        return self.norm(tokens), found

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """As timm's: normalised tokens [B, 1 + n, C]."""
        return self.encode(x)[0]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """As timm's: tokens [B, 1 + n, C] -> logits [B, classes], or with pre_logits what the head reads."""
        x = self.head_drop(x[:, 0])
        return x if pre_logits else self.head(x.to(input_dtype(self.head))).to(x.dtype)

    def run_layer(self, i: int, x: torch.Tensor, stage: Stage | None) -> torch.Tensor:
        after = super().run_layer(i, x, stage)
        rate = self.drop_path_rate * i / max(1, len(self.blocks) - 1)
        if not self.training or not rate:
            return after
        kept = torch.rand(len(x), 1, 1, device=x.device) >= rate
        return x + kept.to(x.dtype) / (1 - rate) * (after - x)

    # --- what stages ask ---------------------------------------------------------------------------------------------

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or tuple(x.shape[2:]) != self.img_size:
            raise ValueError(f"x must be [B, 3, {self.img_size[0]}, {self.img_size[1]}], is {list(x.shape)}")
        tokens = self.patch_embed(x.to(input_dtype(self.patch_embed))).flatten(1, 2)  # [B, H, W, C] -> [B, n, C]
        return (
            torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens.to(self.cls_token.dtype)], dim=1)
            + self.pos_embed
        )

    def compared(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalised tokens, [B, 1 + n, C] -> [B, C, 1 + n]."""
        return self.norm(tokens).transpose(1, 2)

    def scores(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        return F.pad(self.predictors[number](tokens[:, 1:]), (1, 0), value=1.0)

    def choose(
        self, scores: torch.Tensor, rank_by: torch.Tensor, keep_ratio: float, true_sizes: TrueSizes = None
    ) -> Stage:
        return route_sequence(scores, rank_by, keep_ratio)

    def accept(self, supplied: Stage, scores: torch.Tensor, name: str) -> Stage:
        return route_sequence_supplied(supplied, scores, name)

    def asked(self, true_sizes: torch.Tensor) -> torch.Tensor:
        patches = torch.ones(len(true_sizes), self.pos_embed.shape[1], dtype=torch.bool, device=true_sizes.device)
        patches[:, 0] = False
        return patches

    def real_cells(self, true_sizes: torch.Tensor) -> torch.Tensor:
        """All tokens: classifiers see no padding."""
        return torch.ones_like(self.asked(true_sizes))

    def complete(self, state: dict[str, Any], prefix: str = "") -> None:
        """Add to a plain ViT's state what this model has besides, in place; one that has any of it stays as it is."""
        new = {prefix + name: value for name, value in self.state_dict().items() if ADDED.match(name)}
        if not new.keys() & state.keys():
            state.update(new)

    # --- what timm's tools call ---------------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head; 0: none, the features."""
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool must be token, is {global_pool!r}")
        self.num_classes = num_classes
        self.head = self._new_head(num_classes).to(self.cls_token.device)

    def _new_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions, the class token, and the scalars of the fusions."""
        return {"pos_embed", "cls_token"} | {name for name, _ in self.named_parameters() if ".fusion." in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stem and layers, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^predictors|^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError("these models are not checkpointed: their activations are few")


def _fit_to_model(model: BLVisionTransformer, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: positions of another image size are resampled, and what a plain ViT has not is added."""
    key = prefix + "pos_embed"
    if key in state:
        state[key] = resample_positions(state[key], model.grid)
    model.complete(state, prefix)


def resample_positions(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Positions [1, 1 + n, C] of a square grid of another size, bicubic with antialiasing as timm does; as they are
    where they fit or are of no square grid."""
    count = positions.shape[1] - 1 if positions.dim() == 3 else -1
    side = round(max(count, 0) ** 0.5)
    if count == grid[0] * grid[1] or count < 1 or side * side != count:
        return positions
    old = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, n, C] -> [1, C, h, w]
    new = F.interpolate(old, size=grid, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], new.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)
