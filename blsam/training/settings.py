"""The settings of a training run, and whose run a folder holds."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..config import EncoderConfig, LayersConfig
from ..distributed import CPU

# what may change when a run goes on: where things lie, how long it takes, how it is computed and logged
FREE = {"data", "images", "init", "teacher_checkpoint", "cache", "output", "resume", "epochs", "steps", "minutes"}
FREE |= {"device", "strategy", "checkpointing", "compile", "workers", "validate_every", "save_every", "log_every"}


@dataclass(frozen=True)
class RunSettings:
    """What every training run has, and its comparison with the run that it goes on with."""

    free: ClassVar[set[str]] = FREE
    model: LayersConfig
    data: tuple[Path, ...]
    output: Path
    init: Path | None = None
    teacher: str | None = None
    teacher_checkpoint: Path | None = None
    keep_ratio: tuple[float, ...] = (0.25,)
    distill_weight: float = 2.5
    lr: float = 2e-4
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    precision: str = "fp32"
    workers: int = 1
    validate_every: int = 500
    save_every: int = 100
    log_every: int = 20
    seed: int = 0
    device: torch.device = CPU
    resume: bool = False

    def check_same(self, stored: dict[str, Any]) -> None:
        """ValueError names the first setting that a run was begun with otherwise, of those that it depends on."""
        now = self.as_json()
        # a run that was begun before there was a setting was begun with its default
        stored = {f.name: f.default for f in fields(self) if f.default is not MISSING} | stored
        for name in sorted(now.keys() - self.free):
            if stored.get(name) != now[name]:
                raise ValueError(
                    f"{self.output} was begun with {name} {stored.get(name)}, this command has {now[name]}"
                )

    def as_json(self) -> dict[str, Any]:
        """As json holds it; paths and the device as text."""
        return json.loads(json.dumps(asdict(self) | {"model": self.model.identity}, default=str))


@dataclass(frozen=True)
class TrainSettings(RunSettings):
    """What `blsam train --help` says of each."""

    model: EncoderConfig
    images: Path | None = None
    fraction: float = 1.0
    holdout: float = 0.05
    teacher_size: int | None = None
    cache: Path | None = None
    train: str = "all"  # or what alone learns: "decoder", or of it the "scores"
    stage: str = "all"
    image_size: int = 1024
    distill_loss: str = "cosine"
    mask_loss: str = "sam"
    clicks: int = 1
    answers: int = 0
    max_objects: int = 8
    strategy: str = "ddp"
    checkpointing: bool = False
    compile: str | None = None

    @property
    def supervised(self) -> bool:
        """Masks are learnt, not the teacher's embedding alone."""
        return self.stage == "all"


def launcher() -> str:
    """The process that started this one: torchrun's agent, which stays the same over its restarts."""
    return f"{socket.gethostname()} {os.getppid()}"


def begun_by(folder: Path) -> str | None:
    """The launcher of the run in a folder; None where there is none."""
    path = folder / "config.json"
    return json.loads(path.read_text()).get("launcher") if path.is_file() else None
