"""SA-1B's json and tars, damaged: photos with masks, or one line; nothing hangs."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from blsam.data.annotations import encode_mask
from blsam.data.sa1b import list_photos, parse
from blsam.images import encode_image
from tests.fuzz.helpers import changed_json, damaged_files, few, many, outcome

PIXELS = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
IMAGE = encode_image(PIXELS, "PNG")
MASK = np.zeros((8, 6), bool)
MASK[2:5, 1:4] = True
CONTENT = {
    "image": {"image_id": 1, "width": 6, "height": 8, "file_name": "sa_1.jpg"},
    "annotations": [
        {"id": 1, "segmentation": encode_mask(MASK), "area": 9, "bbox": [1, 2, 3, 3], "predicted_iou": 0.9},
        {"id": 2, "segmentation": {"size": [8, 6], "counts": [10, 5, 33]}, "area": 5},
    ],
}


def packed(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TEXT = json.dumps(CONTENT).encode()
TARS = {
    "plain": packed({"./sa_1.png": IMAGE, "./sa_1.json": TEXT}),
    "more": packed(
        {"a/sa_1.png": IMAGE, "a/sa_1.json": TEXT, "._sa_1.png": b"x", "sa_2.png": IMAGE, "sa_2.json": b"{"}
    ),
}


def whole(content):
    pixels, annotations = content
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    for one in annotations:
        assert list(one["segmentation"]["size"]) == list(pixels.shape[:2]) and np.isfinite(one["area"])


def check_json(content):
    found = outcome(lambda: parse(IMAGE, json.dumps(content).encode()), ValueError)
    if found is not None:
        whole(found)


def check_tar(case):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sa_0.tar"
        path.write_bytes(case[1])
        for photo in outcome(lambda: list_photos([path]), ValueError, FileNotFoundError) or ():
            content = outcome(photo.read, ValueError, OSError)
            if content is not None:
                whole(content)


# a tar's headers are a small part of it
NEAR = damaged_files({name: tar[: 4 * 512] + tar[4 * 512 :].rstrip(b"\0") for name, tar in TARS.items()})
CASES = {
    "SA-1B, json": (check_json, changed_json(CONTENT) | st.just(CONTENT), 100),
    "SA-1B, tars": (check_tar, NEAR, 100),
}


@pytest.mark.parametrize("name", CASES)
def test_a_few(name):
    few(*CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many(name, capsys):
    with capsys.disabled():
        many(*CASES[name][:2], name)


def test_what_is_damaged_was_whole():
    whole(parse(IMAGE, TEXT))
    assert Image.open(io.BytesIO(IMAGE)).size == (6, 8)
