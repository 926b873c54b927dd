"""COCO and LVIS annotations: photos, the objects on them, and what had to be left out.

One pass over the json; `pycocotools` and `lvis` index it, and score against the same, cleaned, copy. LVIS v1 names its
images by `coco_url` alone and keeps them in train2017 and val2017; v0.5 has a `file_name` of 2014 besides.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

KINDS = ("coco", "lvis")


@dataclass(frozen=True)
class Photo:
    """An annotated image: its id, where it lies, and the size in pixels that its annotations refer to."""

    id: int
    path: Path
    height: int
    width: int


@dataclass(frozen=True)
class Target:
    """An annotated object: mask as compressed RLE {size [h, w], counts bytes}, box x1 y1 x2 y2, the area that the
    annotation states, in pixels (of the polygon: not quite the mask's).
    """

    id: int
    category_id: int
    box: tuple[float, float, float, float]
    area: float
    rle: dict[str, Any]

    @property
    def mask(self) -> np.ndarray:
        """bool [H, W]."""
        return rle_tools.decode(self.rle).astype(bool)


class Annotations:
    """The photos of an annotation file that lie in a folder, in the order of their ids, and their objects.

    Args:
        path: json in COCO's or LVIS's format.
        images: folder; an image lies at images/<split of coco_url>/<name> or images/<name>.
        kind: "coco" or "lvis" (which needs the package `lvis`).
        limit: only the first photos by id.
        skip_missing: leave out photos that are not in the folder instead of refusing to go on.

    Attributes: `photos`; `api`, the `COCO` or `LVIS` object over these photos alone; `left_out`, how many annotations
    or photos were left out while reading, by reason. FileNotFoundError, ValueError or ImportError in one line.
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
        dataset = _read_json(Path(path))
        self.left_out: Counter[str] = Counter()

        known = {record["id"] for record in dataset["images"]}
        records = sorted(dataset["images"], key=lambda record: record["id"])[:limit]
        files = [find_image(images, record) for record in records]
        missing = [_name(record) for record, file in zip(records, files) if file is None]
        if len(missing) == len(records):
            raise FileNotFoundError(f"none of the {len(records)} images of {path} is in {images}")
        if missing and not skip_missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(records)} images of {path} are not in {images} (the first: {missing[0]}); "
                "--skip-missing evaluates the others"
            )
        self.left_out["images not found"] += len(missing)
        self.photos = [Photo(r["id"], file, r["height"], r["width"]) for r, file in zip(records, files) if file]
        kept = {photo.id for photo in self.photos}
        dataset["images"] = [record for record in records if record["id"] in kept]
        dataset["annotations"] = self._clean(dataset["annotations"], kept, known)
        self.kind, self.api = kind, _index(dataset, kind)
        self._of_image = self.api.imgToAnns if kind == "coco" else self.api.img_ann_map

    def _clean(self, annotations: list[dict], kept: set[int], known: set[int]) -> list[dict]:
        """Those on the photos kept, without polygons of fewer than three corners, on which pycocotools stumbles."""
        clean = []
        for annotation in annotations:
            if annotation["image_id"] not in kept:
                self.left_out["annotations without an image"] += annotation["image_id"] not in known
                continue
            if isinstance(annotation["segmentation"], list):
                polygons = [polygon for polygon in annotation["segmentation"] if len(polygon) >= 6]
                if not polygons:
                    self.left_out["no polygon of three corners"] += 1
                    continue
                annotation["segmentation"] = polygons
            annotation.setdefault("iscrowd", 0)  # LVIS has no such key, COCO's scorer needs it
            clean.append(annotation)
        ids = {annotation["id"] for annotation in clean}
        if len(ids) < len(clean):
            raise ValueError("two annotations share an id")
        if ids and min(ids) < 1:
            raise ValueError("ids of annotations must be 1 or more: the official scorers take 0 for no match")
        return clean

    def targets(self, photo: Photo, *, crowd: bool, min_area: float = 0) -> tuple[list[Target], Counter[str]]:
        """The objects of a photo that can be prompted for, in the file's order, and how many cannot, by reason."""
        targets: list[Target] = []
        left_out: Counter[str] = Counter()
        for annotation in self._of_image.get(photo.id, ()):
            x, y, w, h = annotation["bbox"]
            rle = to_rle(annotation["segmentation"], photo.height, photo.width)
            if rle["size"] != [photo.height, photo.width]:
                raise ValueError(
                    f"the mask of annotation {annotation['id']} has the size {rle['size']}, its image not"
                )
            if annotation["iscrowd"] and not crowd:
                left_out["crowd"] += 1
            elif w <= 0 or h <= 0:
                left_out["box without area"] += 1
            elif annotation["area"] < min_area:
                left_out[f"area below {min_area:g}"] += 1
            elif not rle_tools.area(rle):  # a thin polygon may cover no pixel
                left_out["empty mask"] += 1
            else:
                box = (float(x), float(y), float(x + w), float(y + h))
                category, area = annotation["category_id"], float(annotation["area"])
                targets.append(Target(annotation["id"], category, box, area, rle))
        return targets, left_out


