"""SAM's image encoder, exact or big.LITTLE, as one module read from top to bottom."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import torch
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import ImageEncoderViT, PatchEmbed
from torch import nn

from ..config import OUT_CHANNELS, EncoderConfig
from .attention import Attention
from .blocks import Block, EBlock, RoutedBlock
from .layers import input_dtype
from .product import FORMS
from .routing import SCORERS, ImportancePredictor, Routing, Stage, TrueSizes, route, route_supplied
from .windows import PATCH, exporting, unpadded_sizes

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
        narrow = Attention(config.dim, config.e_dim, config.e_heads_of(layer), window, grid)
        e_block = EBlock(config.dim, config.e_dim, narrow)
    return RoutedBlock(config.dim, attn, e_block, once=config.fuse == "block")


class ImageEncoder(ImageEncoderViT):
    """A square image to SAM's embedding.

    SAM's weights load into any of these models, `strict` or not: what routing or `grow` adds stays as it is where a
    state has nothing of it.

    Attributes: `config`; `img_size`, the side S in pixels; `keep_ratio`, the share of tokens that run through the wide
    blocks when a call does not say otherwise (1 or more: all, which is exactly SAM for SAM's weights; others than above
    0 are a ValueError).
    """

    def __init__(self, config: EncoderConfig, img_size: int = 1024, keep_ratio: float = 0.25) -> None:
        nn.Module.__init__(self)  # SAM's own would make its layers
        if img_size < PATCH or img_size % PATCH:
            raise ValueError(f"image size must be a multiple of {PATCH}, is {img_size}")
        if config.score not in SCORERS:
            raise ValueError(f"score must be one of {', '.join(SCORERS)}, is {config.score!r}")
        self.config, self.img_size, self.keep_ratio = config, img_size, keep_ratio
        side = img_size // PATCH
        self.patch_embed = PatchEmbed(embed_dim=config.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, config.dim))
        self.blocks = nn.ModuleList(build_block(config, i, (side, side)) for i in range(config.depth))
        self.predictors = nn.ModuleList(ImportancePredictor(config.dim) for _ in config.predictor_layers)
        self.neck = Neck(config.dim, config.grow)
        self.register_load_state_dict_pre_hook(_keep_what_is_added)

    @property
    def keep_ratio(self) -> float:
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        self._keep_ratio = _checked_ratio(value)

    def use_dtype(self, dtype: torch.dtype) -> ImageEncoder:
        """Hold and multiply the linear and convolution weights in `dtype`; returns self.

        Norms, residual stream, softmax, positions and importance scores stay float32, as do input and embedding.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and not name.startswith("predictors"):
                module.to(dtype)
        return self

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
        keep_ratio = self.keep_ratio if keep_ratio is None else _checked_ratio(keep_ratio)
        if true_sizes is None:
            graph = exporting() or torch.compiler.is_compiling() or x.is_meta  # without values to look at
            true_sizes = unpadded_sizes(x) if self.predictors and keep_ratio < 1 and not graph else None
        elif not isinstance(true_sizes, torch.Tensor | None):
            true_sizes = [(int(h), int(w)) for h, w in true_sizes]

        tokens = self.run_stage(self.stem(x), None)
        stages: list[Stage] = []
        for number, predictor in enumerate(self.predictors):
            scores = predictor(tokens)
            if routing is not None:
                name = f"routing.stages[{number}]"
                stage = route_supplied(routing.stages[number], scores, self.config.window, name)
            else:
                rank_by = SCORERS[self.config.score](tokens, scores, x, number)
                stage = route(scores, rank_by, self.config.window, keep_ratio, true_sizes)
            tokens = self.run_stage(tokens, number, stage)
            stages.append(stage)
        return self.neck(tokens.permute(0, 3, 1, 2)), Routing(tuple(stages))  # [B, H, W, C] -> [B, C, H, W]

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Patches and their positions: [B, 3, S, S] -> [B, H, W, C] in the type of the positions, float32 as a rule."""
        # contiguous, or every norm would copy
        tokens = self.patch_embed(x.to(input_dtype(self.patch_embed))).contiguous()
        return tokens if self.pos_embed is None else tokens + self.pos_embed

    def run_stage(self, x: torch.Tensor, number: int | None, stage: Stage | None = None) -> torch.Tensor:
        """The layers of stage `number` (None: those before the first predictor): [B, H, W, C] -> the same.

        Routed by `stage`; None: every token through the wide blocks alone, as the dense model does.
        """
        for i in self.config.layers_of(number):
            # a Block, or what training wrapped it in; called, so that wrappers and hooks see it
            block: Any = self.blocks[i]
            if stage is not None:
                x = block(x, stage)
            else:
                x = block(x) if number is None else block.dense(x)
        return x

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
        if routing is not None and len(routing.stages) != len(self.predictors):
            raise ValueError(f"routing must have {len(self.predictors)} stages, has {len(routing.stages)}")


def _keep_what_is_added(encoder: ImageEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: one that has nothing of what is added, as SAM's, gets it from the encoder."""
    own = encoder.state_dict()
    for names in ADDED.values():
        new = {prefix + key: value for key, value in own.items() if re.match(names, key)}
        if not new.keys() & state.keys():
            state.update(new)


def _checked_ratio(keep_ratio: float) -> float:
    if not keep_ratio > 0:
        raise ValueError(f"keep ratio must be above 0 (1: all tokens), is {keep_ratio}")
    return float(keep_ratio)
