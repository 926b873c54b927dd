"""Photos to train on: SA-1B as it is downloaded (folders or tars), or COCO and LVIS json; for encoders plain ones too.

Every photo has an `id` and `read()`, whatever it lies in.
"""

from __future__ import annotations

import itertools
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as rle_tools
from tqdm import tqdm

from ..files import printable
from ..images import SUFFIXES, read_annotated, read_image
from .annotations import Annotations
from .fields import finite, parse_json, reasons
from .masks import BadMask, checked_mask, to_rle

PACKED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")
Content = tuple[np.ndarray, list[dict[str, Any]]]  # uint8 [h, w, 3] RGB; annotations with segmentation (RLE) and area


class TrainingPhoto(Protocol):
    """A photo that can be read, now or later, here or in a worker process."""

    @property
    def id(self) -> str:
        """Another one for every photo."""

    def read(self) -> Content:
        """Pixels and annotations; ValueError or OSError if a file is damaged or not to be read."""


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
class PlainPhoto:
    """A photo that nobody annotated, upright."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.stem

    def read(self) -> Content:
        return read_image(self.path), []


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
        return read_annotated(self.path, self.annotations[0]["segmentation"]["size"]), list(self.annotations)


def parse(image: bytes, text: bytes) -> Content:
    """The content of SA-1B's two files, masks as compressed RLE; ValueError in one line if one is not as it should be."""
    content = parse_json(text, "the json")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise ValueError("the json has no list of annotations")
    masks = (one.get("segmentation") for one in annotations)
    sizes = [mask.get("size") for mask in masks if isinstance(mask, dict)]
    size = next((size for size in sizes if isinstance(size, list) and len(size) == 2), None)
    pixels = read_image(image, upright=False) if size is None else read_annotated(image, size)
    return pixels, [_read_annotation(one, *pixels.shape[:2]) for one in annotations]


def _read_annotation(annotation: dict, height: int, width: int) -> dict[str, Any]:
    try:
        rle = to_rle(checked_mask(annotation.get("segmentation"), height, width), height, width)
    except BadMask as reason:
        raise ValueError(f"an annotation cannot be used: {reason}") from None
    area = finite(annotation.get("area"))
    return {"segmentation": rle, "area": float(rle_tools.area(rle)) if area is None or area < 0 else area}


def _span(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


# --- which photos there are ------------------------------------------------------------------------------------------


def list_photos(
    paths: Iterable[str | Path], images: str | Path | None = None, plain: bool = False
) -> list[TrainingPhoto]:
    """The photos of folders (`NAME.jpg` + `NAME.json`, or tars), of tars, and of COCO or LVIS json with its `images`.

    plain: a folder's photos without a json are taken too. What had to be left out is said on stderr. FileNotFoundError
    or ValueError in one line for a path that is missing, has none, or repeats an id.
    """
    photos: list[TrainingPhoto] = []
    for path in map(Path, paths):
        if path.suffix.lower() == ".json":
            photos += _annotated(path, images)
        elif path.is_file():
            photos += _in_tars([path])
        else:
            photos += _in_folder(path, plain)
    seen: set[str] = set()
    for photo in photos:
        if photo.id in seen:
            raise ValueError(f"two photos have the id {printable(photo.id)}")
        seen.add(photo.id)
    return photos


def hidden(name: str) -> bool:
    """Whether a path is of a hidden file, or in a hidden folder."""
    return any(part.startswith(".") and part != "." for part in PurePosixPath(name).parts)


def _pairs(names: Iterable[str], plain: bool = False) -> tuple[list[tuple[str, str]], Counter[str]]:
    """(photo, json) of the same name among paths, sorted, hidden ones left out, and how many are without the other.

    plain: a photo without a json comes with "".
    """
    known = {name for name in names if not hidden(name)}
    photos = sorted(name for name in known if name.lower().endswith(SUFFIXES))
    texts = {name for name in known if name.endswith(".json")}
    named = [(name, str(PurePosixPath(name).with_suffix(".json"))) for name in photos]
    pairs = [(name, text if text in texts else "") for name, text in named if plain or text in texts]
    alone = {"photos without a json": len(photos) - len(pairs)}
    alone["json without a photo"] = len(texts - {text for _, text in pairs})
    return pairs, Counter({reason: n for reason, n in alone.items() if n})


def _say_left_out(place: Path, left_out: Counter[str]) -> None:
    if any(left_out.values()) and int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"left out of {place}: {reasons(left_out)}", file=sys.stderr)


