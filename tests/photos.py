"""Photos and annotations to read, to train on and to be evaluated on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools
from skimage import data

from blsam.data.annotations import Annotations
from tests.helpers import DATA

PHOTOS = {"landscape": data.astronaut()[:300], "portrait": data.astronaut()[:, 100:400]}
SQUARE = [[1, 1, 3, 1, 3, 3, 1, 3]]


def write_photos(folder: Path, count: int = 3) -> Path:
    """Photos of scikit-image in SA-1B's layout, with made-up rectangular objects."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = (data.astronaut(), data.chelsea(), data.coffee())
    for i in range(count):
        image = np.roll(sources[i % 3], 40 * i, axis=1)
        h, w = image.shape[:2]
        Image.fromarray(image).save(folder / f"sa_{i}.jpg")
        annotations = []
        for top, left in ((h // 8, w // 8), (h // 3, w // 2)):
            mask = np.zeros((h, w), np.uint8, order="F")
            mask[top : top + h // 3, left : left + w // 3] = 1
            rle = rle_tools.encode(mask)
            rle["counts"] = rle["counts"].decode()
            annotations.append({"segmentation": rle, "area": int(mask.sum())})
        (folder / f"sa_{i}.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def write_tars(photos: Path, folder: Path, count: int) -> list[Path]:
    """The photos of a folder dealt out to tars, as SA-1B names their members."""
    folder.mkdir(parents=True, exist_ok=True)
    tars = [folder / f"sa_{i:06d}.tar" for i in range(count)]
    names = sorted(path.stem for path in photos.glob("*.jpg"))
    for i, tar in enumerate(tars):
        with tarfile.open(tar, "w") as file:
            for name in names[i::count]:
                for suffix in (".jpg", ".json"):
                    file.add(photos / f"{name}{suffix}", f"./{name}{suffix}")
    return tars


def write_coco(photos: Path, path: Path) -> Path:
    """The photos of a folder as a json in COCO's format."""
    images, annotations = [], []
    for i, photo in enumerate(sorted(photos.glob("*.jpg")), 1):
        with Image.open(photo) as image:
            width, height = image.size
        images.append({"id": i, "file_name": photo.name, "height": height, "width": width})
        for one in json.loads(photo.with_suffix(".json").read_text())["annotations"]:
            box = [float(v) for v in rle_tools.toBbox(one["segmentation"])]
            record = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0}
            annotations.append(record | one)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return path


def annotation(number, image=1, **changes):
    base = {"id": number, "image_id": image, "category_id": 1, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0}
    return base | {"segmentation": [list(p) for p in SQUARE]} | changes


def coco_photos(limit=None):
    return Annotations(DATA / "coco" / "instances_val2017.json", DATA / "coco" / "val2017", "coco", limit)


def lvis_photos():
    pytest.importorskip("lvis")
    return Annotations(DATA / "lvis" / "lvis_v0.5_val.json", DATA / "lvis", "lvis")
