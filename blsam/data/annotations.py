"""COCO and LVIS annotations: photos, the objects on them, and what had to be left out.

One pass over the json; `pycocotools` and `lvis` index it, and score against the same, cleaned, copy: what neither can
read is counted by reason (`masks`, `fields`), and ids that they cannot work with are renumbered. LVIS v1 names its
images by `coco_url` alone and keeps them in train2017 and val2017; v0.5 has a `file_name` of 2014 besides.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

from ..files import printable
from ..images import read_image
from .fields import Id, Numbering, box_of, finite, is_crowd, key_of, name_of, read_json, reasons, size_of, wrong_box
from .fields import find_image as find_image
from .masks import BadMask, checked_mask
from .masks import encode_mask as encode_mask
from .masks import to_rle as to_rle

KINDS = ("coco", "lvis")


@dataclass(frozen=True)
class Photo:
    """An annotated image: its id to the scorers, where it lies, the size in pixels that its annotations refer to, and
    the id that the file gives it.
    """

    id: int
    path: Path
    height: int
    width: int
    source_id: Id | None = None


@dataclass(frozen=True)
class Target:
    """An annotated object: mask as compressed RLE {size [h, w], counts bytes}, box x1 y1 x2 y2, the area that the
    annotation states, in pixels (of the polygon: not quite the mask's). The ids are those to the scorers, `source_id`
    the file's.
    """

    id: int
    category_id: int
    box: tuple[float, float, float, float]
    area: float
    rle: dict[str, Any]
    source_id: Id | None = None

    @property
    def mask(self) -> np.ndarray:
        """bool [H, W]."""
        return rle_tools.decode(self.rle).astype(bool)


class Annotations:
    """The photos of an annotation file that lie in a folder, in the order of their ids, and their objects.

    Args:
        path: json in COCO's or LVIS's format.
        images: folder; an image lies at images/<split of coco_url>/<name>, images/<name> or images/<file_name>.
        kind: "coco" or "lvis" (which needs the package `lvis`).
        limit: only the first photos by id.
        skip_missing: leave out photos that are not in the folder instead of refusing to go on.

    Attributes: `photos`; `api`, the `COCO` or `LVIS` object over these photos alone, by the scorers' ids; `images`,
    `categories`, what the file's ids are to the scorers; `left_out`, how many annotations or photos were left out
    while reading, by reason. FileNotFoundError, ValueError or ImportError in one line.
    """

    def __init__(
        self, path: str | Path, images: str | Path, kind: str, limit: int | None = None, skip_missing: bool = False
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"annotations are of kind {' or '.join(KINDS)}, not {kind!r}")
        if limit is not None and limit < 1:
            raise ValueError(f"the limit must be at least 1 image, is {limit}")
        images = Path(images)
        if not images.is_dir():
            raise FileNotFoundError(f"no folder {images}")
        dataset = _read(Path(path))
        self.path, self.kind = Path(path), kind
        self.left_out: Counter[str] = Counter()
        self.images = _number(dataset["images"], "images", path)
        self.categories = _number(dataset["categories"], "categories", path)

        records = sorted(dataset["images"], key=lambda record: record["id"])[:limit]
        files = [find_image(images, record) for record in records]
        _check_distinct(records, files, path)
        missing = [name_of(record) for record, file in zip(records, files) if file is None]
        if len(missing) == len(records):
            raise FileNotFoundError(f"none of the {len(records)} images of {path} is in {images}")
        if missing and not skip_missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(records)} images of {path} are not in {images} "
                f"(the first: {printable(missing[0])}); --skip-missing evaluates the others"
            )
        self.left_out["images not found"] += len(missing)
        self.photos = [self._photo(record, file) for record, file in zip(records, files) if file]
        sizes = {photo.id: (photo.height, photo.width) for photo in self.photos}
        dataset["images"] = [record for record in records if record["id"] in sizes]
        dataset["annotations"] = self._clean(dataset["annotations"], sizes)
        self.api = _index(dataset, kind, self.categories)
        self._of_image = self.api.imgToAnns if kind == "coco" else self.api.img_ann_map

    def _photo(self, record: dict, file: Path) -> Photo:
        """With the size that the record states, or of the file where it states none that can be."""
        record["height"], record["width"] = size_of(record) or _size_of_file(file)
        return Photo(record["id"], file, record["height"], record["width"], self.images.source[record["id"]])

    def _clean(self, annotations: list, sizes: dict[int, tuple[int, int]]) -> list[dict]:
        """Those on the photos kept that can be used, their fields as the scorers need them; the others are counted."""
        clean, faults = [], 0
        for annotation in annotations:
            try:
                if (one := self._cleaned(annotation, sizes)) is not None:
                    clean.append(one)
            except BadMask as error:
                self.left_out[str(error)] += 1
                faults += 1
        if faults and not clean:
            raise ValueError(f"{self.path}: no annotation can be used: {reasons(self.left_out)}")
        ids = _numbering([annotation.get("id") for annotation in clean], "annotations", self.path, 1)
        for annotation, number in zip(clean, ids.numbers):
            annotation["id"] = number
        self._source = ids.source
        return clean

    def _cleaned(self, annotation: Any, sizes: dict[int, tuple[int, int]]) -> dict | None:
        """One annotation; None if its photo is left out, BadMask with the reason if it cannot be used itself."""
        if not isinstance(annotation, dict):
            raise BadMask("annotations that are no json objects")
        image = self.images.find(annotation.get("image_id"))
        if image is None:
            raise BadMask("annotations without an image")
        if image not in sizes:
            return None
        category = self.categories.find(annotation.get("category_id"))
        if category is None:
            raise BadMask("annotations of unknown categories")
        mask = checked_mask(annotation.get("segmentation"), *sizes[image])
        box, area = annotation.get("bbox"), finite(annotation.get("area"))
        if box is None or area is None or area < 0:  # then they are the mask's
            rle = to_rle(mask, *sizes[image])
            box = [float(v) for v in rle_tools.toBbox(rle)] if box is None else box
            area = float(rle_tools.area(rle)) if area is None or area < 0 else area
        if (sides := box_of(box)) is None:
            raise BadMask("box of other than four numbers")
        fields = {"image_id": image, "category_id": category, "segmentation": mask, "bbox": list(sides), "area": area}
        annotation.update(fields, iscrowd=int(is_crowd(annotation.get("iscrowd"))))  # LVIS has no such key
        return annotation

    def targets(self, photo: Photo, *, crowd: bool, min_area: float = 0) -> tuple[list[Target], Counter[str]]:
        """The objects of a photo that can be prompted for, in the file's order, and how many cannot, by reason."""
        targets: list[Target] = []
        left_out: Counter[str] = Counter()
        for annotation in self._of_image.get(photo.id, ()):
            x, y, w, h = annotation["bbox"]
            box = (x, y, x + w, y + h)
            rle = to_rle(annotation["segmentation"], photo.height, photo.width)
            if annotation["iscrowd"] and not crowd:
                left_out["crowd"] += 1
            elif reason := wrong_box(box, photo.height, photo.width):
                left_out[reason] += 1
            elif annotation["area"] < min_area:
                left_out[f"area below {min_area:g}"] += 1
            elif not rle_tools.area(rle):  # a thin polygon may cover no pixel
                left_out["empty mask"] += 1
            else:
                number, category, area = annotation["id"], annotation["category_id"], float(annotation["area"])
                targets.append(Target(number, category, box, area, rle, self._source[number]))
        return targets, left_out


def _read(path: Path) -> dict[str, Any]:
    """The json, with its three lists; images and categories are objects, images have names."""
    dataset = read_json(path)
    wanted = ("images", "annotations", "categories")
    if not isinstance(dataset, dict) or not all(isinstance(dataset.get(key), list) for key in wanted):
        raise ValueError(f"{path} is not in COCO's format: it needs the lists {', '.join(wanted)}")
    if not dataset["images"] or not dataset["categories"]:
        raise ValueError(f"{path} has no images or no categories")
    for name in ("images", "categories"):
        for record in dataset[name]:
            if not isinstance(record, dict) or key_of(record.get("id")) is None:
                raise ValueError(f"{path}: one of its {name} has no id: {printable(record)}")
    for record in dataset["images"]:
        if not name_of(record):
            raise ValueError(f"{path}: one of its images has neither coco_url nor file_name: {printable(record)}")
    return dataset


def _number(records: list[dict], what: str, path: str | Path) -> Numbering:
    """Give records the ids that the scorers need."""
    numbering = _numbering([record["id"] for record in records], what, path, 0)
    for record, number in zip(records, numbering.numbers):
        record["id"] = number
    return numbering


def _numbering(ids: list, what: str, path: str | Path, lowest: int) -> Numbering:
    try:
        return Numbering(ids, what, lowest)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_distinct(records: list[dict], files: list[Path | None], path: str | Path) -> None:
    """ValueError where two images of other names would be the same photo, as those of two folders put into one."""
    names: dict[Path, str] = {}
    for record, file in zip(records, files):
        if file is not None and names.setdefault(file, name_of(record)) != name_of(record):
            raise ValueError(
                f"{path}: {printable(names[file])} and {printable(name_of(record))} would both be {file}; "
                "give the folder that both names start from"
            )


def _size_of_file(path: Path) -> tuple[int, int]:
    """height, width of a photo as stored: it is read, since a header may state those of the turned one."""
    height, width = read_image(path, upright=False).shape[:2]
    return height, width


def _index(dataset: dict, kind: str, categories: Numbering) -> Any:
    """The `COCO` or `LVIS` object of a dataset that is read already."""
    if kind == "coco":
        api = COCO()
        api.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            api.createIndex()
        return api
    try:
        from lvis import LVIS
    except ImportError:
        raise ImportError("LVIS needs the package lvis: pip install 'blsam[eval]'") from None
    needed = {"images": ("neg_category_ids", "not_exhaustive_category_ids"), "categories": ("frequency",)}
    for name, keys in needed.items():
        if not all(key in record for record in dataset[name] for key in keys):
            raise ValueError(f"these annotations are not LVIS's: their {name} have no {' or no '.join(keys)}")
    for record in dataset["images"]:
        for key in needed["images"]:
            found = map(categories.find, record[key] if isinstance(record[key], list) else ())
            record[key] = [number for number in found if number is not None]
    if not all(record["frequency"] in ("r", "c", "f") for record in dataset["categories"]):
        raise ValueError("these annotations are not LVIS's: the frequency of a category is r, c or f")

    class Loaded(LVIS):
        def _load_json(self, loaded: dict) -> dict:
            return loaded

    return Loaded(dataset)