def _in_folder(folder: Path, plain: bool) -> list[TrainingPhoto]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder or tar {folder}")
    files = {entry.name for entry in os.scandir(folder)}
    tars = sorted(name for name in files if name.endswith(".tar") and not name.startswith("."))
    if tars:
        return _in_tars([folder / name for name in tars])
    pairs, left_out = _pairs(files, plain)
    if not pairs:
        packed = sorted(name for name in files if name.endswith(PACKED))
        hint = f"; {packed[0]} is compressed, unpack it first" if packed else ""
        what = "photo" if plain else "photo with a .json beside it (SA-1B's layout; --stage encoder needs none)"
        raise FileNotFoundError(f"{folder} has no {what}, and no .tar{hint}")
    _say_left_out(folder, left_out)
    return [(FilePhoto if text else PlainPhoto)(folder / name) for name, text in pairs]


def _in_tars(tars: Sequence[Path]) -> list[TrainingPhoto]:
    photos: list[TrainingPhoto] = []
    for tar in tqdm(tars, unit="tar", desc="headers", disable=len(tars) < 10 or not sys.stderr.isatty()):
        members = _members(tar)
        pairs, left_out = _pairs(members)
        found = [TarPhoto(tar, PurePosixPath(n).stem, members[n], members[j]) for n, j in pairs]
        dotted = next((photo.id for photo in found if "." in photo.id), None)
        if dotted is not None:
            raise ValueError(f"{tar}: {printable(dotted)} has a dot in its name, at which webdataset would cut it")
        together = _neighbours(members)
        apart = next((n for n, j in pairs if together[n] != together[j]), None)
        if apart is not None:
            raise ValueError(f"{tar}: {printable(apart)} and its json do not lie side by side, as webdataset needs it")
        if not found:
            raise FileNotFoundError(f"{tar} has no photo with a .json beside it (SA-1B's layout)")
        _say_left_out(tar, left_out)
        photos += found
    return photos


def _neighbours(members: Iterable[str]) -> dict[str, int]:
    """The number of the run of files of one stem that each lies in; hidden ones do not count."""
    visible = [name for name in members if not hidden(name)]
    runs = itertools.groupby(visible, lambda name: PurePosixPath(name).with_suffix(""))
    return {name: number for number, (_, run) in enumerate(runs) for name in run}


def _members(tar: Path) -> dict[str, tuple[int, int]]:
    """(offset, size) in bytes of the files in a tar, by their paths."""
    with tar.open("rb") as opened:
        head = opened.read(6)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PK", b"\x28\xb5\x2f\xfd")):
        raise ValueError(f"{tar} is compressed, not an uncompressed tar; unpack it first, to a folder or a .tar")
    members, end = {}, -1
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                if member.size < 0 or member.offset <= end:  # a damaged header may lead in circles
                    raise tarfile.ReadError("a member of impossible size")
                end = member.offset
                if member.isfile() and not member.issparse():
                    members[str(PurePosixPath(member.name))] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
        raise ValueError(f"{tar} is not an uncompressed tar, or is cut short ({printable(error)})") from None
    return members


def _annotated(path: Path, images: str | Path | None) -> list[TrainingPhoto]:
    if images is None:
        raise ValueError(f"{path} needs --images, the folder of its photos")
    # LVIS has the same keys, and those of its own are not needed here
    data = Annotations(path, images, "coco", skip_missing=True)
    if missing := data.left_out["images not found"]:
        raise FileNotFoundError(f"{missing} photos of {path} are not in {images}; take them out of the json")
    photos: list[TrainingPhoto] = []
    left_out = Counter(data.left_out)
    for photo in data.photos:
        targets, skipped = data.targets(photo, crowd=False)
        left_out += skipped
        records = tuple({"segmentation": target.rle, "area": target.area} for target in targets)
        if records:
            photos.append(AnnotatedPhoto(photo.path, f"{path.stem}/{photo.source_id}", records))
    if not photos:
        raise ValueError(f"{path} has no photo with an object to learn from")
    _say_left_out(path, left_out)
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
