"""The settings of a classifier's training run: DeiT's recipe, unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..config import ClassifierConfig
from ..data.imagenet import crop_ratio_of
from .settings import FREE, RunSettings


@dataclass(frozen=True)
class ClassifierSettings(RunSettings):
    """What `blsam train-imagenet --help` says of each; rates are of 512 images a step. baseline: a name of
    `baselines.BASELINES` that runs on the plain `model`, with the first of `keep_ratio`."""

    free: ClassVar[set[str]] = FREE | {"val_data"}
    model: ClassifierConfig
    baseline: str | None = None
    val_data: tuple[Path, ...] = ()
    image_size: int | None = None
    crop_ratio: float | None = None
    augment: str = "deit"
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    drop_path: float = 0.1
    lr: float = 5e-4
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    ema: float = 0.99996
    batch_size: int = 256
    workers: int = 4
    validate_every: int = 0
    save_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.baseline and len(self.keep_ratio) > 1:
            raise ValueError(f"{self.baseline} keeps one share of the tokens all along; keep_ratio has several")

    @property
    def side(self) -> int:
        """Of the input, in pixels."""
        return self.image_size or self.model.image_size

    @property
    def crop(self) -> float:
        """The share of an image's short side that evaluation sees."""
        return crop_ratio_of(self.side, self.crop_ratio)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0
