"""What a run leaves behind: settings, metrics, and checkpoints that a run of any number of processes goes on from."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .. import checkpoint as ckpt
from ..distributed import World
from ..files import provenance, write_json, write_text
from ..options import one_line
from .settings import RunSettings, launcher

State = dict[str, Any]


class RunFolder:
    """`config.json`, lists of what the run is on (`photos.txt` and `validation.txt`: ids), `metrics.jsonl`,
    `tensorboard/` if it is installed, `checkpoints/step-N` (everything needed to go on), `best.safetensors` and
    `model.safetensors` (the moving average, half precision, for `sam_model_registry` or `build_classifier`).

    Every process has one; only the main one writes what is not a shared checkpoint.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self._log: TextIO | None = None
        self._board: Any = None
        if world.is_main:
            path.mkdir(parents=True, exist_ok=True)
            self._board = _tensorboard(path / "tensorboard")
        world.barrier()

    def rewind(self, step: int) -> None:
        """Forget what was logged after the checkpoint of `step`, and a line that was cut short."""
        path = self.path / "metrics.jsonl"
        if self.world.is_main and path.is_file():
            lines = [line for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
            kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
            write_text(path, kept)

    def check_same(self, settings: RunSettings, ids: dict[str, list[str]], readers: int | None = None) -> None:
        """ValueError unless the run that the folder holds was begun with these settings and these photos; streamed ones
        with as many readers (of each process), too, or it could not go on where it was."""
        config = self.path / "config.json"
        if config.is_file():
            stored = json.loads(config.read_text())
            settings.check_same(stored)
            begun = (stored["processes"], max(1, stored["workers"]))
            now = (self.world.size, readers)
            if readers is not None and begun != now:
                raise ValueError(
                    f"{self.path} reads tars with {begun[0]} processes x {begun[1]} workers, this command has "
                    f"{now[0]} x {now[1]}"
                )
            for name, found in ids.items():
                if (self.path / name).read_text().splitlines() != found:
                    raise ValueError(f"{self.path / name} names other photos than this command's --data")

    def write_config(self, settings: dict[str, Any]) -> None:
        """The resolved settings beside git revision, versions and machine."""
        if self.world.is_main:
            facts = {"processes": self.world.size, "launcher": launcher()}
            write_json(self.path / "config.json", settings | provenance() | facts)

    def write_ids(self, name: str, ids: list[str]) -> None:
        if self.world.is_main:
            write_text(self.path / name, "".join(f"{one}\n" for one in ids))

    def log(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and its plain numbers to TensorBoard."""
        if not self.world.is_main:
            return
        if self._log is None:
            self._log = (self.path / "metrics.jsonl").open("a")
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._board is not None:
            self._board.close()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: State, facts: State) -> None:
        """All processes write their share beside the last checkpoint; it takes that one's place once it is whole."""
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        state["ema"] = ema
        folder = self.path / "checkpoints"
        whole, part = folder / f"step-{step}", folder / ".unfinished"
        if self.world.agree(whole.is_dir())[0]:  # weights are as they were; what validation found may be new
            if self.world.is_main:
                write_json(whole / "facts.json", {"step": step, **facts})
            return
        if self.world.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.world.barrier()
        with _plainly(f"{part} was not written"):
            dcp.save(state, checkpoint_id=str(part), no_dist=self.world.size == 1)
        self.world.barrier()
        if self.world.is_main:
            write_json(part / "facts.json", {"step": step, **facts})
            os.replace(part, whole)
            for old in folder.glob("step-*"):
                if old != whole:
                    shutil.rmtree(old)
        self.world.barrier()

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted((self.path / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
        return found[-1] if found else None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: State) -> State | None:
        """Put the last checkpoint into model, optimiser and moving average, in place; its facts, or None if there is
        none. ValueError in one line if it belongs to another model."""
        folder = self.last()
        if folder is None:
            return None
        state: State = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        state["ema"] = ema
        with _plainly(f"{folder} does not fit this run"):
            dcp.load(state, checkpoint_id=str(folder), no_dist=self.world.size == 1)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return json.loads((folder / "facts.json").read_text())

    def export(self, name: str, model: nn.Module, metadata: dict[str, str]) -> Path:
        """The model's weights as they are now, under SAM's names (a classifier's: its own), in half precision."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: State = get_model_state_dict(model, options=options)
        path = self.path / name
        if self.world.is_main:
            own = {key.removeprefix("sam."): value for key, value in state.items()}
            ckpt.save(path, own, metadata, torch.float16)
        return path


@contextmanager
def _plainly(what: str) -> Iterator[None]:
    """No warning about there being one process; OSError in one line for what torch raises, which is no Exception."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.api.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise OSError(f"{what} ({one_line(cause)})") from None


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
