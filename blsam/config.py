"""The models, as data: what design choices make a `vit_b`, a `blsam_vit_b` or a classifier.

A segmenter is one row of `CONFIGS`, a classifier one of `CLASSIFIERS`. Everything else (registries, tests, MAC counts)
is generated from these rows. `REDUCED` are dense segmenters under other people's token-reduction methods, to compare with.
Layers are counted from 0. The paper (arXiv 2410.10267) gives the predictors of H+B "after layers 8, 16, 24" with nine
full layers (counted from 0) and those of B+T "after 1, 4, 7, 10" with one full layer (counted from 1): this is the
reading in which every routed layer has a score.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

FUSE = ("sublayer", "block")
OUT_CHANNELS = 256  # of the embedding: what SAM's decoder expects


PLAIN: dict[str, Any] = {  # a transformer that is not routed
    "e_dim": 0,
    "e_heads": 0,
    "e_layers": (),
    "predictor_layers": (),
    "fuse": "sublayer",
    "semi_cross": True,
    "e_block": True,
    "score": "predictor",
    "gamma": True,
}


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """The layers of a vision transformer: plain with no `predictor_layers`, otherwise big.LITTLE.

    The last five fields exist for ablations and are off in every preset:
    `fuse` "block" runs both P sublayers before one fusion (the paper's figure 2; "sublayer" is its Algorithm 1),
    `semi_cross` False takes keys and values from the prime tokens alone, `e_block` False leaves the narrow blocks out,
    `score` "norm" or "random" replaces the importance predictor when tokens are chosen (`modeling.routing.SCORERS`),
    `gamma` False lets prime tokens take nothing of the narrow blocks.
    """

    name: str
    dim: int
    depth: int
    heads: int
    e_dim: int = 0
    e_heads: int = 0
    e_layers: tuple[int, ...] = ()
    predictor_layers: tuple[int, ...] = ()
    fuse: str = "sublayer"
    semi_cross: bool = True
    e_block: bool = True
    score: str = "predictor"
    gamma: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        for heads in {self.e_heads_of(i) for i in self.e_layers}:
            if self.e_dim % heads:
                raise ValueError(f"e_dim {self.e_dim} is not a multiple of {heads} heads")
        if list(self.predictor_layers) != sorted(set(self.predictor_layers)):
            raise ValueError(f"predictor_layers must rise, are {self.predictor_layers}")
        unrouted = [i for i in self.e_layers if self.stage_of(i) is None]
        if unrouted:
            raise ValueError(f"E-blocks on layers {unrouted}, which lie before the first predictor and run in full")
        if self.fuse not in FUSE:
            raise ValueError(f"fuse must be one of {FUSE}, is {self.fuse!r}")

    @property
    def routed(self) -> bool:
        """Whether any layer runs on a share of the tokens."""
        return bool(self.predictor_layers)

    @property
    def identity(self) -> str | dict[str, Any]:
        """What records of a run say of a model: the name of a row of `MODELS` or `CLASSIFIERS`, all fields of any
        other."""
        return self.name if self in (MODELS.get(self.name), CLASSIFIERS.get(self.name)) else asdict(self)

    def e_heads_of(self, layer: int) -> int:
        """Heads of the narrow attention of a layer."""
        return self.e_heads

    def has_e_block(self, layer: int) -> bool:
        """Whether a narrow block runs beside this layer's wide one."""
        return self.e_block and layer in self.e_layers

    def stage_of(self, layer: int) -> int | None:
        """The stage (index of the predictor whose choice holds) of a layer; None where it runs in full."""
        stages = [i for i, after in enumerate(self.predictor_layers) if after < layer]
        return stages[-1] if stages else None

    def layers_of(self, stage: int | None) -> tuple[int, ...]:
        """The layers of a stage; None: those that run in full."""
        return tuple(i for i in range(self.depth) if self.stage_of(i) == stage)


# --- how other methods reduce the tokens of a dense encoder (`baselines.sam`) -----------------------------------------


@dataclass(frozen=True)
class EViTRule:
    """EViT in SAM (arXiv 2202.07800; everything that SAM makes different is ours).

    keep_ratio: of the tokens that reach a global layer, the last one left out. fuse: what is dropped in a window becomes
    one token. fill: the embedding of a dropped token is that of its window's fused token; False: as it was dropped.
    """

    keep_ratio: float = 0.7
    fuse: bool = True
    fill: bool = False

    def __post_init__(self) -> None:
        if self.fill and not self.fuse:
            raise ValueError("fill takes the fused tokens: it goes with fuse=True")


@dataclass(frozen=True)
class EvoViTRule:
    """Evo-ViT in SAM (arXiv 2108.01390; everything that SAM makes different is ours).

    keep_ratio: share of the tokens on the slow path. rep: the others are moved by what a representative token of their
    window gains; False: they wait as they are.
    """

    keep_ratio: float = 0.5
    rep: bool = True


@dataclass(frozen=True)
class SparseRule:
    """All tokens ask, few answer; feed-forward parts on a share of the tokens. Without training.

    keep_ratio: the density, of keys and of the tokens in the feed-forward parts of window layers. wide: what queries see
    beside the shared keys: "block", those of their own block (SparseSAM's rule, arXiv 2605.17633), or "prime", the
    tokens in the feed-forward part see all keys and the others nothing more (ours).
    """

    keep_ratio: float = 0.5
    wide: str = "block"

    def __post_init__(self) -> None:
        if self.wide not in ("block", "prime"):
            raise ValueError(f'wide must be "block" or "prime", is {self.wide!r}')


Rule = EViTRule | EvoViTRule | SparseRule


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(LayersConfig):
    """An image encoder. With no `predictor_layers` it is SAM's own (exact), otherwise big.LITTLE.

    `e_global_heads`: heads of the narrow attention over the whole image, None: `e_heads`. `e_pool`: side of the cells of
    tokens whose means are its keys and values (ours; 1: every token is one, as in the paper). `grow`: cells of the
    embedding along a token's side, 1 as in SAM, 2 or 4 (ours: at half the input size a student answers on the grid of
    its teacher). `rule`: another method that reduces the tokens of an exact encoder.
    """

    global_layers: tuple[int, ...]
    window: int
    e_global_heads: int | None = None
    e_pool: int = 1
    grow: int = 1
    rule: Rule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grow not in (1, 2, 4):
            raise ValueError(f"grow must be 1, 2 or 4, is {self.grow!r}")
        if self.e_pool < 1:
            raise ValueError(f"e_pool must be 1 or more, is {self.e_pool!r}")
        if self.rule is not None and self.routed:
            raise ValueError(f"a rule is for a dense encoder, {self.name} is routed")

    @property
    def reduces(self) -> bool:
        """Whether a keep ratio means anything to it."""
        return self.routed or self.rule is not None

    @property
    def keep_ratio(self) -> float:
        """What it keeps if nobody says."""
        return 0.25 if self.rule is None else self.rule.keep_ratio

    def is_global(self, layer: int) -> bool:
        """Whether attention of this layer reaches over the whole image."""
        return layer in self.global_layers

    def e_heads_of(self, layer: int) -> int:
        return self.e_global_heads or self.e_heads if self.is_global(layer) else self.e_heads

    def e_pool_of(self, layer: int) -> int:
        """Side of the cells of tokens whose means answer the narrow attention of a layer."""
        return self.e_pool if self.is_global(layer) else 1

    @property
    def dense(self) -> EncoderConfig:
        """The exact model whose checkpoints this one is warm-started from (itself, for an exact model)."""
        if self.rule is not None:
            return replace(self, name=self.name.removeprefix(self.name.rpartition("vit_")[0]), rule=None)
        if not self.routed:
            return self
        return replace(self, name=self.name.removeprefix("blsam_"), e_global_heads=None, e_pool=1, **PLAIN)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(LayersConfig):
    """An image classifier: one routing over the whole image, absolute positions, a class token that is always prime.

    patch: pixels along a token's side; image_size: of the preset, in pixels; classes: outputs of the head.
    """

    patch: int = 16
    image_size: int = 224
    classes: int = 1000

    @property
    def dense(self) -> ClassifierConfig:
        """The plain ViT (DeiT) whose weights this one is warm-started from (itself, for a plain one)."""
        if not self.routed:
            return self
        same = [c.name for c in CLASSIFIERS.values() if not c.routed and (c.dim, c.patch) == (self.dim, self.patch)]
        return replace(self, name=same[0] if same else f"{self.name}_dense", **PLAIN)


def _every(first: int, last: int, step: int = 1) -> tuple[int, ...]:
    return tuple(range(first, last + 1, step))


_H = EncoderConfig(name="vit_h", dim=1280, depth=32, heads=16, global_layers=(7, 15, 23, 31), window=14)
_L = EncoderConfig(name="vit_l", dim=1024, depth=24, heads=16, global_layers=(5, 11, 17, 23), window=14)
_B = EncoderConfig(name="vit_b", dim=768, depth=12, heads=12, global_layers=(2, 5, 8, 11), window=14)
_T = EncoderConfig(name="vit_t", dim=192, depth=12, heads=3, global_layers=(2, 5, 8, 11), window=8)  # ours
# ours: small enough to be trained on two cores and to be shipped. One narrow head over the whole image, since there the
# time goes into heads x tokens^2 logits, and three would cost as much as the three wide ones.
_ROUTED_T = replace(
    _T,
    name="blsam_vit_t",
    e_dim=48,
    e_heads=3,
    e_global_heads=1,
    e_layers=_every(1, 11),
    predictor_layers=(0, 3, 6, 9),
)

CONFIGS: dict[str, EncoderConfig] = {
    config.name: config
    for config in (
        _H,
        _L,
        _B,
        _T,
        replace(_T, name="vit_t_fine", grow=2),
        replace(
            _H, name="blsam_vit_h", e_dim=768, e_heads=12, e_layers=_every(9, 31, 2), predictor_layers=(8, 16, 24)
        ),
        # ours: the paper has no L
        replace(_L, name="blsam_vit_l", e_dim=384, e_heads=6, e_layers=_every(6, 23), predictor_layers=(5, 11, 17)),
        replace(_B, name="blsam_vit_b", e_dim=192, e_heads=3, e_layers=_every(1, 11), predictor_layers=(0, 3, 6, 9)),
        _ROUTED_T,
        # cells of tokens as keys: two narrow heads over the whole image take no longer than one whose keys are tokens
        replace(_ROUTED_T, name="blsam_vit_t_fine", grow=2, e_dim=64, e_heads=2, e_global_heads=None, e_pool=2),
    )
}


_RULES: dict[str, Rule] = {
    "evit": EViTRule(),
    "evo": EvoViTRule(),
    "sparse": SparseRule(),
    "strided": SparseRule(wide="prime"),
}
REDUCED: dict[str, EncoderConfig] = {
    f"{method}_{config.name}": replace(config, name=f"{method}_{config.name}", rule=rule)
    for method, rule in _RULES.items()
    for config in (_H, _L, _B, _T)
}
MODELS = CONFIGS | REDUCED

# What `blsam masks` and the page give the mask generator for the small models, which are less sure of their masks than
# SAM: its defaults, 0.88 and 0.95, leave next to nothing of them.
SURE: dict[str, Any] = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.7}
THRESHOLDS = dict.fromkeys(("vit_t", "blsam_vit_t", "vit_t_fine", "blsam_vit_t_fine"), SURE)


def _classifier(size: str, dim: int, heads: int) -> ClassifierConfig:
    return ClassifierConfig(name=f"vit_{size}_patch16_224", dim=dim, depth=12, heads=heads)


_EVERY_THREE: dict[str, Any] = {"e_layers": _every(1, 11), "predictor_layers": (0, 3, 6, 9)}  # as the paper's B+T
_MINI = ClassifierConfig(name="vit_mini_patch4_32", dim=96, depth=12, heads=3, patch=4, image_size=32, classes=10)

CLASSIFIERS: dict[str, ClassifierConfig] = {
    config.name: config
    for config in (
        _classifier("base", 768, 12),
        _classifier("small", 384, 6),
        _classifier("tiny", 192, 3),
        _MINI,  # ours: for photos of 32 pixels
        replace(
            _classifier("base", 768, 12), name="blvit_base_tiny_patch16_224", e_dim=192, e_heads=3, **_EVERY_THREE
        ),
        replace(
            _classifier("small", 384, 6), name="blvit_small_tiny_patch16_224", e_dim=192, e_heads=3, **_EVERY_THREE
        ),  # ours
        replace(_MINI, name="blvit_mini_patch4_32", e_dim=24, e_heads=3, **_EVERY_THREE),  # ours
    )
}
