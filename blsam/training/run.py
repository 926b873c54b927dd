"""What every training run does: step after step, rows, validations and checkpoints, in one process and in many."""

from __future__ import annotations

import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..distributed import World
from .metrics import Rows
from .run_folder import RunFolder, State
from .settings import RunSettings

ENDLESS = 10**7  # steps, where minutes end the run


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps beside tensors."""

    step: int = 0
    minutes: float = 0.0
    best: float = -math.inf
    validated: int = -1  # the step of the last validation


class AnyRun(ABC):
    """What `loop` works with, whatever is trained: a dataclass below this has these fields, and more.

    averaged: the moving average of the weights, as checkpoints keep it.
    """

    settings: RunSettings
    world: World
    model: nn.Module
    optimizer: torch.optim.Optimizer
    folder: RunFolder
    steps: int
    progress: Progress

    @property
    @abstractmethod
    def averaged(self) -> State:
        """Name -> tensor, which `RunFolder.restore` writes into."""

    @abstractmethod
    def samples(self) -> Iterator[Any]:
        """What the passes of this process are on, from where the run is."""

    @abstractmethod
    def one_step(self, samples: Iterator[Any], done: float, rows: Rows) -> None:
        """Gradients and update; `done`: share of the run behind it."""

    @abstractmethod
    def validate(self) -> None:
        """Measure the averaged weights, keep them if they are the best, and say so."""

    @abstractmethod
    def scalars(self) -> dict[str, Any]:
        """What a row says of the model and its data; ValueError where the run should not go on."""

    def save(self) -> None:
        self.folder.save(self.progress.step, self.model, self.optimizer, self.averaged, asdict(self.progress))


def loop(run: AnyRun, stopped: list[int]) -> None:
    """Step after step until steps or minutes end it, with a last validation, or a signal does; then a checkpoint."""
    settings, progress = run.settings, run.progress
    samples = run.samples()
    rows = Rows(settings.batch_size, settings.device, run.world)
    total, quiet = run.steps if run.steps < ENDLESS else None, not (run.world.is_main and sys.stderr.isatty())
    if progress.step == 0 and progress.validated < 0:
        run.validate()
    with tqdm(total=total, initial=progress.step, unit="step", disable=quiet) as bar:
        start = time.monotonic() - 60 * progress.minutes
        row_start = progress.minutes
        while True:
            progress.minutes, stop = run.world.agree((time.monotonic() - start) / 60, bool(stopped))
            done = progress.minutes / settings.minutes if settings.minutes else progress.step / run.steps
            if done >= 1 or stop:
                break
            run.one_step(samples, done, rows)
            progress.step += 1
            bar.update()
            if progress.step % settings.log_every == 0:
                minutes = (time.monotonic() - start) / 60
                row: dict[str, Any] = {"step": progress.step, "minutes": round(minutes, 3)}
                row["lr"] = run.optimizer.param_groups[0]["lr"]
                row |= rows.row(60 * (minutes - row_start)) | run.scalars()
                run.folder.log(row)
                bar.set_postfix({name: row[name] for name in ("loss", "iou") if name in row})
                row_start = minutes
            if progress.step % settings.validate_every == 0:  # before saving, which keeps what was best
                paused = time.monotonic()
                run.validate()
                row_start += (time.monotonic() - paused) / 60  # not of the steps
            if progress.step % settings.save_every == 0:
                run.save()
    if not stop and progress.validated < progress.step:
        run.validate()
    run.save()
    run.scalars()


def autocast(settings: RunSettings) -> torch.autocast:
    return torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def drawn_ratio(settings: RunSettings, step: int) -> float:
    """The keep ratio of a step, the same in every process and pass."""
    return settings.keep_ratio[np.random.default_rng([settings.seed, 2, step]).integers(len(settings.keep_ratio))]


def say(run: AnyRun, row: dict[str, Any]) -> None:
    """The figures of a validation, beside the progress bar."""
    if run.world.is_main:
        text = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
        tqdm.write(f"step {run.progress.step}: {text}", file=sys.stderr)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM, as they come, instead of an end in the middle of a step; a second one ends it all the same."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for one in (signal.SIGINT, signal.SIGTERM):
        before[one] = signal.signal(one, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too; the main process still wants the samples they are making."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
