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
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data.annotations import Photo
from ..distributed import Stopwatch, World
from ..files import differing_settings, write_json

Line = dict[str, Any]


def predict_photos(
    photos: Sequence[Photo],
    predict: Callable[[Photo, Stopwatch], list[dict[str, Any]]],
    folder: Path,
    settings: dict[str, Any],
    device: torch.device,
    *,
    resume: bool = False,
    world: World | None = None,
) -> list[Line] | None:
    """`predict(photo, stopwatch)` for every photo; lines {image_id, rows, seconds} in the photos' order.

    None on all processes but the main one. ValueError if `folder` holds a run with other settings and `resume` is asked
    for.
    """
    world = world or World()
    finished, done = _prepare(folder, settings, resume, world)
    todo = [photo for photo in photos if photo.id not in finished]
    mine = todo[world.rank :: world.size]
    bar = tqdm(total=len(mine), unit="image", disable=not world.is_main or not sys.stderr.isatty())
    with (folder / f"part-{world.rank}.jsonl").open("a") as part:
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
    done = {image: line for part in world.gather_on_main(done) for image, line in part.items()}
    return [done[photo.id] for photo in photos] if world.is_main else None


def _prepare(folder: Path, settings: dict[str, Any], resume: bool, world: World) -> tuple[set[int], dict[int, Line]]:
    """Make the run folder, or read what an earlier run left there: images that are done, and their lines on the main
    process."""
    if world.is_main:
        _check_settings(folder, settings, resume)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            _set_aside(folder)
        write_json(folder / "settings.json", settings)
    world.barrier()
    finished, done = set(), {}
    for part in sorted(folder.glob("part-*.jsonl")):
        for line in read_part(part):
            finished.add(line["image_id"])
            if world.is_main:
                done[line["image_id"]] = line
    world.barrier()  # nobody appends while another still reads
    _drop_torn_line(folder / f"part-{world.rank}.jsonl")
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
    if resume and (changes := differing_settings(folder / "settings.json", settings)):
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
