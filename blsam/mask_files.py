"""Everything in many photos, on disk as it is made, in the formats of SAM's `amg.py` and as one COCO json.

A run folder holds its settings and what each photo gave: `NAME.json` (a list of SAM's records, masks as COCO's
run-lengths) or `NAME/` (0.png, 1.png ... and metadata.csv), as SAM's script leaves them; for one COCO json, parts of it in
`photos`. Each is whole or not there, so that a run that was killed goes on, with whatever number of processes; no photo
is done twice.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools
from tqdm import tqdm

from .data.archives import TARS, Source, content, members
from .data.sa1b import hidden
from .distributed import World
from .files import differing_settings, printable, write_json
from .images import SUFFIXES, decode_image, encode_image
from .options import UsageError, one_line
from .records import coco_json

SETTINGS, TABLE, MAKING = "blsam-settings.json", "metadata.csv", ".making-"
COLUMNS = (
    *("id", "area", "bbox_x0", "bbox_y0", "bbox_w", "bbox_h", "point_input_x", "point_input_y"),
    *("predicted_iou", "stability_score", "crop_box_x0", "crop_box_y0", "crop_box_w", "crop_box_h"),
)
Records = list[dict[str, Any]]  # of a photo, as SamAutomaticMaskGenerator gives them with coco_rle


@dataclass(frozen=True)
class Photo:
    """name: the path inside what was given, without suffix; file_name: with it."""

    name: str
    file_name: str
    source: Source


def find_photos(paths: Iterable[Path], form: str) -> list[Photo]:
    """The photos of files, of folders with what is below them, and of tars; FileNotFoundError or ValueError in one line
    for a path that is missing or has none, and for two whose masks of this form would lie in one place."""
    found: list[Photo] = []
    for path in paths:
        photos = list(_photos_at(path))
        if not photos:
            raise ValueError(f"{printable(path, 300)} has no photo ({', '.join(SUFFIXES)})")
        found += photos
    seen: dict[str, Photo] = {}
    for photo in found:
        other = seen.setdefault(photo.name, photo)
        if other is not photo:
            raise UsageError(
                f"{printable(other.file_name)} and {printable(photo.file_name)} have the same name without suffix, their "
                "masks would overwrite each other; give them one at a time, with folders of their own"
            )
    if form == "png":  # a.png beside a/b.png: the folder a would be that of both
        for photo in found:
            above = next((seen[str(one)] for one in PurePosixPath(photo.name).parents if str(one) in seen), None)
            if above is not None:
                raise UsageError(
                    f"the masks of {printable(above.file_name)} and {printable(photo.file_name)} would lie in one folder; "
                    "choose another --format"
                )
    return found


def _photos_at(path: Path) -> Iterator[Photo]:
    sources: Iterable[tuple[str, Source]]
    if path.is_dir():
        sources = ((file.relative_to(path).as_posix(), file) for file in sorted(path.rglob("*")) if file.is_file())
    elif not path.exists():
        raise FileNotFoundError(f"no photo, folder or tar at {printable(path, 300)}")
    elif path.name.lower().endswith(TARS):
        sources = members(path)
    else:
        yield Photo(path.stem, path.name, path)  # whatever its suffix: what it is, reading it says
        return
    for name, source in sources:
        inside = PurePosixPath(name)
        if inside.suffix.lower() not in SUFFIXES:
            continue
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"{path}: the masks of {printable(name)} would lie outside the folder; pack the tar anew")
        if not hidden(name):
            yield Photo(str(inside.with_suffix("")), str(inside), source)


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """made, kept: photos done now and before; masks: of those done now; damaged: what could not be read, and why."""

    made: int
    kept: int
    masks: int
    damaged: list[str]


def mask_photos(
    photos: Sequence[Photo],
    generate: Callable[[np.ndarray], Records],
    folder: Path,
    form: str,
    settings: dict[str, Any],
    *,
    upright: bool = True,
    world: World | None = None,
) -> Done:
    """`generate` for every photo that is not there yet; of form "coco" then `coco.json` over all, by the main process.

    UsageError if the folder holds a run with other settings.
    """
    world = world or World()
    if world.is_main:
        if changes := differing_settings(folder / SETTINGS, settings):
            raise UsageError(f"{folder} holds masks made with other settings ({changes}); choose another folder")
        write_json(folder / SETTINGS, settings)
        for torn in list(folder.rglob(f"{MAKING}*")):  # of a run that was killed
            shutil.rmtree(torn)
    world.barrier()
    todo = [photo for photo in photos if not is_done(folder, photo, form)]
    world.barrier()  # nobody writes while another still looks
    mine, masks, damaged = todo[world.rank :: world.size], 0, []
    for photo in tqdm(mine, unit="photo", disable=not world.is_main or not sys.stderr.isatty()):
        try:
            image, _ = decode_image(content(photo.source), upright=upright)
        except (OSError, ValueError) as error:
            damaged.append(f"{printable(photo.file_name)}: {one_line(error)}")
            continue
        records = generate(image)
        write_photo(place(folder, photo, form), image.shape[:2], records, form)
        masks += len(records)
    parts = world.gather((len(mine) - len(damaged), masks, damaged))
    if form == "coco" and world.is_main:
        write_json(folder / "coco.json", as_coco(photos, folder), indent=None)
    world.barrier()
    return Done(
        sum(part[0] for part in parts),
        len(photos) - len(todo),
        sum(part[1] for part in parts),
        [line for part in parts for line in part[2]],
    )


def place(folder: Path, photo: Photo, form: str) -> Path:
    """Where the masks of a photo are."""
    if form == "coco":
        folder = folder / "photos"
    return folder / (photo.name if form == "png" else f"{photo.name}.json")


def is_done(folder: Path, photo: Photo, form: str) -> bool:
    """Whether the masks of a photo are there; a folder may be one of other photos."""
    path = place(folder, photo, form)
    return (path / TABLE if form == "png" else path).is_file()


# --- formats ---------------------------------------------------------------------------------------------------------


def write_photo(path: Path, size: tuple[int, int], records: Records, form: str) -> None:
    """The masks of a photo of size (H, W), all or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=MAKING) as making:
        made = Path(making) / path.name
        if form == "png":
            made.mkdir()
            write_pictures(made, records)
        else:
            write_json(made, {"size": list(size), "masks": records} if form == "coco" else records, indent=None)
        os.replace(made, path)


def write_pictures(folder: Path, records: Records) -> None:
    """0.png, 1.png ... of 0 and 255, and metadata.csv, as SAM's script writes them."""
    with (folder / TABLE).open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for i, record in enumerate(records):
            mask = rle_tools.decode(record["segmentation"])
            (folder / f"{i}.png").write_bytes(encode_image(mask * 255, "PNG"))
            scores = (record["predicted_iou"], record["stability_score"])
            table.writerow(
                (i, record["area"], *record["bbox"], *record["point_coords"][0], *scores, *record["crop_box"])
            )


def as_coco(photos: Sequence[Photo], folder: Path) -> dict[str, Any]:
    """What is there of the photos, as one file; those that could not be read are not in it."""
    found = []
    for photo in photos:
        path = place(folder, photo, "coco")
        if path.is_file():
            content = json.loads(path.read_text())
            height, width = content["size"]
            found.append((photo.file_name, (height, width), [generated(mask) for mask in content["masks"]]))
    return coco_json(found)


def generated(record: dict[str, Any]) -> dict[str, Any]:
    """A record of SAM's generator in COCO's words."""
    kept = {name: record[name] for name in ("segmentation", "bbox", "area", "stability_score")}
    return kept | {"score": record["predicted_iou"], "point": record["point_coords"][0]}
