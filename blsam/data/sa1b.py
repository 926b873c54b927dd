"""Photos with masks to train on: SA-1B as it is downloaded (folders or tars), or COCO and LVIS json.

Every photo has an `id` and `read()`, whatever it lies in.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ..images import read_image
from .annotations import Annotations

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
Content = tuple[np.ndarray, list[dict[str, Any]]]  # uint8 [h, w, 3] RGB; annotations with segmentation (RLE) and area


class TrainingPhoto(Protocol):
    """A photo that can be read, now or later, here or in a worker process."""

    @property
    def id(self) -> str:
        """Another one for every photo."""

    def read(self) -> Content:
        """Pixels and annotations; raises whatever a damaged file makes PIL, json or the file system raise."""


@dataclass(frozen=True)
class FilePhoto:
    """`NAME.jpg` beside `NAME.json`, masks as compressed RLE."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.stem

    def read(self) -> Content:
        return parse(self.path.read_bytes(), self.path.with_suffix(".json").read_bytes())


@dataclass(frozen=True)
class TarPhoto:
    """The same two files as members of an uncompressed tar, at (offset, size) in bytes."""

    tar: Path
    id: str
    image: tuple[int, int]
    json: tuple[int, int]

    def read(self) -> Content:
        with self.tar.open("rb") as file:
            return parse(*(_span(file, offset, size) for offset, size in (self.image, self.json)))


@dataclass(frozen=True)
class AnnotatedPhoto:
    """A photo of a COCO or LVIS json."""

    path: Path
    id: str
    annotations: tuple[dict[str, Any], ...]

    def read(self) -> Content:
        return read_image(self.path, upright=False), list(self.annotations)


def parse(image: bytes, text: bytes) -> Content:
    """The content of SA-1B's two files."""
    annotations = json.loads(text)["annotations"]
    if not all("counts" in a["segmentation"] and a["area"] >= 0 for a in annotations):
        raise ValueError("an annotation has no RLE")
    return read_image(image, upright=False), annotations


def _span(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


# --- which photos there are ------------------------------------------------------------------------------------------


def list_photos(paths: Iterable[str | Path], images: str | Path | None = None) -> list[TrainingPhoto]:
    """The photos of folders (`NAME.jpg` + `NAME.json`, or tars), of tars, and of COCO or LVIS json with its `images`.

    FileNotFoundError or ValueError in one line for a path that is missing, has none, or repeats an id.
    """
    photos: list[TrainingPhoto] = []
    for path in map(Path, paths):
        if path.suffix == ".json":
            photos += _annotated(path, images)
        elif path.suffix == ".tar":
            photos += _in_tars([path])
        else:
            photos += _in_folder(path)
    seen: set[str] = set()
    for photo in photos:
        if photo.id in seen:
            raise ValueError(f"two photos have the id {photo.id}")
        seen.add(photo.id)
    return photos


def _in_folder(folder: Path) -> list[TrainingPhoto]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files = {entry.name for entry in os.scandir(folder)}
    tars = sorted(name for name in files if name.endswith(".tar"))
    if tars:
        return _in_tars([folder / name for name in tars])
    names = sorted(n for n in files if n.lower().endswith(IMAGE_SUFFIXES) and f"{Path(n).stem}.json" in files)
    if not names:
        raise FileNotFoundError(f"{folder} has no photo with a .json beside it (SA-1B's layout), and no .tar")
    return [FilePhoto(folder / name) for name in names]


def _in_tars(tars: Sequence[Path]) -> list[TrainingPhoto]:
    photos: list[TrainingPhoto] = []
    for tar in tqdm(tars, unit="tar", desc="headers", disable=len(tars) < 10 or not sys.stderr.isatty()):
        try:
            with tarfile.open(tar, "r:") as file:
                members = {str(PurePosixPath(m.name)): (m.offset_data, m.size) for m in file if m.isfile()}
        except tarfile.ReadError as error:
            raise ValueError(f"{tar} is not an uncompressed tar, or is cut short ({error})") from None
        names = sorted(n for n in members if n.lower().endswith(IMAGE_SUFFIXES))
        pairs = [(n, str(PurePosixPath(n).with_suffix(".json"))) for n in names]
        found = [TarPhoto(tar, PurePosixPath(n).stem, members[n], members[j]) for n, j in pairs if j in members]
        dotted = next((photo.id for photo in found if "." in photo.id), None)
        if dotted is not None:
            raise ValueError(f"{tar}: {dotted} has a dot in its name, at which webdataset would cut it")
        if not found:
            raise FileNotFoundError(f"{tar} has no photo with a .json beside it (SA-1B's layout)")
        photos += found
    return photos


def _annotated(path: Path, images: str | Path | None) -> list[TrainingPhoto]:
    if images is None:
        raise ValueError(f"{path} needs --images, the folder of its photos")
    # LVIS has the same keys, and those of its own are not needed here
    data = Annotations(path, images, "coco", skip_missing=True)
    if missing := data.left_out["images not found"]:
        raise FileNotFoundError(f"{missing} photos of {path} are not in {images}; take them out of the json")
    photos: list[TrainingPhoto] = []
    for photo in data.photos:
        targets, _ = data.targets(photo, crowd=False)
        records = tuple({"segmentation": target.rle, "area": target.area} for target in targets)
        if records:
            photos.append(AnnotatedPhoto(photo.path, f"{path.stem}/{photo.id}", records))
    if not photos:
        raise ValueError(f"{path} has no photo with an object to learn from")
    return photos


def choose_photos(
    photos: Sequence[TrainingPhoto], fraction: float, holdout: float, seed: int, most: int | None = None
) -> tuple[list[TrainingPhoto], list[TrainingPhoto]]:
    """(training, validation): a seeded share `fraction` of the photos, of which a share `holdout`, at most `most`, is
    kept apart.

    A pure function of the order of the photos and the seed; a larger fraction holds the smaller one. Of tars as few as
    will do are taken, since a tar is read whole.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(photos))
    streamed = all(isinstance(photo, TarPhoto) for photo in photos)
    if fraction < 1 and streamed:
        tars: dict[Path, list[int]] = {}
        for i in order:
            tars.setdefault(photos[i].tar, []).append(i)
        names = sorted(tars)
        order = np.array([i for number in rng.permutation(len(tars)) for i in tars[names[number]]])
    order = order[: max(1, round(fraction * len(photos)))]
    count = min(round(holdout * len(order)), len(order) if most is None else most)
    if count == len(order):
        raise ValueError(f"nothing to train on: {len(order)} photos, a share of {holdout:g} held out")
    order = rng.permutation(order) if streamed else order  # or one tar alone would be held out
    return [photos[i] for i in sorted(order[count:])], [photos[i] for i in sorted(order[:count])]
