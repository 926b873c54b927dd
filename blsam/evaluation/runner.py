"""Predictions for many photos, in one process or under torchrun, on disk as they are made.

A run folder holds `settings.json` and `part-N.jsonl`, one line for each photo. A run that was killed goes on from what
is there, with whatever number of processes; each photo is predicted once, whoever does it. Several machines need the
folder on a disk that they share.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from ..checkpoint import write_atomically
from ..data.annotations import Photo

Line = dict[str, Any]


@contextmanager
def processes(backend: str = "gloo", timeout: timedelta = timedelta(days=2)) -> Iterator[tuple[int, int]]:
    """(rank, how many processes), from torchrun's environment; (0, 1) without it.

    As it is for evaluation: only lists of Python objects are exchanged, so gloo serves whatever the device, and the
    first to finish waits for the last.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1
        return
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


class Stopwatch:
    """Seconds by part; with `device`, what runs on it is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}
        self._start = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._start = time.perf_counter()
        yield
        self.split(part)

    def split(self, part: str) -> None:
        """What has passed since the part began goes to `part`, the rest to the part that was named."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._start
        self._start = now


def predict_photos(
    photos: Sequence[Photo],
    predict: Callable[[Photo, Stopwatch], list[dict[str, Any]]],
    folder: Path,
    settings: dict[str, Any],
    device: torch.device,
    *,
    resume: bool = False,
    rank: int = 0,
    world: int = 1,
) -> list[Line] | None:
    """`predict(photo, stopwatch)` for every photo; lines {image_id, rows, seconds} in the photos' order on rank 0.

    None on the other ranks. ValueError if `folder` holds a run with other settings and `resume` is asked for.
    """
    finished, done = _prepare(folder, settings, resume, rank, world)
    todo = [photo for photo in photos if photo.id not in finished]
    mine = todo[rank::world]
    bar = tqdm(total=len(mine), unit="image", disable=rank > 0 or not sys.stderr.isatty())
    with (folder / f"part-{rank}.jsonl").open("a") as part:
        for photo in mine:
            watch = Stopwatch(device)
            start = time.perf_counter()
            rows = predict(photo, watch)
            rest = time.perf_counter() - start - sum(watch.seconds.values())
            line = {"image_id": photo.id, "rows": rows, "seconds": watch.seconds | {"rest": rest}}
            part.write(json.dumps(line) + "\n")
            part.flush()
            done[photo.id] = line
            bar.update()
    bar.close()
    if world > 1:
        parts: list[dict[int, Line]] | None = [{}] * world if rank == 0 else None
        dist.gather_object(done, parts)
        done = {image: line for part in parts or [] for image, line in part.items()}
    return [done[photo.id] for photo in photos] if rank == 0 else None


def _prepare(
    folder: Path, settings: dict[str, Any], resume: bool, rank: int, world: int
) -> tuple[set[int], dict[int, Line]]:
    """Make the run folder, or read what an earlier run left there: images that are done, and on rank 0 their lines."""
    if rank == 0:
        _check_settings(folder, settings, resume)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            _set_aside(folder)
        text = json.dumps(settings, indent=1)
        write_atomically(folder / "settings.json", lambda path: Path(path).write_text(text + "\n"))
    if world > 1:
        dist.barrier()
    finished, done = set(), {}
    for part in sorted(folder.glob("part-*.jsonl")):
        for line in read_part(part):
            finished.add(line["image_id"])
            if rank == 0:
                done[line["image_id"]] = line
    if world > 1:
        dist.barrier()  # nobody appends while another still reads
    _drop_torn_line(folder / f"part-{rank}.jsonl")
    return finished, done


def _set_aside(folder: Path) -> None:
    """Move the parts of an earlier run into previous-N, so that forgetting to resume costs nothing."""
    parts = [part for part in folder.glob("part-*.jsonl") if part.stat().st_size]
    if parts:
        aside = folder / f"previous-{len(list(folder.glob('previous-*')))}"
        aside.mkdir()
        for part in parts:
            part.replace(aside / part.name)


def _check_settings(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    path = folder / "settings.json"
    if not resume or not path.is_file():
        return
    earlier = json.loads(path.read_text())
    differing = sorted(key for key in settings.keys() | earlier.keys() if settings.get(key) != earlier.get(key))
    if differing:
        changes = ", ".join(f"{key} {earlier.get(key)} then, {settings.get(key)} now" for key in differing)
        raise ValueError(f"{folder} holds a run with other settings ({changes}); start anew without --resume")


def read_part(path: Path) -> Iterator[Line]:
    """The lines of a part; the last may be torn by a kill and is then left out."""
    for text in path.read_text().splitlines(keepends=True):
        if text.endswith("\n"):
            yield json.loads(text)


def _drop_torn_line(path: Path) -> None:
    """Cut a part after its last whole line, so that appending goes on cleanly."""
    if path.is_file():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
