"""Masks, pictures and files that the page hands out."""

import base64
import io

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from skimage import data

from blsam import SamPredictor, sam_model_registry
from blsam.demo import segmenter
from blsam.demo.segmenter import Prompt, Segmenter
from blsam.options import shipped_checkpoint
from tests.demo.helpers import CUP, file_of, upload

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'blsam[demo]'")

from fastapi.testclient import TestClient  # noqa: E402

from blsam.demo.server import api  # noqa: E402


def test_files_hold_the_mask_of_a_predictor(client, sam, tmp_path):
    id = upload(client, file_of(data.coffee()))
    found = client.post(f"/api/photos/{id}/masks", json=CUP).json()
    predictor = SamPredictor(sam)
    predictor.set_image(data.coffee())
    points = np.array(CUP["points"], float)
    masks, scores, _ = predictor.predict(points[:, :2], points[:, 2], np.array(CUP["box"]))
    assert np.allclose([mask["score"] for mask in found["masks"]], scores, atol=1e-5)

    best = int(scores.argmax())
    wanted = {**CUP, "candidate": best, "name": "coffee.png"}
    mask = Image.open(io.BytesIO(client.post(f"/api/photos/{id}/export/mask.png", json=wanted).content))
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), masks[best] * 255)
    cut = np.asarray(Image.open(io.BytesIO(client.post(f"/api/photos/{id}/export/cutout.png", json=wanted).content)))
    assert np.array_equal(cut[..., :3], data.coffee()) and np.array_equal(cut[..., 3], masks[best] * 255)
    path = tmp_path / "coco.json"
    path.write_bytes(client.post(f"/api/photos/{id}/export/coco.json", json=wanted).content)
    coco = COCO(path)
    (annotation,) = coco.loadAnns(coco.getAnnIds(catIds=coco.getCatIds(["object"])))
    assert coco.loadImgs(1)[0] == {"id": 1, "file_name": "coffee.png", "height": 400, "width": 600}
    assert np.array_equal(coco.annToMask(annotation), masks[best])
    rows, columns = np.nonzero(masks[best])
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert annotation["bbox"] == box and annotation["area"] == masks[best].sum() > 5000
    assert annotation["score"] == pytest.approx(scores[best], abs=1e-5)


def test_the_overlay_is_the_mask_at_the_size_of_the_preview(client, shared):
    large = np.asarray(Image.fromarray(data.coffee()).resize((2400, 1600)))
    id = upload(client, file_of(large, "JPEG"))
    wanted = {"points": [[1080, 480, 1]], "keep_ratio": 0.25}
    found = client.post(f"/api/photos/{id}/masks", json=wanted).json()["masks"]
    preview = Image.open(io.BytesIO(client.get(f"/api/photos/{id}/preview").content))
    assert preview.size == (1280, 853)
    masks = shared.masks(shared.photo(id), 0.25, Prompt(((1080.0, 480.0, 1),))).masks
    for candidate, (mask, record) in enumerate(zip(masks, found)):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(record["overlay"]))).convert("RGBA"))[..., 3] > 0
        around = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0  # the edge is a line that covers both sides
        assert (mask <= shown).all() and (shown <= around).all()
        export = client.post(f"/api/photos/{id}/export/mask.png", json={**wanted, "candidate": candidate})
        full = Image.open(io.BytesIO(export.content))
        assert full.size == (2400, 1600)
        small = np.asarray(full.resize(preview.size, Image.Resampling.BILINEAR)) > 127
        iou = (mask & small).sum() / (mask | small).sum()
        assert iou > 0.98, f"candidate {candidate}: the mask shown and the one handed out agree to {iou:.3f}"


def test_a_turned_photo_is_segmented_upright(client):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    stored = np.rot90(data.coffee())
    answer = client.post("/api/photos", content=file_of(stored, "JPEG", quality=95, exif=exif)).json()
    assert (answer["width"], answer["height"]) == (600, 400)
    cut = client.post(f"/api/photos/{answer['id']}/export/cutout.png", json={**CUP, "candidate": 0}).content
    cut = np.asarray(Image.open(io.BytesIO(cut)))
    assert np.abs(cut[..., :3].astype(int) - data.coffee()).mean() < 4


def test_everything_of_a_large_photo_is_at_its_own_size(client, shared, tmp_path, monkeypatch):
    monkeypatch.setitem(segmenter.EVERYTHING, "points_per_side", 12)
    large = np.asarray(Image.fromarray(data.astronaut()).resize((1600, 1600)))
    id = upload(client, file_of(large))
    found = client.post(f"/api/photos/{id}/everything", json={"keep_ratio": 1}).json()
    overlay = Image.open(io.BytesIO(base64.b64decode(found["overlay"])))
    assert overlay.size == (1280, 1280) and len(np.unique(np.asarray(overlay))) == found["count"] + 2
    path = tmp_path / "coco.json"
    path.write_bytes(client.post(f"/api/photos/{id}/export/everything.json", json={"keep_ratio": 1}).content)
    coco = COCO(path)
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) == found["count"] > 5
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        assert mask.shape == (1600, 1600) and mask.sum() == annotation["area"] > 0
    shown = [record["area"] for record in shared.everything(shared.photo(id), 1.0)]
    ratio = np.array([annotation["area"] for annotation in annotations]) / shown
    assert np.abs(ratio / (1600 / 1280) ** 2 - 1).max() < 0.05


def test_routing_pictures_show_the_stages(client, shared):
    id = upload(client, file_of(np.full((512, 512, 3), 255, np.uint8)))
    share = []
    for stage in range(4):
        picture = client.get(f"/api/photos/{id}/routing", params={"keep_ratio": 0.25, "stage": stage}).content
        share.append((np.asarray(Image.open(io.BytesIO(picture)).convert("L")) > 160).mean())
    assert np.allclose(share, 0.25, atol=0.02)
    assert client.get(f"/api/photos/{id}/routing", params={"keep_ratio": 0.25, "stage": 4}).status_code == 400
    exact = TestClient(api(Segmenter(lambda: sam_model_registry["vit_t"](shipped_checkpoint("vit_t")))))
    id = upload(exact, file_of(data.coffee()))
    assert "no routing" in exact.get(f"/api/photos/{id}/routing", params={"keep_ratio": 1}).json()["error"]
