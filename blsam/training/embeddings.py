"""A teacher's embeddings on disk: computed once, read by training, so that no teacher has to be in memory.

A folder of `part-N.safetensors` (half precision, one tensor [256, T/16, T/16] a view, T the side of the teacher's frame,
named `ID@VIEW`) and `index.json`, which says what they were made from and in which part each view lies. 2 MB a view at
1024. The teacher's decoder lies beside them, for students of the encoder alone.

No `Encoded`: a view has no photo of its own to be prompted on, a teacher no routing, and half precision does for a
target; millions of views want few files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..data.sa1b import TrainingPhoto
from ..data.views import ViewSettings, make_view
from ..files import write_atomically, write_text
from ..modeling.sam import Sam
from .objective import framed

INDEX, UNFINISHED, DECODER = "index.json", "unfinished.json", "decoder.safetensors"


class EmbeddingCache:
    """The embeddings of a folder: `cache(id, view)` -> [256, T/16, T/16] half; `settings` as they were written.

    FileNotFoundError or ValueError in one line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(
                f"no {INDEX} in {self.folder}: scripts/cache_embeddings.py writes it when it is done"
            )
        index = json.loads(path.read_text())
        self.decoder = self.folder / DECODER
        self.settings: dict[str, Any] = index["settings"]
        self.parts: dict[str, int] = {name: i for i, part in enumerate(index["parts"]) for name in part}

    def check(self, settings: dict[str, Any]) -> None:
        """ValueError names the first setting that is not that of the cache."""
        for name, value in settings.items():
            if self.settings[name] != value:
                raise ValueError(f"{self.folder} was made with {name} {self.settings[name]}, this run has {value}")

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Photos that the cache does not have."""
        return [one for one in ids if f"{one}@0" not in self.parts]

    def __call__(self, photo: str, view: int) -> torch.Tensor:
        name = f"{photo}@{view}"
        return _opened(str(self.folder / _part(self.parts[name]))).get_tensor(name)


@lru_cache(maxsize=64)
def _opened(path: str) -> Any:
    return safe_open(path, framework="pt")


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


@torch.no_grad()
def write_embeddings(
    folder: Path,
    teacher: nn.Module,
    decoder: dict[str, torch.Tensor],
    sam: Sam,
    photos: Sequence[TrainingPhoto],
    views: ViewSettings,
    settings: dict[str, Any],
    *,
    batch_size: int,
    part_size: int,
    device: torch.device,
    bf16: bool = False,
) -> Iterator[list[str]]:
    """Write the embeddings of `views.views` views of each photo; yields what was damaged, batch after batch.

    `teacher` and `decoder` as `load_teacher` gives them; of `sam` the preprocessing alone is used.
    Parts that an earlier run finished are kept, those of fewer views too; ValueError if that run had other settings.
    The index comes last.
    """
    # no part holds two views, so that more views come after those that are there
    by_view = [[(photo, view) for photo in photos] for view in range(views.views)]
    parts = [names[i : i + part_size] for names in by_view for i in range(0, len(names), part_size)]
    index = {"settings": settings, "parts": [[f"{photo.id}@{view}" for photo, view in part] for part in parts]}
    _check_unfinished(folder, index)
    for number, part in enumerate(parts):
        path = folder / _part(number)
        if path.is_file():
            yield from ([] for _ in range(0, len(part), batch_size))
            continue
        found: dict[str, torch.Tensor] = {}
        for i in range(0, len(part), batch_size):
            samples = [make_view(photo.id, photo.read, view, views) for photo, view in part[i : i + batch_size]]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                target = teacher(framed(samples, sam, device, views.carried))
            for (photo, view), one in zip(part[i : i + batch_size], target.half().cpu()):
                found[f"{photo.id}@{view}"] = one.contiguous()
            yield [sample.damaged for sample in samples if sample.damaged]
        write_atomically(path, partial(save_file, found))
    write_atomically(folder / DECODER, lambda path: save_file(decoder, path))
    (folder / UNFINISHED).unlink(missing_ok=True)
    write_text(folder / INDEX, json.dumps(index))


def _check_unfinished(folder: Path, index: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (INDEX, UNFINISHED):
        path = folder / name
        if path.is_file() and not _begins(json.loads(path.read_text()), json.loads(json.dumps(index))):
            raise ValueError(f"{folder} holds embeddings of another teacher, other photos or other settings")
    write_text(folder / UNFINISHED, json.dumps(index))


def _begins(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether what one index names comes first in the other, made in the same way."""
    same = old["settings"] | {"views": 0} == new["settings"] | {"views": 0}
    return same and old["parts"] == new["parts"][: len(old["parts"])]
