"""SAM's image encoder, exact or big.LITTLE, as one module read from top to bottom."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import ImageEncoderViT, PatchEmbed
from torch import nn

from ..config import OUT_CHANNELS, EncoderConfig
from .attention import Attention
from .blocks import Block, EBlock, RoutedBlock
from .layers import input_dtype
from .product import FORMS
from .routing import ImportancePredictor, Routing, Stage, TrueSizes, route, route_supplied
from .staged import Staged, checked_ratio, checked_scorer
from .windows import PATCH, exporting, real_tokens, unpadded_sizes

if TYPE_CHECKING:
    from ..runtimes.engine import Engine

# The names of parameters that SAM's encoder does not have, by what adds them; all others keep SAM's.
ADDED = {"routing": r"(blocks\.\d+\.(e_block|fusion)|predictors)\.", "grow": r"neck\.grow\."}


class Neck(nn.Sequential):
    """SAM's neck: what comes out of the last block, [B, C, H, W], -> the embedding [B, 256, grow * H, grow * W].

    Float32, or what a model that was cast as a whole (`sam.half()`) holds its norms in.
    """

    def __init__(self, dim: int, grow: int = 1) -> None:
        layers: dict[str, nn.Module] = {
            "0": nn.Conv2d(dim, OUT_CHANNELS, kernel_size=1, bias=False),
            "1": LayerNorm2d(OUT_CHANNELS),
            "2": nn.Conv2d(OUT_CHANNELS, OUT_CHANNELS, kernel_size=3, padding=1, bias=False),
        }
        if grow > 1:
            finer = nn.ConvTranspose2d(OUT_CHANNELS, OUT_CHANNELS, kernel_size=grow, stride=grow, bias=False)
            with torch.no_grad():  # at first every cell of a token is the token's own
                finer.weight.copy_(torch.eye(OUT_CHANNELS)[..., None, None].expand_as(finer.weight))
            layers["grow"] = finer
        super().__init__(OrderedDict(layers | {"3": LayerNorm2d(OUT_CHANNELS)}))  # before the norm: SAM's name for it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x.to(input_dtype(layer)))
        return x.to(input_dtype(self[-1])).contiguous()


def build_block(config: EncoderConfig, layer: int, grid: tuple[int, int]) -> Block:
    """A layer of the encoder: SAM's own, or routed where a predictor stands before it."""
    window = 0 if config.is_global(layer) else config.window
    attn = Attention(config.dim, config.dim, config.heads, window, grid, config.semi_cross)
    if config.stage_of(layer) is None:
        return Block(config.dim, attn)
    e_block = None
    if config.has_e_block(layer):
        heads, pool = config.e_heads_of(layer), config.e_pool_of(layer)
        narrow = Attention(config.dim, config.e_dim, heads, window, grid, pool=pool)
        e_block = EBlock(config.dim, config.e_dim, narrow)
    return RoutedBlock(config.dim, attn, e_block, once=config.fuse == "block", gamma=config.gamma)