def to_rle(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Polygons, plain or compressed RLE -> compressed RLE {size, counts bytes}."""
    if isinstance(segmentation, list):
        return rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle_tools.frPyObjects(segmentation, height, width)
    counts = segmentation["counts"]
    return {"size": list(segmentation["size"]), "counts": counts.encode() if isinstance(counts, str) else counts}


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """bool [H, W] -> compressed RLE as json holds it: {size [h, w], counts str}."""
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}


def find_image(folder: Path, record: dict) -> Path | None:
    """folder/<split of coco_url>/<name>, else folder/<name>; None if neither is there."""
    parts = PurePosixPath(_name(record)).parts
    for candidate in (folder.joinpath(*parts), folder / parts[-1]):
        if candidate.is_file():
            return candidate
    return None


def _name(record: dict) -> str:
    """<split>/<name> of the coco_url, or the file_name where there is none."""
    url = record.get("coco_url")
    return "/".join(PurePosixPath(url).parts[-2:]) if url else record["file_name"]


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no annotations at {path}")
    try:
        dataset = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error})") from None
    wanted = ("images", "annotations", "categories")
    if not isinstance(dataset, dict) or not all(isinstance(dataset.get(key), list) for key in wanted):
        raise ValueError(f"{path} is not in COCO's format: it needs the lists {', '.join(wanted)}")
    keys: dict[str, dict[str, Any]] = {
        "images": {"id": int, "height": int, "width": int},
        "annotations": {"id": int, "image_id": int, "category_id": int, "area": (int, float)},
        "categories": {"id": int},
    }
    for name, needed in keys.items():
        for record in dataset[name]:
            wrong = [key for key, kind in needed.items() if not isinstance(record.get(key), kind)]
            if wrong:
                raise ValueError(f"{path}: one of its {name} has no number as {', '.join(wrong)}")
    for annotation in dataset["annotations"]:
        if not _is_box(annotation.get("bbox")) or not _is_segmentation(annotation.get("segmentation")):
            raise ValueError(
                f"{path}: annotation {annotation['id']} needs a bbox [x, y, w, h] and a segmentation: "
                "polygons [[x1, y1, ...], ...] or RLE {size, counts}"
            )
    if not dataset["images"] or not dataset["categories"]:
        raise ValueError(f"{path} has no images or no categories")
    if len({record["id"] for record in dataset["images"]}) < len(dataset["images"]):
        raise ValueError(f"{path}: two images share an id")
    if not all(record.get("coco_url") or record.get("file_name") for record in dataset["images"]):
        raise ValueError(f"{path}: one of its images has neither coco_url nor file_name")
    return dataset


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(isinstance(v, int | float) for v in value)


def _is_segmentation(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value.get("size", ())) == 2 and isinstance(value.get("counts"), list | str)
    return isinstance(value, list) and all(isinstance(polygon, list) for polygon in value)


def _index(dataset: dict, kind: str) -> Any:
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

    class Loaded(LVIS):
        def _load_json(self, loaded: dict) -> dict:
            return loaded

    return Loaded(dataset)