class ImageEncoder(Staged, ImageEncoderViT):
    """A square image to SAM's embedding.

    SAM's weights load into any of these models, `strict` or not: what routing or `grow` adds stays as it is where a
    state has nothing of it.

    Attributes: `config`; `img_size`, the side S in pixels; `keep_ratio`, the share of tokens that run through the wide
    blocks when a call does not say otherwise (1 or more: all, which is exactly SAM for SAM's weights; others than above
    0 are a ValueError); `engine`, a `runtimes.engine.Engine` that computes passes in its stead, None: torch does.
    """

    engine: Engine | None = None
    rule: type = type(None)  # of the configurations that it computes

    def __init__(self, config: EncoderConfig, img_size: int = 1024, keep_ratio: float = 0.25) -> None:
        nn.Module.__init__(self)  # SAM's own would make its layers
        if img_size < PATCH or img_size % PATCH:
            raise ValueError(f"image size must be a multiple of {PATCH}, is {img_size}")
        checked_scorer(config)
        if not isinstance(config.rule, self.rule):
            raise ValueError(f"{config.name} is not for {type(self).__name__}: baselines.sam.build makes its encoder")
        self.config, self.img_size, self.keep_ratio = config, img_size, keep_ratio
        side = img_size // PATCH
        self.patch_embed = PatchEmbed(embed_dim=config.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, config.dim))
        self.blocks = nn.ModuleList(build_block(config, i, (side, side)) for i in range(config.depth))
        self.predictors = nn.ModuleList(ImportancePredictor(config.dim) for _ in config.predictor_layers)
        self.neck = Neck(config.dim, config.grow)
        self.register_load_state_dict_pre_hook(_keep_what_is_added)

    def use_form(self, form: str | None) -> ImageEncoder:
        """Compute every attention product in a form of `product.FORMS`, for an export; None: what is fastest here."""
        if form is not None and form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, is {form!r}")
        for module in self.modules():
            if isinstance(module, Attention):
                module.form = form
        return self

    # arguments may come by place: torch's older ONNX exporter gives defaults so
    def forward(
        self,
        x: torch.Tensor,
        true_sizes: TrueSizes = None,
        keep_ratio: float | None = None,
        stages: list[Stage] | None = None,
    ) -> torch.Tensor:
        """x [B, 3, S, S], normalised, padded at right and bottom -> embedding [B, 256, S/16, S/16] float32, of `grow`
        times as many rows and columns.

        true_sizes: for each image (h, w) in pixels of what is not padding, as Python integers, or an int64 tensor
        [B, 2] for a graph whose shapes must not depend on them. None: a routed model looks for whole rows and columns
        of zeros, which is SAM's padding after normalisation; a graph (compiled, exported) takes all for real.
        keep_ratio: for this call only. stages: a list that is extended by the stages of the routing.
        """
        embedding, routing = self.encode(x, true_sizes=true_sizes, keep_ratio=keep_ratio)
        if stages is not None:
            stages.extend(routing.stages)
        return embedding

    def encode(
        self,
        x: torch.Tensor,
        *,
        true_sizes: TrueSizes = None,
        keep_ratio: float | None = None,
        routing: Routing | None = None,
    ) -> tuple[torch.Tensor, Routing]:
        """As `forward`, with the routing of every stage beside the embedding.

        A `routing` supplied replaces the choice: its masks, and its scores where they are not None. ValueError where
        shapes, sizes, ratio or routing do not fit the image and the model.
        """
        self._check(x, true_sizes, routing)
        keep_ratio = self.keep_ratio if keep_ratio is None else checked_ratio(keep_ratio)
        graph = exporting() or torch.compiler.is_compiling() or x.is_meta  # without values to look at
        if true_sizes is None:
            true_sizes = unpadded_sizes(x) if self.config.reduces and keep_ratio < 1 and not graph else None
        elif not isinstance(true_sizes, torch.Tensor):
            true_sizes = [(int(h), int(w)) for h, w in true_sizes]

        if self.engine is not None and not graph and routing is None and self.engine.takes(self, x, keep_ratio):
            return self.engine.encode(self, x, true_sizes, keep_ratio)
        tokens, found = self.run(x, keep_ratio, true_sizes, routing)
        return self.compared(tokens), found

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Patches and their positions: [B, 3, S, S] -> [B, H, W, C] in the type of the positions, float32 as a rule."""
        # contiguous, or every norm would copy
        tokens = self.patch_embed(x.to(input_dtype(self.patch_embed))).contiguous()
        return tokens if self.pos_embed is None else tokens + self.pos_embed

    def compared(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embedding: [B, H, W, C] -> [B, 256, h, w]."""
        return self.neck(tokens.permute(0, 3, 1, 2))  # [B, H, W, C] -> [B, C, H, W]

    def scores(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        return self.predictors[number](tokens)

    def choose(
        self, scores: torch.Tensor, rank_by: torch.Tensor, keep_ratio: float, true_sizes: TrueSizes = None
    ) -> Stage:
        return route(scores, rank_by, self.config.window, keep_ratio, true_sizes)

    def accept(self, supplied: Stage, scores: torch.Tensor, name: str) -> Stage:
        return route_supplied(supplied, scores, self.config.window, name)

    def asked(self, true_sizes: torch.Tensor) -> torch.Tensor:
        side = self.img_size // PATCH
        return real_tokens(side, side, true_sizes)

    def real_cells(self, true_sizes: torch.Tensor) -> torch.Tensor:
        side = self.img_size // PATCH * self.config.grow
        return real_tokens(side, side, true_sizes, PATCH // self.config.grow)

    def _check(self, x: torch.Tensor, true_sizes: TrueSizes, routing: Routing | None) -> None:
        size = self.img_size
        # patch embedding and positions may have been replaced, as for another grid
        stride = getattr(getattr(self.patch_embed, "proj", None), "stride", (PATCH, PATCH))
        grid = x.shape[2:] if self.pos_embed is None else self.pos_embed.shape[1:3]
        height, width = (n * step for n, step in zip(grid, stride))
        if x.dim() != 4 or (self.pos_embed is not None and x.shape[2:] != (height, width)):
            raise ValueError(f"x must be [B, 3, {height}, {width}], is {list(x.shape)}")
        if isinstance(true_sizes, torch.Tensor):  # its values are not looked at: they may be a graph's input
            if true_sizes.shape != (x.shape[0], 2) or true_sizes.dtype != torch.int64:
                raise ValueError(
                    f"true_sizes must be int64 [{x.shape[0]}, 2], is {true_sizes.dtype} {list(true_sizes.shape)}"
                )
        elif true_sizes is not None:
            if len(true_sizes) != x.shape[0]:
                raise ValueError(f"true_sizes must have one (h, w) an image, {x.shape[0]}, has {len(true_sizes)}")
            for h, w in true_sizes:
                if not (1 <= h <= size and 1 <= w <= size):
                    raise ValueError(f"true_sizes are (h, w) within 1 ... {size} pixels, one is {(h, w)}")


def _keep_what_is_added(encoder: ImageEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: one that has nothing of what is added, as SAM's, gets it from the encoder."""
    own = encoder.state_dict()
    for names in ADDED.values():
        new = {prefix + key: value for key, value in own.items() if re.match(names, key)}
        if not new.keys() & state.keys():
            state.update(new)
